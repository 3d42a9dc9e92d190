"""Reaching MLflow: addresses, waiting for it, and an SQLite file that several processes write to."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import math
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from diffex.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

BATCH = 1000  # metrics in one request, MLflow's own limit
SMALL_BATCH = 100  # tags or parameters in one request, likewise
COMPARED = 100  # runs in one comparison: more make an address that browsers and MLflow's tags cut off

T = TypeVar("T")


def absolute_uri(uri: str) -> str:
    """The tracking URI with a relative SQLite path made absolute, so that workers find the same file.

    Raises:
        UserError: not a URI of a database or of a server.
    """
    file = sqlite_file(uri)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        _, mark, query = uri.partition("?")
        return f"sqlite:///{file}{mark}{query}"
    scheme, mark, _ = uri.partition("://")
    if mark and scheme.split("+")[0] in ("http", "https", "postgresql", "mysql", "mssql", "databricks"):
        return uri
    raise UserError(
        f"--tracking-uri {uri!r}: give sqlite:///FILE.db, postgresql://..., or http://HOST:PORT of an MLflow server"
    )


def sqlite_file(uri: str) -> Path | None:
    """The file of an SQLite URI, absolute; None for every other store."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute() if uri.startswith("sqlite:///") else None


def how_to_look(uri: str) -> str:
    """What to type or open to see the runs, in a few words; a password is not shown."""
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {without_password(uri)}"


def compare_url(base: str, experiment_id: str, run_ids: Iterable[str]) -> str:
    """The address of MLflow's page that compares runs.

    Args:
        base: of MLflow's pages, as http://HOST:5000.
        experiment_id: of the runs.
        run_ids: at most the first 100 are compared.
    """
    runs = json.dumps(list(run_ids)[:COMPARED], separators=(",", ":"))
    return f"{base.rstrip('/')}/#/compare-runs?runs={quote(runs)}&experiments={quote(json.dumps([experiment_id]))}"


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Write parameters, 100 a request, long values cut to MLflow's limit."""
    from mlflow.entities import Param

    for part in parts([Param(safe_name(k), str(v)[:6000]) for k, v in params.items()], SMALL_BATCH):
        client.log_batch(run_id, params=part)


def parts(items: list[Any], size: int) -> Iterator[list[Any]]:
    """The list in pieces of at most ``size``."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def is_number(value: Any) -> bool:
    """Whether MLflow can keep the value as a metric: a finite number, not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def safe_name(name: str) -> str:
    """The name with the characters that MLflow refuses replaced, cut to its limit."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)[:250]


def without_password(uri: str) -> str:
    """The URI without its password."""
    return re.sub(r"(://[^:/@]+):[^@/]+@", r"\1:***@", uri)


def one_line(error: Exception) -> str:
    """The beginning of an error's message; a password is not shown."""
    return without_password(" ".join(str(error).split())[:200])


def warn(message: str) -> None:
    """Tell people, in one line."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def is_refusal(error: Exception) -> bool:
    """Whether MLflow answered, and trying again gives the same answer."""
    return getattr(error, "error_code", "") in (
        "INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE", "PERMISSION_DENIED",
        "CUSTOMER_UNAUTHORIZED", "UNAUTHENTICATED",
    )  # fmt: skip


def patiently(action: Callable[[], T], patience: float) -> T:
    """Do it, again and again for so many seconds where that may help."""
    deadline, wait = time.monotonic() + patience, 1.0
    while True:
        try:
            return action()
        except Exception as error:
            if is_refusal(error) or time.monotonic() + wait > deadline:
                raise
        time.sleep(wait)
        wait = min(2 * wait, 30.0)


@contextlib.contextmanager
def creating(uri: str) -> Iterator[None]:
    """While an SQLite file may be created: hold its folder's lock, and make it fit for many writers.

    With SQLite's write-ahead log a commit waits for the disk fewer times, and whoever looks at the runs does not
    hold up those who write.  Writers wait for each other up to 20 s (MLflow sets busy_timeout itself).
    """
    file = sqlite_file(uri)
    if file is None:
        yield
        return
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: only two first uses at once need it
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
        with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(file, timeout=20)) as database:
            database.execute("PRAGMA journal_mode = WAL")
    finally:
        os.close(folder)


@functools.lru_cache(maxsize=8)
def open_client(uri: str) -> MlflowClient:
    """MLflow's client, one a process and address, told to be quiet and not to wait long."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # a server's runs would tear the bars
    # Few and short tries: what waits longer, waits here, and where a training is not held up by it.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a busy database is told here, in one line
    from mlflow import MlflowClient

    return MlflowClient(uri)
