"""A store's records, files and locks on this machine."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

Key = tuple[str, str]
"""Stage and digest: an entry's address."""


def parsed(content: bytes) -> dict[str, Any] | None:
    """The JSON object; None where it is damaged."""
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def sound(record: Any) -> dict[str, Any] | None:
    """The record of an entry, if it is one."""
    if not isinstance(record, dict) or not {"files", "facts", "seconds"} <= record.keys():
        return None
    if not isinstance(record["files"], dict) or not all(map(inside, record["files"])):
        return None
    return {"attempt": "", **record}


def inside(name: str) -> bool:
    """Whether a file name stays in its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def needs_of(record: dict[str, Any] | None) -> tuple[Key, ...]:
    """Addresses of the entries that an entry is made from, as ``about`` says in its record."""
    about = (record or {}).get("about")
    needs = about.get("needs") if isinstance(about, dict) else None
    return tuple((str(s), str(d)) for s, d in needs.items()) if isinstance(needs, dict) else ()


def names_in(folder: Path) -> list[str]:
    """Relative names of all files in a folder."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path, files: Mapping[str, str]) -> str:
    """Which of the files (name -> SHA-256) in a folder is absent or another one; empty: none."""
    found: dict[str, str | None] = dict.fromkeys(files)
    for name in files:
        with suppress(OSError):  # absent, or removed this moment
            found[name] = sha256(folder / name)
    return difference(files, found)


def difference(expected: Mapping[str, str], found: Mapping[str, str | None]) -> str:
    """The same of digests that have been read."""
    for name, digest in expected.items():
        if found[name] != digest:
            return f"{name} is missing" if found[name] is None else f"{name} is not what was written (SHA-256 differs)"
    return ""


def seconds_spent(partial: Path) -> float:
    """Seconds that earlier, unfinished attempts have reported."""
    try:
        seconds = float((partial / "seconds").read_text())
    except (OSError, ValueError):
        return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def discard(path: Path) -> None:
    """Remove whatever is there, if anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_folder(path: Path) -> None:
    """Remove an entry, so that a removal that is killed leaves none that looks whole."""
    if path.is_dir():
        way = path.with_name(f"{path.name}.{secrets.token_hex(4)}.removed")
        path.rename(way)
        shutil.rmtree(way)


@contextmanager
def locked(
    path: Path, waiting: Callable[[], None] | None = None, about: dict[str, Any] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on the file, which says what it is ``about``; poll, so that waiting can be interrupted."""
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if waiting:
                    waiting()
                time.sleep(0.2)
        file.truncate(0)
        json.dump({"about": about or {}}, file)
        file.flush()
        yield  # closing the file frees the lock


@contextmanager
def locked_now(path: Path) -> Iterator[bool]:
    """Hold the lock if nobody does; whether it is held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def is_locked(path: Path) -> bool:
    """Whether anybody holds the lock."""
    with locked_now(path) as free:
        return not free
