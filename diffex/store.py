"""The content-addressed store: a stage's output lies under the digest of everything that decided it.

    root/<stage>/<digest>/            a finished entry: the stage's files and entry.json, which lists their SHA-256
    root/<stage>/<digest>.partial/    work in progress; a killed stage leaves its checkpoint here and resumes from it
    root/<stage>/<digest>.lock        held (flock) by the process that computes; the kernel frees it when that dies

An entry appears by one rename, so it is whole or absent; a damaged one is found by its digests and computed again.
Concurrent processes that want the same entry wait for the one that computes it.

A store may also be a URI (``s3://bucket/prefix``, ``gs://...``, ``file:///...``) that machines share.  Each then has
such a folder of its own as cache, and the URI holds

    <stage>/<digest>/entry.json                written last; names the attempt whose files it lists
    <stage>/<digest>/<attempt>/...             files: two attempts never mix, whoever finishes last is believed
    <stage>/<digest>.partial/partial.json      written last; names the files of the work in progress
    <stage>/<digest>.claims/<owner>[.beat]     who computes it (see ``diffex.remote``)
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from diffex.errors import UserError
from diffex.records import (
    Key,
    damage,
    difference,
    discard,
    inside,
    is_locked,
    locked,
    locked_now,
    names_in,
    needs_of,
    parsed,
    remove_folder,
    seconds_spent,
    sha256,
    sound,
)
from diffex.remote import Remote, as_uri, each, is_uri, shown

RECORD = "entry.json"
PARTIAL_RECORD = "partial.json"
FINISHED, PARTIAL, DAMAGED, LEFTOVER = "finished", "partial", "damaged-record", "leftover"


@dataclass(frozen=True)
class Entry:
    """A finished entry: where its files are, what its stage reported and cost, and whether this call computed it."""

    path: Path
    facts: dict[str, Any]
    seconds: float
    computed: bool


@dataclass(frozen=True)
class Info:
    """Something that takes room in a store.

    Attributes:
        stage, digest: its address.
        bytes: what it takes.
        made, used: when it was made and last asked for (remote: made), seconds of the store's clock since 1970.
        state: "finished"; "partial": work in progress; "damaged-record": an entry whose record can't be read;
            "leftover": files of a killed attempt that no record names.
        needs: addresses of the entries that it was made from.
        name: of the folder, where the digest is not all of it.
    """

    stage: str
    digest: str
    bytes: int
    made: float
    used: float
    state: str
    needs: tuple[Key, ...] = ()
    name: str = ""

    @property
    def key(self) -> Key:
        return self.stage, self.digest


class Store:
    """A store in a folder (local, or shared by NFS), or on a filesystem that a URI names.

    Args:
        root: the folder, made where it is missing; or a URI.
        cache: of a URI: folder for this machine's copies (default: in $DIFFEX_CACHE, else in ~/.cache/diffex).
        lease: of a URI: seconds without a sign of life after which another machine's claim is dead.
        settle: of a URI: see ``diffex.remote.Remote``.

    Attributes:
        root: the folder in which entries lie on this machine.
        address: what another machine gives ``Store`` to open the same store; it may hold keys, if the URI did.
        shown: the address for people, without keys.

    Raises:
        UserError: no such bucket or scheme, no permission, no network; a folder that can't be made.
    """

    def __init__(
        self, root: str | Path, *, cache: str | Path | None = None, lease: float = 60.0, settle: float | None = None
    ) -> None:
        self._remote: Remote | None = None
        if is_uri(root):
            self.address = as_uri(root)
            self._remote = Remote(self.address, lease=lease, settle=settle)
            self.shown = shown(self.address)
            caches = Path(os.environ.get("DIFFEX_CACHE") or "~/.cache/diffex").expanduser()
            folder = Path(cache) if cache else caches / hashlib.sha256(self.shown.encode()).hexdigest()[:16]
        else:
            folder = Path(root)
        self.root = folder.absolute()
        if self._remote is None:
            self.address = self.shown = str(self.root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"can't make the store {str(self.root)!r}: {error.strerror}") from None
        self._verified: set[Path] = set()
        self._rejected: set[tuple[Path, str]] = set()  # attempts that were found damaged
        self._began: dict[Key, float] = {}  # when what is computed here began, less what earlier attempts spent

    @classmethod
    def existing(cls, root: str | Path) -> Store | None:
        """The store, or None where its folder is missing, which the constructor would make."""
        return cls(root) if is_uri(root) or Path(root).is_dir() else None

    # ------------------------------------------------------------------------------------------------------------------
    # Finished entries

    def has(self, stage: str, digest: str) -> bool:
        """Whether a finished entry is there (its files are not read)."""
        if self._remote is not None:
            return self._remote.is_file(f"{stage}/{digest}/{RECORD}")
        return (self.root / stage / digest / RECORD).is_file()

    def get(self, stage: str, digest: str) -> Entry | None:
        """The finished entry, its files on this machine and checked once per process; None: absent or damaged."""
        entry = self._here(stage, digest)
        if entry is not None or self._remote is None:
            return entry
        record = sound(self._remote.read_json(f"{stage}/{digest}/{RECORD}"))
        path = self.root / stage / digest
        if record is None or (path, record["attempt"]) in self._rejected:
            return None
        with self._fetching(stage, digest):
            entry = self._here(stage, digest)  # another process may have brought it
            if entry is not None:
                return entry
            files: dict[str, str] = record["files"]
            objects = {name: f"{stage}/{digest}/{record['attempt']}/{name}" for name in files}
            fetched = self._fetch(path, objects, files)
            if fetched is None:
                self._rejected.add((path, record["attempt"]))
                return None
            (fetched / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            discard(path)
            fetched.rename(path)
            self._verified.add(path)
        return Entry(path, record["facts"], record["seconds"], computed=False)

    def _here(self, stage: str, digest: str) -> Entry | None:
        path = self.root / stage / digest
        try:
            record = sound(json.loads((path / RECORD).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
        if record is None:
            return None
        if path not in self._verified:
            if damage(path, record["files"]):
                return None
            self._verified.add(path)
        with suppress(OSError):  # the record's time stamp tells when the entry was last asked for
            os.utime(path / RECORD)
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
            about: kept in the record, for people and for garbage collection ("needs": stage -> digest).
            waiting: called now and then while another process computes the same entry.
        """
        entry = self.get(stage, digest)
        if entry is not None:
            return entry
        final = self.root / stage / digest
        final.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            held.enter_context(locked(final.with_name(f"{digest}.lock"), waiting, about))
            if self._remote is not None:
                held.enter_context(
                    self._remote.claimed(
                        f"{stage}/{digest}.claims", about or {}, waiting=waiting,
                        done=lambda: self.get(stage, digest) is not None,
                    )
                )  # fmt: skip
            entry = self.get(stage, digest)
            if entry is not None:
                if self._remote is not None:  # computed elsewhere, after an attempt here was killed
                    self._forget_partial(stage, digest)
                return entry
            if self._remote is None:
                discard(final)  # damaged: never served again
            partial = self.partial(stage, digest)
            self._began[stage, digest] = time.perf_counter() - seconds_spent(partial)
            try:
                facts = run(partial)
            finally:
                seconds = self._note_seconds(stage, digest)
                del self._began[stage, digest]
            discard(partial / "seconds")
            discard(partial / RECORD)  # of an attempt killed just before the renaming
            record: dict[str, Any] = {
                "stage": stage, "digest": digest, "about": about or {}, "facts": facts, "seconds": round(seconds, 3),
                "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }  # fmt: skip
            json.dumps(record)  # complains of facts that are not JSON before anything is sent
            names = names_in(partial)
            if self._remote is None:
                record["files"] = dict(zip(names, each(lambda n: sha256(partial / n), names), strict=True))
            else:
                record["attempt"] = secrets.token_hex(8)
                record["files"] = self._remote.upload(partial, names, f"{stage}/{digest}/{record['attempt']}")
                self._remote.write(f"{stage}/{digest}/{RECORD}", json.dumps(record, indent=1).encode())
            (partial / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
            with self._fetching(stage, digest):
                discard(final)
                partial.rename(final)
            self._verified.add(final)
            self._forget_partial(stage, digest)
        return Entry(final, facts, record["seconds"], computed=True)

    # ------------------------------------------------------------------------------------------------------------------
    # Work in progress

    def partial(self, stage: str, digest: str) -> Path:
        """Folder on this machine of an entry's work in progress, as far as any machine has saved it.

        Files that this machine has written since it saved or fetched them last are kept, unless another machine has
        saved since.
        """
        folder = self.root / stage / f"{digest}.partial"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self._remote is None:
            if not folder.is_dir():
                discard(folder)
                folder.mkdir(exist_ok=True)
            return folder
        with self._fetching(stage, digest):
            tried = None
            while True:  # a set that is replaced while it is read is read again
                saved = self._saved(stage, digest)
                if saved is None or saved["id"] == tried or saved["id"] == self._synced(stage, digest):
                    break
                tried = saved["id"]
                objects = {n: f"{stage}/{digest}.partial/{f['at']}" for n, f in saved["files"].items()}
                digests = {n: f["sha256"] for n, f in saved["files"].items()}
                fetched = self._fetch(folder, objects, digests)
                if fetched is not None:
                    discard(folder.with_suffix(".synced"))
                    discard(folder)
                    fetched.rename(folder)
                    folder.with_suffix(".synced").write_text(tried)
                    break
            folder.mkdir(exist_ok=True)
        return folder

    def save_partial(self, stage: str, digest: str) -> None:
        """Save an entry's work in progress for other machines: files that changed are sent, then named by a record.

        In a local store it is saved by being written.  A failure is a warning: the next call tries again.
        """
        remote, folder = self._remote, self.root / stage / f"{digest}.partial"
        if remote is None or not folder.is_dir():
            return
        if (stage, digest) in self._began:
            self._note_seconds(stage, digest)
        with self._fetching(stage, digest):
            try:
                before = self._saved(stage, digest) or {"files": {}}
                token, names = secrets.token_hex(8), names_in(folder)
                digests = dict(zip(names, each(lambda n: sha256(folder / n), names), strict=True))
                files = {n: f for n, f in before["files"].items() if f["sha256"] == digests.get(n)}
                sent = remote.upload(folder, [n for n in names if n not in files], f"{stage}/{digest}.partial/{token}")
                files |= {n: {"sha256": sha, "at": f"{token}/{n}"} for n, sha in sent.items()}
                record = json.dumps({"id": token, "files": files}, indent=1).encode()
                remote.write(f"{stage}/{digest}.partial/{PARTIAL_RECORD}", record)
                folder.with_suffix(".synced").write_text(token)
                kept = {f["at"] for f in files.values()}
                old = {f["at"] for f in before["files"].values()}
                remote.delete(f"{stage}/{digest}.partial/{at}" for at in old - kept)
            except (UserError, OSError) as error:
                warnings.warn(f"progress of {stage} was not saved to the store: {error}", stacklevel=2)

    def _saved(self, stage: str, digest: str) -> dict[str, Any] | None:
        """The record of the last whole set of files saved."""
        assert self._remote is not None
        record = self._remote.read_json(f"{stage}/{digest}.partial/{PARTIAL_RECORD}")
        if record is None or not isinstance(record.get("id"), str) or not isinstance(record.get("files"), dict):
            return None
        for name, file in record["files"].items():
            if not (inside(name) and isinstance(file, dict) and {"sha256", "at"} <= file.keys()):
                return None
        return record

    def _synced(self, stage: str, digest: str) -> str | None:
        """Which set of files the folder on this machine started from, or was saved as."""
        try:
            return (self.root / stage / f"{digest}.synced").read_text()
        except (OSError, ValueError):
            return None

    def _forget_partial(self, stage: str, digest: str) -> None:
        if self._remote is not None:
            folder = self.root / stage / f"{digest}.partial"
            discard(folder.with_suffix(".synced"))
            discard(folder)
            self._remote.delete_tree(f"{stage}/{digest}.partial")

    def _note_seconds(self, stage: str, digest: str) -> float:
        """Note how long the entry has been computed, over all attempts, in case this one dies; seconds."""
        seconds = time.perf_counter() - self._began[stage, digest]
        with suppress(OSError):
            (self.root / stage / f"{digest}.partial" / "seconds").write_text(f"{seconds:.3f}")
        return seconds

    @contextmanager
    def _fetching(self, stage: str, digest: str) -> Iterator[None]:
        """One process of a machine at a time moves an entry's files; held for as long as the transfer takes."""
        if self._remote is None:
            yield
            return
        (self.root / stage).mkdir(parents=True, exist_ok=True)
        with locked(self.root / stage / f"{digest}.fetch.lock"):
            yield

    def _fetch(self, path: Path, objects: dict[str, str], digests: dict[str, str]) -> Path | None:
        """Bring objects (by file name) into a folder beside ``path``; None where one is absent or damaged."""
        assert self._remote is not None
        folder = path.with_name(f"{path.name}.fetch")
        discard(folder)
        folder.mkdir(parents=True)
        names = list(objects)
        found = self._remote.download([objects[n] for n in names], [folder / n for n in names])
        if found == [digests[n] for n in names]:
            return folder
        discard(folder)
        return None

    # ------------------------------------------------------------------------------------------------------------------
    # Housekeeping

    def entries(self) -> Iterator[Info]:
        """All that takes room, by stage and digest; of a URI what lies there, not this machine's copies."""
        yield from self._remote_entries(self._remote) if self._remote is not None else self._local_entries()

    def _local_entries(self) -> Iterator[Info]:
        for path in sorted(p for p in self.root.glob("*/*") if p.is_dir()):
            digest, _, suffix = path.name.partition(".")
            size, newest = 0, path.stat().st_mtime
            for file in path.rglob("*"):
                with suppress(OSError):
                    status = file.stat()
                    size += status.st_size if stat.S_ISREG(status.st_mode) else 0
                    newest = max(newest, status.st_mtime)
            info = Info(path.parent.name, digest, size, newest, newest, PARTIAL if suffix == "partial" else LEFTOVER)
            if suffix:
                yield replace(info, name=path.name)
                continue
            try:
                record, used = parsed((path / RECORD).read_bytes()), (path / RECORD).stat().st_mtime
            except OSError:
                record, used = None, newest
            yield _described(replace(info, used=used), record)

    def _remote_entries(self, remote: Remote) -> Iterator[Info]:
        groups: dict[tuple[str, str, str], list[tuple[int, float]]] = {}  # by stage, folder and attempt
        for name, file in remote.files().items():
            stage, _, rest = name.partition("/")
            folder, _, rest = rest.partition("/")
            if rest and not folder.endswith(".claims"):
                attempt = "" if folder.endswith(".partial") else rest.partition("/")[0]
                groups.setdefault((stage, folder, attempt), []).append(file)
        folders = [(stage, folder) for stage, folder, attempt in groups if attempt == RECORD]
        read = each(lambda f: remote.read_json(f"{f[0]}/{f[1]}/{RECORD}") or {}, folders)
        records = dict(zip(folders, read, strict=True))
        for (stage, folder, attempt), files in sorted(groups.items()):
            record = records.get((stage, folder), {})
            if attempt == RECORD:
                files = files + groups.get((stage, folder, str(record.get("attempt"))), [])
            elif attempt and attempt == record.get("attempt"):
                continue
            size, newest = sum(s for s, _ in files), max(m for _, m in files)
            digest, _, suffix = folder.partition(".")
            info = Info(stage, digest, size, newest, newest, PARTIAL if suffix else LEFTOVER, name=attempt)
            yield _described(replace(info, name=""), record) if attempt == RECORD else info

    def now(self) -> float:
        """The time by the clock that ``Info`` is dated with, seconds since 1970."""
        return self._remote.now() if self._remote is not None else time.time()

    def running(self) -> dict[Key, tuple[Key, ...]]:
        """What is being computed now, by any process of any machine, and the entries that it is made from."""
        found = {}
        if self._remote is None:
            for file in self.root.glob("*/*.lock"):
                if not file.name.endswith(".fetch.lock") and is_locked(file):
                    with suppress(OSError):
                        found[file.parent.name, file.name.partition(".")[0]] = needs_of(parsed(file.read_bytes()))
            return found
        now, folders = self._remote.now(), set()
        for name in self._remote.files():
            stage, _, rest = name.partition("/")
            if rest.partition("/")[0].endswith(".claims"):
                folders.add((stage, rest.partition("/")[0]))
        for stage, folder in folders:
            for owner in self._remote.living(f"{stage}/{folder}", now)[:1]:
                note = self._remote.read_json(f"{stage}/{folder}/{owner}")
                found[stage, folder.partition(".")[0]] = needs_of({"about": note or {}})
        return found

    def check(self, info: Info) -> str:
        """What is wrong with a finished entry, its files read; empty: nothing."""
        path, remote = f"{info.stage}/{info.digest}", self._remote
        try:
            content = remote.read(f"{path}/{RECORD}") if remote else (self.root / path / RECORD).read_bytes()
        except OSError:
            content = None
        record = sound(parsed(content or b""))
        if record is None:
            return f"its record ({RECORD}) can't be read"
        if remote is None:
            return damage(self.root / path, record["files"])
        names = list(record["files"])
        found = remote.download([f"{path}/{record['attempt']}/{n}" for n in names], [None] * len(names))
        return difference(record["files"], dict(zip(names, found, strict=True)))

    def remove(self, info: Info) -> bool:
        """Remove what ``entries`` has found; False, and nothing happens, where someone computes it now."""
        here = self.root / info.stage / info.digest
        with locked_now(here.with_name(f"{info.digest}.lock")) as free:
            if not free:
                return False
            if self._remote is None:
                remove_folder(here.with_name(info.name) if info.name else here)
                return True
            path = f"{info.stage}/{info.digest}"
            if self._remote.living(f"{path}.claims", self._remote.now()):
                return False
            if info.state == PARTIAL:
                self._remote.delete([f"{path}.partial/{PARTIAL_RECORD}"])
                self._remote.delete_tree(f"{path}.partial")
                self._forget_partial(info.stage, info.digest)
            elif info.state == LEFTOVER:
                self._remote.delete_tree(f"{path}/{info.name}")
            else:
                attempt = (self._remote.read_json(f"{path}/{RECORD}") or {}).get("attempt")
                self._remote.delete([f"{path}/{RECORD}"])
                if isinstance(attempt, str) and attempt:
                    self._remote.delete_tree(f"{path}/{attempt}")
                remove_folder(here)
            return True


def _described(info: Info, record: dict[str, Any] | None) -> Info:
    """Complete what is known of an entry by its record."""
    if record is None or sound(record) is None:
        return replace(info, state=DAMAGED)
    made = info.made
    with suppress(ValueError, TypeError, KeyError):
        made = datetime.fromisoformat(record["made"]).timestamp()
    return replace(info, state=FINISHED, made=made, needs=needs_of(record))
