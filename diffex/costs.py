"""What each stage will cost, before it runs: network passes, bytes in the store, points of training curves.

    seconds(stage)     = sum over operations of (how many, from ``FORMULAS``) x (seconds each, measured on a machine)
    evaluations(stage) = unet.forward + unet.training                         the figure that a stage notes in its facts

Operations are named ``<network>.<pass>``: 'forward' (no gradient), 'gradient' (to the input only), 'training' (an
image's share of a whole step).  The networks are unet, encoder, classifier, witness, robust, ruler and directions (all
K at once; an item is a code).  Other operations are image.draw, image.copy, image.read, cell.measure and cell.mask.

Counts are exact where settings decide them, and upper bounds elsewhere: the rank of the code's subspace is taken for
``autoencoder.code_dim`` unless it is given, and classes are taken to have images enough that are rightly classified.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from diffex import assay
from diffex.classifier import is_given
from diffex.compute import Compute
from diffex.config import Autoencoder, Experiment, Rendering
from diffex.data import RECORD
from diffex.directions import DirectionModels, needs_responses, projector
from diffex.explain import MAP, plan_edits
from diffex.features import measure_many
from diffex.instruments import ATTACKED, RULER_WIDTH
from diffex.layouts import open_source
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier
from diffex.pipeline import GRAPH, absent
from diffex.prepare import StoreSource
from diffex.sources import Source
from diffex.splits import PARTS
from diffex.stages import class_pairs

META = Compute(torch.device("meta"), bf16=False)
SHOWN = 4  # images of a traversal
LENGTHS = 7  # of a traversal
FLOAT = 5.0  # bytes of a float32 in a Parquet file: 4 where a column outgrows its dictionary, 5.5 before
POOL = 16  # side that responses are pooled to

# ----------------------------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class Images:
    """What a cost depends on in the data.

    Attributes:
        class_names: sorted.
        channels: number of channels C.
        counts: part -> images of each class; rounded shares, where the split itself keeps wells together.
        pixel_bytes: bytes of one channel's pixel on the disk.
        index_bytes: bytes of an image's row in the index.
        copied: whether the data stage copies pixels (an ingested store of the same size is only viewed).
    """

    class_names: tuple[str, ...]
    channels: int
    counts: Mapping[str, tuple[int, ...]]
    pixel_bytes: int = 1
    index_bytes: int = 64
    copied: bool = True

    def number(self, part: str | None = None) -> int:
        """Images of a part, or of all."""
        return sum(map(sum, self.counts.values())) if part is None else sum(self.counts[part])

    @classmethod
    def even(cls, e: Experiment, number: int, channels: int, class_names: Sequence[str] = ("0", "1")) -> Images:
        """So many images in classes of one size: for data that are not there yet.

        Args:
            e: for the shares of the parts.
            number: N.
            channels: C.
            class_names: of the classes.
        """
        by_class = [len(part) for part in np.array_split(np.arange(number), len(class_names))]
        return cls(tuple(sorted(class_names)), channels, _parts(e, by_class), copied=e.data.path is None)

    @classmethod
    def of(cls, e: Experiment) -> Images:
        """Count an experiment's images without reading a pixel (but one image, where channels have no names).

        Raises:
            UserError: data that can't be opened.
        """
        if e.data.path is None:
            names = sorted({assay.CONTROL, *(e.assay.treatments or assay.DESIGNS[e.assay.design])})
            channels = len(e.data.channels or assay.DEFAULT_CHANNELS)
            images = cls.even(e, e.assay.num_images, channels, names)
            return cls(images.class_names, channels, images.counts, index_bytes=72)
        path = Path(e.data.path)
        ingested = (path / RECORD).is_file()
        source: Source = StoreSource(path) if ingested else open_source(e.data, e.assay)
        class_of = source.class_names
        if e.data.class_column is not None:
            wanted = f"metadata_{e.data.class_column.lower().removeprefix('metadata_')}"
            class_of = next((np.array([str(v) for v in column]) for name, column in source.metadata.items()
                             if name.lower() == wanted), class_of)  # fmt: skip
        most = e.data.max_per_class or len(class_of)
        names = sorted(e.data.classes) or sorted(set(class_of.tolist()) - {""})
        by_class = [min(most, int((class_of == name).sum())) for name in names]
        named = e.data.channels or e.data.channel_names or source.channels
        info = source.store.info if isinstance(source, StoreSource) else None
        return cls(
            tuple(names), len(named) if named else int(getattr(source, "depth", 3)), _parts(e, by_class),
            pixel_bytes=np.dtype(info.dtype).itemsize if info else 1,
            index_bytes=13 + sum(_width(column) for column in source.metadata.values()),
            copied=info is None or info.size != e.data.size,
        )  # fmt: skip


def _parts(e: Experiment, by_class: Sequence[int]) -> dict[str, tuple[int, ...]]:
    valid = [round(n * e.data.valid_fraction) for n in by_class]
    test = [round(n * e.data.test_fraction) for n in by_class]
    train = [n - v - t for n, v, t in zip(by_class, valid, test, strict=True)]
    return dict(zip(PARTS, (tuple(train), tuple(valid), tuple(test)), strict=True))


def _width(column: NDArray) -> int:
    """Bytes that a value takes in Arrow: strings have a length and an offset."""
    return 4 + column.dtype.itemsize // 4 if column.dtype.kind == "U" else max(column.dtype.itemsize, 4)


# ----------------------------------------------------------------------------------------------------------------------
# Costs


@dataclass(frozen=True)
class Cost:
    """What a stage, or several, cost.

    Attributes:
        work: operation -> how many.
        bytes: of the finished entry.
        scratch: bytes of the folder while it is computed: checkpoints, shards.
        points: points of training curves that are logged.
    """

    work: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    scratch: int = 0
    points: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.work + other.work, self.bytes + other.bytes, max(self.scratch, other.scratch),
            self.points + other.points,
        )  # fmt: skip

    @property
    def unet_evaluations(self) -> int:
        return self.work["unet.forward"] + self.work["unet.training"]

    @property
    def unet_passes(self) -> int:
        """U-Net evaluations in units of a forward pass: one in training also goes back, which costs two."""
        return self.work["unet.forward"] + 3 * self.work["unet.training"]

    def seconds(self, units: Mapping[str, float]) -> float:
        """Seconds on a machine whose operations take ``units`` seconds each; those that it does not name are free."""
        return sum(number * units.get(operation, 0.0) for operation, number in self.work.items())

    def flops(self, each: Mapping[str, float]) -> float:
        """Floating-point operations, two for a multiplication with addition; see ``flops``."""
        return self.seconds(each)


@dataclass(frozen=True)
class Case:
    """An experiment on its images: what the formulas read.

    Attributes:
        e: the experiment.
        images: its images.
        rank: dimensions of the subspace; None: all of the code's, which none exceeds.
    """

    e: Experiment
    images: Images
    rank: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, side, classes."""
        return self.images.channels, self.e.data.size, len(self.images.class_names)

    @property
    def pixels(self) -> int:
        return self.images.channels * self.e.data.size**2

    @property
    def r(self) -> int:
        d = self.e.autoencoder.code_dim
        return d if self.rank is None or self.e.directions.space != "whitened" else min(self.rank, d)

    @property
    def pooled(self) -> int:
        """Numbers that an expected image is pooled to."""
        return self.images.channels * min(POOL, self.e.data.size) ** 2

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        return class_pairs(self.e, self.images.class_names)

    @cached_property
    def edited(self) -> int:
        """Images of all source classes that are edited."""
        test = self.images.counts["test"]
        return sum(min(self.e.ranking.num_images, test[s]) for s in dict.fromkeys(s for s, _ in self.pairs))

    @property
    def reported(self) -> int:
        """Directions reported for a pair."""
        return min(self.e.ranking.top, self.e.directions.num_directions)

    @property
    def model(self) -> DiffusionAutoencoder:
        return _autoencoder(self.e.autoencoder, self.e.rendering, *self.shape)

    @property
    def direction_modules(self) -> tuple[DirectionModels, nn.Module]:
        s = self.e.directions
        image = needs_responses(s) and s.features == "image"
        with META.device:
            models = DirectionModels(s.num_directions, self.r, kind=s.kind, depth=s.depth)
            return models, projector(self.pooled if image else self.r, *((16, 64) if image else ()))

    def supervised(self, network: str) -> ResidualClassifier:
        """The classifier-like network of that name."""
        e, (channels, _, classes) = self.e, self.shape
        if network == "robust":
            network = "witness" if is_given(e.classifier) else "classifier"
        width = {"classifier": e.classifier.width, "witness": e.evaluation.witness_width, "ruler": RULER_WIDTH}
        names = e.data.channels or assay.DEFAULT_CHANNELS
        outputs = len(assay.visible_factors(names)) if network == "ruler" else classes
        with META.device:
            return ResidualClassifier(channels, outputs, width=width[network])

    def task_images(self, images: int, batch: int) -> tuple[int, int]:
        """Images that a training really sees (whole batches), and the number of points of its curve."""
        stretch = max(batch, (images // 100) // batch * batch)
        seen = images - images % batch
        return seen, -(-seen // stretch)


@cache
def _autoencoder(s: Autoencoder, r: Rendering, channels: int, size: int, classes: int) -> DiffusionAutoencoder:
    return DiffusionAutoencoder(s, r, channels=channels, size=size, num_classes=classes, compute=META)


def _stored(*modules: nn.Module) -> int:
    """Bytes of the modules' tensors in a file."""
    return sum(t.numel() * t.element_size() for module in modules for t in module.state_dict().values())


def _checkpoint(*trained: nn.Module, average: bool = False) -> int:
    """Bytes of a checkpoint: the modules (twice with their average), and Adam's two moments and step counts."""
    moments = sum(2 * p.numel() * p.element_size() + 4 for module in trained for p in module.parameters())
    return _stored(*trained) * (2 if average else 1) + moments


def _curve(points: int, losses: int) -> int:
    """Bytes of a history.json."""
    return points * (20 + 36 * losses)


# ----------------------------------------------------------------------------------------------------------------------
# The stages


def _data(c: Case) -> Cost:
    n = c.images.number()
    work = Counter({"image.draw" if c.e.data.path is None else "image.copy": n}) if c.images.copied else Counter()
    row = c.images.index_bytes + (c.pixels * c.images.pixel_bytes if c.images.copied else 8)
    return Cost(work, n * row + 2_000)


def _supervised(c: Case, network: str, images: int) -> Cost:
    seen, points = c.task_images(images, c.e.classifier.batch_size)
    module = c.supervised(network)
    work = Counter({f"{network}.training": seen, "image.read": seen})
    return Cost(work, _stored(module) + _curve(points, 1) + 8_000, _checkpoint(module), points)


def _judging(network: str, images: int) -> Cost:
    return Cost(Counter({f"{network}.forward": images, "image.read": images}))


def _classifier(c: Case) -> Cost:
    n = c.images.number()
    verdicts = _judging("classifier", n) + Cost(bytes=n * len(c.images.class_names) * 4)
    return verdicts if is_given(c.e.classifier) else verdicts + _supervised(c, "classifier", c.e.classifier.images)


def _ruler(c: Case) -> Cost:
    held_out = c.images.number("valid") + c.images.number("test")
    return _supervised(c, "ruler", c.e.evaluation.ruler_images) + _judging("ruler", held_out)


def _witness(c: Case) -> Cost:
    return _supervised(c, "witness", c.e.evaluation.witness_images) + _judging("witness", c.images.number("test"))


def _robust(c: Case) -> Cost:
    cost = _supervised(c, "robust", c.e.evaluation.robust_images) + _judging("robust", c.images.number("test"))
    batch = c.e.classifier.batch_size
    attacks = min(ATTACKED, c.images.number("test")) * (3 * 8 + 1)  # 3 radii of 5 steps and 3 looks more each, 1 FGSM
    trained = cost.work["robust.training"] // batch * round(batch / 2)
    return cost + Cost(Counter({"robust.gradient": trained + attacks, "classifier.gradient": attacks}))


def _real_cells(c: Case) -> Cost:
    held_out = zip(c.images.counts["valid"], c.images.counts["test"], strict=True)
    n = sum(min(c.e.evaluation.real_images, v + t) for v, t in held_out)
    return Cost(Counter({"cell.measure": n, "image.read": n}), _features(c, n))


def _features(c: Case, rows: int) -> int:
    """Bytes of a table of classical features: 8 a value, and what Parquet notes of each column."""
    return _num_features(c.images.channels) * (round(8.5 * rows) + 450)


@cache
def _num_features(channels: int) -> int:
    noise = np.random.default_rng(0).random((1, channels, 32, 32), np.float32)
    return len(measure_many(noise, ["DNA", *(f"channel {i}" for i in range(1, channels))]))


def _stage_1(c: Case) -> tuple[int, int]:
    """Images of the warm-up, and of the whole training."""
    s = c.e.autoencoder
    return s.warmup_images, s.whole_images


def _warmup(c: Case) -> Cost:
    warm, whole = _stage_1(c)
    points = -(-warm * c.task_images(whole, c.e.autoencoder.batch_size)[1] // whole)
    size = _checkpoint(c.model, average=True) + _curve(points, 1)
    return Cost(Counter({"unet.training": warm, "encoder.training": warm, "image.read": warm}), size, size, points)


def _branch(c: Case) -> Cost:
    s = c.e.autoencoder
    warm, whole = _stage_1(c)
    n, judged = whole - warm, s.lambda1 > 0
    truncated = s.truncated_steps if judged and s.classifier_term == "truncated" else 0
    work = Counter({"unet.training": n * (1 + truncated), "encoder.training": n, "image.read": n})
    if judged:
        work["classifier.gradient"] = n
    points = c.task_images(whole, s.batch_size)[1]
    logged = points + (points - _warmup(c).points) * judged
    return Cost(work, _stored(c.model) + _curve(points, 1 + judged), _checkpoint(c.model, average=True), logged)


def _reconstruction(c: Case) -> Cost:
    n = min(c.e.evaluation.num_images, c.images.number("test"))
    work = {
        "unet.forward": n * (c.model.encode_evaluations + 3 * c.model.render_evaluations), "encoder.forward": n,
        "classifier.forward": 3 * n, "witness.forward": 8 * n, "image.read": 2 * n,
    }  # fmt: skip
    return Cost(Counter(work), 4 * min(12, n) * c.pixels + 5_000)


def _latents(c: Case) -> Cost:
    n = c.images.number()
    size = n * c.e.autoencoder.code_dim * 4 + 1_000
    return Cost(Counter({"encoder.forward": n, "image.read": n}), size, 2 * size)  # shards, and what they are joined to


def _answered(c: Case) -> int:
    """Images around which responses are measured."""
    return min(c.e.directions.response_images, c.images.number("train"))


def _responses(c: Case) -> Cost:
    n = _answered(c)
    looks = 2 * c.r * n
    work = Counter({"unet.forward": looks, "classifier.forward": looks})
    return Cost(work, n * (c.pooled + len(c.images.class_names)) * c.r * 4 + n * 8 + 500)


def _directions(c: Case) -> Cost:
    s, d = c.e.directions, c.e.autoencoder.code_dim
    seen, points = c.task_images(s.images, min(s.batch_size, _trained_on(c)))
    models, project = c.direction_modules
    losses = 4 if s.lambda3 > 0 else 2
    size = _stored(models) + 4 * (d + d * c.r + c.r) + _curve(points, losses) + 2_000
    return Cost(Counter({"directions.training": seen}), size, _checkpoint(models, project), points * losses)


def _trained_on(c: Case) -> int:
    return _answered(c) if needs_responses(c.e.directions) else c.images.number("train")


def _replicas(c: Case) -> Cost:
    one, n, k = _directions(c), c.e.evaluation.replicas, c.e.directions.num_directions
    profiles = (n + 1) * k * (c.r + (c.pooled if needs_responses(c.e.directions) else 0)) * 4
    return Cost(Counter({"directions.training": n * one.work["directions.training"]}), profiles + 500, one.scratch)


def _codes(c: Case) -> Cost:
    n = c.edited
    work = {"unet.forward": n * c.model.encode_evaluations, "encoder.forward": n, "image.read": n}
    size = round(n * (c.pixels + c.e.autoencoder.code_dim) * FLOAT) + 3_000
    return Cost(Counter(work), size, 2 * size)


def _rendered(c: Case, edits: int) -> Cost:
    """Rendering and judging edits of every chosen image, and its reconstruction."""
    n, ruler = c.edited, c.e.data.path is None
    work = {
        "unet.forward": n * (1 + edits) * c.model.render_evaluations, "classifier.forward": n * (3 + edits),
        "witness.forward": n * (1 + 3 * edits), "robust.forward": n * (1 + edits), "cell.mask": n, "image.read": n,
        "ruler.forward": n * (1 + edits) * ruler,
    }  # fmt: skip
    factors = len(assay.visible_factors(c.e.data.channels or assay.DEFAULT_CHANNELS)) / 2 if ruler else 0
    numbers = c.images.channels * min(MAP, c.e.data.size) ** 2 + 6 + 3 * len(c.images.class_names) + factors
    return Cost(Counter(work), size := round(n * edits * FLOAT * numbers) + 15_000, size)


def _references(c: Case) -> Cost:
    number = {"class_mean": len(c.pairs), "linear": len(c.pairs), "principal": min(c.e.directions.num_directions, c.r)}
    return _rendered(c, c.e.evaluation.random_directions + sum(number[n] for n in c.e.evaluation.baselines))


def _effects(c: Case) -> Cost:
    learned = _rendered(c, len(plan_edits(c.e.directions.num_directions, c.e.ranking.alphas, 0, {})))
    return learned + Cost(bytes=_references(c).bytes)  # the references are copied into the one table


def _evidence(c: Case) -> Cost:
    s, pairs = c.e.evaluation, len(c.pairs)
    number, steps = min(s.followed_images, c.e.ranking.num_images), s.steps
    followed = min(max(s.audited, pairs), pairs * min(s.audited, c.e.directions.num_directions))
    sources = len({source for source, _ in c.pairs[:followed]})
    starts, ends = sources * number, followed * number
    model = c.model
    work = {
        "unet.forward": starts * (model.encode_evaluations + model.render_evaluations)
        + ends * (steps + 1) * model.render_evaluations,
        "encoder.forward": 2 * starts + ends, "classifier.forward": ends * (steps + 2), "image.read": starts,
        "robust.forward": ends * (steps + 1), "witness.forward": ends * (5 * (steps + 1) + 2) + starts,
        "cell.measure": 2 * starts + ends,
    }  # fmt: skip
    paths = round(ends * (steps + 1) * FLOAT * (8 + 3 * len(c.images.class_names)))
    return Cost(Counter(work), _features(c, 2 * starts + ends) + paths + 9_000)


def _pictures(c: Case) -> Cost:
    rows = len(c.pairs) * c.reported
    n = SHOWN * rows
    work = {
        "unet.forward": n * (c.model.encode_evaluations + LENGTHS * c.model.render_evaluations), "encoder.forward": n,
        "classifier.forward": n * (1 + LENGTHS), "image.read": n,
    }  # fmt: skip
    return Cost(Counter(work), n * LENGTHS * (c.pixels + len(c.images.class_names) * 4) + 2_000)


FORMULAS: dict[str, Callable[[Case], Cost]] = {
    "data": _data, "classifier": _classifier, "ruler": _ruler, "witness": _witness, "robust": _robust,
    "real_cells": _real_cells, "warmup": _warmup, "autoencoder": _branch, "reconstruction": _reconstruction,
    "latents": _latents, "responses": _responses, "directions": _directions, "replicas": _replicas,
    "codes": _codes, "references": _references, "effects": _effects, "evidence": _evidence, "pictures": _pictures,
}  # fmt: skip
"""Stage -> its cost.  A stage that is not here only reads tables and costs nothing that matters."""


def stage_costs(e: Experiment, images: Images | None = None, *, rank: int | None = None) -> dict[str, Cost]:
    """The cost of every stage of an experiment, run alone.

    Args:
        e: the experiment.
        images: its images (default: counted).
        rank: dimensions of the directions' subspace, where known.
    """
    case = Case(e, images or Images.of(e), rank)
    there = [name for name in GRAPH if name not in absent(e)]
    return {name: FORMULAS[name](case) if name in FORMULAS else Cost() for name in there}
