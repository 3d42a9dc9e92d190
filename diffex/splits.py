"""Training, validation and test part: whole groups (wells, plates, donors, ...) go to one part, never single crops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from diffex.errors import UserError, did_you_mean

PARTS = ("train", "valid", "test")

GROUPS = (
    ("Plate", "Well"),
    ("Well",),
    ("Donor",),
    ("Patient",),
    ("Subject",),
    ("Movie",),
    ("Tile",),
    ("Slide",),
    ("Field",),
)
"""Metadata columns that 'auto' looks for, in this order: the first that is there keeps its groups in one part."""

ROUNDS, MANY = 10, 5_000  # so often is each group tried elsewhere, where groups are not so many that it does not matter


def full_name(name: str) -> str:
    """``well`` or ``Metadata_Well`` as the column is called: ``Metadata_Well``."""
    return name if name.startswith("Metadata_") else f"Metadata_{name[:1].upper()}{name[1:]}"


def find_columns(names: Sequence[str], available: Iterable[str], source: str, setting: str) -> tuple[str, ...]:
    """Full names of metadata columns that were named in any case, with or without prefix.

    Raises:
        UserError: no such column; the message names the nearest, the source and the setting.
    """
    lower = {name.removeprefix("Metadata_").lower(): name for name in available if name.startswith("Metadata_")}
    missing = [n for n in names if n.removeprefix("Metadata_").lower() not in lower]
    if missing:
        raise UserError(f"{setting}: {source} has no column {missing[0]!r}: {did_you_mean(missing[0], lower)}")
    return tuple(lower[n.removeprefix("Metadata_").lower()] for n in names)


def split_columns(by: Sequence[str], available: Iterable[str], source: str, setting: str) -> tuple[str, ...]:
    """Columns whose groups stay together; ``by = ("auto",)`` takes the first of ``GROUPS`` that is there.

    Args:
        by: what the setting says; empty: every image is a group of its own.
        available: names of the source's columns.
        source, setting: for messages.

    Raises:
        UserError: a column that is not there.
    """
    if tuple(by) != ("auto",):
        return find_columns(by, available, source, setting)
    there = {name.removeprefix("Metadata_").lower() for name in available if name.startswith("Metadata_")}
    found = next((names for names in GROUPS if all(n.lower() in there for n in names)), ())
    return find_columns(found, available, source, setting)


def group_ids(columns: Mapping[str, NDArray]) -> NDArray[np.int64]:
    """Number of each row's group, (N,) int64: rows that agree in every column share it."""
    keys = ["\x1f".join(map(str, key)) for key in zip(*columns.values(), strict=True)]
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def split(
    groups: NDArray[np.int64], classes: NDArray[np.int64], *, valid_fraction: float, test_fraction: float, seed: int
) -> NDArray[np.int64]:
    """Part of each row, (N,) indices into ``PARTS``.

    Whole groups go, the largest first and else in random order, where their classes are short of rows and of groups: a
    part with all rows of a class in one well would say nothing of other wells.  Then single groups move as long as that
    brings the parts nearer to their shares.

    Args:
        groups: number of each row's group, (N,).
        classes: number of each row's class, (N,).
        valid_fraction, test_fraction: shares of every class that validation and test should get.
        seed: of the order.
    """
    counts = np.zeros((groups.max() + 1, classes.max() + 1))
    np.add.at(counts, (groups, classes), 1)
    order = np.random.default_rng([seed, 1]).permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    weights = np.concatenate([counts, counts > 0], axis=1)  # rows of each class, and groups
    share = np.array([1 - valid_fraction - test_fraction, valid_fraction, test_fraction])
    target = share[:, None] * weights.sum(axis=0)
    filled = np.zeros_like(target)
    part_of = np.zeros(len(counts), np.int64)
    for g in order:
        mine = weights[g] > 0
        part_of[g] = int((1.0 - filled[:, mine] / target[:, mine]).sum(axis=1).argmax())
        filled[part_of[g]] += weights[g]

    def cost(parts: NDArray) -> NDArray:
        """How far parts are from their shares, (...,); a class that a part lacks costs most."""
        return (((parts - target) / target) ** 2 + 10.0 * (parts == 0)).sum(axis=(-2, -1))

    moves = np.eye(len(PARTS))[:, :, None]  # [to, part, 1]
    for g in np.tile(order, ROUNDS) if len(order) <= MANY else ():
        rest = filled - moves[part_of[g]] * weights[g]
        tried = rest + moves * weights[g]
        costs = cost(tried)
        best = int(costs.argmin())
        if costs[best] < costs[part_of[g]] - 1e-9:
            part_of[g], filled = best, tried[best]
    return part_of[groups]


def unsplit_class(
    parts: NDArray[np.int64], groups: NDArray[np.int64], classes: NDArray[np.int64]
) -> tuple[int, int] | None:
    """The first class that a part has none of, and how many groups it has; None where every part has every class."""
    for c in range(int(classes.max()) + 1):
        mine = classes == c
        if len(np.unique(parts[mine])) < len(PARTS):
            return c, len(np.unique(groups[mine]))
    return None


def unit_noun(by: Sequence[str], count: int = 2) -> str:
    """What a group is called, in the middle of a sentence: 'well', 'donor', 'image', or 'wells' of several."""
    noun = by[-1].removeprefix("Metadata_").lower() if by else "image"
    return noun if count == 1 else f"{noun}s"


def unit_name(by: Sequence[str]) -> str:
    """What the groups are called: 'Plate and Well', or 'image' where every image is its own."""
    return " and ".join(n.removeprefix("Metadata_") for n in by) or "image"
