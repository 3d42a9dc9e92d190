"""Is the classifier's verdict robust, and a counterpart that is.

An attack looks for the worst image in a ball around each image x, of radius epsilon in the largest norm:

    max L(f(x'), y)   subject to   |x' - x|_inf <= epsilon,  -1 <= x' <= 1

with L the cross entropy of the true label y.  Epsilon is in the units of the images, whose range [-1, 1] is 2 long: one
grey level of 8 bits is 2/255.  With the logits z, L = softplus(m) for m = logsumexp_{j != y} z_j - z_y: m rises with L
and its gradient has the same signs, but it doesn't vanish where a sure classifier's cross entropy is 0 in floating
point (Carlini & Wagner, IEEE S&P 2017, section 5).  So m stands for L below.

Attacks only bound robustness from above: an accuracy found here is the accuracy under *these* attacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffex.compute import Compute
from diffex.config import Classifier
from diffex.data import Batch, ImageStore
from diffex.errors import UserError
from diffex.networks import ResidualClassifier
from diffex.statistics import bootstrap_interval
from diffex.team import ALONE, Team
from diffex.train import SupervisedTask, hash_seed, mirror

Logits = Callable[[Tensor], Tensor]

GREY = 2 / 255  # one grey level of 8 bits
EPSILONS = (GREY, 2 * GREY, 4 * GREY, 8 * GREY)
GRID = tuple(np.geomspace(2.0**-10, 1.0, 21).tolist())  # two to the octave

# ----------------------------------------------------------------------------------------------------------------------
# Attacks


def fgsm(classifier: Logits, x: Tensor, labels: Tensor, epsilon: float) -> Tensor:
    """One step along the signs of the gradient of the true labels' cross entropy.

    Args:
        classifier: a ``FrozenClassifier``, or any callable from images to logits (B, n), n >= 2; a module is attacked
            in evaluation mode, and neither its buffers nor its parameters' gradients are written.
        x: images (B, C, H, W) in [-1, 1].
        labels: (B,) true classes.
        epsilon: radius of the ball in the units of the images, >= 0.

    Returns:
        Images of the same shape, within epsilon of ``x`` and in [-1, 1].

    Raises:
        UserError: images, labels or epsilon out of range, or a classifier without a finite gradient.

    Source: Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015.
    """
    _check_epsilon(epsilon)
    with _attacking(classifier):
        x, labels = _checked(x, labels)
        gradient = _gradient(classifier, x, labels)[2]
        return (x + epsilon * gradient.sign()).clamp(-1.0, 1.0)


def pgd(
    classifier: Logits, x: Tensor, labels: Tensor, epsilon: float, *, steps: int = 10, step_size: float | None = None,
    seed: int = 0, restarts: int = 1, targeted: bool = False,
) -> Tensor:  # fmt: skip
    """Signed-gradient steps from random starts, each projected on the ball: the strongest first-order attack.

    Of all points visited, an image's attack is one that succeeds, and among those (or if none does) the one of the
    highest loss.  The image itself and its FGSM are among them, so the attack is never weaker than either.

    Args:
        classifier, x, epsilon: as in ``fgsm``.
        labels: (B,) true classes to lead away from; with ``targeted``, classes to lead to.
        steps: gradient steps from each start.
        step_size: in the units of the images (default: 2.5 epsilon / steps, enough to cross the ball).
        seed: of the random starts.
        restarts: number of random starts.
        targeted: lower the labels' cross entropy instead of raising it.

    Returns:
        Images of the same shape, within epsilon of ``x`` and in [-1, 1].

    Raises:
        UserError: images, labels or numbers that are out of range, or a classifier without a finite gradient.

    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018.
    """
    _check_epsilon(epsilon)
    if steps < 1 or restarts < 1:
        raise UserError(f"steps = {steps} and restarts = {restarts}: both must be at least 1")
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    with _attacking(classifier):
        x, labels = _checked(x, labels)
        low, high = (x - epsilon).clamp_min(-1.0), (x + epsilon).clamp_max(1.0)
        best, highest = x.clone(), x.new_full((len(x),), -torch.inf)
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def visit(x_adv: Tensor) -> Tensor:
            """Keep the point where it is the best so far; returns the signs of the gradient there."""
            logits, loss, gradient = _gradient(classifier, x_adv, labels, -1.0 if targeted else 1.0)
            success = (logits.argmax(dim=1) == labels) == targeted
            better = (success & ~done) | ((success == done) & (loss > highest))
            best[better], highest[better], done[better] = x_adv[better], loss[better], success[better]
            return gradient.sign()

        visit((x + epsilon * visit(x)).clamp(-1.0, 1.0))
        for restart in range(restarts):
            generator = torch.Generator().manual_seed(hash_seed(seed, restart))  # equal numbers on every device
            x_adv = torch.clamp(x + epsilon * (2 * torch.rand(x.shape, generator=generator) - 1).to(x), low, high)
            for _ in range(steps):
                x_adv = torch.clamp(x_adv + step_size * visit(x_adv), low, high)
            visit(x_adv)
        return best


@contextmanager
def _attacking(classifier: Logits) -> Iterator[None]:
    """Gradients on whatever the caller does, and a module in evaluation mode: its running statistics stay."""
    training = [m for m in classifier.modules() if m.training] if isinstance(classifier, nn.Module) else []
    for module in training:  # not eval(), which exported programs lack and which would not be undone module by module
        module.training = False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _gradient(classifier: Logits, x: Tensor, labels: Tensor, sign: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, n), loss +-m (B,) and its gradient at the images, all detached; nothing reaches the parameters."""
    x = x.detach().requires_grad_()
    logits = classifier(x).float()
    if logits.dim() != 2 or logits.shape[1] < 2 or int(labels.max()) >= logits.shape[1]:
        raise UserError(f"the classifier returns {list(logits.shape)}, but labels up to {int(labels.max())} were given")
    chosen = labels[:, None]
    others = logits.scatter(1, chosen, -torch.inf).logsumexp(dim=1)
    loss = sign * (others - logits.gather(1, chosen)[:, 0])
    gradient = torch.autograd.grad(loss.sum(), x, allow_unused=True)[0] if loss.requires_grad else None
    if gradient is None:
        raise UserError("the classifier passes no gradient to its images, so it can't be attacked by one")
    if not (logits.isfinite().all() and gradient.isfinite().all()):
        raise UserError("the classifier's logits, or their gradient to the images, are not finite")
    return logits.detach(), loss.detach(), gradient


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon < math.inf:
        raise UserError(f"epsilon = {epsilon}: it must be a finite number >= 0, in the units of images in [-1, 1]")


def _checked(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if x.dim() != 4 or len(x) == 0 or labels.shape != x.shape[:1] or int(labels.min()) < 0:
        raise UserError(
            f"images {list(x.shape)} and labels {list(labels.shape)}: give (B, C, H, W) and (B,) classes >= 0, B >= 1"
        )
    x = x.detach().float().clone()
    if not float(x.abs().max()) <= 1 + 1e-4:
        raise UserError(f"images reach {float(x.abs().max()):.3g}: attacks need them in [-1, 1]")
    return x, labels.to(x.device, torch.int64)


# ----------------------------------------------------------------------------------------------------------------------
# Report


def attack_report(
    classifier: Logits, x: Tensor, labels: Tensor, groups: NDArray, *, epsilons: Sequence[float] = EPSILONS,
    grid: Sequence[float] = GRID, steps: int = 10, restarts: int = 1, seed: int = 0, batch_size: int = 256,
) -> dict[str, Any]:  # fmt: skip
    """How much of a classifier's accuracy withstands attacks, and how large an attack flips an image.

    An image is right under an attack if it is right both as it is and attacked.  PGD runs at every epsilon and grid
    value in ascending order, on the images that are still right: what lies in a small ball lies in every larger one, so
    PGD's accuracy can't rise with epsilon.  FGSM's can; if it does, or lies far above PGD's, gradients mislead.

    Args:
        classifier: a ``FrozenClassifier``, or any callable from images to logits.
        x: held-out images (N, C, H, W) in [-1, 1].
        labels: (N,) true classes.
        groups: (N,) statistical unit of each image (well, donor, ...); intervals resample units.
        epsilons: radii that are reported, in the units of the images (default: 1, 2, 4, 8 grey levels of 8 bits).
        grid: radii > 0 tried for the smallest that flips an image (default: geometric, 2 to the octave, up to 1).
        steps, restarts, seed: of PGD.
        batch_size: images attacked at once.

    Returns:
        n, units, steps, restarts, accuracy with its 95 % interval; ``attacks``, for each epsilon the accuracy under
        FGSM and PGD with intervals; ``smallest_epsilon`` of the n images that are right: the median smallest radius
        tried that flips an image, its interval (Woodruff, JASA 1952: where the interval of the share flipped meets
        1/2), and the share that withstood all.  What can't be told (above all radii, or too few units) is None.

    Raises:
        UserError: images, labels, groups or numbers that are out of range.
    """
    tried = sorted({float(e) for e in (*epsilons, *grid)})
    for e in tried:
        _check_epsilon(e)
    if len(groups) != len(x) or batch_size < 1:
        raise UserError(f"{len(x)} images, {len(groups)} groups, batch_size {batch_size}: give each image's unit, >= 1")
    x, labels = _checked(x, labels)

    def right(rows: NDArray[np.int64], attack: Callable[[Tensor, Tensor], Tensor]) -> NDArray[np.bool_]:
        """Whether the images of the rows, attacked, are classified as their labels."""
        found = [np.zeros(0, bool)]
        for start in range(0, len(rows), batch_size):
            part = torch.from_numpy(rows[start : start + batch_size]).to(x.device)
            attacked = attack(x[part], labels[part])
            with _attacking(classifier), torch.no_grad():
                found.append((classifier(attacked).argmax(dim=1) == labels[part]).cpu().numpy())
        return np.concatenate(found)

    def summary(values: NDArray[np.bool_], name: str) -> dict[str, object]:
        interval = bootstrap_interval(values.astype(float), groups, seed=seed)
        return {name: float(values.mean()), f"{name}_interval": [None if math.isnan(v) else v for v in interval]}

    clean = right(np.arange(len(x)), lambda x, _: x)
    smallest = np.where(clean, np.inf, 0.0)
    for e in tried:
        left = np.flatnonzero(smallest == np.inf)
        attack = partial(pgd, classifier, epsilon=e, steps=steps, restarts=restarts, seed=seed)
        smallest[left[~right(left, attack)]] = e
    attacks = []
    for e in map(float, epsilons):
        stays = clean.copy()
        stays[clean] = right(np.flatnonzero(clean), partial(fgsm, classifier, epsilon=e))
        attacks.append({"epsilon": e, **summary(stays, "fgsm_accuracy"), **summary(smallest > e, "pgd_accuracy")})
    return {
        "n": len(x), "units": len(np.unique(groups)), "steps": steps, "restarts": restarts,
        **summary(clean, "accuracy"), "attacks": attacks,
        "smallest_epsilon": _smallest(smallest[clean], np.asarray(groups)[clean], tried, seed),
    }  # fmt: skip


def _smallest(smallest: NDArray, groups: NDArray, tried: Sequence[float], seed: int) -> dict[str, object]:
    """Median and its interval of the smallest radii (n,), inf where none of those tried flips the image."""
    n, shares = len(smallest), [(smallest <= e).astype(float) for e in tried]
    bounds = [bootstrap_interval(share, groups, seed=seed) for share in shares]

    def first(reached: Iterable[bool]) -> float | None:
        return next((e for e, yes in zip(tried, reached, strict=True) if yes), None)

    return {
        "n": n, "median": first(n > 0 and share.mean() >= 0.5 for share in shares),
        "median_interval": [first(high >= 0.5 for _, high in bounds), first(low >= 0.5 for low, _ in bounds)],
        "withstood": float((smallest == np.inf).mean()) if n else None, "tried": list(tried),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Adversarial training


class AdversarialTask(SupervisedTask):
    """Train a ``ResidualClassifier`` on images that are attacked before each step: FGSM from a random start.

        delta ~ U(-epsilon, epsilon);  delta <- clip(delta + 1.25 epsilon sign(grad_x loss(x + delta)), +-epsilon)

    With epsilon or share 0 it is the parent, bit for bit.  At a large epsilon FGSM training may collapse ("catastrophic
    overfitting": right under FGSM, wrong under PGD), which ``attack_report`` shows.

    Args:
        name, network, store, loss, settings, images, compute, seed, team, accumulate: as in ``SupervisedTask``; the
            attack raises the very loss that training lowers, whatever it is.
        epsilon: radius of the attack in the units of the images, in [-1, 1].
        share: share of each batch that is attacked, in [0, 1]; 1: all.

    Raises:
        UserError: epsilon or share out of range.

    Source: Wong, Rice & Kolter, "Fast is better than free", ICLR 2020, algorithm 3; half of them attacked as in
    Goodfellow et al., ICLR 2015.
    """

    def __init__(
        self, name: str, network: ResidualClassifier, store: ImageStore, loss: Callable[[Tensor, Tensor], Tensor],
        settings: Classifier, *, images: int, compute: Compute, seed: int, epsilon: float, share: float = 0.5,
        team: Team = ALONE, accumulate: int = 1,
    ) -> None:  # fmt: skip
        _check_epsilon(epsilon)
        if not 0 <= share <= 1:
            raise UserError(f"share = {share}: the share of a batch that is attacked lies in [0, 1]")
        super().__init__(
            name, network, store, loss, settings, images=images, compute=compute, seed=seed, team=team,
            accumulate=accumulate,
        )  # fmt: skip
        self.epsilon, self.num_attacked = epsilon, round(share * self.batch_size)

    def _draw(self) -> list[Tensor]:
        """The parent's random numbers, then where the attacks start, in [-1, 1]; batches are shuffled, so their first
        images are any images."""
        drawn = super()._draw()
        attacked = self.num_attacked if self.epsilon else 0
        return [*drawn, 2 * torch.rand_like(drawn[-1][:attacked]) - 1] if attacked else drawn

    def _shown(self, batch: Batch, mirrors: Tensor, noise: Tensor, start: Tensor | None = None) -> Tensor:
        x = mirror(batch.x, mirrors)
        if start is not None and len(start):
            x = torch.cat([self._attack(x[: len(start)], batch.rows[: len(start)], start), x[len(start) :]])
        return x + self.settings.noise * noise

    def _attack(self, x: Tensor, rows: Tensor, start: Tensor) -> Tensor:
        low, high = (x - self.epsilon).clamp_min(-1.0), (x + self.epsilon).clamp_max(1.0)
        start = torch.clamp(x + self.epsilon * start, low, high)
        with _attacking(self.network):
            start.requires_grad_()
            with self.compute.autocast():
                out = self.network(start)
            (gradient,) = torch.autograd.grad(self.loss(out.float(), rows), start)
        return torch.clamp(start.detach() + 1.25 * self.epsilon * gradient.sign(), low, high)
