"""Arrays in, numbers out, each with its interval where there is one.

Images are compared in [0, 1] (data range 1), the range of the published numbers; everything else in the library is in
[-1, 1], so ``ssim``, ``mse`` and ``psnr`` take that and convert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.floating]

# ----------------------------------------------------------------------------------------------------------------------
# Images


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images a, b (N, C, H, W) in [-1, 1]; returns (N,), 1 for equal images.

    Gaussian window of 11 pixels and sigma 1.5, zero-padded: as the published numbers were computed.
    Source: Wang et al., IEEE TIP 2004.
    """
    a, b = (a.float() + 1) / 2, (b.float() + 1) / 2
    channels = a.shape[1]
    g = torch.exp(-((torch.arange(11, dtype=torch.float32, device=a.device) - 5) ** 2) / (2 * 1.5**2))
    g = g / g.sum()
    window = (g[:, None] * g[None, :]).expand(channels, 1, 11, 11).contiguous()

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, window, padding=5, groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b, cov = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2, blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean(dim=(1, 2, 3))


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of images in [-1, 1], measured in [0, 1]; (N,)."""
    return ((a.float() - b.float()) / 2).square().flatten(1).mean(dim=1)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in decibels, (N,)."""
    return -10 * torch.log10(mse(a, b))


# ----------------------------------------------------------------------------------------------------------------------
# Intervals and tests.  The statistical unit is the well (donor, ...): its images are resampled together.


def _unit_sums(values: Floats, groups: NDArray) -> tuple[Floats, Floats]:
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
    sums, counts = _unit_sums(np.asarray(values, float), groups)
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
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + confidence / 2))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def sign_flip_p_value(differences: Floats, groups: NDArray, *, draws: int = 2000, seed: int = 0) -> float:
    """One-sided permutation p-value that the mean of differences (n,) exceeds 0, flipping signs of whole units."""
    sums, _ = _unit_sums(np.asarray(differences, float), groups)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, len(sums)))
    return float((1 + (signs @ sums >= sums.sum() - 1e-12).sum()) / (draws + 1))


# ----------------------------------------------------------------------------------------------------------------------
# Sets of directions


def consistency(unit_shifts: Tensor) -> Tensor:
    """Mean cosine between a direction's unit shifts on different images: (K, B, r) to (K,); 1 where all agree."""
    b = unit_shifts.shape[1]
    total = unit_shifts.sum(dim=1).square().sum(dim=-1)
    return (total - b) / (b * (b - 1))


def effective_rank(rows: Floats) -> float:
    """How many different rows a matrix (K, P) really has: exp of the entropy of its normalised squared singular values.

    K for orthogonal rows of equal length, 1 for parallel ones.  Source: Roy & Vetterli, EUSIPCO 2007.
    """
    energy = np.linalg.svd(np.asarray(rows, float), compute_uv=False) ** 2
    total = energy.sum()
    if total <= 0:
        return 0.0
    share = energy[energy > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_overlap(maps: Floats) -> float:
    """Mean cosine of the magnitudes of different rows (K, n, P), pairwise and image by image; 0 where K < 2.

    0: no two directions change the same pixels and channels; 1: all change the same.
    """
    magnitude = np.abs(np.asarray(maps, float))
    k = len(magnitude)
    if k < 2:
        return 0.0
    unit = magnitude / np.maximum(np.linalg.norm(magnitude, axis=-1, keepdims=True), 1e-12)
    cosine = np.einsum("knp,lnp->nkl", unit, unit).mean(axis=0)
    return float(np.clip(cosine[~np.eye(k, dtype=bool)].mean(), 0.0, 1.0))


@dataclass(frozen=True)
class Recovery:
    """Planted factors that directions move.

    Attributes:
        moved: those that some direction moves enough, and more than any decoy.
        recovered: those that are the *largest* change of some direction (a direction stands for one factor only).
        decoy_hits: number of directions whose largest change is a decoy.
    """

    moved: list[str]
    recovered: list[str]
    decoy_hits: int


def factor_recovery(shifts: Floats, factors: Sequence[str], planted: Sequence[str], *, least: float = 0.5) -> Recovery:
    """Which planted factors the directions move, on the simulated assay.

    Args:
        shifts: (M, F) mean change of each measured factor along each direction, in population standard deviations.
        factors: names of the F factors.
        planted: those that a treatment moves; the rest are decoys.
        least: a change below this many standard deviations counts as none.

    """
    size = np.abs(np.asarray(shifts, float))
    is_planted = np.array([f in planted for f in factors], bool)
    decoy = size[:, ~is_planted].max(axis=1, initial=0.0)
    moved = [f for j, f in enumerate(factors) if is_planted[j] and ((size[:, j] >= least) & (size[:, j] > decoy)).any()]
    largest = size.argmax(axis=1) if size.size else np.zeros(0, int)
    strong = size.max(axis=1, initial=0.0) >= least
    recovered = [f for j, f in enumerate(factors) if is_planted[j] and ((largest == j) & strong).any()]
    hits = int((strong & ~is_planted[largest]).sum()) if size.size else 0
    return Recovery(moved, recovered, hits)
