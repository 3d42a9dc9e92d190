"""What happens on the way from a cell to its counterfactual: verdicts and pictures step by step.

``trajectory_table`` judges rendered images; the measures below it only read arrays (n images, A lengths, the first of
them 0).  A good path goes evenly and straight, and the classifier's verdict rises along it without turning back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffex import metrics
from diffex.classifier import FrozenClassifier
from diffex.explain import Distance

Floats = NDArray[np.floating]


def trajectory_table(
    images: Tensor, alphas: Sequence[float], rows: Tensor, judges: Mapping[str, FrozenClassifier], perceptual: Distance
) -> pa.Table:
    """Verdicts and distances along rendered trajectories.

    Args:
        images: (A, B, C, H, W) of ``render_trajectory``, the first at length 0.
        alphas: the A lengths.
        rows: (B,) of the store.
        judges: name -> classifier, each asked for its verdict.
        perceptual: distance of two batches of images, (B,).

    Returns:
        A * B rows: ``row, step, alpha``, ``<judge>:<class>`` probabilities, ``step_distance`` (perceptual, to the step
        before), ``distance``, ``ssim`` and ``l1`` (to the start).
    """
    count, b = images.shape[:2]
    flat = images.flatten(0, 1)
    start, before = images[:1].expand_as(images).flatten(0, 1), torch.cat([images[:1], images[:-1]]).flatten(0, 1)
    columns: dict[str, object] = {
        "row": rows.repeat(count).cpu().numpy(), "step": np.repeat(np.arange(count), b),
        "alpha": np.repeat(np.asarray(alphas, np.float32), b),
        "step_distance": perceptual(before, flat).cpu().numpy(), "distance": perceptual(start, flat).cpu().numpy(),
        "ssim": metrics.ssim(start, flat).cpu().numpy(),
        "l1": ((flat - start) / 2).abs().flatten(1).mean(dim=1).cpu().numpy(),
    }  # fmt: skip
    for name, judge in judges.items():
        probs = judge.probabilities(flat).cpu().numpy()
        columns |= {f"{name}:{c}": probs[:, j] for j, c in enumerate(judge.class_names)}
    return pa.table(columns)


@dataclass(frozen=True)
class Smoothness:
    """Shape of the paths of n images, each a mean over images.

    Attributes:
        evenness: mean over largest length of consecutive steps: 1 where all steps are equal, 1 / (A - 1) where
            everything happens at once.
        detour: sum of the steps' lengths over the length from start to end: 1 for a straight path, inf for one that
            ends where it starts.
        monotonic: share of steps at which p(target) does not fall by more than 0.02.
        curvature: mean absolute second difference of p(target) over the steps: 0 for a straight rise, 2 where the
            verdict jumps to and fro at every step.
    """

    evenness: Floats
    detour: Floats
    monotonic: Floats
    curvature: Floats


def smoothness(p_target: Floats, step_distance: Floats, distance: Floats) -> Smoothness:
    """Measures of each image's path.

    Args:
        p_target: (n, A) probability of the target class, from the start.
        step_distance: (n, A - 1) perceptual distances of consecutive steps; they are squares (LPIPS's formula), so
            lengths are their roots.
        distance: (n,) perceptual distance of start and end.
    """
    steps, distance = np.sqrt(np.asarray(step_distance, float)), np.sqrt(np.asarray(distance, float))
    largest = np.maximum(steps.max(axis=1), 1e-12)
    rise = np.diff(np.asarray(p_target, float), axis=1)
    bend = np.abs(np.diff(rise, axis=1)).mean(axis=1) if rise.shape[1] > 1 else np.zeros(len(rise))
    total = steps.sum(axis=1)
    return Smoothness(
        evenness=np.where(total > 0, steps.mean(axis=1) / largest, 1.0),
        detour=np.divide(total, distance, out=np.where(total > 0, np.inf, 1.0), where=distance > 0),
        monotonic=(rise >= -0.02).mean(axis=1), curvature=bend,
    )  # fmt: skip


def flip_area(flipped: NDArray[np.bool_], alphas: Floats) -> Floats:
    """Area under each image's flip curve over alpha, as a share of the whole length, (n,): 1 where it flips at once.

    Args:
        flipped: (n, A) whether the step is classified as target.
        alphas: (A,) lengths, ascending from 0.
    """
    a = np.abs(np.asarray(alphas, float))
    return np.trapezoid(flipped.astype(float), a, axis=1) / (a[-1] - a[0])


def smallest_flip(p_target: Floats, flipped: NDArray[np.bool_], alphas: Floats) -> Floats:
    """Smallest length at which each image flips, (n,), NaN where none does.

    Between the last step that has not flipped and the first that has, the probability is taken to rise linearly, and
    the flip to lie at one half (where the step has more than that, else at the step).
    """
    a, p = np.abs(np.asarray(alphas, float)), np.asarray(p_target, float)
    found = np.full(len(p), np.nan)
    for i in np.flatnonzero(flipped.any(axis=1)):
        j = int(flipped[i].argmax())
        if j == 0:
            found[i] = a[0]
        elif p[i, j] > 0.5 >= p[i, j - 1]:
            found[i] = a[j - 1] + (a[j] - a[j - 1]) * (0.5 - p[i, j - 1]) / (p[i, j] - p[i, j - 1])
        else:
            found[i] = a[j]
    return found
