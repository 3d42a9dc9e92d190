"""Stage 3, above the table: render edits, let the classifier judge them, write the effects table; counterfactuals.

The effects table is the waist of the library.  One row stands for one (image, direction, alpha): the classifier's
probability of every class for the original, for its reconstruction (alpha = 0) and for the edit, how far the code
moved, and how the image changed.  Ranking, statistics and report read the table (``diffex.ranking``) and never render.

Effects are measured from the *reconstruction*, so the autoencoder's error is not taken for an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diffex import metrics
from diffex.classifier import FrozenClassifier
from diffex.directions import DirectionSet
from diffex.errors import UserError, did_you_mean
from diffex.model import Code, DiffusionAutoencoder

MAP = 8  # change maps are pooled to MAP x MAP pixels a channel
CHANGED = 0.05  # of the intensity range: a pixel that changes by less looks the same

Distance = Callable[[Tensor, Tensor], Tensor]
"""Distance of two batches of images (B, C, H, W) in [-1, 1]: (B,)."""


@dataclass(frozen=True)
class Edit:
    """One edit: kind and number of the direction, and signed length: ``alpha`` standard deviations, or, where that is
    None, ``sign`` times the reference length (that of the class-mean difference), at which ranking compares."""

    kind: str
    direction: int
    sign: float
    alpha: float | None


@dataclass(frozen=True)
class Measure:
    """A regressor of factors (the assay's ruler): images (B, C, H, W) to (B, F), with the factors' names."""

    names: tuple[str, ...]
    network: Callable[[Tensor], Tensor]


def plan_edits(
    num_directions: int, alphas: Sequence[float], num_random: int, baselines: Mapping[str, int]
) -> list[Edit]:
    """The edits of every image.

    Learned directions go both ways at every alpha and at the reference length; random ones and baselines go one way at
    the reference length.
    """
    edits = [
        Edit("learned", k, sign, alpha)
        for k in range(num_directions)
        for sign in (1.0, -1.0)
        for alpha in (*alphas, None)
    ]
    edits += [Edit("random", k, 1.0, None) for k in range(num_random)]
    return edits + [Edit(kind, k, 1.0, None) for kind, number in baselines.items() for k in range(number)]


@torch.no_grad()
def effects_table(
    model: DiffusionAutoencoder, classifier: FrozenClassifier, directions: Mapping[str, DirectionSet],
    edits: Sequence[Edit], x: Tensor, rows: Tensor, *, reference: float, measure: Measure | None = None,
    judges: Mapping[str, FrozenClassifier] | None = None, distances: Mapping[str, Distance] | None = None,
    cells: Tensor | None = None, conditioned_on: FrozenClassifier | None = None, code: Code | None = None,
    batch_size: int = 64,
) -> pa.Table:  # fmt: skip
    """Encode images once, render all edits of them, and tabulate what changed.

    Args:
        model: trained autoencoder.
        classifier: frozen.
        directions: kind -> set, for every kind that ``edits`` name.
        edits: what to render.
        x: images (B, C, H, W) in [-1, 1].
        rows: (B,) their rows in the store, to join metadata by.
        reference: the reference length, in standard deviations.
        measure: regressor of factors, or None.
        judges: name -> other classifier whose verdict is tabulated beside the explained one's.
        distances: name -> distance of two batches of images, from reconstruction to edit.
        cells: (B, H, W) masks of the cells, so that changes inside and outside can be told apart.
        conditioned_on: the classifier whose verdict is part of the code; None: the explained one.
        code: of the images, where they were encoded before.
        batch_size: images rendered at a time.

    Returns:
        B * len(edits) rows: ``row, kind, direction, alpha, reference, length_z, ssim, l1``, ``change`` (signed, pooled
        to MAP x MAP, C * MAP * MAP float32), ``changed`` (share of pixels that change by more than CHANGED in some
        channel), ``p_original:<class>``, ``p_reconstruction:<class>``, ``p_edit:<class>``; ``shift:<factor>`` where
        there is a measure; ``<judge>_reconstruction:<class>`` and ``<judge>_edit:<class>`` of each judge; ``<name>`` of
        each distance; ``l1_cell`` and ``l1_outside`` where there are masks (NaN where a mask is empty or full).
    """
    judges, distances = judges or {}, distances or {}
    probs = classifier.probabilities(x)
    if code is None:
        code = model.encode(x, conditioned_on.probabilities(x) if conditioned_on else probs)
    reconstruction = model.decode(code.z, code.x_T)
    p_reconstruction = classifier.probabilities(reconstruction)
    factors = measure.network(reconstruction) if measure else None
    before = {name: judge.probabilities(reconstruction).cpu().numpy() for name, judge in judges.items()}
    unit = {kind: group.unit(code.z) for kind, group in directions.items()}
    per_call = max(1, batch_size // len(x))
    parts = []
    for start in range(0, len(edits), per_call):
        group = edits[start : start + per_call]
        lengths = [e.sign * (reference if e.alpha is None else e.alpha) for e in group]
        dz = torch.cat([
            directions[e.kind].subspace.shift(length * unit[e.kind][e.direction])
            for e, length in zip(group, lengths, strict=True)
        ])  # fmt: skip
        repeat = len(group)
        edited = model.decode(code.z.repeat(repeat, 1) + dz, code.x_T.repeat(repeat, 1, 1, 1))
        base = reconstruction.repeat(repeat, 1, 1, 1)
        change = (edited - base) / 2
        columns: dict[str, object] = {
            "row": rows.repeat(repeat).numpy(),
            "kind": [e.kind for e in group for _ in range(len(x))],
            "direction": np.repeat([e.direction for e in group], len(x)),
            "alpha": np.repeat(np.array(lengths, np.float32), len(x)),
            "reference": np.repeat([e.alpha is None for e in group], len(x)),
            "length_z": dz.norm(dim=1).cpu().numpy(),
            "ssim": metrics.ssim(edited, base).cpu().numpy(),
            "l1": change.abs().flatten(1).mean(dim=1).cpu().numpy(),
            "changed": (change.abs().amax(dim=1) > CHANGED).flatten(1).float().mean(dim=1).cpu().numpy(),
            "change": _maps(change),
        }
        columns |= {name: distance(base, edited).cpu().numpy() for name, distance in distances.items()}
        if cells is not None:
            columns |= _by_mask(change, cells.to(change).repeat(repeat, 1, 1))
        p_edit = classifier.probabilities(edited).cpu().numpy()
        for c, name in enumerate(classifier.class_names):
            columns[f"p_original:{name}"] = probs[:, c].repeat(repeat).cpu().numpy()
            columns[f"p_reconstruction:{name}"] = p_reconstruction[:, c].repeat(repeat).cpu().numpy()
            columns[f"p_edit:{name}"] = p_edit[:, c]
        for judge, said in before.items():
            after = judges[judge].probabilities(edited).cpu().numpy()
            for c, name in enumerate(judges[judge].class_names):
                columns[f"{judge}_reconstruction:{name}"] = np.tile(said[:, c], repeat)
                columns[f"{judge}_edit:{name}"] = after[:, c]
        if measure and factors is not None:
            shift = (measure.network(edited) - factors.repeat(repeat, 1)).cpu().numpy()
            columns |= {f"shift:{name}": shift[:, j] for j, name in enumerate(measure.names)}
        parts.append(pa.table(columns))
    return pa.concat_tables(parts).combine_chunks()


def _by_mask(change: Tensor, inside: Tensor) -> dict[str, NDArray]:
    """Mean absolute change of a pixel inside and outside the cells, from changes (B, C, H, W), masks (B, H, W)."""
    size = change.abs().mean(dim=1)
    found = {}
    for name, mask in (("l1_cell", inside), ("l1_outside", 1 - inside)):
        found[name] = ((size * mask).sum(dim=(1, 2)) / mask.sum(dim=(1, 2))).cpu().numpy()  # 0 / 0 is NaN
    return found


def _maps(change: Tensor) -> pa.FixedSizeListArray:
    pooled = F.adaptive_avg_pool2d(change, min(MAP, change.shape[-1])).flatten(1).cpu().numpy().astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(pooled.reshape(-1)), pooled.shape[1])


# ----------------------------------------------------------------------------------------------------------------------
# Explaining single images


@dataclass(frozen=True)
class Attribution:
    """Why the classifier does not say ``target``, image by image.

    Attributes:
        target: name of the class asked for.
        effect: (B, K, 2) change of p(target) against the reconstruction, at the longest alpha, for + and -.
        flips_at: (B, K, 2) smallest alpha tried at which the classifier says target; NaN where none does.
        direction, sign: (B,) the direction that flips at the smallest alpha (where none flips: of the largest effect).
        counterfactual: (B, C, H, W) images in [-1, 1] along that direction, at that alpha.
        reconstruction: (B, C, H, W) what they are to be compared with.
        p_target: (B, 2) p(target) of reconstruction and counterfactual.
    """

    target: str
    effect: Tensor
    flips_at: Tensor
    direction: Tensor
    sign: Tensor
    counterfactual: Tensor
    reconstruction: Tensor
    p_target: Tensor


class Explainer:
    """A trained explanation, ready for images that it has never seen.

    Args:
        model, directions, classifier: as trained.

    Example:
        >>> explainer = diffex.load_explainer("my-run")                                         # doctest: +SKIP
        >>> why = explainer.attribute(x, target="treated")                                      # doctest: +SKIP
    """

    def __init__(self, model: DiffusionAutoencoder, directions: DirectionSet, classifier: FrozenClassifier) -> None:
        self.model, self.directions, self.classifier = model, directions, classifier

    @torch.no_grad()
    def attribute(
        self, x: Tensor, target: str | int, *, alphas: Sequence[float] = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0),
        batch_size: int = 64,
    ) -> Attribution:  # fmt: skip
        """Which direction would make the classifier say ``target``, and what the cell would look like then.

        Args:
            x: images (B, C, H, W) in [-1, 1], channels and size as in training.
            target: class name or index.
            alphas: shift lengths to try, in standard deviations; both signs.
            batch_size: images rendered at a time.

        Returns:
            The attribution.  Costs ``B * (encode + render * 2 * K * len(alphas))`` U-Net evaluations.

        Raises:
            UserError: wrong shape or range of x, or no such class.
        """
        names = self.classifier.class_names
        if isinstance(target, str) and target not in names:
            raise UserError(f"there is no class {target!r}: {did_you_mean(target, names)}")
        c = names.index(target) if isinstance(target, str) else int(target)
        if not 0 <= c < len(names):
            raise UserError(f"there is no class {c}: the classes are 0 to {len(names) - 1}")
        if x.dim() != 4 or len(x) == 0 or tuple(x.shape[1:]) != self.model.shape:
            raise UserError(
                f"attribute takes images of shape (B, {', '.join(map(str, self.model.shape))}), got {tuple(x.shape)}"
            )
        if not torch.isfinite(x).all() or x.abs().max() > 1.001:
            raise UserError("attribute takes finite images in [-1, 1]; map yours with (x - low) / (high - low) * 2 - 1")
        steps = sorted(abs(float(a)) for a in alphas)
        if not steps:
            raise UserError("attribute needs one alpha at least to try")
        x = x.to(self.model.compute.device, torch.float32)
        code = self.model.encode(x, self.classifier.probabilities(x))
        reconstruction = self.model.decode(code.z, code.x_T)
        before = self.classifier.probabilities(reconstruction)[:, c]
        b, k = len(x), len(self.directions)
        p = torch.empty(b, k, 2, len(steps))
        said = torch.empty(b, k, 2, len(steps), dtype=torch.bool)
        for d in range(k):
            for s, a in product(range(2), range(len(steps))):
                probs = self.classifier.probabilities(self._edit(code, d, steps[a] * (1 - 2 * s), batch_size))
                p[:, d, s, a], said[:, d, s, a] = probs[:, c].cpu(), (probs.argmax(dim=1) == c).cpu()
        effect = p[..., -1] - before.cpu()[:, None, None]
        grid = torch.tensor(steps)
        flips_at = torch.where(said, grid, torch.inf).min(dim=-1).values
        # Smallest alpha first; among equals, and where nothing flips, the largest effect.
        score = torch.where(flips_at.isinf(), grid[-1] + 1, flips_at) - 1e-3 * effect.double()
        best = score.flatten(1).argmin(dim=1)
        direction, sign = best // 2, 1.0 - 2.0 * (best % 2)
        alpha = flips_at.flatten(1).gather(1, best[:, None])[:, 0]
        alpha = torch.where(alpha.isinf(), grid[-1], alpha) * sign
        alone = [Code(*(part[i : i + 1] for part in code)) for i in range(b)]
        edits = zip(alone, direction.tolist(), alpha.tolist(), strict=True)
        counterfactual = torch.cat([self._edit(one, k, a, 1) for one, k, a in edits])
        after = self.classifier.probabilities(counterfactual)[:, c]
        return Attribution(
            target=names[c], effect=effect, flips_at=torch.where(flips_at.isinf(), torch.nan, flips_at),
            direction=direction, sign=sign, counterfactual=counterfactual, reconstruction=reconstruction,
            p_target=torch.stack([before, after], dim=1),
        )  # fmt: skip

    def _edit(self, code: Code, direction: int, alpha: float, batch_size: int) -> Tensor:
        z = self.directions.shift(code.z, direction, alpha)
        pairs = zip(z.split(batch_size), code.x_T.split(batch_size), strict=True)
        return torch.cat([self.model.decode(part, noise) for part, noise in pairs])


@torch.no_grad()
def render_trajectory(
    model: DiffusionAutoencoder, directions: DirectionSet, code: Code, direction: int, alphas: Sequence[float],
    batch_size: int = 64,
) -> Tensor:  # fmt: skip
    """Images of codes shifted along one direction, (A, B, C, H, W) in [-1, 1].

    Args:
        code: of B images.
        alphas: signed lengths in standard deviations.
    """
    unit = directions.unit(code.z)[direction]
    z = torch.cat([code.z + directions.subspace.shift(a * unit) for a in alphas])
    pairs = zip(z.split(batch_size), code.x_T.repeat(len(alphas), 1, 1, 1).split(batch_size), strict=True)
    return torch.cat([model.decode(part, noise) for part, noise in pairs]).unflatten(0, (len(alphas), len(code.z)))


def traversal(explainer: Explainer, x: Tensor, direction: int, alphas: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Images along a direction: (B, A, C, H, W) in [-1, 1], and the classifier's probabilities (B, A, n_classes)."""
    code = explainer.model.encode(x, explainer.classifier.probabilities(x))
    images = render_trajectory(explainer.model, explainer.directions, code, direction, alphas)
    probs = explainer.classifier.probabilities(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return images.transpose(0, 1).cpu().contiguous(), probs.transpose(0, 1).cpu().contiguous()


def choose_rows(
    labels: NDArray, predicted: NDArray, groups: NDArray, candidates: NDArray, source: int, num: int, seed: int
) -> NDArray[np.int64]:
    """Images of class ``source`` to explain: rightly classified ones of ``candidates``, drawn evenly over units."""
    rows = candidates[(labels[candidates] == source) & (predicted[candidates] == source)]
    return evenly(rows, groups, num, [seed, source])


def evenly(rows: NDArray[np.int64], groups: NDArray, num: int, seed: int | Sequence[int]) -> NDArray[np.int64]:
    """Up to ``num`` of the rows, drawn at random, as many of one unit as of another as far as they reach.

    Args:
        rows: of the store.
        groups: (N,) unit of every image of the store.
    """
    rows = np.random.default_rng(seed).permutation(rows)
    turn = np.zeros(len(rows), np.int64)  # how many of its unit stand before it
    seen: dict[int, int] = {}
    for i, g in enumerate(groups[rows]):
        turn[i] = seen[int(g)] = seen.get(int(g), -1) + 1
    return rows[np.argsort(turn, kind="stable")][:num]
