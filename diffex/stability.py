"""Are the directions the same when trained again?

Directions of two trainings come in any order and with any sign, so they are matched one to one by the assignment that
makes the sum of |cosine| largest.  What is compared are *profiles* (K, P), one row for each direction, in a space that
the trainings share: mean feature shifts, mean change maps, effects on the same images.  Codes of two autoencoders have
no common axes and can't be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.optimize import linear_sum_assignment

from diffex.errors import UserError
from diffex.statistics import bootstrap_interval

Floats = NDArray[np.floating]


@dataclass(frozen=True)
class Matching:
    """A one-to-one matching of K and L directions.

    Attributes:
        pairs: (min(K, L), 2) indices (k, l), k ascending.
        values: (min(K, L),) signed similarity of each pair.
        signs: (min(K, L),) -1 where the second direction goes the other way, else 1.
    """

    pairs: NDArray[np.int64]
    values: Floats

    @property
    def signs(self) -> Floats:
        return np.where(self.values < 0, -1.0, 1.0)


def match(similarity: ArrayLike) -> Matching:
    """Match directions one to one so that the sum of |similarity| is largest (the sign of a direction is arbitrary).

    Args:
        similarity: (K, L), signed, larger in magnitude for directions that are more alike.

    Raises:
        UserError: not a finite matrix.

    Source: Kuhn, Naval Research Logistics 1955, solved as in Crouse, IEEE TAES 2016 (scipy).
    """
    values = np.asarray(similarity, float)
    if values.ndim != 2 or not np.isfinite(values).all():
        raise UserError(f"similarity of shape {values.shape}: give a matrix (K, L) of finite numbers")
    k, other = linear_sum_assignment(np.abs(values), maximize=True)
    return Matching(np.stack([k, other], axis=1).astype(np.int64), values[k, other])


def cosine_similarity(a: ArrayLike, b: ArrayLike) -> Floats:
    """Signed cosines of the rows of a (K, P) with those of b (L, P): (K, L); 0 with a row of zeros.

    Raises:
        UserError: not two finite matrices with the same number of columns.
    """
    x, y = np.asarray(a, float), np.asarray(b, float)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise UserError(f"profiles of shapes {x.shape} and {y.shape}: give matrices with the same columns")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError("profiles hold nan or infinite values: leave those columns out, in all trainings")
    return np.clip(_unit(x) @ _unit(y).T, -1.0, 1.0)


@dataclass(frozen=True)
class Agreement:
    """How far trainings from different seeds agree on their directions.

    Attributes:
        mean: mean over all pairs of seeds of the mean |cosine| of matched directions, 0 to 1.
        low, high: interval of ``mean``.
        interval: what the interval speaks of: 'seeds' (three or more) or 'directions' (two seeds, one pair: nothing is
            known of other seeds, so it only says how much the mean hangs on single directions).
        per_direction: (K,) for each direction of the reference seed, mean |cosine| with its partners in the others.
        pairs: (S, S) agreement of each pair of seeds; 1 on the diagonal.
        seeds: S.
    """

    mean: float
    low: float
    high: float
    interval: str
    per_direction: Floats
    pairs: Floats
    seeds: int


def agreement(
    profiles: Sequence[ArrayLike], *, reference: int = 0, confidence: float = 0.95, draws: int = 1000, seed: int = 0
) -> Agreement:
    """Agreement of the directions of S trainings that differ in their seed only, over all pairs of them.

    Where two seeds have different numbers of directions, those without a partner count as 0: what one training found
    and another did not is a disagreement.

    Interval: the S (S - 1) / 2 pairs share seeds, so they are no sample; seeds are.  With three or more, the jackknife
    leaves one seed out at a time (all its pairs) and takes Student's t with S - 1 degrees of freedom, the usual
    interval of a mean over pairs; it is cut to [0, 1].  Resampling seeds with replacement would pair a seed with
    itself, an agreement of 1 by construction.  With two seeds, matched directions are resampled instead.

    Args:
        profiles: S of (K_s, P), in the same order of the P columns.
        reference: the seed whose directions ``per_direction`` tells of, as an index into ``profiles``.
        confidence: of the interval.
        draws, seed: of the resampling of directions.

    Raises:
        UserError: fewer than two seeds, one without directions, columns that differ, or no such reference.

    Source: Arvesen, Annals of Mathematical Statistics 1969 (jackknife of U-statistics).
    """
    rows = [np.asarray(p, float) for p in profiles]
    if len(rows) < 2:
        raise UserError(f"{len(rows)} seed: agreement needs two or more trainings")
    if not 0 <= reference < len(rows):
        raise UserError(f"reference is {reference}: give the index of one of the {len(rows)} seeds, from 0")
    if any(r.ndim != 2 or not len(r) for r in rows):
        raise UserError(f"profiles of shapes {', '.join(str(r.shape) for r in rows)}: give (directions, columns) each")
    s = len(rows)
    pairs = np.eye(s)
    partner = np.zeros((s, len(rows[reference])))
    for i, j in combinations(range(s), 2):
        found = match(cosine_similarity(rows[i], rows[j]))
        size = np.abs(found.values)
        pairs[i, j] = pairs[j, i] = size.sum() / max(len(rows[i]), len(rows[j]))
        if reference in (i, j):
            partner[j if reference == i else i, found.pairs[:, 0 if reference == i else 1]] = size
    mean = float(pairs[np.triu_indices(s, 1)].mean())
    if s == 2:
        alone = np.zeros(max(len(r) for r in rows))
        alone[: len(size)] = size
        low, high = bootstrap_interval(alone, np.arange(len(alone)), confidence=confidence, draws=draws, seed=seed)
    else:
        low, high = _jackknife_interval(pairs, confidence)
    per_direction = partner.sum(axis=0) / (s - 1)
    return Agreement(mean, low, high, "directions" if s == 2 else "seeds", per_direction, pairs, s)


@dataclass(frozen=True)
class Chance:
    """Agreement of random directions: mean, and the interval in which it falls with the confidence asked for."""

    mean: float
    low: float
    high: float


def chance(
    num_directions: Sequence[int], rank: int, *, confidence: float = 0.95, draws: int = 1000, seed: int = 0
) -> Chance:
    """The agreement that sets of random unit vectors reach after matching: what ``agreement(...).mean`` must exceed.

    Matching looks for likeness and finds some anywhere: in few dimensions, and with many directions, much.

    Args:
        num_directions: of each seed, as long as ``profiles`` there.
        rank: dimension of the space in which directions could differ.  Not the number of columns P where these are
            correlated, as features are: then about ``metrics.effective_rank`` of many random directions' profiles.
            Where each training has such profiles, ``agreement`` of them is the sharper null.
        confidence: of the interval.
        draws, seed: of the simulation.

    Raises:
        UserError: fewer than two seeds, a seed without directions, or a rank below 1.
    """
    if len(num_directions) < 2 or min(num_directions) < 1:
        raise UserError(f"num_directions is {list(num_directions)}: give 1 or more for each of two or more seeds")
    if rank < 1:
        raise UserError(f"rank is {rank}: give 1 or more")
    rng = np.random.default_rng(seed)
    ends = np.cumsum(num_directions)
    found = np.zeros(draws)
    for d in range(draws):
        # One product holds the cosines of all pairs of seeds.
        unit = _unit(rng.standard_normal((int(ends[-1]), rank)))
        cosine = np.abs(unit @ unit.T)
        values = []
        for i, j in combinations(range(len(ends)), 2):
            block = cosine[ends[i] - num_directions[i] : ends[i], ends[j] - num_directions[j] : ends[j]]
            values.append(block[linear_sum_assignment(block, maximize=True)].sum() / max(block.shape))
        found[d] = np.mean(values)
    tail = (1 - confidence) / 2
    low, high = np.quantile(found, [tail, 1 - tail])
    return Chance(float(found.mean()), float(low), float(high))


def _unit(rows: Floats) -> Floats:
    """Rows of length 1; those of zeros stay."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1.0)


def _jackknife_interval(pairs: Floats, confidence: float) -> tuple[float, float]:
    """Interval of the mean over pairs of seeds, (S, S) with S of 3 or more, leaving one seed out at a time."""
    s = len(pairs)
    total = pairs - np.diag(np.diag(pairs))
    mean = total.sum() / (s * (s - 1))
    without = (total.sum() - 2 * total.sum(axis=1)) / ((s - 1) * (s - 2))
    error = np.sqrt((s - 1) / s * ((without - without.mean()) ** 2).sum())
    half = float(stats.t.ppf(0.5 + confidence / 2, s - 1)) * error
    return max(0.0, float(mean - half)), min(1.0, float(mean + half))
