"""Files below one folder or in one archive: paths of tables and links never lead out of it."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
import zipfile
from collections.abc import Collection
from pathlib import Path, PureWindowsPath
from typing import Any

from diffex.errors import UserError
from diffex.readers import ENDINGS, MAX_BYTES, read_file


class Root:
    """A folder that no path leads out of.

    Args:
        path: the folder.

    Raises:
        UserError: no such folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise UserError(f"there is no folder {str(path)!r} (read.root)")
        self.path, self.real = path, path.resolve()
        self._listings: dict[str, dict[str, list[str]]] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_listings": {}}

    def inside(self, path: Path) -> Path:
        """Where a path really leads.

        Raises:
            UserError: out of the folder.
        """
        real = path.resolve()
        if not real.is_relative_to(self.real):
            raise UserError(
                f"{str(path)!r} leads out of {str(self.path)!r}, to {str(real)!r}: copy it there, or name a folder "
                f"that holds both with read.root"
            )
        return real

    def locate(self, relative: str) -> Path | None:
        """The file or folder that a path from a table names; None where there is none.

        Backslashes are taken for slashes, and where the exact name is missing, one that differs in case or in the
        composition of its accents.

        Raises:
            UserError: the path leads out of the folder, by itself or through a link, or names several files.
        """
        at = self.path
        for part in self.parts(relative):
            listing = self._listing(at)
            names = listing.get(folded(part), [])
            name = part if part in names else names[0] if len(names) == 1 else None
            if name is None:
                if names:
                    raise UserError(f"{relative!r} could be {' or '.join(sorted(names))} in {str(at)!r}: rename one")
                return None
            at = at / name
            if at.is_symlink():
                self.inside(at)
        return at

    def parts(self, relative: str) -> list[str]:
        """The folders and the name that a path has below this folder.

        Raises:
            UserError: it leads out of the folder.
        """
        path = relative.replace("\\", "/")
        parts: list[str] = []
        if path.startswith("/") and not path.startswith("//"):
            for base in (self.path.absolute(), self.real):
                if path == base.as_posix() or path.startswith(base.as_posix().rstrip("/") + "/"):
                    path = path[len(base.as_posix()) :].lstrip("/")
                    break
        absolute = path.startswith("/") or bool(PureWindowsPath(path).drive)
        for part in path.split("/"):
            if part == ".." and parts:
                parts.pop()
            elif part == ".." or absolute or "\0" in part:
                raise UserError(
                    f"path {relative!r} leads out of {str(self.path)!r}, and nothing outside is read: name the folder "
                    f"with read.root, and the beginning of the paths that it stands for with read.strip"
                )
            elif part not in ("", "."):
                parts.append(part)
        return parts

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """Names in a folder, by what is left of them without case and composition."""
        if str(folder) not in self._listings:
            found: dict[str, list[str]] = {}
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        found.setdefault(folded(entry.name), []).append(entry.name)
            except (NotADirectoryError, FileNotFoundError):
                pass
            except OSError as error:
                raise UserError(f"can't read folder {str(folder)!r}: {error.strerror}") from None
            self._listings[str(folder)] = found
        return self._listings[str(folder)]


def folded(name: str) -> str:
    """A name without case and composition of accents, to compare it."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def safe_path(root: Path, relative: str) -> Path:
    """The file that a path from a table names below ``root``; see ``Root.locate``.

    Raises:
        UserError: it is not there, or leads out of the folder.
    """
    found = Root(root).locate(relative)
    if found is None:
        raise UserError(f"there is no {relative!r} in {str(root)!r} (read.root)")
    return found


class Folder:
    """Files below a folder, by relative names with '/'; links that leave it are refused.

    Args:
        path: the folder.
        root: the folder that links may not leave (default: the same).
        max_bytes: largest size of a file.
    """

    def __init__(self, path: Path, root: Path | None = None, max_bytes: int = MAX_BYTES) -> None:
        self.path, self.max_bytes = path, max_bytes
        self.root = Root(root or path)

    def names(self, endings: Collection[str] = ENDINGS) -> list[str]:
        """Names of the files with one of the endings (in any case), sorted; hidden ones are passed over."""
        found: list[str] = []
        seen: set[Path] = set()
        for folder, below, files in os.walk(self.path, followlinks=True):
            for entry in [*below, *files]:
                if (linked := Path(folder, entry)).is_symlink():
                    real = self.root.inside(linked)
                    if entry in below and (real in seen or Path(folder).resolve().is_relative_to(real)):  # a ring
                        below.remove(entry)
                    seen.add(real)
            at = Path(folder).relative_to(self.path)
            found += [(at / f).as_posix() for f in files if Path(f).suffix.lower() in endings]
        return _legible(sorted(name for name in found if not _hidden(name)), self.path)

    def file(self, name: str) -> Path:
        """The file on the disk."""
        return self.path / name

    def label(self, name: str) -> str:
        """What to call a file in messages."""
        return str(self.path / name)

    def content(self, name: str) -> bytes:
        """The bytes of a file."""
        return read_file(self.path / name, self.max_bytes)


class Archive:
    """Files in a ZIP archive, by their names; read in place, nothing is unpacked to the disk.

    Raises:
        UserError: no ZIP archive, or one with names that lead out of it.
    """

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES) -> None:
        self.path, self.max_bytes = path, max_bytes
        self._zip: zipfile.ZipFile | None = None
        for info in self._open().infolist():
            name = info.filename.replace("\\", "/")
            if name.startswith("/") or ".." in name.split("/") or stat.S_ISLNK(info.external_attr >> 16):
                raise UserError(f"{str(path)!r} holds {info.filename!r}, which leads out of the archive; make it again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None}

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None:
            try:
                self._zip = zipfile.ZipFile(self.path)
            except (zipfile.BadZipFile, OSError) as error:
                raise UserError(f"{str(self.path)!r} is not a readable ZIP archive: {error}") from None
        return self._zip

    def names(self, endings: Collection[str] = ENDINGS) -> list[str]:
        """Names of the files with one of the endings (in any case), sorted; hidden ones are passed over."""
        every = (info.filename for info in self._open().infolist() if not info.is_dir())
        return _legible(sorted(n for n in every if n[n.rfind(".") :].lower() in endings and not _hidden(n)), self.path)

    def file(self, name: str) -> Path:
        """The file on the disk: the archive itself."""
        return self.path

    def label(self, name: str) -> str:
        """What to call a file in messages."""
        return f"{self.path}/{name}"

    def content(self, name: str) -> bytes:
        """The bytes of a file."""
        try:
            info = self._open().getinfo(name)
            if info.file_size > self.max_bytes:
                raise UserError(f"{self.label(name)!r} has {info.file_size:,} bytes; read.max_bytes allows less")
            return self._open().read(info)
        except KeyError:
            raise UserError(f"can't read {self.label(name)!r}: there is no such file") from None
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, EOFError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"can't read {self.label(name)!r}: {error}; mend the archive") from None
        except Exception as error:  # zlib.error, lzma.LZMAError
            raise UserError(f"can't read {self.label(name)!r}: {error}; the archive is damaged") from None


def _legible(names: list[str], where: Path) -> list[str]:
    """The names, all of which can be stored in a table and told in one line."""
    odd = next((n for n in names if re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", n)), None)
    if odd is not None:
        raise UserError(f"the file name {odd!r} in {str(where)!r} is not UTF-8 or not one line: rename it")
    return names


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
