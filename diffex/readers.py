"""Where images come from: a folder of classes, a Parquet file, or the simulated assay.

A source lists its images first (class and metadata, no pixels), so that classes, limits and splits are decided before
anything is decoded; then it decodes the chosen rows in order, one image in memory at a time.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from diffex import assay
from diffex.config import Assay, Data
from diffex.errors import UserError

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
MAX_CHANNELS = 5
MAX_VALUES = 1 << 28  # in one image; more is a damaged header
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how TIFF and BigTIFF files begin


class Source(Protocol):
    """Images with a class and metadata each.

    Attributes:
        name: what to call it in messages.
        class_names: (N,) class of each image.
        metadata: ``Metadata_*`` (and, for the assay, ``Factor_*``) columns, each (N,).
        channels: names of the channels, or None where the images themselves must tell.
    """

    name: str
    class_names: NDArray[np.str_]
    metadata: dict[str, NDArray]

    @property
    def channels(self) -> tuple[str, ...] | None: ...

    def images(self, rows: Sequence[int], size: int) -> Iterator[tuple[str, NDArray]]:
        """Decode the rows in order: pairs of (name for messages, (H, W, C) array).  ``size`` is what will be asked."""
        ...


def open_source(data: Data, simulated: Assay) -> Source:
    """The source that the settings name.

    Raises:
        UserError: no such path, or nothing readable in it.
    """
    if data.path is None:
        return AssaySource(simulated, data.channels)
    path = Path(data.path)
    if not path.exists():
        raise UserError(f"there is no file or folder {str(path)!r} (data.path)")
    if path.is_dir():
        return FolderSource(path)
    if path.suffix.lower() in (".parquet", ".pq"):
        return ParquetSource(path)
    raise UserError(f"{str(path)!r} is neither a folder with one sub-folder per class nor a .parquet file (data.path)")


class FolderSource:
    """A folder with one sub-folder per class, holding PNG, JPEG or TIFF files (in sub-folders too)."""

    channels = None

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        classes = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        self.files: list[Path] = []
        names: list[str] = []
        for folder in classes:
            files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
            if not files:
                raise UserError(f"class folder {str(folder)!r} holds no {'/'.join(ENDINGS)} file: remove or fill it")
            self.files += files
            names += [folder.name] * len(files)
        if not classes:
            raise UserError(f"{str(path)!r} has no sub-folders: put each class's images into a folder of its own")
        self.class_names = np.array(names)
        self.metadata = {"Metadata_File": np.array([str(f.relative_to(path)) for f in self.files])}

    def images(self, rows: Sequence[int], size: int) -> Iterator[tuple[str, NDArray]]:
        for row in rows:
            file = self.files[row]
            try:
                content = file.read_bytes()
            except OSError as error:
                raise UserError(f"can't read {str(file)!r}: {error.strerror}") from None
            yield str(file), decode(content, str(file))


class ParquetSource:
    """A Parquet file with columns ``image`` (encoded bytes), ``label`` and/or ``class_name``, and metadata."""

    channels = None

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        try:
            self.file = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{str(path)!r} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
        schema = self.file.schema_arrow
        if "image" not in schema.names or not {"label", "class_name"} & set(schema.names):
            raise UserError(
                f"{str(path)!r} needs a column 'image' (encoded bytes) and 'class_name' or 'label'; "
                f"it has {', '.join(schema.names)}"
            )
        kind = schema.field("image").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(f"column 'image' of {str(path)!r} must hold encoded bytes (PNG, JPEG, TIFF), not {kind}")
        try:
            table = self.file.read(columns=[n for n in schema.names if n != "image"])
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None
        self.class_names = _class_names(table, _stored_names(schema.metadata or {}), self.name)
        self.metadata = {
            n if n.startswith("Metadata_") else f"Metadata_{n[:1].upper()}{n[1:]}": table[n].to_numpy(
                zero_copy_only=False
            )
            for n in table.column_names
            if n not in ("label", "class_name")
        }

    def images(self, rows: Sequence[int], size: int) -> Iterator[tuple[str, NDArray]]:
        wanted, first = np.asarray(rows), 0
        for column in self._columns():
            here = wanted[(wanted >= first) & (wanted < first + len(column))]
            for row in here:
                name = f"{self.path} row {row}"
                content = column[int(row) - first].as_py()
                if not content:
                    raise UserError(f"{name}: the image is empty")
                yield name, decode(content, name)
            first += len(column)

    def _columns(self) -> Iterator[pa.Array]:
        """The image column, a batch at a time."""
        try:
            for batch in self.file.iter_batches(batch_size=256, columns=["image"]):
                yield batch.column(0)
        except (pa.ArrowException, OSError) as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> UserError:
        return UserError(f"{self.name!r} is damaged: {str(error).splitlines()[0]}; make it again (data.path)")


class AssaySource:
    """The simulated assay: metadata carry the true factors, and pixels are drawn on demand at the size asked for."""

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
# Pixels


def decode(content: bytes, name: str) -> NDArray:
    """Decode a PNG, JPEG or TIFF file to (H, W, C): uint8, uint16 or float32; alpha is dropped.

    Raises:
        UserError: unreadable, empty, too many channels, or NaN pixels; the message names the image.
    """
    try:
        image = _decode_tiff(content) if content[:4] in TIFF else _decode_other(content)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"{name}: the header announces an absurdly large image; it was not opened") from None
    except Exception as error:  # what a damaged file makes a decoder raise is anybody's guess
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a PNG, JPEG or TIFF file"
        raise UserError(f"{name}: unreadable image ({reason}); repair or remove it") from None
    if image.size == 0:
        raise UserError(f"{name}: the image is empty")
    if not 1 <= image.shape[2] <= MAX_CHANNELS:
        raise UserError(f"{name}: {image.shape[2]} channels; 1 to {MAX_CHANNELS} are possible")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise UserError(f"{name}: NaN or infinite pixels; repair or remove the image")
    return image


def _decode_other(content: bytes) -> NDArray:
    with Image.open(io.BytesIO(content)) as opened:
        image: Image.Image = opened
        if image.mode in ("P", "PA", "CMYK", "YCbCr", "RGBA", "HSV", "LAB"):
            image = image.convert("RGB")
        elif image.mode in ("LA", "1"):
            image = image.convert("L")
        pixels = np.asarray(image)
    if pixels.dtype == np.int32:  # 16-bit PNG opened in mode I
        pixels = pixels.astype(np.uint16)
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1))


def _decode_tiff(content: bytes) -> NDArray:
    import tifffile

    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong is told once, in one line
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        if file.series and file.series[0].size > MAX_VALUES:
            raise Image.DecompressionBombError
        pixels = np.asarray(file.asarray())
        alpha = pixels.ndim == 3 and any(sample in (1, 2) for sample in file.pages.first.extrasamples)
    if alpha:
        pixels = pixels[..., :-1]
    pixels = pixels.squeeze() if pixels.ndim > 3 else pixels
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"a TIFF of shape {pixels.shape}; expected one plane, or up to {MAX_CHANNELS} channels")
    if pixels.shape[2] > MAX_CHANNELS and pixels.shape[0] < pixels.shape[2]:  # channels first
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype not in (np.uint8, np.uint16):
        pixels = pixels.astype(np.float32)
    return pixels


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
