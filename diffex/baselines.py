"""Directions that need no training: the measure of what the learned ones add.

Every function returns a ``DirectionSet`` of fixed directions in the same subspace, which ``explain`` takes like the
learned ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffex.directions import DirectionSet, Subspace


def class_means(v: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean coordinates of each class, (n_classes, r), from coordinates v (N, r) and labels (N,)."""
    return torch.stack([v[labels == c].mean(dim=0) for c in range(num_classes)])


def class_mean_difference(
    v: Tensor, labels: Tensor, pairs: Sequence[tuple[int, int]], subspace: Subspace
) -> DirectionSet:
    """For each (source, target) pair of classes the difference of their mean codes."""
    means = class_means(v, labels, int(labels.max()) + 1)
    return DirectionSet.fixed(torch.stack([means[t] - means[s] for s, t in pairs]), subspace)


def linear_classifier(v: Tensor, labels: Tensor, pairs: Sequence[tuple[int, int]], subspace: Subspace) -> DirectionSet:
    """For each pair the normal of the linear discriminant of the two classes (Fisher; ridge of 1e-3)."""
    vectors = []
    for s, t in pairs:
        a, b = v[labels == s], v[labels == t]
        within = torch.cov(torch.cat([a - a.mean(0), b - b.mean(0)]).T)
        within = within + 1e-3 * torch.eye(len(within), device=v.device)
        vectors.append(torch.linalg.solve(within, b.mean(0) - a.mean(0)))
    return DirectionSet.fixed(torch.stack(vectors), subspace)


def principal(subspace: Subspace, num: int) -> DirectionSet:
    """The first ``num`` axes of the subspace: principal components where it is whitened."""
    return DirectionSet.fixed(torch.eye(subspace.rank, device=subspace.mean.device)[:num], subspace)


def random(subspace: Subspace, num: int, seed: int) -> DirectionSet:
    """``num`` directions drawn uniformly from the sphere of the subspace: the null."""
    vectors = torch.randn(num, subspace.rank, generator=torch.Generator().manual_seed(seed))
    return DirectionSet.fixed(vectors.to(subspace.mean.device), subspace)
