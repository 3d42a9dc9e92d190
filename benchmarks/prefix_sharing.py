"""What sharing saves: 24 trials (4 lambda1 x 6 direction settings) on one store, against trials that share nothing.

    python benchmarks/prefix_sharing.py --workers 2 --independent 4 --out benchmarks/results/sharing.json

All 24 run on one store, several at a time; then --independent of them run again, each on an empty store of its own.
Told are seconds of computing (the sum over stages, as the store notes them), the mean of the independent ones times 24,
and whether a trial's scoreboard is the same either way.  Ray is left out: what it costs is in benchmarks/workers.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from diffex.config import Experiment, load
from diffex.pipeline import STAGE_1, ensure
from diffex.store import Store

LAMBDA1, LAMBDA2, DIRECTIONS = (0.0, 1.0, 3.0, 10.0), (0.3, 1.0, 3.0), (4, 8)


def points(base: Experiment) -> list[Experiment]:
    """The 24 trials; lambda1 varies fastest, so that neighbours train different autoencoders."""
    grid = itertools.product(DIRECTIONS, LAMBDA2, LAMBDA1)
    return [
        base.with_settings({"directions.num_directions": k, "directions.lambda2": b, "autoencoder.lambda1": a})
        for k, b, a in grid
    ]


def trial(job: tuple[Experiment, str, int]) -> dict[str, Any]:
    """One trial; what each stage took, and the scoreboard without what says how long it took."""
    e, store, threads = job
    import torch

    torch.set_num_threads(threads)
    outcome = ensure(Store(store), e)
    row = json.loads((outcome["scoreboard"].path / "row.json").read_text(encoding="utf-8"))
    return {
        "seconds": {f"{name}/{entry.path.name}": entry.seconds for name, entry in outcome.entries.items()},
        "paid": outcome.seconds(computed=True), "row": row,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="trials at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--independent", type=int, default=4, help="trials that run once more, sharing nothing")
    parser.add_argument("--recipe", default="assay")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    asked = points(load(options.recipe, {"run.device": "cpu", "run.precision": "fp32"}))
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool,
    ):
        began = time.monotonic()
        shared = list(pool.map(trial, [(e, f"{folder}/shared", options.threads) for e in asked]))
        middle = time.monotonic()
        chosen = [round(i * (len(asked) - 1) / max(options.independent - 1, 1)) for i in range(options.independent)]
        jobs = [(asked[i], f"{folder}/alone-{i}", options.threads) for i in chosen]
        alone = dict(zip(chosen, pool.map(trial, jobs), strict=True))
        ended = time.monotonic()
    together: dict[str, float] = {}
    for t in shared:
        together |= t["seconds"]
    apart = [sum(t["seconds"].values()) for t in alone.values()]
    mean = sum(apart) / len(apart)
    stage_1 = sum(s for name, s in together.items() if name.split("/")[0] in STAGE_1)
    different = sorted(
        {k for i, t in alone.items() for k, v in t["row"].items() if not same(v, shared[i]["row"].get(k))}
    )
    result = {
        "trials": len(asked), "together": sum(together.values()), "stages_together": len(together),
        "stage_1_together": stage_1, "independent": apart, "apart": mean * len(asked),
        "share": sum(together.values()) / (mean * len(asked)), "scores_that_differ": different,
        "scores_compared": len(next(iter(alone.values()))["row"]), "wall": [middle - began, ended - middle],
        "machine": platform.machine(), "cores": os.cpu_count(), "workers": options.workers, "threads": options.threads,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


def same(a: Any, b: Any) -> bool:
    """Equal, or not a number in both."""
    return a == b or (a != a and b != b)


if __name__ == "__main__":
    main()
