"""Ablations: verdicts that the numbers allow and no others; cells compared at equal seeds; one small one for real."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
from matplotlib.figure import Figure
from mlflow import MlflowClient

from diffex import assay
from diffex.ablation import (
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    Ablation,
    Cell,
    Claim,
    by_seed,
    contrast,
    correlation,
    estimate,
    explained,
    findings,
    slopes,
    summary,
    verdict,
)
from diffex.ablation_report import write_ablation
from diffex.ablation_run import plan_of, sweep_of
from diffex.config import load
from diffex.errors import UserError
from diffex.pipeline import stage_digests
from diffex.report import save_figure
from diffex.search import SHARED

ROOT = Path(__file__).parents[1]
TINY = load(ROOT / "tests" / "tiny.yaml")
RANK = "directions.effective_rank"
MORE = Claim(words="more is better", unit="units", statistic=contrast(RANK, "b", "a"))
CELLS = {
    "a": Cell(settings={"autoencoder.lambda1": 0.0}, x={"weight": 0.0}, why="nothing"),
    "b": Cell(settings={"autoencoder.lambda1": 3.0}, x={"weight": 3.0}, why="something"),
}


def ablation(**changed: Any) -> Ablation:
    given = {"name": "test", "question": "Why?", "hypothesis": "More is better.", "claims": (MORE,), "base": TINY,
             "cells": CELLS, "measures": {RANK: "rank", "ssim": "likeness"}}  # fmt: skip
    return Ablation(**{**given, **changed})


def rows(values: dict[str, list[float]], of: Ablation | None = None) -> list[dict[str, Any]]:
    """The ablation's table from fabricated trials: cell -> effective rank of each seed."""
    of = of or ablation()
    count = max(len(v) for v in values.values())
    made = [
        {**point, RANK: values[cell][seed], "ssim": 0.9, "trial": f"{cell}{seed}", "status": "finished",
         "classifier.accuracy": 0.9, "flip_rate": 0.5}
        for (cell, seed), point in of.points(count).items()
        if seed < len(values[cell])
    ]  # fmt: skip
    return of.table(made, count)


def judged(values: dict[str, list[float]]) -> str:
    return verdict(findings(ablation(), rows(values)))


# ----------------------------------------------------------------------------------------------------------------------
# Verdicts


def test_a_clear_difference_at_every_seed_supports_a_claim_and_its_opposite_refutes_it() -> None:
    assert judged({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.1, 3.9]}) == SUPPORTED
    assert judged({"b": [1.0, 2.0, 3.0], "a": [2.0, 3.1, 3.9]}) == REFUTED


def test_cells_are_compared_at_equal_seeds() -> None:
    """The seeds differ by much more than the cells; apart, the means would say nothing."""
    assert judged({"a": [1.0, 5.0, 9.0], "b": [1.5, 5.6, 9.4]}) == SUPPORTED
    assert judged({"a": [1.0, 5.0, 9.0], "b": [9.4, 1.5, 5.6]}) == UNDECIDED


def test_one_seed_never_gives_a_verdict() -> None:
    table = rows({"a": [1.0], "b": [100.0]})
    assert verdict(findings(ablation(), table)) == UNDECIDED
    assert "Can't be told from one seed" in explained(findings(ablation(), table))[0]


def test_every_claim_must_hold_and_one_that_fails_refutes() -> None:
    less = Claim(words="less is better", unit="units", statistic=contrast(RANK, "a", "b"))
    unclear = Claim(words="it is unclear", unit="units", statistic=lambda r: [-1.0, 1.0, 0.2][r["a"]["seed"]])
    table = rows({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.1, 3.9]})
    assert verdict(findings(ablation(claims=(MORE, less)), table)) == REFUTED
    assert verdict(findings(ablation(claims=(MORE, unclear)), table)) == UNDECIDED
    assert verdict(findings(ablation(claims=(MORE, MORE)), table)) == SUPPORTED


def test_where_nothing_differs_a_verdict_is_as_rare_as_promised() -> None:
    draws = np.random.default_rng(0).standard_normal((2000, 3))
    found = [estimate(d.tolist()) for d in draws]
    for share in (np.mean([e.low > 0 for e in found]), np.mean([e.high < 0 for e in found])):
        assert 0.012 < share < 0.04
    assert np.mean([e.p_value < 0.05 for e in found]) == np.mean([e.low > 0 or e.high < 0 for e in found])


def test_seeds_that_agree_to_the_last_digit_decide_only_when_signs_alone_would() -> None:
    assert np.isnan(estimate([0.5, 0.5, 0.5]).low)
    assert estimate([0.5] * 6).low == 0.5
    assert estimate([0.0] * 6).p_value == 1.0


def test_a_seed_of_which_a_cell_is_missing_is_left_out() -> None:
    table = rows({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.1]})
    assert list(by_seed(table, CELLS)) == [0, 1]
    assert findings(ablation(), table)[0].estimate.n == 2


def test_a_measure_without_a_value_leaves_its_seed_out() -> None:
    assert findings(ablation(), rows({"a": [1.0, 2.0, float("nan")], "b": [2.0, 3.0, 4.0]}))[0].estimate.n == 2


def test_slopes_tell_what_each_x_adds_by_itself() -> None:
    made = {
        f"{c}{p}": {"x:channels": c, "x:factors": p, RANK: 1.0 + 0.5 * p - 0.1 * c}
        for c, p in ((1, 1), (1, 3), (2, 2), (2, 4), (3, 2))
    }
    found = slopes(made, RANK, ("channels", "factors"))
    assert found == pytest.approx({"channels": -0.1, "factors": 0.5})


def test_slopes_of_x_that_go_together_are_not_told() -> None:
    made = {str(c): {"x:channels": c, "x:factors": 2 * c, RANK: float(c)} for c in (1, 2, 3)}
    assert np.isnan(slopes(made, RANK, ("channels", "factors"))["channels"])


def test_the_summary_has_mean_and_interval_of_each_cell() -> None:
    a, _ = summary(ablation(), rows({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.0, 4.0]}))
    assert (a["cell"], a["seeds"], a[RANK], a["x:weight"]) == ("a", 3, 2.0, 0.0)
    assert a[f"{RANK}_low"] < 1.0 < 3.0 < a[f"{RANK}_high"]  # Student's t at two degrees of freedom is wide
    assert np.isnan(summary(ablation(), rows({"a": [1.0], "b": [2.0]}))[0][f"{RANK}_low"])


# ----------------------------------------------------------------------------------------------------------------------
# What is asked


def test_cells_at_one_seed_agree_in_all_that_the_seed_decides_and_seeds_change_the_training() -> None:
    points = ablation().points(2)
    assert list(points) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    for seed in (0, 1):
        for name in ("run.seed", "data.seed", "assay.seed"):
            assert points["a", seed][name] == points["b", seed][name] == seed
    trained = {stage_digests(TINY.with_settings(p))["autoencoder"] for p in points.values()}
    assert len(trained) == 4


def test_seeds_can_be_raised_but_another_cell_is_another_ablation() -> None:
    more = {**CELLS, "c": Cell(settings={"autoencoder.lambda1": 1.0}, x={"weight": 1.0})}
    assert ablation().digest == ablation(hypothesis="Less is better.").digest != ablation(cells=more).digest
    assert set(ablation().points(2)) < set(ablation().points(3))
    with pytest.raises(UserError, match="--seeds must be at least 1, got 0"):
        ablation().seeds(0)


def test_trials_are_the_points_and_only_what_points_share_is_computed_before() -> None:
    points = list(ablation().points(2).values())
    sweep = sweep_of(ablation(), points, "test")
    assert [dict(p) for p in sweep.first] == points
    # At each of two seeds both cells share the warm-up; the grid of all levels would have eight combinations of seeds.
    seeds = [tuple(e.run.seed for e, stage in sweep.shared(4) if stage == s) for s in SHARED]
    assert seeds == [(0, 1)] * len(SHARED)
    apart = ablation(cells={n: Cell(settings={"data.channels": n}) for n in ("DNA", "actin")})
    assert sweep_of(apart, list(apart.points(2).values()), "test").shared(4) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"cells": {"a": CELLS["a"]}}, "two cells or more"),
        ({"cells": {**CELLS, "c": Cell(settings={"autoencoder.lambda1": 3}, x={"weight": 3})}}, "are the same experim"),
        ({"cells": {**CELLS, "c": Cell(settings={"run.seed": 3}, x={"weight": 3})}}, "which seeds vary"),
        ({"cells": {**CELLS, "c": Cell(settings={"data.channels": ["DNA"]}, x={"weight": 3})}}, "written 'a,b'"),
        ({"cells": {**CELLS, "c": Cell(settings={"autoencoder.lamda1": 3}, x={"weight": 3})}}, "did you mean"),
        ({"cells": {**CELLS, "c": Cell(settings={"autoencoder.lambda1": 1})}}, "drawn against"),
        ({"measures": {"effective_rank": "rank"}}, "no column of the scoreboard"),
        ({"varied": ("data.seed",)}, "seeds must change the training"),
    ],
)
def test_an_ablation_that_makes_no_sense_is_refused_at_once(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ablation(**changed)


def test_the_plan_tells_question_rule_cells_and_what_is_shared() -> None:
    said = plan_of(ablation(), 2)
    for part in ("Why?", "More is better.", "more is better (units > 0)", "2 cells x 2 seeds", "= 4 trials",
                 "2 x classifier, 4 x autoencoder, 4 x directions", "warmup (2)"):  # fmt: skip
        assert part in said
    assert "witness (2)" in said


# ----------------------------------------------------------------------------------------------------------------------
# The channels


@pytest.fixture(scope="module")
def channels() -> ModuleType:
    spec = importlib.util.spec_from_file_location("channels", ROOT / "ablations" / "channels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_channel_set_shows_the_same_cells_of_the_same_wells(channels: ModuleType) -> None:
    treatments = assay.DESIGNS["binary"]
    whole = assay.plan(treatments=treatments, channels=assay.CHANNELS, num_images=64, num_plates=2, wells_per_class=2)
    index = np.arange(16)
    planes = assay.scene(whole, 32, index).planes
    pixels = next(iter(assay.draw(whole, 32, index.tolist())))
    for chosen in channels.SETS:
        part = assay.plan(treatments=treatments, channels=chosen, num_images=64, num_plates=2, wells_per_class=2)
        assert (part.scores == whole.scores).all()
        assert (part.labels == whole.labels).all()
        for name in whole.metadata:
            assert (part.metadata[name] == whole.metadata[name]).all()
        which = [assay.CHANNELS.index(c) for c in chosen]
        np.testing.assert_array_equal(assay.scene(part, 32, index).planes, planes[:, which])
        # The camera's noise is drawn anew, the picture under it is the same.
        difference = next(iter(assay.draw(part, 32, index.tolist()))).astype(float) - pixels[:, which]
        assert np.abs(difference).mean() < 6
        assert np.abs(difference.mean(axis=(2, 3))).max() < 1.5


def test_what_channels_show_holds_all_that_the_assay_declares(channels: ModuleType) -> None:
    found = channels.shown(32)
    for name, factor in assay.FACTORS.items():
        for channel in factor.channels:
            assert name in found[channel]
    assert "nucleus_area" in found["tubulin"]  # the nucleus is a hole in it
    assert "golgi_dispersion" not in found["DNA"]
    assert found["actin"] == ("cytoplasm_area", "cell_elongation", "actin_rim", "actin_fibres")


def test_the_channel_sets_tell_channels_and_factors_apart(channels: ModuleType) -> None:
    a = channels.build(load("assay"))
    assert abs(correlation(a.cells, channels.CHANNELS, channels.FACTORS)) < 0.5
    seen = channels.shown(32)
    moved = assay.DESIGNS["binary"]["compound"]

    def planted(cell: Cell) -> frozenset[str]:
        return frozenset(f for c in cell.settings["data.channels"].split(",") for f in seen[c] if f in moved)

    twins = {}
    for cell in a.cells.values():
        assert len(planted(cell)) == cell.x[channels.FACTORS]
        twins.setdefault(planted(cell), set()).add(cell.x[channels.CHANNELS])
    assert sum(len(numbers) > 1 for numbers in twins.values()) >= 3  # the same factors, seen in more channels
    for number in (1, 2, 3):  # the same number of channels, other numbers of factors
        assert len({c.x[channels.FACTORS] for c in a.cells.values() if c.x[channels.CHANNELS] == number}) > 1


@pytest.mark.parametrize(
    ("by_factor", "by_channel", "expected"), [(0.5, 0.0, SUPPORTED), (0.0, 0.5, REFUTED), (0.3, 0.3, UNDECIDED)]
)
def test_the_channels_ablation_finds_which_of_the_two_it_is(
    channels: ModuleType, by_factor: float, by_channel: float, expected: str
) -> None:
    a = channels.build(load("assay"))
    made = {
        name: [
            1 + (by_factor + e) * c.x[channels.FACTORS] + by_channel * c.x[channels.CHANNELS] for e in (-0.1, 0, 0.1)
        ]
        for name, c in a.cells.items()
    }
    assert verdict(findings(a, rows(made, a))) == expected


def test_treatments_that_leave_the_two_together_are_refused(channels: ModuleType) -> None:
    with pytest.raises(UserError, match="can't tell channels and factors apart"):
        channels.build(load("assay", {"assay.design": "null"}))


def test_own_images_have_every_subset_of_their_channels(channels: ModuleType) -> None:
    named = {"data.path": "cells", "data.channel_names": ["DNA", "tubulin", "actin"]}
    a = channels.build(load("assay", named))
    assert len(a.cells) == 7
    assert "assay.seed" not in a.varied
    assert [c.x["channels"] for c in a.cells.values()] == [1, 1, 1, 2, 2, 2, 3]
    with pytest.raises(UserError, match="has one channel"):
        channels.build(load("assay", {**named, "data.channel_names": ["DNA"]}))


# ----------------------------------------------------------------------------------------------------------------------
# What is left behind


def test_the_page_is_self_contained_and_tells_question_answer_and_every_cell(
    channels: ModuleType, tmp_path: Path
) -> None:
    a = channels.build(load("assay"))
    table = rows(
        {name: [1.0 + 0.4 * c.x[channels.FACTORS] + e for e in (0.0, 0.1, 0.3)] for name, c in a.cells.items()}, a
    )
    for row in table:
        row["recovery.recall"] = None if row["cell"] == "DNA" else 0.5
        save_figure(Figure(figsize=(1, 1)), tmp_path / "trials" / row["trial"] / "traversal-1.png")
    files = write_ablation(a, table, tmp_path, command="python ablations/channels.py")
    assert {f.name for f in files} == {"table.parquet", "summary.parquet", "figure.png", "figure.svg", "ablation.html"}
    page = (tmp_path / "ablation.html").read_text(encoding="utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("data:image/png;base64,") == 1 + len(a.cells)
    for said in (*a.cells, "Supported", "python ablations/channels.py", "+0.40", "over 3 seeds"):
        assert said in page
    assert pq.read_table(tmp_path / "table.parquet").num_rows == 24
    assert pq.read_table(tmp_path / "summary.parquet").num_rows == 8


# ----------------------------------------------------------------------------------------------------------------------
# A whole one: two cells, one seed, then two; real Ray, real MLflow

SCRIPT = """
import sys
from diffex.ablation import Ablation, Cell, Claim, contrast
from diffex.ablation_run import ablation_main

RANK = "directions.effective_rank"

def build(base):
    return Ablation(
        name="small", question="Are more directions more different?", hypothesis="They are.",
        claims=(Claim(words="many have more effects", unit="ranks", statistic=contrast(RANK, "many", "few")),),
        base=base, measures={RANK: "effective rank", "ssim": "likeness"},
        cells={
            "few": Cell(settings={"directions.num_directions": 2}, x={"directions": 2}),
            "many": Cell(settings={"directions.num_directions": 4}, x={"directions": 4}),
        },
    )

if __name__ == "__main__":
    sys.exit(ablation_main("small", build, doc=None))
"""


@dataclass
class Ablated:
    folder: Path
    first: subprocess.CompletedProcess[str]
    kept: dict[Path, int]
    done: subprocess.CompletedProcess[str]

    @property
    def output(self) -> Path:
        return self.folder / "out"


Run = Callable[..., subprocess.CompletedProcess[str]]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "small.py").write_text(SCRIPT)
    recipe = ["--recipe", str(ROOT / "tests" / "tiny.yaml"), "--set", "data.channels=tubulin"]
    command = [sys.executable, "small.py", *recipe, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def ablated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ablated]:
    """Run with one seed, then with two."""
    folder = tmp_path_factory.mktemp("ablation")
    first = run(folder, "--seeds", "1", "--output", "out")
    kept = {f: f.stat().st_mtime_ns for f in (folder / "out").glob("trials/*/row.json")}
    yield Ablated(folder, first, kept, run(folder, "--seeds", "2", "--output", "out"))


def test_one_seed_runs_and_says_that_it_decides_nothing(ablated: Ablated) -> None:
    assert ablated.first.returncode == 0, ablated.first.stderr
    assert len(ablated.kept) == 2
    assert "UNDECIDED" in ablated.first.stdout
    assert "Can't be told from one seed" in ablated.first.stdout


def test_more_seeds_go_on_and_repeat_nothing(ablated: Ablated) -> None:
    assert ablated.done.returncode == 0, ablated.done.stderr
    assert "2 of 4 trials were finished before; 2 to go" in ablated.done.stdout
    for file, written in ablated.kept.items():
        assert file.stat().st_mtime_ns == written
    table = pq.read_table(ablated.output / "table.parquet").to_pylist()
    assert [(r["cell"], r["seed"]) for r in table] == [("few", 0), ("many", 0), ("few", 1), ("many", 1)]
    assert all(r["run.seed"] == r["data.seed"] == r["assay.seed"] == r["seed"] for r in table)
    assert len({r["directions.effective_rank"] for r in table}) == 4
    assert len({r["ssim"] for r in table}) == 2  # cells share the autoencoder of their seed


def test_what_cells_share_is_computed_once_a_seed(ablated: Ablated) -> None:
    for stage, count in (("autoencoder", 2), ("witness", 2), ("directions", 4)):
        assert len([p for p in (ablated.output / "store" / stage).iterdir() if p.is_dir()]) == count


def test_the_summary_is_the_mean_of_the_table(ablated: Ablated) -> None:
    table = pq.read_table(ablated.output / "table.parquet").to_pylist()
    for row in pq.read_table(ablated.output / "summary.parquet").to_pylist():
        mine = [r["ssim"] for r in table if r["cell"] == row["cell"]]
        assert row["ssim"] == pytest.approx(np.mean(mine))
        assert row["ssim_low"] < row["ssim"] < row["ssim_high"]


def test_mlflow_holds_one_parent_with_all_trials_and_the_results(ablated: Ablated) -> None:
    client = MlflowClient(f"sqlite:///{ablated.output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [r for r in runs if r.data.tags["diffex.kind"] == "ablation"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 4
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert parent.data.tags["diffex.verdict"] in (SUPPORTED, REFUTED, UNDECIDED)
    files = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert {"table.parquet", "summary.parquet", "figure.png", "figure.svg", "ablation.html"} <= files
    table = pq.read_table(ablated.output / "table.parquet").to_pylist()
    of = {(r["cell"], r["seed"]): r[RANK] for r in table}
    difference = np.mean([of["many", s] - of["few", s] for s in (0, 1)])
    assert parent.data.metrics["claim_1"] == pytest.approx(difference)


def test_a_trial_without_a_row_is_tried_again_and_no_other(ablated: Ablated) -> None:
    before = {f: f.stat().st_mtime_ns for f in sorted(ablated.output.glob("trials/*/row.json"))}
    lost = next(iter(before))
    row = json.loads(lost.read_text())
    lost.unlink()
    done = run(ablated.folder, "--seeds", "2", "--output", "out")
    assert done.returncode == 0, done.stderr
    assert "3 of 4 trials were finished before; 1 to go" in done.stdout
    assert json.loads(lost.read_text())[RANK] == row[RANK]
    assert {f for f in before if f.stat().st_mtime_ns != before[f]} == {lost}
    studies = optuna.get_all_study_summaries(f"sqlite:///{ablated.output / 'optuna.db'}")
    assert [s.n_trials for s in studies] == [2, 2, 1]


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    done = run(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "2 cells x 3 seeds" in done.stdout
    assert "3 x classifier, 3 x autoencoder, 6 x directions" in done.stdout
    assert [f.name for f in tmp_path.iterdir()] == ["small.py"]


def test_another_configuration_is_refused(ablated: Ablated) -> None:
    done = run(ablated.folder, "--output", "out", "--set", "directions.tau=0.7")
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'out' holds results of another configuration: directions.tau (0.5 there")
