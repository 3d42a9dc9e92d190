"""Every setting of an ingest: how a screen on the disk becomes an image store.

The names are dotted as in ``diffex.config`` (``cells.crop`` is the YAML key, the ``--set`` key and the entry in the
store's ``ingest.json``), and ``diffex data ingest --dry-run`` prints all of this.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffex.settings import setting

LAYOUTS = ("auto", "bbbc021", "load_data", "folder", "files", "table", "ome_tiff", "ome_zarr", "numpy", "parquet")


@dataclass(frozen=True, kw_only=True)
class Read:
    """Which images there are, what is known of each, and what may be opened at all."""

    layout: str = setting("auto", "how the source is laid out; auto looks", choices=LAYOUTS)
    content: str = setting(
        "auto", "what an image shows: single cells, or a field of many (auto: by layout and file names)",
        choices=("auto", "cells", "fields"),
    )  # fmt: skip
    channels: tuple[str, ...] = setting((), "channels to keep, by name or number; empty: all")
    channel_names: tuple[str, ...] = setting((), "names of the channels, in the order of the files; empty: as they say")
    class_column: str | None = setting(None, "metadata column that holds the class; null: the layout's own")
    classes: tuple[str, ...] = setting((), "classes to keep; empty: all; images without a class are always left out")
    table: str | None = setting(None, "CSV, TSV or Parquet file with a row for each image (layouts table and files)")
    key: str | None = setting(None, "column of read.table that names the image file or its number; null: found out")
    join: tuple[str, ...] = setting((), "more tables, joined on the Metadata_ columns that they share")
    pattern: str | None = setting(
        None, "regular expression for file paths, with groups such as (?P<Plate>..), (?P<Well>..), (?P<Channel>..)"
    )
    root: str | None = setting(None, "folder that paths in tables start from, and stay in; null: the source's")
    strip: str | None = setting(None, "beginning of the paths or URLs in tables that read.root stands for")
    projection: str = setting("max", "how a stack of focal planes becomes one", choices=("max", "mean", "middle"))
    max_values: int = setting(1 << 28, "largest number of values (height x width x channels) in an image", low=1)
    max_bytes: int = setting(1 << 31, "largest size of a file in bytes", low=1)


@dataclass(frozen=True, kw_only=True)
class Illumination:
    """Uneven light and background, for fields."""

    method: str = setting(
        "retrospective", "flat field of each plate and channel from its own images, or none",
        choices=("retrospective", "none"),
    )  # fmt: skip
    images: int = setting(64, "fields of a plate that it is estimated from (and all that is surveyed)", low=2)
    degree: int = setting(4, "degree of the polynomial in x and y that a flat field is", low=1, high=8)
    background: str = setting(
        "field", "what is subtracted: a level of each field, a slowly varying surface, or nothing",
        choices=("field", "local", "none"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Finding the cells of a field, and cutting them out."""

    nucleus_channel: str | None = setting(None, "channel that shows nuclei; null: the one called DNA, DAPI, ...")
    cell_channel: str | None = setting(None, "channel that shows whole cells, for features; null: all others, averaged")
    nucleus_diameter: float | None = setting(None, "in pixels of the source; null: measured", low=4.0, high=1000.0)
    crop: int | None = setting(None, "side of a crop in pixels of the source; null: 2.5 nuclei, in steps of 16", low=8)
    size: int | None = setting(None, "side of the stored images; null: as cut, or as in the files", low=8, high=2048)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What is left out, each with its reason in rejected.parquet; 0 switches a rule off."""

    border: bool = setting(True, "leave out cells whose crop leaves the field")
    blur: float = setting(0.3, "least sharpness of a field or cell, in medians of its plate", low=0.0, high=1.0)
    saturation: float = setting(0.02, "largest share of a crop's pixels at the camera's limit", low=0.0, high=1.0)
    debris: float = setting(3.0, "largest DNA brightness of an object, in medians of its plate's nuclei", low=0.0)
    min_area: float = setting(0.3, "least area of a nucleus, in medians of its plate", low=0.0, high=1.0)
    max_area: float = setting(4.0, "largest area of a nucleus, in medians of its plate", low=0.0)
    solidity: float = setting(0.8, "least share of its convex hull that a nucleus fills", low=0.0, high=1.0)


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """One window for each plate and channel, fixed by its reference wells, so that plates compare."""

    scale: str = setting(
        "auto", "plate: reference wells of each plate; none: as in the files (auto: plate for fields, none for cells)",
        choices=("auto", "plate", "none"),
    )  # fmt: skip
    reference: str | None = setting(
        None,
        "query for reference wells, e.g. \"Metadata_Compound == 'DMSO'\"; null: DMSO if there is any, else all",
    )
    low: float = setting(0.1, "percentile of a reference cell's pixels that becomes black", low=0.0, high=50.0)
    high: float = setting(99.9, "percentile that becomes white / headroom", low=50.0, high=100.0)
    headroom: float = setting(1.5, "room above it, so that brighter treated cells are not cut off", low=1.0, high=100.0)
    transform: str = setting("linear", "after the window; sqrt lifts dim structures", choices=("linear", "sqrt"))
    dtype: str = setting("uint16", "type of the stored pixels where they are scaled", choices=("uint8", "uint16"))


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training, validation and test part, by whole units: never by crop."""

    by: tuple[str, ...] = setting(
        ("auto",), "metadata columns whose groups stay in one part; auto: plate and well, ..."
    )
    valid_fraction: float = setting(0.15, "share of the groups for validation", low=0.01, high=0.5)
    test_fraction: float = setting(0.20, "share of the groups for testing and explaining", low=0.01, high=0.5)
    seed: int = setting(0, "seed of the split", low=0)


@dataclass(frozen=True, kw_only=True)
class Screen:
    """All settings of an ingest."""

    read: Read = Read()
    illumination: Illumination = Illumination()
    cells: Cells = Cells()
    quality: Quality = Quality()
    intensity: Intensity = Intensity()
    split: Split = Split()
