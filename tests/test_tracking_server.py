"""MLflow with many writers: eight processes on an SQLite file, and on a real server over PostgreSQL."""

import contextlib
import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffex import curves
from diffex.tracking import Target, TrialRun, absolute_uri, close_sweep, open_sweep, trial_runs

TRIALS, POINTS, LOSSES = 8, 500, 4
PROCESSES = multiprocessing.get_context("forkserver")


class Server:
    """`mlflow server` over a PostgreSQL cluster of its own, both on loopback, both ended by process id."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, find_postgres()
        self.user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None  # PostgreSQL refuses to run as root
        self.database = self.mlflow = None
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start_database(self) -> None:
        data = self.folder / "data"
        if self.user:
            os.chown(self.folder, self.user.pw_uid, self.user.pw_gid)
        self._as_user("initdb", "-D", str(data), "-U", "mlflow", "--auth=trust", "--no-sync", "--encoding=UTF8").wait()
        self.database_port = free_port()
        self.database = self._as_user(
            "postgres", "-D", str(data), "-h", "127.0.0.1", "-p", str(self.database_port), "-k", str(self.folder)
        )
        wait_for(lambda: (data / "postmaster.pid").read_text().split("\n")[7].strip() == "ready", self.database)

    def _as_user(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        other: dict[str, Any] = {}
        if self.user:
            other = {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}
        with (self.folder.parent / f"{self.folder.name}-{program}.log").open("wb") as log:
            return subprocess.Popen(
                [str(self.programs / program), *arguments], stdout=log, stderr=log, cwd=self.folder,
                start_new_session=True, **other,
            )  # fmt: skip

    def start(self) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
        environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
        store = f"postgresql+psycopg2://mlflow@127.0.0.1:{self.database_port}/postgres"
        with (self.folder.parent / f"{self.folder.name}-mlflow.log").open("ab") as log:
            self.mlflow = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--artifacts-destination",
                 str(self.folder.parent / f"{self.folder.name}-artifacts"), "--host", "127.0.0.1",
                 "--port", str(self.port), "--workers", "2"],
                stdout=log, stderr=log, env=environment, start_new_session=True,
            )  # fmt: skip

        def healthy() -> bool:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)

        wait_for(healthy, self.mlflow)

    def kill(self) -> None:
        """The server and its workers, as a machine that loses power would."""
        if self.mlflow is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.mlflow.pid, signal.SIGKILL)
            self.mlflow.wait()

    def stop(self) -> None:
        self.kill()
        if self.database is not None:
            self.database.send_signal(signal.SIGINT)  # a fast shutdown
            self.database.wait()
        for left in self.folder.parent.glob(f"{self.folder.name}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


def find_postgres() -> Path:
    """The folder of PostgreSQL's programs; skips the test where there is none."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name))
    found = shutil.which("postgres")
    for folder in [*reversed(debian), *([Path(found).resolve().parent] if found else [])]:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(ready: Any, process: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, IndexError):
            if ready():
                return
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args} is not ready after {seconds} s"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    find_postgres()
    pytest.importorskip("psycopg2", reason="pip install 'diffex[postgres]'")
    # Not below pytest's own folder, which other users may not enter; a unix socket's path must be short, too.
    made = Server(Path(tempfile.mkdtemp(prefix="diffex-mlflow-")))
    try:
        made.start_database()
        made.start()
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module", params=["sqlite", "server over postgresql"])
def uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "sqlite":
        return absolute_uri(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
    made: Server = request.getfixturevalue("server")
    return made.uri


def open_target(uri: str, name: str, folder: Path) -> Target:
    return open_sweep(uri, name, "d", artifacts=folder / "artifacts", params={"a": 1}, tags={})


def curve(points: int) -> list[dict[str, float]]:
    return [{"images": i, **{f"loss{k}": i + k / 10 for k in range(LOSSES)}} for i in range(1, points + 1)]


def run_trial(target: Target, name: str, folder: Path, failures: Any) -> None:
    """One trial's process: settings, live points, a row, an artifact."""
    warnings: list[str] = []
    curves.warn = warnings.append
    try:
        file = folder / f"{name}.json"
        file.write_text(name)
        params = {f"setting{i}": i for i in range(150)}
        with TrialRun(target, name, name, params, every=0.1) as run:
            for point in curve(POINTS):
                run.point("autoencoder", point)
                time.sleep(0.002)
            row = {f"score{i}": float(i) for i in range(500)}
            run.log({**row, "trial": name}, {"autoencoder": curve(POINTS)}, [file], {"paid": "all"})
        failures.put(warnings)
    except BaseException as error:
        failures.put([repr(error)])
        raise


def in_processes(target: Target, names: list[str], folder: Path) -> list[str]:
    """What went wrong in trials that ran at the same time."""
    PROCESSES.set_forkserver_preload(["mlflow", "diffex.tracking"])
    failures = PROCESSES.SimpleQueue()
    running = [PROCESSES.Process(target=run_trial, args=(target, name, folder, failures)) for name in names]
    for process in running:
        process.start()
    reasons = [reason for _ in running for reason in failures.get()]
    for process in running:
        process.join()
    return reasons


def open_alone(uri: str, barrier: Any, failures: Any) -> None:
    barrier.wait()
    try:
        open_sweep(uri, "cold", "d", params={}, tags={})
        failures.put("")
    except Exception as error:
        failures.put(repr(error))


def test_four_drivers_may_open_a_new_sqlite_file_at_once(tmp_path: Path) -> None:
    PROCESSES.set_forkserver_preload(["mlflow", "diffex.tracking"])
    failures, barrier = PROCESSES.SimpleQueue(), PROCESSES.Barrier(4)
    uri = absolute_uri(f"sqlite:///{tmp_path}/new.db")
    drivers = [PROCESSES.Process(target=open_alone, args=(uri, barrier, failures)) for _ in range(4)]
    for driver in drivers:
        driver.start()
    assert [failures.get() for _ in drivers] == [""] * 4
    for driver in drivers:
        driver.join()


def stored(target: Target, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in target.client.get_metric_history(run_id, key))


def expected(k: int, points: int = POINTS) -> list[tuple[int, float]]:
    return [(int(p["images"]), p[f"loss{k}"]) for p in curve(points)]


def test_eight_trials_at_once_lose_no_metric(uri: str, tmp_path: Path) -> None:
    target = open_target(uri, "eight", tmp_path)
    names = [f"trial{i}" for i in range(TRIALS)]
    assert in_processes(target, names, tmp_path) == []
    client = target.client
    runs = client.search_runs([target.experiment_id], "tags.`diffex.kind` = 'trial'")
    assert {run.info.run_name for run in runs} == set(names)
    assert set(trial_runs(target)) == {run.info.run_id for run in runs}  # nested, and finished
    for run in runs:
        for k in range(LOSSES):
            assert stored(target, run.info.run_id, f"train.autoencoder.loss{k}") == expected(k)
        assert {f"score{i}": float(i) for i in range(500)}.items() <= run.data.metrics.items()
        assert run.data.params == {f"setting{i}": str(i) for i in range(150)}
        assert run.data.tags["diffex.trial"] == run.info.run_name
        artifacts = [a.path for a in client.list_artifacts(run.info.run_id)]
        assert artifacts == [f"{run.info.run_name}.json"]
        copy = client.download_artifacts(run.info.run_id, artifacts[0], str(tmp_path))
        assert Path(copy).read_text() == run.info.run_name


def test_a_resumed_trial_continues_its_run(uri: str, tmp_path: Path) -> None:
    target = open_target(uri, "resumed", tmp_path)
    with pytest.raises(KeyboardInterrupt), TrialRun(target, "t", "t", {"p": 1}) as run:
        for point in curve(30):
            run.point("autoencoder", point)
        raise KeyboardInterrupt
    first = run.run_id
    with TrialRun(target, "t", "t", {"p": 1}) as run:
        for point in curve(50)[20:]:
            run.point("autoencoder", point)
        run.log({"score": 1.0}, {"autoencoder": curve(50)}, [], {})
    assert run.run_id == first
    assert trial_runs(target) == [first]
    assert stored(target, str(first), "train.autoencoder.loss1") == expected(1, 50)


def test_the_parent_run_takes_the_sweep_s_files(uri: str, tmp_path: Path) -> None:
    target = open_target(uri, "closed", tmp_path)
    report = tmp_path / "report.html"
    report.write_text("<p>")
    close_sweep(target, metrics={"best": 1.0}, folder=tmp_path, files=[report], status="FINISHED")
    assert [a.path for a in target.client.list_artifacts(target.parent)] == ["report.html"]
    assert open_target(uri, "closed", tmp_path) == target


def test_numbers_that_are_not_finite_pass_the_server_too(uri: str, tmp_path: Path) -> None:
    target = open_target(uri, "finite", tmp_path)
    with TrialRun(target, "t", "t", {}) as run:
        run.point("autoencoder", {"images": 1, "loss": float("nan"), "other": 1.0})
        run.log({"bad": float("inf"), "good": 2.0}, {}, [], {})
    assert target.client.get_run(str(run.run_id)).data.metrics == {"train.autoencoder.other": 1.0, "good": 2.0}


def test_a_server_killed_and_started_again_loses_nothing(server: Server, tmp_path: Path) -> None:
    target = open_target(server.uri, "killed", tmp_path)
    file = tmp_path / "row.json"
    file.write_text("{}")
    points = curve(300)
    with TrialRun(target, "t", "t", {"p": 1}, every=0.02) as run:
        for point in points[:100]:
            run.point("autoencoder", point)
            time.sleep(0.002)
        server.kill()
        for point in points[100:200]:
            run.point("autoencoder", point)
            time.sleep(0.002)
        with TrialRun(target, "late", "late", {"p": 2}) as late:  # begins while there is no server
            late.point("directions", points[0])
            server.start()
            late.log({"score": 2.0}, {}, [], {})
        for point in points[200:]:
            run.point("autoencoder", point)
        run.log({"score": 1.0}, {"autoencoder": points}, [file], {})
    for k in range(LOSSES):
        assert stored(target, str(run.run_id), f"train.autoencoder.loss{k}") == expected(k, 300)
    assert set(trial_runs(target)) == {run.run_id, late.run_id}
    assert target.client.get_run(str(late.run_id)).data.params == {"p": "2"}
    assert [a.path for a in target.client.list_artifacts(str(run.run_id))] == ["row.json"]
