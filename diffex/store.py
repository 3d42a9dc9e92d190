"""The content-addressed store: a stage's output lies under the digest of everything that decided it.

    root/<stage>/<digest>/            a finished entry: the stage's files and entry.json, which lists their SHA-256
    root/<stage>/<digest>.partial/    work in progress; a killed stage leaves its checkpoint here and resumes from it
    root/<stage>/<digest>.lock        held (flock) by the process that computes; the kernel frees it when that dies

An entry appears by one rename, so it is whole or absent; a damaged one is found by its digests and computed again.
Concurrent processes that want the same entry wait for the one that computes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffex.errors import UserError

RECORD = "entry.json"


@dataclass(frozen=True)
class Entry:
    """A finished entry: where its files are, what its stage reported and cost, and whether this call computed it."""

    path: Path
    facts: dict[str, Any]
    seconds: float
    computed: bool


class Store:
    """A store in a local (or shared POSIX) folder.

    Args:
        root: the folder; made where it is missing.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't make the store {str(self.root)!r}: {error.strerror}") from None
        self._verified: set[Path] = set()

    def has(self, stage: str, digest: str) -> bool:
        """Whether a finished entry is there (its files are not read)."""
        return (self.root / stage / digest / RECORD).is_file()

    def get(self, stage: str, digest: str) -> Entry | None:
        """The finished entry, its files checked once per process; None where it is absent or damaged."""
        path = self.root / stage / digest
        try:
            record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or not {"files", "facts", "seconds"} <= record.keys():
            return None
        if path not in self._verified:
            for name, expected in record["files"].items():
                if not (path / name).is_file() or _sha256(path / name) != expected:
                    return None
            self._verified.add(path)
        return Entry(path, record["facts"], record["seconds"], computed=False)

    def compute(
        self, stage: str, digest: str, run: Callable[[Path], dict[str, Any]], *, about: dict[str, Any] | None = None,
        waiting: Callable[[], None] | None = None,
    ) -> Entry:  # fmt: skip
        """The entry, computed by ``run`` if nobody has and nobody does.

        Args:
            stage, digest: its address.
            run: writes files into the folder it is given (which may hold an earlier attempt's checkpoint) and returns
                facts, which must be JSON.
            about: kept in the record, for people.
            waiting: called now and then while another process computes the same entry.
        """
        entry = self.get(stage, digest)
        if entry is not None:
            return entry
        final = self.root / stage / digest
        partial = final.with_name(f"{digest}.partial")
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final.with_name(f"{digest}.lock"), waiting):
            entry = self.get(stage, digest)
            if entry is not None:
                return entry
            if final.exists():  # damaged: never served again
                shutil.rmtree(final)
            partial.mkdir(exist_ok=True)
            began = time.perf_counter()
            spent = _spent(partial)
            try:
                facts = run(partial)
            finally:
                seconds = spent + time.perf_counter() - began
                if partial.exists():
                    (partial / "seconds").write_text(f"{seconds:.3f}")
            (partial / "seconds").unlink()
            (partial / RECORD).unlink(missing_ok=True)  # of an attempt killed just before the renaming
            files = sorted(p for p in partial.rglob("*") if p.is_file())
            record: dict[str, Any] = {
                "stage": stage, "digest": digest, "about": about or {}, "facts": facts, "seconds": round(seconds, 3),
                "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "files": {str(p.relative_to(partial)): _sha256(p) for p in files},
            }  # fmt: skip
            (partial / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            partial.rename(final)
            self._verified.add(final)
        return Entry(final, facts, record["seconds"], computed=True)


def _spent(partial: Path) -> float:
    """Seconds that earlier, unfinished attempts have reported."""
    try:
        return float((partial / "seconds").read_text())
    except (OSError, ValueError):
        return 0.0


@contextmanager
def _locked(path: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Hold an exclusive lock on the file; poll, so that the waiting can be shown and interrupted."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waiting:
                    waiting()
                time.sleep(0.2)
        yield  # closing the file frees the lock


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
