"""A simulated screen on the disk: raw camera fields in a public screen's own layout, and all that is true of them.

A field is composed of the assay's own cells, so factors mean the same as in its single-cell images.  What a crop of a
real field suffers from is in it: neighbours, cells cut by the border, uneven light, background, blur, noise, debris,
saturation.  All of these are drawn from the same distribution in every class.  For one channel of one field

    counts = offset + brightness * light_plate(y, x) * (sum_i gain_i * cell_i(y, x) + debris + background) + noise

    OUTPUT/BBBC021_v1_image.csv, _moa.csv, _compound.csv, Week1/Week1_PLATE/WELL_sSITE_wCHANNEL.tif   layout bbbc021
    OUTPUT/images/CLASS/PLATE_WELL_sSITE_CHANNEL.tif                                                   layout files
    OUTPUT/truth.parquet             one row a planted cell
    OUTPUT/truth_fields.parquet      one row a field: its files, focus, background and debris
    OUTPUT/truth/FIELD.tif           its nuclei, each with a label of its own (uint16, 0 where there is none)
    OUTPUT/truth/light_PLATE.npy     the light of the plate, (C, H, W) float32, mean 1 in each channel

Truth of a cell: ``y, x`` the middle of its nuclei in pixels (0, 0 is the middle of the first pixel; some lie outside),
``Nuclei`` how many it has, ``y_k, x_k, Label_k, Area_k`` of each (label and area 0 where the field shows none of it),
``Border`` a crop of cell_size centred on y, x leaves the field, ``Touches`` its body overlaps another's,
``Saturated`` it was made to, ``Saturated_share`` and ``Debris_share`` of its crop's pixels, and every ``Factor_``.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from diffex import assay
from diffex.assay import Array, Plan
from diffex.config import Assay
from diffex.errors import UserError, did_you_mean

LAYOUTS = ("bbbc021", "files")
BBBC021_CHANNELS = {"DNA": "w1", "tubulin": "w2", "actin": "w4"}  # its DAPI, Tubulin and Actin, in the header's order
IMAGE_HEADER = (
    'TableNumber,ImageNumber,"Image_FileName_DAPI","Image_PathName_DAPI","Image_FileName_Tubulin",'
    '"Image_PathName_Tubulin","Image_FileName_Actin","Image_PathName_Actin","Image_Metadata_Plate_DAPI",'
    '"Image_Metadata_Well_DAPI",Replicate,"Image_Metadata_Compound",Image_Metadata_Concentration'
)

TIFF: dict[str, Any] = {"photometric": "minisblack", "metadata": None, "software": "diffex"}

# The camera: 12 bits in the upper bits of 16, as BBBC021's.
LIMIT = 4095
STEP = 16
OFFSET = 14.0  # counts
READ_NOISE = 2.0  # counts
COUNTS_PER_ELECTRON = 0.25
BRIGHTNESS = {"DNA": 300.0, "tubulin": 600.0, "actin": 550.0, "Golgi": 600.0, "mitochondria": 600.0}  # counts a unit

CLUSTERED = 0.6  # share of cells that settle beside another one
OUTSIDE = 0.25  # how far from the field centres may lie, in cell sizes: half a nucleus still shows
TRIES = 400
MAX_CELLS = 30_000  # two nuclei each, numbered in 16 bits
BATCH = 64  # fields whose truth is written at a time


@dataclass(frozen=True, kw_only=True)
class Optics:
    """What spoils a field: amplitude of uneven light, and how often focus, debris and saturation do."""

    field_size: tuple[int, int]
    cell_size: int
    shading: float
    out_of_focus: float
    debris_per_field: float
    saturated: float


def write_screen(
    settings: Assay,
    channels: Sequence[str],
    out: Path,
    *,
    field_size: tuple[int, int] = (512, 512),
    cell_size: int = 64,
    cells_per_field: int = 24,
    fields_per_well: int = 4,
    shading: float = 0.35,
    out_of_focus: float = 0.03,
    debris_per_field: float = 0.5,
    saturated: float = 0.01,
    layout: str = "bbbc021",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, int]:
    """Simulate a screen and write it as its microscope would.

    Args:
        settings: design, doses, plates, wells, random effects and seed; ``num_images`` is not used: there are
            ``cells_per_field * fields_per_well`` cells in every well.  Equal settings give byte-identical folders.
        channels: channels of the assay; layout ``bbbc021`` takes exactly DNA, tubulin, actin, in any order.
        out: folder to make; may exist if empty.  It appears whole or not at all.
        field_size: height and width of a field in pixels.
        cell_size: pixels to a cell, 32 to 128: the square [-1, 1]^2 of the assay, 2.4 nuclei wide.
        cells_per_field: cells planted in each field; a few of them just outside its border.
        fields_per_well: sites imaged in each well.
        shading: (brightest - dimmest) / mean of the light of each plate and channel, 0 to 1.
        out_of_focus: share of fields that are clearly out of focus, 0 to 1.
        debris_per_field: mean number of bright specks of dirt in a field.
        saturated: share of cells that drive the camera to its limit in one channel, 0 to 1.
        layout: ``bbbc021``, or ``files``: one TIFF a channel in ``images/<class>/``, any channels.
        progress: called with (fields done, fields in all) after each field.

    Returns:
        plates, wells, fields, cells, bytes: how many of each were written.

    Raises:
        UserError: settings out of range, an output that isn't empty, a disk that is full or can't be written.
    """
    optics = Optics(
        field_size=field_size, cell_size=cell_size, shading=shading, out_of_focus=out_of_focus,
        debris_per_field=debris_per_field, saturated=saturated,
    )  # fmt: skip
    _check(layout, channels, optics, cells_per_field, fields_per_well)
    treatments = settings.treatments or assay.DESIGNS[settings.design]
    wells = settings.wells_per_class * (len(treatments) + 1)
    num_fields = settings.num_plates * wells * fields_per_well
    plan = assay.plan(
        treatments=treatments, channels=tuple(channels), num_images=num_fields * cells_per_field,
        num_plates=settings.num_plates, wells_per_class=settings.wells_per_class, doses=settings.doses,
        well_sd=settings.well_sd, plate_sd=settings.plate_sd, seed=settings.seed,
    )  # fmt: skip
    if layout == "bbbc021" and wells > 96:
        raise UserError(f"{wells} wells don't fit a plate of 96: lower assay.wells_per_class, raise assay.num_plates")
    if layout == "files":
        for name in plan.class_names:
            if PurePosixPath(name).name != name or name.startswith(".") or "\\" in name:
                raise UserError(f"class {name!r} can't be the name of a folder: rename it (assay.treatments)")
    num_bytes = num_fields * len(channels) * field_size[0] * field_size[1] * 2
    out = out.resolve()
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        _check_output(out, num_bytes)
        partial.mkdir(parents=True)
        _write(plan, optics, partial, layout, cells_per_field, fields_per_well, progress)
        partial.rename(out)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise UserError(f"can't write {str(out)!r}: {reason}; the screen needs {num_bytes / 1e9:.2f} GB") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "plates": settings.num_plates, "wells": settings.num_plates * wells, "fields": num_fields, "cells": len(plan),
        "bytes": num_bytes,
    }  # fmt: skip


def illumination(seed: int, plate: int, channel: str, shape: tuple[int, int], shading: float) -> Array:
    """The light that falls on the fields of a plate in a channel: a vignette, off centre, and a tilt.

    Args:
        seed: the assay's seed.
        plate: number of the plate, from 0.
        channel: one of ``assay.CHANNELS``.
        shape: height and width in pixels.
        shading: (brightest - dimmest) / mean.

    Returns:
        (H, W) float32 with mean 1.
    """
    rng = np.random.default_rng([seed, 1, plate, assay.CHANNELS.index(channel)])
    y, x = (np.linspace(-1.0, 1.0, n) for n in shape)
    (cy, cx), angle, tilt = rng.uniform(-0.35, 0.35, 2), rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.5)
    light = tilt * (np.sin(angle) * y[:, None] + np.cos(angle) * x) - ((y - cy) ** 2)[:, None] - (x - cx) ** 2
    return (1.0 + shading * (light - light.mean()) / np.ptp(light)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Checks


def _check(layout: str, channels: Sequence[str], optics: Optics, cells: int, fields: int) -> None:
    size, (height, width) = optics.cell_size, optics.field_size
    if layout not in LAYOUTS:
        raise UserError(f"there is no layout {layout!r}: {did_you_mean(layout, LAYOUTS)}")
    if layout == "bbbc021" and sorted(channels) != sorted(BBBC021_CHANNELS):
        raise UserError(
            f"BBBC021 has the channels {', '.join(BBBC021_CHANNELS)}, not {', '.join(channels)}: "
            "change data.channels, or write the layout 'files'"
        )
    if not assay.SIZES[0] <= size <= assay.SIZES[1]:
        raise UserError(f"cell_size must be {assay.SIZES[0]} to {assay.SIZES[1]} pixels, got {size}")
    if min(height, width) < 2 * size:
        raise UserError(f"field_size = {height} x {width} pixels is too small for cells of cell_size = {size}")
    for name, value, low, high in (
        ("cells_per_field", cells, 1, min(height * width // size**2, MAX_CELLS)),
        ("fields_per_well", fields, 1, 999),
        ("shading", optics.shading, 0, 1),
        ("out_of_focus", optics.out_of_focus, 0, 1),
        ("debris_per_field", optics.debris_per_field, 0, 100),
        ("saturated", optics.saturated, 0, 1),
    ):
        if not low <= value <= high:
            raise UserError(f"{name} must be {low} to {high} in fields of {height} x {width} pixels, got {value}")


def _check_output(out: Path, num_bytes: int) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{str(out)!r} exists and isn't an empty folder: name a new one as the output")
    parent = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(f"the screen needs {num_bytes / 1e9:.2f} GB, and {str(parent)!r} has {free / 1e9:.2f} GB left")


# ----------------------------------------------------------------------------------------------------------------------
# Files


def _write(
    plan: Plan, optics: Optics, out: Path, layout: str, cells: int, fields: int,
    progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    """Draw and write field by field; memory holds the plan, and the pixels of one field."""
    plates = list(dict.fromkeys(plan.metadata["Metadata_Plate"].tolist()))
    (out / "truth").mkdir()
    factors = {f"Factor_{n}": c for n, c in zip(assay.FACTORS, plan.visible_scores().T, strict=True)}
    total = len(plan) // cells
    treatments: set[tuple[str, float]] = set()
    lines = [IMAGE_HEADER]
    writers: dict[str, pq.ParquetWriter] = {}
    pending: dict[str, list[pa.Table]] = {}
    with ExitStack() as stack:
        lit = -1
        for number in range(total):
            rows = np.arange(number * cells, (number + 1) * cells)
            about: dict[str, Any] = {name: column[rows[0]].item() for name, column in plan.metadata.items()}
            compound, dose = about["Metadata_Compound"], round(float(about["Metadata_Dose"]), 6)
            plate, well, site = plates.index(about["Metadata_Plate"]), about["Metadata_Well"], number % fields + 1
            name = f"Week1_{20001 + plate}" if layout == "bbbc021" else about["Metadata_Plate"]
            if plate != lit:
                lit = plate
                light = np.stack(
                    [illumination(plan.seed, plate, c, optics.field_size, optics.shading) for c in plan.channels]
                )
                np.save(out / "truth" / f"light_{name}.npy", light)
            which = {
                "Metadata_Plate": name, "Metadata_Well": well, "Metadata_Site": site, "Metadata_Compound": compound,
                "Metadata_Concentration": dose, "Field": (key := f"{name}_{well}_s{site}"),
            }  # fmt: skip
            pixels, labels, cell_truth, facts = _draw_field(plan, rows, light, optics, number)
            files = _names(layout, plan, name, well, site, compound)
            for channel, plane in zip(plan.channels, pixels, strict=True):
                (out / files[channel]).parent.mkdir(parents=True, exist_ok=True)
                tifffile.imwrite(out / files[channel], plane, **TIFF)
            tifffile.imwrite(out / "truth" / f"{key}.tif", labels, compression="zlib", **TIFF)
            treatments.add((compound, dose))
            if layout == "bbbc021":
                lines.append(_image_row(plate + 1, number % (total // len(plates)) + 1, files, which))
            mine = {k: [v] * cells for k, v in which.items()} | cell_truth
            mine |= {n: column[rows] for n, column in factors.items()}
            facts = which | {f"File_{channel}": path for channel, path in files.items()} | facts
            its = {k: [v] for k, v in facts.items()}
            for stem, columns in {"truth": mine, "truth_fields": its}.items():
                pending.setdefault(stem, []).append(pa.table(columns))
            if (number + 1) % BATCH == 0 or number + 1 == total:
                for stem, tables in pending.items():
                    if stem not in writers:
                        writers[stem] = stack.enter_context(pq.ParquetWriter(out / f"{stem}.parquet", tables[0].schema))
                    writers[stem].write_table(pa.concat_tables(tables))
                pending.clear()
            if progress is not None:
                progress(number + 1, total)
    if layout == "bbbc021":
        (out / "BBBC021_v1_image.csv").write_text("\n".join([*lines, ""]), encoding="utf-8", newline="\n")
        _write_treatments(out, sorted(treatments))


def _names(layout: str, plan: Plan, plate: str, well: str, site: int, compound: str) -> dict[str, str]:
    """Path of each channel's file, relative to the output."""
    if layout == "files":
        return {c: f"images/{compound}/{plate}_{well}_s{site}_{c}.tif" for c in plan.channels}
    seed = f"{plan.seed} {plate} {well} {site}"
    guids = {c: str(uuid.uuid5(uuid.NAMESPACE_URL, f"{seed} {c}")).upper() for c in plan.channels}
    return {c: f"Week1/{plate}/{well}_s{site}_{BBBC021_CHANNELS[c]}{guid}.tif" for c, guid in guids.items()}


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _image_row(plate: int, image: int, files: dict[str, str], which: dict[str, Any]) -> str:
    places = (PurePosixPath(files[channel]) for channel in BBBC021_CHANNELS)
    paths = ",".join(f"{_quoted(p.name)},{_quoted(str(p.parent))}" for p in places)
    name, well, compound = (_quoted(which[f"Metadata_{key}"]) for key in ("Plate", "Well", "Compound"))
    return f"{plate},{image},{paths},{name},{well},{plate},{compound},{which['Metadata_Concentration']:.6f}"


def _write_treatments(out: Path, treatments: list[tuple[str, float]]) -> None:
    """The mechanism of each compound at each concentration, here its class; and what there is of chemistry."""
    moa = "".join(f"{_quoted(name)},{dose:.6f},{_quoted(name)}\n" for name, dose in treatments)
    (out / "BBBC021_v1_moa.csv").write_text(f'"compound",concentration,"moa"\n{moa}', "utf-8", newline="\n")
    smiles = {name: "CS(C)=O" if name == assay.CONTROL else "" for name, _ in treatments}
    compounds = "".join(f"{_quoted(name)},{_quoted(known)}\n" for name, known in smiles.items())
    (out / "BBBC021_v1_compound.csv").write_text(f'"compound","smiles"\n{compounds}', "utf-8", newline="\n")


# ----------------------------------------------------------------------------------------------------------------------
# A field.  Patches are (b, side, side) of cells; the canvas is the field with a margin that holds every patch.


def _draw_field(
    plan: Plan, rows: NDArray[np.int64], light: Array, optics: Optics, number: int
) -> tuple[NDArray[np.uint16], NDArray[np.uint16], dict[str, NDArray], dict[str, object]]:
    """Compose the cells ``rows`` (b,) of the plan into field ``number`` under ``light`` (C, H, W).

    Returns:
        Pixels (C, H, W); labels of the nuclei (H, W); truth of the cells by column, each (b,); truth of the field.
    """
    size, side, (height, width) = optics.cell_size, 2 * optics.cell_size, optics.field_size
    rng = np.random.Generator(np.random.SFC64([plan.seed, 2, number]))
    blurred = bool(rng.random() < optics.out_of_focus)
    blur = rng.uniform(0.07, 0.13) * size if blurred else 0.0
    background = rng.uniform(0.015, 0.05, len(plan.channels)).astype(np.float32)
    focus = 0.07 * rng.random() ** 2

    # Cells of their own, each at a place between pixels, at the focus of the field.
    shift = rng.uniform(-0.5, 0.5, (len(rows), 2)) * (2.0 / size)
    nuisance = {name: x[rows] for name, x in plan.nuisance.items()}
    nuisance |= {"position": shift.astype(np.float32), "focus": np.full(len(rows), focus, np.float32)}
    own = replace(plan, labels=plan.labels[rows], scores=plan.scores[rows], nuisance=nuisance)
    planes, claims, body, nuclei = _draw_cells(own, size)
    margin = size + int(np.ceil(OUTSIDE * size)) + 1
    any_nucleus = nuclei[:, 0] | nuclei[:, 1]
    # Places depend on the nuclei, through a generator of their own: no defect may.
    corner = _place(np.random.default_rng([plan.seed, 3, number]), any_nucleus, optics, margin)
    at = [np.s_[top : top + side, left : left + side] for top, left in corner]

    burnt = np.where(rng.random(len(rows)) < optics.saturated, rng.integers(len(plan.channels), size=len(rows)), -1)
    for plane, c in zip(planes, burnt, strict=True):
        if c >= 0:  # half of what is bright in it lies above the limit by 40 %
            bright = np.median(plane[c][plane[c] > 0.3 * plane[c].max()])
            plane[c] *= 1.4 * LIMIT / BRIGHTNESS[plan.channels[c]] / bright

    # Where cells overlap, the one whose middle is nearer shows most; nuclei never overlap, so DNA just adds up.
    canvas = np.zeros((len(plan.channels), height + 2 * margin, width + 2 * margin), np.float32)
    claim, crowd = np.full(canvas.shape[1:], 1e-6, np.float32), np.zeros(canvas.shape[1:], np.int16)
    for i, patch in enumerate(at):
        claim[patch] += claims[i]
        crowd[patch] += body[i]
    for i, patch in enumerate(at):
        share = np.sqrt((claims[i] + 1e-6) / claim[patch])
        for k, channel in enumerate(plan.channels):
            canvas[k][patch] += planes[i, k] if channel == "DNA" else planes[i, k] * share
    dirt, debris = _scatter_debris(rng, canvas, plan.channels, optics, margin)
    if blurred:
        for plane in canvas:
            ndimage.gaussian_filter(plane, blur, output=plane, truncate=3.0)

    inside = np.s_[margin : margin + height, margin : margin + width]
    brightness = np.array([BRIGHTNESS[c] for c in plan.channels], np.float32)[:, None, None]
    counts = np.maximum(canvas[(slice(None), *inside)] + background[:, None, None], 0.0) * light * brightness
    noise = rng.standard_normal(counts.shape, np.float32)
    counts += OFFSET + noise * np.sqrt(READ_NOISE**2 + COUNTS_PER_ELECTRON * counts)
    levels = np.clip(np.rint(counts), 0, LIMIT).astype(np.uint16)

    labels, truth = _label(nuclei, corner - margin, optics.field_size)
    # The crop of a cell is centred on its nuclei; what a crop shows counts as far as it lies in the field.
    crop = np.floor(np.stack([truth["y"], truth["x"]], 1) + 0.5).astype(np.int64) - size // 2
    seen = [np.s_[max(top, 0) : top + size, max(left, 0) : left + size] for top, left in crop]
    full = (levels == LIMIT).any(axis=0)
    truth |= {
        "Border": np.asarray(((crop < 0) | (crop + size > optics.field_size)).any(axis=1)),
        "Touches": np.array([(crowd[p] > 1)[b].any() for p, b in zip(at, body, strict=True)]),
        "Saturated": burnt >= 0,
        "Saturated_channel": np.array([plan.channels[c] if c >= 0 else "" for c in burnt]),
        "Saturated_share": np.array([full[c].mean() for c in seen], np.float32),
        "Debris_share": np.array([dirt[inside][c].mean() for c in seen], np.float32),
        "Debris_on_nucleus": np.array([dirt[p][n].any() for p, n in zip(at, any_nucleus, strict=True)]),
        "Out_of_focus": np.full(len(rows), blurred),
    }  # fmt: skip
    facts: dict[str, object] = {
        "Out_of_focus": blurred, "Blur": float(blur), "Focus": float(focus), "Background": background.tolist(),
        "Debris": len(debris), "Debris_y": debris[:, 0], "Debris_x": debris[:, 1], "Debris_radius": debris[:, 2],
        "Saturated_cells": int((burnt >= 0).sum()), "Cells": len(rows), "Nuclei": int((np.unique(labels) > 0).sum()),
    }  # fmt: skip
    return levels * np.uint16(STEP), labels, {"Cell": rows, **truth}, facts


def _draw_cells(plan: Plan, size: int) -> tuple[Array, Array, NDArray[np.bool_], NDArray[np.bool_]]:
    """All cells of a plan on patches of 2 * size pixels.

    Returns:
        Planes (b, C, side, side) with each cell's gain; claims (b, side, side) to the ground where cells overlap,
        largest at their middle; bodies (b, side, side); first and second nucleus (b, 2, side, side).
    """
    gain = plan.nuisance["gain"][:, [assay.CHANNELS.index(c) for c in plan.channels], None, None]
    parts = []
    for start in range(0, len(plan), assay.CHUNK):
        rows = np.arange(start, min(start + assay.CHUNK, len(plan)))
        cells = assay.scene(plan, size, rows, side=2 * size, alone=True)
        first, second = cells.nuclei
        nuclei = np.stack([(first > 0.5) & (first >= second), (second > 0.5) & (second > first)], axis=1)
        claims = cells.body * np.exp(-8.0 * cells.radius)
        parts.append((cells.planes * gain[rows], claims, cells.body > 0.5, nuclei))
    planes, claims, body, nuclei = (np.concatenate(part) for part in zip(*parts, strict=True))
    return planes, claims, body, nuclei


def _place(rng: np.random.Generator, nuclei: NDArray[np.bool_], optics: Optics, margin: int) -> NDArray[np.int64]:
    """Corners (b, 2) of the patches on the canvas: many cells settle beside others, and no two nuclei meet.

    ``nuclei`` (b, side, side) marks all nuclei of each cell.
    """
    size, field = optics.cell_size, np.array(optics.field_size)
    taken = np.zeros(field + 2 * margin, bool)
    low, high = -OUTSIDE * size, field + OUTSIDE * size
    centres = np.zeros((len(nuclei), 2))
    corners = np.zeros((len(nuclei), 2), np.int64)
    for i, nucleus in enumerate(nuclei):
        box = ndimage.find_objects(nucleus.astype(np.uint8))[0]
        small = nucleus[box]
        for _ in range(TRIES):
            centre = rng.uniform(low, high)
            if i and rng.random() < CLUSTERED:
                angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.42, 0.85) * size
                centre = centres[rng.integers(i)] + distance * np.array([np.sin(angle), np.cos(angle)])
            if not ((centre >= low) & (centre < high)).all():
                continue
            corner = np.floor(centre).astype(np.int64) + margin - size
            where = tuple(slice(c + b.start, c + b.stop) for c, b in zip(corner, box, strict=True))
            if not (taken[where] & small).any():
                break
        else:
            raise UserError(f"{len(nuclei)} cells of this design don't fit a field: lower cells_per_field or cell_size")
        centres[i], corners[i] = centre, corner
        wider = tuple(slice(s.start - 1, s.stop + 1) for s in where)
        taken[wider] |= ndimage.binary_dilation(np.pad(small, 1))
    return corners


def _scatter_debris(
    rng: np.random.Generator, canvas: Array, channels: Sequence[str], optics: Optics, margin: int
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Add bright irregular specks to the canvas; return where they lie, and y, x, radius (n, 3) in the field."""
    side = 2 * optics.cell_size
    at = np.arange(side, dtype=np.float32) - optics.cell_size
    dirt, found = np.zeros(canvas.shape[1:], bool), []
    for _ in range(rng.poisson(optics.debris_per_field)):
        radius = rng.uniform(0.14, 0.40) * optics.cell_size
        speck = np.zeros((side, side), np.float32)
        for _ in range(rng.integers(3, 12)):
            y, x = rng.uniform(-0.6, 0.6, 2) * radius
            angle, long, wide = rng.uniform(0, np.pi), rng.uniform(0.2, 0.6) * radius, rng.uniform(0.1, 0.3) * radius
            dy, dx = (at - y)[:, None], at - x
            u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
            speck += rng.uniform(0.5, 1.0) / (1.0 + ((u / long) ** 2 + (v / wide) ** 2) ** 2)
        speck *= np.maximum(0.0, 1.0 - (at[:, None] ** 2 + at**2) / optics.cell_size**2)  # its glow ends with the patch
        centre = rng.uniform(0, optics.field_size)
        top, left = (int(c) + margin - optics.cell_size for c in centre)
        where = np.s_[top : top + side, left : left + side]
        mask = speck > 0.3
        dirt[where] |= mask
        for plane, channel in zip(canvas, channels, strict=True):
            plane[where] += rng.uniform(2.5, 6.0) * (1.0 if channel == "DNA" else rng.uniform(0.05, 0.4)) * speck
        y, x = (float(c.mean()) for c in np.nonzero(mask))
        found.append((y + top - margin, x + left - margin, float(np.sqrt(mask.sum() / np.pi))))
    return dirt, np.array(found, np.float64).reshape(-1, 3)


def _label(
    nuclei: NDArray[np.bool_], corner: NDArray[np.int64], field_size: tuple[int, int]
) -> tuple[NDArray[np.uint16], dict[str, NDArray]]:
    """Number the nuclei (b, 2, side, side) with ``corner`` (b, 2) in the field: label image, and where each lies."""
    labels = np.zeros(field_size, np.uint16)
    label, area = np.zeros((2, len(nuclei), 2), np.uint16)
    centre = np.full((len(nuclei), 2, 2), np.nan, np.float32)
    middle = np.zeros((len(nuclei), 2), np.float32)
    for i, pair in enumerate(nuclei):
        middle[i] = np.argwhere(pair[0] | pair[1]).mean(axis=0) + corner[i]
        for k, nucleus in enumerate(pair):
            points = np.argwhere(nucleus) + corner[i]
            if len(points) < 6:  # there is no second one, or the cell's outline cuts it off
                continue
            centre[i, k] = points.mean(axis=0)
            y, x = points[((points >= 0) & (points < field_size)).all(axis=1)].T
            area[i, k] = len(y)
            label[i, k] = 2 * i + k + 1 if len(y) else 0
            labels[y, x] = label[i, k]
    truth: dict[str, NDArray] = {"y": middle[:, 0], "x": middle[:, 1]}
    truth["Nuclei"] = np.isfinite(centre[..., 0]).sum(axis=1)
    for k in range(2):
        truth |= {f"y_{k + 1}": centre[:, k, 0], f"x_{k + 1}": centre[:, k, 1]}
        truth |= {f"Label_{k + 1}": label[:, k], f"Area_{k + 1}": area[:, k]}
    return labels, truth
