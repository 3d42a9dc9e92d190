"""Screens whose tables name the files of every image: BBBC021, and load_data.csv of Cell Painting.

No pixel is read; what a table names is found below one root folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffex.errors import UserError
from diffex.paths import Folder
from diffex.screen import Read
from diffex.sources import Files, FileSource
from diffex.tables import CLASS_COLUMNS, Table, join, metadata_columns, number, read_table, texts, typed, unique_rows

BBBC021 = {"DNA": "DAPI", "tubulin": "Tubulin", "actin": "Actin"}
BBBC021_TABLE = r"(?:.*[_.-])?{}(?:[_.-].*)?\.csv(?:\.gz)?"


# ----------------------------------------------------------------------------------------------------------------------
# Files that a table names


class Named:
    """Finds the files that the rows of a table name, below one root.

    Args:
        folder: where paths start from unless ``read.root`` says otherwise.
        read: the settings ``root``, ``strip`` and ``max_bytes``.
    """

    def __init__(self, folder: Path, read: Read) -> None:
        self.tree = Folder(Path(read.root) if read.root else folder, max_bytes=read.max_bytes)
        self.root, self.strip = self.tree.root, (read.strip or "").replace("\\", "/")
        self._folders: dict[str, str | None] = {}

    def find(self, folder: str, file: str, where: str) -> str | None:
        """Name of a file below the root, whether it is there or not; None where its whole folder is absent.

        Raises:
            UserError: the path leads out of the root; the message proposes ``read.strip`` where that would mend it.
        """
        folder = folder.replace("\\", "/")
        if folder not in self._folders:
            self._folders[folder] = self._folder(folder, file, where)
        base = self._folders[folder]
        if base is None:
            return None
        try:
            found = self.root.locate(f"{base}/{file}")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return f"{base}/{file}".lstrip("/") if found is None else found.relative_to(self.root.path).as_posix()

    def _folder(self, folder: str, file: str, where: str) -> str | None:
        path = folder.removeprefix("file://").removeprefix("file:")
        if self.strip and path.startswith(self.strip):
            path = path[len(self.strip) :].lstrip("/")
        try:
            if "://" in path:
                raise UserError(f"{path!r} is not on this disk, and nothing is downloaded")
            for base in (path, f"images/{path}"):
                if base == path or not path.startswith("/"):
                    found = self.root.locate(base)
                    if found is not None and found.is_dir():
                        return found.relative_to(self.root.path).as_posix()
        except UserError as error:
            raise UserError(f"{where}: {error}{self.hint(folder, file)}") from None
        return None

    def hint(self, folder: str, file: str) -> str:
        """Which ``read.strip`` would bring a path below the root, if any does."""
        path = f"{folder}/{file}" if folder else file
        parts = path.split("/")
        for i in range(1, len(parts)):
            rest = "/".join(parts[i:])
            if ".." not in parts[i:] and parts[i] and self.root.locate(rest) is not None:
                return f"; perhaps --set read.strip={path[: len(path) - len(rest)]!r} (below {str(self.root.path)!r})"
        return ""


def _listed(
    table: Table, columns: Mapping[str, tuple[list[str], list[str]]], metadata: Mapping[str, list[str]], named: Named,
    read: Read,
) -> FileSource:  # fmt: skip
    """Images of a table: for each channel the columns of its folders and its file names."""
    files = {f"file of {c}": [f"{p}/{f}" for p, f in zip(*pair, strict=True)] for c, pair in columns.items()}
    first = unique_rows(table, files, metadata)
    rows: list[Files] = []
    kept: list[int] = []
    absent: dict[str, tuple[str, str]] = {}
    for row in first.values():
        pairs = [(paths[row], names[row]) for paths, names in columns.values()]
        found = [named.find(p, f, table.where(row)) if f else None for p, f in pairs]
        if not any(f for _, f in pairs):
            raise UserError(f"{table.where(row)} names no image file")
        if all(name is None for name in found):
            absent.update({p: (p, f) for p, f in pairs if f})
            continue
        files_of = zip(found, pairs, strict=True)
        rows.append(tuple((f"{p}/{f}" if name is None else name,) if f else () for name, (p, f) in files_of))
        kept.append(row)
    if not rows:
        path, file = next(iter(absent.values()), ("", ""))
        if not absent:
            raise UserError(f"{table.name} has a header but no rows")
        raise UserError(
            f"{table.name}: none of the files that it names is below {str(named.root.path)!r}, e.g. {path}/{file}: "
            f"name the folder with read.root{named.hint(path, file)}"
        )
    notes = []
    if len(first) < len(table):
        notes.append(f"{table.name}: {len(table) - len(first):,} rows say the same as others and are passed over")
    if absent:
        notes.append(
            f"{len(first) - len(kept):,} of {len(first):,} images are left out: their folders are not there "
            f"({len(absent)} folders, e.g. {next(iter(absent))})"
        )
    values = {name: typed([column[r] for r in kept], name) for name, column in metadata.items()}
    values.setdefault("Metadata_File", np.array([next(p[0] for p in row if p) for row in rows]))
    source = FileSource(
        named.tree, rows, values, channels=tuple(columns), projection=read.projection, max_values=read.max_values
    )
    source.content, source.notes = "fields", tuple(notes)
    return source


def bbbc021_table(folder: Path, kind: str) -> Path | None:
    """The table of BBBC021 of a kind ('image', 'moa', 'compound') in a folder, by its name."""
    pattern = re.compile(BBBC021_TABLE.format(kind), re.IGNORECASE)
    found = [p for p in folder.iterdir() if pattern.fullmatch(p.name) and p.is_file()]
    return min(found, key=lambda p: (len(p.name), p.name), default=None)


def bbbc021(path: Path, read: Read) -> FileSource:
    """List a screen in BBBC021's layout: image, moa and (if it is there) compound tables, and folders of plates.

    Args:
        path: the folder with the tables, or the image table itself.
        read: the settings.

    Returns:
        The fields of all plates that are there; the class is ``Metadata_MOA``.

    Raises:
        UserError: no image table, columns that lack, rows that contradict each other, no plate at all.
    """
    folder = path if path.is_dir() else path.parent
    image = bbbc021_table(folder, "image") if path.is_dir() else path
    if image is None:
        raise UserError(f"{str(folder)!r} has no table such as BBBC021_v1_image.csv (read.layout = bbbc021)")
    table = read_table(image, read.max_bytes)
    columns = {
        name: (table.column(f"PathName_{stain}"), table.column(f"FileName_{stain}")) for name, stain in BBBC021.items()
    }
    told = metadata_columns(table)
    lower = {name.lower(): values for name, values in told.items()}
    metadata = {}
    for name in ("Plate", "Well", "Compound", "Concentration", "Replicate"):
        values = lower.get(f"metadata_{name.lower()}")
        if values is None and name in ("Compound", "Concentration"):
            table.column(f"Image_Metadata_{name}")  # raises, with the nearest name
        if values is not None:
            metadata[f"Metadata_{name}"] = values
    for row, value in enumerate(metadata["Metadata_Concentration"]):
        if number(value) is None:
            raise UserError(f"{table.where(row)}: concentration {value!r} is not a number")
    paths, names = columns["DNA"]
    plates = [p.replace("\\", "/").rstrip("/").split("/")[-1] for p in paths]
    metadata.setdefault("Metadata_Plate", plates)
    sites = [re.search(r"_s(\d+)_", n) for n in names]
    metadata["Metadata_Site"] = [m[1] if m else "" for m in sites]
    weeks = [re.search(r"Week\d+", f"{p}/{plate}") for p, plate in zip(paths, plates, strict=True)]
    metadata["Metadata_Week"] = [m[0] if m else "" for m in weeks]

    source = _listed(table, columns, metadata, Named(folder, read), read)
    source.metadata["Metadata_Concentration"] = source.metadata["Metadata_Concentration"].astype(np.float64)
    tables = [image]
    for kind, column, name in (("moa", "moa", "MOA"), ("compound", "smiles", "SMILES")):
        file = bbbc021_table(folder, kind)
        if file is None:
            continue
        more = read_table(file, read.max_bytes)
        wanted = {"Compound": more.column("compound"), name: more.column(column)}
        if kind == "moa" and more.find("concentration"):
            wanted["Concentration"] = more.column("concentration")
        source.metadata = join(source.metadata, Table(more.name, wanted, more.lines))
        source.metadata[f"Metadata_{name}"] = source.metadata[f"Metadata_{name}"].astype(np.str_)
        tables.append(file)
    if "Metadata_MOA" in source.metadata:
        unknown = int((source.metadata["Metadata_MOA"] == "").sum())
        if unknown:
            source.notes += (
                f"{unknown:,} of {len(source.rows):,} images have no mechanism of action in the moa table",
            )
    source.name, source.tables, source.class_columns = str(path), tuple(tables), ("Metadata_MOA",)
    return source


def load_data_tables(path: Path) -> list[Path]:
    """The load_data tables at or below a path, at most four folders deep; of one folder, those without Illum files."""
    if path.is_file():
        return [path]
    for depth in range(5):
        found = [p for p in path.glob("*/" * depth + "*") if _is_load_data(p)]
        if found:
            plain = [p for p in found if "illum" not in p.name.lower()]
            folders = {p.parent for p in plain}
            return sorted(plain + [p for p in found if p.parent not in folders])
    return []


def _is_load_data(path: Path) -> bool:
    name = path.name.lower().removesuffix(".gz")
    return "load_data" in name and name.endswith((".csv", ".parquet")) and path.is_file()


def load_data(path: Path, read: Read) -> FileSource:
    """List the images of CellProfiler's ``load_data.csv`` (Cell Painting, JUMP), one or several, CSV or Parquet.

    Args:
        path: the table, or a folder with tables.
        read: the settings; ``root`` and ``strip`` tell where the paths in the table lie here.

    Raises:
        UserError: no table, no columns of files, paths outside the root, or tables with different channels.
    """
    files = load_data_tables(path)
    if not files:
        raise UserError(f"{str(path)!r} holds no load_data.csv (read.layout = load_data)")
    tables = [read_table(f, read.max_bytes) for f in files]
    channels = [_load_data_channels(t) for t in tables]
    for t, c in zip(tables, channels, strict=True):
        if set(c) != set(channels[0]):
            raise UserError(
                f"{t.name} has channels {', '.join(c)}, but {tables[0].name} has {', '.join(channels[0])}: "
                f"read them apart"
            )
    metadata = [metadata_columns(t, only_prefixed=True) for t in tables]
    every = list(dict.fromkeys(name for m in metadata for name in m))
    folder = path if path.is_dir() else path.parent
    named = Named(folder, read)
    parts = []
    for t, c, m in zip(tables, channels, metadata, strict=True):
        filled = {name: m.get(name, [""] * len(t)) for name in every}
        parts.append(_listed(t, {name: c[name] for name in channels[0]}, filled, named, read))
    source = parts[0]
    if len(parts) > 1:
        source.rows = [row for p in parts for row in p.rows]
        source.metadata = {n: typed([t for p in parts for t in texts(p.metadata[n])], n) for n in source.metadata}
        source.class_names = np.full(len(source.rows), "")
    source.notes = tuple(note for p in parts for note in p.notes)
    source.name, source.tables, source.class_columns = str(path), tuple(files), CLASS_COLUMNS
    return source


def _load_data_channels(table: Table) -> dict[str, tuple[list[str], list[str]]]:
    """Columns of folders and file names of each channel, by its name."""
    channels = {}
    for column in table.columns:
        match = re.fullmatch(r"(?:Image_)?(FileName|URL)_(?!Illum)(?:Orig)?(.+)", column)
        if not match or match[2] in channels:
            continue
        full = re.sub(r"^(?:Image_)?(?:FileName|URL)_", "", column)
        for frame in (f"Frame_{full}", f"Series_{full}"):
            if (found := table.find(frame)) and set(table.columns[found]) - {"", "0"}:
                raise UserError(
                    f"{table.name}: column {frame!r} picks planes of files with several; that can't be read"
                )
        files, folders = table.find(f"FileName_{full}"), table.find(f"PathName_{full}")
        urls = table.find(f"URL_{full}")
        if files and (folders or not urls):
            names = table.columns[files]
            channels[match[2]] = (table.columns[folders] if folders else [""] * len(table), names)
        else:
            whole = [u.replace("\\", "/").rpartition("/") for u in table.column(f"URL_{full}")]
            channels[match[2]] = ([w[0] for w in whole], [w[2] for w in whole])
    if not channels:
        raise UserError(
            f"{table.name} has no columns FileName_... and PathName_..., or URL_...; it has {', '.join(table.columns)}"
        )
    return channels
