"""The training loop, once, and the four trainings that use it.

Progress is counted in images.  A step's randomness is a function of (seed, images seen), so "run the same command
again" continues bit for bit where a killed run had stopped.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Autoencoder, Classifier, Directions
from diffex.data import ImageStore, Progress, sample_rows
from diffex.directions import DirectionModels, Objective, Responses, projector
from diffex.errors import UserError
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier

CHECKPOINT = "checkpoint.safetensors"
History = list[dict[str, float]]


class TrainingError(UserError):
    """Training went wrong numerically; the message says where, and what usually helps."""


class Task(Protocol):
    """One training: what ``fit`` drives.

    Attributes:
        name: for meters and messages.
        images: images of the whole training.
        batch_size: images a step.
    """

    name: str
    images: int
    batch_size: int

    def step(self, seen: int) -> dict[str, Tensor]:
        """One optimisation step on the images that follow ``seen``; returns detached scalar losses."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by reference: loading writes into these."""
        ...


def fit(
    task: Task, folder: Path, *, start: int = 0, until: int | None = None, seed: int = 0, every: float = 20.0,
    progress: Progress | None = None,
) -> History:  # fmt: skip
    """Train a task, from wherever a checkpoint in ``folder`` left it, to ``until`` images.

    Args:
        task: what to train.
        folder: where ``checkpoint.safetensors`` is kept; a kill at any moment leaves a whole one.
        start: images already behind the task's state when there is no checkpoint yet.
        until: stop after so many images (default: all of them).
        seed: of all randomness inside the steps.
        every: seconds between checkpoints.
        progress: told the images seen.

    Returns:
        Mean losses of about 100 stretches, each with ``images``.

    Raises:
        TrainingError: a loss is not finite.
    """
    until = task.images if until is None else min(until, task.images)
    until -= (until - start) % task.batch_size
    seen, history = start, History()
    if (folder / CHECKPOINT).is_file():
        seen, history = load_checkpoint(task, folder / CHECKPOINT)
    stretch = max(task.batch_size, (task.images // 100) // task.batch_size * task.batch_size)
    sums: dict[str, Tensor] = {}
    count, saved = 0, time.monotonic()
    while seen < until:
        torch.manual_seed(hash_seed(seed, seen))
        losses = task.step(seen)
        seen += task.batch_size
        count += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
        if seen % stretch == 0 or seen >= until:
            means = {name: float(total) / count for name, total in sums.items()}
            for name, mean in means.items():
                if not math.isfinite(mean):
                    raise TrainingError(
                        f"{task.name}: the {name} loss is {mean} after {seen} images; lower the learning rate, or "
                        "look for extreme pixels in the data"
                    )
            history.append({"images": seen, **means})
            sums, count = {}, 0
            if progress:
                progress(task.name, seen, until)
            if time.monotonic() - saved > every and seen < until:  # only between stretches: sums are empty there
                save_checkpoint(task, folder / CHECKPOINT, seen, history)
                saved = time.monotonic()
    save_checkpoint(task, folder / CHECKPOINT, seen, history)
    return history


def hash_seed(*numbers: int) -> int:
    """A 63-bit seed from a few integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def save_checkpoint(task: Task, path: Path, seen: int, history: History) -> None:
    """Write the task's tensors, images seen and history; the old file stays whole until the new one is."""
    waiting = path.with_suffix(f".{os.getpid()}.tmp")
    metadata = {"seen": str(seen), "history": json.dumps(history)}
    save_file({k: v.detach().contiguous().cpu() for k, v in task.tensors().items()}, waiting, metadata)
    waiting.replace(path)


def load_checkpoint(task: Task, path: Path) -> tuple[int, History]:
    """Read a checkpoint into the task; returns images seen and history."""
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, tensor in task.tensors().items():
            tensor.copy_(file.get_tensor(name))
        metadata = file.metadata()
    return int(metadata["seen"]), json.loads(metadata["history"])


def _named(prefix: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in module.state_dict(keep_vars=True).items():
        yield f"{prefix}.{name}", tensor


def _optimiser_tensors(optimiser: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Adam's moments and step counts, created up front so that a checkpoint can be read into them."""
    for i, parameter in enumerate(p for group in optimiser.param_groups for p in group["params"]):
        state = optimiser.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        for name, value in state.items():
            yield f"optimiser.{i}.{name}", value


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor, rate: float, clip: float | None = None) -> None:
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimiser.param_groups:
        group["lr"] = rate
        if clip:
            nn.utils.clip_grad_norm_(group["params"], clip)
    optimiser.step()


def cosine_rate(peak: float, seen: int, images: int, rise: int) -> float:
    """Learning rate after ``seen`` images: linear rise over ``rise`` images, then a cosine fall to 2 % of the peak."""
    return peak * min(1.0, (seen + 1) / rise) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, seen / images))))


# ----------------------------------------------------------------------------------------------------------------------
# Classifier, and the regressor of factors that measures edits on the simulated assay


class SupervisedTask:
    """Train a ``ResidualClassifier`` on the store's training images.

    Args:
        name: for meters.
        network: what to train; moved to the device.
        store: images.
        loss: ``loss(outputs (B, n), rows (B,) of the store) -> scalar``.
        settings: section ``classifier`` (width is not used here).
        images: images of the training.
    """

    def __init__(
        self, name: str, network: ResidualClassifier, store: ImageStore, loss: Callable[[Tensor, Tensor], Tensor],
        settings: Classifier, *, images: int, compute: Compute, seed: int,
    ) -> None:  # fmt: skip
        self.name, self.images, self.batch_size = name, images, settings.batch_size
        self.network, self.store, self.loss, self.settings = network.to(compute.device).train(), store, loss, settings
        self.compute, self.seed, self.rows = compute, seed, store.rows("train")
        self.optimiser = torch.optim.AdamW(
            network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )

    def step(self, seen: int) -> dict[str, Tensor]:
        batch = self.store.batch(sample_rows(self.rows, self.batch_size, seen, self.seed), self.compute.device)
        x = mirror(batch.x)
        x = x + self.settings.noise * torch.randn_like(x)
        with self.compute.autocast():
            out = self.network(x)
        loss = self.loss(out.float(), batch.rows)
        _descend(self.optimiser, loss, cosine_rate(self.settings.learning_rate, seen, self.images, self.images // 5))
        return {"loss": loss.detach()}

    def tensors(self) -> dict[str, Tensor]:
        return dict([*_named("network", self.network), *_optimiser_tensors(self.optimiser)])


def mirror(x: Tensor) -> Tensor:
    """Each image (B, C, H, W) mirrored left to right, and top to bottom, with probability one half each."""
    for axis in (-1, -2):
        chosen = torch.rand(len(x), device=x.device) < 0.5
        x = torch.where(chosen[:, None, None, None], x.flip(axis), x)
    return x


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1


class AutoencoderTask:
    """Train the diffusion autoencoder; the classifier term joins after the warm-up.

    Args:
        model: the autoencoder, trained in place.
        average: another one of the same settings, that holds the exponential moving average.
        store: images.
        probs: (N, n_classes) the classifier's verdict on every image of the store.
        classifier: frozen.
    """

    name = "autoencoder"

    def __init__(
        self, model: DiffusionAutoencoder, average: DiffusionAutoencoder, store: ImageStore, probs: Tensor,
        classifier: FrozenClassifier, *, lambda1: float, seed: int,
    ) -> None:  # fmt: skip
        self.settings: Autoencoder = model.settings
        self.batch_size = self.settings.batch_size
        self.images = self.settings.images - self.settings.images % self.batch_size
        self.model, self.average, self.store, self.probs = model.train(), average.requires_grad_(False), store, probs
        self.classifier, self.lambda1, self.seed, self.rows = classifier, lambda1, seed, store.rows("train")
        average.load_state_dict(model.state_dict())
        self.optimiser = torch.optim.Adam(
            model.parameters(), self.settings.learning_rate, betas=(0.9, self.settings.beta2), fused=True
        )

    @property
    def warmup_images(self) -> int:
        """Images of the warm-up, which does not depend on lambda1: trials branch from its end."""
        warm = int(self.images * self.settings.warmup_fraction)
        return warm - warm % self.batch_size

    def step(self, seen: int) -> dict[str, Tensor]:
        s, device = self.settings, self.model.compute.device
        batch = self.store.batch(sample_rows(self.rows, self.batch_size, seen, self.seed), device)
        x = mirror(batch.x) if s.flips else batch.x
        # Stratified times: every batch covers the whole range, which takes variance out of the loss.
        u = (
            torch.arange(self.batch_size, device=device) + torch.rand(self.batch_size, device=device)
        ) / self.batch_size
        t = (u * self.model.schedule.num_times).long().clamp_max(self.model.schedule.num_times - 1)
        lambda1 = self.lambda1 if seen >= self.warmup_images else 0.0
        loss, parts = self.model.loss(
            x, self.probs[batch.rows].to(device), t, torch.randn_like(x), classifier=self.classifier, lambda1=lambda1
        )
        rate = cosine_rate(s.learning_rate, seen, self.images, max(self.images // 16, 1))
        _descend(self.optimiser, loss, rate, s.clip)
        self._update_average(seen // self.batch_size)
        return parts

    @torch.no_grad()
    def _update_average(self, steps: int) -> None:
        decay = min(self.settings.ema, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(_floats(self.average), _floats(self.model), 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        pairs = [*_named("model", self.model), *_named("average", self.average), *_optimiser_tensors(self.optimiser)]
        return dict(pairs)


def _floats(module: nn.Module) -> list[Tensor]:
    """Parameters and running statistics: what is averaged."""
    return [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2


class DirectionsTask:
    """Train K directions on cached coordinates.

    Args:
        coordinates: (N, r) of the training images, in the subspace.
        responses: of the same images where the objective needs them, else None.
    """

    name = "directions"

    def __init__(
        self, settings: Directions, coordinates: Tensor, responses: Responses | None, *, seed: int
    ) -> None:  # fmt: skip
        torch.manual_seed(hash_seed(seed, 2))
        self.settings, self.coordinates, self.seed = settings, coordinates, seed
        self.batch_size = min(settings.batch_size, len(coordinates))
        self.images = max(self.batch_size, settings.images - settings.images % self.batch_size)
        dim = coordinates.shape[1]
        self.models = DirectionModels(settings.num_directions, dim, kind=settings.kind, depth=settings.depth)
        seen_by_projector = responses.image.shape[1] if responses is not None and settings.features == "image" else dim
        self.projector = projector(seen_by_projector, *((16, 64) if settings.features == "image" else ()))
        self.models.to(coordinates.device).train()
        self.projector.to(coordinates.device).train()
        self.objective = Objective(settings, self.models, self.projector, responses)
        parameters = [*self.models.parameters(), *self.projector.parameters()]
        self.optimiser = torch.optim.Adam(parameters, settings.learning_rate, weight_decay=settings.weight_decay)

    def step(self, seen: int) -> dict[str, Tensor]:
        rows = torch.from_numpy(sample_rows(np.arange(len(self.coordinates)), self.batch_size, seen, self.seed))
        loss, parts = self.objective(self.coordinates[rows], rows.to(self.coordinates.device))
        _descend(self.optimiser, loss, self.settings.learning_rate)
        return parts

    def tensors(self) -> dict[str, Tensor]:
        modules = [*_named("models", self.models), *_named("projector", self.projector)]
        return dict([*modules, *_optimiser_tensors(self.optimiser)])


def regression_loss(targets: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Loss of factor regression: smooth L1 against targets (N, F), by row of the store."""
    return lambda out, rows: F.smooth_l1_loss(out, targets[rows].to(out.device))


def classification_loss(labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy against labels (N,), by row of the store."""
    return lambda out, rows: F.cross_entropy(out, labels[rows].to(out.device))
