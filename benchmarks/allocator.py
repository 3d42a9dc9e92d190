"""What keeping freed memory saves on a CPU: a rendering and a training step of stage 1, without and with it, in pairs.

    python benchmarks/allocator.py --out benchmarks/results/allocator.json

Each measurement is a process of its own with one thread of torch's: the main one, or another, which is where Ray runs
trials and trainings.  Ratios are without / with, so above 1 is a gain.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import torch
from stage_costs import image_store

from diffex.classifier import FrozenClassifier
from diffex.compute import Compute, keep_freed_memory
from diffex.config import load
from diffex.diffusion import Schedule
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier
from diffex.train import AutoencoderTask

BATCH = {"rendering": 16, "training": 32}


def measure(what: str, aside: bool, keep: bool, folder: str, seconds: float, answer: Any) -> None:
    """Put into ``answer`` what ``measured`` finds, in the main thread or aside from it."""
    thread = Thread(target=lambda: answer.put(measured(what, keep, folder, seconds)))
    if aside:
        thread.start()
        thread.join()
    else:
        thread.run()


def measured(what: str, keep: bool, folder: str, seconds: float) -> dict[str, float]:
    """Median seconds of a call, the system's share of all CPU time, and the process's largest memory."""
    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    e, compute = load("assay"), Compute(torch.device("cpu"), False)  # not by ``resolve``, which would always keep

    def network() -> DiffusionAutoencoder:
        model = DiffusionAutoencoder(
            e.autoencoder, e.rendering, channels=2, size=e.data.size, num_classes=2, compute=compute
        )
        model.schedule = Schedule.linear()
        return model

    call: Callable[[], object]
    if what == "rendering":
        model = network().eval().requires_grad_(False)
        x, z = torch.randn(BATCH[what], *model.shape), torch.randn(BATCH[what], e.autoencoder.code_dim)
        call = lambda: model.decode(z, x)
    else:
        store = image_store(Path(folder), 2, e.data.size)
        frozen = FrozenClassifier(ResidualClassifier(2, 2, width=e.classifier.width), store.info.class_names)
        verdicts = torch.full((len(store), 2), 0.5)
        task = AutoencoderTask(network(), network(), store, verdicts, frozen, lambda1=0.0, seed=0)
        call = lambda: task.step(0)
    call()
    before, began, took = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter(), []
    while time.perf_counter() - began < seconds:
        last = time.perf_counter()
        call()
        took.append(time.perf_counter() - last)
    after = resource.getrusage(resource.RUSAGE_SELF)
    system, user = after.ru_stime - before.ru_stime, after.ru_utime - before.ru_utime
    return {"seconds": median(took), "system": system / (system + user), "peak_bytes": after.ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    context, found = get_context("spawn"), {}
    with tempfile.TemporaryDirectory() as folder:
        image_store(Path(folder), 2, load("assay").data.size)

        def one(what: str, aside: bool, keep: bool) -> dict[str, float]:
            answer = context.Queue()
            process = context.Process(target=measure, args=(what, aside, keep, folder, options.seconds, answer))
            process.start()
            result: dict[str, float] = answer.get()
            process.join()
            return result

        for what, aside in product(BATCH, (False, True)):
            rows = [(one(what, aside, False), one(what, aside, True)) for _ in range(options.pairs)]
            ratios = [a["seconds"] / b["seconds"] for a, b in rows]
            name = f"{what}, in a thread" if aside else what
            found[name] = {
                "batch": BATCH[what], "ratio": median(ratios), "range": [min(ratios), max(ratios)],
                "without": [a for a, _ in rows], "with": [b for _, b in rows],
            }  # fmt: skip
            print(name, f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})", flush=True)
    options.out.write_text(json.dumps({"torch": torch.__version__, **found}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
