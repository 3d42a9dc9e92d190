"""MLflow on an SQLite file: curves while a trial runs, resuming, and what happens while MLflow fails."""

import functools
import itertools
import json
import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from diffex import connection, curves
from diffex.errors import UserError
from diffex.tracking import (
    Target,
    TrialRun,
    absolute_uri,
    close_sweep,
    compare_url,
    deliver,
    end_orphans,
    how_to_look,
    keep,
    open_sweep,
    trial_runs,
)

HISTORY = [{"images": 64 * i, "loss": 1 / i, "other": 2 / i} for i in range(1, 21)]
ROW = {"flip_rate": 0.5, "seeds": 3, "verdict": "fine", "unknown": math.nan, "ratio": math.inf, "whole": True}


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return absolute_uri(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


@pytest.fixture
def target(uri: str, tmp_path: Path, request: pytest.FixtureRequest) -> Target:
    """A sweep of its own for each test."""
    name = request.node.name
    return open_sweep(uri, name, "d1", artifacts=tmp_path / "artifacts", params={"a": 1}, tags={"who": "me"})


def only_run(target: Target) -> Run:
    found = target.client.search_runs([target.experiment_id], "tags.`diffex.kind` = 'trial'")
    assert len(found) == 1
    return found[0]


def steps(target: Target, key: str) -> list[int]:
    return [m.step for m in target.client.get_metric_history(only_run(target).info.run_id, key)]


class Outage:
    """MLflow that refuses all writes while it is down, as a server that is gone does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.down, self.tries = True, 0
        for name in ("log_batch", "create_run", "set_terminated", "log_artifact", "search_runs", "get_run"):
            monkeypatch.setattr(MlflowClient, name, self._failing(getattr(MlflowClient, name)))

    def _failing(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.down:
                self.tries += 1
                raise ConnectionError("connection refused")
            return method(*args, **kwargs)

        return call


def test_points_arrive_while_the_trial_runs(target: Target) -> None:
    with TrialRun(target, "t", "x", {}, every=0.05) as run:
        run.point("autoencoder", HISTORY[0])
        deadline = time.monotonic() + 20
        while not steps(target, "train.autoencoder.loss") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert steps(target, "train.autoencoder.loss") == [64]
        assert only_run(target).info.status == "RUNNING"
        run.point("autoencoder", HISTORY[1])
    assert steps(target, "train.autoencoder.other") == [64, 128]
    assert only_run(target).info.status == "FINISHED"


def test_points_are_sent_in_batches(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    whole = MlflowClient.log_batch

    def log_batch(self: MlflowClient, run_id: str, metrics: Any = (), **kwargs: Any) -> None:
        sizes.append(len(metrics))
        whole(self, run_id, metrics=metrics, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    with TrialRun(target, "t", "x", {}, every=600) as run:
        for i in range(1100):
            run.point("autoencoder", {"images": i, "loss": 0.5, "other": 0.25})
    assert max(sizes) == connection.BATCH
    assert len([n for n in sizes if n]) <= 4
    assert steps(target, "train.autoencoder.loss") == list(range(1100))


def test_a_history_is_logged_once_however_much_of_it_went_live(target: Target) -> None:
    with TrialRun(target, "t", "x", {"p": 1}) as run:
        for point in HISTORY[5:15]:
            run.point("autoencoder", point)
        run.log(ROW, {"autoencoder": HISTORY, "classifier": HISTORY[:3]}, [], {})
    assert sorted(steps(target, "train.autoencoder.loss")) == [p["images"] for p in HISTORY]
    assert steps(target, "train.classifier.loss") == [64, 128, 192]


def test_a_resumed_trial_goes_on_with_its_run_and_repeats_no_step(target: Target) -> None:
    with pytest.raises(RuntimeError, match="spot"), TrialRun(target, "t", "x", {"p": 1}) as run:
        for point in HISTORY[:12]:
            run.point("autoencoder", point)
        raise RuntimeError("spot instance lost")
    assert only_run(target).info.status == "FAILED"
    assert len(steps(target, "train.autoencoder.loss")) == 12  # at the exit of a failing trial, too
    with TrialRun(target, "t", "x", {"p": 1}) as run:
        for point in HISTORY[8:]:  # a training repeats what followed its last checkpoint
            run.point("autoencoder", point)
        run.log(ROW, {"autoencoder": HISTORY}, [], {})
    run_ = only_run(target)
    for key in ("train.autoencoder.loss", "train.autoencoder.other"):
        assert steps(target, key) == [p["images"] for p in HISTORY]
    assert run_.info.status == "FINISHED"
    assert run_.data.params == {"p": "1"}


def test_points_that_a_kill_lost_are_filled_in_from_the_history(target: Target) -> None:
    with TrialRun(target, "t", "x", {}) as run:
        for point in [*HISTORY[:4], *HISTORY[9:]]:
            run.point("autoencoder", point)
        run.flush()
    with TrialRun(target, "t", "x", {}) as run:
        run.log({}, {"autoencoder": HISTORY}, [], {})
    assert sorted(steps(target, "train.autoencoder.loss")) == [p["images"] for p in HISTORY]


def test_a_pickled_copy_sends_points_of_the_same_run(target: Target) -> None:
    with TrialRun(target, "t", "x", {}) as run:
        copy = pickle.loads(pickle.dumps(run))
        for point in HISTORY[:10]:
            copy.point("autoencoder", point)
        copy.flush()
        run.log({}, {"autoencoder": HISTORY}, [], {})
    assert sorted(steps(target, "train.autoencoder.loss")) == [p["images"] for p in HISTORY]


def test_numbers_that_are_not_finite_are_left_out_and_break_nothing(target: Target) -> None:
    with TrialRun(target, "t", "x", {}) as run:
        run.point("directions", {"images": 1, "loss": math.nan, "other": 1.0})
        run.point("directions", {"images": 2, "loss": 2.0, "other": math.inf})
        run.log(ROW, {"directions": [{"images": 3, "loss": -math.inf, "other": 3.0}]}, [], {})
    assert steps(target, "train.directions.loss") == [2]
    assert steps(target, "train.directions.other") == [1, 3]
    metrics = {k: v for k, v in only_run(target).data.metrics.items() if not k.startswith("train.")}
    assert metrics == {"flip_rate": 0.5, "seeds": 3.0}


def test_a_row_brings_tags_note_and_artifacts(target: Target, tmp_path: Path) -> None:
    file = tmp_path / "row.json"
    file.write_text("{}")
    with TrialRun(target, "t", "x", {}) as run:
        run.log(ROW, {}, [file, tmp_path / "gone.json"], {"paid": "directions"}, note="- it works")
    tags = only_run(target).data.tags
    assert tags["diffex.verdict"] == "fine"
    assert tags["diffex.paid"] == "directions"
    assert tags["mlflow.note.content"] == "- it works"
    assert [a.path for a in target.client.list_artifacts(only_run(target).info.run_id)] == ["row.json"]


def test_a_row_logged_again_is_stored_once(target: Target) -> None:
    for _ in range(2):
        with TrialRun(target, "t", "x", {}) as run:
            run.log(ROW, {"autoencoder": HISTORY}, [], {})
    assert steps(target, "flip_rate") == [0]
    assert len(steps(target, "train.autoencoder.loss")) == len(HISTORY)


def test_an_outage_in_the_middle_costs_the_trial_nothing(
    target: Target, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with TrialRun(target, "t", "x", {}, every=0.01) as run:
        outage = Outage(monkeypatch)
        for point in HISTORY[:10]:
            run.point("autoencoder", point)
        deadline = time.monotonic() + 20
        while outage.tries < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert outage.tries >= 3
        outage.down = False
        run.log(ROW, {"autoencoder": HISTORY}, [], {})
    assert steps(target, "train.autoencoder.loss") == [p["images"] for p in HISTORY]
    assert capsys.readouterr().err.count("warning: MLflow does not take the training curves") == 1


def test_a_trial_that_starts_in_an_outage_logs_when_it_is_over(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    outage = Outage(monkeypatch)
    with TrialRun(target, "t", "x", {"p": 1}) as run:
        run.point("autoencoder", HISTORY[0])
        outage.down = False
        run.log(ROW, {}, [], {})
    assert only_run(target).data.params == {"p": "1"}
    assert steps(target, "train.autoencoder.loss") == [64]


def test_what_mlflow_does_not_take_at_the_end_is_left_and_delivered_later(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = tmp_path / "unlogged", tmp_path / "picture.png"
    file.write_bytes(b"png")
    with TrialRun(target, "t", "x", {"p": 1}, leave=functools.partial(keep, folder), patience=0) as run:
        outage = Outage(monkeypatch)
        run.point("witness", HISTORY[0])
        run.log(ROW, {"autoencoder": HISTORY}, [file], {"paid": "all"}, note="- it works")
    assert [f.name for f in folder.iterdir()] == ["x.json"]
    assert json.loads((folder / "x.json").read_text())["name"] == "t"
    assert deliver(target, folder, patience=0) == ["t"]
    outage.down = False
    assert deliver(target, folder) == []
    assert list(folder.iterdir()) == []
    run_ = only_run(target)
    assert run_.info.status == "FINISHED"
    assert run_.data.metrics["flip_rate"] == 0.5
    assert run_.data.tags["diffex.paid"] == "all"
    assert steps(target, "train.autoencoder.loss") == [p["images"] for p in HISTORY]
    assert steps(target, "train.witness.loss") == [64]
    assert [a.path for a in target.client.list_artifacts(run_.info.run_id)] == ["picture.png"]


def test_a_trial_that_may_leave_nothing_raises_one_line(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(UserError, match=r"does not take the results of t .*run the same command again"),
        TrialRun(target, "t", "x", {}, patience=0) as run,
    ):
        Outage(monkeypatch)
        run.log(ROW, {}, [], {})


def test_the_own_error_of_a_trial_is_heard_through_an_outage(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="diverged"), TrialRun(target, "t", "x", {}) as run:
        Outage(monkeypatch)
        run.point("autoencoder", HISTORY[0])
        raise RuntimeError("diverged")


def test_a_stopped_trial_is_killed_not_failed(target: Target) -> None:
    with pytest.raises(SystemExit), TrialRun(target, "t", "x", {}):
        raise SystemExit  # as Ray Tune stops a trial
    assert only_run(target).info.status == "KILLED"


def test_a_run_of_a_sweep_that_is_gone_is_refused_at_once(target: Target) -> None:
    gone = Target(target.uri, "123456", target.parent)
    with pytest.raises(UserError, match="refuses the trial"), TrialRun(gone, "t", "x", {}):
        pass


def test_sqlite_is_refused_on_another_machine(target: Target, tmp_path: Path) -> None:
    elsewhere = Target(target.uri, target.experiment_id, target.parent, host="another-machine")
    missing = Target(f"sqlite:///{tmp_path}/none.db", "1", "p")
    for wrong in (elsewhere, missing):
        with pytest.raises(UserError, match="lives on one machine.*mlflow server.*http://HOST:5000"):
            TrialRun(wrong, "t", "x", {}).__enter__()
    assert not (tmp_path / "none.db").exists()


def test_nothing_is_logged_without_a_target() -> None:
    with TrialRun(None, "t", "x", {}) as run:
        run.point("autoencoder", HISTORY[0])
        run.log(ROW, {}, [], {})
    assert run.run_id is None


def test_a_sweep_is_found_again_by_its_digest_and_kind(target: Target, request: pytest.FixtureRequest) -> None:
    def open_again(digest: str, kind: str) -> str:
        return open_sweep(target.uri, request.node.name, digest, params={}, tags={}, kind=kind).parent

    assert open_again("d1", "sweep") == target.parent
    ablation = open_again("d1", "ablation")
    assert ablation != target.parent
    assert open_again("d1", "ablation") == ablation
    assert target.client.get_run(ablation).data.tags["diffex.kind"] == "ablation"
    assert open_again("d2", "sweep") != target.parent


def test_closing_a_sweep_says_where_its_trials_are_compared(target: Target, tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    files = [tmp_path / "report.html", tmp_path / "figures" / "pareto.png"]
    for file in files:
        file.write_text("x")
    for digest in ("x", "y"):
        with TrialRun(target, digest, digest, {}) as run:
            run.log(ROW, {}, [], {})
    runs = trial_runs(target)
    url = close_sweep(target, metrics={"best": 1.0, "bad": math.nan}, folder=tmp_path, files=files, status="FINISHED")
    assert url == compare_url("http://127.0.0.1:5000", target.experiment_id, runs)
    page = urlparse(urlparse(url).fragment)
    assert page.path == "/compare-runs"
    query = parse_qs(page.query)
    assert json.loads(query["runs"][0]) == runs
    assert json.loads(query["experiments"][0]) == [target.experiment_id]
    parent = target.client.get_run(target.parent)
    assert parent.data.tags["diffex.compare"] == url
    assert parent.data.metrics == {"best": 1.0}
    assert parent.info.status == "FINISHED"
    assert {a.path for a in target.client.list_artifacts(target.parent)} == {"report.html", "figures"}


def test_runs_left_open_are_ended(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    TrialRun(target, "t", "x", {}).__enter__()
    outage = Outage(monkeypatch)
    end_orphans(target)  # warns, for a sweep must not fail over it
    outage.down = False
    assert trial_runs(target, "RUNNING") == [only_run(target).info.run_id]
    end_orphans(target)
    assert only_run(target).info.status == "KILLED"


def test_addresses_keep_their_query_and_show_no_password(tmp_path: Path) -> None:
    assert absolute_uri(f"sqlite:///{tmp_path}/new/m.db?timeout=60") == f"sqlite:///{tmp_path}/new/m.db?timeout=60"
    assert (tmp_path / "new").is_dir()
    assert absolute_uri("postgresql+psycopg2://u:secret@h/db") == "postgresql+psycopg2://u:secret@h/db"
    assert how_to_look("postgresql://u:secret@h/db") == "mlflow ui --backend-store-uri postgresql://u:***@h/db"
    assert how_to_look("http://h:5000") == "http://h:5000"
    for wrong in ("mlruns", "file:///tmp/x", "http"):
        with pytest.raises(UserError, match="--tracking-uri"):
            absolute_uri(wrong)


def test_a_run_waits_longer_after_each_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect() -> Any:
        tries.append(time.monotonic())
        raise ConnectionError("connection refused")

    tries: list[float] = []
    buffer = curves.Curves(connect, every=0.05)
    buffer.add([("train.a.loss", 1.0, 0, 1)])
    deadline = time.monotonic() + 20
    while len(tries) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    buffer.close()
    gaps = [b - a for a, b in itertools.pairwise(tries)]
    assert all(gap > 0.04 * 2**k for k, gap in enumerate(gaps, 1))
    assert buffer.waiting() == [("train.a.loss", 1.0, 0, 1)]
