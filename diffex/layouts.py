"""Screens as they lie on the disk: which layout a path has, and the images that it lists.

``open_screen`` opens any layout with the settings of an ingest; ``open_source`` opens what an experiment reads without
one: single cells.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from diffex.arrays import ArraySource
from diffex.config import Assay, Data
from diffex.errors import ImageError, UserError, did_you_mean
from diffex.listings import bbbc021, bbbc021_table, load_data, load_data_tables
from diffex.ome import OME_ENDINGS, OmeTiffSource, OmeZarrSource, is_zarr
from diffex.patterns import attributes, auto_pattern, beside, files, image_names, open_tree, table_path
from diffex.readers import npy_header
from diffex.screen import Read
from diffex.sources import AssaySource, FileSource, FolderSource, Listed, ParquetSource, Source, default_channels
from diffex.tables import TABLES, join, metadata_columns, read_table, texts, typed

PARQUET = (".parquet", ".pq")


def open_source(data: Data, simulated: Assay) -> Source:
    """The source that an experiment's settings name.

    Raises:
        UserError: no such path, nothing readable in it, or fields instead of single cells.
    """
    if data.path is None:
        return AssaySource(simulated, data.channels)
    path = Path(data.path)
    if not path.exists():
        raise UserError(f"there is no file or folder {str(path)!r} (data.path)")
    layout = detect(path, Read(class_column=data.class_column))
    if layout is None and path.is_file():
        raise UserError(
            f"{str(path)!r} is neither a folder with one sub-folder per class nor a .parquet file (data.path)"
        )
    if layout in (None, "folder"):
        return FolderSource(path)
    source = open_screen(path, Read(layout=layout, class_column=data.class_column))
    if source.content == "fields":
        raise UserError(
            f"{str(path)!r} shows fields of many cells: make a store of it with diffex data ingest (data.path)"
        )
    return source


def open_screen(path: Path, read: Read, *, lenient: bool = False) -> Listed:
    """Open a screen of any layout and list its images.

    Args:
        path: folder or file.
        read: the settings ``read.*`` of an ingest.
        lenient: list what can be listed; the rest is ``unlisted``, or complained of when it is read.

    Returns:
        The images.  Those without a class, or of a class that ``read.classes`` does not name, have the class "".

    Raises:
        UserError: no such path, no such layout, or anything in it that the user must mend, naming file and setting;
            ``ImageError`` where only single images are to blame.
    """
    if not path.exists():
        raise UserError(f"there is no file or folder {str(path)!r}")
    if (path / "store.json").is_file():
        raise UserError(f"{str(path)!r} is an image store already: experiments read it as it is (data.path)")
    layout = detect(path, read) if read.layout == "auto" else read.layout
    if layout is None:
        raise UserError(
            f"{str(path)!r} has no layout that is known: name it with read.layout ({', '.join(OPENERS)}), or put each "
            f"class's images into a folder of its own"
        )
    source = OPENERS[layout](path, read)
    if not len(source.class_names):
        raise UserError(f"{source.name} lists no image")
    if read.content != "auto":
        source.content = "cells" if read.content == "cells" else "fields"
    if layout == "numpy" and read.table:
        _by_order(source, table_path(path, read), read)
    for file in read.join:
        table = read_table(Path(file), read.max_bytes)
        source.metadata = join(source.metadata, table)
        source.tables += (Path(file),)
    _choose_classes(source, read)
    _choose_channels(source, read)
    if not lenient:
        _check_complete(source, layout)
    return source


def _open_folder(path: Path, read: Read) -> Listed:
    root = Path(read.root) if read.root else None
    return FolderSource(path, root=root, max_values=read.max_values, max_bytes=read.max_bytes)


def _open_parquet(path: Path, read: Read) -> Listed:
    return ParquetSource(path, classes=read.class_column is None and not read.join, max_values=read.max_values)


OPENERS: dict[str, Callable[[Path, Read], Listed]] = {
    "bbbc021": bbbc021,
    "load_data": load_data,
    "folder": _open_folder,
    "files": files,
    "table": attributes,
    "ome_tiff": OmeTiffSource,
    "ome_zarr": OmeZarrSource,
    "numpy": ArraySource,
    "parquet": _open_parquet,
}


# ----------------------------------------------------------------------------------------------------------------------
# Which layout


def detect(path: Path, read: Read) -> str | None:
    """The layout of a path by its names and headers; None where it has none that is known."""
    return _detect_folder(path, read) if path.is_dir() else _detect_file(path, read)


def _detect_file(path: Path, read: Read) -> str | None:
    name = path.name.lower()
    if name.endswith(PARQUET):
        with path.open("rb") as file:
            parquet = file.read(4) == b"PAR1"
        return "load_data" if "load_data" in name and parquet else "parquet"
    if name.removesuffix(".gz").endswith(TABLES):
        columns = read_table(path, read.max_bytes)
        if columns.find("FileName_DAPI") and columns.find("FileName_Tubulin") and columns.find("FileName_Actin"):
            return "bbbc021"
        return "load_data" if any(re.match(r"(Image_)?(FileName|URL)_", c) for c in columns.columns) else None
    if name.endswith((".npy", ".npz")):
        return "numpy"
    if name.endswith((".tif", ".tiff")):
        return "ome_tiff"
    if name.endswith(".zip"):
        return _detect_names(image_names(open_tree(path, read)), path, read)
    return None


def _detect_folder(path: Path, read: Read) -> str | None:
    if is_zarr(path):
        return "ome_zarr"
    if read.pattern:
        return "files"
    if bbbc021_table(path, "image") and bbbc021_table(path, "moa"):
        return "bbbc021"
    if load_data_tables(path):
        return "load_data"
    if any(is_zarr(p) for p in (*path.glob("*.zarr"), *path.glob("*/*.zarr"))):
        return "ome_zarr"
    return _detect_names(image_names(open_tree(path, read)), path, read)


def _detect_names(names: list[str], path: Path, read: Read) -> str | None:
    if read.table:
        return "files" if read.pattern else "table"
    if names and all(n.lower().endswith(OME_ENDINGS) for n in names):
        return "ome_tiff"
    arrays = [n for n in names if n.lower().endswith(".npy") and "/" not in n]
    if arrays and len(arrays) == len(names) and path.is_dir():
        with (path / arrays[0]).open("rb") as file:
            try:
                return "numpy" if len(npy_header(file)[0]) == 4 else None
            except ValueError:
                return None
    if read.pattern or auto_pattern(names):
        return "files"
    if not all("/" in n for n in names) and auto_pattern(names, several=False):
        return "files"
    if read.class_column and not read.join and len(beside(path)) == 1:
        return "table"
    return "folder" if path.is_dir() or any("/" in n for n in names) else None


# ----------------------------------------------------------------------------------------------------------------------
# What holds for every layout


def _by_order(source: Listed, file: Path, read: Read) -> None:
    """Metadata of arrays: the table's rows, in the order of the images."""
    table = read_table(file, read.max_bytes)
    if len(table) != len(source.class_names):
        raise UserError(f"{table.name} has {len(table)} rows, but {source.name} has {len(source.class_names)} images")
    source.metadata.update({n: typed(values, n) for n, values in metadata_columns(table).items()})
    source.tables += (file,)
    source.class_columns += ("Metadata_Class", "Metadata_Class_name", "Metadata_Label")


def _choose_classes(source: Listed, read: Read) -> None:
    """The class of each image: by the column that is named, by the layout, or by the one column that may be meant."""
    lower = {n.removeprefix("Metadata_").lower(): n for n in source.metadata if n.startswith("Metadata_")}
    column = None
    if read.class_column is not None:
        column = lower.get(read.class_column.removeprefix("Metadata_").lower())
        if column is None:
            bare = [n.removeprefix("Metadata_") for n in source.metadata]
            hint = did_you_mean(read.class_column.removeprefix("Metadata_"), bare)
            raise UserError(f"{source.name} has no column {read.class_column!r}: {hint} (read.class_column)")
    elif not (source.class_names != "").any():
        known = {n.removeprefix("Metadata_").lower() for n in source.class_columns}
        found = [name for short, name in lower.items() if short in known]
        if len(found) != 1:
            raise UserError(
                f"which column is the class in {source.name}? Name it with read.class_column; there are "
                f"{', '.join(source.metadata) or 'none'}"
            )
        column = found[0]
    if column is not None:
        source.class_names = np.array(texts(source.metadata[column]), dtype=np.str_)
    present = sorted(set(source.class_names.tolist()) - {""})
    for name in read.classes:
        if name not in present:
            raise UserError(f"{source.name} has no class {name!r}: {did_you_mean(name, present)} (read.classes)")
    if read.classes:
        source.class_names = np.where(np.isin(source.class_names, read.classes), source.class_names, "")


def _choose_channels(source: Listed, read: Read) -> None:
    """Names of the channels, and which of them are read."""
    if not read.channels and not read.channel_names:
        return
    count = source.depth()
    names = read.channel_names or source.channels or default_channels(count)
    if len(names) != count or len(set(names)) < count:
        raise UserError(f"read.channel_names must give {count} different names, as {source.name} has {count} channels")
    keep = []
    for channel in read.channels or names:
        lower = [n.lower() for n in names]
        if channel.lower() in lower:
            keep.append(names.index(channel) if channel in names else lower.index(channel.lower()))
        elif channel.isdecimal() and int(channel) < count:
            keep.append(int(channel))
        else:
            raise UserError(
                f"read.channels asks for {channel!r}, but {source.name} has {', '.join(names)} (or 0 to {count - 1})"
            )
    if len(set(keep)) < len(keep):
        raise UserError(f"read.channels = {list(read.channels)} names a channel twice")
    source.channels = tuple(names[k] for k in keep)
    source.keep = tuple(keep) if read.channels else None


def _check_complete(source: Listed, layout: str) -> None:
    """Every file must have been listed, and of files that a pattern groups, every image needs all channels read."""
    if source.unlisted:
        raise ImageError(source.unlisted[0])
    if layout == "files" and isinstance(source, FileSource) and source.every is not None:
        for row in range(len(source.rows)):
            source.present(row)
