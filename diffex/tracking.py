"""MLflow: one run per sweep, one nested run per trial.  The only file that imports mlflow.

The driver opens (and so creates and migrates) the database once, before any worker writes: a new SQLite store opened by
several processes at once breaks.  Metrics go in batches; a run is ended whatever happens.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffex.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

BATCH = 1000  # metrics in one request


@dataclass(frozen=True)
class Target:
    """Where a sweep's trials log to; small and picklable, so that it travels to workers."""

    uri: str
    experiment_id: str
    parent: str

    @property
    def client(self) -> MlflowClient:
        return _client(self.uri)


def absolute_uri(uri: str) -> str:
    """The tracking URI with a relative SQLite path made absolute, so that workers find the same file.

    Raises:
        UserError: not a URI of a database or of a server.
    """
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///")).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{path}"
    if uri.split("://")[0] in ("http", "https", "postgresql", "mysql", "mssql", "databricks"):
        return uri
    raise UserError(
        f"--tracking-uri {uri!r}: give sqlite:///FILE.db, postgresql://..., or http://HOST:PORT of an MLflow server"
    )


def open_sweep(
    uri: str,
    name: str,
    digest: str,
    *,
    artifacts: Path | None = None,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> Target:
    """Create, or on a resume find again, the parent run of a sweep.

    Args:
        uri: tracking URI, as ``absolute_uri`` returns it.
        name: MLflow experiment.
        digest: of the sweep; a parent run with this tag is continued.
        artifacts: folder for artifacts of a new experiment in a database; a server keeps its own.
        params, tags: of the parent run.

    Raises:
        UserError: the store can't be opened, or the server does not answer.
    """
    client = _client(uri)
    try:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            location = None if uri.startswith("http") or artifacts is None else artifacts.absolute().as_uri()
            experiment_id = client.create_experiment(name, artifact_location=location)
        elif experiment.lifecycle_stage == "deleted":
            raise UserError(f"MLflow experiment {name!r} is deleted: restore it, or use another --tracking-uri")
        else:
            experiment_id = experiment.experiment_id
        known = client.search_runs(
            [experiment_id], f"tags.`diffex.digest` = '{digest}' and tags.`diffex.kind` = 'sweep'", max_results=1
        )
        if known:
            parent = known[0].info.run_id
            client.update_run(parent, status="RUNNING")
        else:
            parent = client.create_run(
                experiment_id, run_name=f"{name}-{digest[:8]}",
                tags={"diffex.digest": digest, "diffex.kind": "sweep", "mlflow.source.name": sys.argv[0], **tags},
            ).info.run_id  # fmt: skip
            log_params(client, parent, params)
    except UserError:
        raise
    except Exception as error:  # mlflow, SQLAlchemy and requests raise their own kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"can't open the MLflow store {uri!r}: {reason}") from None
    return Target(uri, experiment_id, parent)


class TrialRun:
    """The nested run of one trial, in a worker: a context that always ends the run.

    Args:
        target: where to log; None logs nowhere.
        name: of the run.
        digest: of the trial; on a resume the unfinished run with this tag is continued.
        params: settings of the trial.
    """

    def __init__(self, target: Target | None, name: str, digest: str, params: Mapping[str, Any]) -> None:
        self.target, self.name, self.digest, self.params = target, name, digest, params
        self.run_id: str | None = None

    def __enter__(self) -> TrialRun:
        if self.target is None:
            return self
        client = self.target.client
        where = f"tags.`mlflow.parentRunId` = '{self.target.parent}' and tags.`diffex.digest` = '{self.digest}'"
        known: list[Run] = client.search_runs([self.target.experiment_id], where, max_results=1)
        if known:
            self.run_id = known[0].info.run_id
            client.update_run(self.run_id, status="RUNNING")
        else:
            tags = {"mlflow.parentRunId": self.target.parent, "diffex.digest": self.digest, "diffex.kind": "trial"}
            self.run_id = client.create_run(self.target.experiment_id, run_name=self.name, tags=tags).info.run_id
            log_params(client, self.run_id, self.params)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.target is not None and self.run_id is not None:
            self.target.client.set_terminated(self.run_id, "FINISHED" if error is None else "FAILED")

    def log(
        self, row: Mapping[str, Any], histories: Mapping[str, Iterable[Mapping[str, float]]], files: Iterable[Path],
        tags: Mapping[str, str], note: str = "",
    ) -> None:  # fmt: skip
        """Write the scoreboard's numbers, training curves (step = images seen), artifacts, tags and a note."""
        if self.target is None or self.run_id is None:
            return
        from mlflow.entities import Metric

        client, now = self.target.client, int(time.time() * 1000)
        metrics = [Metric(_safe(k), float(v), now, 0) for k, v in row.items() if _is_number(v)]
        for stage, history in histories.items():
            for point in history:
                step = int(point["images"])
                metrics += [
                    Metric(f"train.{stage}.{k}", float(v), now, step) for k, v in point.items() if k != "images"
                ]
        for start in range(0, len(metrics), BATCH):
            client.log_batch(self.run_id, metrics=metrics[start : start + BATCH])
        for key, value in {**tags, **{k: v for k, v in row.items() if isinstance(v, str)}}.items():
            client.set_tag(self.run_id, f"diffex.{key}", value[:5000])
        if note:
            client.set_tag(self.run_id, "mlflow.note.content", note)
        for file in files:
            client.log_artifact(self.run_id, str(file))


def end_orphans(target: Target) -> None:
    """End trials' runs that are still open although no trial is: those that a scheduler stopped."""
    client = target.client
    where = f"tags.`mlflow.parentRunId` = '{target.parent}' and attributes.status = 'RUNNING'"
    for run in client.search_runs([target.experiment_id], where):
        client.set_terminated(run.info.run_id, "KILLED")


def close_sweep(
    target: Target, *, metrics: Mapping[str, Any], folder: Path, files: Iterable[Path], status: str
) -> None:
    """Write the sweep's summary and artifacts to the parent run, and end it."""
    from mlflow.entities import Metric

    client, now = target.client, int(time.time() * 1000)
    numbers = [Metric(_safe(k), float(v), now, 0) for k, v in metrics.items() if _is_number(v)]
    if numbers:
        client.log_batch(target.parent, metrics=numbers)
    for file in files:
        inside = str(file.parent.relative_to(folder))
        client.log_artifact(target.parent, str(file), None if inside == "." else inside)
    client.set_terminated(target.parent, status)


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Write parameters, 100 a request, long values cut to MLflow's limit."""
    from mlflow.entities import Param

    items = [Param(_safe(k), str(v)[:6000]) for k, v in params.items()]
    for start in range(0, len(items), 100):
        client.log_batch(run_id, params=items[start : start + 100])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)


def _client(uri: str) -> MlflowClient:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    for noisy in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    return MlflowClient(uri)
