"""Stage 3, below the table: which directions move the classifier, how surely, and against what null.

Pure functions from the effects table to tables and numbers; nothing here renders.  For N images and K directions the
table was rendered once; the published search re-renders every round.

    effect_{i,k,s} = p_target(edit of i along direction k with sign s) - p_target(reconstruction of i)
    round m        (k, s)_m = argmax mean over unexplained images of effect; images with effect >= that mean (or a
                   given threshold) are explained and leave; stops when nothing helps, or no image is left

Source: Lang et al., "StylEx", ICCV 2021 (AttFind); Bourou et al., arXiv 2502.09663, section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffex import statistics
from diffex.errors import UserError

SIGNS = (1.0, -1.0)


MEASURES = ("ssim", "l1", "length_z", "changed", "perceptual", "lpips", "l1_cell", "l1_outside")


@dataclass(frozen=True)
class Judgement:
    """What another classifier says of the edits: ``effect``, ``flips`` and ``eligible`` as in ``EffectArrays``."""

    effect: NDArray[np.float64]
    flips: NDArray[np.bool_]
    eligible: NDArray[np.bool_]


@dataclass(frozen=True)
class EffectArrays:
    """The edits of one source class towards one target class at the reference length, as arrays.

    Attributes:
        rows: (N,) images, as rows of the store.
        groups: (N,) their statistical units.
        effect: (N, K, 2) change of p(target), for + and - of each direction.
        flips: (N, K, 2) whether the edit is classified as target.
        eligible: (N,) whether the reconstruction is *not* yet classified as target: only those can flip.
        before: (N,) p(target) of the reconstruction.
        judges: name -> the same questions to another classifier.
        change: (N, K, 2, P) signed change maps.
        shifts: (N, K, 2, F) measured factor shifts, F = 0 without a measure.
        factors: names of the F factors.
        alpha: (N,) reference length of each image.
        extra: name -> (N, K, 2) of the other measures (ssim, l1, length_z, changed, perceptual, ...).
    """

    rows: NDArray[np.int64]
    groups: NDArray[np.int64]
    effect: NDArray[np.float64]
    flips: NDArray[np.bool_]
    eligible: NDArray[np.bool_]
    change: NDArray[np.float32]
    shifts: NDArray[np.float32]
    factors: tuple[str, ...]
    alpha: NDArray[np.float64]
    before: NDArray[np.float64]
    judges: dict[str, Judgement]
    extra: dict[str, NDArray[np.float64]]


def classes_of(table: pa.Table) -> tuple[str, ...]:
    """Class names, in the order of the table's probability columns."""
    return tuple(n.removeprefix("p_edit:") for n in table.column_names if n.startswith("p_edit:"))


def arrays(table: pa.Table, kind: str, source: str, target: str) -> EffectArrays:
    """Cut the reference edits of one kind out of the effects table.

    Args:
        table: effects table with columns ``class_name`` and ``group`` joined to it.
        kind: 'learned', 'random' or a baseline; those two go one way only, so their axis of signs has length 1.
        source, target: class names.

    Raises:
        UserError: no such class, or no edit of that kind and source in the table.
    """
    names = classes_of(table)
    for name in (source, target):
        if name not in names:
            raise UserError(f"the effects table has no class {name!r}: it has {', '.join(names)}")
    column = {
        n: table[n].to_numpy(zero_copy_only=False)
        for n in ("row", "kind", "direction", "alpha", "reference", "class_name", "group")
    }
    keep = (column["kind"] == kind) & column["reference"].astype(bool) & (column["class_name"] == source)
    if not keep.any():
        raise UserError(f"the effects table holds no {kind} edits of class {source!r}")
    part = table.filter(pa.array(keep))
    row, first = np.unique(column["row"][keep], return_index=True)
    i = np.searchsorted(row, column["row"][keep])
    k = column["direction"][keep].astype(int)
    s = (column["alpha"][keep] < 0).astype(int)
    n, num, signs = len(row), int(k.max()) + 1, int(s.max()) + 1

    def dense(values: NDArray, dtype: type = np.float64) -> NDArray:
        out = np.full((n, num, signs, *values.shape[1:]), np.nan if dtype != np.bool_ else False, dtype)
        out[i, k, s] = values
        return out

    def number(name: str) -> NDArray:
        return np.asarray(part[name].to_numpy(zero_copy_only=False), np.float64)

    t = names.index(target)

    def judged(judge: str) -> tuple[NDArray, Judgement]:
        edit = np.stack([number(f"{judge}_edit:{c}") for c in names], axis=1)
        before = np.stack([number(f"{judge}_reconstruction:{c}") for c in names], axis=1)
        flips = dense(edit.argmax(axis=1) == t, np.bool_)
        return before[first, t], Judgement(dense(edit[:, t] - before[:, t]), flips, before.argmax(axis=1)[first] != t)

    others = (n.partition("_edit:")[0] for n in table.column_names if "_edit:" in n)
    start, own = judged("p")
    maps = part["change"].combine_chunks()
    change = np.asarray(maps.flatten()).reshape(len(part), -1)
    factors = tuple(n_.removeprefix("shift:") for n_ in table.column_names if n_.startswith("shift:"))
    shifts = np.stack([number(f"shift:{f}") for f in factors], axis=1) if factors else np.zeros((len(part), 0))
    return EffectArrays(
        rows=row, groups=column["group"][keep][first].astype(np.int64), effect=own.effect, flips=own.flips,
        eligible=own.eligible, before=start,
        judges={judge: judged(judge)[1] for judge in dict.fromkeys(others) if judge != "p"},
        change=dense(change, np.float32), shifts=dense(shifts, np.float32), factors=factors,
        alpha=np.abs(column["alpha"][keep][first]),
        extra={m: dense(number(m)) for m in MEASURES if m in table.column_names},
    )  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """One choice of the greedy search: direction, index into ``SIGNS``, mean effect over images then unexplained."""

    direction: int
    sign: int
    effect: float
    unexplained: int


def greedy_selection(
    effect: NDArray[np.floating], top: int, explained_at: float | None = None
) -> tuple[list[Selection], NDArray[np.int64]]:
    """AttFind's choice of directions, on a table of effects that is already there.

    Args:
        effect: (N, K, S) change of p(target) for each image, direction and sign.
        top: at most so many directions, M.
        explained_at: effect from which a direction explains an image; None: its mean effect in that round.

    Returns:
        The choices in order (fewer than M where no direction is left, none has a positive effect, or every image is
        explained) and the images that stay unexplained.
    """
    effect = np.asarray(effect, np.float64)
    alive = np.ones(len(effect), bool)
    free = np.ones(effect.shape[1], bool)
    chosen: list[Selection] = []
    while len(chosen) < top and alive.any() and free.any():
        mean = np.where(free[:, None], effect[alive].mean(axis=0), -np.inf)
        k, s = np.unravel_index(int(mean.argmax()), mean.shape)
        if mean[k, s] <= 0:
            break
        chosen.append(Selection(int(k), int(s), float(mean[k, s]), int(alive.sum())))
        free[k] = False
        alive &= effect[:, k, s] < (mean[k, s] if explained_at is None else explained_at)
    return chosen, np.flatnonzero(alive)


def rank(
    table: pa.Table, source: str, target: str, *, order: str = "greedy", top: int = 5,
    explained_at: float | None = None, confidence: float = 0.95, draws: int = 1000, seed: int = 0,
) -> pa.Table:  # fmt: skip
    """Rank the learned directions by how much they move the classifier from ``source`` towards ``target``.

    All at the reference length: no longer than the class-mean difference; each direction with the sign that helps more.

    Args:
        table: effects table.
        source, target: class names.
        order: 'effect' ranks by mean effect over all images.  'greedy' is AttFind's: each direction is the best one on
            the images that the earlier ones do not explain, however few; then the others by mean effect.
        top, explained_at: of the greedy choice.
        confidence, draws, seed: of the intervals.

    Returns:
        One row per learned direction: ``rank, direction, sign, chosen_by``; ``n`` images and ``units``; mean ``effect``
        with interval (units resampled); ``flip_rate`` among images that can flip, with interval; the null:
        ``null_effect``, ``null_flip_rate`` (mean over random directions) and ``null_flip_max`` (the best of them);
        ``excess`` of the effect over the null with interval, and ``p_value`` (sign flips of units, one-sided, not
        adjusted for the number of directions); mean ``ssim``, ``l1`` and ``length_z`` of the edits, and ``alpha``.
    """
    a = arrays(table, "learned", source, target)
    null = null_arrays(table, source, target)
    greedy = greedy_selection(a.effect, top, explained_at)[0] if order == "greedy" else []
    ranked = [(g.direction, g.sign, "greedy") for g in greedy]
    taken = {k for k, _, _ in ranked}
    mean = a.effect.mean(axis=0)
    rest = [k for k in range(a.effect.shape[1]) if k not in taken]
    rest.sort(key=lambda k: -mean[k].max())
    ranked += [(k, int(mean[k].argmax()), "mean effect") for k in rest]
    rows = [
        {"rank": m + 1, "direction": k, "sign": SIGNS[s], "chosen_by": by, "source": source, "target": target,
         **_statistics(a, a.effect[:, k, s], a.flips[:, k, s], null, confidence, draws, seed),
         **{name: float(values[:, k, s].mean()) for name, values in a.extra.items()}}
        for m, (k, s, by) in enumerate(ranked)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def null_arrays(table: pa.Table, source: str, target: str) -> EffectArrays:
    """The random directions' edits."""
    return arrays(table, "random", source, target)


def baseline(table: pa.Table, kind: str, source: str, target: str, *, confidence: float = 0.95, draws: int = 1000,
             seed: int = 0) -> dict[str, Any]:  # fmt: skip
    """Statistics, as in ``rank``, of the best direction of a baseline (chosen by mean effect)."""
    a = arrays(table, kind, source, target)
    k = int(a.effect[:, :, 0].mean(axis=0).argmax())
    null = null_arrays(table, source, target)
    return {"kind": kind, "direction": k, "source": source, "target": target,
            **_statistics(a, a.effect[:, k, 0], a.flips[:, k, 0], null, confidence, draws, seed),
            **{name: float(values[:, k, 0].mean()) for name, values in a.extra.items()}}  # fmt: skip


def _statistics(
    a: EffectArrays, effect: NDArray, flips: NDArray, null: EffectArrays, confidence: float, draws: int, seed: int
) -> dict[str, Any]:
    can = a.eligible
    interval: dict[str, Any] = {"confidence": confidence, "draws": draws, "seed": seed}
    low, high = statistics.bootstrap_interval(effect, a.groups, **interval)
    flip_low, flip_high = statistics.bootstrap_interval(flips[can].astype(float), a.groups[can], **interval)
    null_effect = null.effect[:, :, 0].mean(axis=1)
    null_flips = null.flips[null.eligible][:, :, 0]
    excess = effect - null_effect
    excess_low, excess_high = statistics.bootstrap_interval(excess, a.groups, **interval)
    return {
        "n": len(effect), "units": len(np.unique(a.groups)), "alpha": float(a.alpha.mean()),
        "effect": float(effect.mean()), "effect_low": low, "effect_high": high,
        "flip_n": int(can.sum()), "flip_rate": float(flips[can].mean()) if can.any() else float("nan"),
        "flip_low": flip_low, "flip_high": flip_high,
        "null_effect": float(null_effect.mean()),
        "null_flip_rate": float(null_flips.mean()) if null_flips.size else float("nan"),
        "null_flip_max": float(null_flips.mean(axis=0).max()) if null_flips.size else float("nan"),
        "excess": float(excess.mean()), "excess_low": excess_low, "excess_high": excess_high,
        "p_value": statistics.sign_flip_p_value(excess, a.groups, seed=seed),
    }  # fmt: skip


def flip_curve(table: pa.Table, direction: int, source: str, target: str) -> tuple[NDArray, NDArray]:
    """Signed alphas (A,), ascending, and the share of images classified as target at each, (A,)."""
    names = classes_of(table)
    kind, k, cls = (table[n].to_numpy(zero_copy_only=False) for n in ("kind", "direction", "class_name"))
    part = table.filter(pa.array((kind == "learned") & (k == direction) & (cls == source)))
    alpha = np.round(part["alpha"].to_numpy(zero_copy_only=False).astype(float), 4)
    p = np.stack([part[f"p_edit:{c}"].to_numpy(zero_copy_only=False) for c in names], axis=1)
    said = p.argmax(axis=1) == names.index(target)
    grid = np.unique(alpha)
    return grid, np.array([said[alpha == g].mean() for g in grid])


def transition_matrix(table: pa.Table, pairs: Sequence[tuple[str, str]]) -> pa.Table:
    """For every (source, target): the best learned direction and sign by mean effect, its effect and flip rate."""
    rows = []
    for source, target in pairs:
        a = arrays(table, "learned", source, target)
        mean = a.effect.mean(axis=0)
        k, s = np.unravel_index(int(mean.argmax()), mean.shape)
        can = a.eligible
        rows.append({
            "source": source, "target": target, "direction": int(k), "sign": SIGNS[int(s)], "effect": float(mean[k, s]),
            "flip_rate": float(a.flips[can][:, k, s].mean()) if can.any() else float("nan"), "n": len(a.rows),
        })  # fmt: skip
    return pa.Table.from_pylist(rows)
