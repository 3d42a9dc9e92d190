"""What MLflow costs a trial: the same training with and without it, in turns.

    python benchmarks/tracking_cost.py [--rounds 5] [--seconds 30] [URI ...]

A trial trains three times (100 points of four losses each, sent live), then logs a row of 500 numbers and ten
artifacts of 100 kB; it has 150 settings.  The stores are an SQLite file of its own and the URIs given (a server over
PostgreSQL: docs/tracking.md says how to start one).  In each round the trial runs without MLflow and with each store,
in changing order, all in one process that has MLflow open, as a worker that takes one trial after another has; what
opening costs, once a worker, is told apart.  Shown for each store, medians over the rounds with the least and the most:

    calls     wall seconds that the trial spends in calls of diffex.tracking
    thread    CPU seconds of the thread that sends the curves meanwhile (they compete with a training for the core)
    share     calls + thread, of the wall seconds of the same trial; then CPU seconds of both of the trial's, which
              neighbours on the machine change less, but which leave out what is waited for
    CPU       CPU seconds of the whole process with MLflow over those without
    wall      wall seconds likewise; on a busy machine this says more about the neighbours
"""

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from diffex.curves import Curves
from diffex.tracking import Target, TrialRun, absolute_uri, open_sweep

STAGES, POINTS, LOSSES, NUMBERS, FILES, FILE_BYTES, SETTINGS = 3, 100, 4, 500, 10, 100_000, 150


@dataclass
class Cost:
    """Seconds of one trial."""

    wall: float = 0.0
    cpu: float = 0.0
    calls: float = 0.0
    calls_cpu: float = 0.0
    thread: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


class Training:
    """A small convolutional network and one batch; a step takes a few milliseconds."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x, self.weights = torch.randn(16, 3, 64, 64), [torch.randn(16, c, 3, 3) / 12 for c in (3, 16, 16)]
        for w in self.weights:
            w.requires_grad_()

    def step(self) -> float:
        h = self.x
        for w in self.weights:
            h = F.relu(F.conv2d(h, w, padding=1))
        loss = h.square().mean()
        gradients = torch.autograd.grad(loss, self.weights)
        with torch.no_grad():
            for w, g in zip(self.weights, gradients, strict=True):
                w -= 1e-3 * g
        return float(loss.detach())

    def steps_of(self, seconds: float) -> int:
        """How many steps take so long, one point of a curve's worth of them."""
        times = []
        for _ in range(30):
            began = time.thread_time()  # on a busy machine, too, a trial is as long as was asked
            self.step()
            times.append(time.thread_time() - began)
        return max(1, round(seconds / (STAGES * POINTS) / statistics.median(times)))


def count_thread_time() -> dict[str, float]:
    """Let the sending thread tell its CPU seconds, kept up to date in the dictionary that is returned."""
    told = {"seconds": 0.0}
    send = Curves.send

    def timed(self: Curves, *, trusting: bool = True) -> None:
        began = time.thread_time()
        try:
            send(self, trusting=trusting)
        finally:
            if threading.current_thread().name == "diffex-tracking":
                told["seconds"] += time.thread_time() - began

    Curves.send = timed  # type: ignore[method-assign]
    return told


def trial(target: Target | None, name: str, steps: int, files: list[Path], told: dict[str, float]) -> Cost:
    """One trial; ``steps`` of training to a point."""
    cost, training = Cost(), Training()

    @contextmanager
    def call(part: str) -> Iterator[None]:
        began, cpu = time.perf_counter(), time.thread_time()
        yield
        spent = time.perf_counter() - began
        cost.calls += spent
        cost.calls_cpu += time.thread_time() - cpu
        cost.parts[part] = cost.parts.get(part, 0.0) + spent

    wall, cpu, thread = time.perf_counter(), time.process_time(), told["seconds"]
    histories: dict[str, list[dict[str, float]]] = {}
    run = TrialRun(target, name, name, {f"setting{i}": i for i in range(SETTINGS)})
    with call("open"):
        run.__enter__()
    for stage in ("classifier", "autoencoder", "directions"):
        for point in range(1, POINTS + 1):
            for _ in range(steps):
                loss = training.step()
            values = {"images": 64 * point * steps, **{f"loss{k}": loss + k for k in range(LOSSES)}}
            histories.setdefault(stage, []).append(values)
            with call("points"):
                run.point(stage, values)
    with call("row, artifacts"):
        run.log({f"number{i}": i / 7 for i in range(NUMBERS)}, histories, files, {"paid": "all"}, note="- a note")
    with call("end"):
        run.__exit__(None, None, None)
    cost.wall, cost.cpu = time.perf_counter() - wall, time.process_time() - cpu
    cost.thread = told["seconds"] - thread
    return cost


def spread(values: list[float], form: str = ".3f") -> str:
    return f"{statistics.median(values):{form}} [{min(values):{form}}, {max(values):{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("uris", nargs="*", metavar="URI")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=30.0, help="of a trial's training")
    options = parser.parse_args()
    torch.set_num_threads(1)
    told = count_thread_time()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"picture{i}.png" for i in range(FILES)]
        for i, file in enumerate(files):
            file.write_bytes(np.random.default_rng(i).bytes(FILE_BYTES))
        stores: dict[str, Target | None] = {"without": None}
        for uri in (f"sqlite:///{folder}/mlflow.db", *options.uris):
            began = time.perf_counter()
            label = uri.split(":")[0]
            stores[label] = open_sweep(
                absolute_uri(uri), "tracking-cost", f"{time.time():.0f}", artifacts=Path(folder) / "artifacts",
                params={}, tags={},
            )  # fmt: skip
            print(f"{label}: opened in {time.perf_counter() - began:.1f} s, once a process", flush=True)
            trial(stores[label], "warm-up", 1, files, told)
        trial(None, "warm-up", 5, files, told)
        steps = Training().steps_of(options.seconds)
        costs: dict[str, list[Cost]] = {label: [] for label in stores}
        for i in range(options.rounds):
            order = list(stores)
            for label in [*order[i % len(order) :], *order[: i % len(order)]]:
                costs[label].append(trial(stores[label], f"trial{i}", steps, files, told))
            print(f"round {i + 1}: " + ", ".join(f"{k} {c[-1].wall:.1f} s" for k, c in costs.items()), flush=True)
        plain = costs.pop("without")
        print(f"trial without MLflow: {spread([c.wall for c in plain], '.1f')} s; load {os.getloadavg()[0]:.1f}")
        for label, mine in costs.items():
            cpu = [a.cpu / b.cpu for a, b in zip(mine, plain, strict=True)]
            wall = [a.wall / b.wall for a, b in zip(mine, plain, strict=True)]
            parts = {part: statistics.median(c.parts[part] for c in mine) for part in mine[0].parts}
            print(f"{label}:")
            print(f"  calls  {spread([c.calls for c in mine])} s    thread {spread([c.thread for c in mine])} s")
            print("  of it  " + ", ".join(f"{part} {seconds:.3f} s" for part, seconds in parts.items()))
            share = [100 * (c.calls + c.thread) / c.wall for c in mine]
            busy = [100 * (c.calls_cpu + c.thread) / c.cpu for c in mine]
            print(f"  share  {spread(share, '.2f')} %    of CPU seconds {spread(busy, '.2f')} %")
            print(f"  CPU    x {spread(cpu)}    wall x {spread(wall)}")


if __name__ == "__main__":
    main()
