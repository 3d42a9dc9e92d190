"""From a raw field of a plate to single-cell crops: light, background, nuclei, quality, intensity window.

    corrected = (raw - dark) / flat - background        dark, flat: of the plate; background: of each field
    stored    = (corrected - low) / (headroom (high - low)), as a share of the type's range

A plate is surveyed first (``diffex.plates``): its light, its typical nucleus, and the intensity window of its reference
wells.  Then each field stands alone (``cut_cells``).  Lengths are in pixels of the field, intensities in units of the
camera.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import measure

from diffex import cells
from diffex.errors import UserError
from diffex.illumination import Plane, Surface, background_level, surface
from diffex.screen import Quality, Screen


@dataclass(frozen=True, kw_only=True)
class PlateSurvey:
    """What the fields of one plate have in common.

    Attributes:
        channels: names of the C channels.
        dark: (C,) level of a camera without light.
        flat: (C,) light over the field, mean 1: coefficients of ``Surface``.
        background: (C,) median background of its fields, corrected for light.
        background_spread: (C,) robust standard deviation of that.
        ceiling: value at which pixels are saturated; infinity if there is none.
        window: (C,) pairs: where most reference cells' corrected pixels begin and end (``intensity.low``, ``high``).
        nucleus_diameter: typical diameter of a nucleus in pixels; NaN in a plate without nuclei, as are all medians.
        nucleus_area: median area in square pixels.
        nucleus_brightness: median brightness in the nuclei's channel (each nucleus' 90th percentile).
        field_sharpness: median over fields of their cells' median sharpness, 1 / pixels.
        cell_sharpness: median sharpness of cells, 1 / pixels.
        fields, reference_fields, nuclei, reference_cells: what all this rests on.
    """

    channels: tuple[str, ...]
    dark: tuple[float, ...]
    flat: tuple[Surface, ...]
    background: tuple[float, ...]
    background_spread: tuple[float, ...]
    ceiling: float
    window: tuple[tuple[float, float], ...]
    nucleus_diameter: float
    nucleus_area: float
    nucleus_brightness: float
    field_sharpness: float
    cell_sharpness: float
    fields: int
    reference_fields: int
    nuclei: int
    reference_cells: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: lists, and None for what is not finite."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlateSurvey:
        """The inverse of ``to_dict``."""

        def back(value: Any) -> Any:
            if isinstance(value, list):
                return tuple(back(v) for v in value)
            return math.nan if value is None else value

        known = {name: back(value) for name, value in values.items()}
        known["ceiling"] = math.inf if values["ceiling"] is None else values["ceiling"]
        return cls(**known)


@dataclass(frozen=True, kw_only=True)
class FieldCells:
    """The cells of one field.

    Attributes:
        images: (n, C, crop, crop) in the type of the store.
        columns: of the n cells: centre, area, ... (see ``OBJECT``), each (n,).
        rejected: of what was left out: ``Reason``, centre, ``Value`` that was measured and its ``Limit``, each (m,).
    """

    images: NDArray
    columns: dict[str, NDArray]
    rejected: dict[str, NDArray]


CENTRE = ("Nuclei_Location_Center_Y", "Nuclei_Location_Center_X")
OBJECT = {
    "Nuclei_AreaShape_Area": "square pixels, mean of the cell's nuclei",
    "Nuclei_AreaShape_Solidity": "share of its convex hull, the least of the cell's nuclei",
    "Nuclei_Intensity_Brightness": "90th percentile in the nuclei's channel, the greatest of the cell's nuclei",
    "Nuclei_Quality_Sharpness": "steepness of the nucleus' edge over its brightness, 1 / pixels",
    "Cells_Children_Nuclei_Count": "nuclei of the cell",
    "Cells_Quality_Saturated": "largest share of a channel's pixels in the crop at the camera's limit",
    "Cells_Quality_Outside": "pixels by which the crop leaves the field",
}
"""Columns of every cell, besides its centre."""


# ----------------------------------------------------------------------------------------------------------------------
# One field


def check_field(field: NDArray, channels: Sequence[str], name: str) -> None:
    """Refuse a field that can't be corrected.

    Args:
        field: (H, W, C).
        channels: names of the C channels.
        name: what to call it in messages.

    Raises:
        UserError: another number of channels, NaN or infinite pixels, a constant channel.
    """
    if field.ndim != 3 or field.shape[2] != len(channels):
        shape = " x ".join(map(str, field.shape))
        raise UserError(f"{name}: {shape} pixels, but {len(channels)} channels are expected: {', '.join(channels)}")
    for channel, plane in zip(channels, np.moveaxis(field, 2, 0), strict=True):
        if field.dtype.kind == "f" and not np.isfinite(plane).all():
            raise UserError(f"{name}: channel {channel!r} has NaN or infinite pixels; repair or remove the field")
        if plane.size == 0 or plane.min() == plane.max():
            value = f"all pixels {plane.flat[0]:g}" if plane.size else "no pixels"
            raise UserError(
                f"{name}: channel {channel!r} is constant ({value}); remove the field or leave the channel out"
            )


def correct(field: NDArray, survey: PlateSurvey, screen: Screen) -> Plane:
    """Correct a field for the camera's dark level, uneven light and background.

    Args:
        field: (H, W, C) raw pixels of any size and type.
        survey: of its plate.
        screen: ``illumination.*``.

    Returns:
        (C, H, W) float32 with the background at 0.
    """
    return corrected_levels(field, survey, screen)[0]


def corrected_levels(field: NDArray, survey: PlateSurvey, screen: Screen) -> tuple[Plane, list[float]]:
    """The corrected field, and the level of the background in each channel."""
    planes, levels = np.empty((field.shape[2], *field.shape[:2]), np.float32), []
    how, width = screen.illumination.background, 10.0 * survey.nucleus_diameter
    for c, plane in enumerate(planes):
        np.divide(field[..., c] - np.float32(survey.dark[c]), surface(survey.flat[c], plane.shape), out=plane)
        if how == "local" and math.isfinite(width):
            plane -= cells.slow_background(ndimage.gaussian_filter(plane, 1.0), width)
        levels.append(background_level(plane))
        if how != "none":
            # A field that cells cover shows no background: the plate's stands in for it.  (NaN: not known yet.)
            plane -= np.fmin(levels[c], survey.background[c] + 3.0 * survey.background_spread[c], dtype=np.float32)
    return planes, levels


def cut_cells(
    field: NDArray, channels: Sequence[str], survey: PlateSurvey, screen: Screen, crop: int, name: str = "field"
) -> FieldCells:
    """Find the cells of a field and cut out those that pass quality control.

    Args:
        field: (H, W, C) raw pixels.
        channels: names of the C channels.
        survey: of the field's plate.
        screen: ``cells.*``, ``quality.*``, ``illumination.*``, ``intensity.*``.
        crop: side of a crop in pixels.
        name: what to call the field in messages.

    Returns:
        The cells, and what was left out, why.

    Raises:
        UserError: a field that can't be used (see ``check_field``), or smaller than a crop; a plate without a window.
    """
    check_field(field, channels, name)
    if min(field.shape[:2]) < crop:
        raise UserError(
            f"{name}: a field of {field.shape[0]} x {field.shape[1]} pixels is smaller than one crop of {crop} "
            "(cells.crop)"
        )
    corrected = correct(field, survey, screen)
    objects = find_objects(field, corrected, channels, survey, screen, crop)
    whole = field_verdict(objects, survey, screen.quality)
    reason, value, limit = object_verdicts(objects, survey, screen.quality)
    kept = (reason == "") & (whole is None)
    rejected = {"Reason": reason, **{c: objects[c] for c in CENTRE}, "Value": value, "Limit": limit}
    rejected = {column: values[~kept] for column, values in rejected.items()}
    if whole is not None:
        nowhere = {c: np.array([math.nan]) for c in CENTRE}
        rejected = {
            "Reason": np.array(whole[:1]),
            **nowhere,
            "Value": np.array(whole[1:2]),
            "Limit": np.array(whole[2:]),
        }
    columns = {column: values[kept] for column, values in objects.items()}
    images: NDArray = cut_out(corrected, columns, crop)
    if screen.intensity.scale != "none":
        if len(images) and not np.isfinite(survey.window).all():
            raise UserError(f"{name}: its plate shows no reference cell to scale intensities by (intensity.reference)")
        images = scaled(images, survey, screen)
    elif field.dtype.kind == "u":
        images = np.clip(np.rint(images), 0, np.iinfo(field.dtype).max).astype(field.dtype)
    return FieldCells(images=images, columns=columns, rejected=rejected)


def scaled(images: NDArray, survey: PlateSurvey, screen: Screen) -> NDArray:
    """Scale intensities by a plate's window, for the store.

    Args:
        images: (..., C, H, W) corrected pixels, or single-cell images as they are, if ``survey_images`` saw them so.
        survey: of their plate.
        screen: ``intensity.headroom``, ``intensity.transform``, ``intensity.dtype``.

    Returns:
        The same shape in the type of the store: 0 at the window's low end, the type's maximum ``headroom`` times above.
    """
    low, high = np.array(survey.window, np.float32).T[..., None, None]
    share = np.clip((images - low) / (np.float32(screen.intensity.headroom) * (high - low)), 0.0, 1.0)
    share = np.sqrt(share) if screen.intensity.transform == "sqrt" else share
    kind = np.dtype(screen.intensity.dtype)
    return np.rint(np.nan_to_num(share) * np.iinfo(kind).max).astype(kind)


def nuclei_position(channels: Sequence[str], screen: Screen) -> int:
    """Position of the channel that shows nuclei.

    Raises:
        UserError: none is called so, or there is none of the name that ``cells.nucleus_channel`` gives.
    """
    try:
        found = cells.find_channel(channels, screen.cells.nucleus_channel, cells.NUCLEUS_NAMES)
    except UserError as error:
        raise UserError(f"{error} (cells.nucleus_channel)") from None
    if found is None:
        raise UserError(
            f"none of the channels {', '.join(channels)} is called {', '.join(cells.NUCLEUS_NAMES)}: "
            f"say which shows nuclei (cells.nucleus_channel)"
        )
    return found


def find_objects(
    field: NDArray, corrected: Plane, channels: Sequence[str], survey: PlateSurvey, screen: Screen, crop: int
) -> dict[str, NDArray]:
    """Measure every cell of a field by its nuclei: the columns ``CENTRE`` and ``OBJECT``."""
    nuclear = nuclei_position(channels, screen)
    dna = corrected[nuclear]
    diameter = survey.nucleus_diameter
    nuclei = cells.segment_nuclei(dna, diameter) if math.isfinite(diameter) else np.zeros(dna.shape, np.int32)
    count = int(nuclei.max())
    index = np.arange(1, count + 1)
    owner = ndimage.maximum(cells.shared_cells(corrected, nuclear, nuclei), nuclei, index).astype(np.int64) - 1
    found = measure.regionprops_table(nuclei, properties=("label", "area", "solidity", "centroid")) if count else {}
    area, solidity, y, x = (
        np.asarray(found.get(key, ()), np.float64) for key in ("area", "solidity", "centroid-0", "centroid-1")
    )
    bright = _percentiles(dna, nuclei, count, 90.0)
    # How steep a nucleus' edge is, where it is steep: touching neighbours have none between them.
    edge = nuclei - ndimage.grey_erosion(nuclei, size=(3, 3))
    edge = np.where((nuclei > 0) & (edge > 0), nuclei, 0)
    steep = _percentiles(ndimage.gaussian_gradient_magnitude(dna, 1.0), edge, count, 75.0)
    sharpness = steep / np.maximum(bright, 1e-12)

    def gather(how: np.ufunc, values: NDArray, start: float) -> NDArray[np.float64]:
        """Join the nuclei of each cell."""
        out = np.full(int(owner.max(initial=-1)) + 1, start)
        how.at(out, owner, values)
        return out

    total, number = gather(np.add, area, 0.0), gather(np.add, np.ones(count), 0.0)
    centre = [gather(np.add, q * area, 0.0) / total for q in (y, x)]
    first = [np.floor(q + 0.5).astype(np.int64) - crop // 2 for q in centre]
    beyond = [np.maximum(-t, t + crop - n) for t, n in zip(first, dna.shape, strict=True)]
    # A nucleus that the border cuts lies outside too, however small the crop.
    cut = np.setdiff1d(np.concatenate([nuclei[0], nuclei[-1], nuclei[:, 0], nuclei[:, -1]]), 0) - 1
    outside = np.maximum(np.maximum(*beyond), 0) if count else np.zeros(0)
    np.maximum.at(outside, owner[cut], 1)
    full = field >= survey.ceiling
    boxes = [full[max(t, 0) : t + crop, max(s, 0) : s + crop] for t, s in zip(*first, strict=True)]
    return {
        CENTRE[0]: centre[0],
        CENTRE[1]: centre[1],
        "Nuclei_AreaShape_Area": total / number,
        "Nuclei_AreaShape_Solidity": gather(np.minimum, solidity, math.inf),
        "Nuclei_Intensity_Brightness": gather(np.maximum, bright, -math.inf),
        "Nuclei_Quality_Sharpness": gather(np.maximum, sharpness, -math.inf),
        "Cells_Children_Nuclei_Count": number.astype(np.int64),
        "Cells_Quality_Saturated": np.array([box.mean(axis=(0, 1)).max() for box in boxes], np.float64),
        "Cells_Quality_Outside": outside.astype(np.int64),
    }


def _percentiles(plane: Plane, labels: NDArray, count: int, percent: float) -> NDArray[np.float64]:
    """A percentile of the plane within each of the labels 1 to count, (count,)."""
    if not count:
        return np.zeros(0)
    of = lambda values: np.percentile(values, percent)
    return np.asarray(ndimage.labeled_comprehension(plane, labels, np.arange(1, count + 1), of, np.float64, 0.0))


def object_verdicts(
    objects: Mapping[str, NDArray], survey: PlateSurvey, quality: Quality
) -> tuple[NDArray[np.str_], NDArray[np.float64], NDArray[np.float64]]:
    """Why each object is left out ("" where it is not), what was measured and the limit it broke, each (n,)."""
    area = objects["Nuclei_AreaShape_Area"] / survey.nucleus_area
    bright = objects["Nuclei_Intensity_Brightness"] / survey.nucleus_brightness
    sharp = objects["Nuclei_Quality_Sharpness"] / survey.cell_sharpness
    outside, saturated = objects["Cells_Quality_Outside"], objects["Cells_Quality_Saturated"]
    solidity = objects["Nuclei_AreaShape_Solidity"]
    rules = [
        ("border", outside, 0.0, quality.border and outside > 0),
        ("saturated", saturated, quality.saturation, saturated > quality.saturation),
        ("too bright: debris", bright, quality.debris, bright > quality.debris),
        ("too small", area, quality.min_area, area < quality.min_area),
        ("too large", area, quality.max_area, area > quality.max_area),
        ("irregular", solidity, quality.solidity, solidity < quality.solidity),
        ("blurred", sharp, quality.blur, sharp < quality.blur),
    ]
    n = len(outside)
    reason, value, limit = np.full(n, "", "<U18"), np.full(n, math.nan), np.full(n, math.nan)
    for word, measured, bound, broken in rules:
        if bound or word == "border":  # 0 switches a rule off
            here = (reason == "") & broken
            reason[here], value[here], limit[here] = word, measured[here], bound
    return reason, value, limit


def field_verdict(
    objects: Mapping[str, NDArray], survey: PlateSurvey, quality: Quality
) -> tuple[str, float, float] | None:
    """Why the whole field is left out, what was measured, and the limit; None where it is not."""
    sharp = objects["Nuclei_Quality_Sharpness"]
    if not len(sharp):
        return "empty field", 0.0, 1.0
    share = float(np.median(sharp)) / survey.field_sharpness
    return ("blurred field", share, quality.blur) if share < quality.blur else None


def cut_out(corrected: Plane, objects: Mapping[str, NDArray], crop: int) -> Plane:
    """Crops (n, C, crop, crop) around the centres; background where they leave the field."""
    padded = np.pad(corrected, ((0, 0), (crop, crop), (crop, crop)))
    first = [np.floor(objects[c] + 0.5).astype(np.int64) - crop // 2 + crop for c in CENTRE]
    crops = [padded[:, t : t + crop, s : s + crop] for t, s in zip(*first, strict=True)]
    return np.stack(crops) if crops else np.zeros((0, len(corrected), crop, crop), np.float32)
