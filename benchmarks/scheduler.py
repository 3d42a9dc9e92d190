"""The scheduler of a sweep as a discrete-event simulation: shared stages, checkpoints, lost workers, overheads.

It follows the platform's rules (diffex/pipeline.py, diffex/store.py).  A trial holds a slot and goes through its stages
in order; a stage that is in the store is read; one that another trial computes is waited for, the slot held (single
flight); what all trials share is computed before they start.  A slot's node may be lost at any moment (exponential);
its trials go back to the head of the queue, another node comes after a delay, and a stage goes on from its last
checkpoint.  ``campaign.py`` makes tasks of experiments and of real sweeps.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import simpy

HOUR = 3600.0

Events = Generator[simpy.Event, Any, None]

# ----------------------------------------------------------------------------------------------------------------------
# What is simulated


@dataclass(frozen=True)
class Task:
    """A stage to be computed once.

    Attributes:
        digest: its name.
        seconds: of work on one slot.
        every: seconds of work between checkpoints; infinite: all is lost with the worker.
        write: seconds that a checkpoint takes.
        bytes: of its entry.
        stage: for tables.
    """

    digest: str
    seconds: float
    every: float = math.inf
    write: float = 0.0
    bytes: int = 0
    stage: str = ""


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """The machines.

    Attributes:
        nodes: what is lost, and comes back, as one: a GPU, or the GPUs that train one model together.
        slots: trials that a node runs at a time.
        loss: losses of a node an hour.
        delay: seconds until a lost node is replaced.
        trial: seconds that Ray and the tracking server take of each attempt at a trial.
        entry: seconds to begin and end an entry of the store, or to look one up.
        rate: bytes a second to and from the store.
    """

    nodes: int
    slots: int = 1
    loss: float = 0.0
    delay: float = 0.0
    trial: float = 0.0
    entry: float = 0.0
    rate: float = math.inf


@dataclass
class Report:
    """What a run took; all but ``makespan`` and ``paid`` are seconds of slots.

    Attributes:
        makespan: seconds from start to end.
        paid: seconds of nodes that were there.
        useful: work that counts.
        lost: work since a last checkpoint, and starts of trials, that a loss took.
        overhead: starts, checkpoints, entries.
        waited: slots held while another trial computed what they needed.
        losses: nodes lost, busy or not.
        bytes: in the store at the end.
        computed: digest -> seconds of work done on it, lost work included.
    """

    makespan: float = 0.0
    paid: float = 0.0
    useful: float = 0.0
    lost: float = 0.0
    overhead: float = 0.0
    waited: float = 0.0
    losses: int = 0
    bytes: int = 0
    computed: Counter[str] = field(default_factory=Counter)


# ----------------------------------------------------------------------------------------------------------------------
# The simulation


class Simulation:
    """One run of trials on a fleet.

    Args:
        tasks: digest -> task.
        trials: for each trial the digests that it needs, in order.
        prepared: the same for what is computed before all trials.
        fleet: the machines.
        seed: of the losses.
    """

    def __init__(
        self, tasks: Mapping[str, Task], trials: Sequence[Sequence[str]], fleet: Fleet,
        prepared: Sequence[Sequence[str]] = (), seed: int = 0,
    ) -> None:  # fmt: skip
        self.tasks, self.fleet, self.report = tasks, fleet, Report()
        self.env, self.rng = simpy.Environment(), np.random.default_rng(seed)
        self.queue = simpy.PriorityStore(self.env)
        self.saved: Counter[str] = Counter()  # seconds of work that a checkpoint holds
        self.running: dict[str, simpy.Event] = {}
        self.done: set[str] = set()
        self.ended, self.wanted = self.env.event(), 0
        self.phases = [list(map(list, prepared)), list(map(list, trials))]
        self.lists: list[list[str]] = []

    def run(self) -> Report:
        """Simulate until all trials have ended."""
        fleet, env = self.fleet, self.env
        for _ in range(fleet.nodes):
            env.process(self._node())
        env.process(self._feed())
        env.run(until=self.ended)
        self.report.makespan = env.now
        self.report.paid += fleet.nodes * env.now
        self.report.bytes = sum(self.tasks[d].bytes for d in self.done)
        return self.report

    def _feed(self) -> Events:
        """First what is shared; the trials when all of that is there."""
        for phase in self.phases:
            self.finished, self.wanted = self.env.event(), len(phase)
            for trial in phase:
                self.lists.append(trial)
                yield self.queue.put(simpy.PriorityItem((1, len(self.lists)), len(self.lists) - 1))
            if phase:
                yield self.finished
        self.ended.succeed()

    def _node(self) -> Events:
        """A node and its slots, lost and replaced again and again."""
        while True:
            slots = [self.env.process(self._slot()) for _ in range(self.fleet.slots)]
            if self.fleet.loss <= 0:
                return
            yield self.env.timeout(float(self.rng.exponential(HOUR / self.fleet.loss)))
            self.report.losses += 1
            for slot in slots:
                slot.interrupt()
            self.report.paid -= self.fleet.delay
            yield self.env.timeout(self.fleet.delay)

    def _slot(self) -> Events:
        while True:
            request = self.queue.get()
            try:
                item = yield request
            except simpy.Interrupt:
                if request.triggered:  # at this very moment
                    self.queue.put(request.value)
                else:
                    request.cancel()
                return
            try:
                yield from self._trial(self.lists[item.item])
            except simpy.Interrupt:
                self.queue.put(simpy.PriorityItem((0, item.item), item.item))
                return
            self.wanted -= 1
            if self.wanted == 0:
                self.finished.succeed()

    def _trial(self, digests: Sequence[str]) -> Events:
        yield from self._spend(self.fleet.trial)
        for digest in digests:
            task, waited = self.tasks[digest], False
            while digest not in self.done:
                if digest in self.running:
                    waited, began = True, self.env.now
                    try:
                        yield self.running[digest]
                    finally:
                        self.report.waited += self.env.now - began
                else:
                    yield from self._compute(task)
                    break
            else:
                yield from self._spend(self.fleet.entry + (0.0 if waited else task.bytes / self.fleet.rate))

    def _spend(self, seconds: float) -> Events:
        began = self.env.now
        try:
            yield self.env.timeout(seconds)
        except simpy.Interrupt:
            self.report.lost += self.env.now - began
            raise
        self.report.overhead += seconds

    def _compute(self, task: Task) -> Events:
        event = self.running[task.digest] = self.env.event()
        left = task.seconds - self.saved[task.digest]
        between = max(0, math.ceil(left / task.every - 1e-9) - 1)  # checkpoints before the end, which is the entry
        ending = self.fleet.entry + task.bytes / self.fleet.rate
        began = self.env.now
        try:
            yield self.env.timeout(left + between * task.write + ending)
        except simpy.Interrupt:
            elapsed = self.env.now - began
            kept = min(between, int(elapsed / (task.every + task.write))) if between else 0
            self._count(task, kept * task.every if kept else 0.0, kept * task.write)
            lost = elapsed - (kept * (task.every + task.write) if kept else 0.0)
            self.report.lost += lost
            self.report.computed[task.digest] += lost
            raise
        else:
            self._count(task, left, between * task.write + ending)
            self.done.add(task.digest)
        finally:
            del self.running[task.digest]
            event.succeed()

    def _count(self, task: Task, work: float, overhead: float) -> None:
        self.saved[task.digest] += work
        self.report.useful += work
        self.report.computed[task.digest] += work
        self.report.overhead += overhead


def expected_waste(seconds: float, every: float, write: float, loss: float) -> float:
    """Expected seconds lost to losses in a task on one slot, exactly: of n segments of L = every + write seconds,

        each is repeated until one of them lasts:  E[time] = (e^(loss L) - 1) / loss,   waste = E[time] - L

    Source: Daly, "A higher order estimate of the optimum checkpoint interval", FGCS 2006, eq. 2 without restart.

    Args:
        seconds: of work.
        every, write: seconds of work between checkpoints, and to write one.
        loss: losses a second.
    """
    between = max(0, math.ceil(seconds / every - 1e-9) - 1)
    segments = [every + write] * between + [seconds - between * every if between else seconds]
    return sum(math.expm1(loss * s) / loss - s for s in segments)


# ----------------------------------------------------------------------------------------------------------------------
# Several runs


@dataclass(frozen=True)
class Summary:
    """Several runs of the same campaign: means over the runs, and the standard error of the makespan's mean."""

    hours: float
    error: float
    gpu_hours: float
    lost: float
    overhead: float
    waited: float
    efficiency: float
    losses: float


def summary(
    tasks: Mapping[str, Task], trials: Sequence[Sequence[str]], fleet: Fleet, prepared: Sequence[Sequence[str]] = (), *,
    runs: int = 20, gpus_per_node: float = 1.0,
) -> Summary:  # fmt: skip
    """Simulate often; efficiency is the makespan without losses and overheads over the mean one."""
    bare = Fleet(nodes=fleet.nodes, slots=fleet.slots)
    free = {d: replace(task, write=0.0) for d, task in tasks.items()}
    ideal = Simulation(free, trials, bare, prepared).run()
    runs = runs if fleet.loss > 0 else 1
    reports = [Simulation(tasks, trials, fleet, prepared, seed).run() for seed in range(runs)]

    def mean(values: Iterable[float]) -> float:
        return statistics.fmean(values)

    makespans = [r.makespan for r in reports]
    spent = [max(r.useful + r.lost + r.overhead, 1e-9) for r in reports]
    return Summary(
        hours=mean(makespans) / HOUR, error=(statistics.stdev(makespans) / math.sqrt(runs) / HOUR if runs > 1 else 0.0),
        gpu_hours=mean(r.paid for r in reports) / HOUR * gpus_per_node,
        lost=mean(r.lost / s for r, s in zip(reports, spent, strict=True)),
        overhead=mean(r.overhead / s for r, s in zip(reports, spent, strict=True)),
        waited=mean(r.waited / (r.makespan * fleet.nodes * fleet.slots) for r in reports),
        efficiency=ideal.makespan / mean(makespans), losses=mean(float(r.losses) for r in reports),
    )  # fmt: skip
