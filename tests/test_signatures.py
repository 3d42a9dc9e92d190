"""Failure signatures: each rule by its own numbers, and each failure provoked on real renderings of a small world."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffex.classifier import FrozenClassifier, classification_report
from diffex.compute import Compute
from diffex.config import Experiment
from diffex.data import ImageStore, ShardWriter, StoreInfo, index_columns, write_index
from diffex.directions import DirectionSet, Subspace
from diffex.disentanglement import selectivity
from diffex.evidence import run_evidence, run_reconstruction
from diffex.explain import Edit, Measure, effects_table
from diffex.instruments import run_real_cells
from diffex.measures import METRICS
from diffex.model import Code
from diffex.networks import ResidualClassifier
from diffex.ranking import arrays
from diffex.scoreboard import Tables, score
from diffex.settings import flat
from diffex.signatures import RULES, recognise
from diffex.stages import run_codes, run_effects, run_references
from diffex.store import RECORD
from diffex.work import Work

NAMES = [r.name for r in RULES]

HEALTHY: dict[str, Any] = {
    "flip_rate": 0.9, "mean_shift": 0.7, "perceptual.strangers": 0.4, "edit.perceptual": 0.1, "agreement": 0.98,
    "kl": 0.05, "gate.swapped": 0.95, "gate.random": 0.9, "directions.number": 8.0, "directions.effective_rank": 5.2,
    "directions.overlap": 0.4, "directions.feature_overlap": 0.3, "effects.selectivity": 0.5,
    "flip.alpha_share": 0.5, "edit.implausible": 0.02,
}  # fmt: skip
"""A row of the numbers that the rules look at."""

WITHOUT_TRUTH: dict[str, Any] = {"effects.selectivity": None}
SICK: list[tuple[str, dict[str, Any]]] = [
    ("mode collapse", {"directions.effective_rank": 1.2}),
    ("attribute entanglement", {"effects.selectivity": 0.1}),
    ("attribute entanglement", {**WITHOUT_TRUTH, "directions.overlap": 0.9}),
    ("attribute entanglement", {**WITHOUT_TRUTH, "directions.feature_overlap": 0.9}),
    ("zero shift", {"mean_shift": -0.01, "edit.perceptual": 0.001}),
    ("zero shift", {"mean_shift": 0.0, "edit.perceptual": 0.0, "directions.effective_rank": 0.0}),
    ("zero shift", {"mean_shift": 0.0, "edit.perceptual": 0.0, "effects.selectivity": 0.0}),
    ("code ignored", {"gate.swapped": 0.4}),
    ("code ignored", {"gate.random": 0.5}),
    ("code ignored", {"gate.swapped": None, "gate.random": 0.5}),
    ("code ignored", {"gate.swapped": 0.5, "gate.random": None}),
    ("classifier fidelity lost", {"agreement": 0.8}),
    ("classifier fidelity lost", {"kl": 0.5}),
    ("saturated alpha", {"flip.alpha_share": 0.1}),
    ("over-edit", {"edit.implausible": 0.3}),
]
WELL = [
    {"directions.number": 2.0, "directions.effective_rank": 1.2},  # two may well do one thing
    {"effects.selectivity": 0.3, "directions.overlap": 0.95, "directions.feature_overlap": 0.95},  # truth decides
    {"mean_shift": 0.0},  # it changes the image, only not the verdict
    {"edit.perceptual": 0.0},  # it changes the verdict
    {
        "mean_shift": 0.0,
        "edit.perceptual": 0.0,
        "perceptual.strangers": 0.0,
    },  # all cells look alike: nothing to compare
    {"flip.alpha_share": 0.1, "flip_rate": 0.5},  # not every cell flips yet: the length is needed
]


def names(row: Mapping[str, Any]) -> list[str]:
    return [s.name for s in recognise(row)]


# ----------------------------------------------------------------------------------------------------------------------
# Rules on rows


def test_a_healthy_row_raises_nothing() -> None:
    assert recognise(HEALTHY) == []
    assert set(HEALTHY) <= set(METRICS)


@pytest.mark.parametrize(("name", "numbers"), SICK)
def test_each_rule_is_raised_by_its_own_numbers_and_only_by_them(name: str, numbers: dict[str, Any]) -> None:
    assert names(HEALTHY | numbers) == [name]


def test_every_rule_is_tried() -> None:
    assert {name for name, _ in SICK} == set(NAMES)


@pytest.mark.parametrize("numbers", WELL)
def test_what_is_no_failure_by_itself_raises_nothing(numbers: dict[str, Any]) -> None:
    assert names(HEALTHY | numbers) == []


def test_what_is_not_known_raises_nothing() -> None:
    assert recognise({}) == []
    for nothing in (None, float("nan")):
        assert recognise(dict.fromkeys(HEALTHY, nothing)) == []
        for key in HEALTHY:
            assert names(HEALTHY | {key: nothing}) == []
    for _, numbers in SICK:
        assert names(dict.fromkeys(HEALTHY, float("nan")) | {"perceptual.strangers": 0.0}) == []
        assert names({k: v for k, v in HEALTHY.items() if k not in numbers}) == []


def test_several_failures_come_in_the_order_of_the_rules() -> None:
    row = HEALTHY | {"edit.implausible": 0.3, "kl": 1.0, "gate.random": 0.5, "directions.effective_rank": 1.0}
    assert names(row) == ["mode collapse", "code ignored", "classifier fidelity lost", "over-edit"]
    assert names(HEALTHY | {"directions.effective_rank": 1.0, "effects.selectivity": 0.0}) == ["mode collapse"]


@pytest.mark.parametrize(("name", "numbers"), SICK)
def test_a_signature_says_what_was_measured(name: str, numbers: dict[str, Any]) -> None:
    (found,) = recognise(HEALTHY | numbers)
    assert found.name == name
    assert found.meaning
    assert re.search(r"\d", found.measured)
    assert "nan" not in found.measured or None in numbers.values()
    assert found.measured == "8 directions, 1.2 effects" or name != "mode collapse"


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_remedies_name_settings_that_exist(rule: Any) -> None:
    """Dotted names are settings, and values that they are given are allowed; or they are measures to look at."""
    settings = flat(Experiment())
    dotted = re.findall(r"\b[a-z]\w*\.[a-z]\w*(?:\.\w+)*", rule.remedy)
    assert {n for n in dotted if n in settings}
    assert {n for n in dotted if n not in settings} <= set(METRICS)
    for name, value in re.findall(r"(\w+\.\w+) = (\w+)", rule.remedy):
        allowed = value == "true" if isinstance(settings[name], bool) else value
        assert flat(Experiment().with_settings({name: allowed}))[name] == allowed


def test_rules_read_measures_that_exist() -> None:
    """What a rule asks a row for is in the table of measures."""
    asked: set[str] = set()

    class Row(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

    for _, numbers in [("", {}), *SICK]:
        recognise(Row(HEALTHY | numbers))
    assert asked == set(HEALTHY)


# ----------------------------------------------------------------------------------------------------------------------
# A small world: cells whose four properties z tells, and two numbers more that only describe the background

SIZE, CHANNELS, CLASSES = 32, ("DNA", "actin"), ("control", "treated")
VISIBLE, IGNORED = 4, 2
STEP, NOISE = 0.16, 0.04  # of intensity in [-1, 1]: of one standard deviation of a property; of a pixel


def _patterns() -> tuple[Tensor, Tensor, Tensor]:
    """The mean cell (P,), what one unit of each property adds to it (4, P), and background patterns (2, P).

    Properties: actin in the middle, in between and at the rim of the cell, and DNA.
    """
    at = torch.arange(SIZE) - (SIZE - 1) / 2
    radius = torch.hypot(at[:, None], at[None, :])

    def disc(r: float) -> Tensor:
        return torch.sigmoid((r - radius) / 0.6)

    empty = torch.zeros(SIZE, SIZE)
    actin, nucleus = (disc(4), disc(7.5) - disc(4), disc(11) - disc(7.5)), disc(5)
    masks = torch.stack([*(torch.stack([empty, ring]) for ring in actin), torch.stack([nucleus, empty])]).flatten(1)
    mean = 2 * (0.05 + 0.38 * masks.sum(dim=0)) - 1
    background = torch.randn(IGNORED, len(CHANNELS), SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    background = F.normalize((background * (radius > 13)).flatten(1))
    return mean, STEP * masks, background


MEAN, PROPERTIES, BACKGROUND = _patterns()


def properties(x: Tensor) -> Tensor:
    """The four properties of images (B, C, H, W), read off them by least squares, (B, 4)."""
    return (x.flatten(1) - MEAN) @ torch.linalg.pinv(PROPERTIES)


@dataclass
class Model:
    """An autoencoder whose codes are known: four properties and two numbers that the decoder makes nothing of.

    Attributes:
        follow: share of the properties that z carries; x_T carries the rest.
        erase: share of what the classifier reads that the decoder loses: it paints all cells like untreated ones.
    """

    follow: float = 1.0
    erase: float = 0.0
    encode_evaluations: int = 1
    render_evaluations: int = 1

    def semantic(self, x: Tensor, probs: Tensor) -> Tensor:
        return torch.cat([properties(x), (x.flatten(1) - MEAN) @ BACKGROUND.T / NOISE], dim=1)

    def _told(self, z: Tensor) -> Tensor:
        return MEAN + self.follow * z[:, :VISIBLE] @ PROPERTIES

    def invert(self, x: Tensor, z: Tensor) -> Tensor:
        return ((x.flatten(1) - self._told(z)) / NOISE).round(decimals=1).view_as(x)  # inversion is never exact

    def encode(self, x: Tensor, probs: Tensor) -> Code:
        z = self.semantic(x, probs)
        return Code(z, probs, self.invert(x, z))

    def decode(self, z: Tensor, x_T: Tensor) -> Tensor:
        x = (self._told(z) + NOISE * x_T.flatten(1)).view_as(x_T)
        lost = self.erase * (properties(x)[:, :1] + 1)
        return (x - (lost @ PROPERTIES[:1]).view_as(x)).clamp(-1, 1)


class Reader(nn.Module):
    """Says 'treated' of cells with more actin in the middle than ``border``."""

    def __init__(self, border: float) -> None:
        super().__init__()
        self.border = border

    def forward(self, x: Tensor) -> Tensor:
        over = 6 * (properties(x)[:, 0] - self.border)
        return torch.stack([torch.zeros_like(over), over], dim=1)


class Lab(Work):
    """Where the stages run, with this model and this classifier."""

    model: Model
    explained: FrozenClassifier
    witness: FrozenClassifier
    learned: DirectionSet

    def autoencoder(self) -> Any:
        return self.model

    def classifier(self, store: ImageStore) -> FrozenClassifier:
        return self.explained

    def judge(self, stage: str, store: ImageStore) -> FrozenClassifier:
        return self.witness

    def everything(self) -> Tensor:
        return self.images().batch(np.arange(len(self.images()))).x

    def probabilities(self) -> Tensor:
        return self.explained.probabilities(self.everything())

    def codes(self) -> Tensor:
        return self.model.semantic(self.everything(), self.probabilities())


EXPERIMENT = Experiment().with_settings({
    "data.size": SIZE, "ranking.num_images": 12, "ranking.top": 3, "ranking.bootstrap": 50, "evaluation.audited": 3,
    "evaluation.followed_images": 6, "evaluation.num_images": 32, "evaluation.random_directions": 6,
    "evaluation.real_images": 60, "evaluation.steps": 8, "directions.space": "standardised",
})  # fmt: skip


@dataclass
class Screen:
    """Images of the world on disk, a witness trained on them, and features of real cells.

    Attributes:
        folder: for everything.
        far: how far the classes' means lie apart in each property.
    """

    folder: Path
    far: tuple[float, float, float, float]

    def __post_init__(self) -> None:
        rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(1)
        count = 640
        self.folder.mkdir()
        labels, wells = np.arange(count) % 2, np.arange(count) // 2 % 40
        apart = torch.tensor(self.far)
        spread = torch.where(apart > 0, 0.4, 1.0)
        z = spread * torch.randn(count, VISIBLE, generator=generator)
        z += apart * (torch.from_numpy(labels)[:, None] - 0.5)
        noise = torch.randn(count, len(CHANNELS), SIZE, SIZE, generator=generator)
        x = Model().decode(z, noise)
        writer = ShardWriter(self.folder / "pixels-0.arrow", np.dtype(np.uint8), tuple(x.shape[1:]))
        for image in ((x + 1) * 127.5).round().byte().numpy():
            writer.add(image)
        writer.close()
        parts = np.array([0, 0, 1, 2])[wells % 4]
        table = pa.table({
            **index_columns(labels, parts), "Metadata_Plate": [f"plate {w % 8 // 4}" for w in wells],
            "Metadata_Well": [f"{'AB'[c]}{w:02d}" for c, w in zip(labels, wells, strict=True)],
        })  # fmt: skip
        write_index(self.folder / "index.arrow", iter([table]))
        StoreInfo(
            channels=CHANNELS, class_names=CLASSES, size=SIZE, dtype="uint8", window=((0.0, 255.0),) * 2, count=count,
            source="a small world", split_by=("Metadata_Plate", "Metadata_Well"), simulated=False,
            shards=(("pixels-0.arrow", count),), depth=2,
        ).write(self.folder)  # fmt: skip
        store = ImageStore(self.folder)
        torch.manual_seed(0)
        network = ResidualClassifier(len(CHANNELS), 2, width=8)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(40):
            batch = store.batch(rng.choice(store.rows("train"), 64))
            loss = F.cross_entropy(network(batch.x), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.witness = FrozenClassifier(network, CLASSES)
        self.lab("real").out.mkdir()
        run_real_cells(self.lab("real"))

    def lab(self, name: str, model: Model | None = None, border: float = 0.0) -> Lab:
        lab = Lab(
            experiment=EXPERIMENT, inputs={"data": self.folder, "real_cells": self.folder / "real"},
            out=self.folder / name, compute=Compute(torch.device("cpu"), False),
        )  # fmt: skip
        lab.model, lab.explained = model or Model(), FrozenClassifier(Reader(border), CLASSES)
        lab.witness = self.witness
        return lab


AXES = torch.eye(VISIBLE + IGNORED)
MIXED = torch.tensor([[1.0, 1, 1, 1, 0, 0], [1, -1, 1, -1, 0, 0], [1, 1, -1, -1, 0, 0], [1, -1, -1, 1, 0, 0]])
"""Orthogonal, and yet each changes all four properties."""


@dataclass(frozen=True)
class Case:
    """What is explained, and how.

    Attributes:
        directions: (K, 6) in the code.
        model: renders.
        border: of the classifier.
    """

    directions: Tensor = field(default_factory=lambda: AXES[:VISIBLE])
    model: Model = field(default_factory=Model)
    border: float = 0.0


def row_of(screen: Screen, case: Case, tmp_path: Path) -> dict[str, Any]:
    """The row of the scoreboard: edits, gate, ways and features are rendered and measured by the stages themselves."""
    lab = screen.lab(str(tmp_path), case.model, case.border)
    store = lab.images()
    subspace = Subspace.of(lab.codes()[store.rows("train")], "standardised")
    learned = DirectionSet.fixed(case.directions / subspace.scale, subspace)
    stages = {"codes": run_codes, "references": run_references, "effects": run_effects,
              "reconstruction": run_reconstruction, "evidence": run_evidence}  # fmt: skip
    for name in ("directions", *stages):
        (tmp_path / name).mkdir()
        lab.inputs[name] = tmp_path / name
    learned.save(tmp_path / "directions")
    facts: dict[str, Any] = {"data": {"channels": CHANNELS}, "latents": {"effective_rank": 6.0}}
    facts["directions"] = {"rank": subspace.rank, "consistency": [1.0] * len(learned), "largest_cosine": 0.0}
    for name, stage in stages.items():
        lab.out = tmp_path / name
        facts[name] = stage(lab)
        (tmp_path / name / RECORD).write_text(json.dumps({"facts": facts[name]}), encoding="utf-8")
    rows = store.rows("test")
    for name, judge in (("classifier", lab.explained), ("witness", lab.witness), ("robust", lab.witness)):
        probs = judge.probabilities(store.batch(rows).x).numpy()
        report = classification_report(probs, store.labels[rows], store.groups()[rows], CLASSES)
        facts[name] = {"report": report}
    unknown = {"attacks": [{"pgd_accuracy": float("nan"), "pgd_accuracy_interval": [None, None]}]}
    facts["robust"]["attacks"] = {"classifier": unknown, "robust": unknown}
    tables = Tables(
        effects=pq.read_table(tmp_path / "effects" / "effects.parquet"),
        real=pq.read_table(screen.folder / "real" / "features.parquet"),
        **{n: pq.read_table(tmp_path / "evidence" / f"{n}.parquet") for n in ("cells", "trajectories", "cycle")},
        profiles={"code": np.stack([case.directions.numpy()] * 2)},
    )  # fmt: skip
    row = score(EXPERIMENT, facts, tables).row
    assert row["signatures"] == (", ".join(names(row)) or "none")
    return row


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Screen:
    """Treatment raises the actin in the middle of the cell, and nothing else."""
    return Screen(tmp_path_factory.mktemp("world") / "screen", (2.0, 0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def strong(tmp_path_factory: pytest.TempPathFactory) -> Screen:
    """Treatment changes all four properties."""
    return Screen(tmp_path_factory.mktemp("strong") / "screen", (3.0, 3.0, 3.0, 3.0))


# ----------------------------------------------------------------------------------------------------------------------
# Failures provoked

PROVOKED = {
    "every direction is a copy of one": (["mode collapse"], Case(AXES[[0, 0, 0, 0]])),
    "every direction is a copy of one, forwards or backwards": (
        ["mode collapse"],
        Case(AXES[[0, 0, 0]] * MIXED[1, :3, None]),
    ),
    "every direction changes every property": (["attribute entanglement"], Case(MIXED)),
    "directions in dimensions that are not rendered": (
        ["zero shift"],
        Case(torch.stack([*AXES[4:], AXES[4] + AXES[5]])),
    ),
    "a decoder that sees x_T only": (["zero shift", "code ignored"], Case(model=Model(follow=0.0))),
    "a decoder that sees mostly x_T": (["code ignored"], Case(model=Model(follow=0.3))),
    "a decoder that weakens what the classifier reads": (["classifier fidelity lost"], Case(model=Model(erase=0.4))),
    "a border that lies close to the untreated cells": (["saturated alpha"], Case(border=-0.6)),
}
"""What is done to a healthy set, and the failures that it must raise, no others."""


MILD = {
    "one copy among others": Case(AXES[[0, 0, 1, 2]]),
    "directions that change two properties": Case(torch.stack([AXES[0] + AXES[1], AXES[0] - AXES[1], *AXES[2:4]])),
    "one direction that is not rendered": Case(AXES[[0, 1, 2, 4]]),
    "a decoder that sees more of z than of x_T": Case(model=Model(follow=0.8)),
    "a decoder that weakens a little": Case(model=Model(erase=0.1)),
    "a border somewhat off the middle": Case(border=-0.2),
}
"""Less of the same, which is no failure."""


@pytest.fixture(scope="module")
def healthy(screen: Screen, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The row of four directions that change one property each: with nothing done to them."""
    return row_of(screen, Case(), tmp_path_factory.mktemp("healthy"))


def test_a_healthy_set_raises_nothing(healthy: dict[str, Any]) -> None:
    assert recognise(healthy) == []
    assert healthy["flip_rate"] > 0.8
    assert healthy["audit.supported"] == 1
    known = {key for key in HEALTHY if healthy.get(key) is not None and not np.isnan(healthy[key])}
    assert known == set(HEALTHY) - {"effects.selectivity"}  # no rule is silent for want of numbers


@pytest.mark.parametrize("what", PROVOKED)
def test_a_provoked_failure_is_recognised(screen: Screen, tmp_path: Path, what: str) -> None:
    failures, case = PROVOKED[what]
    assert names(row_of(screen, case, tmp_path)) == failures


@pytest.mark.parametrize("what", MILD)
def test_less_of_the_same_raises_nothing(screen: Screen, tmp_path: Path, what: str) -> None:
    assert names(row_of(screen, MILD[what], tmp_path)) == []


def test_a_decoder_that_erases_what_the_classifier_reads_loses_fidelity(screen: Screen, tmp_path: Path) -> None:
    """Nor do its images follow z or shifts, where these are read by the classifier."""
    assert "classifier fidelity lost" in names(row_of(screen, Case(model=Model(erase=1.0)), tmp_path))


def test_a_direction_that_goes_the_whole_length_of_another_difference_edits_too_much(
    strong: Screen, tmp_path: Path
) -> None:
    """The classes differ in four properties; who goes as far in one of them comes where no cell is."""
    (tmp_path / "far").mkdir()
    (tmp_path / "near").mkdir()
    far = row_of(strong, Case(border=0.6), tmp_path / "far")
    near = row_of(strong, Case(torch.cat([MIXED[:1], AXES[1:4]]), border=0.6), tmp_path / "near")
    assert names(far) == ["over-edit"]
    assert names(near) == []
    assert far["edit.implausible"] > 5 * near["edit.implausible"]


@pytest.mark.parametrize(("directions", "failures"), [(AXES[:4], []), (MIXED, ["attribute entanglement"])])
def test_measured_properties_tell_of_entanglement(
    screen: Screen, healthy: dict[str, Any], directions: Tensor, failures: list[str]
) -> None:
    """Where a ruler measures the properties, their shifts decide."""
    lab, store = screen.lab("ruler"), ImageStore(screen.folder)
    batch = store.batch(store.rows("test")[:16])
    subspace = Subspace.of(lab.codes(), "standardised")
    sets = {"learned": DirectionSet.fixed(directions / subspace.scale, subspace)}
    edits = [Edit("learned", k, s, None) for k in range(len(directions)) for s in (1.0, -1.0)]
    measure = Measure(("middle", "between", "rim", "DNA"), properties)
    table = effects_table(
        lab.autoencoder(), lab.classifier(store), sets, edits, batch.x, batch.rows, reference=2.0, measure=measure
    )
    table = table.append_column("class_name", pa.array(["control"] * len(table)))
    table = table.append_column("group", table["row"])
    shifts = arrays(table, "learned", "control", "treated").shifts[:, :, 0].mean(axis=0)
    row = healthy | {"effects.selectivity": selectivity(np.abs(shifts))}
    assert names(row) == failures
