"""Phenotypes of simulated screens whose truth is known: real differences, directions along them or not, words."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from diffex.features import measure
from diffex.phenotypes import (
    MOST,
    Population,
    Shift,
    direction_shift,
    headline,
    implausible,
    phenotype_words,
    plain,
    plate_leakage,
    population,
)

F = 8
NAMES = tuple(f"Cells_AreaShape_Thing{j}" for j in range(F))
Cells = tuple[NDArray, Sequence[str], NDArray, NDArray, NDArray]


def effect(**of: float) -> NDArray:
    """Standard deviations by feature: ``effect(f0=2.0)``."""
    out = np.zeros(F)
    for name, value in of.items():
        out[int(name[1:])] = value
    return out


def cells(
    real: NDArray | float = 0.0, *, plates: int = 2, wells: int = 4, each: int = 6, plate: NDArray | float = 0.0,
    mixed: bool = False, shares: Sequence[float] = (0.5,), seed: int = 0,
) -> Cells:  # fmt: skip
    """Features of a screen's cells, 10 +- 1 in control wells of the first plate.

    Args:
        real: what the treatment adds, (F,).
        wells: wells of each class on each plate, in expectation by ``shares`` (of treated wells, plate by plate).
        each: cells of a well and class.
        plate: what the second plate adds, the third twice, ...
        mixed: every well holds cells of both classes.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for p in range(plates):
        treated = round(2 * wells * shares[p % len(shares)])
        for w in range(2 * wells):
            rows += [(p, w, c) for c in ((True, False) if mixed else (w < treated,)) for _ in range(each)]
    at, well, treated_ = (np.array(v) for v in zip(*rows, strict=True))
    unit = at * 2 * wells + well
    x = 10 + 0.3 * rng.standard_normal((plates * 2 * wells, F))[unit] + rng.standard_normal((len(rows), F))
    x += treated_[:, None] * np.asarray(real) + at[:, None] * np.asarray(plate)
    return x, NAMES, treated_, np.array([f"w{u}" for u in unit]), np.array([f"p{a}" for a in at])


def push(
    shift: NDArray | float, *, wells: int = 8, each: int = 4, well: float = 0.1, seed: int = 0
) -> tuple[NDArray, NDArray, NDArray]:
    """Edits, reconstructions and wells of a direction that adds ``shift`` to cells, a little more or less in each."""
    rng = np.random.default_rng(1000 + seed)
    unit = np.repeat(np.arange(wells), each)
    base = 10 + rng.standard_normal((len(unit), F))
    change = shift + well * rng.standard_normal((wells, F))[unit] + 0.2 * rng.standard_normal(base.shape)
    return base + change, base, unit


TREATED = effect(f0=2.0, f1=-1.5)


@pytest.fixture(scope="module")
def real() -> Population:
    """The treatment raises the first feature and lowers the second."""
    return population(*cells(TREATED))


# ----------------------------------------------------------------------------------------------------------------------
# Real cells


def test_the_difference_of_pure_wells_is_that_of_their_means_within_plates() -> None:
    x, names, treated, wells, plates = cells(TREATED, plates=1, wells=6)
    found = population(x, names, treated, wells, plates)
    mean = [np.array([x[wells == w].mean(axis=0) for w in np.unique(wells[c])]) for c in (treated, ~treated)]
    spread = x[~treated].std(axis=0, ddof=1)
    assert found.spread == pytest.approx(spread)
    assert found.contrast.difference == pytest.approx((mean[0].mean(axis=0) - mean[1].mean(axis=0)) / spread)
    p = stats.ttest_ind(*mean).pvalue
    assert found.contrast.p_value == pytest.approx(p)
    assert found.q_value == pytest.approx(stats.false_discovery_control(p))
    assert found.cells == (36, 36)
    assert found.wells.shape == (12, F)
    assert found.treated.sum() == 6


def test_what_differs_is_found_and_nothing_else(real: Population) -> None:
    assert real.differs.tolist() == [True, True, *[False] * 6]
    assert real.contrast.difference[:2] == pytest.approx(TREATED[:2] / real.spread[:2], abs=0.4)
    assert not real.confounded


def test_units_of_features_do_not_matter(real: Population) -> None:
    x, *rest = cells(TREATED)
    other = population(x * 10.0 ** np.arange(-4, 4), *rest)
    assert other.contrast.difference == pytest.approx(real.contrast.difference)
    assert other.ratio == pytest.approx(real.ratio)


def test_plates_that_differ_more_than_the_classes_hide_nothing() -> None:
    """Classes lie in unlike shares on plates five standard deviations apart, where a plain mean would be misled."""
    x, *rest = cells(effect(f0=1.5), plate=effect(f0=-5.0), wells=6, shares=(0.25, 0.75), seed=1)
    found = population(x, *rest)
    assert found.differs.tolist() == [True, *[False] * 7]
    assert found.contrast.difference[0] > 0
    assert found.ratio[0] > 0, "nor does the relative difference, which is one of the same wells"
    assert x[rest[1]][:, 0].mean() < x[~rest[1]][:, 0].mean()


def test_photographs_that_hold_both_classes_are_blocks() -> None:
    """The contrast is the paired t-test of their halves."""
    x, names, treated, wells, plates = cells(effect(f0=1.0), mixed=True, plate=effect(f0=3.0))
    found = population(x, names, treated, wells, plates)
    half = [np.array([x[(wells == w) & c].mean(axis=0) for w in np.unique(wells)]) for c in (treated, ~treated)]
    assert found.contrast.p_value == pytest.approx(stats.ttest_rel(*half).pvalue)
    assert found.contrast.freedom == 15
    assert found.differs[0]


def test_photographs_of_one_class_say_nothing_beside_blocks() -> None:
    x, names, treated, wells, plates = cells(effect(f0=1.0), mixed=True)
    only = ~np.isin(wells, ("w0", "w1", "w2")) | ~treated
    a = population(x[only], names, treated[only], wells[only], plates[only])
    both = ~np.isin(wells, ("w0", "w1", "w2"))
    b = population(x[both], names, treated[both], wells[both], plates[both])
    assert a.contrast.freedom == b.contrast.freedom == 12
    assert a.contrast.p_value == pytest.approx(b.contrast.p_value, rel=0.02), "but for the spread of control cells"


@pytest.mark.parametrize("strays", [1, 3])
def test_a_few_mixed_wells_do_not_take_the_others_away(strays: int) -> None:
    x, names, treated, wells, plates = cells(TREATED, wells=6)
    for w in np.unique(wells[treated])[:strays]:
        treated[np.flatnonzero(wells == w)[0]] = False
    found = population(x, names, treated, wells, plates)
    assert not found.confounded
    assert found.contrast.freedom == 24 + strays - 3
    assert found.differs[:2].all()


def test_classes_on_plates_of_their_own_cannot_be_told_from_plates() -> None:
    x, names, treated, wells, _ = cells(TREATED)
    found = population(x, names, treated, wells, treated.astype(int))
    assert found.confounded
    assert not found.differs.any()
    assert np.isnan(found.ratio).all()


@pytest.mark.parametrize("mixed", [False, True])
def test_without_an_effect_nothing_is_found_in_nineteen_of_twenty_screens(mixed: bool) -> None:
    """Whatever a direction does, it agrees with nothing then."""
    found, agreement = [], []
    for seed in range(300):
        x, *rest = cells(plate=2.0, wells=3, each=3, mixed=mixed, shares=(1 / 3, 2 / 3), seed=seed)
        null = population(x, *rest)
        found.append(null.differs.any())
        if seed < 40:
            agreement.append(direction_shift(*push(TREATED), null).agreement)
    assert 0.015 <= np.mean(found) <= 0.09
    assert np.mean(np.array(agreement) == 0) > 0.85


def test_a_feature_that_says_the_same_as_one_before_is_dropped() -> None:
    x, names, *rest = cells(TREATED)
    rng = np.random.default_rng(1)
    x[:, 5] = 3 * x[:, 0] + 0.3 * rng.standard_normal(len(x))
    x[:, 6] = -x[:, 1]
    x[:, 7] = x[:, 2] + 1.5 * rng.standard_normal(len(x))
    found = population(x, names, *rest)
    assert found.columns.tolist() == [0, 1, 2, 3, 4, 7]
    assert found.names == tuple(names[j] for j in found.columns)
    assert np.abs(found.correlation - np.eye(6)).max() < 0.9


def test_that_a_treatment_changes_two_features_does_not_make_them_the_same() -> None:
    """Correlation counts within classes."""
    x, *rest = cells(effect(f0=20.0, f1=20.0))
    assert np.corrcoef(x[:, 0], x[:, 1])[0, 1] > 0.95
    assert population(x, *rest).columns.tolist() == list(range(F))


def test_headlines_stand_before_features_that_say_the_same() -> None:
    x, _, *rest = cells(TREATED)
    x[:, 3] = x[:, 0]
    names = ["Cells_AreaShape_EquivalentDiameter", *NAMES[1:3], "Cells_AreaShape_Area", *NAMES[4:]]
    found = population(x, names, *rest)
    assert "Cells_AreaShape_Area" in found.names
    assert "Cells_AreaShape_EquivalentDiameter" not in found.names


def test_features_that_are_often_missing_or_hardly_vary_are_dropped_without_a_word() -> None:
    x, names, treated, *rest = cells(TREATED)
    x[:, 1] = np.nan
    x[::5, 2] = np.nan
    x[::20, 3] = np.nan
    x[:, 4] = 0.1
    x[:, 5] = np.where(treated, x[:, 5], 7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = population(x, names, treated, *rest)
    assert found.columns.tolist() == [0, 3, 6, 7]
    assert np.isfinite(found.contrast.p_value).all()
    assert found.differs[0]


def test_without_any_feature_nothing_is_found() -> None:
    x, *rest = cells(TREATED)
    found = population(np.full_like(x, np.nan), *rest)
    assert found.names == ()
    assert direction_shift(*push(TREATED), found).agreement == 0.0


def test_a_feature_that_a_whole_well_lacks_is_tested_by_the_others() -> None:
    x, names, treated, wells, plates = cells(TREATED, wells=8)
    x[wells == "w3", 0] = np.nan
    found = population(x, names, treated, wells, plates)
    assert found.columns[0] == 0
    assert found.differs[0]


def test_relative_differences_are_told_of_features_that_have_a_zero() -> None:
    x, _, *rest = cells(effect(f0=2.0, f1=2.0, f2=2.0), wells=20)
    x[:, 2] -= 10
    found = population(x, ["Cells_AreaShape_Area", "Cells_AreaShape_Eccentricity", *NAMES[2:]], *rest)
    assert found.ratio[0] == pytest.approx(0.2, abs=0.03)
    assert np.isnan(found.ratio[1]), "a share of eccentricity says nothing"
    assert np.isnan(found.ratio[2]), "nor one of a mean of nearly zero"
    assert found.ratio[3] == pytest.approx(0.0, abs=0.03)


# ----------------------------------------------------------------------------------------------------------------------
# Directions


def test_a_direction_that_does_what_the_treatment_does_agrees(real: Population) -> None:
    found = direction_shift(*push(TREATED), real)
    assert found.moved.tolist() == [True, True, *[False] * 6]
    assert (found.agreement, found.shared, found.opposed) == (1.0, 1.0, 0.0)
    assert found.cosine > 0.97
    assert (found.n, found.units) == (32, 8)


def test_its_length_does_not_matter(real: Population) -> None:
    assert direction_shift(*push(0.3 * TREATED), real).agreement == 1.0
    assert direction_shift(*push(2 * TREATED), real).agreement == 1.0


def test_a_direction_that_does_the_opposite_disagrees(real: Population) -> None:
    found = direction_shift(*push(-TREATED), real)
    assert (found.agreement, found.shared, found.opposed) == (-1.0, 0.0, 1.0)
    assert found.cosine < -0.97


def test_a_direction_along_features_that_do_not_differ_does_neither(real: Population) -> None:
    found = direction_shift(*push(effect(f4=2.0, f6=-1.0)), real)
    assert found.moved.sum() == 2
    assert (found.agreement, found.shared, found.opposed) == (0.0, 0.0, 0.0)
    assert abs(found.cosine) < 0.2


def test_a_direction_that_does_one_right_and_one_wrong_cancels(real: Population) -> None:
    found = direction_shift(*push(effect(f0=1.0, f1=1.0), well=0.0), real)
    assert found.shared == pytest.approx(0.5, abs=0.1)
    assert found.shared + found.opposed == pytest.approx(1.0)
    assert found.agreement == pytest.approx(0.0, abs=0.2)


def test_agreement_is_a_share_of_the_squared_shift(real: Population) -> None:
    found = direction_shift(*push(effect(f0=1.0, f5=2.0)), real)
    by_hand = found.difference[0] ** 2 / (found.difference[0] ** 2 + found.difference[5] ** 2)
    assert found.agreement == pytest.approx(by_hand)
    assert found.agreement == pytest.approx(0.2, abs=0.06)


def test_where_nothing_moves_nothing_agrees(real: Population) -> None:
    found = direction_shift(*push(0.0), real)
    assert not found.moved.any()
    assert (found.agreement, found.shared, found.opposed) == (0.0, 0.0, 0.0)
    assert found.size < 0.1
    still = np.ones((8, F))
    none = direction_shift(still, still, np.arange(8), real)
    assert (none.agreement, none.cosine, none.size) == (0.0, 0.0, 0.0)
    assert (none.q_value == 1.0).all()


def test_a_shift_that_is_sure_but_small_counts_as_none(real: Population) -> None:
    found = direction_shift(*push(effect(f0=0.15), wells=60, well=0.0), real)
    assert found.q_value[0] < 1e-6
    assert not found.moved[0]


def test_a_shift_in_one_of_eight_wells_is_not_one_of_the_direction(real: Population) -> None:
    edited, base, wells = push(0.0)
    edited[wells == 0, 0] += 8.0
    found = direction_shift(edited, base, wells, real)
    assert found.difference[0] > 0.5
    assert not found.moved[0]
    cells_as_units = direction_shift(edited, base, np.arange(len(wells)), real)
    assert cells_as_units.q_value[0] < found.q_value[0]


def test_wells_that_answer_each_in_its_own_way_are_not_taken_for_a_shift() -> None:
    """No feature is moved in about 95 % of directions that only stir."""
    real = population(*cells(TREATED))
    moved = [direction_shift(*push(0.0, well=1.0, each=2, seed=s), real).moved.any() for s in range(200)]
    assert np.mean(moved) == pytest.approx(0.05, abs=0.045)


def test_the_interval_is_students_over_wells(real: Population) -> None:
    edited, base, wells = push(TREATED, wells=6)
    found = direction_shift(edited, base, wells, real)
    means = np.array([((edited - base) / real.spread)[wells == w].mean(axis=0) for w in range(6)])
    low, high = stats.t.interval(0.95, 5, means.mean(axis=0), stats.sem(means, axis=0))
    assert found.low == pytest.approx(low)
    assert found.high == pytest.approx(high)
    assert found.q_value == pytest.approx(stats.false_discovery_control(stats.ttest_1samp(means, 0.0).pvalue))


def test_large_wells_count_as_much_as_small_ones(real: Population) -> None:
    """Shift, interval and test are of the same mean."""
    edited, base, _ = push(0.0, wells=8, each=4, well=0.0)
    wells = np.array([0] * 25 + [1, 2, 3, 4, 5, 6, 7])
    edited[wells > 0, 0] += real.spread[0]
    found = direction_shift(edited, base, wells, real)
    assert found.difference[0] == pytest.approx(7 / 8, abs=0.15)
    assert found.low[0] < found.difference[0] < found.high[0]


def test_a_single_well_shows_no_shift(real: Population) -> None:
    found = direction_shift(*push(TREATED, wells=1), real)
    assert np.isnan([found.low, found.high, found.q_value]).all()
    assert not found.moved.any()
    assert found.agreement == 0.0


def test_copies_of_a_feature_hardly_change_the_agreement() -> None:
    """Five times the same irrelevant feature would else outvote the relevant one."""
    screen = cells(TREATED, wells=8)
    edited, base, wells = push(effect(f0=1.0, f5=1.0))
    rng = np.random.default_rng(2)

    def copied(x: NDArray) -> NDArray:
        return np.hstack([x, *(x[:, 5:6] + 0.1 * rng.standard_normal((len(x), 1)) for _ in range(5))])

    once = direction_shift(edited, base, wells, population(*screen))
    names = (*NAMES, *(f"Cells_AreaShape_Copy{j}" for j in range(5)))
    many = direction_shift(copied(edited), copied(base), wells, population(copied(screen[0]), names, *screen[2:]))
    assert 0.3 < once.agreement < 0.7
    assert many.agreement == pytest.approx(once.agreement, abs=0.03)


def test_no_feature_that_explodes_decides_alone(real: Population) -> None:
    found = direction_shift(*push(effect(f0=6.0, f5=600.0)), real)
    assert found.difference[5] > 100
    assert found.agreement == pytest.approx(0.5), f"both count as {MOST}"


def test_cells_that_lose_a_part_are_left_out_of_its_features(real: Population) -> None:
    edited, base, wells = push(TREATED)
    whole = direction_shift(edited, base, wells, real)
    base[5, 0] = 1e6
    edited[5, 0] = np.nan
    edited[wells == 3, 1] = np.nan
    edited[:, 2] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = direction_shift(edited, base, wells, real)
    assert found.difference[0] == pytest.approx(whole.difference[0], abs=0.05)
    assert found.ratio[0] == pytest.approx(whole.ratio[0], abs=0.02), "of the same cells before and after"
    assert found.difference[1] == pytest.approx(whole.difference[1], abs=0.05)
    assert np.isfinite(found.low[1])
    assert found.moved[:2].all()
    assert found.difference[2] == 0.0
    assert np.isnan([found.low[2], found.q_value[2], found.ratio[2]]).all()
    assert not found.moved[2]


def test_a_relative_shift_has_the_sign_of_the_shift(real: Population) -> None:
    found = direction_shift(*push(TREATED), real)
    assert found.ratio[:2] == pytest.approx(TREATED[:2] / 10, abs=0.03)
    edited, base, wells = push(TREATED)
    below = direction_shift(edited - 20, base - 20, wells, real)
    assert np.isnan(below.ratio).all(), "of a mean below zero it would not"
    assert below.difference == pytest.approx(found.difference)


def test_features_are_told_by_their_columns() -> None:
    """Dropped features do not shift the others."""
    x, *rest = cells(TREATED)
    x[:, 0] = np.nan
    found = direction_shift(*push(TREATED), population(x, *rest))
    assert found.moved.tolist() == [True, *[False] * 6]
    assert found.agreement == 1.0


# ----------------------------------------------------------------------------------------------------------------------
# Features that no cell has


def test_implausible_is_what_lies_outside_all_real_cells() -> None:
    real = np.array([[0.0, 5.0, 1.0], [1.0, 7.0, 1.0]])
    edits = np.array([[0.5, 6.0, 1.0], [0.0, 7.0, 1.0], [-0.1, 6.0, 1.0], [2.0, 8.0, 0.9]])
    assert implausible(edits, real) == pytest.approx([0.0, 0.0, 1 / 3, 1.0])


def test_real_cells_are_plausible_and_exploded_ones_are_not() -> None:
    x = cells(TREATED)[0]
    assert (implausible(x, x) == 0).all()
    assert (implausible(x + 100, x) == 1).all()


def test_what_was_not_measured_is_neither_plausible_nor_not() -> None:
    real = np.array([[0.0, np.nan, np.nan], [1.0, 2.0, np.nan], [0.5, 3.0, np.nan]])
    edits = np.array([[5.0, np.nan, 1.0], [0.5, 9.0, np.nan], [np.nan, 2.5, 1e9], [np.nan, np.nan, 0.0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert implausible(edits, real) == pytest.approx([1.0, 0.5, 0.0, np.nan], nan_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Plates


@pytest.fixture(scope="module")
def batches() -> Population:
    """Plates differ in the first feature and a little in the third, the treatment in the second and third."""
    return population(*cells(effect(f1=2.0, f2=4.0), plate=effect(f0=3.0, f2=1.0), plates=3))


def test_a_direction_along_the_plates_leaks(batches: Population) -> None:
    found = plate_leakage(direction_shift(*push(effect(f0=1.0)), batches), batches)
    assert found.leaks
    assert found.p_value < 1e-4
    assert found.ratio > 5
    assert found.plates == 3


def test_a_direction_along_the_treatment_does_not_leak(batches: Population) -> None:
    found = plate_leakage(direction_shift(*push(effect(f1=1.0)), batches), batches)
    assert not found.leaks
    assert found.ratio < 0.5


def test_plates_that_differ_less_than_the_treatment_do_not_leak(batches: Population) -> None:
    found = plate_leakage(direction_shift(*push(effect(f2=-1.0)), batches), batches)
    assert found.p_value < 0.01
    assert found.ratio == pytest.approx(1 / 4, abs=0.1)
    assert not found.leaks


def test_neither_sign_nor_length_of_the_direction_matters(batches: Population) -> None:
    a, b = (plate_leakage(direction_shift(*push(effect(f0=s), well=0.0), batches), batches) for s in (1.0, -3.0))
    assert a.ratio == pytest.approx(b.ratio, rel=1e-6)
    assert a.p_value == pytest.approx(b.p_value)


def test_plates_that_do_not_differ_leak_at_most_by_chance() -> None:
    shift = direction_shift(*push(effect(f0=1.0, f3=1.0)), population(*cells()))
    found = [plate_leakage(shift, population(*cells(plates=3, each=3, seed=s))) for s in range(200)]
    assert np.mean([f.p_value <= 0.05 for f in found]) == pytest.approx(0.05, abs=0.04)
    assert np.mean([f.leaks for f in found]) < 0.09


def test_where_class_and_plate_are_one_a_spread_of_plates_leaks() -> None:
    """Control wells on two plates, treated on a third: nothing is known of the effect."""
    x, names, treated, wells, plates = cells(plate=effect(f0=3.0), plates=3, shares=(0.0, 0.0, 1.0))
    real = population(x, names, treated, wells, plates)
    found = plate_leakage(direction_shift(*push(effect(f0=1.0)), real), real)
    assert np.isinf(found.ratio)
    assert found.leaks


@pytest.mark.parametrize("case", ["one plate", "nothing moves", "photographs"])
def test_leakage_that_cannot_be_tested_is_not_claimed(case: str, batches: Population) -> None:
    real = {"one plate": population(*cells(plates=1)), "photographs": population(*cells(mixed=True))}.get(case, batches)
    found = plate_leakage(direction_shift(*push(0.0 if case == "nothing moves" else TREATED), real), real)
    assert np.isnan(found.p_value)
    assert not found.leaks


# ----------------------------------------------------------------------------------------------------------------------
# Names


@pytest.fixture(scope="module")
def measured() -> list[str]:
    image = np.random.default_rng(0).random((3, 32, 32)).astype(np.float32)
    return list(measure(image, ("DNA", "tubulin", "actin")))


def test_every_measured_feature_has_words_of_its_own(measured: list[str]) -> None:
    words = [plain(n) for n in measured]
    assert len(measured) > 200
    assert len(set(words)) == len(words)
    for name, said in zip(measured, words, strict=True):
        assert "_" not in said
        assert said == " ".join(said.split()), "no gaps"
        assert not any(a.islower() and b.isupper() for a, b in pairwise(said)), "no names run together"
        part = {"Nuclei": "nucle", "Cells": "cell", "Cytoplasm": "cytoplasm"}[name.split("_")[0]]
        assert part in said or name == "Cells_Children_Nuclei_Count"
        for channel in ("DNA", "tubulin", "actin"):
            assert (channel in said) == (channel in name), (name, said)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Cells_Children_Nuclei_Count", "number of nuclei"),
        ("Nuclei_AreaShape_Area", "nucleus area"),
        ("Cells_AreaShape_Eccentricity", "cell elongation (eccentricity)"),
        ("Cells_AreaShape_Zernike_4_2", "cell zernike 4 2"),
        ("Cytoplasm_AreaShape_BoundingBoxArea", "cytoplasm bounding box area"),
        ("Nuclei_Intensity_MeanIntensity_DNA", "mean DNA intensity of the nucleus"),
        ("Cells_Intensity_MeanIntensityEdge_actin", "actin at the rim of the cell"),
        ("Cells_Intensity_MeanIntensity_anti_p53_488", "mean anti p53 488 intensity of the cell"),
        ("Cells_Intensity_MassDisplacement_ER", "mass displacement of ER in the cell"),
        ("Cells_RadialDistribution_FracAtD_actin_4of4", "share of actin at the rim of the cell"),
        ("Cells_RadialDistribution_MeanFrac_actin_2of4", "concentration of actin in ring 2 of 4 of the cell"),
        ("Cells_RadialDistribution_RadialCV_actin_2_1of4", "patchiness of actin 2 at the centre of the cell"),
        ("Cells_RadialDistribution_Spread_actin", "spread of actin over the cell"),
        ("Cells_RadialDistribution_ZernikePhase_actin_3_1", "zernike phase of actin 3 1 in the cell"),
        ("Nuclei_Texture_AngularSecondMoment_DNA_3", "DNA texture of the nucleus (angular second moment, scale 3)"),
        ("Cells_Texture_Contrast_actin_2_1", "actin 2 texture of the cell (contrast, scale 1)"),
        ("Cells_Texture_Entropy_actin_3_00_256", "actin texture of the cell (entropy, scale 3 00 256)"),
        ("Cells_Granularity_1_actin", "actin grains of size 1 in the cell"),
        ("Cytoplasm_Correlation_Correlation_DNA_actin", "correlation of DNA and actin in the cytoplasm"),
        ("Cells_Correlation_RWC_DNA_actin", "RWC of DNA and actin in the cell"),
        ("Cells_Correlation_Slope_anti_p53_DNA", "slope of anti p53 DNA in the cell"),
        ("brightness", "brightness"),
        ("some_thing", "some thing"),
    ],
)
def test_names_in_words(name: str, words: str) -> None:
    assert plain(name) == words


def test_headlines_of_a_screen_are_shapes_and_where_each_stain_lies(measured: list[str]) -> None:
    stains = [
        f"Cells_{what}"
        for c in ("tubulin", "actin")
        for what in (f"Intensity_MeanIntensity_{c}", f"Intensity_MeanIntensityEdge_{c}",
                     f"RadialDistribution_FracAtD_{c}_1of4", f"RadialDistribution_FracAtD_{c}_4of4")
    ]  # fmt: skip
    assert {n for n in measured if headline(n)} == {
        "Cells_Children_Nuclei_Count", "Cells_AreaShape_Area", "Cells_AreaShape_Eccentricity", "Nuclei_AreaShape_Area",
        "Nuclei_AreaShape_Eccentricity", "Nuclei_Intensity_MeanIntensity_DNA", *stains,
    }  # fmt: skip


@pytest.mark.parametrize("nuclear", ["DNA", "dapi", "Hoechst33342", "OrigDNA", "DNA_405", "H2B"])
def test_stains_of_nuclei_are_headlines_there_by_all_their_names(nuclear: str) -> None:
    assert headline(f"Nuclei_Intensity_MeanIntensity_{nuclear}")
    assert not headline(f"Cells_Intensity_MeanIntensity_{nuclear}")
    assert not headline(f"Nuclei_Intensity_MeanIntensityEdge_{nuclear}")


# ----------------------------------------------------------------------------------------------------------------------
# Words

SPOKEN = (
    "Cells_AreaShape_Area", "Cells_AreaShape_Eccentricity", "Cells_Intensity_MeanIntensity_actin",
    "Nuclei_Intensity_MeanIntensity_DNA", "Cells_Intensity_MeanIntensityEdge_actin", "Cells_Texture_Contrast_actin_1",
    "Cells_Texture_Entropy_actin_1", "Nuclei_AreaShape_Area",
)  # fmt: skip
AREA, ECCENTRICITY, ACTIN, DNA, RIM, CONTRAST, _, NUCLEUS = range(F)


def spoken(shift: NDArray, treatment: NDArray, **options: object) -> tuple[Shift, Population]:
    x, _, *rest = cells(treatment, wells=8)
    real = population(x, SPOKEN, *rest)
    return direction_shift(*push(shift, well=0.0), real), replace(real, **options)  # type: ignore[arg-type]


def test_a_change_is_told_beside_the_real_one() -> None:
    shift, real = spoken(effect(f0=-3.0), effect(f0=-2.0))
    told = phenotype_words(shift, real, "taxol")[0]
    a, b = (round(100 * float(v)) for v in (shift.ratio[AREA], real.ratio[AREA]))
    assert a == pytest.approx(-30, abs=3)
    assert b == pytest.approx(-20, abs=3)
    assert told == f"cell area {a:+} %, agrees with the real effect of taxol {b:+} %"


def test_a_change_the_wrong_way_is_told_so() -> None:
    told = phenotype_words(*spoken(effect(f0=-3.0), effect(f0=2.0)), "taxol")[0]
    assert told.startswith("cell area -")
    assert ", against the real effect of taxol +" in told


def test_a_change_that_real_cells_do_not_show_is_told_so() -> None:
    told = phenotype_words(*spoken(effect(f2=2.0), effect(f0=2.0)), "taxol")[0]
    assert told.startswith("mean actin intensity of the cell +")
    assert told.endswith(" %, real taxol cells do not differ in it")


def test_a_change_beside_confounded_plates_is_told_so() -> None:
    x, _, treated, wells, _ = cells(TREATED)
    real = population(x, SPOKEN, treated, wells, treated)
    told = phenotype_words(direction_shift(*push(TREATED), real), real, "taxol")[0]
    assert told.startswith("cell area +")
    assert told.endswith(" %, the real effect of taxol can't be told from plates")


def test_features_without_a_zero_are_told_in_standard_deviations() -> None:
    shift, real = spoken(effect(f1=2.0), effect(f1=2.0))
    told = phenotype_words(shift, real, "taxol")[0]
    assert told == (
        f"cell elongation (eccentricity) {shift.difference[1]:+.1f} sd, agrees with the real effect of taxol "
        f"{real.contrast.difference[1]:+.1f} sd"
    )


def test_what_stays_is_told_last() -> None:
    lines = phenotype_words(*spoken(effect(f2=2.0), effect(f2=2.0)), "taxol")
    assert len(lines) == 2
    assert lines[1] == "cell area not changed"
    assert phenotype_words(*spoken(effect(f0=2.0), effect(f0=2.0)), "taxol")[1] == "nucleus area not changed"


def test_what_is_uncertain_or_was_not_measured_is_not_said_to_stay() -> None:
    real = population(cells(TREATED)[0], SPOKEN, *cells(TREATED)[2:])
    edited, base, wells = push(0.0)
    edited[wells == 0, AREA] += 9.0
    edited[:, NUCLEUS] = np.nan
    shift = direction_shift(edited, base, wells, real)
    assert not shift.moved.any()
    assert phenotype_words(shift, real, "taxol") == []


def test_a_small_shift_that_is_sure_is_no_staying() -> None:
    shift, real = spoken(effect(f2=3.0, f0=0.3, f7=-0.3), effect(f2=2.0))
    assert shift.moved[[AREA, NUCLEUS]].all()
    assert len(phenotype_words(shift, real, "taxol", most=1)) == 1


def test_there_are_at_most_three_lines_and_one_of_what_stays() -> None:
    shift, real = spoken(effect(f0=3.0, f1=2.5, f2=2.0, f3=1.5, f4=1.0), effect(f0=2.0))
    lines = phenotype_words(shift, real, "taxol")
    assert len(lines) == 4
    assert [x.split(" +")[0] for x in lines[:3]] == [plain(SPOKEN[j]) for j in (0, 1, 2)], "largest first"
    assert lines[3] == "nucleus area not changed"
    assert len(phenotype_words(shift, real, "taxol", most=1)) == 2


def test_features_that_need_no_explanation_come_alone() -> None:
    lines = phenotype_words(*spoken(effect(f5=4.0, f0=1.0), effect(f0=2.0)), "taxol")
    assert lines[0].startswith("cell area +")
    assert not any("texture" in line for line in lines)
    assert "texture" in phenotype_words(*spoken(effect(f5=4.0), effect(f0=2.0)), "taxol")[0], "where none of them moves"


def test_what_goes_with_a_feature_named_before_is_not_named_again() -> None:
    correlation = np.eye(F)
    correlation[ACTIN, RIM] = correlation[RIM, ACTIN] = -0.7
    moves = effect(f2=3.0, f4=2.0, f3=1.0)
    lines = phenotype_words(*spoken(moves, moves, correlation=correlation), "taxol")
    assert [x.split(" +")[0] for x in lines[:2]] == [plain(SPOKEN[j]) for j in (ACTIN, DNA)]
    assert "actin at the rim of the cell" in phenotype_words(*spoken(moves, moves), "taxol")[1]


def test_a_direction_that_does_nothing_is_told_by_what_stays() -> None:
    assert phenotype_words(*spoken(effect(), TREATED), "taxol") == ["cell area not changed"]
