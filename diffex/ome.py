"""Files that hold many images each: OME-TIFF and OME-Zarr (plain images and plates).

Listing them reads headers only.  Of a stack of focal planes one plane is made (``read.projection``); every time point
is an image of its own.
"""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from diffex.errors import UserError
from diffex.paths import Folder, Root
from diffex.readers import check_size, check_tiles, normal, unreadable
from diffex.screen import Read
from diffex.sources import Content, Listed, project
from diffex.tables import typed, well_name

OME_ENDINGS = (".ome.tif", ".ome.tiff", ".ome.tf2", ".ome.btf")
WELL_IN_NAME = re.compile(
    r"(?:^|[_\-. ])(?P<Well>[A-P](?:2[0-4]|1\d|0?[1-9]))(?!\d)"
    r"(?:[_\-. ]*(?:site|fld|s|f)[_\-. ]?(?P<Site>\d+))?(?=[_\-. ]|$)"
)


T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """One image in a file of many: what is needed to read it, and what the file says of it."""

    file: str
    inner: str  # series, or path of the array inside the file
    axes: str
    shape: tuple[int, ...]
    time: int
    channels: tuple[str, ...]
    labels: Mapping[str, str]

    def size(self, axis: str) -> int:
        """Length along an axis; 1 where there is none."""
        return self.shape[self.axes.index(axis)] if axis in self.axes else 1


class PictureSource(Listed):
    """Images in OME files: channels, focal planes and time points by their axes."""

    content: Content = "fields"

    def __init__(self, path: Path, pictures: Sequence[Picture], read: Read) -> None:
        self.name, self.path, self.pictures, self.settings = str(path), path, pictures, read
        first = pictures[0]
        for p in pictures:
            if p.channels != first.channels:
                raise UserError(
                    f"{p.file} has channels {', '.join(p.channels)}, but {first.file} has {', '.join(first.channels)}: "
                    f"all images need the same"
                )
        self.channels = first.channels
        names = list(dict.fromkeys(name for p in pictures for name in p.labels))
        if all(p.time == 0 for p in pictures):
            names = [n for n in names if n != "Timepoint"]
        self.metadata = {f"Metadata_{n}": typed([p.labels.get(n, "") for p in pictures], n) for n in names}
        self.class_names = np.full(len(pictures), "")

    def list_each(self, found: Sequence[T], pictures: Callable[[T], Iterator[Picture]]) -> list[Picture]:
        """The pictures of all files; a file that can't be listed is ``unlisted``, unless there is no other.

        Raises:
            UserError: not one of them can be listed.
        """
        listed: list[Picture] = []
        for file in found:
            try:
                listed += list(pictures(file))
            except UserError as error:
                self.unlisted += (str(error),)
        if self.unlisted and not listed:
            raise UserError(self.unlisted[0])
        return listed

    def read(self, row: int) -> tuple[str, NDArray]:
        p = self.pictures[row]
        name = p.file + (f" image {p.inner}" if p.inner not in ("", "0") else "")
        name += f" time {p.time}" if p.size("T") > 1 else ""
        keep = range(len(p.channels)) if self.keep is None else self.keep
        check_size((p.size("Y"), p.size("X"), len(keep)), name, self.settings.max_values)
        how, depth = self.settings.projection, p.size("Z")
        try:
            plane = self.planes(p, name)
            stack = [project((normal(plane(c, z), name) for z in range(depth)), depth, how, name) for c in keep]
            return name, np.stack(stack, axis=2)
        except UserError:
            raise
        except Exception as error:  # what a damaged file makes a decoder raise is anybody's guess
            raise unreadable(name, error) from None

    @abstractmethod
    def planes(self, picture: Picture, name: str) -> Callable[[int, int], NDArray]:
        """A function from (channel, focal plane) to the (H, W) pixels of an image."""

    def depth(self) -> int:
        return len(self.pictures[0].channels)


# ----------------------------------------------------------------------------------------------------------------------
# OME-TIFF (and other TIFFs of many pages: ImageJ's stacks)


class OmeTiffSource(PictureSource):
    """An OME-TIFF file, or a folder of them: every series and time point is an image.

    Raises:
        UserError: no such files, or one that is no TIFF, or a set of files with a part missing.
    """

    def __init__(self, path: Path, read: Read) -> None:
        root = Path(read.root) if read.root else path if path.is_dir() else path.parent
        if path.is_dir():
            tree = Folder(path, root)
            names = tree.names((".tif", ".tiff", ".tf2", ".btf"))
            names = [n for n in names if n.lower().endswith(OME_ENDINGS)] or names
            files = [(n, path / n) for n in names]
        else:
            files = [(path.name, path)]
        pictures = self.list_each(files, lambda file: _tiff_pictures(file[1], file[0], read, Root(root)))
        if not pictures:
            raise UserError(f"{str(path)!r} holds no OME-TIFF image ({', '.join(OME_ENDINGS[:2])})")
        super().__init__(path, pictures, read)
        self._opened: tuple[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def planes(self, picture: Picture, name: str) -> Callable[[int, int], NDArray]:
        import tifffile

        if self._opened is None or self._opened[0] != picture.file:
            if self._opened is not None:
                self._opened[1].close()
            self._opened = (picture.file, tifffile.TiffFile(picture.file))
        series = self._opened[1].series[int(picture.inner)]
        paged = [(a, n) for a, n in zip(picture.axes, picture.shape, strict=True) if a in "TCZ"]
        samples = picture.size("S")
        whole = None if len(series.pages) == prod(n for _, n in paged) else series.asarray()

        def plane(channel: int, z: int) -> NDArray:
            at = {"T": picture.time, "C": channel // samples, "Z": z}
            if whole is not None:
                index = [at.get(a, slice(None)) for a in picture.axes]
                pixels, axes = whole[tuple(index)], "".join(a for a in picture.axes if a not in "TCZ")
            else:
                number = int(np.ravel_multi_index([at[a] for a, _ in paged], [n for _, n in paged])) if paged else 0
                page = series.pages[number]
                if page is None:
                    raise ValueError(f"the plane of channel {channel} is missing")
                pixels, axes = page.asarray(), page.axes
            if "S" in axes:
                pixels = np.take(pixels, channel % samples, axis=axes.index("S"))
            return np.asarray(pixels)

        return plane

    def files(self) -> list[Path]:
        return [*self.tables, *sorted({Path(p.file) for p in self.pictures})]


def _tiff_pictures(file: Path, name: str, read: Read, root: Root) -> Iterator[Picture]:
    import tifffile

    if file.stat().st_size > read.max_bytes:
        raise UserError(f"{str(file)!r} has {file.stat().st_size:,} bytes; read.max_bytes allows {read.max_bytes:,}")
    try:
        with tifffile.TiffFile(file) as tiff:
            if not len(tiff.pages):  # counting finds a ring of pages, which tiff.series would follow for ever
                raise ValueError("no page")
            xml = ElementTree.fromstring(tiff.ome_metadata) if tiff.ome_metadata else None
            own = _check_set(xml, file, root) if xml is not None else None
            for s in tiff.series:
                check_tiles(s.keyframe.chunks, read.max_values)
            series = [(str(s.axes), tuple(int(n) for n in s.shape), s.dtype) for s in tiff.series]
        places = _places(xml) if xml is not None else {}
    except UserError:
        raise
    except Exception as error:  # what a damaged file makes a decoder raise is anybody's guess
        raise unreadable(str(file), error) from None
    told = list(xml.iterfind("{*}Image")) if xml is not None else []
    for i, (axes, shape, kind) in enumerate(series):
        image = told[i] if len(told) == len(series) else None
        if own is not None and image is not None and image.get("ID") not in own:
            continue  # another file of the set begins it
        if kind is None or kind.kind not in "buif":
            raise UserError(f"{file}: pixels of type {kind} are no image; convert them to integers or floats")
        axes = axes.replace("Q", "C").replace("I", "C") if "C" not in axes else axes
        kept = [(a, n) for a, n in zip(axes, shape, strict=True) if a in "TCZYXS" or n > 1]
        axes, shape = "".join(a for a, _ in kept), tuple(n for _, n in kept)
        if set(axes) - set("TCZYXS") or len(set(axes)) < len(axes) or not {"Y", "X"} <= set(axes):
            raise UserError(f"{file}: axes {axes} of shape {shape}; only T, C, Z, Y, X can be read")
        count = prod(n for a, n in kept if a in "CS")
        check_size((shape[axes.index("Y")], shape[axes.index("X")], count), str(file), read.max_values)
        labels = {"File": name, **_name_labels(name, read.pattern)}
        if len(series) > 1:
            labels["Image"] = (image.get("Name") if image is not None else None) or str(i)
        labels.update(places.get(image.get("ID") or "", {}) if image is not None else {})
        for t in range(shape[axes.index("T")] if "T" in axes else 1):
            labels = {**labels, "Timepoint": str(t)}
            yield Picture(str(file), str(i), axes, shape, t, _channel_names(image, count), labels)


def _check_set(xml: ElementTree.Element, file: Path, root: Root) -> set[str] | None:
    """IDs of the images that begin in this file, where it is one of a set; every file of a set must be there."""
    if xml.find("{*}BinaryOnly") is not None:
        raise UserError(f"{str(file)!r} keeps its description in a companion file: convert it to plain OME-TIFF")
    images = {
        i.get("ID", ""): [u.get("FileName", "") for u in i.iterfind(".//{*}UUID")] for i in xml.iterfind("{*}Image")
    }
    beside = {n for names in images.values() for n in names if n and n != file.name}
    for name in sorted(beside):
        found = root.locate(str(file.parent.absolute() / name)) if "/" not in name and "\\" not in name else None
        if found is None or found.name != name:
            raise UserError(f"{str(file)!r} is part of a set of files, of which {name!r} is missing")
    return {i for i, names in images.items() if not names or names[0] in ("", file.name)} if beside else None


def _places(xml: ElementTree.Element) -> dict[str, dict[str, str]]:
    """Plate, well and site of each image, by its ID, as the plates of an OME description tell."""
    places = {}
    for plate in xml.iterfind("{*}Plate"):
        for well in plate.iterfind("{*}Well"):
            row, column = int(well.get("Row", 0)), int(well.get("Column", 0))
            letters = (chr(64 + row // 26) if row >= 26 else "") + chr(65 + row % 26)
            for site, sample in enumerate(well.iterfind("{*}WellSample"), 1):
                reference = sample.find("{*}ImageRef")
                if reference is not None:
                    places[reference.get("ID", "")] = {
                        "Plate": plate.get("Name") or plate.get("ID") or "", "Well": f"{letters}{column + 1:02d}",
                        "Site": str(site),
                    }  # fmt: skip
    return places


def _channel_names(image: ElementTree.Element | None, count: int) -> tuple[str, ...]:
    names: list[str] = []
    for i, channel in enumerate(image.iterfind("{*}Pixels/{*}Channel") if image is not None else ()):
        told = channel.get("SamplesPerPixel") or "1"
        samples = int(told) if told.isdecimal() else 1
        name = channel.get("Name") or channel.get("Fluor") or (f"channel {i}" if samples == 1 else "")
        names += (
            [name] if samples == 1 else [f"{name} {s}".strip() for s in ("red", "green", "blue", "alpha")[:samples]]
        )
    if len(names) == count and len(set(names)) == count:
        return tuple(names)
    return {1: ("grey",), 3: ("red", "green", "blue")}.get(count if image is None else 0) or tuple(
        f"channel {i}" for i in range(count)
    )


def _name_labels(name: str, pattern: str | None) -> dict[str, str]:
    """Plate, well, ... that the file's name tells, by the pattern of the settings or by habit."""
    match = re.search(pattern, name) if pattern else WELL_IN_NAME.search(Path(name).name.split(".")[0])
    found = {k: v for k, v in match.groupdict().items() if v is not None} if match else {}
    return {k: well_name(v) if k == "Well" else v for k, v in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# OME-Zarr


class OmeZarrSource(PictureSource):
    """An OME-Zarr image or plate (v0.4, v0.5), or a folder of them.

    Raises:
        UserError: zarr is not installed, a damaged description, or nothing in it.
    """

    def __init__(self, path: Path, read: Read) -> None:
        try:
            import zarr  # noqa: F401
        except ImportError:
            raise UserError("OME-Zarr needs the package zarr: pip install 'diffex[zarr]'") from None
        found = [path] if is_zarr(path) else sorted(p for p in path.glob("**/*.zarr") if is_zarr(p))
        self.root, self.max_values = Root(Path(read.root) if read.root else path), read.max_values
        pictures = self.list_each(found, lambda group: self._group(group, {"File": group.name}))
        if not pictures:
            raise UserError(f"{str(path)!r} holds no OME-Zarr image (multiscales) and no plate")
        super().__init__(path, pictures, read)

    def _group(self, path: Path, labels: dict[str, str]) -> Iterator[Picture]:
        """The images below a group: of a plate, of a converter's collection, or its own."""
        told = _attributes(path)
        if "plate" in told:
            plate = told["plate"]
            for well in _list(plate, "wells", path):
                folder = self._below(path, well.get("path"))
                name = well_name(str(well["path"]).replace("/", ""))
                for site in _list(_attributes(folder).get("well", {}), "images", folder):
                    place = {"Plate": str(plate.get("name") or path.stem), "Well": name, "Site": str(site.get("path"))}
                    yield from self._group(self._below(folder, site.get("path")), {**labels, **place})
        elif "multiscales" in told:
            yield from self._image(path, told, labels)
        elif "bioformats2raw.layout" in told:
            for folder in sorted((p for p in path.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)):
                yield from self._group(folder, {**labels, "Image": folder.name})
        else:
            raise UserError(f"{str(path)!r} is no OME-Zarr image or plate: its attributes hold no multiscales or plate")

    def _image(self, path: Path, told: Mapping[str, Any], labels: dict[str, str]) -> Iterator[Picture]:
        scales = told["multiscales"]
        scale = scales[0] if isinstance(scales, list) and scales and isinstance(scales[0], dict) else {}
        levels = _list(scale, "datasets", path)
        array = self._below(path, levels[0].get("path") if levels else None)
        shape = _array_shape(array)
        names = [a.get("name") if isinstance(a, dict) else a for a in scale.get("axes") or "tczyx"[-len(shape) :]]
        axes = "".join(str(n).upper() for n in names)
        if len(axes) != len(shape) or len(set(axes)) < len(axes) or set(axes) - set("TCZYX") or axes[-2:] != "YX":
            raise UserError(
                f"{str(path)!r}: axes {', '.join(map(str, names))} of an array of shape {shape} are not understood"
            )
        count = shape[axes.index("C")] if "C" in axes else 1
        check_size((shape[-2], shape[-1], count), str(path), self.max_values)
        known = [str(c.get("label", "")) for c in told.get("omero", {}).get("channels", []) if isinstance(c, dict)]
        if len(known) != count or len(set(known)) < count or "" in known:
            known = [f"channel {i}" for i in range(count)] if count > 1 else ["grey"]
        for t in range(shape[axes.index("T")] if "T" in axes else 1):
            yield Picture(str(array), "", axes, shape, t, tuple(known), {**labels, "Timepoint": str(t)})

    def _below(self, path: Path, name: object) -> Path:
        """A group or array inside another one."""
        found = self.root.locate(str(path.absolute() / str(name))) if isinstance(name, str) and name else None
        if found is None or not found.is_dir():
            raise UserError(f"{str(path)!r} is damaged: its description names {name!r}, which is not there")
        return found

    def planes(self, picture: Picture, name: str) -> Callable[[int, int], NDArray]:
        import zarr

        array = zarr.open_array(picture.file, mode="r")
        check_tiles(array.shards or array.chunks, self.settings.max_values)

        def plane(channel: int, z: int) -> NDArray:
            at = {"T": picture.time, "C": channel, "Z": z}
            pixels = np.asarray(array[tuple(at.get(a, slice(None)) for a in picture.axes)])
            if not pixels.any() and array.nchunks_initialized == 0:
                raise ValueError("it holds no pixels at all: its chunk files are missing")
            return pixels

        return plane

    def files(self) -> list[Path]:
        """Descriptions and pixels of every image."""
        arrays = sorted({Path(p.file) for p in self.pictures})
        return [*self.tables, *(f for a in arrays for f in sorted(a.rglob("*")) if f.is_file())]


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr group."""
    return path.is_dir() and any((path / n).is_file() for n in (".zgroup", ".zattrs", "zarr.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{str(path)!r} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{str(path)!r} is damaged: it should hold a JSON object")
    return value


def _attributes(path: Path) -> dict[str, Any]:
    """What an OME-Zarr group says of itself, v0.4 or v0.5."""
    if (path / "zarr.json").is_file():
        told = _json(path / "zarr.json").get("attributes", {})
        told = told.get("ome", told) if isinstance(told, dict) else {}
    else:
        told = _json(path / ".zattrs") if (path / ".zattrs").is_file() else {}
    return told if isinstance(told, dict) else {}


def _list(told: object, key: str, path: Path) -> list[dict[str, Any]]:
    values = told.get(key) if isinstance(told, dict) else None
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise UserError(f"{str(path)!r} is damaged: its description should hold a list of {key}")
    return values


def _array_shape(path: Path) -> tuple[int, ...]:
    """Shape of an array, from its description; nothing that would have to be unpickled is let through."""
    file = path / "zarr.json" if (path / "zarr.json").is_file() else path / ".zarray"
    told = _json(file)
    shape, kind = told.get("shape"), told.get("dtype", told.get("data_type"))
    if not isinstance(shape, list) or not 2 <= len(shape) <= 5 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise UserError(f"{str(file)!r} is damaged: {shape!r} is no shape of an image")
    codecs = json.dumps([told.get("filters"), told.get("compressor"), told.get("codecs")]).lower()
    if (
        not isinstance(kind, str)
        or not re.fullmatch(r"[<>|]?[biuf]\d|bool|u?int\d+|float\d+", kind)
        or "pickle" in codecs
    ):
        raise UserError(f"{str(file)!r}: pixels of type {kind!r} are no image; convert them to integers or floats")
    return tuple(shape)
