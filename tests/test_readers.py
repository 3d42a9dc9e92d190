"""Images from folders and Parquet files: every format to the same pixels, classes by name, columns as metadata."""

import io
import json
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
from diffex.readers import AssaySource, FolderSource, ParquetSource, decode, fit_square, open_source

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


BROKEN = {
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
    "six pages": (tiff(pixels(6, 16, 18)), "6 channels; 1 to 5"),
    "six samples": (tiff(pixels(16, 18, 6), planarconfig="contig"), "6 channels; 1 to 5"),
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
