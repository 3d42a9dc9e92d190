"""One worker against two, one thread each, in pairs: stage 1, effects, and a sweep; and what Ray costs a trial.

    python benchmarks/workers.py --out benchmarks/results/workers.json
    python benchmarks/workers.py --out benchmarks/results/workers.json --only "stage 1" --batch 128 --images 12800

efficiency = time of one / (2 x time of two), for equal work; start-up of processes is left out where the platform
pays it once (trainings, renderings), and shown beside.  Each pair is run ``--pairs`` times in turn, and medians of the
pairs' ratios are told with their range: a shared machine's seconds mean little.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch

from diffex.cluster import Meters, resources, share_out
from diffex.config import Experiment, load
from diffex.pipeline import ensure
from diffex.search import Sweep, run_sweep
from diffex.space import Levels
from diffex.store import Store
from diffex.trainer import crew_of

BASE = {
    "assay.num_images": 3072, "classifier.images": 4000, "evaluation.ruler_images": 1000,
    "evaluation.witness_images": 1000, "evaluation.robust_images": 500, "autoencoder.warmup_fraction": 0.5,
    "run.precision": "fp32", "run.cpus": 1,
}  # fmt: skip

MANY = {"ranking.num_images": 256}
"""16 shards of effects: a rendering that is long beside the loading of what it needs."""


class Clock:
    """When a stage's meter passed which count, seen from the driver."""

    def __init__(self, meters: Meters, what: str) -> None:
        self.meters, self.what = meters, what
        self.passed: list[tuple[float, int]] = []
        self.stop = False
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.stop:
            for state in self.meters.read().values():
                started = state["what"] == self.what and state["done"] >= 2  # both workers are at work
                if started and (not self.passed or state["done"] != self.passed[-1][1]):
                    self.passed.append((time.perf_counter(), state["done"]))
            time.sleep(0.5)  # a meter tells no more often, and asking takes from what is measured

    def seconds_each(self) -> float:
        """Seconds an item between the first and the last count that were seen."""
        self.stop = True
        self.thread.join()
        (t0, n0), (t1, n1) = self.passed[0], self.passed[-1]
        return (t1 - t0) / (n1 - n0)


def stage(store: Path, e: Experiment, last: str, what: str, remove: str) -> tuple[float, float]:
    """(Seconds an item, seconds in all) of one stage, whatever it needs being there; it is forgotten before."""
    for old in (store / remove).glob("*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    meters = Meters()
    clock, meter, began = Clock(meters, what), meters.meter("trial"), time.perf_counter()
    ensure(Store(store), e, last, progress=meter, crew=crew_of(e.run, share_out(e.run, resources()), meter))
    return clock.seconds_each(), time.perf_counter() - began


def pairs(
    number: int, one: Callable[[], tuple[float, float]], two: Callable[[], tuple[float, float]]
) -> dict[str, Any]:
    """Both in turn; the ratio of each pair."""
    rows = [(one(), two()) for _ in range(number)]
    each = [a[0] / (2 * b[0]) for a, b in rows]
    whole = [a[1] / (2 * b[1]) for a, b in rows]
    return {
        "efficiency": median(each), "range": [min(each), max(each)], "with_start": median(whole),
        "seconds_each": [[a[0], b[0]] for a, b in rows], "seconds": [[a[1], b[1]] for a, b in rows],
    }  # fmt: skip


def of_stage(root: Path, base: Experiment, number: int, last: str, what: str) -> dict[str, Any]:
    two = base.with_settings({"run.workers": 2})
    ensure(Store(root), base, last)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        return pairs(number, lambda: stage(root, base, last, what, last), lambda: stage(root, two, last, what, last))
    finally:
        ray.shutdown()


def of_sweep(root: Path, base: Experiment, number: int, trials: int) -> dict[str, Any]:
    """Trials of directions on one autoencoder: one at a time against two."""
    levels = Levels(tuple(round(0.5 * 1.2**i, 3) for i in range(trials)))
    ensure(Store(root), base)

    def run(cpus: int) -> tuple[float, float]:
        for name in ("directions", "replicas", "effects", "evidence", "truth", "scoreboard", "pictures", "trial"):
            shutil.rmtree(root / name, ignore_errors=True)
        ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level="error")
        try:
            return sweep(root, base, levels, trials)
        finally:
            ray.shutdown()

    return pairs(number, lambda: run(1), lambda: run(2))


def sweep(root: Path, base: Experiment, levels: Levels, trials: int) -> tuple[float, float]:
    """(Seconds a trial from the first trial's end to the last's, seconds in all)."""
    with tempfile.TemporaryDirectory() as folder:
        asked = Sweep(name="s", base=base, space={"directions.lambda2": levels}, sampler="grid")
        began = time.perf_counter()
        run_sweep(asked, output=Path(folder), store=root, trials=trials, target=None, say=lambda line: None)
        seconds = time.perf_counter() - began
        ended = sorted(file.stat().st_mtime for file in Path(folder).glob("trials/*/row.json"))
        assert len(ended) == trials
        begun = time.time() - seconds
        return (ended[-1] - begun) / trials, seconds


def of_ray(root: Path, base: Experiment, number: int, trials: int) -> dict[str, Any]:
    """Trials of which every stage is there: what is left is Ray, Tune, Optuna and the folder's copy."""
    levels = Levels(tuple(round(0.5 * 1.2**i, 3) for i in range(trials)))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        sweep(root, base, levels, trials)
        rows = [(sweep(root, base, levels, 2)[1], sweep(root, base, levels, trials)[1]) for _ in range(number)]
    finally:
        ray.shutdown()
    each = [(many - few) / (trials - 2) * 2 for few, many in rows]  # two slots
    return {
        "seconds_a_trial": median(each),
        "range": [min(each), max(each)],
        "seconds_of_two_trials": median(r[0] for r in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what it holds of other parts stays")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--images", type=int, default=6400, help="images of stage 1")
    parser.add_argument("--batch", type=int, default=32, help="global batch of stage 1")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--only", help="stage 1, effects, sweep or ray")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = load("assay", {**BASE, "autoencoder.images": options.images, "autoencoder.batch_size": options.batch})
    found: dict[str, Any] = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    found |= {"machine": platform.machine(), "versions": f"torch {torch.__version__}, Ray {ray.__version__}"}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, measure in (
            ("stage 1", lambda: of_stage(root, base, options.pairs, "warmup", "autoencoder")),
            ("effects", lambda: of_stage(root, base.with_settings(MANY), options.pairs, "effects", "effects")),
            ("sweep", lambda: of_sweep(root, base, options.pairs, options.trials)),
            ("ray", lambda: of_ray(root, base, options.pairs, 12)),
        ):
            if options.only not in (None, name):
                continue
            label = f"stage 1, batch {options.batch}" if name == "stage 1" else name
            found[label] = measure()
            print(label, json.dumps(found[label]), flush=True)
            options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
