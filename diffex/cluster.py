"""Ray's engine, started or joined: the only file, with ``search``, that imports ray.

On a laptop a local Ray is started with as many workers as there are cores; inside a job, or with RAY_ADDRESS set, the
running cluster is joined.  What this process started it also ends, and nothing else.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ray

from diffex.config import Experiment, from_dict
from diffex.errors import UserError
from diffex.pipeline import ensure, stage_digests
from diffex.progress import FileMeter
from diffex.settings import to_dict
from diffex.store import Store


@dataclass(frozen=True)
class Resources:
    """What the cluster offers: CPUs and GPUs in all."""

    cpus: int
    gpus: int


@contextmanager
def connected(num_cpus: int | None = None) -> Iterator[Resources]:
    """Join the cluster that RAY_ADDRESS names, or start a local Ray for the time of the context.

    Args:
        num_cpus: workers of a local Ray (default: the cores that this process may use).
    """
    started = False
    if not ray.is_initialized():
        options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if not os.environ.get("RAY_ADDRESS"):
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            options |= {"address": "local", "num_cpus": num_cpus or cores, "include_dashboard": False}
        ray.init(**options)
        started = True
    try:
        total = ray.cluster_resources()
        yield Resources(max(1, int(total.get("CPU", 1))), int(total.get("GPU", 0)))
    finally:
        if started:
            ray.shutdown()


def use_threads(cpus: float) -> None:
    """Let torch use as many threads as Ray gave this worker CPUs."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))


def run_tasks(task: Callable[[Any, Any], Any], job: Any, items: Sequence[Any], *, workers: int) -> Iterator[Any]:
    """Run ``task(job, item)`` for every item as Ray tasks of one CPU each, and yield the results as they come.

    Args:
        task: a function of a module that every node has; safe to repeat, for a lost worker's task runs again.
        job: what all tasks share; it travels to a node once.
        items: one task each.
        workers: tasks that run at a time.
    """
    shared = ray.put(job)
    remote = ray.remote(num_cpus=1, max_retries=3)(_call)
    queue = iter(items)
    waiting: list[Any] = []
    try:
        while True:
            waiting += [remote.remote(task, shared, item) for item in islice(queue, workers - len(waiting))]
            if not waiting:
                return
            ready, waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(ready[0])
    finally:
        for left in waiting:
            ray.cancel(left, force=False)


def _call(task: Callable[[Any, Any], Any], job: Any, item: Any) -> Any:
    use_threads(1)
    return task(job, item)


def compute_all(
    jobs: Sequence[tuple[Experiment, str]], store: Path, *, resources: Resources, gpus: float, meters: Path,
    done: Callable[[str], None] = lambda name: None,
) -> None:  # fmt: skip
    """Compute stages of several experiments at once, one Ray task each, sharing out the CPUs.

    Args:
        jobs: (experiment, last stage) pairs; doubles by digest are computed once.
        store: root of the store, visible to every node.
        resources: of the cluster.
        gpus: GPUs of a task.
        meters: folder for progress files.
        done: told the name of each task that ends.

    Raises:
        UserError: the first task's complaint.
    """
    unique = {stage_digests(e, last)[last]: (e, last) for e, last in jobs}
    missing = [(e, last) for address, (e, last) in unique.items() if not Store(store).has(last, address)]
    if not missing:
        return
    cpus = max(1, resources.cpus // len(missing))
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=2)(_compute)
    waiting = {
        task.remote(to_dict(e), last, str(store), cpus, str(meters), f"shared-{i + 1}"): last
        for i, (e, last) in enumerate(missing)
    }
    while waiting:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        complaint = ray.get(ready[0])
        if complaint:
            for other in waiting:
                ray.cancel(other, force=False)
            raise UserError(complaint)
        done(waiting.pop(ready[0]))


def _compute(settings: dict[str, Any], last: str, store: str, cpus: int, meters: str, name: str) -> str | None:
    """Body of a task; returns the complaint of a user's mistake, so that it travels as words, not as a stack trace."""
    use_threads(cpus)
    meter = FileMeter(Path(meters), name)
    try:
        ensure(Store(store), from_dict(settings), last, progress=meter)
    except UserError as error:
        return str(error)
    finally:
        meter.close()
    return None
