"""Stability: the same directions agree in any order and sign, unrelated ones as much as chance, and intervals cover."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from diffex.errors import UserError
from diffex.stability import agreement, chance, cosine_similarity, match


def rows(seed: int, num: int = 5, columns: int = 12) -> NDArray:
    return np.random.default_rng(seed).standard_normal((num, columns))


def shuffled(a: NDArray, seed: int) -> NDArray:
    """The same directions in another order, with other signs and lengths."""
    rng = np.random.default_rng(seed)
    return rng.permutation(a) * rng.choice([-1.0, 1.0], (len(a), 1)) * rng.uniform(0.1, 9.0, (len(a), 1))


def retrained(seed: int, seeds: int) -> list[NDArray]:
    """Trainings of the same directions, some with more noise than others."""
    rng = np.random.default_rng(seed)
    return [
        rng.permutation(rows(99) + rng.choice([0.2, 0.6, 1.5]) * rng.standard_normal((5, 12))) for _ in range(seeds)
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Matching


@pytest.mark.parametrize(("k", "other"), [(1, 1), (3, 3), (5, 5), (2, 5), (5, 3)])
def test_no_other_matching_is_better(k: int, other: int) -> None:
    """Brute force over all permutations."""
    for seed in range(20):
        similarity = cosine_similarity(rows(seed, k, 3), rows(100 + seed, other, 3))
        wide = np.abs(similarity if k <= other else similarity.T)
        best = max(sum(wide[i, p[i]] for i in range(len(wide))) for p in permutations(range(wide.shape[1]), len(wide)))
        found = match(similarity)
        assert np.abs(found.values).sum() == pytest.approx(best)
        assert len(np.unique(found.pairs[:, 0])) == len(np.unique(found.pairs[:, 1])) == min(k, other)


def test_a_matching_undoes_order_and_sign() -> None:
    a = rows(0)
    order, signs = np.array([3, 0, 4, 1, 2]), np.array([1.0, -1.0, -1.0, 1.0, 1.0])
    found = match(cosine_similarity(a, a[order] * signs[:, None]))
    assert (found.pairs[:, 0] == np.arange(5)).all()
    assert (order[found.pairs[:, 1]] == np.arange(5)).all()
    assert (found.signs == signs[found.pairs[:, 1]]).all()
    assert found.values == pytest.approx(found.signs)


def test_the_best_sum_is_found_where_the_greedy_choice_is_worse() -> None:
    found = match([[0.9, 0.8], [0.8, 0.1]])
    assert found.pairs.tolist() == [[0, 1], [1, 0]]


def test_similarities_are_cosines() -> None:
    found = cosine_similarity([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]], [[3.0, 4.0]])
    assert found == pytest.approx(np.array([[0.6], [-0.8], [0.0]]))


# ----------------------------------------------------------------------------------------------------------------------
# Agreement


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_equal_directions_agree_in_any_order_sign_and_length(seeds: int) -> None:
    found = agreement([shuffled(rows(0), s) for s in range(seeds)])
    assert found.mean == pytest.approx(1.0)
    assert found.per_direction == pytest.approx(np.ones(5))
    assert found.high == pytest.approx(1.0)
    assert found.pairs == pytest.approx(np.ones((seeds, seeds)))
    assert found.seeds == seeds


def test_unrelated_directions_agree_as_much_as_chance() -> None:
    found = [agreement([rows(3 * s + i, 5, 8) for i in range(3)]).mean for s in range(200)]
    null = chance([5, 5, 5], 8)
    assert np.mean(found) == pytest.approx(null.mean, abs=0.01)
    assert np.mean([(f < null.low) or (f > null.high) for f in found]) == pytest.approx(0.05, abs=0.05)


def test_agreement_is_the_mean_over_pairs_of_seeds() -> None:
    a, b, c = (np.eye(2), np.array([[0.6, 0.8], [-0.8, 0.6]]), np.array([[1.0, 0.0], [0.8, 0.6]]))
    found = agreement([a, b, c])
    assert found.pairs[0, 1] == pytest.approx(0.8)
    assert found.pairs[0, 2] == pytest.approx(0.8)
    assert found.pairs[1, 2] == pytest.approx((0.96 + 0.8) / 2)
    assert found.mean == pytest.approx((0.8 + 0.8 + 0.88) / 3)
    assert found.per_direction == pytest.approx([(0.8 + 1.0) / 2, (0.8 + 0.6) / 2])
    assert agreement([a, b, c], reference=1).per_direction.mean() == pytest.approx((0.8 + 0.88) / 2)


def test_a_direction_found_twice_leaves_another_without_its_like() -> None:
    """Matching is one to one: the copy has to take the direction that is missing."""
    whole = np.eye(4)
    doubled = whole[[0, 0, 1, 2]]
    found = agreement([whole, doubled])
    assert found.mean == pytest.approx(3 / 4)
    assert sorted(found.per_direction) == pytest.approx([0, 1, 1, 1])
    assert agreement([doubled, doubled]).mean == pytest.approx(1.0)


def test_directions_that_one_training_lacks_count_as_disagreement() -> None:
    found = agreement([np.eye(4), np.eye(4)[[2, 0]], np.eye(4)])
    assert found.pairs[0, 1] == found.pairs[1, 0] == pytest.approx(0.5)
    assert found.per_direction == pytest.approx([1.0, 0.5, 1.0, 0.5])
    assert agreement([np.eye(4)[[2, 0]], np.eye(4)]).per_direction == pytest.approx([1.0, 1.0])


def test_directions_that_do_nothing_do_not_agree() -> None:
    assert agreement([np.zeros((3, 4)), np.zeros((3, 4))]).mean == 0.0


def test_the_order_of_seeds_does_not_matter() -> None:
    a = retrained(0, 4)
    forth, back = agreement(a), agreement(a[::-1])
    assert (forth.mean, forth.low, forth.high) == pytest.approx((back.mean, back.low, back.high))
    assert forth.per_direction == pytest.approx(agreement(a[::-1], reference=3).per_direction)


# ----------------------------------------------------------------------------------------------------------------------
# Intervals


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_interval_over_seeds_covers_what_other_seeds_would_give(seeds: int) -> None:
    """Even with three seeds; about 0.85 to 0.95 for 0.95, as the agreements of noisy seeds are skewed."""
    truth = np.mean([agreement(retrained(10_000 + s, 2)).mean for s in range(1500)])
    found = [agreement(retrained(s, seeds)) for s in range(300)]
    assert 0.8 <= np.mean([a.low <= truth <= a.high for a in found]) <= 0.99
    assert all(0 <= a.low <= a.mean <= a.high <= 1 for a in found)


def test_the_interval_is_the_jackknife_over_seeds() -> None:
    a = retrained(1, 5)
    found = agreement(a, confidence=0.9)
    without = np.array([agreement(a[:i] + a[i + 1 :]).mean for i in range(5)])
    error = (4 / 5 * ((without - without.mean()) ** 2).sum()) ** 0.5
    t = 2.131847  # Student's t, 4 degrees of freedom, 95 %
    assert found.low == pytest.approx(max(0, found.mean - t * error))
    assert found.high == pytest.approx(min(1, found.mean + t * error))
    assert found.interval == "seeds"


def test_two_seeds_say_so_and_resample_directions() -> None:
    found = agreement(retrained(2, 2))
    assert found.interval == "directions"
    assert found.low < found.mean < found.high
    wider = agreement(retrained(2, 2), confidence=0.999)
    assert wider.low < found.low < found.high < wider.high


def test_two_seeds_of_different_numbers_resample_the_missing_too() -> None:
    found = agreement([np.eye(6), np.eye(6)[:3]])
    assert found.mean == pytest.approx(0.5)
    assert 0 < found.low < 0.5 < found.high < 1


# ----------------------------------------------------------------------------------------------------------------------
# Chance


def test_in_one_dimension_all_directions_agree() -> None:
    assert chance([3, 3], 1).mean == pytest.approx(1.0)


@pytest.mark.parametrize(("rank", "cosine"), [(2, 2 / np.pi), (3, 0.5), (4, 4 / (3 * np.pi))])
def test_single_directions_agree_by_the_mean_cosine_on_the_sphere(rank: int, cosine: float) -> None:
    assert chance([1, 1], rank, draws=20_000).mean == pytest.approx(cosine, abs=0.01)


def test_matching_finds_likeness_and_dimensions_hide_it() -> None:
    by_number = [chance([k, k], 8, draws=300).mean for k in (1, 2, 4, 8)]
    by_rank = [chance([8, 8], r, draws=300).mean for r in (2, 4, 8, 64)]
    assert (np.diff(by_number) > 0).all()
    assert (np.diff(by_rank) < 0).all()


def test_more_seeds_narrow_the_range_of_chance_but_not_its_mean() -> None:
    two, six = chance([4] * 2, 8), chance([4] * 6, 8)
    assert six.mean == pytest.approx(two.mean, abs=0.01)
    assert six.high - six.low < 0.6 * (two.high - two.low)


def test_different_numbers_agree_less_by_chance() -> None:
    null = chance([2, 6], 8)
    found = [agreement([rows(2 * s, 2, 8), rows(2 * s + 1, 6, 8)]).mean for s in range(300)]
    assert np.mean(found) == pytest.approx(null.mean, abs=0.01)
    assert null.high < 2 / 6 + 1e-9


def test_chance_is_that_of_its_seed() -> None:
    assert chance([4, 4], 8, draws=50) == chance([4, 4], 8, draws=50)
    assert chance([4, 4], 8, draws=50) != chance([4, 4], 8, draws=50, seed=1)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input


def test_profiles_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UserError, match="two or more"):
        agreement([rows(0)])
    with pytest.raises(UserError, match="same columns"):
        agreement([rows(0), rows(1, columns=7)])
    with pytest.raises(UserError, match="shapes"):
        agreement([rows(0), rows(1)[:0]])
    with pytest.raises(UserError, match="nan"):
        agreement([rows(0), rows(1) * np.nan])
    with pytest.raises(UserError, match="reference"):
        agreement([rows(0), rows(1)], reference=2)
    with pytest.raises(UserError, match="finite"):
        match([[np.nan]])
    for numbers, rank, word in (([4], 3, "num_directions"), ([4, 0], 3, "num_directions"), ([4, 4], 0, "rank")):
        with pytest.raises(UserError, match=word):
            chance(numbers, rank)
