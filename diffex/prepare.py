"""An experiment's own store: from an ingested store, files or the simulated assay, split into parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffex.config import Assay, Data
from diffex.data import (
    RECORD,
    ROWS,
    ImageStore,
    Progress,
    ShardWriter,
    StoreInfo,
    index_columns,
    pixel_window,
    write_index,
)
from diffex.errors import UserError, did_you_mean
from diffex.layouts import open_source
from diffex.readers import fit_square
from diffex.sources import Content, Source, default_channels
from diffex.splits import PARTS, find_columns, group_ids, split, split_columns, unit_name, unsplit_class

SPLIT_BY = "data.split_by"


class StoreSource:
    """An ingested store as a source: classes, metadata and parts as recorded in it."""

    content: Content = "cells"

    def __init__(self, path: Path) -> None:
        self.store = ImageStore(path)
        info = self.store.info
        self.name = str(path)
        self.channels: tuple[str, ...] | None = info.channels
        self.class_names = np.array(info.class_names)[self.store.labels]
        self.metadata = {**self.store.metadata(), **self.store.metadata("Factor_")}

    def images(self, rows: Sequence[int], size: int) -> Iterator[tuple[str, NDArray]]:
        for row in rows:
            yield f"{self.name} image {row}", self.store.pixels([row])[0].transpose(1, 2, 0)

    def files(self) -> list[Path]:
        return [self.store.path / RECORD]


def build_store(data: Data, simulated: Assay, out: Path, progress: Progress | None = None) -> StoreInfo:
    """Read the images that the settings name, split them, and write them to the folder ``out``.

    Args:
        data: which images, channels, size and split.  An ingested store of that very size is viewed, not copied.
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
    source: Source = (
        StoreSource(Path(data.path))
        if data.path is not None and (Path(data.path) / RECORD).is_file()
        else open_source(data, simulated)
    )
    class_of = source.class_names
    if data.class_column is not None:
        column = find_columns([data.class_column], source.metadata, source.name, "data.class_column")[0]
        class_of = np.array([str(v) for v in source.metadata[column]])
    rows, class_names = _choose(class_of, source.name, data)
    classes = np.searchsorted(class_names, class_of[rows])
    parts, split_by = _split(source, rows, classes, class_names, data)
    columns = {
        **index_columns(classes, parts),
        **{name: pa.array(values[rows]) for name, values in source.metadata.items()},
    }
    about: dict[str, Any] = {
        "class_names": tuple(class_names), "size": data.size, "count": len(rows), "source": source.name,
        "split_by": split_by, "simulated": data.path is None,
    }  # fmt: skip
    if isinstance(source, StoreSource) and source.store.info.size == data.size:
        origin = source.store.info
        picked, channels = _pick_channels(source, data, len(origin.channels))
        window = tuple(origin.window[c] for c in picked)
        info = StoreInfo(
            **about, channels=channels, dtype=origin.dtype, shards=origin.shards, depth=origin.depth,
            picked=tuple(origin.picked[c] if origin.picked else c for c in picked),
            window=((data.window[0], data.window[1]),) * len(channels) if data.window else window,
            origin=str(source.store.path.resolve()), identity=origin.identity,
        )  # fmt: skip
        columns["row"] = rows
        if progress:
            progress("data", len(rows), len(rows))
    else:
        info = _copy(source, data, rows, parts == 0, out, about, progress)
    write_index(out / "index.arrow", iter([pa.table(columns)]))
    info.write(out)
    return info


def _copy(
    source: Source, data: Data, rows: NDArray, training: NDArray[np.bool_], out: Path, about: dict[str, Any],
    progress: Progress | None,
) -> StoreInfo:  # fmt: skip
    """Decode, crop and resample the rows into one shard."""
    writer: ShardWriter | None = None
    sample: list[NDArray] = []  # of training pixels, for the window
    for name, image in source.images(rows.tolist(), data.size):
        if writer is None:
            first, depth = name, image.shape[2]
            picked, channels = _pick_channels(source, data, depth)
            writer = ShardWriter(out / "images.arrow", image.dtype, (len(channels), data.size, data.size))
        if image.shape[2] != depth:
            raise UserError(f"{name} has {image.shape[2]} channels, but {first} has {depth}: all images need the same")
        if image.dtype != writer.dtype:
            raise UserError(
                f"{name} has {image.dtype} pixels, but {first} has {writer.dtype}: convert them to one type"
            )
        square = fit_square(image[..., picked], data.size)
        if writer.dtype != np.uint8 and training[writer.count] and len(sample) < 512:
            sample.append(square.reshape(len(square), -1))
        writer.add(square)
        if progress and (writer.count % ROWS == 0 or writer.count == len(rows)):
            progress("data", writer.count, len(rows))
    assert writer is not None
    writer.close()
    if data.window:
        window = ((data.window[0], data.window[1]),) * len(channels)
    elif isinstance(source, StoreSource):
        window = tuple(source.store.info.window[c] for c in picked)
    else:
        window = pixel_window(writer.dtype, sample, channels)
    return StoreInfo(
        **about, channels=channels, dtype=str(writer.dtype), window=window, shards=(("images.arrow", writer.count),),
        depth=len(channels),
    )  # fmt: skip


def _choose(class_of: NDArray[np.str_], source: str, data: Data) -> tuple[NDArray[np.int64], list[str]]:
    """Rows to use, ascending, and the class names, sorted: never the order of a directory or a file."""
    present = sorted(set(class_of.tolist()) - {""})
    for name in data.classes:
        if name not in present:
            raise UserError(f"{source} has no class {name!r}: {did_you_mean(name, present)} (data.classes)")
    class_names = sorted(data.classes) if data.classes else present
    if len(class_names) < 2:
        raise UserError(f"{source} has one class only ({', '.join(class_names)}); a classifier needs two or more")
    rows = np.flatnonzero(np.isin(class_of, class_names))
    if data.max_per_class is not None:
        rng = np.random.default_rng(data.seed)
        by_class = [rows[class_of[rows] == name] for name in class_names]
        rows = np.sort(np.concatenate([rng.permutation(r)[: data.max_per_class] for r in by_class]))
    return rows, class_names


def _pick_channels(source: Source, data: Data, depth: int) -> tuple[list[int], tuple[str, ...]]:
    """Positions and names of the channels to keep out of ``depth``."""
    names = data.channel_names or source.channels or default_channels(depth)
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


def _split(
    source: Source, rows: NDArray, classes: NDArray, class_names: list[str], data: Data
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Part of each chosen row, and the columns whose groups stay whole; an ingested store keeps its own."""
    recorded = source.store if isinstance(source, StoreSource) and data.split_by == ("auto",) else None
    by = recorded.info.split_by if recorded else split_columns(data.split_by, source.metadata, source.name, SPLIT_BY)
    groups = group_ids({n: source.metadata[n][rows] for n in by}) if by else np.arange(len(rows))
    if recorded:
        parts = recorded.part_numbers[rows].astype(np.int64)
    else:
        parts = split(
            groups, classes, valid_fraction=data.valid_fraction, test_fraction=data.test_fraction, seed=data.seed
        )
    missing = unsplit_class(parts, groups, classes)
    if missing is not None:
        c, held = missing
        if recorded and held >= len(PARTS):
            raise UserError(
                f"the split recorded in {source.name} leaves a part without class {class_names[c]!r}: split anew, e.g. "
                f"--set 'data.split_by=[{','.join(n.removeprefix('Metadata_') for n in by)}]'"
            )
        raise UserError(
            f"class {class_names[c]!r} has only {held} different {unit_name(by)} groups: too few for training, "
            f"validation and test; add images or choose another data.split_by"
        )
    return parts, by
