"""Arrays in, numbers out, each with its interval where there is one.

Images are compared in [0, 1] (data range 1), the range of the published numbers; everything else in the library is in
[-1, 1], so ``ssim``, ``mse`` and ``psnr`` take that and convert.
"""

from __future__ import annotations

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
