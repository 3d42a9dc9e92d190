"""Where images come from: what all sources share, folders and archives of files, Parquet, the simulated assay.

A source lists its images first (class and metadata, no pixels), so that classes, limits and splits are decided before
anything is decoded; then it decodes the chosen rows in order, one image in memory at a time.  Sources can be pickled:
they travel to workers.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffex import assay
from diffex.config import Assay
from diffex.errors import ImageError, UserError
from diffex.paths import Archive, Folder
from diffex.readers import ENDINGS, MAX_BYTES, MAX_VALUES, decode, depth
from diffex.tables import metadata_name

Content = Literal["cells", "fields"]
Files = tuple[tuple[str, ...], ...]
"""The files of one image: for each channel its focal planes."""
BATCH_BYTES = 1 << 24  # of encoded images that a Parquet file is read in


class Source(Protocol):
    """Images with a class and metadata each.

    Attributes:
        name: what to call it in messages.
        class_names: (N,) class of each image; "" where it has none.
        metadata: ``Metadata_*`` (and, for the assay, ``Factor_*``) columns, each (N,).
        content: what an image shows: a single cell, or a field of many.
        channels: names of the channels, or None where the images themselves must tell.
    """

    name: str
    class_names: NDArray[np.str_]
    metadata: dict[str, NDArray]

    @property
    def content(self) -> Content: ...

    @property
    def channels(self) -> tuple[str, ...] | None: ...

    def images(self, rows: Sequence[int], size: int) -> Iterator[tuple[str, NDArray]]:
        """Decode the rows in order: pairs of (name for messages, (H, W, C) array).  ``size`` is what will be asked."""
        ...

    def files(self) -> list[Path]:
        """Every file that the source rests on, as far as it is there."""
        ...


def default_channels(depth: int) -> tuple[str, ...]:
    """What channels are called that nobody has named."""
    return {1: ("grey",), 3: ("red", "green", "blue")}.get(depth) or tuple(f"channel {i}" for i in range(depth))


class Listed(ABC):
    """A source of files: a list of images, each read for itself.

    Attributes:
        name, class_names, metadata, content, channels: see ``Source``.
        class_columns: metadata columns that may stand for the class where no image has one.
        keep: positions of the channels that are read; None: all of them.
        notes: what the user should know of the listing, one line each.
        unlisted: files of images that could not even be listed, each with what is wrong.
        tables: metadata files that the listing rests on.
    """

    name: str
    class_names: NDArray[np.str_]
    metadata: dict[str, NDArray]
    content: Content = "cells"
    channels: tuple[str, ...] | None = None
    class_columns: tuple[str, ...] = ()
    keep: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()
    tables: tuple[Path, ...] = ()

    @abstractmethod
    def read(self, row: int) -> tuple[str, NDArray]:
        """Decode one image: its name for messages, and the kept channels (H, W, C)."""

    @abstractmethod
    def depth(self) -> int:
        """Number of channels of the first image, by its header, whatever is kept."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Every file that the source rests on, as far as it is there."""

    def images(self, rows: Sequence[int], size: int) -> Iterator[tuple[str, NDArray]]:
        """Decode the rows in order; ``size`` plays no part."""
        return (self.read(int(row)) for row in rows)

    def kept(self, image: NDArray, name: str) -> NDArray:
        """The channels to keep of an (H, W, C) image that holds all of them."""
        if self.keep is None:
            return image
        if max(self.keep) >= image.shape[2]:
            raise UserError(f"{name} has {image.shape[2]} channels, but channel {max(self.keep)} is asked for")
        return image[..., list(self.keep)]


# ----------------------------------------------------------------------------------------------------------------------
# Files


class FileSource(Listed):
    """Images that are files: all channels in one, or a file for each channel (and each focal plane).

    Args:
        tree: where the files are.
        rows: for each image its files: rows[n][channel][focal plane], names in ``tree``.
        metadata: columns, each (N,).
        channels: their names where there is a file for each; None: one file holds all channels.
        class_names: (N,); None: unknown yet.
        projection: how focal planes become one: 'max', 'mean' or 'middle'.
        max_values: largest number of values in an image.
    """

    def __init__(
        self, tree: Folder | Archive, rows: Sequence[Files], metadata: dict[str, NDArray], *,
        channels: tuple[str, ...] | None = None, class_names: NDArray[np.str_] | None = None,
        projection: str = "max", max_values: int = MAX_VALUES,
    ) -> None:  # fmt: skip
        self.name, self.tree, self.rows, self.metadata = str(tree.path), tree, rows, metadata
        self.channels = self.every = channels
        self.class_names = np.full(len(rows), "") if class_names is None else class_names
        self.projection, self.max_values = projection, max_values

    def read(self, row: int) -> tuple[str, NDArray]:
        files = self.rows[row]
        if self.every is None:
            name = self.tree.label(files[0][0])
            return name, self.kept(self._decode(files[0][0]), name)
        self.present(row)
        planes: list[NDArray] = []
        first = ""
        for c in self._wanted(self.every):
            name = self.tree.label(files[c][0])
            plane = project((self._single(f) for f in files[c]), len(files[c]), self.projection, name)
            if planes and plane.shape != planes[0].shape:
                sizes = " and ".join(f"{p.shape[0]} x {p.shape[1]}" for p in (plane, planes[0]))
                raise UserError(f"{name} and {first} are channels of one image but differ in size: {sizes}")
            if planes and plane.dtype != planes[0].dtype:
                raise UserError(f"{name} has {plane.dtype} pixels, but {first} has {planes[0].dtype}")
            first = first or name
            planes.append(plane)
        return first, np.concatenate(planes, axis=2)

    def present(self, row: int) -> None:
        """Refuse an image that lacks the file of a channel that is read.

        Raises:
            UserError: naming the channel and a file beside it.
        """
        for c in self._wanted(self.every or ()):
            if not self.rows[row][c]:
                beside = next(planes[0] for planes in self.rows[row] if planes)
                raise ImageError(
                    f"{self.tree.label(beside)} has no file for channel {(self.every or ())[c]!r} beside it"
                )

    def _wanted(self, channels: tuple[str, ...]) -> Sequence[int]:
        return range(len(channels)) if self.keep is None else self.keep

    def _single(self, file: str) -> NDArray:
        image = self._decode(file)
        if image.shape[2] > 1 and (image == image[..., :1]).all():  # grey, saved as colour
            image = image[..., :1]
        if image.shape[2] > 1:
            raise UserError(
                f"{self.tree.label(file)} holds {image.shape[2]} channels where a file for each channel is expected "
                f"(read.layout, read.pattern)"
            )
        return image

    def _decode(self, file: str) -> NDArray:
        return decode(self.tree.content(file), self.tree.label(file), self.max_values)

    def depth(self) -> int:
        if self.every is not None:
            return len(self.every)
        return depth(self.tree.content(self.rows[0][0][0]), self.tree.label(self.rows[0][0][0]))

    def files(self) -> list[Path]:
        every = {name for row in self.rows for planes in row for name in planes}
        there = {self.tree.file(name) for name in every} if isinstance(self.tree, Folder) else {self.tree.path}
        return [*self.tables, *sorted(file for file in there if file.exists())]


def project(planes: Iterator[NDArray], count: int, how: str, name: str) -> NDArray:
    """One plane of a stack of ``count`` focal planes of equal shape: their 'max', 'mean' or the 'middle' one."""
    result: NDArray | None = None
    kind: np.dtype | None = None
    for i, plane in enumerate(planes):
        if how == "middle" and i != count // 2:
            continue
        if result is None:
            result, kind = plane.astype(np.float64) if how == "mean" else plane, plane.dtype
        elif plane.shape != result.shape:
            raise UserError(f"{name}: focal planes differ in size: {result.shape[:2]} and {plane.shape[:2]}")
        else:
            result = result + plane if how == "mean" else np.maximum(result, plane)
    assert result is not None and kind is not None
    if how != "mean":
        return result
    mean = result / count
    return (np.rint(mean) if kind.kind == "u" else mean).astype(kind)


class FolderSource(FileSource):
    """A folder (or ZIP archive) with one sub-folder per class, holding PNG, JPEG, TIFF or NPY files (deeper ones too).

    Raises:
        UserError: no sub-folders, an empty one, or a link that leaves the folder.
    """

    def __init__(
        self, path: Path, *, root: Path | None = None, max_values: int = MAX_VALUES, max_bytes: int = MAX_BYTES
    ) -> None:
        tree = Folder(path, root, max_bytes) if path.is_dir() else Archive(path, max_bytes)
        names = [n for n in tree.names() if "/" in n]
        filled = {n.split("/")[0] for n in names}
        if path.is_dir():
            for folder in sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")):
                if folder.name not in filled:
                    raise UserError(
                        f"class folder {str(folder)!r} holds no {'/'.join(ENDINGS)} file: remove or fill it"
                    )
        if not filled:
            raise UserError(f"{str(path)!r} has no sub-folders: put each class's images into a folder of its own")
        super().__init__(
            tree, [((n,),) for n in names], {"Metadata_File": np.array(names)},
            class_names=np.array([n.split("/")[0] for n in names]), max_values=max_values,
        )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Parquet


class ParquetSource(Listed):
    """A Parquet file with columns ``image`` (encoded bytes), ``label`` and/or ``class_name``, and metadata.

    Args:
        path: the file.
        classes: whether it must name the class of each image.
        max_values: largest number of values in an image.

    Raises:
        UserError: not readable, or without the columns.
    """

    def __init__(self, path: Path, *, classes: bool = True, max_values: int = MAX_VALUES) -> None:
        self.name, self.path, self.max_values = str(path), path, max_values
        self._file: pq.ParquetFile | None = None
        self._at: tuple[int, pa.Array, Iterator[pa.Array]] | None = None  # where reading stands
        schema = self._open().schema_arrow
        named = bool({"label", "class_name"} & set(schema.names))
        if "image" not in schema.names or (classes and not named):
            raise UserError(
                f"{str(path)!r} needs a column 'image' (encoded bytes) and 'class_name' or 'label'; "
                f"it has {', '.join(schema.names)}"
            )
        kind = schema.field("image").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(f"column 'image' of {str(path)!r} must hold encoded bytes (PNG, JPEG, TIFF), not {kind}")
        try:
            table = self._open().read(columns=[n for n in schema.names if n != "image"])
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None
        meta = self._open().metadata
        sizes = [meta.row_group(g).num_rows for g in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])[:-1]  # first row of each row group
        stored = _stored_names(schema.metadata or {})
        self.class_names = _class_names(table, stored, self.name) if named else np.full(meta.num_rows, "")
        self.metadata = {
            metadata_name(n): table[n].to_numpy(zero_copy_only=False)
            for n in table.column_names
            if n not in ("label", "class_name")
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_at": None}

    def _open(self) -> pq.ParquetFile:
        if self._file is None:
            try:
                self._file = pq.ParquetFile(self.path)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"{self.name!r} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
        return self._file

    def read(self, row: int) -> tuple[str, NDArray]:
        name, content = self._content(row)
        return name, self.kept(decode(content, name, self.max_values), name)

    def depth(self) -> int:
        name, content = self._content(0)
        return depth(content, name)

    def files(self) -> list[Path]:
        return [*self.tables, self.path]

    def _content(self, row: int) -> tuple[str, bytes]:
        """The encoded image; reading goes on where it stood, so rows that ascend are read but once."""
        name = f"{self.path} row {row}"
        try:
            end = -1 if self._at is None else self._at[0] + len(self._at[1]) - 1
            if self._at is None or row < self._at[0] or self._group(row) > self._group(end) + 1:
                group = self._group(row)
                batches = self._batches(group)
                self._at = (int(self._starts[group]), next(batches), batches)
            while row >= self._at[0] + len(self._at[1]):
                first, column, batches = self._at
                self._at = (first + len(column), next(batches), batches)
        except (pa.ArrowException, OSError) as error:
            self._at = None  # its iterator has ended; other row groups may be whole
            raise self._damaged(error) from None
        content = self._at[1][row - self._at[0]].as_py()
        if not content:
            raise UserError(f"{name}: the image is empty")
        return name, content

    def _group(self, row: int) -> int:
        return int(np.searchsorted(self._starts, row, side="right")) - 1

    def _batches(self, group: int) -> Iterator[pa.Array]:
        """The image column from a row group on, a batch at a time."""
        meta = self._open().metadata
        size = sum(meta.row_group(g).total_byte_size for g in range(meta.num_row_groups)) // max(meta.num_rows, 1)
        batch_size = max(1, min(256, BATCH_BYTES // max(size, 1)))
        for g in range(group, meta.num_row_groups):  # each for itself: a damaged one takes no other with it
            for batch in self._open().iter_batches(batch_size=batch_size, columns=["image"], row_groups=[g]):
                yield batch.column(0)

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.name!r} is damaged: {str(error).splitlines()[0]}; make it again")


def _stored_names(metadata: Mapping[bytes, bytes]) -> list[str]:
    """Names of the labels, where the file's metadata hold a JSON list of them."""
    try:
        names = json.loads(metadata.get(b"class_names", b"[]"))
    except ValueError:
        names = []
    return names if isinstance(names, list) else []


def _class_names(table: pa.Table, stored: list[str], source: str) -> NDArray[np.str_]:
    """Class name of each row: the column ``class_name``, else ``label`` (named by ``stored`` where it is given)."""
    if "class_name" in table.column_names:
        names = table["class_name"].to_pylist()
        if None in names:
            raise UserError(f"{source}: column 'class_name' is empty in row {names.index(None)}")
        if "label" in table.column_names:
            pairs = set(zip(table["label"].to_pylist(), names, strict=True))
            if len(pairs) != len(set(names)) or len(pairs) != len({label for label, _ in pairs}):
                raise UserError(f"{source}: columns 'label' and 'class_name' contradict each other; drop one of them")
        return np.array([str(n) for n in names])
    labels = table["label"].to_pylist()
    if None in labels:
        raise UserError(f"{source}: column 'label' is empty in row {labels.index(None)}")
    known = dict(enumerate(stored))
    return np.array([str(known.get(v, v)) if isinstance(v, int) else str(v) for v in labels])


# ----------------------------------------------------------------------------------------------------------------------
# The simulated assay


class AssaySource:
    """The simulated assay: metadata carry the true factors, and pixels are drawn on demand at the size asked for."""

    content: Content = "cells"

    def __init__(self, settings: Assay, channels: Sequence[str] = ()) -> None:
        self.name, self.channels = "simulated assay", tuple(channels) or assay.DEFAULT_CHANNELS
        self.plan = assay.plan(
            treatments=settings.treatments or assay.DESIGNS[settings.design], channels=self.channels,
            num_images=settings.num_images, num_plates=settings.num_plates, wells_per_class=settings.wells_per_class,
            doses=settings.doses, well_sd=settings.well_sd, plate_sd=settings.plate_sd, seed=settings.seed,
        )  # fmt: skip
        self.class_names = np.array(self.plan.class_names)[self.plan.labels]
        self.metadata = dict(self.plan.metadata)
        for name, column in zip(assay.FACTORS, self.plan.visible_scores().T, strict=True):
            self.metadata[f"Factor_{name}"] = column

    def images(self, rows: Sequence[int], size: int) -> Iterator[tuple[str, NDArray]]:
        order = iter(rows)
        for chunk in assay.draw(self.plan, size, rows):
            for image in chunk:
                yield f"cell {next(order)}", image.transpose(1, 2, 0)

    def files(self) -> list[Path]:
        return []
