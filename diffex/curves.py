"""Training curves on their way to MLflow, while the training goes on."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from diffex.connection import BATCH, one_line, safe_name, warn

if TYPE_CHECKING:
    from mlflow import MlflowClient

EVERY = 10.0  # seconds between two sendings of a trial's curves
LONGEST_WAIT = 300.0  # seconds between two tries while MLflow does not answer

Point = tuple[str, float, int, int]  # key, value, time stamp (ms), step: the arguments of mlflow's Metric
Histories = Mapping[str, Iterable[Mapping[str, float]]]  # training -> its curve, points with 'images' and losses


class Curves:
    """Points of training curves on their way to a run: buffered, sent by a thread, no step of a curve sent twice.

    Args:
        connect: returns the client, the run's id, and whether the run is new, and so holds no curves yet; may raise.
        every: seconds between two sendings.
    """

    def __init__(self, connect: Callable[[], tuple[MlflowClient, str, bool]], every: float) -> None:
        self._connect, self._every = connect, every
        self._buffer: list[Point] = []
        self._stored: dict[str, set[int]] = {}  # steps of each key that MLflow is known to hold
        self._asked: set[str] = set()
        self._lock, self._sending = threading.Lock(), threading.Lock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._failing = False

    def add(self, points: Iterable[Point]) -> None:
        """Buffer points; they are sent within ``every`` seconds, or as soon as there is a full batch."""
        with self._lock:
            self._buffer += [p for p in points if math.isfinite(p[1])]  # of a loss that is not, the training complains
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="diffex-tracking", daemon=True)
                self._thread.start()
            if len(self._buffer) >= BATCH and not self._failing:
                self._wake.set()

    def waiting(self) -> list[Point]:
        """Points that are not sent yet."""
        with self._lock:
            return list(self._buffer)

    def send(self, *, trusting: bool = True) -> None:
        """Send all that waits, each step of a curve once: of a run with a past, MLflow is asked which it holds.

        Args:
            trusting: False asks for every curve, for it may have grown by another process.
        """
        from mlflow.entities import Metric

        with self._sending:
            while batch := self.waiting()[:BATCH]:
                client, run_id, new = self._connect()
                keys = {point[0] for point in batch}
                self._ask(client, run_id, keys if not trusting else set() if new else keys - self._asked)
                unsent = {(p[0], p[3]): p for p in reversed(batch) if p[3] not in self._stored.get(p[0], ())}
                if unsent:
                    client.log_batch(run_id, metrics=[Metric(*p) for p in reversed(unsent.values())])
                for key, _, _, step in batch:
                    self._stored.setdefault(key, set()).add(step)
                with self._lock:
                    del self._buffer[: len(batch)]

    def fill(self, histories: Histories, stamp: int) -> None:
        """Send those points of whole histories that the run lacks."""
        points = (
            p for stage, history in histories.items() for point in history for p in points_of(stage, point, stamp)
        )
        lacking = [p for p in points if p[3] not in self._stored.get(p[0], ())]
        with self._lock:
            self._buffer += [p for p in lacking if math.isfinite(p[1])]
        self.send(trusting=False)

    def close(self) -> None:
        """End the thread; what waits goes on waiting for ``send``."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _ask(self, client: MlflowClient, run_id: str, keys: set[str]) -> None:
        if not keys:
            return
        present = client.get_run(run_id).data.metrics
        for key in keys:
            held = {m.step for m in client.get_metric_history(run_id, key)} if key in present else set()
            self._stored.setdefault(key, set()).update(held)
            self._asked.add(key)

    def _run(self) -> None:
        wait = self._every
        while True:
            self._wake.wait(wait)
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                self.send()
                wait, self._failing = self._every, False
            except Exception as error:  # never the training's concern
                if not self._failing:  # once an outage
                    warn(f"MLflow does not take the training curves, they are kept and sent later: {one_line(error)}")
                wait, self._failing = min(2 * wait, LONGEST_WAIT), True


def points_of(stage: str, values: Mapping[str, float], stamp: int) -> list[Point]:
    """A stretch of a training as points: ``train.<stage>.<loss>`` at the step ``images``."""
    step = int(values["images"])
    return [(safe_name(f"train.{stage}.{k}"), float(v), stamp, step) for k, v in values.items() if k != "images"]
