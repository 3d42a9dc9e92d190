"""Bad screens given to an ingest: status 2, one line that says what to mend, no store, and the source left as it was.

Where single images are bad, ``--skip-bad`` stores all others and lists just those.
"""

import csv
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from numpy.typing import NDArray
from PIL import Image

from diffex.cli import main
from diffex.config import Assay
from diffex.data import ImageStore
from diffex.inspection import inspect
from diffex.simulate import write_screen

TINY = Path(__file__).with_name("tiny.yaml")
RNG = np.random.default_rng(0)
GOOD = 16  # images of a good source

Maker = Callable[[Path], Path]
"""Makes a source in a folder and returns its path."""


# ----------------------------------------------------------------------------------------------------------------------
# Good sources, to be spoilt


def pixels(*shape: int, kind: Any = np.uint16) -> NDArray:
    return RNG.integers(0, 250, shape or (2, 16, 16)).astype(kind)


def tiff(image: NDArray | None = None, **how: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels() if image is None else image, **{"photometric": "minisblack", **how})
    return buffer.getvalue()


def npy(image: NDArray, objects: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image, allow_pickle=objects)
    return buffer.getvalue()


def picture(image: NDArray | None = None, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(16, 16, 3, kind=np.uint8) if image is None else image).save(buffer, form)
    return buffer.getvalue()


def with_value(value: float, kind: Any = np.float32) -> NDArray:
    image = pixels(kind=kind)
    image[0, 3, 3] = value
    return image


def bomb_png(side: int = 65_000) -> bytes:
    """A PNG whose header announces an absurd size, and whose few bytes unpack to a lot."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def bomb_tiff() -> bytes:
    """A TIFF whose width and height are overwritten with absurd ones."""
    content = bytearray(tiff(pixels(16, 17)))
    for tag, value in ((256, 1 << 20), (257, 1 << 20)):
        for at in range(8, len(content) - 12):
            if struct.unpack_from("<HHI", content, at)[::2] == (tag, 1) and content[at + 2] in (3, 4):
                struct.pack_into("<HHII", content, at, tag, 4, 1, value)
                break
        else:
            raise AssertionError(f"tag {tag} is not there")
    return bytes(content)


def ring_tiff() -> bytes:
    """A TIFF of three pages, the last of which names itself the next one."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for side in (16, 17, 18):
            writer.write(pixels(side, side), photometric="minisblack", metadata=None)
    content = bytearray(buffer.getvalue())
    at = after = struct.unpack_from("<I", content, 4)[0]
    while after:
        at = after
        end = at + 2 + 12 * struct.unpack_from("<H", content, at)[0]
        after = struct.unpack_from("<I", content, end)[0]
    struct.pack_into("<I", content, end, at)
    return bytes(content)


def bomb_npy() -> bytes:
    header = str({"descr": "<u2", "fortran_order": False, "shape": (1 << 20, 1 << 20)}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64)


def cells(spoilt: dict[str, bytes] | None = None, image: Callable[[], bytes] = tiff, ending: str = "tif") -> Maker:
    """A folder of two classes of eight images each, and spoilt files among the second."""

    def make(tmp: Path) -> Path:
        for name in ("DMSO", "taxol"):
            (tmp / "cells" / name).mkdir(parents=True)
            for i in range(GOOD // 2):
                (tmp / "cells" / name / f"{i}.{ending}").write_bytes(image())
        for name, content in (spoilt or {}).items():
            (tmp / "cells" / "taxol" / name).write_bytes(content)
        return tmp / "cells"

    return make


def lines(rows: Sequence[Sequence[str]], end: str = "\n") -> str:
    """A CSV file, quoted where needed."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator=end).writerows(rows)
    return buffer.getvalue()


def rows_of(count: int = GOOD) -> list[list[str]]:
    """A table of images: file, class, well and who made it."""
    made = [[f"{i}.png", "taxol" if i % 2 else "DMSO", f"A{i // 4 + 1:02}", "Müller"] for i in range(count)]
    return [["File", "Class", "Well", "By"], *made]


def with_table(content: bytes | Callable[[list[list[str]]], bytes] | None = None, name: str = "table.csv") -> Maker:
    """Sixteen images in one folder, and the table of them in another: as it should be, or spoilt."""

    def make(tmp: Path) -> Path:
        (tmp / "images").mkdir()
        for i in range(GOOD):
            (tmp / "images" / f"{i}.png").write_bytes(picture())
        told = content(rows_of()) if callable(content) else content
        (tmp / name).write_bytes(lines(rows_of()).encode() if told is None else told)
        return tmp / "images"

    return make


def changed(old: str, new: str) -> Callable[[list[list[str]]], bytes]:
    """The good table, with a text replaced."""
    return lambda rows: lines(rows).replace(old, new, 1).encode()


def parquet(**columns: Any) -> Maker:
    """A Parquet file of sixteen images; a column of None is left out."""

    def make(tmp: Path) -> Path:
        good = {"image": [tiff() for _ in range(GOOD)], "class_name": ["DMSO", "taxol"] * (GOOD // 2)}
        table = {name: column for name, column in {**good, **columns}.items() if column is not None}
        pq.write_table(pa.table(table), tmp / "cells.parquet", row_group_size=4, compression="none")
        return tmp / "cells.parquet"

    return make


def among(*spoilt: Any, at: int = 5) -> list[Any]:
    """Encoded images, some of them spoilt."""
    every: list[Any] = [tiff() for _ in range(GOOD)]
    every[at : at + len(spoilt)] = spoilt
    return every


def array(change: Callable[[NDArray], Any] = lambda images: None, kind: Any = np.float32) -> Maker:
    """Sixteen images in an .npz file with their classes."""

    def make(tmp: Path) -> Path:
        images = pixels(GOOD, 2, 16, 16, kind=kind)
        change(images)
        np.savez(tmp / "cells.npz", images=images, class_name=np.array(["DMSO", "taxol"] * (GOOD // 2)))
        return tmp / "cells.npz"

    return make


def damaged(make: Maker, change: Callable[[bytes], bytes]) -> Maker:
    """The same file with other bytes."""

    def remake(tmp: Path) -> Path:
        path = make(tmp)
        path.write_bytes(change(path.read_bytes()))
        return path

    return remake


def overwritten(content: bytes) -> bytes:
    """A third of it replaced in the middle; the end (a Parquet file's index) stays."""
    third = len(content) // 3
    return content[:third] + b"\xaa" * third + content[2 * third :]


def overwrite_group(path: Path) -> None:
    """The images of the second row group replaced by nonsense; its classes and all else stay."""
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[start : start + column.total_compressed_size] = b"\xaa" * column.total_compressed_size
    path.write_bytes(content)


def spoilt(make: Maker, spoil: Callable[[Path], object]) -> Maker:
    """The same source after something was done to it."""

    def remake(tmp: Path) -> Path:
        path = make(tmp)
        spoil(path)
        return path

    return remake


def written(name: str, content: bytes) -> Maker:
    def make(tmp: Path) -> Path:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(content)
        return tmp / name

    return make


def files(names: Sequence[str]) -> Maker:
    """A folder of grey images by their names, in which channels are files of their own."""

    def make(tmp: Path) -> Path:
        for name in names:
            (tmp / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / "files" / name).write_bytes(tiff(pixels(16, 16)))
        return tmp / "files"

    return make


PAIRS = [f"{kind}/{i}_{channel}.tif" for kind in ("DMSO", "taxol") for i in range(4) for channel in ("DAPI", "Actin")]


def zarrs(tmp: Path) -> Path:
    """A folder of eight OME-Zarr images of one channel."""
    for i in range(8):
        group = zarr.open_group(str(tmp / "zarrs" / f"{i}.zarr"), mode="w", zarr_format=2)
        level = group.create_array("0", shape=(1, 16, 16), chunks=(1, 16, 16), dtype="uint16")
        level[...] = pixels(1, 16, 16)
        told = [{"axes": [{"name": a} for a in "cyx"], "datasets": [{"path": "0"}]}]
        group.attrs.update({"multiscales": told})
    return tmp / "zarrs"


def omes(tmp: Path) -> Path:
    """A folder of eight OME-TIFF images of two channels."""
    (tmp / "omes").mkdir()
    for i in range(8):
        (tmp / "omes" / f"{i}.ome.tif").write_bytes(tiff(ome=True, metadata={"axes": "CYX"}))
    return tmp / "omes"


def link(to: str, name: str = "taxol/linked.tif", target: bytes = b"") -> Callable[[Path], None]:
    """Put a symbolic link into a source; ``to`` starts from the folder around it."""

    def spoil(path: Path) -> None:
        (path.parent / "elsewhere").mkdir()
        (path.parent / "elsewhere" / "0.tif").write_bytes(target or tiff())
        (path / name).symlink_to(path.parent / to)

    return spoil


# ----------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Bad:
    """A bad source, or a bad command.

    Attributes:
        name: of the row.
        make: makes the source.
        told: fragments of the message: what is wrong, where, and what mends it.
        settings: for --set; ``HERE`` stands for the folder of the test.
        bad: where images are bad and the rest is good: what the reasons in the quarantine must name, one each.
        good: images that are left then.
        options: more of the command.
    """

    name: str
    make: Maker
    told: tuple[str, ...]
    settings: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    good: int = GOOD
    options: tuple[str, ...] = ()


def one(name: str, file: str, content: bytes, *told: str, **more: Any) -> Bad:
    """A row with one bad file among good 16-bit images of two channels."""
    return Bad(name, cells({file: content}), (file, *told), bad=(file,), **more)


WIDE = pixels(2, 64, 64)
CELLS_BY_FILE = ("read.class_column=File", "read.content=cells")
IMAGES = [
    one("cut PNG", "bad.png", picture()[:200], "unreadable", "repair or remove"),
    one("cut JPEG", "bad.jpg", picture(form="JPEG")[:300], "unreadable"),
    one("cut TIFF", "bad.tif", tiff(WIDE)[:4000], "unreadable"),
    one("cut compressed TIFF", "bad.tif", tiff(WIDE, compression="zlib")[:4000], "unreadable"),
    one("cut NPY", "bad.npy", npy(pixels())[:200], "cut off", "repair or remove"),
    one("no bytes", "bad.tif", b"", "no bytes at all"),
    one("zeros", "bad.tif", bytes(4096), "not a PNG, JPEG or TIFF"),
    one("text called PNG", "bad.png", b"Dear diary, " * 40, "bad.png", "not a PNG, JPEG or TIFF"),
    one("uint8 among uint16", "bad.tif", tiff(pixels(kind=np.uint8)), "uint8", "uint16", "convert"),
    one("the first is the odd one", "!bad.tif", tiff(pixels(kind=np.uint8)), "uint8", "uint16", "convert"),
    one("floats among uint16", "bad.tif", tiff(pixels(kind=np.float32)), "float32", "uint16", "convert"),
    one("int32 among uint16", "bad.tif", tiff(pixels(kind=np.int32)), "uint16", "convert"),
    one("a mask among uint16", "bad.npy", npy(pixels() > 100), "uint16", "convert"),
    one("complex numbers", "bad.npy", npy(pixels(kind=np.complex64)), "complex64", "convert"),
    one("objects", "bad.npy", npy(np.array([[{"a": 1}]]), objects=True), "never loaded"),
    one("black", "bad.tif", tiff(np.zeros((2, 16, 16), np.uint16)), "every pixel is", "remove"),
    one("constant", "bad.tif", tiff(np.full((2, 16, 16), 700, np.uint16)), "every pixel is", "700"),
    one("another constant in each channel", "bad.tif",
        tiff(np.stack([np.full((16, 16), v, np.uint16) for v in (5, 9)])), "every pixel is", "[5, 9]"),
    one("NaN", "bad.tif", tiff(with_value(np.nan)), "NaN"),
    one("infinite", "bad.tif", tiff(with_value(-np.inf)), "infinite"),
    one("PNG bomb", "bad.png", bomb_png(), "absurdly large", "read.max_values"),
    one("TIFF bomb", "bad.tif", bomb_tiff(), "bad.tif"),
    one("NPY bomb", "bad.npy", bomb_npy(), "bad.npy"),
    one("larger than is allowed", "bad.tif", tiff(WIDE), "read.max_values", settings=("read.max_values=4096",)),
    one("a file larger than is allowed", "bad.tif", tiff(WIDE), "read.max_bytes", settings=("read.max_bytes=9000",)),
    one("three channels among two", "bad.tif", tiff(pixels(3, 16, 16)), "3 channels", "2"),
    one("a series of images", "bad.tif", tiff(pixels(3, 4, 16, 16)), "bad.tif", "ome_tiff"),
    one("a ring of pages", "bad.tif", ring_tiff(), "bad.tif", "3 images of their own"),
    one("no pixels", "bad.npy", npy(np.zeros((0, 16), np.uint16)), "empty"),
    Bad("Zarr: damaged description", spoilt(zarrs, lambda p: (p / "3.zarr" / ".zattrs").write_text("{")),
        ("3.zarr", "damaged"), CELLS_BY_FILE, bad=("3.zarr",), good=7),
    Bad("Zarr: an absurd shape", spoilt(zarrs, lambda p: absurd(p / "3.zarr" / "0" / ".zarray")),
        ("3.zarr", "absurdly large", "read.max_values"), CELLS_BY_FILE, bad=("3.zarr",), good=7),
    Bad("OME-TIFF: cut, among others", spoilt(omes, lambda p: (p / "3.ome.tif").write_bytes(tiff(WIDE, ome=True)[:90])),
        ("3.ome.tif", "unreadable"), CELLS_BY_FILE, bad=("3.ome.tif",), good=7),
    Bad("channels: a missing file", spoilt(files(PAIRS), lambda p: (p / PAIRS[4]).unlink()),
        ("2_Actin.tif", "no file for channel 'DAPI'"), bad=("no file for channel 'DAPI'",), good=7),
    Bad("a link to nowhere", spoilt(cells(), link("cells/nowhere.tif")), ("linked.tif", "no such file"),
        bad=("linked.tif",)),
    Bad("several", cells({"a.tif": b"", "b.png": b"x", "c.tif": tiff(with_value(np.nan))}), ("a.tif",),
        bad=("a.tif", "b.png", "c.tif")),
    Bad("nothing but bad ones", cells(image=lambda: b"no image"), ("0.tif", "not a PNG")),
    Bad("Parquet: empty image", parquet(image=among(None)), ("cells.parquet row 5", "empty"), bad=("row 5",), good=15),
    Bad("Parquet: unreadable image", parquet(image=among(b"no image", b"")), ("cells.parquet row 5", "not a PNG"),
        bad=("row 5", "row 6"), good=14),
    Bad("Parquet: overwritten images", spoilt(parquet(), overwrite_group), ("cells.parquet", "damaged"),
        bad=("cells.parquet",) * 4, good=12),
    Bad("ZIP: a damaged member", cells(), ("cells.zip/taxol/3.tif", "mend the archive"), bad=("taxol/3.tif",), good=15,
        options=("ZIP",)),
    Bad("arrays: NaN", array(lambda x: x[4].__setitem__((0, 0, 0), np.nan)), ("cells.npz image 4", "NaN"),
        bad=("image 4",), good=15),
    Bad("arrays: constant", array(lambda x: x[4].fill(3)), ("cells.npz image 4", "every pixel"),
        bad=("image 4",), good=15),
    Bad("Zarr: a damaged chunk", spoilt(zarrs, lambda p: (p / "3.zarr" / "0" / "0.0.0").write_bytes(b"xx")),
        ("3.zarr", "unreadable"), ("read.class_column=File", "read.content=cells"), bad=("3.zarr",), good=7),
    Bad("Zarr: no chunks", spoilt(zarrs, lambda p: (p / "3.zarr" / "0" / "0.0.0").unlink()),
        ("3.zarr", "chunk files are missing"), ("read.class_column=File", "read.content=cells"),
        bad=("3.zarr",), good=7),
    Bad("channels: of another size", spoilt(files(PAIRS), lambda p: (p / PAIRS[4]).write_bytes(tiff(pixels(16, 12)))),
        ("differ in size", "2_Actin.tif", "2_DAPI.tif"), bad=("2_DAPI.tif",), good=7),
    Bad("channels: of another type", spoilt(files(PAIRS), lambda p: (p / PAIRS[4]).write_bytes(
        tiff(pixels(16, 16, kind=np.uint8)))), ("2_DAPI.tif", "uint8", "uint16"), bad=("2_DAPI.tif",), good=7),
]  # fmt: skip

TABLE = ("read.table=HERE/table.csv",)
PLATES = ("intensity.scale=plate", *TABLE, "read.class_column=Class")
CODE = "__import__('os').system('touch HERE/owned')"


def table(name: str, content: bytes | Callable[[list[list[str]]], bytes] | None, *told: str, **more: Any) -> Bad:
    """A row with a bad table beside good images."""
    return Bad(f"table: {name}", with_table(content), told, **{"settings": TABLE, **more})


def query(text: str, *told: str) -> Bad:
    """A row with a reference query on good images and a good table."""
    return Bad(f"query: {text[:60]}", with_table(), ("intensity.reference", *told),
               (*PLATES, f"intensity.reference={json.dumps(text)}"))  # fmt: skip


TABLES = [
    table("missing", None, "no table", "absent.csv", "read.table", settings=("read.table=HERE/absent.csv",)),
    table("empty", b"", "table.csv", "empty"),
    table("blank lines", b"\n \n", "table.csv", "empty"),
    table("no header", lambda rows: b"1,2,3\n4,5,6\n", "table.csv", "no header"),
    table("header only", lambda rows: lines(rows[:1]).encode(), "table.csv", "read.key"),
    table("a column twice", changed("By", "Well"), "table.csv", "two columns called 'Well'"),
    table("a field too few", changed(",A01,", ","), "table.csv row 2", "3 fields", "4"),
    table("a quotation mark too many", changed("0.png", '"0.png'), "table.csv row", "quotation mark"),
    table("rows that contradict", lambda rows: lines([*rows, ["3.png", "DMSO", "A01", "Müller"]]).encode(),
          "table.csv row 18", "contradicts row 5", "Metadata_Class", "'DMSO'", "'taxol'"),
    table("NUL bytes", changed("taxol", "tax\0ol"), "table.csv", "NUL"),
    table("cut gzip", gzip.compress(lines(rows_of()).encode())[:-20], "table.csv", "gzip"),
    table("gzip bomb", gzip.compress(bytes(1 << 20)), "table.csv", "read.max_bytes",
          settings=(*TABLE, "read.max_bytes=100000")),
    table("damaged Parquet", b"PAR1" + bytes(100) + b"PAR1", "table.csv", "Parquet"),
    table("no image of it", changed("0.png", "x.png"), "column 'Well' names none of the images", "read.key",
          settings=(*TABLE, "read.key=Well")),
    table("no such key column", None, "'Filename'", "did you mean 'File'?", "read.key",
          settings=(*TABLE, "read.key=Filename")),
    table("no such class column", None, "'Compund'", "read.class_column",
          settings=(*TABLE, "read.class_column=Compund")),
    table("no class at all", lambda rows: lines([[r[0], *r[2:]] for r in rows]).encode(), "read.class_column",
          "Metadata_Well"),
    table("an empty class column", lambda rows: lines([rows[0], *([r[0], "", *r[2:]] for r in rows[1:])]).encode(),
          "no image has a class", "read.class_column"),
    table("a class that is not there", None, "'taxoll'", "did you mean 'taxol'?", "read.classes",
          settings=(*TABLE, "read.classes=[taxoll]")),
    table("nothing in common with a joined one", None, "more.csv", "no column", "read.join",
          settings=(*TABLE, "read.join=[HERE/more.csv]"), options=("MORE",)),
    table("no such column to split by", None, "split.by", "'wel'", "did you mean 'well'?",
          settings=(*TABLE, "split.by=[wel]")),
    Bad("no table but the key", cells(), ("no table", "read.table"), ("read.table=nowhere.csv",)),
    query("Metadata_Class == 'water'", "finds no image"),
    query("Metadata_Klass == 'DMSO'", "Metadata_Klass", "Metadata_Class"),
    query("Metadata_Class = 'DMSO'", "no query", "Metadata_Compound == 'DMSO'"),
    query("DMSO wells", "no query"),
    query("", "no query"),
    query("Metadata_Class > 3", "no query"),
    query(f"@{CODE}", "no query"),
    query(CODE, "no query"),
    query("Metadata_Class.to_csv('HERE/owned')", "no query", "to_csv"),
    query(f"Metadata_Class.map.__globals__['__builtins__']['__import__']('os').system({CODE!r})", "no query"),
    query("Metadata_Class.str.__class__ == 'DMSO'", "no query", "__class__"),
    query("[x for x in (1, 2)]", "no query"),
    query("9 ** 9 ** 9 ** 9 > 1", "no query"),
    Bad("Parquet: no image column", parquet(image=None), ("'image'", "class_name")),
    Bad("Parquet: images that are text", parquet(image=["x"] * GOOD), ("'image'", "encoded bytes", "string")),
    Bad("Parquet: no class", parquet(class_name=None), ("'class_name' or 'label'",)),
    Bad("Parquet: cut", damaged(parquet(), lambda c: c[:-100]), ("cells.parquet", "not a readable Parquet file")),
    Bad("Parquet: overwritten", damaged(parquet(), overwritten), ("cells.parquet", "damaged")),
    Bad("Parquet: no bytes", written("cells.parquet", b""), ("cells.parquet", "not a readable Parquet file")),
    Bad("Parquet: no rows", parquet(image=pa.array([], pa.binary()), class_name=pa.array([], pa.string())),
        ("lists no image",)),
    Bad("arrays: objects", spoilt(array(), lambda p: np.savez(p, images=np.array([{}, 1], object), allow_pickle=True)),
        ("cells.npz", "never loaded")),
    Bad("arrays: cut", damaged(array(), lambda c: c[:-300]), ("cells.npz",)),
    Bad("arrays: a damaged directory", damaged(array(), lambda c: c.replace(b"PK\1\2", b"PK\1\0")),
        ("cells.npz", "not a readable .npz file")),
    Bad("arrays: a pickle", written("cells.npy", pickle.dumps({"a": 1})), ("cells.npy", "not a readable NumPy array")),
    Bad("OME-TIFF: cut", written("cells.ome.tif", tiff(WIDE, ome=True)[:100]), ("cells.ome.tif",)),
    Bad("OME-TIFF: a ring of pages", written("cells.ome.tif", ring_tiff()), ("read.class_column",)),
    Bad("channels: unknown", files(PAIRS), ("'DNA'", "Actin, DAPI", "read.channels"), ("read.channels=[DNA]",)),
    Bad("channels: more names than there are", cells(), ("read.channel_names", "2"), ("read.channel_names=[a, b, c]",)),
    Bad("a link that leaves the source", spoilt(cells(), link("elsewhere/0.tif")),
        ("linked.tif", "leads out of", "read.root")),
    Bad("a link of a folder that leaves it", spoilt(cells(), link("elsewhere", "linked")),
        ("linked", "leads out of", "read.root")),
    Bad("ZIP: a name that leads out", written("cells.zip", b""), ("'../x.tif'", "leads out of"), options=("OUT",)),
    Bad("ZIP: no archive", written("cells.zip", b"PK\3\4 or so"), ("cells.zip", "not a readable ZIP archive")),
    Bad("a name that is not UTF-8", spoilt(cells(), lambda p: (Path(os.fsdecode(bytes(p) + b"/taxol/\xff.tif"))
        .write_bytes(tiff()))), ("udcff.tif", "rename")),
    Bad("a name of two lines", cells({"a\nb.tif": tiff()}), (r"a\nb.tif", "rename")),
]  # fmt: skip

COMMANDS = [
    Bad("missing source", lambda tmp: tmp / "nowhere", ("no file or folder", "nowhere")),
    Bad("empty folder", lambda tmp: (tmp / "empty").mkdir() or tmp / "empty", ("empty", "folder of its own")),
    Bad("an empty class", spoilt(cells(), lambda p: (p / "water").mkdir()), ("water", "remove or fill it")),
    Bad("no classes", spoilt(cells(), lambda p: flatten(p)), ("folder of its own",)),
    Bad("a file of another kind", written("cells.docx", b"hello"), ("cells.docx", "read.layout")),
    Bad("a store already", written("cells/store.json", b"{}"), ("cells", "store"), ("read.layout=folder",),
        options=("PARENT",)),
    Bad("another layout", cells(), ("no table such as BBBC021_v1_image.csv",), ("read.layout=bbbc021",)),
    Bad("fields without a channel of nuclei", cells(), ("cells.nucleus_channel",), ("read.content=fields",)),
    Bad("a pattern that is none", cells(), ("read.pattern", "regular expression"), ("read.pattern='(?P<Well>'",)),
    Bad("a root that is not there", cells(), ("read.root", "nowhere"), ("read.root=HERE/nowhere",)),
    Bad("no workers", cells(), ("--workers", "at least 1", "0"), options=("--workers", "0")),
    Bad("unknown setting", cells(), ("'cells.sise'", "did you mean 'cells.size'?"), ("cells.sise=32",)),
    Bad("a setting out of range", cells(), ("split.test_fraction", "between 0.01 and 0.5"), ("split.test_fraction=2",)),
    Bad("a setting of another kind", cells(), ("cells.size", "whole number"), ("cells.size=12.5",)),
    Bad("no settings file", cells(), ("absent.yaml", "--settings"), options=("--settings", "absent.yaml")),
    Bad("broken settings file", cells(), ("not YAML",), options=("--settings", str(Path(__file__)))),
]  # fmt: skip


def absurd(description: Path) -> None:
    told = json.loads(description.read_text())
    description.write_text(json.dumps({**told, "shape": [1, 1 << 20, 1 << 20]}))


def flatten(folder: Path) -> None:
    """All images into the folder itself."""
    for file in list(folder.glob("*/*.tif")):
        file.rename(folder / f"{file.parent.name}-{file.name}")
    for below in list(folder.iterdir()):
        if below.is_dir():
            below.rmdir()


def test_no_two_rows_of_the_tables_have_the_same_name() -> None:
    every = [bad.name for bad in (*IMAGES, *TABLES, *COMMANDS, *FIELDS)]
    assert len(set(every)) == len(every) >= 45


# ----------------------------------------------------------------------------------------------------------------------
# Running it


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder and what is in it."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*")) if p.is_file()
    }  # fmt: skip


def check(told: str, fragments: Sequence[str]) -> None:
    """Standard error: progress, then one line with all fragments."""
    *before, last = told.splitlines()
    assert last.startswith("error: ")
    assert "Traceback" not in told
    assert all(re.match(r"warning: assay|[\w ]+: [\d,]+ of [\d,]+$", line) for line in before), before
    assert all(fragment in last for fragment in fragments), last
    assert len(last) < 700


def command(bad: Bad, tmp: Path) -> list[str]:
    """The command line of a row, its source made."""
    (tmp / "in").mkdir()
    path = bad.make(tmp / "in")
    options = list(bad.options)
    match bad.options:
        case ("ZIP",):  # the folder as an archive, one member overwritten
            path, options = zipped(path), []
        case ("OUT",):
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("../x.tif", tiff())
            options = []
        case ("MORE",):
            (tmp / "in" / "more.csv").write_text("Colour\nred\n")
            options = []
        case ("PARENT",):
            path, options = path.parent, []
    settings = [part for s in bad.settings for part in ("--set", s.replace("HERE", str(tmp / "in")))]
    workers = [] if "--workers" in options else ["--workers", "1"]
    return ["data", "ingest", str(path), "--output", str(tmp / "store"), *settings, *options, *workers]


def zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for file in sorted(folder.rglob("*.tif")):
            archive.write(file, file.relative_to(folder))
        at = archive.getinfo("taxol/3.tif").header_offset + 400
    content = bytearray(folder.with_suffix(".zip").read_bytes())
    content[at : at + 100] = bytes(100)
    folder.with_suffix(".zip").write_bytes(content)
    return folder.with_suffix(".zip")


def refused(argv: Sequence[str], told: Sequence[str], tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with status 2 and one line, makes no store and leaves the source as it is."""
    before = content(tmp / "in")
    assert main(list(argv)) == 2
    check(capsys.readouterr().err, told)
    assert not (tmp / "store").exists()
    assert content(tmp / "in") == before


@pytest.mark.parametrize("bad", [*IMAGES, *TABLES, *COMMANDS], ids=lambda bad: bad.name)
def test_a_bad_screen_is_one_line_status_2_and_no_store(
    bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(bad, tmp_path)
    refused(argv, bad.told, tmp_path, capsys)
    if not bad.bad:  # images are forgiven, nothing else
        refused([*argv, "--skip-bad"], (), tmp_path, capsys)
        assert not (tmp_path / "in" / "owned").exists()


@pytest.mark.parametrize("bad", [bad for bad in IMAGES if bad.bad], ids=lambda bad: bad.name)
def test_bad_images_can_be_left_out_and_are_listed(
    bad: Bad, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = command(bad, tmp_path)
    before = content(tmp_path / "in")
    assert main([*argv, "--skip-bad"]) == 0
    shown = capsys.readouterr()
    reasons = quarantined(tmp_path / "store")
    assert "Traceback" not in shown.err
    assert content(tmp_path / "in") == before
    store = ImageStore(tmp_path / "store")
    assert f"left out: {len(reasons)} images that can't be used" in shown.out
    assert len(reasons) == len(bad.bad)
    assert all(name in reason for name, reason in zip(bad.bad, reasons, strict=True)), reasons
    assert len(store) == bad.good
    assert int(inspect(store).counts.images.sum()) == bad.good
    if bad.name == "several":
        assert main(["data", "inspect", str(tmp_path / "store")]) == 0
        assert f"{len(store)} images" in capsys.readouterr().out


def quarantined(store: Path) -> list[str]:
    """Reasons of the images that were left out."""
    with (store / "quarantine.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({r["row"] for r in rows}) == len(rows)
    return [r["reason"] for r in rows]


@pytest.mark.parametrize("name", ["cut compressed TIFF", "PNG bomb", "Parquet: overwritten images"])
def test_no_library_adds_lines_of_its_own(name: str, tmp_path: Path) -> None:
    """In a process of its own, where no test runner catches what libraries log and warn."""
    (bad,) = (bad for bad in IMAGES if bad.name == name)
    done = run(command(bad, tmp_path))
    assert done.returncode == 2
    check(done.stderr, bad.told)


@pytest.mark.parametrize("setting", ["read.max_values", "read.max_bytes"])
def test_raising_a_limit_lets_a_merely_large_image_in(setting: str, tmp_path: Path) -> None:
    cells({"large.tif": tiff(WIDE)})(tmp_path)
    argv = ["data", "ingest", str(tmp_path / "cells"), "--output", str(tmp_path / "store"), "--workers", "1"]
    assert main([*argv, "--set", f"{setting}=5000"]) == 2
    assert main([*argv, "--set", f"{setting}=20000"]) == 0
    assert len(ImageStore(tmp_path / "store")) == GOOD + 1


# ----------------------------------------------------------------------------------------------------------------------
# Fields


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plates of four fields: fewer than other tests need."""
    out = tmp_path_factory.mktemp("small") / "screen"
    write_screen(
        Assay(num_plates=2, wells_per_class=2), ("DNA", "tubulin", "actin"), out, field_size=(256, 256),
        cells_per_field=10, fields_per_well=1, out_of_focus=0.0,
    )  # fmt: skip
    return out


@dataclass(frozen=True)
class BadFields:
    """A screen of fields with something spoilt.

    Attributes:
        name: of the row.
        spoil: given a copy of the screen and the files (DNA, tubulin, actin) of one of its fields.
        told: fragments of the message; FILE stands for the name of the file of DNA, ACTIN for that of actin.
        settings: for --set.
        skipped: whether --skip-bad leaves out this one field.
    """

    name: str
    spoil: Callable[[Path, Sequence[Path]], object]
    told: tuple[str, ...]
    settings: tuple[str, ...] = ()
    skipped: bool = False


DMSO = "intensity.reference='Metadata_Compound == \"DMSO\"'"


def put(file: Path, content: bytes | NDArray) -> None:
    """Another file at this place (the old one is a hard link)."""
    file.unlink()
    file.write_bytes(content if isinstance(content, bytes) else tiff(content))


def edit(name: str, change: Callable[[str], str]) -> Callable[[Path, Sequence[Path]], None]:
    def spoil(screen: Path, files: Sequence[Path]) -> None:
        put(screen / name, change((screen / name).read_text()).encode())

    return spoil


def every_channel(image: NDArray) -> Callable[[Path, Sequence[Path]], None]:
    def spoil(screen: Path, files: Sequence[Path]) -> None:
        for file in files:
            put(file, image)

    return spoil


def linked_out(screen: Path, files: Sequence[Path]) -> None:
    shutil.copy(files[0], screen.parent / "outside.tif")
    files[0].unlink()
    files[0].symlink_to(screen.parent / "outside.tif")


def climbing(text: str) -> str:
    """The names of all files of actin lead out."""
    return re.sub(r'"(\w+_s1_w4)', r'"../../../\1', text)


def without_controls(text: str) -> str:
    """All wells of the first plate hold the compound."""
    header, *rows = text.splitlines()
    return "\n".join([header, *(r.replace('"DMSO"', '"compound"') if "Week1_20001" in r else r for r in rows), ""])


IMAGE_CSV, MOA = "BBBC021_v1_image.csv", "BBBC021_v1_moa.csv"
FIELD = pixels(256, 256)
FIELDS = [
    BadFields("field: cut TIFF", lambda s, f: put(f[0], f[0].read_bytes()[:9000]), ("FILE", "unreadable"),
              skipped=True),
    BadFields("field: no bytes", lambda s, f: put(f[2], b""), ("ACTIN", "no bytes"), skipped=True),
    BadFields("field: a missing channel file", lambda s, f: f[2].unlink(), ("ACTIN", "no such file"), skipped=True),
    BadFields("field: a channel of another size", lambda s, f: put(f[2], pixels(256, 250)),
              ("ACTIN", "FILE", "differ in size: 256 x 250 and 256 x 256"), skipped=True),
    BadFields("field: a constant channel", lambda s, f: put(f[2], np.full((256, 256), 320, np.uint16)),
              ("FILE", "'actin' is constant", "320"), skipped=True),
    BadFields("field: black", every_channel(np.zeros((256, 256), np.uint16)), ("FILE", "every pixel"), skipped=True),
    BadFields("field: smaller than a crop", every_channel(FIELD[:40, :40]), ("FILE", "smaller than one crop of"),
              skipped=True),
    BadFields("field: uint8 among uint16", every_channel(FIELD.astype(np.uint8)), ("FILE", "uint8", "convert"),
              skipped=True),
    BadFields("field: NaN", every_channel(np.where(FIELD > 240, np.nan, FIELD).astype(np.float32)), ("FILE", "NaN"),
              skipped=True),
    BadFields("field: a channel file of three channels", lambda s, f: put(f[1], pixels(3, 256, 256)),
              ("holds 3 channels", "read.layout"), skipped=True),
    BadFields("field: a plate without its reference wells", edit(IMAGE_CSV, without_controls),
              ("intensity.reference", "'Week1_20001'", "1 of 2 plates", "intensity.scale=none"), (DMSO,)),
    BadFields("field: no nucleus on any plate", lambda s, f: [put(p, noise()) for p in s.glob("Week1/*/*_w1*")],
              ("no nucleus", "cells.nucleus_channel")),
    BadFields("field: an image column that lacks", edit(IMAGE_CSV, lambda t: t.replace("FileName_Actin", "Name_A")),
              (IMAGE_CSV, "FileName_Actin")),
    BadFields("field: a compound column that lacks", edit(IMAGE_CSV, lambda t: t.replace("Metadata_Compound", "Drug")),
              (IMAGE_CSV, "Image_Metadata_Compound")),
    BadFields("field: a column twice", edit(IMAGE_CSV, lambda t: t.replace("ImageNumber", "TableNumber", 1)),
              (IMAGE_CSV, "two columns called 'TableNumber'")),
    BadFields("field: rows that contradict", edit(IMAGE_CSV, lambda t: t + t.splitlines()[1].replace("DMSO", "x")),
              (IMAGE_CSV, "row 10 contradicts row 2", "Metadata_Compound")),
    BadFields("field: a dose that is no number", edit(IMAGE_CSV, lambda t: t.replace("0.000000", "none", 1)),
              (IMAGE_CSV, "row 2", "'none'", "not a number")),
    BadFields("field: an absolute path", edit(IMAGE_CSV, lambda t: t.replace('"Week1/', '"/etc/Week1/')),
              (IMAGE_CSV, "row 2", "leads out of", "read.strip='/etc/'")),
    BadFields("field: a path that climbs out", edit(IMAGE_CSV, lambda t: t.replace('"Week1/', '"Week1/../../Week1/')),
              (IMAGE_CSV, "row 2", "leads out of", "read.root")),
    BadFields("field: a file name that climbs out", edit(IMAGE_CSV, climbing),
              (IMAGE_CSV, "row 2", "leads out of", "read.root")),
    BadFields("field: a link that leaves the screen", linked_out, (IMAGE_CSV, "FILE", "leads out of", "read.root")),
    BadFields("field: mechanisms that contradict", edit(MOA, lambda t: t + t.splitlines()[1][:-2] + 'x"\n'),
              (MOA, "row 4 contradicts row 2", "Metadata_MOA")),
    BadFields("field: a mechanism column that lacks", edit(MOA, lambda t: t.replace("moa", "effect", 1)),
              (MOA, "no column 'moa'")),
    BadFields("field: no compound has a mechanism", edit(MOA, lambda t: re.sub('\n"\\w+"', '\n"x"', t)),
              (MOA, "no row for any image")),
    BadFields("field: no plate is there", lambda s, f: (s / "Week1").rename(s / "moved"),
              (IMAGE_CSV, "none of the files", "read.root")),
    BadFields("field: a crop larger than any field", lambda s, f: None, ("smaller than one crop of 300", "cells.crop"),
              ("cells.crop=300",)),
    BadFields("field: no such channel of nuclei", lambda s, f: None, ("'DNS'", "did you mean 'DNA'?"),
              ("cells.nucleus_channel=DNS",)),
]  # fmt: skip


def noise() -> NDArray:
    """A field without cells."""
    return np.clip(RNG.normal(300, 12, (256, 256)), 0, None).astype(np.uint16)


def copy(screen: Path, tmp: Path) -> tuple[Path, list[Path]]:
    """A copy of the screen by hard links, and the files of one of its fields."""
    (tmp / "in").mkdir()
    shutil.copytree(screen, tmp / "in" / "screen", copy_function=os.link)
    first = sorted((tmp / "in" / "screen").glob("Week1/*/*_w1*.tif"))[2]
    return tmp / "in" / "screen", [next(first.parent.glob(f"{first.name[:6]}_w{n}*")) for n in (1, 2, 4)]


def at(screen: Path, tmp: Path, *settings: str) -> list[str]:
    sets = [part for s in settings for part in ("--set", s)]
    return ["data", "ingest", str(screen), "--output", str(tmp / "store"), "--workers", "1", *sets]


@pytest.mark.parametrize("bad", FIELDS, ids=lambda bad: bad.name)
def test_bad_fields_are_one_line_status_2_and_no_store(
    bad: BadFields, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, files = copy(small, tmp_path)
    named = {"FILE": files[0].name, "ACTIN": files[2].name}
    bad.spoil(screen, files)
    argv = at(screen, tmp_path, *bad.settings)
    refused(argv, [named.get(t, t) for t in bad.told], tmp_path, capsys)
    if not bad.skipped:
        refused([*argv, "--skip-bad"], (), tmp_path, capsys)


@pytest.mark.parametrize("bad", [bad for bad in FIELDS if bad.skipped], ids=lambda bad: bad.name)
def test_bad_fields_can_be_left_out_and_are_listed(
    bad: BadFields, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, files = copy(small, tmp_path)
    bad.spoil(screen, files)
    assert main([*at(screen, tmp_path), "--skip-bad"]) == 0
    assert "left out: 1 images that can't be used" in capsys.readouterr().out
    (reason,) = quarantined(tmp_path / "store")
    assert files[0].parent.name in reason
    assert any(file.name in reason for file in files)
    store = ImageStore(tmp_path / "store")
    seen = {(p, w) for p, w in zip(*(store.metadata()[f"Metadata_{n}"] for n in ("Plate", "Well")), strict=True)}
    rejected = pq.read_table(tmp_path / "store" / "rejected.parquet").to_pandas()
    seen |= set(zip(rejected.Metadata_Plate, rejected.Metadata_Well, strict=True))
    every = {(p.parent.name, p.name[:3]) for p in small.glob("Week1/*/*_w1*")}
    assert seen == every - {(files[0].parent.name, files[0].name[:3])}
    assert int(inspect(store).counts.images.sum()) == len(store) > 0
    if bad.name == "field: black":
        assert main(["data", "inspect", str(tmp_path / "store")]) == 0


def test_a_plate_without_any_nucleus_is_left_out_with_its_reason(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, files = copy(small, tmp_path)
    for file in files[0].parent.glob("*_w1*"):
        put(file, noise())
    assert main(at(screen, tmp_path, DMSO)) == 0
    shown = capsys.readouterr().out
    store = ImageStore(tmp_path / "store")
    assert files[0].parent.name not in store.metadata()["Metadata_Plate"]
    rejected = pq.read_table(tmp_path / "store" / "rejected.parquet").to_pandas()
    mine = rejected[rejected.Metadata_Plate == files[0].parent.name]
    assert len(mine) == 4
    assert all(f"left out: 4 {reason}" in shown for reason in set(mine.Reason))


def test_a_plate_without_any_nucleus_leaves_the_range_of_the_others_as_it_is(small: Path, tmp_path: Path) -> None:
    screen, files = copy(small, tmp_path)
    for file in files[0].parent.glob("*_w1*"):
        put(file, noise())
    assert main(at(screen, tmp_path, "intensity.scale=none")) == 0
    store = ImageStore(tmp_path / "store")
    assert np.isfinite(store.info.window).all()
    assert np.isfinite(store.batch([0]).x.numpy()).all()


def test_a_plate_of_which_nothing_can_be_read_costs_no_other_plate(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, files = copy(small, tmp_path)
    for file in files[0].parent.glob("*_w4*"):
        put(file, b"")
    assert main(at(screen, tmp_path)) == 2
    assert main([*at(screen, tmp_path), "--skip-bad"]) == 0
    assert all("no bytes at all" in reason for reason in quarantined(tmp_path / "store"))
    assert len(quarantined(tmp_path / "store")) == 4
    assert files[0].parent.name not in ImageStore(tmp_path / "store").metadata()["Metadata_Plate"]


def test_compounds_without_a_mechanism_are_left_out_with_a_note(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, _ = copy(small, tmp_path)
    edit(MOA, lambda t: t.replace('"compound",0', '"unknown",0').replace('"compound",1', '"unknown",1'))(screen, [])
    assert main(at(screen, tmp_path)) == 0
    assert "4 of 8 images have no mechanism of action" in capsys.readouterr().out
    assert ImageStore(tmp_path / "store").info.class_names == ("DMSO",)


def test_a_wide_choice_of_text_forms_of_the_tables_gives_one_store(small: Path, tmp_path: Path) -> None:
    """Line ends, byte order mark, encoding: the stores are the same to the byte, but for the note of their source."""
    screen, _ = copy(small, tmp_path)
    forms: list[Callable[[bytes], bytes]] = [
        lambda text: text,
        lambda text: b"\xef\xbb\xbf" + text.replace(b'"', b"").replace(b"\n", b"\r\n"),
        lambda text: (text.replace(b"\n", b"\r") + text.splitlines()[-1]).decode().encode("utf-16"),
    ]
    stores = []
    plain = {name: (small / name).read_bytes() for name in (IMAGE_CSV, MOA)}
    for i, form in enumerate(forms):
        for name, text in plain.items():
            put(screen / name, form(text))
        assert main([*at(screen, tmp_path)[:3], "--output", str(tmp_path / str(i)), "--workers", "1"]) == 0
        stores.append({n: d for n, d in content(tmp_path / str(i)).items() if not n.endswith(".json")})
    assert all(store == stores[0] for store in stores)


# ----------------------------------------------------------------------------------------------------------------------
# Odd, but good


def stored(argv: Sequence[str], tmp: Path) -> dict[str, str]:
    """What is in the store that the command makes, but for notes of where it came from."""
    assert main(list(argv)) == 0
    found = {name: digest for name, digest in content(tmp / "store").items() if not name.endswith(".json")}
    shutil.rmtree(tmp / "store")
    return found


@pytest.mark.parametrize(
    "form",
    [
        lambda t: t.replace("\n", "\r\n").encode(), lambda t: t.replace("\n", "\r").encode(),
        lambda t: t.encode("utf-8-sig"), lambda t: t.encode("latin-1"), lambda t: t.encode("utf-16"),
        lambda t: t.encode("utf-16-le"), lambda t: t.replace(",", ";").encode(),
        lambda t: t.replace(",", "\t").encode(),
        lambda t: re.sub(r"[^,\n]+", r'"\g<0>"', t).encode(), lambda t: gzip.compress(t.encode()),
        lambda t: (t + t.splitlines()[3] + "\n").encode(), lambda t: (t + "\n\n").encode(),
        lambda t: t.replace(".png", ".PNG").encode(), lambda t: t.replace("File,Class", "file,CLASS", 1).encode(),
    ],
    ids=["CRLF", "CR", "BOM", "Latin-1", "UTF-16", "UTF-16 without mark", "semicolons", "tabs", "quoted", "gzip",
         "a row twice", "blank lines", "names in capitals", "columns in other case"],
)  # fmt: skip
def test_the_form_of_a_table_plays_no_part(form: Callable[[str], bytes], tmp_path: Path) -> None:
    path = with_table()(tmp_path)
    argv = [*at(path, tmp_path), "--set", f"read.table={tmp_path / 'table.csv'}"]
    plain = stored(argv, tmp_path)
    assert any("index" in name for name in plain)
    (tmp_path / "table.csv").write_bytes(form(lines(rows_of())))
    name = "read.class_column=CLASS" if b"CLASS" in (tmp_path / "table.csv").read_bytes() else "read.classes=[]"
    again = stored([*argv, "--set", name], tmp_path)
    assert again == plain or (name.endswith("CLASS") and again.keys() == plain.keys())


def test_quoted_commas_stay_in_their_field(tmp_path: Path) -> None:
    path = with_table(lambda rows: lines([[v.replace("taxol", "taxol, 3 µM") for v in r] for r in rows]).encode())(
        tmp_path
    )
    assert main([*at(path, tmp_path), "--set", f"read.table={tmp_path / 'table.csv'}"]) == 0
    assert ImageStore(tmp_path / "store").info.class_names == ("DMSO", "taxol, 3 µM")


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("odd.tif", picture()), ("odd.png", picture(form="JPEG")), ("odd.JPG", picture()), ("odd.Png", picture()),
        ("odd.jpeg", tiff(pixels(16, 16, 3, kind=np.uint8), photometric="rgb")), ("Müller 細胞.png", picture()),
        ("a,b;c'd \"e\".png", picture()), ("u\u0308.png", picture()),
        ("odd.png", picture(pixels(9, 31, 3, kind=np.uint8))),
        ("deep/er/x.png", picture()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_an_odd_name_or_ending_is_no_mistake(name: str, image: bytes, tmp_path: Path) -> None:
    path = cells(image=picture, ending="png")(tmp_path)
    (path / "taxol" / name).parent.mkdir(parents=True, exist_ok=True)
    (path / "taxol" / name).write_bytes(image)
    assert main(at(path, tmp_path)) == 0
    store = ImageStore(tmp_path / "store")
    assert f"taxol/{name}" in store.metadata()["Metadata_File"]
    assert len(store) == GOOD + 1


@pytest.mark.parametrize("ending", ["TIF", "Tif", "tiff", "TIFF"])
def test_endings_may_be_written_in_any_case(ending: str, tmp_path: Path) -> None:
    assert main(at(cells(ending=ending)(tmp_path), tmp_path)) == 0
    assert len(ImageStore(tmp_path / "store")) == GOOD


def test_a_link_within_the_source_is_followed_and_one_within_the_root_too(tmp_path: Path) -> None:
    path = cells()(tmp_path)
    (path / "taxol" / "linked.tif").symlink_to(path / "DMSO" / "0.tif")
    assert main(at(path, tmp_path)) == 0
    shutil.rmtree(tmp_path / "store")
    link("elsewhere/0.tif", "taxol/outside.tif")(path)
    assert main(at(path, tmp_path, f"read.root={tmp_path}")) == 0
    assert len(ImageStore(tmp_path / "store")) == GOOD + 2


def test_a_reference_query_may_compare_columns_in_every_usual_way(tmp_path: Path) -> None:
    path = with_table()(tmp_path)
    table = f"read.table={tmp_path / 'table.csv'}"
    for text in (
        "Metadata_Class == 'DMSO'", "`Metadata_Class` != 'taxol' and not Metadata_Well == 'A09'",
        "Metadata_Class in ['DMSO', 'water'] | Metadata_Class == 'water'", "Metadata_Class.str.contains('DM')",
        "Metadata_Class.isin(['DMSO']) & Metadata_Well.notna()", "(Metadata_Class.str.lower() == 'dmso')",
    ):  # fmt: skip
        argv = at(path, tmp_path, "intensity.scale=plate", table, f"intensity.reference={json.dumps(text)}")
        assert main(argv) == 0, text
        shutil.rmtree(tmp_path / "store")


def test_too_few_units_are_no_mistake_but_the_inspection_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = with_table(lambda rows: lines([[v.replace("A04", "A01") for v in r] for r in rows[:9]]).encode())(tmp_path)
    assert main([*at(path, tmp_path), "--set", f"read.table={tmp_path / 'table.csv'}"]) == 0
    assert "8 of 16 images are left out" in capsys.readouterr().out
    assert main(["data", "inspect", str(tmp_path / "store")]) == 0
    assert "serious  DMSO, taxol: too few wells" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# Places


def foreign(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")


def foreign_record(out: Path) -> None:
    foreign(out)
    (out / "ingest.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("occupy", "told"),
    [
        (foreign, ("not an ingested store", "--output")),
        (foreign_record, ("not an ingested store", "--output")),
        (lambda out: out.write_text("somebody's"), ("not an ingested store", "--output")),
        (lambda out: main(at(cells()(out.parent / "other"), out.parent)), ("made from other images", "--output")),
    ],
)
def test_what_is_at_the_output_already_is_left_alone(
    occupy: Callable[[Path], object], told: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    occupy(tmp_path / "store")
    before = content(tmp_path)
    path = cells()(tmp_path / "in")
    capsys.readouterr()
    assert main(at(path, tmp_path)) == 2
    check(capsys.readouterr().err, told)
    shutil.rmtree(tmp_path / "in")
    assert content(tmp_path) == before


@pytest.mark.parametrize("place", ["file/store", "/proc/diffex/store", "x" * 300])
def test_a_place_that_cannot_be_written_is_told(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("somebody's")
    path = cells()(tmp_path)
    before = content(tmp_path)
    assert main(["data", "ingest", str(path), "--output", str(tmp_path / place), "--workers", "1"]) == 2
    check(capsys.readouterr().err, (place[:200], "--output"))
    assert content(tmp_path) == before


def test_a_store_within_the_source_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cells()(tmp_path)
    before = content(tmp_path)
    assert main(["data", "ingest", str(path), "--output", str(path / "store"), "--workers", "1"]) == 2
    check(capsys.readouterr().err, ("lies in the source", "--output"))
    assert content(tmp_path) == before


def test_an_output_that_is_missing_or_in_folders_to_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cells()(tmp_path)
    assert main(["data", "ingest", str(path), "--workers", "1"]) == 2
    check(capsys.readouterr().err, ("--output",))
    assert main(["data", "ingest", str(path), "--output", str(tmp_path / "a" / "b"), "--workers", "1"]) == 0
    assert len(ImageStore(tmp_path / "a" / "b")) == GOOD


# ----------------------------------------------------------------------------------------------------------------------
# Damaged stores


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("good")
    assert main(at(cells()(tmp), tmp)) == 0
    return tmp / "store"


def other_json(**values: object) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


DAMAGES: list[tuple[str, Callable[[bytes], bytes]]] = [
    *((name, change) for name in ("images-00000.arrow", "index.arrow", "store.json")
      for change in (lambda c: b"", lambda c: c[: len(c) // 2], lambda c: b"I am a text " * 100)),
    ("images-00000.arrow", lambda c: c[:-30]),
    ("index.arrow", overwritten),
    ("store.json", lambda c: b"[1, 2]"),
    ("store.json", other_json(count=17)),
    ("store.json", other_json(size=8)),
    ("store.json", other_json(dtype="object")),
    ("store.json", other_json(window=[[0, 1]])),
    ("store.json", other_json(class_names=["DMSO"])),
    ("store.json", other_json(channels=["a"])),
    ("store.json", other_json(shards=[["absent.arrow", 16]])),
    ("store.json", other_json(shards=[["index.arrow", 16]])),
    ("store.json", other_json(split_by=["Metadata_Nothing"])),
    ("store.json", other_json(format=99)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "verb"), [*((row, "inspect") for row in range(len(DAMAGES))), *((row, "run") for row in (1, 4, 7, 15))]
)
def test_a_damaged_store_is_told_by_name(
    row: int, verb: str, good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change = DAMAGES[row]
    store = tmp_path / "damaged"
    shutil.copytree(good, store)
    (store / name).write_bytes(change((store / name).read_bytes()))
    argv = ["data", "inspect", str(store)]
    if verb == "run":
        argv = ["run", "--recipe", str(TINY), "--data", str(store), "--output", str(tmp_path / "out")]
        argv += ["--set", "data.channels=[]", "--set", "data.size=16"]
    before = content(store)
    assert main(argv) == 2
    check(capsys.readouterr().err, ("damaged",))
    assert content(store) == before


def test_the_same_command_does_not_pass_over_a_damaged_store(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = at(cells()(tmp_path), tmp_path)
    assert main(argv) == 0
    (tmp_path / "store" / "images-00000.arrow").unlink()
    assert main(argv) == 2
    check(capsys.readouterr().err, ("damaged", "images-00000.arrow is missing", "remove it"))


# ----------------------------------------------------------------------------------------------------------------------
# Full disks, kills, and others at work

MANY = 1300  # images: six tasks

HANGS = """
import importlib, sys, time
module, name, calls, *argv = sys.argv[1:]
owner = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    owner = getattr(owner, part)
real, seen = getattr(owner, last), 0
def hang(*args, **named):
    global seen
    seen += 1
    if seen == int(calls):
        print("hangs", flush=True)
        time.sleep(600)
    return real(*args, **named)
setattr(owner, last, hang)
from diffex.cli import main
sys.exit(main(argv))
"""
"""Runs the command, but hangs at the n-th call of a function."""


def run(argv: Sequence[str], limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which may write no file longer than ``limit`` bytes."""

    def small_disk() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-m", "diffex.cli", *argv], capture_output=True, text=True, preexec_fn=small_disk,
        cwd=Path(__file__).resolve().parents[1], env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of classes that takes several tasks, and the files of its store, made in one go."""
    tmp = tmp_path_factory.mktemp("many")
    for i in range(MANY):
        folder = tmp / "cells" / ("taxol" if i % 2 else "DMSO")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"a-name-as-long-as-those-of-many-a-microscope-{i:04}.npy").write_bytes(npy(pixels(2, 8, 8)))
    assert main(at(tmp / "cells", tmp)) == 0
    return tmp / "cells", content(tmp / "store")


@pytest.mark.parametrize("limit", [10, 30_000, 80_000])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    limit: int, many: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, straight = many
    argv = at(source, tmp_path)
    for now in (limit, 10) if limit == 80_000 else (limit,):  # fuller still
        done = run(argv, now)
        assert done.returncode == 2, done.stderr
        check(done.stderr, ("can't write to", "store.partial", "File too large"))
        assert not (tmp_path / "store").exists()
    before = finished(tmp_path / "store.partial")
    assert len(before) == (6 if limit == 80_000 else 0)  # then the index is what finds no room
    assert main(argv) == 0
    assert content(tmp_path / "store") == straight
    assert kept(before, tmp_path / "store")
    assert not (tmp_path / "store.partial").exists()


def finished(partial: Path) -> dict[str, tuple[int, int]]:
    """The shards of tasks that have left their record, each with its time and number on the disk."""
    shards = [partial / f"images-{done.stem.removeprefix('done-')}.arrow" for done in partial.glob("done-*.json")]
    return {s.name: (s.stat().st_mtime_ns, s.stat().st_ino) for s in shards}


def kept(before: dict[str, tuple[int, int]], store: Path) -> bool:
    """Whether those shards are the very same files."""
    return all((s.stat().st_mtime_ns, s.stat().st_ino) == was for n, was in before.items() for s in [store / n])


@pytest.fixture
def hanging(many: tuple[Path, dict[str, str]], tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts an ingest into ``store`` that hangs at some call; it is killed when the test ends."""
    started: list[subprocess.Popen[str]] = []

    def start(module: str, name: str, calls: int) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", HANGS, module, name, str(calls), *at(many[0], tmp_path)]
        root = Path(__file__).resolve().parents[1]
        started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "hangs\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@pytest.mark.parametrize(
    ("module", "name", "calls", "tasks"),
    [
        ("diffex.ingest_tasks", "ShardWriter.add", 700, 2),
        ("diffex.ingest_tasks", "put", 4, 3),
        ("diffex.ingest", "write_index", 1, 6),
        ("diffex.ingest", "put", 1, 6),
    ],
    ids=["amid a shard", "before a task's record", "before the index", "before the renaming"],
)
def test_a_killed_ingest_goes_on_and_redoes_nothing(
    module: str, name: str, calls: int, tasks: int, many: tuple[Path, dict[str, str]], tmp_path: Path,
    hanging: Callable[..., subprocess.Popen[str]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    process = hanging(module, name, calls)
    process.kill()
    process.wait()
    assert not (tmp_path / "store").exists()
    before = finished(tmp_path / "store.partial")
    assert len(before) == tasks
    assert main(at(many[0], tmp_path)) == 0
    assert content(tmp_path / "store") == many[1]
    assert kept(before, tmp_path / "store")


def test_a_second_ingest_of_the_same_store_is_told_to_wait(
    many: tuple[Path, dict[str, str]], tmp_path: Path, hanging: Callable[..., subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    process = hanging("diffex.ingest_tasks", "put", 3)
    before = content(tmp_path / "store.partial")
    for settings in ((), ("split.seed=1",)):
        assert main(at(many[0], tmp_path, *settings)) == 2
        check(capsys.readouterr().err, ("another process is writing", "store.partial", "wait"))
    assert content(tmp_path / "store.partial") == before
    process.kill()
    process.wait()
    assert main(at(many[0], tmp_path)) == 0


def test_an_unfinished_ingest_of_other_settings_is_left_alone(
    many: tuple[Path, dict[str, str]], tmp_path: Path, hanging: Callable[..., subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    process = hanging("diffex.ingest_tasks", "put", 3)
    process.kill()
    process.wait()
    before = content(tmp_path / "store.partial")
    assert main(at(many[0], tmp_path, "split.seed=1")) == 2
    check(capsys.readouterr().err, ("store.partial", "unfinished ingest of other images or settings", "remove it"))
    assert content(tmp_path / "store.partial") == before
    assert not (tmp_path / "store").exists()


def test_the_same_command_again_touches_nothing_and_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = cells()(tmp_path)
    assert main(at(path, tmp_path)) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    capsys.readouterr()
    assert main(at(path, tmp_path)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(at(path, tmp_path, "split.seed=1")) == 2
    check(capsys.readouterr().err, ("was made from other images or settings", "--output"))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
