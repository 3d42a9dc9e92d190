"""Intervals that cover, and p-values that mean what they say: each against scipy, or against its own definition."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from diffex.statistics import (
    adjusted,
    best_of_sphere_p_value,
    bootstrap_interval,
    class_contrast,
    mean_test,
    plate_test,
    sign_flip_p_value,
    unit_means,
    unit_sums,
    wilson_interval,
)

# ----------------------------------------------------------------------------------------------------------------------
# Intervals


def screen(seed: int, wells: int = 12, cells: int = 8, mean: float = 0.0) -> tuple[NDArray, NDArray]:
    """Measurements whose wells differ as much as their cells."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(wells), cells)
    return mean + rng.standard_normal(wells)[groups] + rng.standard_normal(len(groups)), groups


def test_the_bootstrap_interval_covers_the_truth_as_often_as_it_says() -> None:
    """A percentile interval from 12 units is a little narrow: 85 to 99 % pass for 95 %."""
    covered = [low <= 0 <= high for low, high in (bootstrap_interval(*screen(s), draws=300) for s in range(400))]
    assert 0.85 <= np.mean(covered) <= 0.99


def test_taking_images_for_units_would_cover_far_less() -> None:
    """What the resampling of whole units is for."""
    covered = []
    for seed in range(400):
        values, _ = screen(seed)
        low, high = bootstrap_interval(values, np.arange(len(values)), draws=300)
        covered.append(low <= 0 <= high)
    assert np.mean(covered) < 0.75


def test_units_of_different_size_weigh_by_their_images() -> None:
    groups = np.array([0] * 90 + [1] * 5 + [2] * 5)
    values = np.where(groups == 0, 1.0, 0.0)
    low, high = bootstrap_interval(values, groups)
    assert low == 0.0
    assert high == 1.0
    many = np.repeat(np.arange(40), 10)
    low, high = bootstrap_interval((many % 4 == 0).astype(float), many)
    assert low < 0.25 < high


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.99])
def test_a_surer_interval_is_wider(confidence: float) -> None:
    values, groups = screen(0)
    low, high = bootstrap_interval(values, groups, confidence=confidence)
    wider = bootstrap_interval(values, groups, confidence=(1 + confidence) / 2)
    assert wider[0] < low < values.mean() < high < wider[1]


def test_the_interval_is_that_of_its_seed() -> None:
    values, groups = screen(0)
    assert bootstrap_interval(values, groups, seed=1) == bootstrap_interval(values, groups, seed=1)
    assert bootstrap_interval(values, groups, seed=1) != bootstrap_interval(values, groups, seed=2)


def test_the_names_of_units_do_not_matter() -> None:
    values, groups = screen(0)
    assert bootstrap_interval(values, groups) == bootstrap_interval(values, 1000 + 7 * groups)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_none_is_not_certainty(share: float) -> None:
    """Twenty of twenty wells: the interval is Wilson's, at the number of wells."""
    found = bootstrap_interval(np.full(60, share), np.repeat(np.arange(20), 3))
    assert found == wilson_interval(share, 20)
    assert found[1] - found[0] > 0.1


def test_one_unit_or_none_tells_nothing_of_the_spread() -> None:
    assert np.isnan(bootstrap_interval(np.array([0.3, 0.4]), np.zeros(2))).all()
    assert np.isnan(bootstrap_interval(np.zeros(0), np.zeros(0))).all()


@pytest.mark.parametrize(
    ("count", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_are_the_published_ones(count: int, n: int, low: float, high: float) -> None:
    """Newcombe, Statistics in Medicine 1998, table I, method 3."""
    assert wilson_interval(count / n, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_intervals_stay_between_nothing_and_all() -> None:
    for n in (1, 3, 1000):
        for share in (0.0, 1.0):
            low, high = wilson_interval(share, n, confidence=0.999)
            assert 0.0 <= low < high <= 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Permutation test


def test_p_values_without_effect_are_about_uniform() -> None:
    p = np.array([sign_flip_p_value(*screen(s), draws=400) for s in range(400)])
    for level in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(p <= level) == pytest.approx(level, abs=0.06)


def test_p_values_of_an_effect_are_small_and_of_its_opposite_large() -> None:
    values, groups = screen(0, mean=3.0)
    assert sign_flip_p_value(values, groups) < 0.002
    assert sign_flip_p_value(-values, groups) > 0.99


def test_taking_images_for_units_would_find_effects_that_are_not_there() -> None:
    found = [sign_flip_p_value(screen(s)[0], np.arange(96), draws=400) <= 0.05 for s in range(200)]
    assert np.mean(found) > 0.12


def test_a_p_value_is_never_smaller_than_the_draws_can_tell() -> None:
    values, groups = screen(0, wells=40, mean=9.0)
    assert sign_flip_p_value(values, groups, draws=99) == pytest.approx(0.01)


def test_few_units_cannot_be_significant() -> None:
    """With two units every fourth choice of signs keeps both."""
    p = sign_flip_p_value(np.array([5.0, 5.0, 6.0]), np.array([0, 0, 1]))
    assert p == pytest.approx(0.25, abs=0.04)


def test_nothing_at_all_has_a_p_value_of_one() -> None:
    assert sign_flip_p_value(np.zeros(6), np.arange(6)) == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Units


def test_units_are_summed_and_counted_in_ascending_order() -> None:
    sums, counts = unit_sums(np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]]), np.array(["b", "a", "b"]))
    assert sums.tolist() == [[2.0, 20.0], [5.0, 50.0]]
    assert counts.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
def test_unit_means_are_those_of_each_unit(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    values, groups = rng.standard_normal((40, *shape)), rng.choice(list("cab"), 40)
    values[rng.random(values.shape) < 0.2] = np.nan
    by_hand = np.stack([np.nanmean(values[groups == g], axis=0) for g in "abc"])
    assert unit_means(values, groups) == pytest.approx(by_hand)


def test_a_unit_without_any_value_has_no_mean() -> None:
    found = unit_means(np.array([[np.nan, 1.0], [np.nan, 3.0], [5.0, np.nan]]), np.array([0, 0, 1]))
    assert found == pytest.approx(np.array([[np.nan, 2.0], [5.0, np.nan]]), nan_ok=True)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
def test_the_test_of_a_mean_is_students(alternative: str) -> None:
    rng = np.random.default_rng(0)
    means = rng.standard_normal((9, 30)) + 0.5
    means[rng.random(means.shape) < 0.3] = np.nan
    by_hand = [stats.ttest_1samp(m[~np.isnan(m)], 0.0, alternative=alternative).pvalue for m in means.T]
    assert mean_test(means, alternative=alternative) == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("means", "p"),
    [
        ([np.nan, np.nan, np.nan], np.nan),
        ([np.nan, 2.0, np.nan], np.nan),
        ([2.0], np.nan),
        ([0.0, 0.0, 0.0], 1.0),
        ([0.0, np.nan, 0.0], 1.0),
        ([1.0, 1.0, 1.0], 0.0),
        ([1.0, -1.0], 1.0),
    ],
    ids=["nothing", "one of three", "one", "zeros", "zeros but one", "all equal", "both ways"],
)
def test_means_that_students_formula_cannot_take_have_an_answer_all_the_same(means: list[float], p: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = mean_test(np.array(means)[:, None])
    assert found == pytest.approx([p], nan_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Classes of wells


def plates_of_wells(seed: int = 0, features: int = 5, spread: float = 3.0) -> tuple[NDArray, NDArray, NDArray]:
    """Wells (W, F) of five unlike plates that hold the classes in unlike shares, the last of them one class only."""
    rng = np.random.default_rng(seed)
    counts = [(3, 6), (7, 2), (4, 4), (2, 9), (0, 5)]
    plates = np.repeat([f"p{i}" for i in range(len(counts))], [sum(c) for c in counts])
    treated = np.concatenate([np.repeat([True, False], c) for c in counts])
    offset = spread * rng.standard_normal((len(counts), features))
    means = rng.standard_normal((len(plates), features)) + offset[np.unique(plates, return_inverse=True)[1]]
    return means, treated, plates


def test_the_contrast_is_that_of_ordinary_least_squares_with_plate_dummies() -> None:
    means, treated, plates = plates_of_wells()
    design = np.column_stack([treated, *(plates == p for p in np.unique(plates))]).astype(float)
    weights, rest, rank, _ = np.linalg.lstsq(design, means, rcond=None)
    freedom = len(means) - rank
    error = np.sqrt(rest / freedom * np.linalg.inv(design.T @ design)[0, 0])
    found = class_contrast(means, treated, plates)
    assert found.freedom == freedom == 42 - 6
    assert found.difference == pytest.approx(weights[0])
    assert found.error == pytest.approx(error)
    assert found.p_value == pytest.approx(2 * stats.t.sf(np.abs(weights[0] / error), freedom))


def test_on_one_plate_it_is_the_t_test_of_two_samples() -> None:
    means, treated, _ = plates_of_wells(spread=0.0)
    found = class_contrast(means, treated, np.zeros(len(means)))
    test = stats.ttest_ind(means[treated], means[~treated])
    assert found.difference == pytest.approx(means[treated].mean(axis=0) - means[~treated].mean(axis=0))
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.freedom == test.df[0]


def test_plates_of_two_halves_make_it_the_paired_t_test() -> None:
    halves = np.random.default_rng(0).standard_normal((12, 2, 3)) + np.arange(12)[:, None, None]
    found = class_contrast(halves.reshape(24, 3), np.tile([True, False], 12), np.repeat(np.arange(12), 2))
    test = stats.ttest_rel(halves[:, 0], halves[:, 1])
    assert found.p_value == pytest.approx(test.pvalue)
    assert found.freedom == 11


def test_what_a_plate_adds_to_all_its_wells_does_not_matter() -> None:
    means, treated, plates = plates_of_wells()
    offset = 100 * np.random.default_rng(1).standard_normal(5)[np.unique(plates, return_inverse=True)[1]]
    a, b = (class_contrast(m, treated, plates) for m in (means, means + offset[:, None]))
    assert a.difference == pytest.approx(b.difference)
    assert a.p_value == pytest.approx(b.p_value)


def test_a_plate_of_one_class_says_nothing_of_the_difference() -> None:
    means, treated, plates = plates_of_wells()
    both = plates != "p4"
    assert class_contrast(means, treated, plates).difference == pytest.approx(
        class_contrast(means[both], treated[both], plates[both]).difference
    )


@pytest.mark.parametrize(
    ("treated", "plates"),
    [
        ([1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]),
        ([1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
        ([1, 0, 1, 1, 1, 1], [0, 0, 1, 2, 3, 4]),
    ],
    ids=["class is plate", "all treated", "all control", "no freedom left"],
)
def test_classes_that_cannot_be_told_from_plates_are_not_tested(treated: list[int], plates: list[int]) -> None:
    found = class_contrast(np.random.default_rng(0).standard_normal((6, 3)), np.array(treated, bool), np.array(plates))
    assert np.isnan([found.difference, found.p_value, found.error]).all()


def test_a_feature_without_a_value_is_not_tested_and_does_not_hurt_the_others() -> None:
    means, treated, plates = plates_of_wells()
    hurt = means.copy()
    hurt[3, 0] = np.nan
    a, b = class_contrast(hurt, treated, plates), class_contrast(means, treated, plates)
    assert np.isnan([a.difference[0], a.p_value[0], a.error[0]]).all()
    assert a.p_value[1:] == pytest.approx(b.p_value[1:])


def test_equal_wells_do_not_differ_and_separate_ones_do_for_sure() -> None:
    treated = np.array([True, False, True, False, False, True])
    found = class_contrast(np.column_stack([np.full(6, 2.0), treated * 4.0]), treated, np.zeros(6))
    assert found.difference.tolist() == [0.0, 4.0]
    assert found.p_value.tolist() == [1.0, 0.0]


def test_wells_relabelled_by_chance_within_plates_differ_in_one_of_twenty_features() -> None:
    rng = np.random.default_rng(0)
    p = []
    for seed in range(100):
        means, treated, plates = plates_of_wells(seed, features=40)
        for plate in np.unique(plates):
            treated[plates == plate] = rng.permutation(treated[plates == plate])
        p.append(class_contrast(means, treated, plates).p_value)
    for level in (0.05, 0.25, 0.5):
        assert np.mean(np.array(p) <= level) == pytest.approx(level, abs=0.03)


def test_without_plates_the_same_wells_would_differ_far_more_often() -> None:
    """What the plates are for: classes lie in unlike shares on plates that differ."""
    p = [class_contrast(m, t, np.zeros(len(m))).p_value for m, t, _ in (plates_of_wells(s) for s in range(100))]
    assert np.mean(np.array(p) <= 0.05) > 0.15


def test_an_effect_as_large_as_the_wells_spread_is_found_through_plates_that_differ_more() -> None:
    """Student's power with 36 degrees of freedom at the contrast's own standard error is 0.75."""
    found = [class_contrast(m + t[:, None], t, p) for m, t, p in (plates_of_wells(s) for s in range(100))]
    error = np.median([f.error for f in found])
    power = stats.nct.sf(stats.t.ppf(0.975, 36), 36, 1 / error)
    assert np.mean([f.p_value <= 0.05 for f in found]) == pytest.approx(power, abs=0.06)
    assert power > 0.7
    assert np.mean([f.difference for f in found]) == pytest.approx(1.0, abs=0.06)


def test_plates_are_tested_by_analysis_of_variance() -> None:
    means, _, plates = plates_of_wells(spread=0.5)
    groups = [means[plates == p] for p in np.unique(plates)]
    by_hand = [stats.f_oneway(*(g[:, j] for g in groups)).pvalue for j in range(means.shape[1])]
    assert plate_test(means, plates) == pytest.approx(by_hand)


def test_plates_that_cannot_be_compared_are_not_tested() -> None:
    means = np.random.default_rng(0).standard_normal((4, 3))
    assert np.isnan(plate_test(means, np.zeros(4))).all(), "one plate"
    assert np.isnan(plate_test(means, np.arange(4))).all(), "one well each"
    assert not np.isnan(plate_test(means, np.array([0, 0, 1, 2]))).any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(plate_test(np.ones((4, 3)), np.array([0, 0, 1, 1]))).all(), "all equal"


# ----------------------------------------------------------------------------------------------------------------------
# Many p-values


def test_adjusted_p_values_are_those_of_scipy() -> None:
    p = np.random.default_rng(0).random(50) ** 3
    assert adjusted(p) == pytest.approx(stats.false_discovery_control(p))


def test_adjusted_p_values_by_hand() -> None:
    """Benjamini & Hochberg: p * n / rank, made monotone from the largest down."""
    assert adjusted(np.array([0.01, 0.04, 0.03, 0.5])) == pytest.approx([0.04, 0.16 / 3, 0.16 / 3, 0.5])


def test_what_was_not_tested_is_not_counted() -> None:
    p = np.array([0.01, np.nan, 0.04, 0.03, np.nan, 0.5])
    assert adjusted(p) == pytest.approx([0.04, np.nan, 0.16 / 3, 0.16 / 3, np.nan, 0.5], nan_ok=True)
    assert np.isnan(adjusted(np.full(3, np.nan))).all()
    assert adjusted(np.zeros(0)).shape == (0,)


# ----------------------------------------------------------------------------------------------------------------------
# Directions against random ones


def on_sphere(rng: np.random.Generator, number: int, dimensions: int) -> NDArray:
    u = rng.standard_normal((number, dimensions))
    return np.asarray(u / np.linalg.norm(u, axis=1, keepdims=True))


@pytest.mark.parametrize(("k", "r", "dimensions"), [(1, 24, 10), (6, 24, 10), (12, 8, 3), (6, 5, 40)])
def test_the_best_of_random_directions_has_a_uniform_p_value(k: int, r: int, dimensions: int) -> None:
    """The classifier answers linearly, with a gradient of any length; few random directions tell its scale."""
    rng = np.random.default_rng(0)
    best = []
    for seed in range(400):
        gradient = rng.gamma(1.0) * on_sphere(rng, 1, dimensions)[0]
        moved, null = (on_sphere(rng, n, dimensions) @ gradient for n in (k, r))
        best.append(best_of_sphere_p_value(moved, null, dimensions, draws=1000, seed=seed).min())
    for level in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(np.array(best) <= level) == pytest.approx(level, abs=0.07)


def test_a_direction_along_the_gradient_is_more_than_the_best_of_random_ones() -> None:
    """Far more surely than 24 random directions alone could tell: they give 1 in 25 at best."""
    rng = np.random.default_rng(0)
    gradient = on_sphere(rng, 1, 20)[0]
    moved = np.array([gradient @ gradient, -gradient @ gradient, *(on_sphere(rng, 4, 20) @ gradient)])
    p = best_of_sphere_p_value(moved, on_sphere(rng, 24, 20) @ gradient, 20)
    assert (p[:2] < 0.002).all(), "of either sign"
    assert (p[2:] > 0.05).all()


def test_in_few_dimensions_nothing_is_far_from_random_directions() -> None:
    """On a circle the best of six random directions is nearly along the gradient, too; on a line all are."""
    rng = np.random.default_rng(0)
    null = on_sphere(rng, 200, 2)[:, 0]
    assert best_of_sphere_p_value(np.array([1.0, 0, 0, 0, 0, 0]), null, 2)[0] > 0.3
    assert (best_of_sphere_p_value(np.array([1.0, 1.1]), np.array([1.0, -1.0, 1.0]), 1) == 1.0).all()


def test_p_values_are_adjusted_for_the_number_of_directions() -> None:
    """As Sidak's for independent directions, up to the draws and the common scale."""
    null = np.full(300, 0.1**0.5)
    alone = best_of_sphere_p_value(np.array([0.6]), null, 10)[0]
    among = best_of_sphere_p_value(np.array([0.6, *np.zeros(7)]), null, 10)[0]
    assert alone == pytest.approx(stats.beta.sf(0.36, 0.5, 4.5), rel=0.15)
    assert among == pytest.approx(1 - (1 - alone) ** 8, rel=0.1)


def test_a_larger_pull_has_a_smaller_p_value_whatever_its_sign_and_unit() -> None:
    null = on_sphere(np.random.default_rng(0), 24, 10)[:, 0]
    moved = np.linspace(0, 1, 12)
    p = best_of_sphere_p_value(moved, null, 10)
    assert p[0] == 1.0
    assert (np.diff(p) <= 0).all()
    assert p[-1] < 0.01 < 0.5 < p[3]
    assert (best_of_sphere_p_value(-1000 * moved, 1000 * null, 10) == p).all()


def test_fewer_random_directions_are_less_sure() -> None:
    moved = np.array([0.8, 0.0, 0.0])
    p = [best_of_sphere_p_value(moved, np.full(r, 0.1**0.5), 10)[0] for r in (2, 8, 100)]
    assert p[0] > 2 * p[1] > 4 * p[2]


def test_a_pull_that_is_not_known_or_has_nothing_beside_it_is_not_significant() -> None:
    p = best_of_sphere_p_value(np.array([0.9, np.nan]), np.full(24, 0.1), 10)
    assert p[0] < 0.05
    assert np.isnan(p[1])
    assert np.isnan(best_of_sphere_p_value(np.array([0.9, 0.1]), np.zeros(0), 10)).all()
