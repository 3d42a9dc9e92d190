"""What the fields of a plate have in common: its light, its typical nucleus, and the window of its reference wells.

    first look      dark level, flat field, the camera's limit, diameter of nuclei
    second look     background, medians of nuclei, and percentiles of the reference cells, all as corrected by the first

One field is in memory at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from diffex import cells
from diffex.errors import UserError
from diffex.fields import (
    CENTRE,
    PlateSurvey,
    check_field,
    corrected_levels,
    cut_out,
    field_verdict,
    find_objects,
    nuclei_position,
    object_verdicts,
)
from diffex.illumination import EVEN, Camera, coarse, fit_flat
from diffex.screen import Screen

DARKEST = 0.05  # percentile of a field that is near the camera's dark level
BRIGHTER = 90.0  # percentile, over reference cells, of where their pixels end: debris beside a few moves no window
MEASURED = 6  # fields, of reference wells and of others, that the diameter of nuclei is measured on
FEW = 20  # fewer nuclei of reference wells than this say nothing of a plate


def survey_plate(
    fields: Callable[[], Iterable[tuple[bool, NDArray]]], channels: Sequence[str], screen: Screen, name: str = "plate"
) -> PlateSurvey:
    """Learn from the fields of one plate what correcting, judging and scaling its cells takes.

    Args:
        fields: called twice; each time gives the same pairs (is it a reference field, (H, W, C) raw pixels) in the same
            order.  One field is in memory at a time.
        channels: names of the C channels.
        screen: ``illumination.*``, ``cells.*``, ``quality.*``, ``intensity.*``.
        name: what to call the plate in messages.

    Returns:
        The survey.  A plate without any nucleus has NaN medians and window; ``cut_cells`` calls its fields empty.

    Raises:
        UserError: no field, a field that can't be used, no channel of nuclei, nuclei but no acceptable reference cell.
    """
    survey = _survey_light(fields, channels, screen, name)
    if not math.isfinite(survey.nucleus_diameter):
        return survey
    crop = crop_side([survey], screen)
    tables: list[dict[str, NDArray]] = []
    references, extremes, levels = [], [], []
    for reference, field in fields():
        corrected, level = corrected_levels(field, survey, screen)
        objects = find_objects(field, corrected, channels, survey, screen, crop)
        taken = np.zeros((0, len(channels), 2))
        if reference and len(objects[CENTRE[0]]):
            taken = _extremes(cut_out(corrected, objects, crop), screen)
        tables.append(objects)
        references.append(bool(reference))
        extremes.append(taken)
        levels.append(level)
    survey = _with_medians(survey, tables, references, np.array(levels))
    accepted = [
        ends[object_verdicts(table, survey, screen.quality)[0] == ""]
        for table, ends, reference in zip(tables, extremes, references, strict=True)
        if reference and field_verdict(table, survey, screen.quality) is None
    ]
    known = np.concatenate([*accepted, np.zeros((0, len(channels), 2))])
    if len(known):
        return dataclasses.replace(survey, window=_window(known, channels, name), reference_cells=len(known))
    if survey.nuclei and screen.intensity.scale != "none":
        raise UserError(
            f"{name}: none of its {sum(references)} reference fields (of {len(tables)} surveyed) shows a cell that "
            "passes quality control, so intensities can't be scaled (intensity.reference, quality.*)"
        )
    return survey


def survey_images(
    images: Iterable[tuple[bool, NDArray]], channels: Sequence[str], screen: Screen, name: str = "plate"
) -> PlateSurvey:
    """Survey a plate whose images are single cells already: nothing but the window of the reference images.

    Args:
        images: pairs (is it a reference image, (H, W, C) pixels).
        channels: names of the C channels.
        screen: ``intensity.low``, ``intensity.high``.
        name: what to call the plate in messages.

    Raises:
        UserError: no reference image, or a channel that is constant in all of them.
    """
    extremes, count = [], 0
    for reference, image in images:
        count += 1
        if reference:
            extremes.append(_extremes(np.moveaxis(image, 2, 0)[None], screen))
    if not extremes:
        raise UserError(f"{name}: none of the {count} images surveyed is a reference image (intensity.reference)")
    window = _window(np.concatenate(extremes), channels, name)
    return dataclasses.replace(unknown_survey(channels), window=window, fields=count, reference_fields=len(extremes))


def unknown_survey(channels: Sequence[str]) -> PlateSurvey:
    """The survey of a plate that nothing is known of: no light to correct, no medians, no window."""
    n, nan = len(channels), math.nan
    return PlateSurvey(
        channels=tuple(channels), dark=(0.0,) * n, flat=(EVEN,) * n, background=(nan,) * n,
        background_spread=(nan,) * n, ceiling=math.inf, window=((nan, nan),) * n, nucleus_diameter=nan,
        nucleus_area=nan, nucleus_brightness=nan, field_sharpness=nan, cell_sharpness=nan, fields=0,
        reference_fields=0, nuclei=0, reference_cells=0,
    )  # fmt: skip


def _extremes(images: NDArray, screen: Screen) -> NDArray[np.float64]:
    """Percentiles ``intensity.low`` and ``high`` of the pixels of each image (n, C, H, W) and channel: (n, C, 2)."""
    flat = images.reshape(*images.shape[:2], -1)
    return np.moveaxis(np.percentile(flat, (screen.intensity.low, screen.intensity.high), axis=2), 0, 2)


def _window(extremes: NDArray, channels: Sequence[str], name: str) -> tuple[tuple[float, float], ...]:
    """From where the darkest tenth of the cells begin to where the brightest tenth end; extremes: (n, C, 2)."""
    low = np.percentile(extremes[..., 0], 100.0 - BRIGHTER, axis=0)
    high = np.percentile(extremes[..., 1], BRIGHTER, axis=0)
    ends = list(zip(low.tolist(), high.tolist(), strict=True))
    for channel, (black, white) in zip(channels, ends, strict=True):
        if black >= white:
            raise UserError(
                f"{name}: channel {channel!r} is constant in reference images; leave it out (read.channels)"
            )
    return tuple(ends)


def _with_medians(
    survey: PlateSurvey, tables: Sequence[Mapping[str, NDArray]], references: Sequence[bool], levels: NDArray
) -> PlateSurvey:
    """The survey with the medians of whole, round nuclei: of the reference fields, or of all where those show few."""
    good = [(t["Nuclei_AreaShape_Solidity"] > 0.9) & (t["Cells_Quality_Outside"] == 0) for t in tables]
    known = [g & r for g, r in zip(good, references, strict=True)]
    chosen = known if sum(map(np.sum, known)) >= FEW else good

    def median(column: str, how: Callable[[list[NDArray]], NDArray] = np.concatenate) -> float:
        values = how([t[column][g] for t, g in zip(tables, chosen, strict=True)])
        return float(np.median(values)) if len(values) else math.nan

    middle = np.median(levels, axis=0)
    return dataclasses.replace(
        survey,
        background=tuple(middle.tolist()),
        background_spread=tuple((1.4826 * np.median(np.abs(levels - middle), axis=0)).tolist()),
        nucleus_area=median("Nuclei_AreaShape_Area"),
        nucleus_brightness=median("Nuclei_Intensity_Brightness"),
        cell_sharpness=median("Nuclei_Quality_Sharpness"),
        field_sharpness=median("Nuclei_Quality_Sharpness", lambda v: np.array([np.median(x) for x in v if len(x)])),
        nuclei=int(sum(t["Cells_Children_Nuclei_Count"].sum() for t in tables)),
    )


def typical_diameter(surveys: Sequence[PlateSurvey]) -> float:
    """Median diameter of nuclei over plates, in pixels.

    Raises:
        UserError: no plate shows a nucleus.
    """
    found = [s.nucleus_diameter for s in surveys if math.isfinite(s.nucleus_diameter)]
    if not found:
        raise UserError("no nucleus was found on any plate: check cells.nucleus_channel and cells.nucleus_diameter")
    return float(np.median(found))


def crop_side(surveys: Sequence[PlateSurvey], screen: Screen) -> int:
    """Side of a crop in pixels: ``cells.crop``, or 2.5 typical nuclei rounded up to a multiple of 16."""
    return screen.cells.crop or 16 * math.ceil(2.5 * typical_diameter(surveys) / 16)


def _survey_light(
    fields: Callable[[], Iterable[tuple[bool, NDArray]]], channels: Sequence[str], screen: Screen, name: str
) -> PlateSurvey:
    """The first look: dark level, flat field, ceiling, diameter of nuclei."""
    nuclear, camera = nuclei_position(channels, screen), Camera()
    small: list[list[NDArray]] = []
    darkest: list[NDArray] = []
    references: list[bool] = []
    diameters: dict[bool, list[float]] = {True: [], False: []}
    for reference, field in fields():
        check_field(field, channels, f"{name}, field {len(references) + 1} of the survey")
        references.append(bool(reference))
        planes = np.moveaxis(field, 2, 0)
        small.append([coarse(plane) for plane in planes])
        darkest.append(np.percentile(field[::2, ::2], DARKEST, axis=(0, 1)))
        camera.see(field)
        found = diameters[bool(reference)]
        if screen.cells.nucleus_diameter is None and len(found) < MEASURED:
            diameter = cells.nucleus_diameter(planes[nuclear])
            found += [diameter] if math.isfinite(diameter) else []
    if not references:
        raise UserError(f"{name}: no field to survey")
    dark = np.percentile(darkest, 10.0, axis=0)
    stack = np.maximum(np.moveaxis(np.array(small, np.float32), 0, 1) - dark[:, None, None, None], 0.0)
    degree = screen.illumination.degree if screen.illumination.method == "retrospective" else 0
    measured = diameters[True] or diameters[False] or [math.nan]
    return dataclasses.replace(
        unknown_survey(channels),
        dark=tuple(dark.tolist()),
        flat=tuple(fit_flat(s, degree) for s in stack),
        ceiling=camera.ceiling(),
        nucleus_diameter=screen.cells.nucleus_diameter or float(np.median(measured)),
        fields=len(references),
        reference_fields=sum(references),
    )
