"""Several Ray nodes on this machine: trainings, effects and sweeps that lose one, and what is repeated then."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from heads import Head, several_nodes
from safetensors import safe_open

from diffex.cluster import Meters, resources, share_out
from diffex.config import Experiment, load
from diffex.pipeline import Outcome, ensure, stage_digests
from diffex.search import Sweep, run_sweep
from diffex.space import Levels
from diffex.store import Store
from diffex.train import CHECKPOINT
from diffex.trainer import crew_of

TINY = load(Path(__file__).with_name("tiny.yaml"), {"run.checkpoint_seconds": 0.0, "ranking.num_images": 32})
TWO = TINY.with_settings({"run.workers": 2})
LONG = TINY.with_settings({"autoencoder.images": 3840, "autoencoder.warmup_fraction": 0.25})
ROOT = Path(__file__).parents[1]
SAME = {"ssim": 1e-3, "agreement": 1e-3, "mean_shift": 1e-2, "flip_rate": 0.05}
"""How close scores are when one and two workers train: their sums differ in the last digits, and a cell may flip."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Outcome]:
    """The experiment on one worker, undisturbed: what all others are compared with."""
    store = Store(tmp_path_factory.mktemp("alone") / "store")
    return store, ensure(store, TINY, "scoreboard")


class Nodes:
    """A cluster of a head without CPUs and single-CPU nodes, on this machine."""

    def __init__(self, number: int) -> None:
        self.cluster = several_nodes(num_cpus=0, object_store_memory=100 * 2**20)
        self.nodes = [self.add() for _ in range(number)]
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="error")

    def add(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)

    def hosting(self, word: str) -> list[Any]:
        """Nodes with a worker process of which the name has that word."""
        children: dict[int, list[str]] = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it ended meanwhile
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append((process / "cmdline").read_text())
        raylets = [node.all_processes["raylet"][0].process.pid for node in self.nodes]
        return [n for n, pid in zip(self.nodes, raylets, strict=True) if any(word in c for c in children.get(pid, ()))]

    def kill(self, node: Any) -> None:
        """As a machine that is switched off."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(autouse=True, scope="module")
def _environment() -> Iterator[None]:
    """What Ray writes into this process's environment (its way of logging in, say) is nothing for other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="class")
def cluster() -> Iterator[Nodes]:
    made = Nodes(0)
    yield made
    made.close()


@pytest.fixture
def nodes(cluster: Nodes) -> Nodes:
    """Three nodes, whatever an earlier test has killed."""
    while len(cluster.nodes) < 3:
        cluster.nodes.append(cluster.add())
    return cluster


def when(condition: Callable[[], Any], then: Callable[[Any], None], told: list[Any]) -> threading.Thread:
    """Do something, once, as soon as a condition gives something; leaves it in ``told``."""

    def watch() -> None:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            found = condition()
            if found:
                told.append(found)
                then(found)
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def seen(folder: Path) -> int:
    """Images behind the checkpoint that a stage in progress has saved; 0 without one."""
    for file in folder.glob(f"*.partial/{CHECKPOINT}"):
        try:
            with safe_open(file, framework="pt") as opened:
                return int(opened.metadata()["seen"])
        except Exception:  # it is being replaced
            return 0
    return 0


def losses(outcome: Outcome) -> list[float]:
    history = json.loads((outcome["autoencoder"].path / "history.json").read_text(encoding="utf-8"))
    return [point["simple"] for point in history]


def table(outcome: Outcome) -> tuple[np.ndarray, np.ndarray]:
    """Where each learned direction takes the verdict of each image, in one order."""
    found = pq.read_table(outcome["effects"].path / "effects.parquet").to_pandas()
    found = found[found.kind == "learned"].sort_values(["row", "direction", "alpha"])
    return found.row.to_numpy(), found["p_edit:compound"].to_numpy()


SPACE = {"autoencoder.lambda1": Levels((0.0, 3.0)), "directions.lambda2": Levels((0.5, 1.0, 2.0))}


def sweep_of(e: Experiment) -> Sweep:
    return Sweep(name="nodes", base=e, space=SPACE, sampler="grid")


class TestThreeNodes:
    def test_a_node_lost_in_training_costs_what_came_after_the_last_checkpoint(
        self, nodes: Nodes, tmp_path: Path
    ) -> None:
        e = LONG.with_settings({"run.workers": 2})
        store, plain = Store(tmp_path / "store"), ensure(Store(tmp_path / "plain"), LONG, "autoencoder")
        last = e.autoencoder.whole_images
        progress: list[int] = []

        share = share_out(e.run, resources())
        meters = Meters()
        meter = meters.meter("trial")
        killed: list[Any] = []

        def far_enough() -> Any:
            reached = seen(store.root / "autoencoder")
            hosts = nodes.hosting("RayTrainWorker")
            return (reached, hosts[-1]) if e.autoencoder.warmup_images + 640 < reached < last - 640 and hosts else None

        def kill(found: Any) -> None:
            nodes.kill(found[1])

        watcher = when(far_enough, kill, killed)

        def follow() -> None:
            while watcher.is_alive() or progress[-1:] != [last]:
                state = meters.read().get("trial", {})
                if state.get("what") == "autoencoder" and killed and state["total"] == last:
                    progress.append(state["done"])
                time.sleep(0.02)

        threading.Thread(target=follow, daemon=True).start()
        outcome = ensure(store, e, "autoencoder", progress=meter, crew=crew_of(e.run, share, meter))
        assert killed, "the training was over before a node could be killed"
        saved = killed[0][0]
        assert min(progress[-1:] or [last]) == last
        after = [done for before, done in itertools.pairwise(progress) if done < before]
        assert all(done >= saved for done in after), (saved, after)
        assert losses(outcome) == pytest.approx(losses(plain), rel=0.02)  # two workers add up in another order than one

    def test_a_node_lost_while_effects_are_rendered_costs_no_finished_shard(
        self, nodes: Nodes, alone: tuple[Store, Outcome], tmp_path: Path
    ) -> None:
        store, plain = alone
        e = TWO.with_settings({"directions.lambda2": 1.5})  # other directions: their effects are not there yet
        expected = ensure(Store(tmp_path / "other"), e, "data")  # another store stays untouched
        assert expected.paid == ["data"]
        reference = ensure(store, e.with_settings({"run.workers": 1}), "directions")
        assert reference.paid == ["directions"]
        share = share_out(e.run, resources())
        meter = Meters().meter("trial")
        times: dict[str, float] = {}
        killed: list[Any] = []

        def some_shards() -> Any:
            shards = list((store.root / "effects").glob("*.partial/shard-*.parquet"))
            hosts = nodes.hosting("_Hand")
            return (shards, hosts[-1]) if len(shards) >= 1 and hosts else None

        def kill(found: Any) -> None:
            times.update({file.name: file.stat().st_mtime for file in found[0]})
            nodes.kill(found[1])

        when(some_shards, kill, killed)
        written: dict[str, float] = {}

        def tell(stage: str, facts: Any) -> None:
            for file in (store.root / "effects").glob("*.partial/shard-*.parquet"):
                written[file.name] = file.stat().st_mtime

        outcome = ensure(store, e, "effects", progress=meter, observe=tell, crew=crew_of(e.run, share, meter))
        assert killed, "the effects were rendered before a node could be killed"
        assert times
        assert {name: written[name] for name in times} == times
        rows, probabilities = table(outcome)
        assert len(np.unique(rows)) == len(np.unique(table(plain)[0]))
        again = ensure(Store(tmp_path / "again"), e.with_settings({"run.workers": 1}), "effects")
        assert probabilities == pytest.approx(table(again)[1], abs=1e-3)

    def test_a_sweep_over_three_nodes_that_loses_one_ends_with_the_same_scores(
        self, nodes: Nodes, alone: tuple[Store, Outcome], tmp_path: Path
    ) -> None:
        store = Store(tmp_path / "store")
        killed: list[Any] = []

        def a_trial_ended() -> Any:
            hosts = nodes.hosting("ImplicitFunc")
            done = {f.parent.name: f.stat().st_mtime for f in (tmp_path / "out").glob("trials/*/row.json")}
            return (done, hosts[-1]) if done and len(hosts) >= 2 else None

        when(a_trial_ended, lambda found: nodes.kill(found[1]), killed)
        (tmp_path / "out").mkdir()
        result = run_sweep(
            sweep_of(TINY), output=tmp_path / "out", store=store.address, trials=6, target=None, say=lambda line: None
        )
        assert killed
        assert result.failed == []
        assert len(result.rows) == 6
        for name, written in killed[0][0].items():
            assert (tmp_path / "out" / "trials" / name / "row.json").stat().st_mtime == written
        (same,) = [r for r in result.rows if r["autoencoder.lambda1"] == 3.0 and r["directions.lambda2"] == 1.0]
        row = json.loads((alone[1]["scoreboard"].path / "row.json").read_text(encoding="utf-8"))
        for measure in SAME:
            assert same[measure] == pytest.approx(row[measure], abs=1e-6)
        for stage, number in (("warmup", 1), ("autoencoder", 2), ("directions", 6)):
            assert len([p for p in (store.root / stage).iterdir() if (p / "entry.json").is_file()]) == number
        digests = stage_digests(TINY)
        assert store.get("autoencoder", digests["autoencoder"]) is not None


def test_more_trials_of_two_workers_than_fit_wait_for_each_other_and_none_for_ever(
    alone: tuple[Store, Outcome], tmp_path: Path
) -> None:
    """Two CPUs, trials of two workers: a trial that held a CPU itself would wait for its own workers."""
    store = Store(shutil.copytree(alone[0].root, tmp_path / "store"))
    shared = ("ruler", "robust")  # side by side, before the trials
    for stage in (*shared, "directions", "replicas", "effects", "evidence", "truth", "scoreboard", "pictures"):
        shutil.rmtree(store.root / stage, ignore_errors=True)  # what is made anew
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        (tmp_path / "out").mkdir()
        result = run_sweep(
            Sweep(name="nested", base=TWO, space={"directions.lambda2": SPACE["directions.lambda2"]}, sampler="grid"),
            output=tmp_path / "out", store=store.address, trials=3, target=None, say=lambda line: None,
        )  # fmt: skip
    finally:
        ray.shutdown()
    assert result.failed == []
    assert [{"directions", "effects"} <= set(r["paid"].split(", ")) for r in result.rows] == [True] * 3
    (same,) = [r for r in result.rows if r["directions.lambda2"] == 1.0]
    row = json.loads((alone[1]["scoreboard"].path / "row.json").read_text(encoding="utf-8"))
    for measure, tolerance in SAME.items():
        assert same[measure] == pytest.approx(row[measure], abs=tolerance)


def test_a_full_object_store_spills_and_nothing_is_lost(alone: tuple[Store, Outcome], tmp_path: Path) -> None:
    e = TWO.with_settings({"directions.lambda2": 0.7})
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", object_store_memory=80 * 2**20
    )
    try:
        held = [ray.put(np.random.default_rng(i).random(2**20)) for i in range(12)]  # 96 MB, and somebody needs them
        told: list[tuple[str, int, int]] = []
        crew = crew_of(e.run, share_out(e.run, resources()), lambda *state: told.append(state))
        outcome = ensure(alone[0], e, "effects", crew=crew)
        what, done, total = told[-1]  # the workers' progress, told here
        assert what == "directions"
        assert done == total > e.directions.images - e.directions.batch_size
        assert [float(ray.get(ref)[0]) for ref in held] == [np.random.default_rng(i).random() for i in range(12)]
    finally:
        ray.shutdown()
    again = ensure(Store(tmp_path / "again"), e.with_settings({"run.workers": 1}), "effects")
    assert table(outcome)[1] == pytest.approx(table(again)[1], abs=1e-3)


def test_an_elastic_training_makes_do_with_the_workers_that_there_are(
    alone: tuple[Store, Outcome], tmp_path: Path
) -> None:
    e = TWO.with_settings({"run.min_workers": 1})
    store = Store(shutil.copytree(alone[0].root, tmp_path / "store"))
    shutil.rmtree(store.root / "directions")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        meter = Meters().meter("trial")
        outcome = ensure(
            store, e, "directions", progress=meter, crew=crew_of(e.run, share_out(e.run, resources()), meter)
        )
    finally:
        ray.shutdown()
    assert outcome.paid == ["directions"]
    found, expected = (json.loads((o["directions"].path / "history.json").read_text()) for o in (outcome, alone[1]))
    assert found == expected  # one worker, on Ray Train or not, computes the same


SWEEP = [
    sys.executable, str(ROOT / "sweeps" / "direction_sweep.py"), "--recipe", str(ROOT / "tests" / "tiny.yaml"),
    "--sampler", "grid", "--vary", "directions.lambda2=[0.5, 1.0, 2.0, 4.0]", "--vary", "directions.tau=[0.5]",
    "--vary", "directions.alpha=[2.0]", "--vary", "directions.num_directions=[3]", "--vary", "directions.depth=[2]",
    "--vary", "directions.kind=[anchored]", "--output", "out",
]  # fmt: skip


def test_a_lost_head_is_restarted_and_the_same_command_goes_on(tmp_path: Path) -> None:
    def start(head: Head) -> subprocess.Popen[bytes]:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        environ |= {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": head.address, "RAY_AUTH_MODE": "disabled"}
        return subprocess.Popen(SWEEP, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    first = Head("disabled", num_cpus=2)
    try:
        first.wait()
        driver = start(first)
        deadline = time.monotonic() + 200
        while not list(tmp_path.glob("out/trials/*/row.json")):
            assert driver.poll() is None, "the sweep ended before its head could be lost"
            assert time.monotonic() < deadline, "no trial finished in time"
            time.sleep(0.05)
        first.kill()
        kept = {f: f.stat().st_mtime for f in tmp_path.glob("out/trials/*/row.json")}
        with contextlib.suppress(subprocess.TimeoutExpired):  # its cluster is gone: it ends, or is ended
            driver.wait(5)
        driver.kill()
        driver.wait()
    finally:
        first.end()
    second = Head("disabled", num_cpus=2)
    try:
        second.wait()
        driver = start(second)
        said = driver.communicate(timeout=300)[0].decode()
    finally:
        second.end()
    assert driver.returncode == 0, said
    assert f"{len(kept)} of 4 trials were finished before" in said
    assert {f: f.stat().st_mtime for f in kept} == kept
    assert len(list(tmp_path.glob("out/trials/*/row.json"))) == 4
    entries = [p for p in (tmp_path / "out" / "store" / "autoencoder").iterdir() if p.is_dir()]
    assert len(entries) == 1
