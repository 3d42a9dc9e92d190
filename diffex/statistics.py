"""Intervals and tests.  The statistical unit is the well (donor, ...): its images are resampled together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.floating]


def unit_sums(values: Floats, groups: NDArray) -> tuple[Floats, Floats]:
    """Sum and count of values (n, ...) within each unit."""
    index = np.unique(groups, return_inverse=True)[1]
    units = index.max() + 1
    sums = np.zeros((units, *values.shape[1:]))
    np.add.at(sums, index, values)
    return sums, np.bincount(index, minlength=units).astype(float)


def bootstrap_interval(
    values: Floats, groups: NDArray, *, confidence: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean of values (n,), resampling whole units given by groups (n,).

    For 0/1 values whose mean is 0 or 1, where resampling sees no variation, Wilson's interval at the number of units
    stands in: "20 of 20" is not certainty.
    """
    if len(values) == 0:
        return float("nan"), float("nan")
    sums, counts = unit_sums(np.asarray(values, float), groups)
    if len(counts) < 2 or np.ptp(values) == 0:
        if np.isin(values, (0.0, 1.0)).all():
            return wilson_interval(float(np.mean(values)), len(counts), confidence=confidence)
        return (float(np.mean(values)),) * 2 if len(counts) > 1 else (float("nan"), float("nan"))
    pick = np.random.default_rng(seed).integers(0, len(counts), (draws, len(counts)))
    means = sums[pick].sum(axis=1) / counts[pick].sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def wilson_interval(share: float, n: int, *, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a proportion seen in n independent trials.  Source: Wilson, JASA 1927."""
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_flip_p_value(differences: Floats, groups: NDArray, *, draws: int = 2000, seed: int = 0) -> float:
    """One-sided permutation p-value that the mean of differences (n,) exceeds 0, flipping signs of whole units."""
    sums, _ = unit_sums(np.asarray(differences, float), groups)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, len(sums)))
    return float((1 + (signs @ sums >= sums.sum() - 1e-12).sum()) / (draws + 1))


def unit_means(values: Floats, groups: NDArray) -> Floats:
    """Mean of values (n, ...) in each unit, (units, ...); units in ascending order, NaN left out."""
    there = ~np.isnan(values)
    sums, _ = unit_sums(np.where(there, values, 0.0), groups)
    counts, _ = unit_sums(there.astype(float), groups)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def mean_test(means: Floats, *, alternative: str = "two-sided") -> Floats:
    """Student's t-test that the mean of unit means (units, ...) is not 0, along the first axis; NaN left out.

    Returns:
        p-values, (...); NaN where fewer than two units have a value, 1 where all values are 0.
    """
    values = np.asarray(means, float)
    count = (~np.isnan(values)).sum(axis=0)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of too few and of equal values, both answered below
        p = stats.ttest_1samp(values, 0.0, axis=0, nan_policy="omit", alternative=alternative).pvalue
    constant = np.nanmax(np.abs(values), axis=0, initial=0.0) == 0
    return np.where(count < 2, np.nan, np.where(constant, 1.0, np.asarray(p, float)))


@dataclass(frozen=True)
class Contrast:
    """Difference of two classes of wells, feature by feature.

    Attributes:
        difference: (F,) treated minus control, in the units given.
        p_value: (F,) two-sided; NaN where it can't be tested.
        freedom: degrees of freedom left.
        error: (F,) standard error of the difference.
    """

    difference: Floats
    p_value: Floats
    freedom: int
    error: Floats


def class_contrast(means: Floats, treated: NDArray[np.bool_], plates: NDArray) -> Contrast:
    """Compare treated with control wells within plates: least squares of ``well = plate + treated * difference``.

    A plate that holds wells of one class only says nothing about the difference; where that is so of every plate, class
    and plate can't be told apart and nothing is tested.

    Args:
        means: (W, F) mean of each well.
        treated: (W,) whether it is a treated one.
        plates: (W,) its plate; all equal where there are none.
    """
    values = np.asarray(means, float)
    plate = np.unique(plates, return_inverse=True)[1]

    def within(x: Floats) -> Floats:
        sums, counts = unit_sums(x, plate)
        return x - (sums / counts.reshape(-1, *[1] * (x.ndim - 1)))[plate]

    x, y = within(treated.astype(float)), within(values)
    power = float(x @ x)
    freedom = len(values) - int(plate.max()) - 2
    nothing = np.full(values.shape[1], np.nan)
    if power < 1e-9 or freedom < 1:
        return Contrast(nothing, nothing, max(freedom, 0), nothing)
    difference = x @ y / power
    error = np.sqrt(((y - x[:, None] * difference) ** 2).sum(axis=0) / freedom / power)
    with np.errstate(all="ignore"):
        p = 2 * stats.t.sf(np.abs(difference / error), freedom)
    return Contrast(difference, np.where((error == 0) & (difference == 0), 1.0, p), freedom, error)


def plate_test(means: Floats, plates: NDArray) -> Floats:
    """One-way analysis of variance of wells (W, F) over their plates: p-values (F,); NaN with fewer than two plates,
    no plate with two wells, or wells that are all equal."""
    groups = [np.asarray(means, float)[plates == plate] for plate in np.unique(plates)]
    if len(groups) < 2 or len(means) <= len(groups):
        return np.full(np.shape(means)[1], np.nan)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of constant features: NaN
        return np.asarray(stats.f_oneway(*groups, axis=0).pvalue, float)


def adjusted(p_values: Floats) -> Floats:
    """False-discovery-adjusted p-values (Benjamini & Hochberg, JRSS B 1995) of p-values (n,); NaN stays NaN."""
    p = np.asarray(p_values, float)
    out, there = np.full(p.shape, np.nan), ~np.isnan(p)
    if there.any():
        out[there] = stats.false_discovery_control(p[there])
    return out


def best_of_sphere_p_value(
    moved: Floats, null: Floats, dimensions: int, *, draws: int = 20_000, seed: int = 0
) -> Floats:
    """Is each direction's pull on the classifier more than the best of as many random directions would have?

    Under the null hypothesis all K directions are drawn, like the R random ones, uniformly from the sphere in r
    dimensions.  Where the classifier answers a shift linearly, its mean answer to a random direction is distributed
    like one coordinate of a random unit vector, times a scale that the R random directions tell.  So the p-value of
    ``|moved_k| / rms(null)`` is its rank among simulated maxima of K such ratios: adjusted for the number of directions
    and for the choice of the better sign, with a resolution that R rendered directions alone can't give.

    Args:
        moved: (K,) mean change of the classifier's logit along each direction, at one length.
        null: (R,) the same along random directions of that length.
        dimensions: r, of the subspace that directions live in.

    Returns:
        (K,) p-values, adjusted over all K; NaN where a direction's change is, or no random direction's is known.  1 in
        one dimension, where all directions are alike.
    """
    ratio = np.abs(np.asarray(moved, float))
    if not len(null) or dimensions < 2:
        return np.where(np.isnan(ratio) | (len(null) == 0), np.nan, 1.0)
    rng = np.random.default_rng(seed)
    k, r = len(moved), len(null)

    def coordinate(*shape: int) -> Floats:
        """One coordinate of unit vectors, without its sign; its square, chi2_1 / chi2_r, is Beta(1/2, (r - 1)/2)."""
        return np.sqrt(rng.beta(0.5, (dimensions - 1) / 2, shape))

    scale = np.sqrt(np.mean(np.square(null)))
    simulated = coordinate(draws, k).max(axis=1) / np.sqrt(np.square(coordinate(draws, r)).mean(axis=1))
    ratio = ratio / max(scale, 1e-12)
    p = (1 + (simulated[None, :] >= ratio[:, None]).sum(axis=1)) / (draws + 1)
    return np.where(np.isnan(ratio), np.nan, p)
