"""Images in NumPy arrays, mapped into memory; nothing is unpickled."""

from __future__ import annotations

import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffex.errors import UserError
from diffex.paths import Folder
from diffex.readers import check_size, normal, npy_header, unreadable
from diffex.screen import Read
from diffex.sources import Listed


class ArraySource(Listed):
    """Images in NumPy arrays: a ``.npy`` file, an ``.npz`` file with its labels, or a folder with an array per class.

    Arrays are (N, H, W), (N, C, H, W) or (N, H, W, C); of the latter two, the shorter axis is the channels.

    Raises:
        UserError: no such arrays, objects in them, or a shape that is no list of images.
    """

    def __init__(self, path: Path, read: Read) -> None:
        self.name, self.path, self.settings = str(path), path, read
        self._arrays: dict[int, NDArray] = {}
        classes: list[NDArray[np.str_]] = []
        if path.is_dir():
            files = [
                path / n for n in Folder(path, Path(read.root) if read.root else None).names((".npy",)) if "/" not in n
            ]
            if not files:
                raise UserError(f"{str(path)!r} holds no .npy file: one is expected for each class")
            self.parts = [(f, "", *_images_header(f, "", read)) for f in files]
            classes = [np.full(shape[0], f.stem) for f, _, shape, _ in self.parts]
        else:
            key = _image_key(path) if zipfile.is_zipfile(path) else ""
            self.parts = [(path, key, *_images_header(path, key, read))]
            classes = [_npz_classes(path, self.parts[0][2][0])] if key else []
        self.starts = np.cumsum([0, *(shape[0] for _, _, shape, _ in self.parts)])
        self.class_names = np.concatenate(classes) if classes else np.full(self.starts[-1], "")
        self.metadata = {"Metadata_File": np.repeat([f.name for f, *_ in self.parts], np.diff(self.starts))}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}

    def read(self, row: int) -> tuple[str, NDArray]:
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        file, key, _, first = self.parts[part]
        name = f"{file} image {row - self.starts[part]}"
        try:
            if part not in self._arrays:
                self._arrays = {part: _load(file, key)}
            image = np.asarray(self._arrays[part][row - self.starts[part]])
            image = image[..., None] if image.ndim == 2 else image.transpose(1, 2, 0) if first else image
            return name, np.ascontiguousarray(normal(self.kept(image, name), name))
        except UserError:
            raise
        except Exception as error:
            raise unreadable(name, error) from None

    def depth(self) -> int:
        _, _, shape, first = self.parts[0]
        return 1 if len(shape) == 3 else shape[1] if first else shape[3]

    def files(self) -> list[Path]:
        return [*self.tables, *(f for f, *_ in self.parts)]


def _load(file: Path, key: str) -> NDArray:
    if not key:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    with np.load(file, allow_pickle=False) as arrays:
        return np.asarray(arrays[key])


def _image_key(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n.removesuffix(".npy") for n in archive.namelist()]
    except Exception as error:  # of its directory, anything may be wrong
        raise UserError(f"{str(path)!r} is not a readable .npz file: {error}") from None
    key = next((k for k in ("images", "image", "x", "X", "data") if k in names), None)
    if key is None:
        raise UserError(f"{str(path)!r} needs an array 'images'; it has {', '.join(names) or 'none'}")
    return key


def _images_header(file: Path, key: str, read: Read) -> tuple[tuple[int, ...], bool]:
    """Shape of an array of images, and whether channels come before rows; only the header is read."""
    name = f"{file}{f' array {key!r}' if key else ''}"
    try:
        if key:
            with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as member:
                shape, _, kind = npy_header(member)
                size = archive.getinfo(f"{key}.npy").file_size - member.tell()
        else:
            with file.open("rb") as member:
                shape, _, kind = npy_header(member)
                size = file.stat().st_size - member.tell()
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{name} is not a readable NumPy array: {error}") from None
    if kind.kind not in "buif":
        raise UserError(f"{name}: values of type {kind} are no pixels, and Python objects are never loaded")
    if len(shape) not in (3, 4) or 0 in shape:
        raise UserError(f"{name} has shape {shape}; expected (N, H, W), (N, C, H, W) or (N, H, W, C)")
    if size < prod(shape) * kind.itemsize:
        raise UserError(f"{name} is cut off: {size} of {prod(shape) * kind.itemsize} bytes")
    if key and size > read.max_bytes:  # a packed array is loaded as a whole
        raise UserError(f"{name} has {size:,} bytes; read.max_bytes allows {read.max_bytes:,}")
    if len(shape) == 4 and shape[1] == shape[3]:
        raise UserError(f"{name} has shape {shape}: which axis is the channels? Make them the shorter one")
    first = len(shape) == 4 and shape[1] < shape[3]
    hwc = (*shape[1:], 1) if len(shape) == 3 else (*shape[2:], shape[1]) if first else shape[1:]
    check_size((hwc[0], hwc[1], hwc[2]), name, read.max_values)
    return shape, first


def _npz_classes(path: Path, count: int) -> NDArray[np.str_]:
    """Class of each image by the arrays class_names and labels of an .npz file; "" where it has none."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            labels = next((arrays[k] for k in ("labels", "label", "y") if k in arrays), None)
            names = next((arrays[k] for k in ("class_name", "class_names") if k in arrays), None)
    except Exception as error:
        raise UserError(f"{str(path)!r}: labels and class_names can't be read: {error}") from None
    if labels is None and names is None:
        return np.full(count, "")
    if labels is None or (names is not None and len(names) == count != len(set(names.tolist()))):
        labels, names = names, None
    assert labels is not None
    labels = labels.reshape(len(labels), -1)[:, 0] if labels.ndim > 1 and labels.size == len(labels) else labels
    if labels.shape != (count,):
        raise UserError(f"{str(path)!r} has {count} images, but labels of shape {labels.shape}")
    if names is None:
        return labels.astype(str)
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= len(names):
        raise UserError(
            f"{str(path)!r}: labels must be numbers from 0 to {len(names) - 1}, one for each of class_names"
        )
    return names.astype(str)[labels]
