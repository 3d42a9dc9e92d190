"""The image store: memory-mapped Arrow files of equal-sized images, split into parts, read as batches in [-1, 1].

A store is a folder:

    store.json        channels, class names, size, intensity window, and the list of shards
    index.arrow       a row for each image: label, part, ``Metadata_*``, ``Factor_*``
    images*.arrow     the shards: the images themselves, one column of bytes

Images keep their own type on disk; ``batch`` maps them to float32 in [-1, 1], the one range that the rest of the
library knows.  ``diffex data ingest`` writes stores that experiments *view*: such an experiment's own store is an index
into the shards of the other one, so no pixel is copied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffex.errors import UserError
from diffex.splits import PARTS, group_ids

RECORD = "store.json"
FORMAT = 2
ROWS = 1024  # images in one Arrow record batch, at most
BYTES = 64 << 20  # bytes of pixels in one, roughly at most

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: how meters are told; drawn by the driver, silent elsewhere."""


class Batch(NamedTuple):
    """Images x (B, C, H, W) float32 in [-1, 1], labels y (B,) int64, and their rows in the store (B,) int64."""

    x: Tensor
    y: Tensor
    rows: Tensor


@dataclass(frozen=True, kw_only=True)
class StoreInfo:
    """What ``store.json`` says of a store.

    Attributes:
        channels: names of the C channels.
        class_names: sorted; labels index into them.
        size: side of the images in pixels.
        dtype: type of the stored pixels.
        window: for each channel, the stored values that become -1 and 1.
        count: number of images N.
        source: what they were made from, for people.
        split_by: metadata columns whose groups lie in one part each.
        simulated: drawn by the assay.
        shards: file name and number of images of each shard, in order.
        picked: positions of ``channels`` among those of the shards; empty: all, in order.
        depth: channels of the shards.
        origin: folder of the store whose shards are viewed; None: the store's own.
        identity: digest of everything that an ingest was made from; a view remembers that of its origin.
    """

    channels: tuple[str, ...]
    class_names: tuple[str, ...]
    size: int
    dtype: str
    window: tuple[tuple[float, float], ...]
    count: int
    source: str
    split_by: tuple[str, ...]
    simulated: bool
    shards: tuple[tuple[str, int], ...]
    depth: int
    picked: tuple[int, ...] = ()
    origin: str | None = None
    identity: str = ""

    def write(self, folder: Path) -> None:
        """Write ``store.json``."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        (folder / RECORD).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> StoreInfo:
        """Read ``store.json``.

        Raises:
            UserError: not a store, damaged, or of another version.
        """
        try:
            raw = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            if raw.pop("format", 1) != FORMAT:
                raise UserError(f"image store {str(folder)!r} was written by another version of diffex: make it again")
            pairs = {key: tuple(tuple(pair) for pair in raw[key]) for key in ("window", "shards")}
            words = {key: tuple(raw[key]) for key in ("channels", "class_names", "split_by", "picked")}
            return cls(**{**raw, **pairs, **words})
        except FileNotFoundError:
            raise UserError(f"{str(folder)!r} is not an image store: it has no {RECORD}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"image store {str(folder)!r} is damaged ({RECORD} can't be read): make it again") from None


def ingest_record(folder: Path) -> dict[str, Any]:
    """What ``diffex data ingest`` noted in the store of that folder; empty if it made no note."""
    try:
        return dict(json.loads((folder / "ingest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


class ImageStore:
    """Open a store for reading; pixels are memory-mapped, so any number of processes share one copy.

    Args:
        path: folder of the store.
        origin: where the viewed store lies now, for a view; None: where it lay.

    Raises:
        UserError: not a store, damaged, or a view whose pixels are gone.
    """

    def __init__(self, path: str | Path, origin: str | Path | None = None) -> None:
        self.path = Path(path)
        self.info = StoreInfo.read(self.path)
        try:
            self._open(origin)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"image store {str(self.path)!r} is damaged: {RECORD} does not fit its other files; make it again"
            ) from None

    def _open(self, origin: str | Path | None) -> None:
        self.table = _mapped(self.path / "index.arrow")
        self.labels: NDArray[np.int64] = self.table["label"].to_numpy().astype(np.int64)
        self.part_numbers: NDArray[np.int8] = self.table["part"].to_numpy()
        self._base: NDArray[np.int64] | None = None
        self._groups: NDArray[np.int64] | None = None
        home = self.path
        if self.info.origin is not None:
            self._base = self.table["row"].to_numpy()
            home = Path(origin or self.info.origin)
            if not (home / RECORD).is_file() or StoreInfo.read(home).identity != self.info.identity:
                raise UserError(
                    f"the pixels of {str(self.path)!r} lie in the store {str(home)!r}, which is gone or another one "
                    "now; put it back, or run the command again with --data where it is"
                )
        dtype = np.dtype(self.info.dtype)
        self._size = self.info.depth * self.info.size**2 * dtype.itemsize  # bytes of an image
        self._bytes = [
            _view(chunk, self._size) for name, _ in self.info.shards for chunk in _mapped(home / name)["image"].chunks
        ]
        low, high = torch.tensor(self.info.window, dtype=torch.float64).T.reshape(2, -1, 1, 1)
        exact = 2.0 / (high - low)
        scale = exact.float()  # rounded towards 0, so that no value within the window leaves [-1, 1]
        self._scale = torch.where(scale.double() > exact, torch.nextafter(scale, torch.zeros(())), scale)
        self._same = float(self._scale.flatten()[0]) if len(self._scale.unique()) == 1 else None
        self._shift = (-1.0 - low * 2.0 / (high - low)).float()
        limits = torch.tensor([np.iinfo(dtype).min, np.iinfo(dtype).max] if dtype.kind == "u" else [-1e38, 1e38])
        self._leaves = bool(((limits * self._scale + self._shift).abs() > 1.0).any())
        self._starts = np.cumsum([0, *(len(view) // self._size for view in self._bytes)])
        if len(self.table) != self.info.count or (self._base is None and int(self._starts[-1]) != self.info.count):
            raise UserError(f"image store {str(self.path)!r} is damaged: its files hold another number of images")
        info, columns = self.info, set(self.table.column_names)
        depths = {len(info.channels), len(info.window), len(info.picked) or info.depth}
        named = self.labels.min() >= 0 and self.labels.max() < len(info.class_names)
        if len(depths) > 1 or not named or not columns.issuperset(info.split_by):
            raise ValueError("of these, each names what another has not")

    def __len__(self) -> int:
        return self.info.count

    @property
    def parts(self) -> NDArray[np.str_]:
        """Name of each image's part, (N,)."""
        return np.array(PARTS)[self.part_numbers]

    def rows(self, part: str) -> NDArray[np.int64]:
        """Rows of a part ('train', 'valid', 'test'), ascending."""
        return np.flatnonzero(self.part_numbers == PARTS.index(part))

    def metadata(self, prefix: str = "Metadata_") -> dict[str, NDArray]:
        """Columns whose names start with ``prefix``, each (N,)."""
        return {
            n: self.table[n].to_numpy(zero_copy_only=False) for n in self.table.column_names if n.startswith(prefix)
        }

    def ingest_record(self) -> dict[str, Any]:
        """What ``diffex data ingest`` noted in ``ingest.json``: settings, surveys, counts; empty if it made no note."""
        return ingest_record(self.path)

    def groups(self) -> NDArray[np.int64]:
        """Number of each image's statistical unit (well, donor, ...; without one, the image itself), (N,)."""
        if self._groups is None:
            columns = {n: self.table[n].to_numpy(zero_copy_only=False) for n in self.info.split_by}
            self._groups = group_ids(columns) if columns else np.arange(len(self))
        return self._groups

    def pixels(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray:
        """Images of the rows in the store's own type, (n, C, H, W)."""
        rows = np.asarray(rows, np.int64)
        base = rows if self._base is None else self._base[rows]
        chunk = np.searchsorted(self._starts, base, side="right") - 1
        local = base - self._starts[chunk]
        size = self._size
        # Bytes, joined: a tenth slower than one array's own indexing, where copying row by row took twice as long.
        found = bytearray().join(
            [self._bytes[k][j * size : (j + 1) * size] for k, j in zip(chunk.tolist(), local.tolist(), strict=True)]
        )
        shape = (len(rows), self.info.depth, self.info.size, self.info.size)
        out: NDArray = np.ndarray(shape, np.dtype(self.info.dtype), found)
        return out[:, list(self.info.picked)] if self.info.picked else out

    def batch(self, rows: Sequence[int] | NDArray[np.int64], device: str | torch.device = "cpu") -> Batch:
        """Images of the rows as float32 in [-1, 1], with labels."""
        rows = np.asarray(rows, np.int64)
        x = torch.from_numpy(self.pixels(rows)).to(device).float()
        shift = self._shift.to(device)
        if self._same is not None:  # one pass over the images instead of two
            torch.add(shift, x, alpha=self._same, out=x)
        else:
            x.mul_(self._scale.to(device)).add_(shift)
        if self._leaves:
            x.clamp_(-1.0, 1.0)
        return Batch(x, torch.from_numpy(self.labels[rows]).to(device), torch.from_numpy(rows))


def _mapped(file: Path) -> pa.Table:
    """The Arrow file as a table that lies in its memory map; the file itself is closed, so many can be mapped."""
    try:
        with pa.memory_map(str(file)) as opened:
            return pa.ipc.open_file(opened).read_all()
    except FileNotFoundError:
        raise UserError(f"image store {str(file.parent)!r} is damaged: {file.name} is missing; make it again") from None
    except (OSError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"image store {str(file.parent)!r} is damaged: {file.name}: {reason}; make it again") from None


def _view(column: pa.FixedSizeBinaryArray, size: int) -> memoryview:
    """The column's bytes, ``size`` for each image, without a copy."""
    width = column.type.byte_width
    if width != size:
        raise ValueError(f"images of {width} bytes, not {size}")
    return np.frombuffer(column.buffers()[1], np.uint8, len(column) * width, column.offset * width).data


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
# Writing


class ShardWriter:
    """Write images to one Arrow file, a record batch at a time, so that memory holds one batch.

    Args:
        path: the file.
        dtype: of the pixels.
        shape: of an image, (C, H, W).
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self.count = np.dtype(dtype), shape, 0
        width = int(np.prod(shape)) * self.dtype.itemsize
        self._binary, self._rows = pa.binary(width), max(1, min(ROWS, BYTES // width))
        self._pending: list[NDArray] = []
        self._stream = pa.ipc.new_file(str(path), pa.schema([pa.field("image", self._binary)]))

    def add(self, image: NDArray) -> None:
        """One image more, (C, H, W)."""
        self._pending.append(image)
        self.count += 1
        if len(self._pending) == self._rows:
            self._flush()

    def close(self) -> None:
        """Write what is left and the file's footer."""
        self._flush()
        self._stream.close()

    def _flush(self) -> None:
        if self._pending:
            buffer = pa.py_buffer(np.stack(self._pending).tobytes())
            images = pa.FixedSizeBinaryArray.from_buffers(self._binary, len(self._pending), [None, buffer])
            self._stream.write_batch(pa.record_batch([images], names=["image"]))
            self._pending = []


def write_index(path: Path, tables: Iterator[pa.Table]) -> None:
    """Write the index of a store, table after table."""
    writer = None
    for table in tables:
        writer = writer or pa.ipc.new_file(str(path), table.schema)
        writer.write_table(table.combine_chunks())
    assert writer is not None
    writer.close()


def index_columns(labels: NDArray, parts: NDArray[np.int64]) -> dict[str, NDArray]:
    """The columns that every index starts with."""
    return {"label": labels.astype(np.int32), "part": parts.astype(np.int8)}


def pixel_window(
    dtype: np.dtype, sample: Sequence[NDArray], channels: Sequence[str]
) -> tuple[tuple[float, float], ...]:
    """Intensities that become -1 and 1 for each channel: 0 and 255, or quantiles 0.1 and 99.9 % of a sample.

    Args:
        dtype: of the pixels.
        sample: arrays (C, n) of pixels.
        channels: names of the C channels.

    Raises:
        UserError: a channel is constant.
    """
    if dtype == np.uint8:
        return ((0.0, 255.0),) * len(channels)
    values = np.concatenate(sample, axis=1)
    low, high = np.quantile(values, 0.001, axis=1), np.quantile(values, 0.999, axis=1)
    for name, a, b in zip(channels, low, high, strict=True):
        if a >= b:
            raise UserError(f"channel {name!r} is constant in the training images; leave it out with data.channels")
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))
