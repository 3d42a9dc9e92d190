"""MLflow: one run per sweep, one nested run per trial.

The driver opens (and so creates and migrates) the database once, before any worker writes.  After that MLflow may be
slow or absent for hours without holding up or failing a trial: curves wait in memory, and what is not taken at a
trial's end is handed back, to be kept for ``deliver``.

MLflow tells metrics apart by (run, key, step, time stamp, value): the same sent again, time stamp included, is stored
once.  Every retry here rests on that.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffex.connection import (
    BATCH,
    SMALL_BATCH,
    absolute_uri,
    compare_url,
    creating,
    how_to_look,
    is_number,
    is_refusal,
    log_params,
    one_line,
    open_client,
    parts,
    patiently,
    safe_name,
    sqlite_file,
    warn,
    without_password,
)
from diffex.curves import EVERY, Curves, Histories, points_of
from diffex.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "Target", "TrialRun", "absolute_uri", "close_sweep", "compare_url", "deliver", "end_orphans", "how_to_look",
    "keep", "open_sweep", "trial_runs",
]  # fmt: skip

PATIENCE = 120.0  # seconds that the end of a trial or sweep waits for MLflow


@dataclass(frozen=True)
class Target:
    """Where a sweep's trials log to; small and picklable, so that it travels to workers.

    Attributes:
        uri: tracking URI.
        experiment_id, parent: the MLflow experiment, and the run that trials are nested under.
        host: the machine of the driver, the only one that may write to an SQLite file.
    """

    uri: str
    experiment_id: str
    parent: str
    host: str = ""

    @property
    def client(self) -> MlflowClient:
        return open_client(self.uri)

    def check(self) -> None:
        """Raise UserError where this machine can't reach the store: SQLite, on another machine than the driver's."""
        file = sqlite_file(self.uri)
        here = platform.node()
        # A file that a shared folder shows here is no better: SQLite's locks don't hold between machines.
        if file is not None and (self.host not in ("", here) or not file.is_file()):
            raise UserError(
                f"MLflow's SQLite file {str(file)!r} lives on one machine, and this trial runs on {here!r}: start "
                "`mlflow server` there and give --tracking-uri http://HOST:5000 (docs/tracking.md)"
            )


# ----------------------------------------------------------------------------------------------------------------------
# A sweep


def open_sweep(
    uri: str,
    name: str,
    digest: str,
    *,
    artifacts: Path | None = None,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    kind: str = "sweep",
) -> Target:
    """Create, or on a resume find again, the parent run of a sweep.

    Args:
        uri: tracking URI, as ``absolute_uri`` returns it.
        name: MLflow experiment.
        digest: of the sweep; a parent run with this tag is continued.
        artifacts: folder for artifacts of a new experiment in a database; a server keeps its own.
        params, tags: of the parent run.
        kind: tag ``diffex.kind`` of the parent run: what it is, as 'sweep' or 'ablation'.

    Raises:
        UserError: the store can't be opened, or the server does not answer.
    """
    try:
        with creating(uri):
            client = open_client(uri)
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                location = None if uri.startswith("http") or artifacts is None else artifacts.absolute().as_uri()
                experiment_id = client.create_experiment(name, artifact_location=location)
            elif experiment.lifecycle_stage == "deleted":
                raise UserError(f"MLflow experiment {name!r} is deleted: restore it, or use another --tracking-uri")
            else:
                experiment_id = experiment.experiment_id
        known = client.search_runs(
            [experiment_id], f"tags.`diffex.digest` = '{digest}' and tags.`diffex.kind` = '{kind}'", max_results=1
        )
        if known:
            parent = known[0].info.run_id
            client.update_run(parent, status="RUNNING")
        else:
            parent = client.create_run(
                experiment_id, run_name=f"{name}-{digest[:8]}",
                tags={"diffex.digest": digest, "diffex.kind": kind, "mlflow.source.name": sys.argv[0], **tags},
            ).info.run_id  # fmt: skip
            log_params(client, parent, params)
    except UserError:
        raise
    except Exception as error:  # mlflow, SQLAlchemy and requests raise their own kinds
        raise UserError(f"can't open the MLflow store {without_password(uri)!r}: {one_line(error)}") from None
    return Target(uri, experiment_id, parent, platform.node())


def trial_runs(target: Target, status: str = "FINISHED") -> list[str]:
    """Ids of the runs of a sweep's trials that have this status, oldest first."""
    where = f"tags.`mlflow.parentRunId` = '{target.parent}' and attributes.status = '{status}'"
    found: list[str] = []
    token = None
    while True:
        page = target.client.search_runs(
            [target.experiment_id], where, order_by=["attributes.start_time ASC"], page_token=token
        )
        found += [run.info.run_id for run in page]
        token = page.token
        if not token:
            return found


def end_orphans(target: Target) -> None:
    """End trials' runs that are still open although no trial is: those that a scheduler stopped.

    Call ``deliver`` first: a finished trial that could not be logged has an open run too.  Where MLflow does not
    answer, they stay open (a warning says so); the sweep's next call ends them.
    """
    try:
        for run_id in trial_runs(target, "RUNNING"):
            target.client.set_terminated(run_id, "KILLED")
    except Exception as error:
        warn(f"MLflow does not answer, runs of stopped trials stay open: {one_line(error)}")


def close_sweep(
    target: Target, *, metrics: Mapping[str, Any], folder: Path, files: Iterable[Path], status: str
) -> str:  # fmt: skip
    """Write the sweep's summary, artifacts and the address that compares its trials to the parent run, and end it.

    Returns:
        The address where MLflow compares the finished trials (also tag ``diffex.compare``); '' for fewer than two.

    Raises:
        UserError: MLflow does not answer for two minutes.
    """
    from mlflow.entities import Metric, RunTag

    client, now = target.client, int(time.time() * 1000)
    numbers = [Metric(safe_name(k), float(v), now, 0) for k, v in metrics.items() if is_number(v)]
    base = target.uri if target.uri.startswith("http") else "http://127.0.0.1:5000"  # where `mlflow ui` serves

    def write() -> str:
        runs = trial_runs(target)
        url = compare_url(base, target.experiment_id, runs) if len(runs) > 1 else ""
        client.log_batch(target.parent, metrics=numbers, tags=[RunTag("diffex.compare", url)] if url else [])
        for file in files:
            inside = str(file.parent.relative_to(folder))
            client.log_artifact(target.parent, str(file), None if inside == "." else inside)
        client.set_terminated(target.parent, status)
        return url

    files = list(files)
    try:
        return patiently(write, PATIENCE)
    except Exception as error:
        raise UserError(
            f"the results are in {str(folder)!r}, but MLflow at {without_password(target.uri)} does not take the "
            f"sweep's summary ({one_line(error)}): run the same command again to log it"
        ) from None


# ----------------------------------------------------------------------------------------------------------------------
# A trial


class TrialRun:
    """The nested run of one trial, in a worker: a context that always ends the run.

    Once it is open, MLflow may fail for hours without failing the trial; only the row at the end must be taken, within
    ``patience`` seconds, or it is handed to ``leave``, to be kept for ``deliver``.  A pickled copy, in a worker of a
    training, can send points too: call its ``flush`` when the training ends.

    Args:
        target: where to log; None logs nowhere.
        name: of the run.
        digest: of the trial; on a resume the unfinished run with this tag is continued.
        params: settings of the trial.
        leave: is given what MLflow does not take at the end, as JSON's types; None raises instead.  In one folder for
            all trials: ``functools.partial(keep, folder)``.
        every: seconds between two sendings of training curves.
        patience: seconds that the end of the trial waits for MLflow.
    """

    def __init__(
        self, target: Target | None, name: str, digest: str, params: Mapping[str, Any], *,
        leave: Callable[[dict[str, Any]], None] | None = None, every: float = EVERY, patience: float = PATIENCE,
    ) -> None:  # fmt: skip
        self.target, self.name, self.digest, self.params = target, name, digest, params
        self.leave, self.every, self.patience = leave, every, patience
        self.run_id: str | None = None
        self._new = self._left = False
        self._record: dict[str, Any] | None = None
        self._opening = threading.Lock()
        self._curves = Curves(self._connect, every)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("leave", "_new", "_record", "_opening", "_curves")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, leave=None, _new=False, _record=None, _opening=threading.Lock())
        self._curves = Curves(self._connect, self.every)

    def __enter__(self) -> TrialRun:
        """Open the run.

        Raises:
            UserError: the store is out of reach from this machine, or refuses the run.
        """
        if self.target is None:
            return self
        self.target.check()
        try:
            self._connect()
        except Exception as error:
            if is_refusal(error):
                raise UserError(
                    f"MLflow at {without_password(self.target.uri)} refuses the trial: {one_line(error)}"
                ) from None
            warn(f"MLflow does not answer, the trial goes on and logs later: {one_line(error)}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.target is None:
            return
        self._curves.close()
        if error is None:
            if not self._left:
                self._finally(lambda: self._end("FINISHED"))
            return
        try:  # once: the trial's own error must be heard, and soon
            self._end("FAILED" if isinstance(error, Exception) else "KILLED")
        except Exception as failure:
            warn(f"MLflow does not take the end of {self.name}: {one_line(failure)}")

    def point(self, stage: str, values: Mapping[str, float]) -> None:
        """Log a point of a training curve; returns at once.

        Args:
            stage: name of the training.
            values: 'images' (seen so far, the step) and mean losses; those that are not finite are left out.
        """
        if self.target is not None:
            self._curves.add(points_of(stage, values, int(time.time() * 1000)))

    def flush(self) -> None:
        """Send the points that wait, now; where MLflow does not answer they go on waiting."""
        if self.target is not None:
            with contextlib.suppress(Exception):
                self._curves.send()

    def log(
        self, row: Mapping[str, Any], histories: Histories, files: Iterable[Path], tags: Mapping[str, str],
        note: str = "",
    ) -> None:  # fmt: skip
        """Write the scoreboard's numbers, artifacts, tags, a note, and what the training curves still lack.

        Args:
            row: numbers become metrics (those not finite are left out), strings tags.
            histories: stage -> whole training curve (step = images seen); points that were logged before, in this
                attempt or another, are not logged again.
            files: artifacts.
            tags, note: of the run.

        Raises:
            UserError: MLflow does not take them and there is no ``leave``.
        """
        if self.target is None:
            return
        self._record = {
            "name": self.name, "digest": self.digest, "params": dict(self.params), "row": dict(row),
            "histories": {stage: [dict(p) for p in history] for stage, history in histories.items()},
            "files": [str(Path(file).absolute()) for file in files], "tags": dict(tags), "note": note,
            "stamp": int(time.time() * 1000), "points": [],
        }  # fmt: skip
        self._finally(self._write)

    # ------------------------------------------------------------------------------------------------------------------

    def _connect(self) -> tuple[MlflowClient, str, bool]:
        """The client and the run, found or made at the first call."""
        assert self.target is not None
        with self._opening:
            client = self.target.client
            if self.run_id is None:
                where = f"tags.`mlflow.parentRunId` = '{self.target.parent}' and tags.`diffex.digest` = '{self.digest}'"
                known = client.search_runs(
                    [self.target.experiment_id], where, max_results=1, order_by=["attributes.start_time ASC"]
                )
                if known:
                    run_id, held = known[0].info.run_id, known[0].data.params
                    client.update_run(run_id, status="RUNNING")
                else:
                    tags = {"mlflow.parentRunId": self.target.parent, "diffex.digest": self.digest,
                            "diffex.kind": "trial"}  # fmt: skip
                    run_id = client.create_run(self.target.experiment_id, run_name=self.name, tags=tags).info.run_id
                    held = {}
                log_params(client, run_id, {k: v for k, v in self.params.items() if safe_name(k) not in held})
                self.run_id, self._new = run_id, not known
            return client, self.run_id, self._new

    def _write(self) -> None:
        from mlflow.entities import Metric, RunTag

        record = self._record
        assert record is not None
        self._curves.send()
        self._curves.fill(record["histories"], record["stamp"])
        client, run_id, new = self._connect()
        held = {} if new else client.get_run(run_id).data.metrics
        numbers = {safe_name(k): float(v) for k, v in record["row"].items() if is_number(v)}
        metrics = [Metric(k, v, record["stamp"], 0) for k, v in numbers.items() if held.get(k) != v]
        words = {**record["tags"], **{k: v for k, v in record["row"].items() if isinstance(v, str)}}
        tags = [RunTag(safe_name(f"diffex.{key}"), value[:5000]) for key, value in words.items()]
        if record["note"]:
            tags.append(RunTag("mlflow.note.content", record["note"][:5000]))
        numbered, tagged = parts(metrics, BATCH - SMALL_BATCH), parts(tags, SMALL_BATCH)
        for some, words_too in itertools.zip_longest(numbered, tagged):  # together they fit one request
            client.log_batch(run_id, metrics=some or [], tags=words_too or [])
        for file in record["files"]:
            if Path(file).is_file():  # one that was deleted since must not keep the row from being logged
                client.log_artifact(run_id, file)

    def _end(self, status: str) -> None:
        self._curves.send()
        client, run_id, _ = self._connect()
        client.set_terminated(run_id, status)

    def _finally(self, action: Callable[[], None]) -> None:
        """Do what must not fail; where it does, leave everything, or raise."""
        assert self.target is not None
        try:
            patiently(action, self.patience)
            return
        except Exception as error:
            where = without_password(self.target.uri)
            reason = f"MLflow at {where} does not take the results of {self.name} ({one_line(error)})"
        if self.leave is None:
            raise UserError(f"{reason}: run the same command again to log them")
        empty = {"row": {}, "histories": {}, "files": [], "tags": {}, "note": "", "stamp": int(time.time() * 1000)}
        record = {"name": self.name, "digest": self.digest, "params": dict(self.params), **empty,
                  **(self._record or {}), "points": self._curves.waiting()}  # fmt: skip
        self.leave(json.loads(json.dumps(record, default=str)))
        self._left = True
        warn(f"{reason}: they are kept, and the same command logs them later")


def keep(folder: Path, record: dict[str, Any]) -> None:
    """Keep what a trial could not log as a file of the folder, for ``deliver``."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting = folder / f"{record['digest']}.{os.getpid()}.tmp"
    waiting.write_text(json.dumps(record), encoding="utf-8")
    waiting.replace(folder / f"{record['digest']}.json")


def deliver(target: Target, folder: Path, *, patience: float = 10.0) -> list[str]:
    """Log what finished trials could not, because MLflow did not take it then.

    Args:
        target: the sweep that they belong to.
        folder: where ``keep`` put it.
        patience: seconds to wait for MLflow.

    Returns:
        Names of trials that are still not logged, and stay in the folder.
    """
    left: list[str] = []
    for file in sorted(folder.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        run = TrialRun(target, record["name"], record["digest"], record["params"], patience=0.0 if left else patience)
        try:
            with run:
                run._curves.add((k, v, t, s) for k, v, t, s in record["points"])
                run._record = record
                run._finally(run._write)
            file.unlink()
        except UserError:
            left.append(record["name"])
    return left
