"""Phenotype report: which features of the cell a direction changes, beside what the real treatment changes.

Features are measured as biologists do (``diffex.features``, ``diffex.cellprofiler``), in standard deviations of control
cells; the unit of every test is the well, and false discoveries are controlled over the features.

    agreement = sum_f d_f^2 (s_f) / sum_f d_f^2                                       (over features that d moves)

with d_f the direction's mean shift of feature f (cut at +-MOST, so that no feature that hardly varies decides alone)
and s_f 1 where the populations differ in f in that direction, -1 where they differ in the other, 0 where they don't.
1: all that the direction does to the cells, the treatment does to real cells too; about 0: by chance at most.  Under no
treatment effect hardly any feature differs, and agreement is 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from diffex.cells import NUCLEUS_NAMES, find_channel
from diffex.statistics import Contrast, adjusted, class_contrast, mean_test, plate_test, unit_means

Floats = NDArray[np.floating]

LEAST = 0.2  # standard deviations of control cells: Cohen's "small"; a shift below it counts as none
MOST = 5.0  # standard deviations that one feature can count
REDUNDANT = 0.9  # |correlation| from which the later of two features says nothing new
DISCOVERY = 0.05  # false discovery rate

_SHAPE = re.compile(r"(Nuclei|Cells)_AreaShape_(Area|Eccentricity)$|Cells_Children_Nuclei_Count$")
_LIGHT = re.compile(
    r"(?P<part>Nuclei|Cells)_(Intensity_MeanIntensity(Edge)?|RadialDistribution_FracAtD)"
    r"_(?P<channel>.+?)(?P<ring>_[14]of4)?$"
)


def headline(name: str) -> bool:
    """Whether a feature needs no explanation, and so stands before others that say the same.

    Shapes, and where each stain lies: nuclear stains in the nucleus, the others in the cell.
    """
    if _SHAPE.match(name):
        return True
    found = _LIGHT.match(name)
    if found is None or ("Radial" in name and not found["ring"]):
        return False
    nuclear = find_channel([found["channel"]], None, NUCLEUS_NAMES) is not None
    return nuclear == (found["part"] == "Nuclei") and not (nuclear and "Edge" in name)


STEADY = ("Nuclei_AreaShape_Area", "Cells_AreaShape_Area", "Cells_Children_Nuclei_Count")
"""Features worth a word where they do not change."""


@dataclass(frozen=True)
class Population:
    """How real treated cells differ from real control cells, in wells that no training has seen.

    Attributes:
        names: the F features kept.
        columns: their positions among the features given.
        spread: (F,) standard deviation of control cells, in the feature's own unit.
        correlation: (F, F) over cells, within classes.
        contrast: treated minus control, in ``spread``, within plates.
        q_value: (F,) adjusted p-values of the contrast.
        ratio: (F,) the contrast's difference over the mean of control cells; NaN where zero is not the least.
        wells: (W, F) means in ``spread``.
        treated: (W,) which of them are treated.
        plates: (W,) their plates (or the photographs, donors, ... that hold cells of both classes).
        cells: number of control and of treated cells.
    """

    names: tuple[str, ...]
    columns: NDArray[np.int64]
    spread: Floats
    correlation: Floats
    contrast: Contrast
    q_value: Floats
    ratio: Floats
    wells: Floats
    treated: NDArray[np.bool_]
    plates: NDArray
    cells: tuple[int, int]

    @property
    def differs(self) -> NDArray[np.bool_]:
        """(F,) features that the populations differ in, at a false discovery rate of DISCOVERY."""
        return np.nan_to_num(self.q_value, nan=1.0) <= DISCOVERY

    @property
    def confounded(self) -> bool:
        """Whether no plate holds wells of both classes, so that class and plate can't be told apart."""
        return self.contrast.freedom < 1 or bool(np.isnan(self.contrast.difference).all())


def population(
    values: Floats, names: Sequence[str], treated: NDArray[np.bool_], wells: NDArray, plates: NDArray
) -> Population:
    """Compare real treated with real control cells.

    Args:
        values: (N, F) features of held-out cells, in their own units.
        names: of the F features.
        treated: (N,) class of each cell.
        wells: (N,) statistical unit.
        plates: (N,) plate; all equal where there are none.
    """
    x = np.asarray(values, float)
    kept = _informative(x, names, treated)
    x = x[:, kept]
    control = x[~treated]
    spread = np.maximum(np.nanstd(control, axis=0, ddof=1), 1e-12)
    # A photograph or donor that holds cells of both classes is a block, within which its two halves are compared; where
    # only a few do, their halves are compared with whole wells.
    of_treated, of_control = np.unique(wells[treated]), np.unique(wells[~treated])
    both = np.intersect1d(of_treated, of_control)
    blocks = wells if len(both) >= max(2, min(len(of_treated), len(of_control)) / 2) else plates
    half = np.unique(wells, return_inverse=True)[1] * 2 + treated
    first = np.unique(half, return_index=True)[1]
    means = unit_means(x / spread, half)
    means = np.where(np.isnan(means), np.nanmean(means, axis=0), means)
    contrast = class_contrast(means, treated[first], blocks[first])
    within = np.concatenate([part - _mean(part) for part in (control, x[treated])])
    kept_names = tuple(names[j] for j in kept)
    return Population(
        names=kept_names, columns=kept, spread=spread, correlation=_correlation(within), contrast=contrast,
        q_value=adjusted(contrast.p_value), ratio=_ratio(contrast.difference, control / spread, kept_names),
        wells=means, treated=treated[first], plates=np.asarray(blocks)[first],
        cells=(len(control), int(treated.sum())),
    )  # fmt: skip


def _informative(x: Floats, names: Sequence[str], treated: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Features measured in nearly every cell, that vary, and that no feature before says already (headlines first)."""
    missing, mean = np.isnan(x).mean(axis=0), _mean(x[~treated])
    varies = np.sqrt(_mean((x[~treated] - mean) ** 2)) > 1e-6 * (np.abs(mean) + 1e-9)
    good = np.flatnonzero((missing <= 0.1) & varies)
    order = sorted(good.tolist(), key=lambda j: (not headline(names[j]), j))
    y = np.concatenate([x[c] - _mean(x[c]) for c in (~treated, treated)])[:, order]
    r = np.abs(_correlation(y))
    kept: list[int] = []
    for j in range(len(order)):
        if not kept or r[j, kept].max() < REDUNDANT:
            kept.append(j)
    return np.sort(np.array(order, np.int64)[kept])


def _correlation(centred: Floats) -> Floats:
    """Correlation of columns, NaN as the mean."""
    y = np.nan_to_num(centred)
    norm = np.maximum(np.linalg.norm(y, axis=0), 1e-12)
    return (y.T @ y) / norm[:, None] / norm[None, :]


def _mean(values: Floats) -> Floats:
    """Mean of values (n, F) over n, NaN left out; NaN where there are none."""
    return unit_means(values, np.zeros(len(values)))[0] if len(values) else np.full(values.shape[1], np.nan)


def _ratio(difference: Floats, before: Floats, names: Sequence[str]) -> Floats:
    """Difference relative to the mean of the cells before (n, F), NaN for features that have no true zero."""
    with np.errstate(all="ignore"):
        ratio = difference / _mean(before)
    never = ("Correlation", "Eccentricity", "Entropy", "Zernike")
    relative = np.array([not any(w in n for w in never) for n in names], bool)
    return np.where(relative & ~(before < -1e-6).any(axis=0) & np.isfinite(ratio), ratio, np.nan)


@dataclass(frozen=True)
class Shift:
    """What one direction does to the features of cells.

    Attributes:
        difference: (F,) mean over wells of edit minus reconstruction, in standard deviations of control cells.
        low, high: (F,) 95 % interval over wells (Student's t).
        q_value: (F,) adjusted p-values over wells.
        ratio: (F,) relative change; NaN where it has no meaning.
        moved: (F,) features that it moves: q <= DISCOVERY and at least LEAST.
        shared: share of the squared shift in features that the populations differ in, in the same direction.
        opposed: share where the populations differ in the other direction.
        cosine: of the shift and the populations' difference, over all features, both cut at MOST.
        n, units: edited cells and their wells.
    """

    difference: Floats
    low: Floats
    high: Floats
    q_value: Floats
    ratio: Floats
    moved: NDArray[np.bool_]
    shared: float
    opposed: float
    cosine: float
    n: int
    units: int

    @property
    def agreement(self) -> float:
        """What is shared less what is opposed, -1 to 1: see the head of this module."""
        return self.shared - self.opposed

    @property
    def size(self) -> float:
        """Root mean square of the shift over features, in standard deviations."""
        return float(np.sqrt(np.mean(np.square(self.difference))))


def direction_shift(edited: Floats, base: Floats, wells: NDArray, real: Population) -> Shift:
    """Features of edits against those of the reconstructions that they start from.

    Args:
        edited, base: (n, all features) in their own units.
        wells: (n,) statistical unit of each cell.
        real: the populations to compare with.
    """
    after, before = (np.asarray(v, float)[:, real.columns] for v in (edited, base))
    delta = (after - before) / real.spread
    means = unit_means(delta, wells)
    units = len(means)
    difference = np.nan_to_num(_mean(means))
    known = (~np.isnan(means)).sum(axis=0)
    with np.errstate(all="ignore"):
        variance = np.nansum((means - _mean(means)) ** 2, axis=0) / (known - 1)
        half = np.where(known > 1, stats.t.ppf(0.975, known - 1) * np.sqrt(variance / known), np.nan)
    q = adjusted(mean_test(means))
    moved = (np.nan_to_num(q, nan=1.0) <= DISCOVERY) & (np.abs(difference) >= LEAST)
    cut, target = (np.clip(np.nan_to_num(v), -MOST, MOST) for v in (difference, real.contrast.difference))
    weight = np.where(moved, cut**2, 0.0)
    same = np.sign(cut) == np.sign(target)
    total = weight.sum()
    shared = float(weight[real.differs & same].sum() / total) if total > 0 else 0.0
    opposed = float(weight[real.differs & ~same].sum() / total) if total > 0 else 0.0
    norm = np.linalg.norm(cut) * np.linalg.norm(target)
    paired = np.where(np.isnan(delta), np.nan, before / real.spread)
    return Shift(
        difference=difference, low=difference - half, high=difference + half, q_value=q,
        ratio=_ratio(difference, paired, real.names), moved=moved, shared=shared, opposed=opposed,
        cosine=float(cut @ target / norm) if norm > 0 else 0.0, n=len(delta), units=units,
    )  # fmt: skip


def implausible(values: Floats, real: Floats) -> Floats:
    """Share of each cell's features that no real cell has: outside the range of all real cells, (n,).

    Args:
        values: (n, F) features of edits.
        real: (N, F) of real cells of both classes; NaN left out on both sides.
    """
    low, high = np.fmin.reduce(real, axis=0), np.fmax.reduce(real, axis=0)
    outside = np.where(np.isnan(values) | np.isnan(low), np.nan, (values < low) | (values > high))
    return _mean(outside.T)


@dataclass(frozen=True)
class PlateLeakage:
    """Does a direction move cells along what differs between plates?

    Attributes:
        p_value: that control wells of different plates lie alike along the direction's shift (analysis of variance).
        ratio: spread of the plates' control wells along it, over what the treatment does along it; inf without effect.
        plates: number of plates with control wells.
    """

    p_value: float
    ratio: float
    plates: int

    @property
    def leaks(self) -> bool:
        """Whether plates differ along the direction, and by more than the treatment does."""
        return self.p_value <= DISCOVERY and self.ratio > 1.0


def plate_leakage(shift: Shift, real: Population) -> PlateLeakage:
    """Project real wells on what a direction does to cells, and compare plates along it.

    Args:
        shift: of the direction.
        real: populations, with the plates of their wells.
    """
    weight = np.where(shift.moved, np.clip(shift.difference, -MOST, MOST), 0.0)
    plates = np.unique(real.plates[~real.treated])
    if not weight.any() or len(plates) < 2:
        return PlateLeakage(float("nan"), float("nan"), len(plates))
    score = np.nan_to_num(real.wells) @ (weight / np.linalg.norm(weight))
    control = ~real.treated
    p = float(plate_test(score[control][:, None], real.plates[control])[0])
    means = np.array([score[control & (real.plates == plate)].mean() for plate in plates])
    effect = class_contrast(score[:, None], real.treated, real.plates).difference[0]
    ratio = float(means.std(ddof=1) / abs(effect)) if np.isfinite(effect) and effect else float("inf")
    return PlateLeakage(p, ratio, len(plates))


# ----------------------------------------------------------------------------------------------------------------------
# Words


PARTS = {"Nuclei": "nucleus", "Cells": "cell", "Cytoplasm": "cytoplasm"}
SHAPES = {
    "Area": "area", "Perimeter": "perimeter", "Eccentricity": "elongation (eccentricity)", "Solidity": "solidity",
    "Extent": "extent", "MajorAxisLength": "length", "MinorAxisLength": "width", "FormFactor": "roundness",
    "EquivalentDiameter": "diameter", "MaxFeretDiameter": "longest diameter", "AspectRatio": "aspect ratio",
    "MaximumRadius": "largest inner radius", "MeanRadius": "mean inner radius", "Compactness": "compactness",
}  # fmt: skip
INTENSITIES = {
    "MeanIntensity": "mean {} intensity of the {}", "IntegratedIntensity": "total {} of the {}",
    "StdIntensity": "unevenness of {} in the {}", "MeanIntensityEdge": "{} at the rim of the {}",
    "StdIntensityEdge": "unevenness of {} at the rim of the {}", "MaxIntensity": "brightest {} of the {}",
    "MinIntensity": "darkest {} of the {}", "MedianIntensity": "median {} intensity of the {}",
    "MADIntensity": "spread of {} in the {}", "LowerQuartileIntensity": "lower quartile of {} in the {}",
    "UpperQuartileIntensity": "upper quartile of {} in the {}",
}  # fmt: skip
RINGS = {"FracAtD": "share of {} {}", "MeanFrac": "concentration of {} {}", "RadialCV": "patchiness of {} {}"}


def plain(name: str) -> str:
    """A feature's name in words: 'Cells_Intensity_MeanIntensityEdge_actin' is 'actin at the rim of the cell'."""
    part, family, feature, rest = [*name.split("_", 3), "", "", ""][:4]
    if name == "Cells_Children_Nuclei_Count" or not feature:
        return "number of nuclei" if feature else name.replace("_", " ")
    where, channel = PARTS.get(part, part.lower()), rest.replace("_", " ")
    kind = feature if feature.isupper() else re.sub(r"(?<=[a-z])(?=[A-Z0-9])", " ", feature).lower()
    if family == "AreaShape":
        return f"{where} {SHAPES.get(feature, f'{kind} {channel}'.strip())}"
    if family == "Intensity" and feature in INTENSITIES:
        return INTENSITIES[feature].format(channel, where)
    # A texture ends in its scale (CellProfiler's in scale, angle and levels), a radial distribution in its ring.
    scaled = re.fullmatch(r"(.+?)_(\d+_\d+_\d+|\d+|\dof\d)", rest)
    of, scale = (v.replace("_", " ") for v in scaled.groups()) if scaled else (channel, "")
    if family == "RadialDistribution" and feature in RINGS:
        ring = {"1of4": "at the centre", "4of4": "at the rim"}.get(scale, f"in ring {scale.replace('of', ' of ')}")
        return f"{RINGS[feature].format(of, ring)} of the {where}"
    if family == "RadialDistribution" and feature == "Spread":
        return f"spread of {channel} over the {where}"
    if family == "Texture":
        return f"{of} texture of the {where} ({kind}, scale {scale})"
    if family == "Granularity":
        return f"{channel} grains of size {feature} in the {where}"
    if family == "Correlation":
        return f"{kind} of {rest.replace('_', ' and ') if rest.count('_') == 1 else channel} in the {where}"
    known = family in ("Intensity", "RadialDistribution")
    return f"{kind} of {channel} in the {where}" if known else name.replace("_", " ")


def phenotype_words(shift: Shift, real: Population, treatment: str, most: int = 3) -> list[str]:
    """What a direction changes in the cells, in words, largest first, each beside the real treatment's effect.

    Headlines (see ``headline``) are named where any of them moves, and none that correlates with one named before.
    Last comes one of STEADY that does not change.
    """
    plainly = np.array([headline(n) for n in real.names], bool)
    # Of shifts about as large, areas and intensities say more than shares of light.
    weight = np.abs(shift.difference) * np.where(["Radial" in n for n in real.names], 1.0, 1.3)
    if (plainly & shift.moved).any():
        weight = np.where(plainly, weight, 0.0)
    named: list[int] = []
    for j in np.argsort(-weight):
        if shift.moved[j] and weight[j] > 0 and (not named or np.abs(real.correlation[j, named]).max() < 0.6):
            named.append(int(j))
        if len(named) == most:
            break
    lines = [f"{plain(real.names[j])} {amount(shift, j)}, {_beside(shift, real, j, treatment)}" for j in named]
    still = [
        j for j, n in enumerate(real.names)
        if n in STEADY and not shift.moved[j] and max(abs(shift.low[j]), abs(shift.high[j])) < 2 * LEAST
    ]  # fmt: skip
    return lines + [f"{plain(real.names[j])} not changed" for j in still[:1]]


def amount(shift: Shift, j: int) -> str:
    """'-38 %' where a relative change says something, else '+1.2 sd'."""
    if np.isfinite(shift.ratio[j]) and abs(shift.ratio[j]) < 5:
        return f"{100 * shift.ratio[j]:+.0f} %"
    return f"{shift.difference[j]:+.1f} sd"


def _beside(shift: Shift, real: Population, j: int, treatment: str) -> str:
    effect = real.contrast.difference[j]
    if np.isnan(effect):
        return f"the real effect of {treatment} can't be told from plates"
    if not real.differs[j]:
        return f"real {treatment} cells do not differ in it"
    both = np.isfinite([shift.ratio[j], real.ratio[j]]).all() and abs(real.ratio[j]) < 5 and abs(shift.ratio[j]) < 5
    value = f"{100 * real.ratio[j]:+.0f} %" if both else f"{effect:+.1f} sd"
    word = "agrees with" if np.sign(effect) == np.sign(shift.difference[j]) else "against"
    return f"{word} the real effect of {treatment} {value}"
