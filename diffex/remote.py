"""A store's objects on a pyarrow filesystem (S3, Google Cloud Storage, a mounted folder), and claims without a server.

Nothing is ever changed in place: data go under new names, and a small record written last names them, so a reader sees
the old state or the new one.  Object stores are strongly consistent, which is all that is asked of them.

A claim on a piece of work is two objects, ``<folder>/<owner>`` (written once) and ``<folder>/<owner>.beat`` (rewritten
every few seconds).  The oldest claim whose beat is fresh has the work.  All times are the server's: clocks of machines
differ.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
from pyarrow import fs as pafs

from diffex.errors import UserError

SCHEMES = ("file", "s3", "gs", "gcs")
CHUNK = 16 << 20  # bytes read and written at a time
PARALLEL = 8  # files under way at a time
BEAT = ".beat"

T = TypeVar("T")
S = TypeVar("S")


def is_uri(address: str | Path) -> bool:
    """Whether an address names a filesystem by a scheme, even after ``Path`` has taken one of its slashes away."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(address)) is not None


def as_uri(address: str | Path) -> str:
    """The address with the slashes that ``Path`` has taken away."""
    text = str(address)
    if "://" in text:
        return text
    scheme, rest = text.split(":/", 1)
    return f"{scheme}:///{rest}" if scheme == "file" else f"{scheme}://{rest}"


def shown(uri: str) -> str:
    """The URI without its keys and its query."""
    parts = urlsplit(uri)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def each(function: Callable[[S], T], items: Iterable[S]) -> list[T]:
    """``function`` of every item, several at a time, in order."""
    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(function, items))


class Remote:
    """The objects under a URI.

    Args:
        uri: ``s3://bucket/prefix?region=..&endpoint_override=..&scheme=..``, ``gs://bucket/prefix`` or ``file:///folder``,
            as pyarrow reads it; keys come from where the cloud's own tools take them (environment, files, instance).
        lease: seconds without a beat after which a claim is dead.
        settle: seconds from writing a claim to judging whose is the oldest; None: what its time stamps need.

    Raises:
        UserError: a scheme or bucket that is not there, no permission, no network.
    """

    def __init__(self, uri: str, *, lease: float = 60.0, settle: float | None = None) -> None:
        self.uri, self.shown, self.lease = uri, shown(uri), lease
        self.fs, self.root = _connect(uri)
        self._plain = isinstance(self.fs, pafs.LocalFileSystem)
        # Object stores cut time stamps to seconds: a claim written after ours has been judged must never look older.
        self.settle = settle if settle is not None else (0.2 if self._plain else 1.5)

    def read(self, path: str) -> bytes | None:
        """Content of an object; None where it is absent."""
        with _told(self.uri):
            try:
                with self.fs.open_input_stream(f"{self.root}/{path}", compression=None) as file:
                    content: bytes = file.read()
                return content
            except FileNotFoundError:
                return None

    def read_json(self, path: str) -> dict[str, Any] | None:
        """A JSON object; None where it is absent or damaged."""
        try:
            value = json.loads(self.read(path) or b"null")
        except ValueError:
            return None
        return value if isinstance(value, dict) else None

    def write(self, path: str, content: bytes) -> None:
        """Write or replace a small object, at once."""
        with _told(self.uri):
            target = f"{self.root}/{path}"
            way = f"{target}.{secrets.token_hex(4)}.tmp" if self._plain else target
            with self._sink(way) as file:
                file.write(content)
            if self._plain:  # a folder, unlike an object store, shows half-written files
                self.fs.move(way, target)

    def is_file(self, path: str) -> bool:
        """Whether an object is there."""
        with _told(self.uri):
            return bool(self.fs.get_file_info(f"{self.root}/{path}").is_file)

    def files(self, path: str = "") -> dict[str, tuple[int, float]]:
        """(bytes, server's time of writing) of all objects under a path, by name relative to it."""
        top = f"{self.root}/{path}".rstrip("/")
        with _told(self.uri):
            found = self.fs.get_file_info(pafs.FileSelector(top, recursive=True, allow_not_found=True))
        return {f.path[len(top) + 1 :]: (f.size or 0, f.mtime_ns / 1e9) for f in found if f.is_file}

    def delete(self, paths: Iterable[str]) -> None:
        """Delete objects; those that are gone already are fine."""

        def one(path: str) -> None:
            with _told(self.uri), suppress(FileNotFoundError):
                self.fs.delete_file(f"{self.root}/{path}")

        each(one, paths)

    def delete_tree(self, path: str) -> None:
        """Delete all objects under a path."""
        with _told(self.uri), suppress(FileNotFoundError):
            self.fs.delete_dir(f"{self.root}/{path}")

    def upload(self, folder: Path, names: Sequence[str], to: str) -> dict[str, str]:
        """Copy files of a folder under a path; returns the SHA-256 of what was sent, by name."""

        def one(name: str) -> str:
            digest = hashlib.sha256()
            with _told(self.uri), (folder / name).open("rb") as file, self._sink(f"{self.root}/{to}/{name}") as sink:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    sink.write(chunk)
            return digest.hexdigest()

        return dict(zip(names, each(one, names), strict=True))

    def download(self, objects: Sequence[str], files: Sequence[Path | None]) -> list[str | None]:
        """Copy objects to files (None: only read them); returns the SHA-256 of each, None for one that is absent."""

        def one(pair: tuple[str, Path | None]) -> str | None:
            path, file = pair
            digest = hashlib.sha256()
            with _told(self.uri):
                try:  # "detect", the default, would unpack what is called .gz
                    source = self.fs.open_input_stream(f"{self.root}/{path}", compression=None)
                except FileNotFoundError:
                    return None
                if file is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                with source, (file or Path(os.devnull)).open("wb") as sink:
                    while chunk := source.read(CHUNK):
                        digest.update(chunk)
                        sink.write(chunk)
            return digest.hexdigest()

        return each(one, list(zip(objects, files, strict=True)))

    def now(self) -> float:
        """The server's time."""
        probe = f".clock-{_owner()}"
        self.write(probe, b"")
        with _told(self.uri):
            mtime = self.fs.get_file_info(f"{self.root}/{probe}").mtime_ns / 1e9
        self.delete([probe])
        return float(mtime)

    def living(self, folder: str, now: float) -> list[str]:
        """Owners of the live claims in a folder, the oldest first; dead ones are deleted.

        Args:
            folder: path of the claims.
            now: server's time, at least.
        """
        found = self.files(folder)
        now = max([now, *(mtime for _, mtime in found.values())])
        claims = {n: t for n, (_, t) in found.items() if not n.endswith((BEAT, ".tmp"))}
        beats = {n: found.get(n + BEAT, (0, t))[1] for n, t in claims.items()}
        dead = [n for n, beat in beats.items() if now - beat > self.lease]
        if dead:
            self.delete(f"{folder}/{n}{end}" for n in dead for end in ("", BEAT))
        return sorted(claims.keys() - set(dead), key=lambda n: (claims[n], n))

    @contextmanager
    def claimed(
        self, folder: str, note: dict[str, Any], *, done: Callable[[], bool], waiting: Callable[[], None] | None
    ) -> Iterator[None]:
        """Hold the claim on a piece of work, or find it ``done`` by another while waiting for it.

        Args:
            folder: path of its claims.
            note: what others may read of this claim.
            done: whether there is nothing left to do; asked now and then.
            waiting: called after each such question, while another holds it.
        """
        owner, stop = _owner(), threading.Event()
        content, pause = json.dumps(note).encode(), min(self.lease / 6, 5.0)

        def beat() -> None:
            while not stop.wait(pause):
                with suppress(UserError):  # a network that is away for less than a lease is no matter
                    self.write(f"{folder}/{owner}{BEAT}", b"")

        def enter() -> None:
            self.write(f"{folder}/{owner}{BEAT}", b"")
            self.write(f"{folder}/{owner}", content)
            time.sleep(self.settle)

        thread = threading.Thread(target=beat, name="diffex-claim", daemon=True)
        try:
            enter()
            thread.start()
            while (order := self.living(folder, 0.0))[:1] != [owner]:
                if owner not in order:  # this machine slept for longer than a lease
                    enter()
                    continue
                if done():
                    break
                if waiting:
                    waiting()
                time.sleep(min(pause, 2.0))
            yield
        finally:
            stop.set()
            if thread.ident is not None:
                thread.join()
            with suppress(UserError):
                self.delete([f"{folder}/{owner}", f"{folder}/{owner}{BEAT}"])

    def _sink(self, path: str) -> Any:
        if self._plain:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        return self.fs.open_output_stream(path, compression=None)


def _owner() -> str:
    host = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}"


@lru_cache(maxsize=64)
def _connect(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem and the path in it, tried once per process."""
    scheme, query = urlsplit(uri).scheme, parse_qs(urlsplit(uri).query)
    if scheme not in SCHEMES:
        raise UserError(
            f"can't open the store {shown(uri)!r}: its scheme must be one of {', '.join(SCHEMES[:3])}, or give a folder"
        )
    if scheme != "file" and not urlsplit(uri).hostname:
        raise UserError(f"the store {shown(uri)!r} names no bucket: write {scheme}://BUCKET/PREFIX")
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:  # the library's own limit is 15 minutes
        uri += ("&" if query else "?") + "retry_limit_seconds=20"
    with _told(uri):
        filesystem, root = pafs.FileSystem.from_uri(uri)
        if scheme == "s3" and query.keys() <= {"region", "scheme", "endpoint_override"}:
            filesystem = _s3(uri, filesystem.region, query)
        if scheme == "file":
            filesystem.create_dir(root)
        with suppress(FileNotFoundError):  # a prefix is there as soon as an object is
            filesystem.get_file_info(pafs.FileSelector(root))
    return filesystem, root.rstrip("/")


def _s3(uri: str, region: str, query: dict[str, list[str]]) -> pafs.S3FileSystem:
    """The same filesystem, soon tired of a network that is not there."""
    parts = urlsplit(uri)
    return pafs.S3FileSystem(
        access_key=unquote(parts.username) if parts.username else None,
        secret_key=unquote(parts.password) if parts.password else None,
        region=region, scheme=query.get("scheme", ["https"])[0],
        endpoint_override=query.get("endpoint_override", [None])[0], connect_timeout=5.0, request_timeout=30.0,
        allow_delayed_open=True,  # a small object is one request, not three
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=3),
    )  # fmt: skip


COMPLAINTS = (
    (r"NO_SUCH_BUCKET|bucket does not exist|bucket was not found",
     "its bucket is not there: make it with the cloud's own tool, or name another one"),
    (r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|INVALID_CLIENT"
     r"|EXPIRED|credentials|Permission denied",
     "permission denied: check the keys (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the cloud's login) and the "
     "bucket's policy"),
    (r"NETWORK_CONNECTION|resolve host|UNAVAILABLE|[Tt]imed? ?out|TIMEOUT|DEADLINE|SLOW_DOWN|Connection",
     "it can't be reached: check the network, the region and endpoint_override"),
    (r"No space left", "its disk is full"),
    (r"query parameter|parse URI|hostname", "the address can't be read: write s3://BUCKET/PREFIX?region=REGION or file:///FOLDER"),
)  # fmt: skip


@contextmanager
def _told(uri: str) -> Iterator[None]:
    """Turn the filesystem's errors into one line that says what to do; an absent object stays FileNotFoundError."""
    try:
        yield
    except (FileNotFoundError, UserError):
        raise
    except (OSError, pa.ArrowException) as error:
        text = " ".join(str(error).split())
        told = next((t for pattern, t in COMPLAINTS if re.search(pattern, text)), text[:200])
        raise UserError(f"the store {shown(uri)!r} can't be used: {told}") from error
