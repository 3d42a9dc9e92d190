"""What a stage is given, who does its heavy parts, and small things that several stages need.

A stage's heavy part is either a training (``Crew.fit``) or the same work on many items (``Crew.map``).  Here both run
in the stage's own process; ``diffex.trainer`` holds the crew that spreads them over Ray workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar, cast

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from diffex import train
from diffex.cells import compartments
from diffex.classifier import FrozenClassifier, is_given, load_classifier
from diffex.compute import Compute
from diffex.config import Experiment, from_dict
from diffex.data import ImageStore, Progress, ingest_record
from diffex.explain import Distance
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier
from diffex.perceptual import critic_distance, load_lpips
from diffex.settings import to_dict
from diffex.store import RECORD, Store
from diffex.team import ALONE, Team

T = TypeVar("T", bound=train.Task)
Fitted: TypeAlias = tuple[T, train.History]
"""A trained task, and its history."""

Observe = Callable[[str, Mapping[str, Any]], None]
"""``observe(stage, facts)``: told of each stage that is there; with EFFECTS_SO_FAR of the ``table`` rendered until
then, so that a scheduler can stop a bad trial; with POINT of each ``point`` of a training curve of ``stage``."""

EFFECTS_SO_FAR = "effects so far"
POINT = "point"


@dataclass(frozen=True, kw_only=True)
class Order:
    """All that another process, on any node, needs to take part in a stage; small and picklable."""

    settings: dict[str, Any]
    stage: str
    digest: str
    needs: dict[str, str]
    store: str


class Crew(Protocol):
    """Who does the heavy parts of a stage."""

    def fit(self, w: Work, make: Callable[[Work, Team], T], until: int | None, base: str | None) -> Fitted[T]:
        """Train what ``make`` builds to ``until`` images, from the checkpoint in ``w.out``; where there is none, from
        that of the stage ``base``."""
        ...

    def map(
        self, w: Work, prepare: Callable[[Work], Any], function: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """(number, ``function(prepare(w), item)``) of every item, in any order; what is prepared is prepared once."""
        ...


class Alone:
    """The crew of one: everything in this process."""

    def fit(self, w: Work, make: Callable[[Work, Team], T], until: int | None, base: str | None) -> Fitted[T]:
        task = make(w, ALONE)
        return task, fit_here(w, task, ALONE, until, base)

    def map(
        self, w: Work, prepare: Callable[[Work], Any], function: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        prepared = prepare(w) if items else None
        for number, item in enumerate(items):
            yield number, function(prepared, item)


def fit_here(w: Work, task: train.Task, team: Team, until: int | None, base: str | None) -> train.History:
    """Take part, as one of a team, in a training whose checkpoints lie in ``w.out``."""
    run = w.experiment.run
    start = None if base is None else w.inputs[base] / train.CHECKPOINT
    return train.fit(
        task, w.out, until=until, seed=run.seed, every=run.checkpoint_seconds, progress=w.progress, team=team,
        saved=w.saved, point=lambda name, point: w.observe(POINT, {"stage": name, "point": point}), base=start,
    )  # fmt: skip


@dataclass(kw_only=True)
class Work:
    """What a stage is given: settings, the folders of the stages it needs, where to write, and who helps."""

    experiment: Experiment
    inputs: dict[str, Path]
    out: Path
    compute: Compute
    progress: Progress = lambda what, done, total: None
    observe: Observe = lambda stage, facts: None
    crew: Crew = field(default_factory=Alone)
    saved: Callable[[], None] = lambda: None
    order: Order | None = None

    @classmethod
    def of(cls, order: Order, **hooks: Any) -> Work:
        """Take up an order on this machine: inputs and work in progress are brought here where they are not."""
        store, e = Store(order.store), from_dict(order.settings)
        inputs = {}
        for stage, digest in order.needs.items():
            entry = store.get(stage, digest)
            if entry is None:
                raise FileNotFoundError(f"stage {stage} ({digest}) is not in the store {order.store}")
            inputs[stage] = entry.path
        return cls(
            experiment=e, inputs=inputs, out=store.partial(order.stage, order.digest), compute=Compute.resolve(e.run),
            saved=lambda: store.save_partial(order.stage, order.digest), order=order, **hooks,
        )  # fmt: skip

    def fit(self, make: Callable[[Work, Team], T], *, until: int | None = None, base: str | None = None) -> Fitted[T]:
        """Train what ``make`` builds, with the crew; see ``Crew.fit``."""
        return self.crew.fit(self, make, until, base)

    def facts(self, stage: str) -> dict[str, Any]:
        """What a stage that this one needs has noted."""
        return cast("dict[str, Any]", json.loads((self.inputs[stage] / RECORD).read_text(encoding="utf-8"))["facts"])

    def images(self) -> ImageStore:
        return ImageStore(self.inputs["data"], origin=self.experiment.data.path)

    def classifier(self, store: ImageStore) -> FrozenClassifier:
        trained = self.inputs["classifier"] / "model.safetensors"
        info = store.info
        frozen = load_classifier(
            self.experiment.classifier, info.class_names, len(info.channels), info.size,
            trained if trained.is_file() else None,
        )  # fmt: skip
        return frozen.to(self.compute.device)

    def autoencoder(self) -> DiffusionAutoencoder:
        return DiffusionAutoencoder.load(self.inputs["autoencoder"], self.experiment.rendering, self.compute)

    def new_autoencoder(self, store: ImageStore) -> DiffusionAutoencoder:
        info = store.info
        return DiffusionAutoencoder(
            self.experiment.autoencoder, self.experiment.rendering, channels=len(info.channels), size=info.size,
            num_classes=len(info.class_names), compute=self.compute,
        )  # fmt: skip

    def judge(self, stage: str, store: ImageStore) -> FrozenClassifier:
        """The witness or the robust counterpart."""
        e, info = self.experiment, store.info
        own = stage == "robust" and not is_given(e.classifier)
        width = e.classifier.width if own else e.evaluation.witness_width
        network = ResidualClassifier(len(info.channels), len(info.class_names), width=width)
        network.load_state_dict(load_file(self.inputs[stage] / "model.safetensors"))
        return FrozenClassifier(network, info.class_names).to(self.compute.device)

    def distances(self, witness: FrozenClassifier) -> dict[str, Distance]:
        """Perceptual distances: in the witness's feature maps, and real LPIPS where its weights are given."""
        network = cast(ResidualClassifier, witness.network)
        found: dict[str, Distance] = {"perceptual": lambda a, b: critic_distance(network, a, b)}
        if self.experiment.evaluation.lpips is not None:
            found["lpips"] = load_lpips(self.experiment.evaluation.lpips)
        return found

    def black(self) -> float | None:
        """Level outside cells: 0 in images cut out of fields, whose background is subtracted; None: unknown."""
        path = self.experiment.data.path
        return 0.0 if path is not None and ingest_record(Path(path)).get("crop") else None

    def masks(self, x: Tensor, channels: Sequence[str]) -> Tensor:
        """Where the cell in the middle of each image (B, C, H, W) lies, (B, H, W)."""
        s = self.experiment.evaluation
        named = (channels, s.nucleus_channel, s.cell_channel, self.black())
        cells = [compartments(image, *named)[0]["Cells"] for image in ((x.cpu() + 1) / 2).numpy()]
        return torch.from_numpy(np.stack(cells))

    def probabilities(self) -> Tensor:
        return load_file(self.inputs["classifier"] / "probabilities.safetensors")["probs"]

    def codes(self) -> Tensor:
        return load_file(self.inputs["latents"] / "latents.safetensors")["z"]


def order_of(e: Experiment, store: Store, stage: str, digest: str, needs: Mapping[str, str]) -> Order:
    """The order for one stage of an experiment."""
    return Order(settings=to_dict(e), stage=stage, digest=digest, needs=dict(needs), store=store.address)


def write_history(folder: Path, history: train.History) -> None:
    (folder / "history.json").write_text(json.dumps(history), encoding="utf-8")


@torch.no_grad()
def over_images(
    store: ImageStore, function: Callable[[Tensor], Tensor], w: Work, rows: NDArray[np.int64] | None = None
) -> Tensor:
    rows = np.arange(len(store)) if rows is None else rows
    parts = np.array_split(rows, max(1, len(rows) // 256))
    return torch.cat([function(store.batch(part, w.compute.device).x).cpu() for part in parts])


def balanced(store: ImageStore, candidates: NDArray[np.int64], num: int, seed: int) -> NDArray[np.int64]:
    """Up to ``num`` of the candidates, drawn at random, the classes in equal shares as far as they reach."""
    rng = np.random.default_rng([seed, 7])
    by_class = [rng.permutation(candidates[store.labels[candidates] == c]) for c in range(len(store.info.class_names))]
    turn = np.concatenate([np.arange(len(rows)) for rows in by_class])
    rows = np.concatenate(by_class)
    return np.sort(rows[np.argsort(turn, kind="stable")][:num])


def sharded(
    w: Work, prepare: Callable[[Work], Any], function: Callable[[Any, Any], Any], items: Sequence[Any],
    *, what: str, done: Callable[[Path], None] = lambda file: None,
) -> list[Path]:  # fmt: skip
    """One Parquet file for each item, made by the crew; those that an earlier attempt left are not made again.

    Args:
        prepare: loads what all items need, once in each worker.
        function: ``function(prepared, item) -> pa.Table``.
        items: one shard each.
        what: for the meter.
        done: told each file that is there, old ones first.
    """
    files = [w.out / f"shard-{number:05d}.parquet" for number in range(len(items))]
    there = [file for file in files if file.is_file()]
    missing = [number for number, file in enumerate(files) if file not in there]
    for file in there:
        done(file)
    w.progress(what, len(there), len(files))
    for n, table in w.crew.map(w, prepare, function, [items[number] for number in missing]):
        file = files[missing[n]]
        pq.write_table(table, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").rename(file)
        w.saved()
        there.append(file)
        w.progress(what, len(there), len(files))
        done(file)
    return files
