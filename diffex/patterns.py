"""Screens whose files tell what they show by their names, and folders of images with a table of attributes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffex.errors import UserError
from diffex.paths import Archive, Folder, folded
from diffex.readers import ENDINGS
from diffex.screen import Read
from diffex.sources import Files, FileSource
from diffex.tables import CLASS_COLUMNS, TABLES, metadata_columns, number, read_table, typed, unique_rows, well_name

STAINS = (
    r"DAPI|Hoechst(?:\d+)?|DNA|GFP|RFP|YFP|CFP|mCherry|FITC|TRITC|Texas ?Red|Cy\d(?:\.5)?|Alexa\d+|Tubulin|Actin|Golgi|"
    r"Mito|ER|AGP|RNA|BF|red|green|blue|far[_-]?red|cyan|magenta|yellow"
)
MICROSCOPES: dict[str, str] = {
    "ImageXpress": (
        r"(?:^|/|_)(?P<Well>[A-P]\d\d)(?:_s(?P<Site>\d+))?_(?P<Channel>w\d(?=[0-9A-Fa-f]{8}-)|w\d+)"
        r"[^/_]*\.(?i:tiff?)$"
    ),
    "Harmony": r"(?:^|/)r(?P<Row>\d+)c(?P<Column>\d+)f(?P<Site>\d+)p(?P<Z>\d+)-(?P<Channel>ch\d+)[^/]*\.(?i:tiff?)$",
    "InCell": (
        r"(?:^|/)(?P<Well>[A-P] - ?\d+)\(fld (?P<Site>\d+) wv (?P<Channel>[^/)]+?)(?: - [^/)]+)?\)"
        r"[^/]*\.(?i:tiff?)$"
    ),
    "plate_well_site_channel": (
        r"(?:^|/)(?P<Plate>[^/]+?)_(?P<Well>[A-P]\d\d)_(?i:s|f|site|field)(?P<Site>\d+)_(?P<Channel>[^/_.]+)"
        r"\.(?i:tiff?|png)$"
    ),
}
"""File names of common microscopes and exports, tried in turn; their images are fields."""
ANY = "|".join(e[1:] for e in ENDINGS)
GENERIC = (
    rf"(?P<Image>.*)[ _.-](?P<Channel>(?i:{STAINS})|(?i:ch|c|w|channel)[ _-]?\d{{1,2}})\.(?i:{ANY})$",
    rf"(?:^|.*/)(?P<Channel>(?i:{STAINS})|(?i:ch|c|w|channel)[ _-]?\d{{1,2}})/(?P<Image>.*)\.(?i:{ANY})$",
)


def open_tree(path: Path, read: Read) -> Folder | Archive:
    """The files below a folder, or in a ZIP archive."""
    return (
        Folder(path, Path(read.root) if read.root else None, read.max_bytes)
        if path.is_dir()
        else Archive(path, read.max_bytes)
    )


def image_names(tree: Folder | Archive) -> list[str]:
    """Names of the images in a tree, without microscopes' thumbnails."""
    return [n for n in tree.names() if "_thumb" not in n.lower()]


def auto_pattern(names: Sequence[str], several: bool = True) -> tuple[str, str] | None:
    """The first known pattern that all names follow: (name of the microscope or "", pattern).

    Args:
        names: files.
        several: most images must have two or more channels by it; otherwise microscopes' patterns need not.
    """
    for name, pattern in (*MICROSCOPES.items(), *(("", p) for p in GENERIC)):
        matches = [re.search(pattern, n) for n in names]
        if not names or not all(matches):
            continue
        images: dict[tuple[str, ...], set[str]] = {}
        for n, m in zip(names, matches, strict=True):
            assert m is not None
            images.setdefault(_image_key(n, m), set()).add(m["Channel"].lower())
        if (name and not several) or 2 * sum(len(c) > 1 for c in images.values()) > len(images):
            return name, pattern
    return None


def files(path: Path, read: Read) -> FileSource:
    """List a folder (or ZIP archive) of files by a pattern of their names: a file for each channel, or one for all.

    Args:
        path: the folder or archive.
        read: ``pattern`` with named groups: ``Channel`` tells files of one image apart, ``Z`` focal planes, ``Class``
            is the class, ``Key`` the key in ``table``; any other group becomes metadata.  Without it, known ones are
            tried.

    Raises:
        UserError: no pattern fits, files that it can't tell apart, or a channel that some image lacks.
    """
    tree = open_tree(path, read)
    names = image_names(tree)
    if not names:
        raise UserError(f"{str(path)!r} holds no image file ({', '.join(ENDINGS)})")
    known = ("", read.pattern) if read.pattern else auto_pattern(names) or auto_pattern(names, several=False)
    if known is None:
        raise UserError(
            f"the file names in {str(path)!r}, e.g. {names[0]!r}, follow no pattern that is known: set read.pattern"
        )
    try:
        pattern = re.compile(known[1])
    except re.error as error:
        raise UserError(f"read.pattern {known[1]!r} is no regular expression: {error}") from None
    matches = [(n, m) for n in names if (m := pattern.search(n))]
    if not matches:
        raise UserError(f"read.pattern {known[1]!r} fits no file in {str(path)!r}, e.g. not {names[0]!r}")
    rows, labels, channels = _group(matches, pattern, tree)
    firsts = [next(p[0] for p in row if p) for row in rows]
    for name, label in zip(firsts, labels, strict=True):
        _complete(label, name, tree)
    kinds = list(dict.fromkeys(k for label in labels for k in label if k not in ("Class", "Key")))
    metadata = {f"Metadata_{k}": typed([label.get(k, "") for label in labels], k) for k in kinds}
    metadata["Metadata_File"] = np.array(firsts)
    source = FileSource(
        tree, rows, metadata, channels=channels, projection=read.projection, max_values=read.max_values
    )  # fmt: skip
    if "Class" in pattern.groupindex:
        source.class_names = np.array([label.get("Class", "") for label in labels])
    elif not read.table:
        source.class_names = top_folders([_without_channel(n, pattern) for n in firsts])
    source.content = "fields" if known[0] else "cells"
    source.class_columns = CLASS_COLUMNS
    if len(matches) < len(names):
        source.notes += (f"{len(names) - len(matches):,} of {len(names):,} image files do not fit read.pattern",)
    if read.table:
        attach(source, firsts, [label.get("Key") for label in labels], read)
    return source


def _image_key(name: str, match: re.Match[str]) -> tuple[str, ...]:
    """What the files of one image share: their folder, and all named groups but the channel's and the focal plane's.

    Where the pattern names nothing else, it is the whole name without the channel.
    """
    groups = {k: v or "" for k, v in match.groupdict().items() if k not in ("Channel", "Z")}
    cut = _without_channel(name, match.re)
    return (cut,) if not groups else (cut.rpartition("/")[0] if "/" in name else "", *groups.values())


def _group(
    matches: Sequence[tuple[str, re.Match[str]]], pattern: re.Pattern[str], tree: Folder | Archive
) -> tuple[list[Files], list[dict[str, str]], tuple[str, ...] | None]:
    """Files, labels and channels of the images."""
    if "Channel" not in pattern.groupindex:
        return [((n,),) for n, _ in matches], [_labels(m) for _, m in matches], None
    images: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    labels: dict[tuple[str, ...], dict[str, str]] = {}
    for name, match in matches:
        key = _image_key(name, match)
        channel, z = match["Channel"] or "", match.groupdict().get("Z") or ""
        planes = images.setdefault(key, {}).setdefault(channel, {})
        if z in planes:
            raise UserError(
                f"{tree.label(name)!r} and {tree.label(planes[z])!r} are the same channel of the same image by "
                f"read.pattern: add a named group that tells them apart"
            )
        planes[z] = name
        labels.setdefault(key, _labels(match))
    channels = tuple(sorted({c for image in images.values() for c in image}, key=_natural))
    rows = [
        tuple(tuple(image.get(c, {})[z] for z in sorted(image.get(c, {}), key=_natural)) for c in channels)
        for image in images.values()
    ]
    return rows, list(labels.values()), channels


def _labels(match: re.Match[str]) -> dict[str, str]:
    found = {k: v or "" for k, v in match.groupdict().items() if k not in ("Channel", "Z")}
    if "Row" in found and "Column" in found and "Well" not in found and (found["Row"] + found["Column"]).isdecimal():
        row, column = int(found.pop("Row")), int(found.pop("Column"))
        found = {"Well": f"{chr(64 + row) if 1 <= row <= 26 else row}{column:02d}", **found}
    if "Well" in found:
        found["Well"] = well_name(found["Well"].replace(" ", ""))
    return found


def _complete(label: dict[str, str], name: str, tree: Folder | Archive) -> None:
    """Where the name tells the well but not the plate, the folder does."""
    if "Well" in label and "Plate" not in label:
        folder = re.sub(r"/?Images$", "", name.rpartition("/")[0])
        label["Plate"] = folder or tree.path.resolve().stem


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort key that puts w2 before w10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text) if part]


def _without_channel(name: str, pattern: re.Pattern[str]) -> str:
    """A file's name without the text that tells its channel, be it a folder or a part of the name."""
    match = pattern.search(name)
    if match is None or "Channel" not in pattern.groupindex:
        return name
    start, end = match.span("Channel")
    return (name[:start] + name[end:]).replace("//", "/").strip("/")


def top_folders(names: Sequence[str]) -> NDArray[np.str_]:
    """The class of each file by its top folder; "" for all where some lie in none."""
    tops = [n.split("/")[0] if "/" in n else "" for n in names]
    return np.full(len(names), "") if "" in tops else np.array(tops)


def attributes(path: Path, read: Read) -> FileSource:
    """List a folder (or ZIP archive) of images with a table of their attributes, such as FFHQ or CelebA.

    Args:
        path: the folder or archive.
        read: ``table`` (without it, the one table in the folder), ``key``, ``class_column``.

    Raises:
        UserError: no table, no column that names the images, or images that it can't tell apart.
    """
    tree = open_tree(path, read)
    names = image_names(tree)
    if not names:
        raise UserError(f"{str(path)!r} holds no image file ({', '.join(ENDINGS)})")
    source = FileSource(tree, [((n,),) for n in names], {"Metadata_File": np.array(names)}, max_values=read.max_values)
    attach(source, names, [None] * len(names), read, one_each=True)
    source.class_columns = CLASS_COLUMNS
    return source


def beside(path: Path) -> list[Path]:
    """Tables that lie in a folder, by their endings."""
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.name.lower().removesuffix(".gz").endswith(TABLES) and p.is_file())


def table_path(path: Path, read: Read) -> Path:
    """The file that ``read.table`` names: from here, or from the source."""
    if read.table is None:
        found = beside(path)
        if len(found) == 1:
            return found[0]
        raise UserError(f"name the table of the images with read.table: {str(path)!r} holds {len(found)} tables")
    here = Path(read.table)
    if here.is_file():
        return here
    below = (path if path.is_dir() else path.parent) / read.table
    if below.is_file():
        return below
    raise UserError(f"there is no table {read.table!r} (read.table)")


def attach(
    source: FileSource, names: Sequence[str], keys: Sequence[str | None], read: Read, one_each: bool = False
) -> None:
    """Add the columns of ``read.table`` to the images whose file name (or key) its key column names.

    Args:
        source: images; those without a row are taken out, with a note.
        names: file of each image.
        keys: what the pattern's group ``Key`` says of each; None: the file's name tells.
        read: the settings ``table`` and ``key``.
        one_each: a row belongs to one image only.
    """
    file = table_path(Path(source.name), read)
    table = read_table(file, read.max_bytes)
    if read.key:
        table.column(read.key, setting="read.key")
        candidates = [table.find(read.key) or ""]
    else:
        candidates = list(table.columns)
    forms = [list(_image_forms(name, key)) for name, key in zip(names, keys, strict=True)]
    best: tuple[tuple[int, int], str, list[int | None]] | None = None
    for column in candidates:
        known: dict[str, int] = {}
        for row, value in enumerate(table.columns[column]):
            for form in _value_forms(value):
                known.setdefault(form, row)
        rows = [next((known[f] for f in image if f in known), None) for image in forms]
        score = (sum(r is not None for r in rows), len(set(table.columns[column])))
        if best is None or score > best[0]:
            best = (score, column, rows)
    if best is None or best[0][0] == 0:
        which = f"column {read.key!r} names none of" if read.key else "no column names"
        raise UserError(
            f"{table.name}: {which} the images, e.g. {names[0]!r}, by path, file name, stem or number (read.key)"
        )
    _, column, rows = best
    metadata = metadata_columns(table)
    unique_rows(table, {"key": table.columns[column]}, metadata)
    kept = [i for i, row in enumerate(rows) if row is not None]
    used = [row for row in rows if row is not None]
    if one_each and len(set(used)) < len(used):
        twice = next(row for row in used if used.count(row) > 1)
        pair = [names[i] for i in kept if rows[i] == twice]
        raise UserError(f"{table.where(twice)} fits {pair[0]!r} and {pair[1]!r}: point to the folder of one of them")
    if len(kept) < len(names):
        source.notes += (
            f"{len(names) - len(kept):,} of {len(names):,} images are left out: {table.name} has no row for them",
        )
    source.rows = [source.rows[i] for i in kept]
    source.class_names = source.class_names[kept]
    source.metadata = {n: v[kept] for n, v in source.metadata.items()}
    for name, values in metadata.items():
        if name not in source.metadata:
            source.metadata[name] = typed([values[row] for row in used], name)
    source.tables += (file,)


def _image_forms(name: str, key: str | None) -> Iterator[str]:
    """What a table may call an image, the most telling first."""
    file = folded(name)
    base = file.rpartition("/")[2]
    stem = base.rpartition(".")[0]
    if key is not None:
        yield folded(key)
        return
    yield from (file, base, stem)
    if stem.isdecimal():
        yield f"#{int(stem)}"


def _value_forms(value: str) -> Iterator[str]:
    """What the value of a key column may mean."""
    text = folded(value.replace("\\", "/"))
    base = text.rpartition("/")[2]
    yield from (text, base)
    if base.endswith(ENDINGS):
        yield base.rpartition(".")[0]
    as_number = number(value)
    if as_number is not None and as_number == int(as_number):
        yield f"#{int(as_number)}"
