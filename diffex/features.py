"""Core features of the cell in the middle of an image: what CellProfiler measures, under pycytominer's names.

    Nuclei_AreaShape_Area, Cells_Intensity_MeanIntensity_actin, Cells_RadialDistribution_FracAtD_actin_4of4, ...

Lengths are in pixels of the given image, areas in square pixels, intensities in the image's own units.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import feature, morphology
from skimage import measure as regions

from diffex.cellprofiler import measure_full
from diffex.cells import Mask, Plane, compartments, depth_inside

GREYS = 16  # grey levels of the texture features
RINGS = 4  # of the radial distribution
GRAINS = (1, 2, 3, 4)  # pixels, radii of the granularity features


def measure(
    image: NDArray, channels: Sequence[str], *, nucleus_channel: str | None = None, cell_channel: str | None = None,
    background: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Measure the cell in the middle of a single-cell image.

    Nuclei_ features describe all of the cell's nuclear pixels together (``Cells_Children_Nuclei_Count`` says how many
    nuclei those are), Cells_ the cell without its neighbours, as far as the image shows it, Cytoplasm_ the cell without
    its nuclei.  The same channels give the same names for every image.

    Args:
        image: (C, H, W) of any real type, 32 to 128 pixels wide or so; intensities are taken as they are, with black at
            or above 0.
        channels: names of the C channels.
        nucleus_channel: name of the nuclei's; None: told by its name, and if none is, there are only Cells_ features.
        cell_channel: name of the channel to find the cell in; None: all but the nuclei's, averaged.
        background: level outside cells, 0 for images that an ingest has scaled; None: the first percentile of each
            image and channel, for images of unknown black.

    Returns:
        Feature name -> value: pixels, square pixels, intensities of the image, or ratios.  NaN where the compartment
        isn't there: all of Nuclei_ and Cytoplasm_ in an image without a nucleus, all but the count without a cell.

    Raises:
        UserError: there is no channel of the name given.
    """
    pixels = np.asarray(image, np.float32)
    parts, count = compartments(pixels, channels, nucleus_channel, cell_channel, background)
    values = {} if count is None else {"Cells_Children_Nuclei_Count": float(count)}

    def add(family: str, found: dict[str, float], channel: str = "") -> None:
        for name, value in found.items():
            stem, _, scale = name.partition("_")
            values["_".join(filter(None, (family, stem, channel, scale)))] = value

    for part, mask in parts.items():
        add(f"{part}_AreaShape", _shape(mask))
        for channel, plane in zip(channels, pixels, strict=True):
            add(f"{part}_Intensity", _intensity(plane, mask), channel)
            if part != "Cytoplasm":
                add(f"{part}_Texture", _texture(plane, mask), channel)
                add(f"{part}_Granularity", _granularity(plane, mask), channel)
            if part == "Cells":
                add(f"{part}_RadialDistribution", _radial(plane, mask, parts["Nuclei"] if count else mask), channel)
        for a, b in combinations(range(len(channels)), 2):
            value = _correlation(pixels[a][mask], pixels[b][mask])
            values[f"{part}_Correlation_Correlation_{channels[a]}_{channels[b]}"] = value
    return values


def measure_many(
    images: NDArray, channels: Sequence[str], *, full: bool = False, **how: Any
) -> dict[str, NDArray[np.float64]]:
    """Measure single-cell images (n, C, H, W), n >= 1: feature name -> (n,) values.

    ``full``: all that CellProfiler measures (``cellprofiler.measure_full``), else the core set; ``how``: see
    ``measure``.
    """
    rows = [(measure_full if full else measure)(image, channels, **how) for image in images]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _shape(mask: Mask) -> dict[str, float]:
    names = {
        "Area": "area", "Perimeter": "perimeter", "Eccentricity": "eccentricity", "Solidity": "solidity",
        "Extent": "extent", "MajorAxisLength": "axis_major_length", "MinorAxisLength": "axis_minor_length",
        "EquivalentDiameter": "equivalent_diameter_area", "MaxFeretDiameter": "feret_diameter_max",
    }  # fmt: skip
    if mask.sum() < 3:
        return dict.fromkeys((*names, "FormFactor", "AspectRatio", "MaximumRadius", "MeanRadius"), float("nan"))
    region = regions.regionprops(mask.astype(np.uint8))[0]
    values = {name: float(region[key]) for name, key in names.items()}
    depth = depth_inside(mask)[mask]
    return values | {
        "FormFactor": 4.0 * np.pi * values["Area"] / max(values["Perimeter"], 1.0) ** 2,
        "AspectRatio": values["MajorAxisLength"] / max(values["MinorAxisLength"], 1.0),
        "MaximumRadius": float(depth.max()),
        "MeanRadius": float(depth.mean()),
    }


def _intensity(plane: Plane, mask: Mask) -> dict[str, float]:
    names = (
        "MeanIntensity", "IntegratedIntensity", "StdIntensity", "MinIntensity", "LowerQuartileIntensity",
        "MedianIntensity", "UpperQuartileIntensity", "MaxIntensity", "MADIntensity", "MeanIntensityEdge",
        "StdIntensityEdge",
    )  # fmt: skip
    if not mask.any():
        return dict.fromkeys(names, float("nan"))
    x = plane[mask].astype(np.float64)
    # Pixels on the outline; where the image's border cuts the object off, that is none.
    edge = plane[mask & ~ndimage.binary_erosion(mask, border_value=1)].astype(np.float64)
    edge = edge if edge.size else x
    quartiles = np.percentile(x, (0, 25, 50, 75, 100))
    spread = np.median(np.abs(x - quartiles[2]))
    numbers = (x.mean(), x.sum(), x.std(), *quartiles, spread, edge.mean(), edge.std())
    return dict(zip(names, map(float, numbers), strict=True))


def _radial(plane: Plane, cell: Mask, centre: Mask) -> dict[str, float]:
    """Intensity in rings of equal width from the centre of the nuclei (0) to the edge of the cell (1).

    Spread is how far light above the cell's median lies from its own middle, as a root mean square in pixels.
    """
    values = {"Spread": float("nan")}
    if cell.any():
        y, x = np.mgrid[: cell.shape[0], : cell.shape[1]]
        bright = np.maximum(plane[cell] - np.median(plane[cell]), 0.0).astype(np.float64)
        if bright.any():
            own = [np.average(q[cell], weights=bright) for q in (y, x)]
            square = (y[cell] - own[0]) ** 2 + (x[cell] - own[1]) ** 2
            values["Spread"] = float(np.sqrt(np.average(square, weights=bright)))
        middle = ndimage.center_of_mass(centre)
        inner = np.hypot(y - middle[0], x - middle[1])
        ring = np.minimum(RINGS * inner / (inner + depth_inside(cell)), RINGS - 1)[cell].astype(np.int64)
        angle = np.floor(np.arctan2(y - middle[0], x - middle[1])[cell] * (4 / np.pi)).astype(np.int64) % 8
        light = plane[cell].astype(np.float64)
    for k in range(RINGS):
        here = ring == k if cell.any() else np.zeros(0, bool)
        share, pixels, spread = (float("nan"),) * 3
        if here.any():
            share, pixels = light[here].sum() / max(light.sum(), 1e-12), here.mean()
            number = np.bincount(angle[here], minlength=8)
            wedge = np.bincount(angle[here], light[here], minlength=8)[number > 0] / number[number > 0]
            spread = float(wedge.std() / max(wedge.mean(), 1e-12))
        suffix = f"{k + 1}of{RINGS}"
        values |= {f"FracAtD_{suffix}": float(share), f"MeanFrac_{suffix}": float(share / pixels)}
        values[f"RadialCV_{suffix}"] = spread
    return values


def _texture(plane: Plane, mask: Mask) -> dict[str, float]:
    """Haralick's measures of grey levels from 0 to the object's 99th percentile, mean of four directions."""
    kinds = {"Contrast": "contrast", "AngularSecondMoment": "ASM", "Correlation": "correlation", "Entropy": "entropy",
             "InverseDifferenceMoment": "homogeneity"}  # fmt: skip
    scales = (1, 3)
    if mask.sum() < 3:
        return {f"{kind}_{d}": float("nan") for kind in kinds for d in scales}
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    top = max(float(np.percentile(plane[mask], 99.0)), 1e-12)
    # Level 0 is what lies outside; its pairs are taken out of the count.
    grey = np.where(mask, 1 + np.clip(plane / top * GREYS, 0, GREYS - 1), 0).astype(np.uint8)[box]
    angles = [0, np.pi / 4, np.pi / 2, 3 * np.pi / 4]
    pairs = feature.graycomatrix(grey, scales, angles, levels=GREYS + 1, symmetric=True)[1:, 1:]
    pairs = pairs.sum(axis=3, keepdims=True)
    values: dict[str, float] = {}
    for kind, name in kinds.items():
        numbers = feature.graycoprops(pairs, name)[:, 0]
        found = pairs.sum(axis=(0, 1, 3)) > 0
        values |= {
            f"{kind}_{d}": float(v) if f else float("nan") for d, v, f in zip(scales, numbers, found, strict=True)
        }
    return values


def _granularity(plane: Plane, mask: Mask) -> dict[str, float]:
    """Share (in percent) of the object's light in structures about 2 r to 2 r + 2 pixels wide."""
    left, values = plane, {}
    total = max(float(plane[mask].sum()), 1e-12) if mask.any() else float("nan")
    for r in GRAINS:
        opened = np.minimum(ndimage.grey_opening(plane, footprint=morphology.disk(r)), left)
        values[str(r)] = 100.0 * float((left - opened)[mask].sum()) / total
        left = opened
    return values


def _correlation(a: NDArray, b: NDArray) -> float:
    """Pearson's correlation; NaN of constants and of fewer than three pixels."""
    if len(a) < 3 or a.min() == a.max() or b.min() == b.max():
        return float("nan")
    return float(np.corrcoef(a.astype(np.float64), b.astype(np.float64))[0, 1])
