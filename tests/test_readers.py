"""Images from folders and Parquet files: every format to the same pixels, classes by name, columns as metadata."""

import io
import json
import os
import pickle
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from diffex.assay import FACTORS
from diffex.config import Assay, Data
from diffex.errors import UserError
from diffex.layouts import open_source
from diffex.readers import decode, depth, fit_square, read_file
from diffex.sources import AssaySource, FolderSource, ParquetSource

RNG = np.random.default_rng(0)


def pixels(*shape: int, kind: type = np.uint8) -> NDArray:
    """Random pixels of a shape, over the whole range of the type."""
    return RNG.integers(0, np.iinfo(kind).max, shape, dtype=kind, endpoint=True)


def pillow(image: NDArray, form: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, form, **how)
    return buffer.getvalue()


def tiff(image: NDArray, **how: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, **{"photometric": "minisblack", **how})
    return buffer.getvalue()


def write_classes(folder: Path, counts: dict[str, int]) -> Path:
    """A folder with one sub-folder per class, written in the order given."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(pillow(pixels(8, 8, 3), "PNG"))
    return folder


def write_parquet(path: Path, **columns: Sequence[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 3)])
def test_a_png_is_read_as_it_was_written(shape: tuple[int, ...]) -> None:
    image = pixels(*shape)
    read = decode(pillow(image, "PNG"), "x")
    assert read.dtype == np.uint8
    assert (read == image.reshape(8, 9, -1)).all()


def test_a_png_of_16_bits_keeps_them() -> None:
    image = pixels(8, 9, kind=np.uint16)
    read = decode(pillow(image, "PNG"), "x")
    assert read.dtype == np.uint16
    assert (read[..., 0] == image).all()


@pytest.mark.parametrize("shape", [(32, 40), (32, 40, 3)])
def test_a_jpeg_is_read_nearly_as_it_was_written(shape: tuple[int, ...]) -> None:
    image = np.full(shape, 90, np.uint8)
    image[8:24, 8:24] = 180
    read = decode(pillow(image, "JPEG", quality=95), "x")
    assert np.abs(read.astype(int) - image.reshape(32, 40, -1)).mean() < 3


def test_a_palette_png_is_read_in_colour() -> None:
    buffer = io.BytesIO()
    flat = Image.fromarray(np.full((8, 8, 3), (200, 30, 60), np.uint8)).convert("P", palette=Image.Palette.ADAPTIVE)
    flat.save(buffer, "PNG")
    assert (decode(buffer.getvalue(), "x") == (200, 30, 60)).all()


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_alpha_is_dropped(form: str) -> None:
    image = pixels(8, 9, 4)
    assert (decode(pillow(image, form), "x") == image[..., :3]).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_one_plane_is_read_as_it_was_written(kind: type, order: str, big: bool) -> None:
    image = pixels(8, 9, kind=kind)
    read = decode(tiff(image, byteorder=order, bigtiff=big), "x")
    assert read.dtype == kind
    assert (read[..., 0] == image).all()


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"planarconfig": "separate"},
        {"imagej": True, "metadata": {"axes": "CYX"}},
        {"ome": True, "metadata": {"axes": "CYX"}},
        {"bigtiff": True},
        {"compression": "zlib"},
    ],
    ids=["pages", "planes", "ImageJ", "OME", "BigTIFF", "compressed"],
)
def test_pages_of_a_tiff_are_channels(count: int, how: dict[str, Any]) -> None:
    image = pixels(count, 16, 18, kind=np.uint16)
    read = decode(tiff(image, **how), "x")
    assert read.shape == (16, 18, count)
    assert (read == image.transpose(1, 2, 0)).all()


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_interleaved_samples_of_a_tiff_are_channels(count: int) -> None:
    image = pixels(16, 18, count)
    assert (decode(tiff(image, planarconfig="contig"), "x") == image).all()


def test_a_colour_tiff_has_three_channels() -> None:
    image = pixels(8, 9, 3)
    assert (decode(tiff(image, photometric="rgb"), "x") == image).all()


def test_a_tiff_of_floats_keeps_its_values() -> None:
    image = RNG.normal(size=(8, 9)).astype(np.float32)
    assert (decode(tiff(image), "x")[..., 0] == image).all()


def test_a_tiff_mask_becomes_black_and_white() -> None:
    mask = pixels(8, 9) > 128
    assert (decode(tiff(mask), "x")[..., 0] == mask * 255).all()


def deep_png(image: NDArray) -> bytes:
    import imagecodecs

    return bytes(imagecodecs.png_encode(image))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_png_of_16_bits_in_colour_keeps_them_too(count: int) -> None:
    image = pixels(8, 9, count, kind=np.uint16)
    read = decode(deep_png(image), "x")
    shown = image[..., : {1: 1, 2: 1, 3: 3, 4: 3}[count]]  # without alpha
    assert read.dtype == np.uint16
    assert (read == shown).all()


@pytest.mark.parametrize(
    ("compression", "predictor"),
    [
        ("lzw", False),
        ("lzw", True),
        ("zlib", True),
        ("zstd", False),
        ("zstd", True),
        ("lzma", True),
        ("packbits", False),
    ],
)
def test_a_compressed_tiff_is_read_as_it_was_written(compression: str, predictor: bool) -> None:
    image = pixels(16, 18, kind=np.uint16)
    assert (decode(tiff(image, compression=compression, predictor=predictor), "x")[..., 0] == image).all()


def test_a_tiff_packed_as_jpeg_is_read() -> None:
    image = np.full((16, 24), 90, np.uint8)
    assert np.abs(decode(tiff(image, compression="jpeg"), "x")[..., 0].astype(int) - 90).max() < 3


@pytest.mark.parametrize("count", [2, 7, 16, 64])
def test_any_number_of_channels_is_told_apart_from_rows_and_columns(count: int) -> None:
    image = pixels(count, 40, 44, kind=np.uint16)
    last = image.transpose(1, 2, 0)
    for how in ({"ome": True, "metadata": {"axes": "CYX"}}, {"imagej": True, "metadata": {"axes": "CYX"}}):
        assert (decode(tiff(image, **how), "x") == last).all()
    assert (decode(tiff(last, planarconfig="contig"), "x") == last).all()
    if count < 40:  # without names of the axes the shorter one is the channels
        assert (decode(tiff(image), "x") == last).all()
        assert (decode(tiff(np.ascontiguousarray(last)), "x") == last).all()


def npy(array: NDArray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["u1", "<u2", ">u2", "<f4", ">f8", "<i2", "?"])
def test_an_array_is_read_as_it_was_saved(kind: str) -> None:
    image = (pixels(8, 9, 3) % 2).astype(kind)
    read = decode(npy(image), "x")
    assert read.dtype == {"u1": np.uint8, "?": np.uint8, "<u2": np.uint16, ">u2": np.uint16}.get(kind, np.float32)
    assert (read == image.astype(float) * (255 if kind == "?" else 1)).all()


def test_the_shorter_end_of_an_array_is_its_channels_in_any_order_of_memory() -> None:
    image = pixels(8, 9, 3)
    for array in (image, image.transpose(2, 0, 1), np.asfortranarray(image)):
        assert (decode(npy(array), "x") == image).all()
    assert (decode(npy(image[..., 0]), "x") == image[..., :1]).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "NPY"])
@pytest.mark.parametrize("shape", [(80, 90), (80, 90, 3)])
def test_the_header_alone_tells_the_number_of_channels(form: str, shape: tuple[int, ...]) -> None:
    image = pixels(*shape)
    content = npy(image) if form == "NPY" else pillow(image, form)
    assert depth(content, "x") == decode(content, "x").shape[2]
    assert depth(content[: -len(content) // 4] if form in ("PNG", "JPEG") else content, "x") == image[0, 0].size


@pytest.mark.parametrize("kind", [np.int16, np.int32, np.uint32, np.float64, np.float16])
def test_other_numbers_become_floats(kind: type) -> None:
    image = (
        (pixels(8, 9).astype(int) - 7 * (np.dtype(kind).kind != "u")).clip(0 if kind is np.uint32 else -99).astype(kind)
    )
    read = decode(tiff(image) if kind is not np.float16 else npy(image), "x")
    assert read.dtype == np.float32
    assert (read[..., 0] == image).all()


# ----------------------------------------------------------------------------------------------------------------------
# Broken images


def floats(value: float) -> bytes:
    image = np.ones((8, 8), np.float32)
    image[3, 4] = value
    return tiff(image)


def announcing_a_huge_size(content: bytes) -> bytes:
    """The same PNG, its header claiming 100,000 x 100,000 pixels, with a checksum that fits."""
    import zlib

    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + content[24:29]
    return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]


def tiff_announcing_a_huge_size() -> bytes:
    """A TIFF whose header claims 60,000 x 60,000 pixels of which hardly any are there."""
    content = bytearray(tiff(pixels(8, 8)))
    for tag in (256, 257):  # width, height: tag, type 4 or 3, one value
        at = content.index(tag.to_bytes(2, "little"), 8)
        content[at + 8 : at + 10] = (60_000).to_bytes(2, "little")
    return bytes(content)


def two_sizes() -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(pixels(8, 8), photometric="minisblack")
        writer.write(pixels(9, 9), photometric="minisblack")
    return buffer.getvalue()


def huge_tiles() -> bytes:
    """A small TIFF whose tiles are huge: each would be unpacked as a whole."""
    content = bytearray(tiff(pixels(16, 16), tile=(16, 16)))
    for tag in (322, 323):  # width and height of a tile
        at = content.index(tag.to_bytes(2, "little"), 8)
        content[at + 8 : at + 12] = (60_000).to_bytes(4, "little")
    return bytes(content)


BROKEN = {
    "huge tiles": (huge_tiles(), "tiles of"),
    "no bytes": (b"", "not a PNG"),
    "text": (b"hello, I am no image", "not a PNG"),
    "a cut PNG": (pillow(pixels(32, 32, 3), "PNG")[:900], "unreadable"),
    "a cut JPEG": (pillow(pixels(32, 32, 3), "JPEG")[:500], "unreadable"),
    "a cut TIFF": (tiff(pixels(32, 32))[:500], "unreadable"),
    "a cut compressed TIFF": (tiff(pixels(32, 32), compression="zlib")[:500], "unreadable"),
    "the start of a TIFF": (b"II*\0", "unreadable"),
    "a PNG of absurd size": (announcing_a_huge_size(pillow(pixels(8, 8), "PNG")), "absurdly large"),
    "a TIFF of absurd size": (tiff_announcing_a_huge_size(), "absurdly large"),
    "NaN": (floats(np.nan), "NaN"),
    "infinity": (floats(np.inf), "infinite"),
    "text called TIFF": (b"Well,Compound", "not an image"),
    "complex numbers": (tiff(np.ones((8, 8), np.complex64)), "complex64"),
    "Python objects": (npy(np.array([[1, None]], object)), "Python objects"),
    "texts": (npy(np.array([["a", "b"]])), "no image"),
    "NaN in an array": (npy(np.full((8, 8), np.nan)), "NaN"),
    "too large a number": (npy(np.full((8, 8), 1e300)), "infinite"),
    "a cut array": (npy(pixels(32, 32))[:500], "cut off"),
    "a cut header of an array": (npy(pixels(32, 32))[:50], "unreadable"),
    "an array of absurd size": (npy(pixels(8, 8)).replace(b"(8, 8), }", b"(80000, 80000), }"), "cut off"),
    "an empty array": (npy(np.zeros((0, 8), np.uint8)), "empty"),
    "a list of images": (npy(np.zeros((2, 3, 8, 8), np.uint8)), "expected"),
    "images of two sizes": (two_sizes(), "2 images of their own"),
    "65 pages": (tiff(pixels(65, 70, 70)), "65 channels; 1 to 64"),
    "65 samples": (tiff(pixels(16, 18, 65), planarconfig="contig"), "65 channels; 1 to 64"),
    "a stack of stacks": (tiff(pixels(3, 2, 16, 18)), "expected one plane"),
}


@pytest.mark.parametrize(("content", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_image_is_refused_by_name_in_one_line(content: bytes, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        decode(content, "cells/a.png")
    assert str(error.value).startswith("cells/a.png: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "whole", [tiff(pixels(16, 16)), tiff(pixels(16, 16), compression="zlib")], ids=["plain", "zlib"]
)
def test_whatever_bytes_are_damaged_a_user_error_is_all_that_comes(whole: bytes) -> None:
    """Decoders raise all kinds of things; each must become a message that names the image, or an image."""
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(70):
        damaged = bytearray(whole)
        for at in rng.integers(4, len(whole), 4):
            damaged[at] = rng.integers(256)
        try:
            assert decode(bytes(damaged), "x").ndim == 3
        except UserError as error:
            assert str(error).startswith("x: ")
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "NPY", "packed TIFF"])
def test_nothing_larger_than_the_limit_is_unpacked(form: str) -> None:
    """A square of one colour packs to a thousandth of its size: the header is all there is to go by."""
    flat = np.zeros((400, 500), np.uint8)
    packed = {"NPY": npy, "packed TIFF": lambda i: tiff(i, compression="zlib"), "TIFF": tiff}
    content = packed[form](flat) if form in packed else pillow(flat, form)
    assert decode(content, "x", 200_000).shape == (400, 500, 1)
    tracemalloc.start()
    with pytest.raises(UserError, match="x: the header announces .*400 x 500 x 1 values.*read.max_values = 199999"):
        decode(content, "x", 199_999)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, {"a": 1, "b": 1})
    image = np.full((16, 16, 3), 90, np.uint8)
    for name, content in {"x.png": pillow(image, "JPEG"), "x.jpg": tiff(image), "x.tif": npy(image)}.items():
        (folder / "a" / name).write_bytes(content)
    source = FolderSource(folder)
    shapes = [image.shape for _, image in source.images(range(5), 8)]
    assert shapes == [(8, 8, 3), (16, 16, 3), (16, 16, 3), (16, 16, 3), (8, 8, 3)]


def test_a_file_that_is_none_or_too_large_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match="pipe.png.*no plain file"):
        read_file(tmp_path / "pipe.png")
    (tmp_path / "x.png").write_bytes(bytes(101))
    with pytest.raises(UserError, match="x.png.*101 bytes; read.max_bytes allows 100"):
        read_file(tmp_path / "x.png", 100)


# ----------------------------------------------------------------------------------------------------------------------
# Squares


@pytest.mark.parametrize("shape", [(8, 8, 1), (20, 8, 2), (9, 31, 3), (64, 64, 5)])
@pytest.mark.parametrize("size", [8, 16])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_any_image_becomes_a_square_of_its_own_type(shape: tuple[int, int, int], size: int, kind: type) -> None:
    square = fit_square(pixels(*shape, kind=kind), size)
    assert square.shape == (shape[2], size, size)
    assert square.dtype == kind


def test_the_central_square_is_kept() -> None:
    wide = pixels(8, 14, 2)
    assert (fit_square(wide, 8) == wide[:, 3:11].transpose(2, 0, 1)).all()
    assert (fit_square(wide.transpose(1, 0, 2), 8) == wide[:, 3:11].transpose(2, 1, 0)).all()


def test_shrinking_averages_pixels() -> None:
    image = pixels(16, 16, 1, kind=np.uint16)
    mean = image[..., 0].reshape(8, 2, 8, 2).mean(axis=(1, 3))
    assert np.abs(fit_square(image, 8)[0] - mean).max() <= 0.5


@pytest.mark.parametrize("size", [4, 8, 13, 32])
def test_a_constant_image_stays_constant(size: int) -> None:
    assert (fit_square(np.full((8, 8, 1), 65535, np.uint16), size) == 65535).all()


def test_enlarging_does_not_wrap_around() -> None:
    """Cubic interpolation overshoots at an edge; white must not turn black there."""
    edge = np.zeros((8, 8, 1), np.uint8)
    edge[:, 4:] = 255
    enlarged = fit_square(edge, 32)[0]
    assert (enlarged[:, :12] < 60).all()
    assert (enlarged[:, 20:] > 195).all()


# ----------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_sub_folder_is_a_class_and_files_below_it_are_its_images(tmp_path: Path) -> None:
    write_classes(tmp_path, {"b": 2, "a": 3})
    (tmp_path / "a" / "plate 1").mkdir()
    (tmp_path / "a" / "plate 1" / "x.TIF").write_bytes(tiff(pixels(8, 8)))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "read me.txt").write_text("not a class")
    (tmp_path / ".cache").mkdir()
    source = FolderSource(tmp_path)
    assert sorted(source.class_names.tolist()) == ["a"] * 4 + ["b"] * 2
    assert set(source.metadata) == {"Metadata_File"}
    assert "a/plate 1/x.TIF" in source.metadata["Metadata_File"]


def test_the_order_of_a_folder_does_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    first = FolderSource(write_classes(tmp_path / "1", {"b": 2, "a": 3}))
    second = FolderSource(write_classes(tmp_path / "2", {"a": 3, "b": 2}))
    assert first.class_names.tolist() == second.class_names.tolist()
    assert first.metadata["Metadata_File"].tolist() == second.metadata["Metadata_File"].tolist()


def test_images_of_a_folder_come_in_the_order_of_the_rows(tmp_path: Path) -> None:
    source = FolderSource(write_classes(tmp_path, {"a": 3, "b": 2}))
    names = [Path(name).relative_to(tmp_path).as_posix() for name, _ in source.images([0, 2, 4], 8)]
    assert names == [str(source.metadata["Metadata_File"][row]) for row in (0, 2, 4)]


def test_an_image_that_vanished_is_named(tmp_path: Path) -> None:
    source = FolderSource(write_classes(tmp_path, {"a": 2, "b": 2}))
    (tmp_path / "a" / "1.png").unlink()
    with pytest.raises(UserError, match=r"1\.png"):
        list(source.images([0, 1], 8))


def test_a_link_that_leaves_the_folder_is_refused_and_one_that_stays_is_read(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "cells", {"a": 2, "b": 1})
    (folder / "b" / "same.png").symlink_to(folder / "a" / "0.png")
    (folder / "a" / "ring").symlink_to(folder)
    assert FolderSource(folder).class_names.tolist().count("b") == 2
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.png").write_bytes(pillow(pixels(8, 8, 3), "PNG"))
    (folder / "b" / "out").symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="b/out' leads out of"):
        FolderSource(folder)
    assert len(FolderSource(folder, root=tmp_path).class_names) == 5


def test_an_archive_reads_like_the_folder_that_it_was_made_from(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "cells", {"b": 2, "a": 3})
    with zipfile.ZipFile(tmp_path / "cells.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/a/._0.png", b"")
    packed, plain = FolderSource(tmp_path / "cells.zip"), FolderSource(folder)
    assert packed.class_names.tolist() == plain.class_names.tolist()
    for (_, one), (_, other) in zip(packed.images(range(5), 8), plain.images(range(5), 8), strict=True):
        assert (one == other).all()
    assert packed.files() == [tmp_path / "cells.zip"]
    with pytest.raises(UserError, match="a/0.png.*max_bytes"):
        next(FolderSource(tmp_path / "cells.zip", max_bytes=50).images([0], 8))


@pytest.mark.parametrize("name", ["../a/x.png", "/a/x.png", "a\\..\\..\\x.png"])
def test_an_archive_whose_names_lead_out_of_it_is_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(name, b"")
    with pytest.raises(UserError, match="leads out of the archive"):
        FolderSource(tmp_path / "x.zip")


def test_a_damaged_archive_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"PK\3\4" + bytes(50))
    with pytest.raises(UserError, match="x.zip.*not a readable ZIP"):
        FolderSource(tmp_path / "x.zip")
    with zipfile.ZipFile(tmp_path / "y.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", pillow(pixels(32, 32, 3), "PNG"))
    content = bytearray((tmp_path / "y.zip").read_bytes())
    content[500:600] = bytes(100)
    (tmp_path / "y.zip").write_bytes(content)
    with pytest.raises(UserError, match="y.zip/a/0.png"):
        next(FolderSource(tmp_path / "y.zip").images([0], 8))


# ----------------------------------------------------------------------------------------------------------------------
# Parquet


def encoded(count: int) -> list[bytes]:
    return [pillow(pixels(8, 8), "PNG") for _ in range(count)]


def test_columns_beside_image_and_class_become_metadata(tmp_path: Path) -> None:
    path = write_parquet(
        tmp_path / "x.parquet", image=encoded(4), class_name=list("abab"), label=[0, 1, 0, 1],
        Plate=["p"] * 4, Metadata_Well=list("wxyz"), Dose=[1.0, 2.0, 3.0, 4.0],
    )  # fmt: skip
    source = ParquetSource(path)
    assert set(source.metadata) == {"Metadata_Plate", "Metadata_Well", "Metadata_Dose"}
    assert source.metadata["Metadata_Dose"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert source.class_names.tolist() == list("abab")


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"class_name": ["b", "a"]}, ["b", "a"]),
        ({"label": [1, 0]}, ["1", "0"]),
        ({"label": ["x", "y"]}, ["x", "y"]),
        ({"class_name": ["b", "a"], "label": [7, 3]}, ["b", "a"]),
        ({"class_name": [2, 10]}, ["2", "10"]),
        ({"class_name": pa.array(["b", "a"]).dictionary_encode()}, ["b", "a"]),
    ],
)
def test_classes_come_from_class_name_or_else_from_label(
    tmp_path: Path, columns: dict[str, Sequence[Any]], names: list[str]
) -> None:
    path = write_parquet(tmp_path / "x.parquet", image=encoded(2), **columns)
    assert ParquetSource(path).class_names.tolist() == names


@pytest.mark.parametrize(
    ("stored", "names"),
    [(json.dumps(["low", "high"]), ["high", "low", "2", "-1"]), ("low,high", ["1", "0", "2", "-1"])],
)
def test_labels_take_their_names_from_the_files_metadata(tmp_path: Path, stored: str, names: list[str]) -> None:
    table = pa.table({"image": encoded(4), "label": [1, 0, 2, -1]}).replace_schema_metadata({"class_names": stored})
    pq.write_table(table, tmp_path / "x.parquet")
    assert ParquetSource(tmp_path / "x.parquet").class_names.tolist() == names


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("group", [3, 1000])
def test_images_of_a_parquet_file_belong_to_their_rows(tmp_path: Path, kind: pa.DataType, group: int) -> None:
    images = [np.full((8, 8), i % 256, np.uint8) for i in range(600)]  # more than one batch of reading
    table = pa.table({"image": pa.array([pillow(i, "PNG") for i in images], kind), "label": [0] * 600})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=group)
    rows = [0, 2, 255, 256, 257, 599]
    read = [int(image[0, 0, 0]) for _, image in ParquetSource(tmp_path / "x.parquet").images(rows, 8)]
    assert read == [row % 256 for row in rows]


@pytest.mark.parametrize("group", [7, 50, 1000])
def test_single_rows_in_any_order_are_the_right_ones_and_ascending_ones_are_read_once(
    tmp_path: Path, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [pillow(np.full((8, 8), i % 256, np.uint8), "PNG") for i in range(600)]
    pq.write_table(pa.table({"image": images, "label": [0] * 600}), tmp_path / "x.parquet", row_group_size=group)
    source = ParquetSource(tmp_path / "x.parquet")
    for row in (5, 400, 3, 599, 0, 300, 301):
        assert next(iter(source.images([row], 8)))[1][0, 0, 0] == row % 256
    source = pickle.loads(pickle.dumps(source))
    opened: list[int] = []
    batches = source._batches
    monkeypatch.setattr(source, "_batches", lambda group: opened.append(group) or batches(group))
    for row in range(0, 600, 2):
        assert next(iter(source.images([row], 8)))[1][0, 0, 0] == row % 256
    assert opened == [0]
    next(iter(source.images([1], 8)))
    assert opened == [0, 0]


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", image=encoded(50), label=[0] * 50)
    content = bytearray(path.read_bytes())
    content[50:300] = bytes(250)
    path.write_bytes(content)
    with pytest.raises(UserError, match="x.parquet"):
        list(ParquetSource(path).images(range(50), 8))


@pytest.mark.parametrize("column", ["class_name", "label"])
def test_a_missing_class_is_named_by_its_row(tmp_path: Path, column: str) -> None:
    path = write_parquet(tmp_path / "x.parquet", image=encoded(3), **{column: ["a", None, "b"]})
    with pytest.raises(UserError, match=f"'{column}' is empty in row 1"):
        ParquetSource(path)


@pytest.mark.parametrize("labels", [[0, 0, 1], [0, 1, 2]])
def test_labels_that_contradict_class_names_are_refused(tmp_path: Path, labels: list[int]) -> None:
    names = ["a", "b", "b"]
    path = write_parquet(tmp_path / "x.parquet", image=encoded(3), class_name=names, label=labels)
    with pytest.raises(UserError, match="contradict"):
        ParquetSource(path)


@pytest.mark.parametrize("absent", [None, b""])
def test_an_empty_image_is_named_by_its_row(tmp_path: Path, absent: bytes | None) -> None:
    path = write_parquet(tmp_path / "x.parquet", image=[*encoded(2), absent], label=[0, 1, 0])
    with pytest.raises(UserError, match="row 2: the image is empty"):
        list(ParquetSource(path).images([0, 1, 2], 8))


# ----------------------------------------------------------------------------------------------------------------------
# Which source


def test_the_path_decides_the_source(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "cells", {"a": 1, "b": 1})
    parquet = write_parquet(tmp_path / "x.PARQUET", image=encoded(1), label=[0])
    assert isinstance(open_source(Data(path=str(folder)), Assay()), FolderSource)
    assert isinstance(open_source(Data(path=str(parquet)), Assay()), ParquetSource)
    assert isinstance(open_source(Data(), Assay(num_images=64)), AssaySource)


def test_the_assay_tells_the_true_factors_of_every_cell() -> None:
    source = AssaySource(Assay(num_images=64), ("DNA",))
    assert {n for n in source.metadata if n.startswith("Factor_")} == {f"Factor_{name}" for name in FACTORS}
    assert {len(column) for column in source.metadata.values()} == {64}


def test_the_assay_draws_the_rows_asked_for() -> None:
    source = AssaySource(Assay(num_images=64), ("DNA", "actin"))
    every = [image for _, image in source.images(range(64), 32)]
    some = list(source.images([5, 40], 32))
    assert [name for name, _ in some] == ["cell 5", "cell 40"]
    assert (some[0][1] == every[5]).all()
    assert (some[1][1] == every[40]).all()
    assert every[0].shape == (32, 32, 2)
