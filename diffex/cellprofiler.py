"""The full feature set of CellProfiler, computed by the library cp_measure (the extra ``diffex[cells]``).

    Cells_Texture_Contrast_actin_3_00_256, Nuclei_AreaShape_Zernike_4_2, Cytoplasm_Correlation_Manders_DNA_actin, ...

Lengths are in pixels of the given image, areas in square pixels, angles in degrees, places in pixels from the image's
upper left corner.  Source: Stirling et al., "CellProfiler 4", BMC Bioinformatics 2021; Munoz et al., "cp_measure",
arXiv:2507.01163.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from diffex.cells import Labels, compartments
from diffex.errors import UserError

LEAST = 3  # pixels; what is smaller has neither axes nor a spread
COSTES_STEPS = 255  # of the search for Costes' threshold: CellProfiler's own number for images of unknown depth
SHAPES = ("sizeshape", "zernike", "feret")  # measurements of the mask alone

Measurement = Callable[..., Mapping[str, Sequence[float]]]


def measure_full(
    image: NDArray, channels: Sequence[str], *, nucleus_channel: str | None = None, cell_channel: str | None = None,
    background: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Measure the cell in the middle of a single-cell image with everything that cp_measure offers for one cell.

    Shape, moments and Zernike moments of the mask; intensity, its place, Haralick's texture, granularity, radial
    distribution and Zernike moments of every channel; correlation, slope, overlap, Manders', Costes' and rank-weighted
    colocalisation of every pair.  The masks, compartments and ``Cells_Children_Nuclei_Count`` are those of
    ``features.measure``: all nuclei of a cell are one object.  The same channels give the same names for every image.

    CellProfiler's settings, except that granularity is measured without subsampling (a quarter of 32 pixels holds no
    grains), that quartiles are NumPy's, and that Costes' threshold is fitted to each object, which is not defined where
    two channels exclude each other.  Texture counts no pixels below 1/510, which are black in 8 bits.

    Args:
        image: (C, H, W), intensities from 0 (black) to 1, 32 to 128 pixels wide or so.
        channels: names of the C channels.
        nucleus_channel: name of the nuclei's; None: told by its name, and if none is, there are only Cells_ features.
        cell_channel: name of the channel to find the cell in; None: all but the nuclei's, averaged.
        background: level outside cells; None: the first percentile of each image and channel.

    Returns:
        Feature name -> value.  NaN where the compartment isn't there or has fewer than 3 pixels, and where the feature
        is not defined.

    Raises:
        UserError: cp_measure is not installed, an intensity is out of range, or there is no channel of the name given.
    """
    alone, single, paired = measurements()
    pixels = np.asarray(image, np.float32)
    if not (pixels.min() >= -1e-4 and pixels.max() <= 1.0001):  # NaN, too
        raise UserError(
            f"the full feature set needs intensities from 0 to 1, got {pixels.min():g} to {pixels.max():g}; "
            "scale the image first"
        )
    parts, count = compartments(pixels, channels, nucleus_channel, cell_channel, background)
    planes = dict(zip(channels, pixels.clip(0.0, 1.0).astype(np.float64), strict=True))
    values = {} if count is None else {"Cells_Children_Nuclei_Count": float(count)}
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Undefined Costes result", RuntimeWarning)
        for part, mask in parts.items():
            there = int(mask.sum()) >= LEAST
            labels = (mask if there else np.ones_like(mask)).astype(np.int32)  # names don't depend on the mask
            found: dict[str, float] = {}
            for measure in alone:
                found |= {f"AreaShape_{name}": v for name, v in _one(measure, labels, None)}
            for channel, plane in planes.items():
                for measure in single:
                    found |= {_of_channel(name, channel): v for name, v in _one(measure, labels, plane)}
            for a, b in combinations(channels, 2):
                lit = planes[a][mask].any() and planes[b][mask].any()  # black overlaps with nothing: 0 / 0
                two = (planes[a], planes[b]) if lit else (np.ones(mask.shape), np.ones(mask.shape))
                for measure in paired:
                    named = {_of_pair(name, a, b): v for name, v in _one(measure, *two, labels)}
                    found |= named if lit else dict.fromkeys(named, float("nan"))
            values |= {f"{part}_{n}": v if there and np.isfinite(v) else float("nan") for n, v in found.items()}
    return values


def measurements() -> tuple[list[Measurement], list[Measurement], list[Measurement]]:
    """What cp_measure offers: measurements of a mask, of a mask and a channel, and of a mask and two channels.

    Raises:
        UserError: cp_measure is not installed.
    """
    try:
        from cp_measure.bulk import get_core_measurements, get_correlation_measurements  # type: ignore[import-untyped]
        from cp_measure.core.measurecolocalization import get_correlation_overlap  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError(
            f"the full feature set needs the package cp_measure ({error}): pip install 'diffex[cells]'"
        ) from None
    core = dict(get_core_measurements(sanitize=False))  # a copy of its own table; the only label is 1
    core["granularity"] = partial(core["granularity"], subsample_size=1, image_sample_size=1)
    pairs = dict(get_correlation_measurements(sanitize=False))
    pairs["costes"] = partial(pairs["costes"], scale_max=COSTES_STEPS)
    alone = [core.pop(name) for name in SHAPES]
    return alone, list(core.values()), [*pairs.values(), get_correlation_overlap]


def _one(measure: Measurement, *arguments: Labels | NDArray[np.float64] | None) -> list[tuple[str, float]]:
    """Names and values of the only object."""
    return [(name, float(values[0])) for name, values in measure(*arguments).items()]


def _of_channel(name: str, channel: str) -> str:
    """The channel's name goes before the scale of a texture and the ring of a distribution, else to the end."""
    if name.startswith(("Intensity_", "Location_", "Granularity_")):
        return f"{name}_{channel}"
    if not name.startswith("RadialDistribution_"):
        name = f"Texture_{name}"
    family, kind, scale = name.split("_", 2)
    return f"{family}_{kind}_{channel}_{scale}"


def _of_pair(name: str, a: str, b: str) -> str:
    """What is of the second channel relative to the first (``_2``) names the second one first."""
    kind = name.replace("Pearson", "Correlation").removesuffix("_1")
    return f"{kind.removesuffix('_2')}_{b}_{a}" if kind.endswith("_2") else f"{kind}_{a}_{b}"
