"""Pixels of one image file: PNG, JPEG, TIFF or NPY to (H, W, C), whatever the ending of its name says.

The header is read first, so that nothing absurdly large is ever unpacked; whatever a damaged file makes a decoder raise
becomes one line that names the file.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin

from diffex.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".npy")
MAX_CHANNELS = 64
MAX_VALUES = 1 << 28  # in one image; more is a damaged header
MAX_BYTES = 1 << 31  # in one file
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how TIFF and BigTIFF files begin
PNG, JPEG, NPY = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\x93NUMPY"
PALETTE, DEEP_COLOUR = 3, {2: 3, 4: 1, 6: 3}  # colour types of PNG; those Pillow cuts to 8 bit: channels without alpha

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong is told once, in one line


class Header(NamedTuple):
    """What a file says of its image, and how to unpack it."""

    height: int
    width: int
    channels: int
    pixels: Callable[[], NDArray]  # (H, W, C)


def read_file(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """Content of a file.

    Raises:
        UserError: it is not there, no plain file, not readable, or larger than ``max_bytes``.
    """
    try:
        if not path.is_file():
            reason = "it is no plain file" if path.exists() else "there is no such file"
            raise UserError(f"can't read {str(path)!r}: {reason}")
        if path.stat().st_size > max_bytes:
            raise UserError(f"{str(path)!r} has {path.stat().st_size:,} bytes; read.max_bytes allows {max_bytes:,}")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {str(path)!r}: {error.strerror}") from None


def decode(content: bytes, name: str, max_values: int = MAX_VALUES) -> NDArray:
    """Decode a PNG, JPEG, TIFF or NPY file to (H, W, C): uint8, uint16 or float32; alpha is dropped.

    Pages, planes or samples of a TIFF are channels; of an array without names of its axes, the shorter of the first and
    the last is.

    Args:
        content: the file's bytes; they alone decide the format.
        name: what to call the image in messages.
        max_values: largest number of values, by the header; nothing larger is unpacked.

    Raises:
        UserError: unreadable, empty, too large, too many channels, or NaN pixels; the message names the image.
    """
    try:
        header = _header(content)
        check_size((header.height, header.width, header.channels), name, max_values)
        image = normal(header.pixels(), name)
    except UserError:
        raise
    except Exception as error:  # what a damaged file makes a decoder raise is anybody's guess
        raise unreadable(name, error) from None
    return np.ascontiguousarray(image)


def depth(content: bytes, name: str) -> int:
    """Number of channels of an image, from its header; errors are those of ``decode``."""
    try:
        return _header(content).channels
    except Exception as error:
        raise unreadable(name, error) from None


def unreadable(name: str, error: Exception) -> UserError:
    """What to tell of an image that a decoder stumbled over, in one line."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return UserError(f"{name}: unreadable image ({reason}); repair or remove it")


def check_size(shape: tuple[int, int, int], name: str, max_values: int = MAX_VALUES) -> None:
    """Refuse an (H, W, C) image that is empty or too large, before any of it is unpacked.

    Raises:
        UserError: naming the image and the limit.
    """
    if prod(shape) == 0:
        raise UserError(f"{name}: the image is empty")
    size = " x ".join(f"{n}" for n in shape)
    if shape[2] > MAX_CHANNELS:
        raise UserError(f"{name}: {shape[2]} channels; 1 to {MAX_CHANNELS} are possible")
    if prod(shape) > max_values:
        raise UserError(
            f"{name}: the header announces an absurdly large image ({size} values); it was not opened "
            f"(read.max_values = {max_values})"
        )


def check_tiles(shape: Sequence[int], max_values: int) -> None:
    """Refuse a file whose tiles, which are unpacked as a whole, are too large.

    Raises:
        ValueError: naming the limit.
    """
    if prod(shape) > max_values:
        raise ValueError(f"tiles of {' x '.join(map(str, shape))} values; read.max_values = {max_values}")


def normal(pixels: NDArray, name: str) -> NDArray:
    """Pixels as uint8, uint16 or float32 in the machine's byte order; masks become 0 and 255.

    Raises:
        UserError: complex numbers or objects, NaN or infinite values.
    """
    kind = pixels.dtype
    if kind.kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if kind.kind == "u" and kind.itemsize <= 2:
        return pixels.astype(kind.newbyteorder("="), copy=False)
    if kind.kind not in "iuf":
        raise UserError(f"{name}: pixels of type {kind} are no image; convert them to integers or floats")
    with np.errstate(over="ignore"):
        pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise UserError(f"{name}: NaN or infinite pixels; repair or remove the image")
    return pixels


# ----------------------------------------------------------------------------------------------------------------------
# Formats


def _header(content: bytes) -> Header:
    if content[:4] in TIFF:
        return _tiff(content)
    if content.startswith(PNG):
        return _png(content)
    if content.startswith(JPEG):
        return _pillow(JpegImagePlugin.JpegImageFile(io.BytesIO(content)))
    if content.startswith(NPY):
        return _npy(content)
    raise ValueError(
        f"{'not an image' if content else 'no bytes at all'}: not a PNG, JPEG or TIFF file, nor an NPY array"
    )


def _png(content: bytes) -> Header:
    bits, colour = content[24], content[25]
    header = _pillow(PngImagePlugin.PngImageFile(io.BytesIO(content)))
    if bits < 16 or colour not in DEEP_COLOUR:
        return header

    def pixels() -> NDArray:
        import imagecodecs

        image = np.asarray(imagecodecs.png_decode(content))
        return image.reshape(*image.shape[:2], -1)[..., : DEEP_COLOUR[colour]]

    return Header(header.height, header.width, DEEP_COLOUR[colour], pixels)


def _pillow(image: ImageFile.ImageFile) -> Header:
    """An opened PNG or JPEG.  ``Image.open`` would try every format there is, and has a limit of its own."""
    grey = image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")

    def pixels() -> NDArray:
        wanted = "L" if image.mode in ("1", "LA") else image.mode if grey else "RGB"
        array = np.asarray(image if image.mode == wanted else image.convert(wanted))
        if array.dtype == np.int32:  # 16-bit PNG opened in mode I
            array = array.astype(np.uint16)
        return array.reshape(*array.shape[:2], -1)

    return Header(image.height, image.width, 1 if grey else 3, pixels)


def _npy(content: bytes) -> Header:
    file = io.BytesIO(content)
    shape, fortran, kind = npy_header(file)
    start = file.tell()
    if len(shape) not in (2, 3):
        raise ValueError(f"an array of shape {shape}; expected (H, W), (H, W, C) or (C, H, W)")
    if kind.hasobject:
        raise ValueError("an array of Python objects, which are never loaded")
    if len(content) - start < prod(shape) * kind.itemsize:
        raise ValueError(f"cut off: {len(content) - start} of {prod(shape) * kind.itemsize} bytes")
    first = len(shape) == 3 and shape[0] < shape[2]
    height, width, channels = (*shape, 1) if len(shape) == 2 else (*shape[1:], shape[0]) if first else shape

    def pixels() -> NDArray:
        array = np.frombuffer(content, kind, prod(shape), start).reshape(shape, order="F" if fortran else "C")
        return array[..., None] if array.ndim == 2 else array.transpose(1, 2, 0) if first else array

    return Header(height, width, channels, pixels)


def npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of the array that an open NPY file holds; nothing is unpickled.

    Raises:
        ValueError: a damaged header.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(file)
    if min(shape, default=1) < 0:
        raise ValueError(f"an array of shape {shape}")
    return shape, fortran, kind


def _tiff(content: bytes) -> Header:
    import tifffile

    file = tifffile.TiffFile(io.BytesIO(content))
    if not len(file.pages):  # counting finds a ring of pages, which file.series would follow for ever
        raise ValueError("no page")
    series = file.series[0]
    pages = [s for s in file.series if not s.keyframe.is_reduced]
    if len(pages) > 1:
        shapes = ", ".join(str(s.shape) for s in pages[:3])
        raise ValueError(f"{len(pages)} images of their own, {shapes}; read.layout = ome_tiff reads each of them")
    axes = "".join(a for a, n in zip(series.axes, series.shape, strict=True) if a in "YX" or n > 1)
    shape = tuple(n for a, n in zip(series.axes, series.shape, strict=True) if a in "YX" or n > 1)
    other = axes.replace("Y", "").replace("X", "")
    if len(other) > 1 or len(axes) != len(other) + 2:
        raise ValueError(
            f"a TIFF of shape {shape} ({axes}); expected one plane, or up to {MAX_CHANNELS} channels "
            f"(read.layout = ome_tiff takes stacks and time series)"
        )
    if other in ("Q", "I") and shape[2] < shape[0]:  # pages without a meaning: an (H, W, C) array was written as it is
        axes = "YXC"
    at = next((i for i, a in enumerate(axes) if a not in "YX"), None)
    alpha = other == "S" and any(sample in (1, 2) for sample in series.keyframe.extrasamples)
    height, width = (n for i, n in enumerate(shape) if i != at)
    channels = 1 if at is None else shape[at] - alpha
    check_tiles(series.keyframe.chunks, MAX_VALUES)
    if series.dtype is None or series.dtype.kind not in "buif":
        raise ValueError(f"pixels of type {series.dtype}; convert them to integers or floats")

    def pixels() -> NDArray:
        array = np.asarray(series.asarray(maxworkers=1)).reshape(shape)
        array = array[..., None] if at is None else np.moveaxis(array, at, -1)
        return array[..., :channels]

    return Header(height, width, channels, pixels)


# ----------------------------------------------------------------------------------------------------------------------
# Squares


def fit_square(image: NDArray, size: int) -> NDArray:
    """Crop (H, W, C) to the central square and resample to (C, size, size), same dtype; shrinking averages pixels."""
    height, width, channels = image.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : top + side, left : left + side]
    if side == size:
        return np.ascontiguousarray(square.transpose(2, 0, 1))
    planes = []
    for c in range(channels):
        plane = Image.fromarray(np.ascontiguousarray(square[..., c].astype(np.float32)))
        planes.append(
            np.asarray(plane.resize((size, size), Image.Resampling.BOX if side > size else Image.Resampling.BICUBIC))
        )
    resized = np.stack(planes)
    if image.dtype.kind == "u":
        resized = np.clip(np.rint(resized), 0, np.iinfo(image.dtype).max)
    return resized.astype(image.dtype)
