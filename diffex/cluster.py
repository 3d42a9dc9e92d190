"""Ray's engine, started or joined, and how its CPUs and GPUs are shared out.

On a laptop a local Ray is started with as many workers as there are cores; inside a job, or with RAY_ADDRESS set, the
running cluster is joined.  What this process started it also ends, and nothing else.  Only this
file, ``trainer``, ``search`` and ``submit`` import ray.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayError

from diffex.config import Run
from diffex.errors import UserError


@dataclass(frozen=True)
class Resources:
    """What the cluster offers: (CPUs, GPUs) of each node that lives."""

    nodes: tuple[tuple[float, float], ...]

    @property
    def cpus(self) -> int:
        """CPUs of all nodes."""
        return max(1, int(sum(cpus for cpus, _ in self.nodes)))

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return int(sum(gpus for _, gpus in self.nodes))


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
        yield resources()
    finally:
        if started:
            ray.shutdown()


def resources() -> Resources:
    """What the cluster offers now."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Resources(tuple((float(r.get("CPU", 0)), float(r.get("GPU", 0))) for r in alive))


def use_threads(cpus: float) -> None:
    """Let torch use as many threads as Ray gave this worker CPUs."""
    import torch

    torch.set_num_threads(max(1, int(cpus)))


# ----------------------------------------------------------------------------------------------------------------------
# Sharing out

NIBBLE = 0.0001
"""Of a CPU, and of a GPU: what a trial holds while its workers do the work.  (A trial that held a whole CPU could keep
its own workers from ever starting.)  It still sees a GPU, for what it does itself.  Ray counts no smaller parts."""

SLACK = 0.05
"""Share of each CPU and GPU: what workers leave, so that the nibbles of all trials find room beside them."""


@dataclass(frozen=True)
class Share:
    """What one trial is given.

    Attributes:
        trial: resources that it holds, as Tune names them.
        worker: resources of each worker that it starts, as Ray Train names them; empty: it does all itself.
        threads: threads of each process that computes.
        at_a_time: trials that fit at a time.
    """

    trial: dict[str, float]
    worker: dict[str, float]
    threads: int
    at_a_time: int


def share_out(run: Run, offered: Resources, at_a_time: int | None = None) -> Share:
    """Share the cluster out to trials, such that the workers of every running trial find room.

    Args:
        run: section ``run``: workers of a trial, CPUs and GPUs of a worker.
        offered: what there is.
        at_a_time: trials at a time; None: as many as fit now.  A number is taken as it is: on a cluster that grows on
            demand only its owner knows how far.

    Raises:
        UserError: not even one trial fits.
    """
    gpus = run.gpus if run.gpus is not None else float(offered.gpus > 0)
    cpus = run.cpus or 1
    if run.cpus is None and gpus > 0:
        cpus = min((max(1, int(c * gpus / g)) for c, g in offered.nodes if g), default=1)
    places = sum(int(min(c // cpus, g // gpus if gpus else c // cpus)) for c, g in offered.nodes)
    if at_a_time is None:
        least = run.min_workers or run.workers
        if places < least:
            raise UserError(
                f"run.workers = {run.workers} of {cpus} CPUs and {gpus:g} GPUs each do not fit: the cluster has room "
                f"for {places} (CPUs {offered.cpus}, GPUs {offered.gpus}). Lower run.workers, run.cpus or run.gpus, "
                "add nodes, or, where nodes come on demand, say --concurrent N"
            )
        at_a_time = max(1, places // run.workers)
    if run.workers == 1:
        return Share({"cpu": cpus, "gpu": gpus}, {}, cpus, at_a_time)
    worker = {name: amount * (1 - SLACK) for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return Share({"cpu": NIBBLE, "gpu": NIBBLE if gpus else 0.0}, worker, cpus, at_a_time)


# ----------------------------------------------------------------------------------------------------------------------
# Meters: what goes on, on all nodes


class _Meters:
    """An actor beside the driver: name -> what goes on there."""

    def __init__(self) -> None:
        self.states: dict[str, dict[str, Any]] = {}
        self.mistakes: dict[str, str] = {}

    def mistake(self, name: str, complaint: str | None = None) -> str:
        if complaint is not None:
            self.mistakes[name] = complaint
        return self.mistakes.get(name, "")

    def tell(self, name: str, state: dict[str, Any] | None) -> None:
        if state is None:
            self.states.pop(name, None)
        else:
            self.states[name] = state

    def read(self) -> dict[str, dict[str, Any]]:
        return self.states


class Meters:
    """The driver's end: start it, hand out ``meter(name)``, and ``read`` what goes on."""

    def __init__(self) -> None:
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self.actor = ray.remote(num_cpus=0, max_restarts=3, scheduling_strategy=here)(_Meters).remote()

    def meter(self, name: str) -> Meter:
        """A meter for another process."""
        return Meter(self.actor, name)

    def read(self) -> Mapping[str, Mapping[str, Any]]:
        """What goes on now; nothing while the actor can't be asked."""
        try:
            found: Mapping[str, Mapping[str, Any]] = ray.get(self.actor.read.remote(), timeout=5)
        except RayError:
            return {}
        return dict(sorted(found.items()))


class Meter:
    """A ``progress(what, done, total)`` that travels to a worker and tells the driver, twice a second at most."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor, self.name, self.said, self.what = actor, name, 0.0, ""

    def named(self, name: str) -> Meter:
        """Another meter on the same board."""
        return Meter(self.actor, name)

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == self.what and done < total and time.monotonic() - self.said < 0.5:
            return
        self.said, self.what = time.monotonic(), what
        self.actor.tell.remote(self.name, {"what": what, "done": done, "total": total})

    def raise_known_mistake(self) -> None:
        """Raise the user's mistake that ended an earlier attempt: trying again would not help, as it does after a
        lost node."""
        complaint = ray.get(self.actor.mistake.remote(self.name))
        if complaint:
            raise UserError(complaint)

    def note_mistake(self, complaint: str) -> None:
        """Note a user's mistake, for the next attempt to find."""
        ray.get(self.actor.mistake.remote(self.name, complaint))

    def close(self) -> None:
        """Say that nothing goes on here any more."""
        self.actor.tell.remote(self.name, None)


@contextmanager
def relay(progress: Callable[[str, int, int], None]) -> Iterator[Meter]:
    """A meter for workers that tells a function of this process; a meter stays itself."""
    if isinstance(progress, Meter):
        yield progress
        return
    meters, ended, told = Meters(), threading.Event(), None
    meter = meters.meter("relayed")

    def tell() -> None:
        nonlocal told
        state = meters.read().get(meter.name)
        if state and state != told:
            told = state
            progress(state["what"], state["done"], state["total"])

    def watch() -> None:
        while not ended.wait(0.5):
            tell()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield meter
    finally:
        ended.set()
        watcher.join()
    tell()


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


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
