"""The light of a plate: dark level, flat field, background and the camera's limit, all from the plate's own images.

    raw = dark + flat(y, x) * (cells + background)          flat: a polynomial over the field, of mean 1

Retrospective illumination correction as in Singh et al. 2014, "Pipeline for illumination correction of images for
high-throughput microscopy", with one difference: the light is read from the brightness of *foreground* pixels, however
many.  A mean over all pixels shows as well where cells happen to lie, and takes hundreds of fields to be smooth.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache

import numpy as np
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy import ndimage
from skimage import filters

Plane = NDArray[np.float32]
Surface = tuple[tuple[float, ...], ...]
"""Coefficients [i][j] of P_i(y) P_j(x), Legendre polynomials over the field; [0][0] = 1 makes its mean 1."""

EVEN: Surface = ((1.0,),)
COARSE = 128  # fields are compared at this size: light varies more slowly
TILES = 8  # and their brightness in so many by so many parts of the field
PRIOR = 0.1  # standard deviation of a coefficient of order 1 before any image is seen; 1 / order for the others
LOWEST = 5.0  # percentile of a field's coarse pixels that is background
TRACE = 16  # so many pixels at one value are a camera's limit rather than chance


@lru_cache(maxsize=16)
def surface(coefficients: Surface, shape: tuple[int, int]) -> Plane:
    """The polynomial at the middle of every pixel of a field (H, W), nowhere below a twentieth of its mean."""
    y, x = ((2.0 * np.arange(n) + 1.0) / n - 1.0 for n in shape)
    values = np.maximum(legendre.leggrid2d(y, x, np.array(coefficients)), 0.05).astype(np.float32)
    values.setflags(write=False)
    return values


def coarse(plane: NDArray) -> Plane:
    """A plane (H, W) as (128, 128) means over equal parts, whose borders may cut pixels."""
    means = plane.astype(np.float64)
    for _ in range(2):  # each axis in turn; no matrix product, so the same on any number of threads
        total = np.concatenate([np.zeros((1, means.shape[1])), np.cumsum(means, axis=0)])
        at = np.linspace(0.0, len(means), COARSE + 1)
        whole = np.minimum(at.astype(np.int64), len(means) - 1)
        ends = total[whole] + (at - whole)[:, None] * means[whole]
        means = (np.diff(ends, axis=0) * (COARSE / len(means))).T
    return means.astype(np.float32)


def background_level(plane: NDArray) -> float:
    """Level between the cells of a field: a low percentile of means of 8 x 8 pixels, which noise does not lower."""
    return float(np.percentile(ndimage.uniform_filter(plane, 8)[::4, ::4], LOWEST))


def fit_flat(stack: Plane, degree: int) -> Surface:
    """Fit the light of one channel to coarse fields, their dark level subtracted.

    In each tile of the field, the median over fields of log(foreground pixel / its field's median) is the log of the
    light there.  The polynomial is fitted to tiles by their foreground, with Huber's weights, and its coefficients are
    drawn to 0 as far as tiles scatter: few fields give a flatter field, not a wild one.

    Args:
        stack: (F, 128, 128) of ``coarse``.
        degree: greatest total degree of the polynomial; 0: no correction.

    Returns:
        Coefficients; ``EVEN`` where too little is to be seen.
    """
    orders = np.array([(i, j) for i in range(degree + 1) for j in range(degree + 1 - i)])
    at = (2.0 * np.arange(TILES) + 1.0) / TILES - 1.0
    basis = legendre.legvander(at, degree)
    design = np.stack([np.outer(basis[:, i], basis[:, j]).ravel() for i, j in orders], axis=1)
    light: Surface = EVEN
    for _ in range(3 if degree else 0):  # what is foreground depends on the light
        even = stack / surface(light, stack.shape[1:])
        bright = even - np.percentile(even, LOWEST)
        sample = np.log1p(np.maximum(bright[:, ::2, ::2], 0.0))
        if sample.max() <= 0.0:
            return EVEN
        inside = bright > np.expm1(filters.threshold_otsu(sample))
        ratio = _tiles(np.stack([_log_ratio(e, i) for e, i in zip(even, inside, strict=True)]))
        number = np.isfinite(ratio).sum(axis=1)
        seen = number >= 8
        if seen.sum() < TILES * TILES // 2:
            return EVEN
        step = np.nanmedian(ratio[seen], axis=1)
        target = surface(light, (TILES, TILES)).ravel()[seen] * np.exp(step - np.average(step, weights=number[seen]))
        weight = np.sqrt(number[seen] / number[seen].mean())
        fitted = _ridge(design[seen], target, weight, orders.sum(axis=1) / PRIOR)
        grid = np.zeros((degree + 1, degree + 1))
        grid[tuple(orders.T)] = fitted / fitted[0]
        light = tuple(tuple(row) for row in grid.tolist())
    return light


def _log_ratio(even: Plane, inside: NDArray[np.bool_]) -> Plane:
    """Log of the foreground over its median in one field; NaN elsewhere."""
    if inside.sum() < 20:
        return np.full_like(even, np.nan)
    ratio = np.log(np.maximum(even, 1e-6) / np.maximum(np.median(even[inside]), 1e-6))
    return np.where(inside, ratio, np.nan).astype(np.float32)


def _tiles(stack: Plane) -> Plane:
    """The pixels of each tile, (TILES^2, F * pixels of a tile)."""
    side = COARSE // TILES
    parts = stack.reshape(len(stack), TILES, side, TILES, side)
    return np.moveaxis(parts, 0, 2).transpose(0, 3, 1, 2, 4).reshape(TILES * TILES, -1)


def _ridge(design: NDArray, target: NDArray, weight: NDArray, prior: NDArray) -> NDArray[np.float64]:
    """Robust weighted least squares with penalties ``prior`` (1 / standard deviation) in units of the scatter."""
    scatter, trust = 0.05, np.ones(len(target))
    left = max(0.3, 1.0 - design.shape[1] / len(target))  # share of the degrees of freedom that the fit leaves
    for _ in range(5):
        w = weight * np.sqrt(trust)
        rows = np.concatenate([design * w[:, None], np.diag(scatter * prior)])
        fitted = np.linalg.lstsq(rows, np.concatenate([target * w, np.zeros(len(prior))]), rcond=None)[0]
        residual = np.abs(weight * (target - design @ fitted))
        scatter = 1.4826 * float(np.median(residual))
        trust = 1.0 / np.maximum(1.0, residual / max(1.5 * scatter, 1e-12))
        scatter /= math.sqrt(left)
    return fitted


class Camera:
    """Finds the value at which a camera is full, from the pixels of many fields."""

    def __init__(self) -> None:
        self.at: Counter[float] = Counter()  # pixels at the greatest value of their field
        self.below: Counter[float] = Counter()  # and within a tenth below it
        self.step, self.kind = 0, np.dtype(np.float32)

    def see(self, field: NDArray) -> None:
        """Take note of a field of any shape."""
        self.kind, top = field.dtype, field.max()
        near = field[field >= 0.9 * top]
        full = int((near == top).sum())
        self.at[float(top)] += full
        self.below[float(top)] += near.size - full
        if self.kind.kind == "u":
            self.step = int(np.gcd(self.step, int(np.gcd.reduce(field[::7, ::7].ravel()))))

    def ceiling(self) -> float:
        """The greatest value if pixels pile up there; else the greatest of an integer type, in the steps it takes."""
        top, whole = max(self.at), self.kind.kind == "u"
        step = max(self.step, 1) if whole else top / 1000.0
        usual = self.below[top] / (0.1 * top / step) if top > 0 else math.inf  # pixels at each value just below
        if self.at[top] >= TRACE and self.at[top] > 5.0 * usual:
            return top
        return float(np.iinfo(self.kind.name).max // step * step) if whole else math.inf
