"""The image store: one memory-mapped Arrow file of equal-sized images, split into parts, read as batches in [-1, 1].

A store is a folder with ``images.arrow`` (columns: image, label, part, ``Metadata_*``, ``Factor_*``) and ``store.json``
(channels, class names, size, intensity window).  Images keep their own integer type on disk; ``batch`` maps them to
float32 in [-1, 1], the one range that the rest of the library knows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffex.config import Assay, Data
from diffex.errors import UserError, did_you_mean
from diffex.readers import Source, fit_square, open_source

PARTS = ("train", "valid", "test")
ROWS = 1024  # images in one Arrow record batch

GROUPS = (
    ("Plate", "Well"),
    ("Well",),
    ("Donor",),
    ("Patient",),
    ("Subject",),
    ("Movie",),
    ("Tile",),
    ("Slide",),
    ("Field",),
)
"""Metadata columns that 'auto' looks for, in this order: the first that is there keeps its groups in one part."""

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: how meters are told; drawn by the driver, silent elsewhere."""


class Batch(NamedTuple):
    """Images x (B, C, H, W) float32 in [-1, 1], labels y (B,) int64, and their rows in the store (B,) int64."""

    x: Tensor
    y: Tensor
    rows: Tensor


@dataclass(frozen=True)
class StoreInfo:
    """What ``store.json`` says of a store."""

    channels: tuple[str, ...]
    class_names: tuple[str, ...]
    size: int
    dtype: str
    window: tuple[tuple[float, float], ...]
    count: int
    source: str
    split_by: tuple[str, ...]
    simulated: bool


class ImageStore:
    """Open a store for reading; pixels are memory-mapped, so any number of processes share one copy.

    Args:
        path: folder written by ``build_store``.

    Raises:
        UserError: not a store.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "store.json").is_file():
            raise UserError(f"{str(path)!r} is not an image store: it has no store.json")
        raw = json.loads((self.path / "store.json").read_text(encoding="utf-8"))
        raw["window"] = tuple(tuple(w) for w in raw["window"])
        for key in ("channels", "class_names", "split_by"):
            raw[key] = tuple(raw[key])
        self.info = StoreInfo(**raw)
        reader = pa.ipc.open_file(pa.memory_map(str(self.path / "images.arrow")))
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        self.table = pa.Table.from_batches(batches, reader.schema)
        shape = (-1, len(self.info.channels), self.info.size, self.info.size)
        self._pixels = [_view(b.column("image"), np.dtype(self.info.dtype)).reshape(shape) for b in batches]
        self.labels: NDArray[np.int64] = self.table["label"].to_numpy()
        self.parts = np.asarray(self.table["part"].to_numpy(zero_copy_only=False), dtype=str)

    def __len__(self) -> int:
        return self.info.count

    def rows(self, part: str) -> NDArray[np.int64]:
        """Rows of a part ('train', 'valid', 'test'), ascending."""
        return np.flatnonzero(self.parts == part)

    def metadata(self, prefix: str = "Metadata_") -> dict[str, NDArray]:
        """Columns whose names start with ``prefix``, each (N,)."""
        return {
            n: self.table[n].to_numpy(zero_copy_only=False) for n in self.table.column_names if n.startswith(prefix)
        }

    def groups(self) -> NDArray[np.int64]:
        """Number of each image's statistical unit (well, donor, ...; without one, the image itself), (N,)."""
        if not self.info.split_by:
            return np.arange(len(self))
        return _group_ids({n: self.table[n].to_numpy(zero_copy_only=False) for n in self.info.split_by})

    def pixels(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray:
        """Images of the rows in the store's own type, (n, C, H, W)."""
        rows = np.asarray(rows, np.int64)
        out = np.empty((len(rows), *self._pixels[0].shape[1:]), self.info.dtype)
        chunk = rows // ROWS
        for k in np.unique(chunk):
            out[chunk == k] = self._pixels[k][rows[chunk == k] % ROWS]
        return out

    def batch(self, rows: Sequence[int] | NDArray[np.int64], device: str | torch.device = "cpu") -> Batch:
        """Images of the rows as float32 in [-1, 1], with labels."""
        rows = np.asarray(rows, np.int64)
        x = torch.from_numpy(self.pixels(rows)).to(device).float()
        low, high = torch.tensor(self.info.window, dtype=torch.float32, device=device).T.reshape(2, 1, -1, 1, 1)
        x = ((x - low) * (2.0 / (high - low)) - 1.0).clamp_(-1.0, 1.0)
        return Batch(x, torch.from_numpy(self.labels[rows]).to(device), torch.from_numpy(rows))


@lru_cache(maxsize=4)
def _shuffle(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """An epoch's order: drawn once, not at every step of it."""
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.setflags(write=False)
    return order


def sample_rows(rows: NDArray[np.int64], batch_size: int, seen: int, seed: int) -> NDArray[np.int64]:
    """The batch of rows that follows ``seen`` images: epoch after epoch of seeded shuffles.

    A pure function of its arguments, so a resumed training sees the very batches of an uninterrupted one.
    """
    taken: list[NDArray[np.int64]] = []
    while sum(map(len, taken)) < batch_size:
        epoch, at = divmod(seen + sum(map(len, taken)), len(rows))
        order = _shuffle(len(rows), seed, epoch)
        taken.append(rows[order[at : at + batch_size - sum(map(len, taken))]])
    return np.concatenate(taken)


# ----------------------------------------------------------------------------------------------------------------------
# Building a store


def build_store(data: Data, simulated: Assay, out: Path, progress: Progress | None = None) -> StoreInfo:
    """Read the images that the settings name, split them, and write them to the folder ``out``.

    Args:
        data: which images, channels, size and split.
        simulated: the assay, drawn where ``data.path`` is None.
        out: an existing empty folder.
        progress: told of every batch written.

    Returns:
        What was written.

    Raises:
        UserError: anything the user must mend, naming the file, row or setting.
    """
    if data.path is None:  # as the warnings about settings without effect say
        data = replace(data, window=(), channel_names=())
    source = open_source(data, simulated)
    rows, class_names = _choose(source, data)
    split_by = _split_columns(source, data)
    parts = _split(source, rows, class_names, split_by, data)
    table = pa.table({
        "label": np.searchsorted(class_names, source.class_names[rows]).astype(np.int64),
        "part": pa.array(parts.tolist()),
        **{name: pa.array(values[rows]) for name, values in source.metadata.items()},
    })  # fmt: skip
    writer: _Writer | None = None
    for name, image in source.images(rows.tolist(), data.size):
        if writer is None:
            first, depth = name, image.shape[2]
            columns, channels = _pick_channels(source, data, depth)
            writer = _Writer(out / "images.arrow", table, image.dtype, (len(channels), data.size, data.size))
        if image.shape[2] != depth:
            raise UserError(f"{name} has {image.shape[2]} channels, but {first} has {depth}: all images need the same")
        if image.dtype != writer.dtype:
            raise UserError(
                f"{name} has {image.dtype} pixels, but {first} has {writer.dtype}: convert them to one type"
            )
        writer.add(fit_square(image[..., columns], data.size))
        if progress and (writer.count % ROWS == 0 or writer.count == len(rows)):
            progress("data", writer.count, len(rows))
    assert writer is not None
    writer.close()
    info = StoreInfo(
        channels=channels, class_names=tuple(class_names), size=data.size, dtype=str(writer.dtype),
        window=_window(data, writer, channels), count=len(rows), source=source.name, split_by=split_by,
        simulated=data.path is None,
    )  # fmt: skip
    (out / "store.json").write_text(json.dumps(asdict(info), indent=1), encoding="utf-8")
    return info


class _Writer:
    """Writes images to Arrow, a record batch at a time; keeps a sample of training pixels for the window."""

    def __init__(self, path: Path, table: pa.Table, dtype: np.dtype, shape: tuple[int, int, int]) -> None:
        self.dtype, self.table, self.count = np.dtype(dtype), table, 0
        self.training = np.asarray(table["part"].to_numpy(zero_copy_only=False)) == "train"
        self.sample: list[NDArray] = []
        self._pending: list[NDArray] = []
        self._binary = pa.binary(int(np.prod(shape)) * self.dtype.itemsize)
        self._stream = pa.ipc.new_file(str(path), table.schema.append(pa.field("image", self._binary)))

    def add(self, image: NDArray) -> None:
        self._pending.append(image)
        if self.dtype != np.uint8 and self.training[self.count] and len(self.sample) < 512:
            self.sample.append(image.reshape(len(image), -1))
        self.count += 1
        if len(self._pending) == ROWS or self.count == len(self.table):
            buffer = pa.py_buffer(np.stack(self._pending).tobytes())
            image_column = pa.FixedSizeBinaryArray.from_buffers(self._binary, len(self._pending), [None, buffer])
            rows = self.table.slice(self.count - len(self._pending), len(self._pending))
            self._stream.write_table(rows.append_column("image", image_column))
            self._pending = []

    def close(self) -> None:
        self._stream.close()


def _window(data: Data, writer: _Writer, channels: tuple[str, ...]) -> tuple[tuple[float, float], ...]:
    """Intensities that become -1 and 1, for each channel."""
    if data.window:
        return ((data.window[0], data.window[1]),) * len(channels)
    if writer.dtype == np.uint8:
        return ((0.0, 255.0),) * len(channels)
    values = np.concatenate(writer.sample, axis=1)
    low, high = np.quantile(values, 0.001, axis=1), np.quantile(values, 0.999, axis=1)
    for name, a, b in zip(channels, low, high, strict=True):
        if a >= b:
            raise UserError(f"channel {name!r} is constant in the training images; leave it out with data.channels")
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))


def _choose(source: Source, data: Data) -> tuple[NDArray[np.int64], list[str]]:
    """Rows to use, ascending, and the class names, sorted: never the order of a directory or a file."""
    present = sorted(set(source.class_names.tolist()))
    for name in data.classes:
        if name not in present:
            raise UserError(f"{source.name} has no class {name!r}: {did_you_mean(name, present)} (data.classes)")
    class_names = sorted(data.classes) if data.classes else present
    if len(class_names) < 2:
        raise UserError(f"{source.name} has one class only ({', '.join(class_names)}); a classifier needs two or more")
    rows = np.flatnonzero(np.isin(source.class_names, class_names))
    if data.max_per_class is not None:
        rng = np.random.default_rng(data.seed)
        by_class = [rows[source.class_names[rows] == name] for name in class_names]
        rows = np.sort(np.concatenate([rng.permutation(r)[: data.max_per_class] for r in by_class]))
    return rows, class_names


def _pick_channels(source: Source, data: Data, depth: int) -> tuple[list[int], tuple[str, ...]]:
    """Positions and names of the channels to keep out of ``depth``."""
    names = data.channel_names or source.channels or {1: ("grey",), 3: ("red", "green", "blue")}.get(depth)
    names = names or tuple(f"channel {i}" for i in range(depth))
    if len(names) != depth:
        raise UserError(f"data.channel_names names {len(names)} channels, but the images have {depth}")
    if not data.channels:
        return list(range(depth)), tuple(names)
    columns = []
    for channel in data.channels:
        if channel in names:
            columns.append(names.index(channel))
        elif channel.isdecimal() and int(channel) < depth:
            columns.append(int(channel))
        else:
            raise UserError(
                f"data.channels asks for {channel!r}, but the images have {depth} channels: "
                f"{', '.join(names)} (or 0 to {depth - 1})"
            )
    return columns, tuple(names[c] for c in columns)


def _split_columns(source: Source, data: Data) -> tuple[str, ...]:
    """Full names of the metadata columns whose groups stay together; empty: every image is a group of its own."""
    lower = {name.removeprefix("Metadata_").lower(): name for name in source.metadata if name.startswith("Metadata_")}
    if data.split_by == ("auto",):
        return next(
            (tuple(lower[n.lower()] for n in names) for names in GROUPS if all(n.lower() in lower for n in names)), ()
        )
    missing = [n for n in data.split_by if n.removeprefix("Metadata_").lower() not in lower]
    if missing:
        raise UserError(f"data.split_by: {source.name} has no column {missing[0]!r}: {did_you_mean(missing[0], lower)}")
    return tuple(lower[n.removeprefix("Metadata_").lower()] for n in data.split_by)


def _group_ids(columns: dict[str, NDArray]) -> NDArray[np.int64]:
    keys = ["\x1f".join(map(str, key)) for key in zip(*columns.values(), strict=True)]
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _split(source: Source, rows: NDArray, class_names: list[str], by: tuple[str, ...], data: Data) -> NDArray[np.str_]:
    """Part of each chosen row.  Whole groups go, in random order, where their classes are missing most."""
    groups = _group_ids({n: source.metadata[n][rows] for n in by}) if by else np.arange(len(rows))
    classes = np.searchsorted(class_names, source.class_names[rows])
    counts = np.zeros((groups.max() + 1, len(class_names)))
    np.add.at(counts, (groups, classes), 1)
    share = np.array([1 - data.valid_fraction - data.test_fraction, data.valid_fraction, data.test_fraction])
    target = share[:, None] * counts.sum(0)[None]
    filled = np.zeros_like(target)
    part_of = np.zeros(len(counts), np.int64)
    for g in np.random.default_rng([data.seed, 1]).permutation(len(counts)):
        need = ((target - filled) / target * (counts[g] > 0)).sum(1)
        part_of[g] = int(need.argmax())
        filled[part_of[g]] += counts[g]
    for c, name in enumerate(class_names):
        if (filled[:, c] == 0).any():
            held = int((counts[:, c] > 0).sum())
            unit = " and ".join(n.removeprefix("Metadata_") for n in by) or "image"
            raise UserError(
                f"class {name!r} has only {held} different {unit} groups: too few for training, validation and test; "
                f"add images or choose another data.split_by"
            )
    return np.array(PARTS)[part_of[groups]]


def _view(column: pa.FixedSizeBinaryArray, dtype: np.dtype) -> NDArray:
    """The column's bytes as a flat array, without a copy."""
    width = column.type.byte_width
    data = np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width)
    return data.view(dtype)
