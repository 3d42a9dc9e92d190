"""The training loop, once, and the four trainings that use it.

Progress is counted in images.  A step's randomness is a function of (seed, images seen), so "run the same command
again" continues bit for bit where a killed run had stopped.  Every worker of a team draws the whole batch's numbers and
takes its share, so their number changes losses by rounding only; dropout masks alone differ.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Autoencoder, Classifier, Directions
from diffex.data import Batch, ImageStore, Progress, sample_rows
from diffex.directions import DirectionModels, Objective, Responses, projector
from diffex.errors import UserError
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier, join
from diffex.team import ALONE, Team

CHECKPOINT = "checkpoint.safetensors"
History = list[dict[str, float]]

log = logging.getLogger(__name__)


class TrainingError(UserError):
    """Training went wrong numerically; the message says where, and what usually helps."""


class CheckpointError(UserError):
    """A checkpoint is damaged, or another training's; the message says which, and why."""


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
        """One optimisation step on the images that follow ``seen``; torch's generator is seeded before, alike on all
        workers.

        Returns:
            Detached scalar losses, whose mean over the team's workers is that over the batch.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by reference: loading writes into these."""
        ...


def fit(
    task: Task, folder: Path, *, start: int = 0, until: int | None = None, seed: int = 0, every: float = 20.0,
    progress: Progress | None = None, team: Team = ALONE, saved: Callable[[], None] | None = None,
    point: Callable[[str, Mapping[str, float]], None] | None = None, base: Path | None = None,
) -> History:  # fmt: skip
    """Train a task, from wherever a checkpoint in ``folder`` left it, to ``until`` images.

    Args:
        task: what to train; made alike on every worker of the team.
        folder: where ``checkpoint.safetensors`` is kept; a kill at any moment leaves a whole one.
        start: images already behind the task's state when there is no checkpoint yet.
        until: stop after so many images (default: all of them).
        seed: of all randomness inside the steps.
        every: seconds between checkpoints.
        progress: told the images seen.
        team: the workers that train together.  Rank 0 alone sees ``folder`` and ``base``, and calls what is to be told.
        saved: called after each checkpoint written.
        point: told the task's name and each item of the history as it comes.
        base: a checkpoint to start from when the folder holds none, or a damaged one.

    Returns:
        Mean losses of about 100 stretches, each with ``images``; equal on every worker.

    Raises:
        TrainingError: a loss is not finite.
    """
    until = task.images if until is None else min(until, task.images)
    until -= (until - start) % task.batch_size
    seen, history = team.broadcast(
        task.tensors().values(), _restored(task, (folder / CHECKPOINT, base), start) if team.rank == 0 else (0, [])
    )
    stretch = max(task.batch_size, (task.images // 100) // task.batch_size * task.batch_size)
    sums: dict[str, Tensor] = {}
    count, last = 0, time.monotonic()

    def save() -> None:  # needs no exchange: all workers are in the same state
        if team.rank == 0:
            save_checkpoint(task, folder / CHECKPOINT, seen, history)
            if saved:
                saved()

    while seen < until:
        torch.manual_seed(hash_seed(seed, seen))
        losses = task.step(seen)
        seen += task.batch_size
        count += 1
        for name, value in losses.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
        if seen % stretch == 0 or seen >= until:
            means = {name: total / count for name, total in team.means(sums).items()}
            for name, mean in means.items():
                if not math.isfinite(mean):
                    raise TrainingError(
                        f"{task.name}: the {name} loss is {mean} after {seen} images; lower the learning rate, or "
                        "look for extreme pixels in the data"
                    )
            history.append({"images": seen, **means})
            sums, count = {}, 0
            if point and team.rank == 0:
                point(task.name, history[-1])
            if progress and team.rank == 0:
                progress(task.name, seen, until)
            if time.monotonic() - last > every and seen < until:  # only between stretches: sums are empty there
                save()
                last = time.monotonic()
    save()
    return history


def _restored(task: Task, checkpoints: Sequence[Path | None], start: int) -> tuple[int, History]:
    """Images seen and history, from the first checkpoint that is there and whole, read into the task."""
    for path in checkpoints:
        if path is not None and path.is_file():
            try:
                return load_checkpoint(task, path)
            except CheckpointError as error:
                log.warning("%s; training starts again from what there is without it", error)
    return start, []


def hash_seed(*numbers: int) -> int:
    """A 63-bit seed from a few integers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def save_checkpoint(task: Task, path: Path, seen: int, history: History) -> None:
    """Write the task's tensors, images seen and history; the old file stays whole until the new one is."""
    waiting = path.with_suffix(f".{os.getpid()}.tmp")
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in task.tensors().items()}
    metadata = {"seen": str(seen), "history": json.dumps(history)}
    metadata["checksum"] = _checksum(metadata, ((name, tensors[name]) for name in sorted(tensors)))
    save_file(tensors, waiting, metadata)
    waiting.replace(path)


def load_checkpoint(task: Task, path: Path) -> tuple[int, History]:
    """Read a checkpoint into the task; returns images seen and history.

    Raises:
        CheckpointError: the file is damaged, or holds other tensors; the task is untouched.
    """
    tensors = task.tensors()
    try:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            metadata = file.metadata() or {}
            found = ((name, file.get_tensor(name)) for name in sorted(file.keys()))
            if metadata.get("checksum") != _checksum(metadata, found):
                raise CheckpointError(f"checkpoint {str(path)!r} is damaged: its checksum is not that of its bytes")
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
            if shapes != {name: list(tensor.shape) for name, tensor in tensors.items()}:
                raise CheckpointError(f"checkpoint {str(path)!r} is of another network or optimiser")
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {str(path)!r} is damaged: {str(error).splitlines()[0]}") from None
    return int(metadata["seen"]), json.loads(metadata["history"])


def _checksum(metadata: Mapping[str, str], tensors: Iterator[tuple[str, Tensor]]) -> str:
    """CRC-32 of a checkpoint's numbers, and of the bytes of its tensors in the order of their names."""
    crc = zlib.crc32(f"{metadata.get('seen')} {metadata.get('history')}".encode())
    for name, tensor in tensors:
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


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


def _backward(
    loss: nn.Module, take: Callable[[slice], Sequence[Any]], batch_size: int, team: Team, accumulate: int
) -> dict[str, Tensor]:
    """The gradient of a batch's mean loss, of which this worker works on its share, in ``accumulate`` parts.

    Args:
        loss: what ``team.wrap`` made of a function that returns a mean over the items it is given, and its parts.
        take: the loss's arguments for some of the batch.

    Returns:
        The loss's parts; their means over the team are those over the batch.
    """
    sums: dict[str, Tensor] = {}
    loss.zero_grad(set_to_none=True)
    for part in range(accumulate):
        weight = team.weight(batch_size, part, accumulate)
        with team.local(loss, part < accumulate - 1):
            value, parts = loss(*take(team.slice(batch_size, part, accumulate)))
            (weight * value).backward()
        for name, mean in parts.items():
            sums[name] = sums.get(name, torch.zeros_like(mean)) + weight * mean
    return sums


def _descend(optimiser: torch.optim.Optimizer, rate: float, clip: float | None = None) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate
        if clip:
            nn.utils.clip_grad_norm_(group["params"], clip)
    optimiser.step()


def _check_team(name: str, batch_size: int, team: Team, accumulate: int) -> None:
    if team.size * accumulate > batch_size:
        raise UserError(
            f"{name}: {team.size} workers, each in {accumulate} parts, can't share a batch of {batch_size}: lower "
            "run.workers or run.accumulate, or raise the batch_size"
        )


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
        loss: ``loss(outputs (B, n), rows (B,) of the store) -> scalar``, a mean over the B images.
        settings: section ``classifier`` (width is not used here).
        images: images of the training.
        team: workers that train it together; batch normalisation becomes one over all of them.
        accumulate: parts in which a worker takes its share of a batch, each with batch statistics of its own.

    Raises:
        UserError: fewer images in a batch than workers times parts.
    """

    def __init__(
        self, name: str, network: ResidualClassifier, store: ImageStore, loss: Callable[[Tensor, Tensor], Tensor],
        settings: Classifier, *, images: int, compute: Compute, seed: int, team: Team = ALONE, accumulate: int = 1,
    ) -> None:  # fmt: skip
        _check_team(name, settings.batch_size, team, accumulate)
        self.name, self.images, self.batch_size = name, images, settings.batch_size
        self.network, self.store, self.loss, self.settings = network.to(compute.device).train(), store, loss, settings
        self.compute, self.seed, self.rows = compute, seed, store.rows("train")
        self.team, self.accumulate = team, accumulate
        self.optimiser = torch.optim.AdamW(
            network.parameters(), settings.learning_rate, weight_decay=settings.weight_decay, fused=True
        )
        join(network, team)
        self._wrapped = team.wrap(self._loss, network)

    def step(self, seen: int) -> dict[str, Tensor]:
        rows, drawn = sample_rows(self.rows, self.batch_size, seen, self.seed), self._draw()

        def take(some: slice) -> tuple[Tensor, Tensor]:
            batch = self.store.batch(rows[some], self.compute.device)
            return self._shown(batch, *[numbers[some] for numbers in drawn]), batch.rows

        parts = _backward(self._wrapped, take, self.batch_size, self.team, self.accumulate)
        _descend(self.optimiser, cosine_rate(self.settings.learning_rate, seen, self.images, self.images // 5))
        return parts

    def _draw(self) -> list[Tensor]:
        """Random numbers of a whole batch, by image."""
        info, device = self.store.info, self.compute.device
        shape = (self.batch_size, len(info.channels), info.size, info.size)
        return [draw_mirrors(self.batch_size, device), torch.randn(shape, device=device)]

    def _shown(self, batch: Batch, mirrors: Tensor, noise: Tensor) -> Tensor:
        """What the network sees of a batch."""
        return mirror(batch.x, mirrors) + self.settings.noise * noise

    def _loss(self, x: Tensor, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with self.compute.autocast():
            out = self.network(x)
        loss = self.loss(out.float(), rows)
        return loss, {"loss": loss.detach()}

    def tensors(self) -> dict[str, Tensor]:
        return dict([*_named("network", self.network), *_optimiser_tensors(self.optimiser)])


def draw_mirrors(count: int, device: torch.device) -> Tensor:
    """Whether to mirror each of ``count`` images left to right, and top to bottom: (count, 2), one half each."""
    return torch.stack([torch.rand(count, device=device) < 0.5 for _ in range(2)], dim=1)


def mirror(x: Tensor, mirrors: Tensor | None = None) -> Tensor:
    """Images (B, C, H, W) mirrored left to right, and top to bottom, as ``mirrors`` (B, 2) says, or at random."""
    mirrors = draw_mirrors(len(x), x.device) if mirrors is None else mirrors
    for axis, chosen in zip((-1, -2), mirrors.T, strict=True):
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
        team, accumulate: as in ``SupervisedTask``.

    Raises:
        UserError: fewer images in a batch than workers times parts.
    """

    name = "autoencoder"

    def __init__(
        self, model: DiffusionAutoencoder, average: DiffusionAutoencoder, store: ImageStore, probs: Tensor,
        classifier: FrozenClassifier, *, lambda1: float, seed: int, team: Team = ALONE, accumulate: int = 1,
    ) -> None:  # fmt: skip
        self.settings: Autoencoder = model.settings
        _check_team(self.name, self.settings.batch_size, team, accumulate)
        self.batch_size = self.settings.batch_size
        self.images = self.settings.whole_images
        self.model, self.average, self.store, self.probs = model.train(), average.requires_grad_(False), store, probs
        self.classifier, self.lambda1, self.seed, self.rows = classifier, lambda1, seed, store.rows("train")
        self.team, self.accumulate = team, accumulate
        average.load_state_dict(model.state_dict())
        self.optimiser = torch.optim.Adam(
            model.parameters(), self.settings.learning_rate, betas=(0.9, self.settings.beta2), fused=True
        )
        join(model, team)
        self._wrapped = team.wrap(self._loss, model)

    @property
    def warmup_images(self) -> int:
        """Images of the warm-up, which does not depend on lambda1: trials branch from its end."""
        return self.settings.warmup_images

    def step(self, seen: int) -> dict[str, Tensor]:
        s, device, count = self.settings, self.model.compute.device, self.batch_size
        rows = sample_rows(self.rows, count, seen, self.seed)
        mirrors = draw_mirrors(count, device) if s.flips else None
        # Stratified times: every batch covers the whole range, which takes variance out of the loss.
        u = (torch.arange(count, device=device) + torch.rand(count, device=device)) / count
        t = (u * self.model.schedule.num_times).long().clamp_max(self.model.schedule.num_times - 1)
        noise = torch.randn(count, *self.model.shape, device=device)
        self.team.part_ways()
        lambda1 = self.lambda1 if seen >= self.warmup_images else 0.0

        def take(some: slice) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
            x = self.store.batch(rows[some], device).x
            x = x if mirrors is None else mirror(x, mirrors[some])
            return x, self.probs[rows[some]].to(device), t[some], noise[some], lambda1

        parts = _backward(self._wrapped, take, count, self.team, self.accumulate)
        _descend(self.optimiser, cosine_rate(s.learning_rate, seen, self.images, max(self.images // 16, 1)), s.clip)
        self._update_average(seen // count)
        return parts

    def _loss(
        self, x: Tensor, probs: Tensor, t: Tensor, noise: Tensor, lambda1: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.model.loss(x, probs, t, noise, classifier=self.classifier, lambda1=lambda1)

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
        team: workers that train them together; see ``Objective``.  A batch is never taken in parts.
    """

    name = "directions"

    def __init__(
        self, settings: Directions, coordinates: Tensor, responses: Responses | None, *, seed: int, team: Team = ALONE
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
        self.objective = Objective(settings, self.models, self.projector, responses, team)
        parameters = [*self.models.parameters(), *self.projector.parameters()]
        self.optimiser = torch.optim.Adam(parameters, settings.learning_rate, weight_decay=settings.weight_decay)
        for module in (self.models, self.projector):
            join(module, team)
        self._wrapped = team.wrap(self.objective, self.models, self.projector)

    def step(self, seen: int) -> dict[str, Tensor]:
        rows = torch.from_numpy(sample_rows(np.arange(len(self.coordinates)), self.batch_size, seen, self.seed))
        batch = self.coordinates[rows], rows.to(self.coordinates.device)
        parts = _backward(self._wrapped, lambda _: batch, self.batch_size, ALONE, 1)  # each has the whole batch's loss
        _descend(self.optimiser, self.settings.learning_rate)
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
