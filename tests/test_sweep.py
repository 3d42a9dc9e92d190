"""The sweep script as its users run it: real Ray, real Optuna, real MLflow in SQLite, a real kill -9."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from optuna import Study
from optuna.trial import TrialState

from diffex.config import Experiment, load
from diffex.errors import UserError
from diffex.search import Sweep, _open_study, _storage
from diffex.space import Levels, Range
from diffex.store import Store
from diffex.trials import load_rows, trial_name, write_row

ROOT = Path(__file__).parents[1]
TINY = load(ROOT / "tests" / "tiny.yaml")
SCRIPT = [sys.executable, str(ROOT / "sweeps" / "lambda_sweep.py"), "--recipe", str(ROOT / "tests" / "tiny.yaml")]


def run(*options: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*SCRIPT, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@dataclass
class Swept:
    """A sweep that was killed in the middle and then run again."""

    folder: Path
    kept: dict[str, float]
    done: subprocess.CompletedProcess[str]

    @property
    def output(self) -> Path:
        return self.folder / "out"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    folder = tmp_path_factory.mktemp("sweep")
    options = ["--trials", "3", "--output", "out"]
    driver = subprocess.Popen(
        [*SCRIPT, *options], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 400
    while not list((folder / "out").glob("trials/*/row.json")):
        assert driver.poll() is None, "the sweep ended before it could be killed"
        assert time.monotonic() < deadline, "no trial finished in time"
        time.sleep(0.1)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    kept = {str(f): f.stat().st_mtime for f in (folder / "out").glob("trials/*/row.json")}
    yield Swept(folder, kept, run(*options, folder=folder))


def test_a_killed_sweep_goes_on_by_the_same_command(swept: Swept) -> None:
    assert swept.done.returncode == 0, swept.done.stderr
    assert len(load_rows(swept.output)) == 3
    assert all(r["status"] == "finished" for r in load_rows(swept.output))


def test_finished_trials_are_not_repeated(swept: Swept) -> None:
    assert swept.kept
    for file, written in swept.kept.items():
        assert Path(file).stat().st_mtime == written


def test_trials_share_one_warm_up_for_each_channel_set(swept: Swept) -> None:
    def entries(stage: str) -> int:
        return len([p for p in (swept.output / "store" / stage).iterdir() if p.is_dir()])

    settings = [json.loads(f.read_text()) for f in swept.output.glob("trials/*/experiment.json")]
    channel_sets = {tuple(s["data"]["channels"]) for s in settings}
    lambdas = {(tuple(s["data"]["channels"]), s["autoencoder"]["lambda1"]) for s in settings}
    assert entries("warmup") == 2 >= len(channel_sets)  # both sets of the search space are prepared
    assert entries("autoencoder") == len(lambdas)


def test_mlflow_holds_a_parent_and_a_nested_run_for_each_trial(swept: Swept) -> None:
    client = MlflowClient(f"sqlite:///{swept.output / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lambda_sweep")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [r for r in runs if r.data.tags["diffex.kind"] == "sweep"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(parents) == 1
    assert len(children) == 3
    assert {r.info.status for r in runs} == {"FINISHED"}
    rows = {r["trial"]: r for r in load_rows(swept.output)}
    for child in children:
        row = rows[child.data.tags["diffex.trial"]]
        assert child.data.metrics["ssim"] == pytest.approx(row["ssim"])
        assert float(child.data.params["autoencoder.lambda1"]) == row["autoencoder.lambda1"]
        assert len(client.get_metric_history(child.info.run_id, "train.autoencoder.simple")) > 10
        assert child.data.tags["diffex.signatures"] == row["signatures"] != ""
        assert {"phenotypes.parquet", "ways.png"} <= {a.path for a in client.list_artifacts(child.info.run_id)}
    artifacts = {a.path for a in client.list_artifacts(parents[0].info.run_id)}
    assert {"report.html", "scoreboard.parquet", "figures"} <= artifacts


def test_the_output_folder_holds_table_figures_and_a_self_contained_report(swept: Swept) -> None:
    table = pq.read_table(swept.output / "scoreboard.parquet")
    assert table.num_rows == 3
    assert {"flip_rate", "flip_rate_low", "null.flip_rate", "ssim", "gate.random", "cost.seconds"} <= set(
        table.column_names
    )
    report = (swept.output / "report.html").read_text(encoding="utf-8")
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert report.count("data:image/png;base64,") >= 6
    for heading in ("Is it real?", "What goes wrong", "Can it be trusted?"):
        assert heading in report
    assert "Over seeds" not in report
    best = max(load_rows(swept.output), key=lambda r: r["score"])
    for name in best["signatures"].split(", "):  # a few steps of training: something is wrong, and said
        assert name in report
    for row in load_rows(swept.output):
        assert row["trial"] in report
        assert row["trial"] in swept.done.stdout
    assert (swept.output / "figures" / "pareto.png").is_file()


def test_the_same_command_once_more_computes_nothing_and_trials_can_be_raised(swept: Swept) -> None:
    before = {f: f.stat().st_mtime for f in swept.output.glob("trials/*/row.json")}
    done = run("--trials", "4", "--output", "out", folder=swept.folder)
    assert done.returncode == 0, done.stderr
    assert "3 of 4 trials were finished before; 1 to go" in done.stdout
    assert len(load_rows(swept.output)) == 4
    assert {f: f.stat().st_mtime for f in before} == before


def test_one_scalar_objective_runs_with_early_stopping(swept: Swept) -> None:
    options = ("--trials", "2", "--output", "scalar", "--store", str(swept.output / "store"), "--objective", "score")
    done = run(*options, "--set", "ranking.num_images=20", folder=swept.folder)
    assert done.returncode == 0, done.stderr
    rows = load_rows(swept.folder / "scalar")
    assert {r["status"] for r in rows} <= {"finished", "stopped"}
    assert len(rows) == 2
    for row in rows:
        expected = (row["flip_rate"] * row["disentanglement"] * row["ssim"]) ** (1 / 3)
        assert row["score"] == pytest.approx(expected)


def test_a_run_can_repeat_seeds(swept: Swept) -> None:
    recipe = ["--recipe", str(ROOT / "tests" / "tiny.yaml"), "--store", str(swept.output / "store")]
    command = [sys.executable, "-m", "diffex.cli", "run", "--seeds", "2", "--output", "seeds", *recipe]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=swept.folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = load_rows(swept.folder / "seeds")
    assert {r["run.seed"] for r in rows} == {0, 1}
    (found,) = pq.read_table(swept.folder / "seeds" / "seeds.parquet").to_pylist()
    assert found["ssim"] == pytest.approx(sum(r["ssim"] for r in rows) / 2)
    assert found["ssim_low"] < found["ssim"] < found["ssim_high"]
    assert (
        0 <= found["stability.retrained_low"] <= found["stability.retrained"] <= found["stability.retrained_high"] <= 1
    )
    assert "Over seeds" in (swept.folder / "seeds" / "report.html").read_text(encoding="utf-8")
    client = MlflowClient(f"sqlite:///{swept.folder / 'seeds' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("run")
    assert experiment is not None
    parent = client.search_runs([experiment.experiment_id], "tags.`diffex.kind` = 'sweep'")[0]
    assert parent.data.metrics["seeds.ssim"] == pytest.approx(found["ssim"])


def test_another_configuration_is_refused_and_nothing_is_touched(swept: Swept) -> None:
    before = {f: f.read_bytes() for f in swept.output.glob("*.*")}
    done = run("--output", "out", "--set", "directions.tau=0.7", folder=swept.folder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: 'out' holds results of another configuration: directions.tau (0.5 there")
    assert "Traceback" not in done.stderr
    assert {f: f.read_bytes() for f in before} == before


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    done = run("--dry-run", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "autoencoder.lambda1" in done.stdout
    assert "2 x warmup" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_recipes_own_value_joins_the_levels() -> None:
    assert Levels((0.0, 3.0)).including(0.3) == Levels((0.3, 0.0, 3.0))
    assert Levels((0.0, 3.0)).including(3.0) == Levels((0.0, 3.0))


def test_dry_run_shows_that_the_recipe_itself_can_be_drawn(tmp_path: Path) -> None:
    done = run("--dry-run", "--set", "autoencoder.lambda1=0.7", folder=tmp_path)
    assert "values=(0.7, 0.0, 3.0)" in done.stdout


def test_a_sweep_is_named_by_everything_but_its_number_of_trials() -> None:
    def sweep(space: dict[str, Levels | Range], base: Experiment) -> Sweep:
        return Sweep(name="s", base=base, space=space)

    base, space = load(), {"directions.lambda2": Range(0.1, 10.0, log=True)}
    assert sweep(space, base).digest == sweep(space, base).digest
    assert sweep(space, base).digest != sweep(space, base.with_settings({"run.seed": 1})).digest
    assert sweep(space, base).digest != sweep({"directions.lambda2": Range(0.1, 5.0, log=True)}, base).digest


def test_a_trial_that_was_killed_while_it_was_proposed_is_not_taken_for_another(tmp_path: Path) -> None:
    """Its first parameters alone name the trial of the base's values, which has a row."""
    sweep = Sweep(
        name="s", base=TINY, space={"autoencoder.lambda1": Levels((0.0, 3.0)), "directions.tau": Range(0.1, 1.0)}
    )
    write_row(tmp_path / "trials" / trial_name(TINY, {}), {"status": "finished", **dict.fromkeys(sweep.metrics, 0.5)})

    def opened() -> Study:
        return _open_study(sweep, tmp_path, Store(tmp_path / "store"), _storage(tmp_path, None))

    opened().ask().suggest_categorical("autoencoder.lambda1", (0.0, 3.0))
    study = opened()
    assert [t.state.name for t in study.trials] == ["FAIL"]


def test_points_that_were_asked_for_and_failed_are_tried_again(tmp_path: Path) -> None:
    """The seeds of ``diffex run --seeds``, and a grid's combinations; those of the sampler's own are not."""
    seeds = tuple({"run.seed": seed} for seed in range(3))
    sweep = Sweep(name="s", base=TINY, space={"run.seed": Levels((0, 1, 2))}, first=seeds)

    def opened() -> Study:
        return _open_study(sweep, tmp_path, Store(tmp_path / "store"), _storage(tmp_path, None))

    first = opened()
    for state in (TrialState.FAIL, TrialState.COMPLETE):
        trial = first.ask({"run.seed": Levels((0, 1, 2)).distribution()})
        first.tell(trial, [0.5] * 3 if state == TrialState.COMPLETE else None, state=state)
    waiting = [t for t in opened().trials if t.state == TrialState.WAITING]
    assert [t.system_attrs["fixed_params"]["run.seed"] for t in waiting] == [2, 0]
    assert len(opened().trials) == 4


def test_a_space_with_an_unknown_setting_or_an_impossible_value_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="directions.lambda2"):
        Sweep(name="s", base=load(), space={"directions.lamda2": Levels((1.0, 2.0))})
    with pytest.raises(UserError, match="between 1 and 1000"):
        Sweep(name="s", base=load(), space={"directions.num_directions": Levels((0, 4))})
