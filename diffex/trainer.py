"""The crew of many: a stage's training on Ray Train's workers, its renderings on Ray actors.

One worker needs none of this: the stage runs in the trial itself.  More are nested in the trial, which then holds next
to nothing (see ``cluster.NIBBLE``), so its workers always find room.  A worker's node may be another than the trial's:
orders name stages by digest, and inputs, checkpoints and shards go through the store.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import ray
from ray import train as ray_train
from ray.exceptions import RayActorError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from diffex import train
from diffex.cluster import Meter, Meters, Resources, Share, connected, relay, share_out, use_threads
from diffex.config import Experiment, Run, from_dict
from diffex.data import Progress
from diffex.errors import UserError
from diffex.pipeline import ensure, stage_digests
from diffex.settings import to_dict
from diffex.store import Store
from diffex.team import ALONE, Team
from diffex.work import Alone, Crew, Fitted, Order, Work, fit_here

T = TypeVar("T", bound=train.Task)

STARTS = 30
"""Times that Ray Train waits (60 s each) for nodes to come up before it gives up; by itself it would wait for ever."""


def crew_of(run: Run, share: Share, progress: Progress) -> Crew:
    """Who does the heavy parts of a trial's stages, with the share that the trial was given."""
    return OnRay(run, share, progress) if share.worker else Alone()


@contextmanager
def local_crew(run: Run, progress: Progress) -> Iterator[Crew]:
    """The crew of a command that is no trial: Ray is joined, or started, only where there are several workers."""
    if run.workers == 1:
        yield Alone()
        return
    with connected() as offered:
        yield OnRay(run, share_out(run, offered), progress)


@dataclass
class OnRay:
    """See ``diffex.work.Crew``."""

    run: Run
    share: Share
    progress: Progress

    def fit(self, w: Work, make: Callable[[Work, Team], T], until: int | None, base: str | None) -> Fitted[T]:
        """Train on ``run.workers`` workers; lost ones are replaced, and the last checkpoint is where it goes on."""
        assert w.order is not None
        workers = (self.run.min_workers, self.run.workers) if self.run.min_workers else self.run.workers
        with tempfile.TemporaryDirectory(prefix="diffex-train-") as folder, relay(self.progress) as meter:
            job = {
                "order": w.order, "make": make, "until": until, "base": base, "threads": self.share.threads,
                "meter": meter,
            }  # fmt: skip
            trainer = TorchTrainer(
                _train, train_loop_config={"job": job}, torch_config=TorchConfig(backend=None, timeout_s=300),
                scaling_config=ray_train.ScalingConfig(
                    num_workers=workers, resources_per_worker=self.share.worker, use_gpu="GPU" in self.share.worker
                ),
                run_config=ray_train.RunConfig(
                    name=w.order.stage, storage_path=folder,
                    failure_config=ray_train.FailureConfig(
                        max_failures=self.run.failures, controller_failure_limit=STARTS
                    ),
                ),
            )  # fmt: skip
            result = trainer.fit()
        complaint = (result.metrics or {}).get("complaint")
        if complaint:
            raise train.TrainingError(complaint)
        Store(w.order.store).partial(w.order.stage, w.order.digest)  # bring rank 0's checkpoint here
        task = make(w, ALONE)
        return task, train.load_checkpoint(task, w.out / train.CHECKPOINT)[1]

    def map(
        self, w: Work, prepare: Callable[[Work], Any], function: Callable[[Any, Any], Any], items: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        """Actors that prepare once and then take item after item; what a lost one had in hand goes to its successor."""
        if not items:
            return
        actor = ray.remote(
            num_cpus=self.share.worker["CPU"], num_gpus=self.share.worker.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(None),  # not in the nibble that the trial itself holds
        )(_Hand)  # fmt: skip
        queue, losses = list(reversed(list(enumerate(items)))), 0
        hands: list[Any] = []
        waiting: dict[Any, tuple[int, Any]] = {}

        def give(hand: Any, number: int) -> None:
            for _ in range(min(number, len(queue))):
                at, item = queue.pop()
                waiting[hand.do.remote(function, item)] = (at, hand)

        def hire() -> None:
            hands.append(actor.remote(w.order, prepare, self.share.threads))
            give(hands[-1], 2)  # two items each, so that a hand never waits for its next one

        try:
            for _ in range(min(self.run.workers, len(items))):
                hire()
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1)
                at, hand = waiting.pop(ready[0])
                try:
                    result = ray.get(ready[0])
                except RayActorError:  # its node is gone, or can't be reached: rendering again harms nobody
                    losses += 1
                    if losses > self.run.failures:
                        raise
                    dropped = [at, *(n for n, h in waiting.values() if h is hand)]
                    waiting = {ref: (n, h) for ref, (n, h) in waiting.items() if h is not hand}
                    queue += [(n, items[n]) for n in sorted(dropped, reverse=True)]
                    hands.remove(hand)
                    ray.kill(hand)
                    hire()
                    continue
                give(hand, 1)
                yield at, result
        finally:
            for hand in hands:
                ray.kill(hand)


class _Hand:
    """An actor that has prepared for one stage."""

    def __init__(self, order: Order, prepare: Callable[[Work], Any], threads: int) -> None:
        use_threads(threads)
        self.prepared = prepare(Work.of(order))

    def do(self, function: Callable[[Any, Any], Any], item: Any) -> Any:
        return function(self.prepared, item)


def _train(config: dict[str, Any]) -> None:
    """What every worker runs; rank 0 alone writes."""
    job = config["job"]
    use_threads(job["threads"])
    team = Team.current()
    order: Order = job["order"]
    w = Work.of(order, **({"progress": job["meter"]} if team.rank == 0 else {}))
    complaint = ""
    try:
        fit_here(w, job["make"](w, team), team, job["until"], job["base"])
        if team.rank == 0:
            w.saved()
    except UserError as error:  # alike on all ranks: trying again would not help
        complaint = str(error)
    ray_train.report({"complaint": complaint})


# ----------------------------------------------------------------------------------------------------------------------
# Stages of several experiments at once


def open_store(address: str) -> Store:
    """The store, in a worker.

    Raises:
        UserError: a folder that this node does not see (and that ``Store`` would make anew, for this node alone).
    """
    store = Store.existing(address)
    if store is None:
        raise UserError(
            f"node {ray.util.get_node_ip_address()} does not see the store {address!r}: give --store a folder that all "
            "nodes share, or a URI such as s3://bucket/diffex"
        )
    return store


def missing_of(jobs: Sequence[tuple[Experiment, str]], store: Store) -> list[tuple[Experiment, str]]:
    """Of (experiment, last stage) pairs those that the store lacks, one for each digest."""
    unique = {stage_digests(e, last)[last]: (e, last) for e, last in jobs}
    return [(e, last) for address, (e, last) in unique.items() if not store.has(last, address)]


def compute_all(
    missing: Sequence[tuple[Experiment, str]], store: Store, *, offered: Resources, meters: Meters,
    at_a_time: int | None = None, done: Callable[[str], None] = lambda name: None,
) -> None:  # fmt: skip
    """Compute stages of several experiments at once, one Ray task each, sharing out the cluster.

    Args:
        missing: (experiment, last stage) pairs, one at least; see ``missing_of``.
        store: visible to every node.
        offered: what the cluster offers.
        meters: who is told of the progress.
        at_a_time: see ``share_out``.
        done: told the name of each task that ends.

    Raises:
        UserError: the first task's complaint.
    """
    run = missing[0][0].run
    share = share_out(run, offered, at_a_time)
    if not share.worker and not share.trial["gpu"] and run.cpus is None:  # fewer tasks than CPUs: more threads each
        cpus = max(1, min(offered.cpus // len(missing), int(max(c for c, _ in offered.nodes))))
        share = Share({"cpu": cpus, "gpu": 0.0}, {}, cpus, share.at_a_time)
    task = ray.remote(num_cpus=share.trial["cpu"], num_gpus=share.trial["gpu"], max_retries=run.failures)(_compute)
    queue = iter(enumerate(missing, 1))
    waiting: dict[Any, str] = {}
    while True:
        for number, (e, last) in islice(queue, share.at_a_time - len(waiting)):
            meter = meters.meter(f"shared-{number}")
            waiting[task.remote(to_dict(e), last, store.address, share, meter)] = last
        if not waiting:
            return
        ready, _ = ray.wait(list(waiting), num_returns=1)
        complaint = ray.get(ready[0])
        if complaint:
            for other in waiting:
                ray.cancel(other, force=False)
            raise UserError(complaint)
        done(waiting.pop(ready[0]))


def _compute(settings: dict[str, Any], last: str, store: str, share: Share, meter: Meter) -> str | None:
    """Body of a task; returns the complaint of a user's mistake, so that it travels as words, not as a stack trace."""
    use_threads(share.threads)
    try:
        e = from_dict(settings)
        ensure(open_store(store), e, last, progress=meter, crew=crew_of(e.run, share, meter))
    except UserError as error:
        return str(error)
    finally:
        meter.close()
    return None
