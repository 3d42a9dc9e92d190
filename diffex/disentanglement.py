"""Does each code, or each direction, stand for one thing?  Arrays in, numbers out.

Three questions, by what is known.  *With factors of every image*: ``mutual_information_gap``, ``dci`` and ``sap``
compare codes (N, K) with factors (N, F).  *With planted factors*: ``recovery`` asks which of them the directions move.
*Without truth*: ``effect_correlation`` and ``profile_overlap`` ask whether directions do the same (with
``metrics.mean_overlap`` and ``metrics.effective_rank``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr

from diffex.errors import UserError, did_you_mean

Floats = NDArray[np.floating]

# ----------------------------------------------------------------------------------------------------------------------
# Codes against the factors of every image


def mutual_information_gap(codes: ArrayLike, factors: ArrayLike, *, bins: int = 20) -> tuple[float, Floats]:
    """How much more the best code tells of a factor than the second best, as a share of the factor's entropy.

    Codes are cut into ``bins`` bins of equal width between their extremes, as disentanglement_lib does, so outliers
    coarsen them.  So are factors with more than ``bins`` different values (continuous ones; the published score knows
    discrete ones only); others are taken as they are, their order and spacing without meaning.

    Args:
        codes: (N, K).  With one code the second best is taken to tell nothing.
        factors: (N, F), continuous or discrete.
        bins: 2 or more.

    Returns:
        Mean over the factors that vary, and the gap of each factor (F,), 0 to 1: 1 where one code alone tells all of
        it, 0 where none does or two do alike; nan for a factor that does not vary.

    Raises:
        UserError: not two finite matrices of N rows, or too few bins.

    Source: Chen et al., "Isolating sources of disentanglement", NeurIPS 2018, equation 6; bins of Locatello et al.,
    ICML 2019.
    """
    codes, factors = _paired(codes, factors)
    if bins < 2:
        raise UserError(f"bins is {bins}: give 2 or more")
    a = [_binned(c, bins) for c in codes.T]
    b = [_binned(f, bins, keep_discrete=True) for f in factors.T]
    told = np.array([[_mutual_information(x, y) for y in b] for x in a]).reshape(len(a), len(b))
    entropy = np.array([entr(np.bincount(y) / len(y)).sum() for y in b])
    with np.errstate(invalid="ignore"):
        gap = np.where(entropy > 0, _gap(told) / entropy, np.nan)
    return _mean(gap), gap


def sap(codes: ArrayLike, factors: ArrayLike) -> tuple[float, Floats]:
    """Separated attribute predictability: R2 of a factor from the best single code less that from the second best.

    A line is fitted, so R2 is the squared correlation: the published score of *continuous* factors, used here for all.
    It suits 0/1 and ordered factors too, but not categories without order (there the paper fits a classifier).

    Args:
        codes: (N, K).  A constant code has R2 = 0; with one code the second best has.
        factors: (N, F).

    Returns:
        Mean over the factors that vary, and the gap of each factor (F,), 0 to 1; nan for a factor that does not vary.

    Raises:
        UserError: not two finite matrices of N rows.

    Source: Kumar et al., "Variational inference of disentangled latent concepts", ICLR 2018, section 3.
    """
    codes, factors = _paired(codes, factors)
    r = np.clip(_standardised(codes).T @ _standardised(factors), -1.0, 1.0)
    gap = np.where(np.ptp(factors, axis=0) > 0, _gap(np.nan_to_num(r) ** 2), np.nan)
    return _mean(gap), gap


@dataclass(frozen=True)
class DCI:
    """Disentanglement, completeness and informativeness of codes.

    Attributes:
        disentanglement: 0 to 1: 1 where each code matters to one factor only.
        completeness: 0 to 1: 1 where one code alone matters to each factor.
        informativeness: mean of ``r2`` over the factors that vary; 1 at most, 0 or below where the codes tell nothing.
        importance: (K, F) of code k to factor f; each column sums to 1, or is 0 where the trees found nothing to split.
        r2: (F,) share of each factor's variance that all codes together predict on units not fitted; nan for one that
            does not vary.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance: Floats
    r2: Floats


def dci(codes: ArrayLike, factors: ArrayLike, *, groups: ArrayLike, seed: int = 0) -> DCI:
    """Disentanglement, completeness and informativeness, from gradient-boosted regression trees.

    For each factor 50 trees of depth 3 are fitted to the codes on one half of the units and predict the other, and the
    other way round; importances (share of the squared error that splits on a code remove) are the mean of both fits.
    Regression takes 0/1 and ordered factors as numbers; categories without order need a column each.  As importances
    sum to 1 for every factor, one that the codes do not tell weighs as much as one they do: read ``r2`` beside them.

    Args:
        codes: (N, K).
        factors: (N, F).
        groups: (N,) statistical unit (well) of each row; a unit is never in both halves.
        seed: of the halves and of the trees (equally good codes are split on by turns).

    Raises:
        UserError: not two finite matrices of N rows, or fewer than two units.

    Source: Eastwood & Williams, "A framework for the quantitative evaluation of disentangled representations", ICLR
    2018, with R2 for their error; trees as in Locatello et al., ICML 2019.
    """
    # Slow to import, and most of what imports this module never fits a tree.
    from sklearn.ensemble import GradientBoostingRegressor

    codes, factors = _paired(codes, factors)
    unit = np.asarray(groups)
    if unit.shape != (len(codes),):
        raise UserError(f"groups has shape {unit.shape}: give one unit for each of the {len(codes)} rows of codes")
    names, index = np.unique(unit, return_inverse=True)
    if len(names) < 2:
        raise UserError(f"{len(names)} unit in groups: two or more are needed, to predict units that were not fitted")
    half = (np.random.default_rng(seed).permutation(len(names)) % 2)[index]
    importance, predicted = np.zeros((codes.shape[1], factors.shape[1])), np.zeros_like(factors)
    for f, y in enumerate(factors.T):
        for fit in (0, 1):
            trees = GradientBoostingRegressor(n_estimators=50, max_depth=3, random_state=seed)
            trees.fit(codes[half == fit], y[half == fit])
            importance[:, f] += trees.feature_importances_ / 2
            predicted[half != fit, f] = trees.predict(codes[half != fit])
    spread = ((factors - factors.mean(axis=0)) ** 2).sum(axis=0)
    varies = np.ptp(factors, axis=0) > 0
    r2 = np.where(varies, 1 - ((factors - predicted) ** 2).sum(axis=0) / np.where(varies, spread, 1), np.nan)
    return DCI(disentanglement_of(importance), completeness_of(importance), _mean(r2), importance, r2)


def disentanglement_of(importance: ArrayLike) -> float:
    """How far each row (code, direction) keeps to one column (factor): sum_k w_k (1 - H(row k) / log F).

    H is the entropy of the row's shares, and w_k the share of row k in the sum of the matrix.

    Args:
        importance: (K, F), 0 or more; importances, or magnitudes of effects in units that can be compared between
            factors (population standard deviations).

    Returns:
        0 (all rows spread evenly, or nothing but zeros) to 1; nan with fewer than two factors, where there is nothing
        to keep apart.

    Raises:
        UserError: not a matrix of finite numbers of 0 or more.

    Source: Eastwood & Williams, ICLR 2018, section 2.
    """
    return _concentration(_magnitudes(importance))


def selectivity(effects: ArrayLike) -> float:
    """How far the directions keep to one factor each, every direction counting alike: mean of 1 - H(row) / log F.

    H is the entropy of the shares of the *squares*: what a direction hardly moves hardly counts.

    Args:
        effects: (K, F), magnitudes of effects, as of ``disentanglement_of``, whose rows count by their size.

    Returns:
        0 to 1; nan without a direction.
    """
    rows = _magnitudes(effects) if np.size(effects) else np.zeros((0, 1))
    return float(np.mean([disentanglement_of(row[None] ** 2) for row in rows])) if len(rows) else float("nan")


def completeness_of(importance: ArrayLike) -> float:
    """How far each column (factor) keeps to one row (code, direction): ``disentanglement_of`` the transpose, base K.

    Args, Returns, Raises: as there; nan with fewer than two rows.

    Source: Eastwood & Williams, ICLR 2018, section 2.
    """
    return _concentration(_magnitudes(importance).T)


# ----------------------------------------------------------------------------------------------------------------------
# Directions against planted factors


@dataclass(frozen=True)
class Recovery:
    """Planted factors that directions move.  A direction is strong where its largest change is large enough.

    Attributes:
        moved: those that some direction moves enough, and more than any decoy.
        recovered: those that are the *largest* change of some strong direction (a direction stands for one factor).
        recovered_once: those that are so of exactly one direction: neither missed nor found twice.
        decoy_hits: number of strong directions whose largest change is a decoy.
        precision: strong directions whose largest change is planted / strong directions; nan where none is strong.
        recall: recovered / planted; nan where nothing is planted.
        owner: for each factor, planted or not, that is the largest change of a strong direction: those directions.
    """

    moved: list[str]
    recovered: list[str]
    recovered_once: list[str]
    decoy_hits: int
    precision: float
    recall: float
    owner: dict[str, list[int]]


def recovery(shifts: ArrayLike, factors: Sequence[str], planted: Sequence[str], *, least: float = 0.5) -> Recovery:
    """Which planted factors the directions move, on the simulated assay.

    Args:
        shifts: (M, F) mean change of each measured factor along each direction, in population standard deviations;
            nan (not measured) counts as no change.
        factors: names of the F factors.
        planted: those of them that a treatment moves; the rest are decoys.
        least: a change below this many standard deviations counts as none; more than 0.

    Raises:
        UserError: shifts that do not fit the factors, a planted factor that is not among them, or no such ``least``.
    """
    if least <= 0:
        raise UserError(f"least is {least}: give more than 0, in standard deviations")
    size = np.abs(np.nan_to_num(np.asarray(shifts, float)))
    if size.ndim != 2 or size.shape[1] != len(factors):
        raise UserError(f"shifts has shape {size.shape}: give one column for each of the {len(factors)} factors")
    for f in planted:
        if f not in factors:
            raise UserError(f"planted factor {f!r} is not measured: {did_you_mean(f, factors)}")
    is_planted = np.array([f in planted for f in factors], bool)
    decoy = size[:, ~is_planted].max(axis=1, initial=0.0)
    strong = np.flatnonzero(size.max(axis=1, initial=0.0) >= least)
    largest = {int(m): int(size[m].argmax()) for m in strong}
    owner = {f: own for j, f in enumerate(factors) if (own := [m for m, best in largest.items() if best == j])}
    moved = [f for j, f in enumerate(factors) if is_planted[j] and ((size[:, j] >= least) & (size[:, j] > decoy)).any()]
    recovered = [f for f in owner if f in planted]
    hits = sum(len(own) for f, own in owner.items() if f not in planted)
    return Recovery(
        moved=moved, recovered=recovered, recovered_once=[f for f in recovered if len(owner[f]) == 1], decoy_hits=hits,
        precision=1 - hits / len(strong) if len(strong) else float("nan"),
        recall=len(recovered) / int(is_planted.sum()) if is_planted.any() else float("nan"), owner=owner,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Directions against each other


def effect_correlation(effects: ArrayLike) -> tuple[float, Floats]:
    """Pearson correlation, over images, of the directions' effects on the classifier.

    Directions that flip the same images are correlated, even where they change other pixels.

    Args:
        effects: (N, K) change of the target's probability; images with a nan are left out.

    Returns:
        Mean |r| of different directions, 0 (each its own images) to 1 (all the same), and the matrix r (K, K).  A
        direction with the same effect on all images has no correlation: nan in the matrix, left out of the mean, which
        is nan where no pair is left.

    Raises:
        UserError: not a matrix.
    """
    values = np.asarray(effects, float)
    if values.ndim != 2:
        raise UserError(f"effects has shape {values.shape}: give (images, directions)")
    z = _standardised(values[np.isfinite(values).all(axis=1)])
    r = np.clip(z.T @ z, -1.0, 1.0)
    return _mean(np.abs(r[~np.eye(len(r), dtype=bool)])), r


def profile_overlap(profiles: ArrayLike) -> float:
    """Mean |cosine| of the mean feature shifts of different directions: whether they look different to a measure.

    Args:
        profiles: (K, F) mean change of each feature along each direction, in population standard deviations.

    Returns:
        0 (orthogonal) to 1 (parallel, whatever the sign).  Random directions have about sqrt(2 / (pi F)) where the
        features are independent.  A direction that changes nothing has no cosine and is left out; nan without a pair.

    Raises:
        UserError: not a finite matrix.
    """
    rows = _matrix("profiles", profiles)
    norm = np.linalg.norm(rows, axis=1)
    unit = rows[norm > 0] / norm[norm > 0, None]
    return _mean(np.minimum(np.abs(unit @ unit.T)[~np.eye(len(unit), dtype=bool)], 1.0))


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def _matrix(name: str, values: ArrayLike) -> Floats:
    out = np.asarray(values, float)
    if out.ndim != 2:
        raise UserError(f"{name} has shape {out.shape}: give a matrix")
    if not np.isfinite(out).all():
        raise UserError(f"{name} holds nan or infinite values: leave those rows out")
    return out


def _magnitudes(importance: ArrayLike) -> Floats:
    out = _matrix("importance", importance)
    if (out < 0).any():
        raise UserError("importance holds values below 0: give magnitudes")
    return out


def _paired(codes: ArrayLike, factors: ArrayLike) -> tuple[Floats, Floats]:
    a, b = _matrix("codes", codes), _matrix("factors", factors)
    if len(a) != len(b) or not a.size or not b.size:
        raise UserError(f"codes of shape {a.shape} and factors of shape {b.shape}: give both for the same images")
    return a, b


def _binned(values: Floats, bins: int, *, keep_discrete: bool = False) -> NDArray[np.int64]:
    """Indices of bins from 0; of the values themselves where they are discrete and stay so."""
    distinct, index = np.unique(values, return_inverse=True)
    if keep_discrete and len(distinct) <= bins:
        return index.astype(np.int64)
    return np.digitize(values, np.histogram_bin_edges(values, bins)[1:-1]).astype(np.int64)


def _mutual_information(a: NDArray[np.int64], b: NDArray[np.int64]) -> float:
    """Mutual information in nats of two index arrays (N,): H(a) + H(b) - H(a, b)."""
    counts = (np.bincount(a), np.bincount(b), np.bincount(a * (int(b.max()) + 1) + b))
    h_a, h_b, h_ab = (float(entr(c / len(a)).sum()) for c in counts)
    return max(h_a + h_b - h_ab, 0.0)


def _gap(score: Floats) -> Floats:
    """Largest less second largest of each column (K, F) to (F,); the second is 0 where K = 1."""
    ordered = np.sort(np.vstack([score, np.zeros_like(score[:1])]) if len(score) < 2 else score, axis=0)
    return np.asarray(ordered[-1] - ordered[-2])


def _standardised(values: Floats) -> Floats:
    """Columns (N, K) of mean 0 and length 1, so that products are correlations; nan for constant ones."""
    if not len(values):
        return np.full((1, values.shape[1]), np.nan)
    centred = values - values.mean(axis=0)
    # The mean of equal values can be off by rounding: what is constant is told by the values themselves.
    length = np.where(np.ptp(values, axis=0) > 0, np.linalg.norm(centred, axis=0), np.nan)
    return centred / length


def _concentration(rows: Floats) -> float:
    """Mean of 1 - entropy / log(columns) over rows, weighted by their sums."""
    if rows.shape[1] < 2:
        return float("nan")
    total = rows.sum(axis=1)
    if not total.any():
        return 0.0
    share = rows[total > 0] / total[total > 0, None]
    kept = 1 - entr(share).sum(axis=1) / np.log(rows.shape[1])
    return float(np.clip(np.average(kept, weights=total[total > 0]), 0.0, 1.0))


def _mean(values: Floats) -> float:
    """Mean of the values that are not nan; nan where none is left."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
