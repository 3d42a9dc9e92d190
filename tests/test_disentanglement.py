"""Disentanglement: published toy cases, and a perfect, a useless and a duplicated representation for every score."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import mutual_info_score

from diffex.disentanglement import (
    completeness_of,
    dci,
    disentanglement_of,
    effect_correlation,
    mutual_information_gap,
    profile_overlap,
    recovery,
    sap,
    selectivity,
)
from diffex.errors import UserError

WELLS = np.repeat(np.arange(40), 50)


def levels(seed: int = 0, num: int = 10, n: int = 2000) -> NDArray:
    """Independent factors of ten levels each, as disentanglement_lib's tests have them."""
    return np.random.default_rng(seed).integers(0, 10, (n, num)).astype(float)


def normal(seed: int = 0, num: int = 5, n: int = 2000) -> NDArray:
    return np.random.default_rng(seed).standard_normal((n, num))


# ----------------------------------------------------------------------------------------------------------------------
# Concentration of importance: the cases of disentanglement_lib's own tests

DIAGONAL = 5 * np.eye(5)


@pytest.mark.parametrize(
    ("importance", "disentangled", "complete"),
    [
        (DIAGONAL, 1.0, 1.0),
        (DIAGONAL[:, ::-1], 1.0, 1.0),
        (np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), 1.0, 1.0),
        (np.zeros((10, 10)), 0.0, 0.0),
        (np.ones((4, 6)), 0.0, 0.0),
        (np.vstack([DIAGONAL, DIAGONAL]), 1.0, 1 - np.log(2) / np.log(10)),
        (np.hstack([DIAGONAL, DIAGONAL]), 1 - np.log(2) / np.log(10), 1.0),
        (DIAGONAL[:2], 1.0, 1.0),
    ],
    ids=[
        "one-hot",
        "any order",
        "unused code",
        "nothing",
        "all equal",
        "redundant codes",
        "entangled",
        "missed factors",
    ],
)
def test_published_toy_cases(importance: NDArray, disentangled: float, complete: float) -> None:
    assert disentanglement_of(importance) == pytest.approx(disentangled, abs=1e-12)
    assert completeness_of(importance) == pytest.approx(complete, abs=1e-12)


def test_disentanglement_is_the_weighted_entropy_of_the_paper() -> None:
    importance = np.random.default_rng(0).gamma(0.5, size=(6, 4))
    by_hand = sum(r.sum() / importance.sum() * (1 - stats.entropy(r / r.sum(), base=4)) for r in importance)
    assert disentanglement_of(importance) == pytest.approx(by_hand)
    assert completeness_of(importance) == pytest.approx(disentanglement_of(importance.T))


def test_a_faint_row_hardly_counts() -> None:
    assert disentanglement_of([[1.0, 0.0], [1e-9, 1e-9]]) == pytest.approx(1.0, abs=1e-6)


def test_the_unit_of_importance_does_not_matter() -> None:
    importance = np.random.default_rng(0).gamma(0.5, size=(6, 4))
    assert disentanglement_of(7 * importance) == pytest.approx(disentanglement_of(importance))


def test_a_single_factor_leaves_nothing_to_keep_apart() -> None:
    assert np.isnan(disentanglement_of([[1.0], [2.0]]))
    assert np.isnan(completeness_of([[1.0, 2.0]]))


@pytest.mark.parametrize("bad", [np.ones(3), np.array([[np.nan, 1.0]]), np.array([[-1.0, 1.0]])])
def test_importance_that_is_none_is_refused(bad: NDArray) -> None:
    with pytest.raises(UserError, match="importance"):
        disentanglement_of(bad)


# ----------------------------------------------------------------------------------------------------------------------
# Mutual information gap


def test_a_code_for_each_factor_has_the_whole_gap() -> None:
    mean, each = mutual_information_gap(levels(), levels())
    assert 0.97 < mean <= 1.0
    assert (each > 0.97).all()


def test_a_perfect_code_among_constant_ones_has_a_gap_of_one() -> None:
    f = levels(num=1)
    assert mutual_information_gap(np.hstack([f, 0 * f, 0 * f]), f)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("make", [levels, normal])
def test_a_code_given_twice_has_no_gap(make: Callable[..., NDArray]) -> None:
    f = make()
    assert mutual_information_gap(np.hstack([f, f]), f)[0] == pytest.approx(0.0, abs=1e-12)


def test_noise_and_constants_have_no_gap() -> None:
    assert mutual_information_gap(levels(1), levels(0))[0] < 0.02
    assert mutual_information_gap(np.zeros((2000, 3)), levels())[0] == 0.0


def test_the_gap_is_that_of_disentanglement_lib() -> None:
    """Its bins and its sums, with scikit-learn's mutual information."""
    f, noise = levels(num=4), normal(1, num=6)
    codes = f @ np.random.default_rng(2).standard_normal((4, 6)) + noise
    cut = np.stack([np.digitize(c, np.histogram(c, 20)[1][:-1]) for c in codes.T])
    told = np.sort([[mutual_info_score(y, c) for y in f.T] for c in cut], axis=0)
    by_hand = (told[-1] - told[-2]) / [mutual_info_score(y, y) for y in f.T]
    mean, each = mutual_information_gap(codes, f)
    assert each == pytest.approx(by_hand)
    assert mean == pytest.approx(by_hand.mean())


def test_continuous_factors_are_cut_like_codes_and_discrete_ones_are_not() -> None:
    f = normal(num=1)
    assert mutual_information_gap(f, f)[0] == pytest.approx(1.0)
    far = np.where(levels(num=1) == 9, 1e9, levels(num=1))
    told = float(stats.entropy([0.1, 0.9]) / np.log(10))
    assert mutual_information_gap(far == 1e9, far)[0] == pytest.approx(told, abs=0.03), "nine values are not told apart"
    assert mutual_information_gap(far, levels(num=1))[0] < 0.2, "a code with outliers is cut coarsely"


def test_a_factor_that_does_not_vary_is_left_out() -> None:
    f = np.hstack([levels(num=2), np.ones((2000, 1))])
    for score in (mutual_information_gap, sap):
        mean, each = score(f, f)
        assert np.isnan(each[2])
        assert mean == pytest.approx(each[:2].mean())
        assert np.isnan(score(f, f[:, 2:])[0])


# ----------------------------------------------------------------------------------------------------------------------
# Separated attribute predictability


@pytest.mark.parametrize("make", [levels, normal])
def test_separated_codes_are_predictable_from_one_each(make: Callable[..., NDArray]) -> None:
    f = make()
    assert 0.98 < sap(-3 * f + 1, f)[0] <= 1.0
    assert sap(np.hstack([f, -2 * f]), f)[0] == pytest.approx(0.0, abs=1e-12)
    assert sap(make(1), f)[0] < 0.01
    assert sap(np.zeros_like(f), f)[0] == 0.0


def test_predictability_is_the_gap_of_squared_correlations() -> None:
    f = normal(num=3)
    codes = f @ normal(1, num=4, n=3) + normal(2, num=4)
    r2 = np.sort([[stats.pearsonr(c, y).statistic ** 2 for y in f.T] for c in codes.T], axis=0)
    mean, each = sap(codes, f)
    assert each == pytest.approx(r2[-1] - r2[-2])
    assert mean == pytest.approx(each.mean())


def test_a_single_code_has_nothing_beside_it() -> None:
    f = normal(num=1)
    assert sap(f, f)[0] == pytest.approx(1.0)
    assert mutual_information_gap(f, f)[0] == pytest.approx(1.0)


# ----------------------------------------------------------------------------------------------------------------------
# DCI


@pytest.mark.parametrize("make", [levels, normal])
def test_a_code_for_each_factor_is_disentangled_complete_and_informative(make: Callable[..., NDArray]) -> None:
    f = make(num=4)
    found = dci(f[:, ::-1], f, groups=WELLS)
    assert found.disentanglement > 0.98
    assert found.completeness > 0.98
    assert found.informativeness > 0.98
    assert (found.importance.argmax(axis=0) == [3, 2, 1, 0]).all()


def test_shuffled_codes_are_none_of_it() -> None:
    """disentanglement_lib's bad case: each image's codes are its factors in random order."""
    f = levels(num=6)
    found = dci(np.random.default_rng(1).permuted(f, axis=1), f, groups=WELLS)
    assert found.disentanglement < 0.2
    assert found.completeness < 0.2
    assert found.informativeness < 0.2


def test_noise_tells_nothing_of_units_that_were_not_fitted() -> None:
    found = dci(normal(1), normal(0), groups=WELLS)
    assert found.disentanglement < 0.05
    assert found.completeness < 0.05
    assert -0.2 < found.informativeness < 0.02


def test_codes_given_twice_are_disentangled_but_half_complete() -> None:
    f = levels(num=5)
    found = dci(np.hstack([f, f]), f, groups=WELLS)
    assert found.disentanglement > 0.95
    assert found.completeness == pytest.approx(1 - np.log(2) / np.log(10), abs=0.05)
    assert found.informativeness > 0.98


def test_rotated_codes_are_informative_but_entangled() -> None:
    f = normal(num=4)
    found = dci(f @ np.linalg.qr(normal(3, num=4, n=4))[0], f, groups=WELLS)
    assert found.informativeness > 0.8
    assert found.disentanglement < 0.6


def test_a_code_that_only_knows_its_wells_is_not_informative() -> None:
    """Wells are held out whole: that a code tells them apart does not tell the factor of other wells."""
    well = np.random.default_rng(0).standard_normal((2, 40))
    codes, f = well[0][WELLS][:, None], well[1][WELLS][:, None]
    assert dci(codes, f, groups=WELLS).informativeness < 0.1
    assert dci(codes, f, groups=np.arange(2000)).informativeness > 0.7


def test_a_factor_that_the_codes_miss_shows_in_its_r2() -> None:
    f = normal(num=3)
    found = dci(f[:, :2], f, groups=WELLS)
    assert (found.r2[:2] > 0.98).all()
    assert found.r2[2] < 0.02
    assert found.importance.sum(axis=0) == pytest.approx(np.ones(3))


def test_constant_factors_have_no_r2_and_no_importance() -> None:
    f = np.hstack([normal(num=2), np.full((2000, 1), 0.1)])
    found = dci(f, f, groups=WELLS)
    assert np.isnan(found.r2[2])
    assert (found.importance[:, 2] == 0).all()
    assert found.informativeness == pytest.approx(found.r2[:2].mean())
    assert found.disentanglement > 0.98


def test_the_same_seed_gives_the_same_numbers() -> None:
    codes, f, wells = normal(1, num=2, n=200), normal(0, num=2, n=200), np.repeat(np.arange(10), 20)
    a, b, c = (dci(codes, f, groups=wells, seed=s) for s in (0, 0, 1))
    assert (a.importance == b.importance).all()
    assert (a.importance != c.importance).any()


def test_codes_that_cannot_be_compared_are_refused() -> None:
    f = normal(n=20)
    for codes in (f[:19], f[:, 0], np.where(f > 2, np.nan, f) + np.nan, f[:, :0]):
        for score in (mutual_information_gap, sap, lambda a, b: dci(a, b, groups=np.arange(20))):
            with pytest.raises(UserError, match="codes"):
                score(codes, f)
    with pytest.raises(UserError, match="1 unit"):
        dci(f, f, groups=np.zeros(20))
    with pytest.raises(UserError, match="groups has shape"):
        dci(f, f, groups=np.zeros(7))
    with pytest.raises(UserError, match="bins"):
        mutual_information_gap(f, f, bins=1)


# ----------------------------------------------------------------------------------------------------------------------
# Recovery of planted factors

FACTORS, PLANTED = ("a", "b", "c", "d"), ("a", "b")


def test_directions_that_each_move_one_factor_recover_all() -> None:
    found = recovery([[2.0, 0.1, 0.0, 0.0], [0.0, -1.5, 0.2, 0.0]], FACTORS, PLANTED)
    assert found.moved == found.recovered == found.recovered_once == ["a", "b"]
    assert found.decoy_hits == 0
    assert found.precision == found.recall == 1.0
    assert found.owner == {"a": [0], "b": [1]}


def test_a_direction_that_moves_everything_at_once_recovers_one() -> None:
    found = recovery([[2.0, 1.5, 0.1, 0.0]], FACTORS, PLANTED)
    assert found.moved == ["a", "b"]
    assert found.recovered == ["a"]
    assert found.recall == 0.5


def test_directions_that_move_decoys_recover_nothing() -> None:
    found = recovery([[0.6, 0.0, 3.0, 0.0], [0.0, 0.9, 0.0, -1.0]], FACTORS, PLANTED)
    assert found.moved == found.recovered == []
    assert found.decoy_hits == 2
    assert found.precision == found.recall == 0.0
    assert found.owner == {"c": [0], "d": [1]}


def test_precision_counts_strong_directions_only() -> None:
    found = recovery([[2.0, 0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0.4], [0.6, 0, 0, 0]], FACTORS, PLANTED)
    assert found.precision == pytest.approx(2 / 3)
    assert found.recall == 0.5


def test_changes_that_are_too_small_count_as_none() -> None:
    found = recovery([[0.4, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.45]], FACTORS, PLANTED)
    assert found.moved == found.recovered == []
    assert (found.decoy_hits, found.recall, found.owner) == (0, 0.0, {})
    assert np.isnan(found.precision)
    assert recovery([[0.4, 0.1, 0.0, 0.0]], FACTORS, PLANTED, least=0.4).recovered == ["a"]


def test_two_directions_of_one_factor_recover_it_but_not_once() -> None:
    found = recovery([[2.0, 0, 0, 0], [-3.0, 0, 0, 0], [0, 1.0, 0, 0]], FACTORS, PLANTED)
    assert found.recovered == ["a", "b"]
    assert found.recovered_once == ["b"]
    assert found.owner == {"a": [0, 1], "b": [2]}


def test_without_planted_factors_there_is_nothing_to_recover() -> None:
    found = recovery([[2.0, 0, 0, 0]], FACTORS, ())
    assert found.moved == found.recovered == []
    assert (found.decoy_hits, found.precision) == (1, 0.0)
    assert np.isnan(found.recall)


@pytest.mark.parametrize(("m", "factors"), [(3, ()), (0, FACTORS)])
def test_without_measured_factors_or_directions_nothing_is_found(m: int, factors: tuple[str, ...]) -> None:
    found = recovery(np.zeros((m, len(factors))), factors, ())
    assert (found.moved, found.recovered, found.decoy_hits, found.owner) == ([], [], 0, {})
    assert np.isnan([found.precision, found.recall]).all()


def test_a_change_that_was_not_measured_counts_as_none() -> None:
    found = recovery([[np.nan, 1.0, 0.0, 0.0], [np.nan] * 4], FACTORS, PLANTED)
    assert found.owner == {"b": [0]}


def test_shifts_of_other_factors_are_refused() -> None:
    with pytest.raises(UserError, match="4 factors"):
        recovery(np.zeros((2, 3)), FACTORS, PLANTED)
    with pytest.raises(UserError, match="did you mean 'spots'"):
        recovery(np.zeros((2, 2)), ("spots", "size"), ("spot",))
    with pytest.raises(UserError, match="least"):
        recovery(np.zeros((2, 4)), FACTORS, PLANTED, least=0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Directions against each other


def test_directions_that_flip_their_own_images_are_not_correlated() -> None:
    assert effect_correlation(normal(num=4))[0] < 0.05


def test_copies_are_fully_correlated_whatever_their_sign_and_size() -> None:
    one = normal(num=1, n=50)
    mean, r = effect_correlation(np.hstack([one, -one, 3 * one + 1]))
    assert mean == pytest.approx(1.0)
    assert r == pytest.approx(np.array([[1, -1, 1], [-1, 1, -1], [1, -1, 1]]))


def test_effect_correlation_is_that_of_numpy() -> None:
    effects = normal(num=5, n=30)
    mean, r = effect_correlation(effects)
    assert r == pytest.approx(np.corrcoef(effects.T))
    assert mean == pytest.approx(np.abs(np.corrcoef(effects.T)[np.triu_indices(5, 1)]).mean())


def test_a_direction_without_effect_is_neither_like_nor_unlike_others() -> None:
    """Counted as 0 it would make a set of dead directions the best of all."""
    effects = normal(num=2, n=30)
    mean, r = effect_correlation(np.hstack([effects, np.full((30, 1), 0.1)]))
    assert mean == pytest.approx(effect_correlation(effects)[0])
    assert np.isnan(r[2]).all()
    assert np.isnan(effect_correlation(np.zeros((30, 3)))[0])
    assert np.isnan(effect_correlation(effects[:, :1])[0])
    assert np.isnan(effect_correlation(effects[:0])[0])


def test_images_without_an_effect_are_left_out() -> None:
    effects = normal(num=3, n=30)
    hurt = np.vstack([effects, [np.nan, 9.0, 9.0]])
    assert effect_correlation(hurt)[0] == effect_correlation(effects)[0]


def test_profiles_of_different_features_do_not_overlap() -> None:
    assert profile_overlap(np.diag([1.0, 2.0, -3.0])) == 0.0


def test_parallel_profiles_overlap_whatever_their_sign_and_size() -> None:
    assert profile_overlap(np.outer([1.0, -2.0, 0.1], [3.0, 1.0])) == pytest.approx(1.0)


def test_profile_overlap_is_the_mean_cosine_over_pairs() -> None:
    assert profile_overlap([[1.0, 0.0], [0.6, -0.8], [0.0, 2.0]]) == pytest.approx((0.6 + 0.0 + 0.8) / 3)


@pytest.mark.parametrize("num", [4, 8, 60])
def test_random_profiles_overlap_by_chance(num: int) -> None:
    assert profile_overlap(normal(num=num, n=300)) == pytest.approx((2 / (np.pi * num)) ** 0.5, rel=0.08)


def test_profiles_without_change_are_left_out() -> None:
    assert profile_overlap([[1.0, 0.0], [0.6, -0.8], [0.0, 0.0]]) == pytest.approx(0.6)
    assert np.isnan(profile_overlap(np.zeros((3, 4))))
    assert np.isnan(profile_overlap(np.ones((1, 4))))


def test_selectivity_counts_every_direction_alike() -> None:
    """A large entangled direction outweighs small pure ones in DCI's score, not here."""
    pure, mixed = np.array([0.0, 1.0, 0.0, 0.0]), np.array([9.0, 9.0, 9.0, 9.0])
    assert selectivity([pure, pure[::-1]]) == pytest.approx(1.0)
    assert selectivity([mixed]) == pytest.approx(0.0)
    assert selectivity([pure, mixed]) == pytest.approx(0.5)
    assert disentanglement_of([pure, mixed]) < 0.1
    assert selectivity([pure, pure]) == selectivity([pure])
    assert np.isnan(selectivity(np.zeros((0, 4))))
