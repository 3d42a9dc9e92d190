"""Metrics: perfect, useless and duplicate cases, intervals that cover, and p-values that mean what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from skimage.metrics import structural_similarity
from torch import Tensor

from diffex.metrics import (
    bootstrap_interval,
    consistency,
    effective_rank,
    factor_recovery,
    mean_overlap,
    mse,
    psnr,
    sign_flip_p_value,
    ssim,
    wilson_interval,
)


def images(seed: int = 0, channels: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, channels, 24, 24, generator=generator) * 2 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Images


def test_equal_images_are_perfectly_similar() -> None:
    x = images()
    assert torch.allclose(ssim(x, x), torch.ones(3), atol=1e-5)
    assert torch.equal(mse(x, x), torch.zeros(3))
    assert torch.isinf(psnr(x, x)).all()


def test_unrelated_images_are_not_similar() -> None:
    assert ssim(images(0), images(1)).abs().max() < 0.2


def test_a_negative_is_the_opposite_of_similar() -> None:
    assert (ssim(images(), -images()) < -0.5).all()


def test_similarity_falls_with_noise() -> None:
    x, noise = images(), images(1)
    found = torch.stack([ssim(x, (x + s * noise).clamp(-1, 1)) for s in (0.0, 0.1, 0.3, 1.0)])
    assert (found.diff(dim=0) < 0).all()


def test_similarity_does_not_depend_on_the_order() -> None:
    assert torch.allclose(ssim(images(0), images(1)), ssim(images(1), images(0)), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_similarity_is_that_of_scikit_image(channels: int) -> None:
    """With a dark margin wider than the window, how images are padded makes no difference."""
    a, b = (F.pad(images(seed, channels), (12,) * 4, value=-1.0) for seed in (0, 1))
    b = 0.8 * a + 0.2 * b
    for i, found in enumerate(ssim(a, b).tolist()):
        planes = [
            structural_similarity(
                (a[i, c].double().numpy() + 1) / 2, (b[i, c].double().numpy() + 1) / 2, data_range=1.0,
                gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True,
            )[1].mean()
            for c in range(channels)
        ]  # fmt: skip
        assert found == pytest.approx(np.mean(planes), abs=1e-5)


def test_errors_are_measured_in_the_unit_range() -> None:
    """Black against white is an error of 1, which is 0 dB; a tenth of that range is 20 dB."""
    black = torch.full((1, 1, 8, 8), -1.0)
    assert float(mse(black, -black)) == 1.0
    assert float(psnr(black, -black)) == pytest.approx(0.0, abs=1e-6)
    assert float(psnr(black, black + 0.2)) == pytest.approx(20.0, abs=1e-4)


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
# Sets of directions


def test_a_direction_that_is_the_same_everywhere_is_consistent() -> None:
    fixed = F.normalize(torch.randn(4, 1, 5), dim=-1).expand(4, 7, 5)
    assert torch.allclose(consistency(fixed), torch.ones(4), atol=1e-5)


def test_a_direction_that_goes_both_ways_is_not_consistent() -> None:
    u = F.normalize(torch.ones(1, 8, 5), dim=-1) * torch.tensor([1.0, -1.0]).repeat(4).view(1, 8, 1)
    assert float(consistency(u)) == pytest.approx(-1 / 7, abs=1e-5)


def test_consistency_is_the_mean_cosine_of_different_images() -> None:
    u = F.normalize(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    by_hand = [np.mean([float(u[k, i] @ u[k, j]) for i in range(6) for j in range(6) if i != j]) for k in range(3)]
    assert consistency(u).tolist() == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_orthogonal_rows_are_all_different(n: int) -> None:
    assert effective_rank(3 * np.eye(7)[:n]) == pytest.approx(n)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_parallel_rows_are_one(n: int) -> None:
    rows = np.arange(1, n + 1)[:, None] * np.array([[1.0, -2.0, 0.5]])
    assert effective_rank(rows) == pytest.approx(1.0)


def test_rows_of_nothing_are_none() -> None:
    assert effective_rank(np.zeros((3, 5))) == 0.0


def test_a_duplicate_among_two_counts_by_the_entropy_of_its_share() -> None:
    """Energies 2 and 1: exp(-(2/3) log(2/3) - (1/3) log(1/3)) = 3 / 2^(2/3)."""
    assert effective_rank(np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])) == pytest.approx(3 / 2 ** (2 / 3))


def test_maps_of_the_same_pixels_overlap_whatever_their_signs() -> None:
    maps = np.random.default_rng(0).standard_normal((1, 4, 9))
    assert mean_overlap(np.concatenate([maps, -maps, 5 * maps])) == pytest.approx(1.0)


def test_maps_of_different_pixels_do_not_overlap() -> None:
    assert mean_overlap(np.eye(6)[:, None].repeat(3, axis=1)) == 0.0


def test_overlap_is_the_mean_cosine_over_pairs_and_images() -> None:
    a, b = np.array([1.0, 0.0]), np.array([0.6, -0.8])
    maps = np.stack([np.stack([a, a]), np.stack([b, np.array([0.0, 2.0])])])
    assert mean_overlap(maps) == pytest.approx((0.6 + 0.0) / 2)


def test_a_single_map_or_none_overlaps_with_nothing() -> None:
    assert mean_overlap(np.ones((1, 3, 4))) == 0.0
    assert mean_overlap(np.ones((0, 3, 4))) == 0.0


def test_maps_without_change_are_not_taken_for_equal() -> None:
    assert mean_overlap(np.zeros((3, 2, 4))) == 0.0


# ----------------------------------------------------------------------------------------------------------------------
# Recovery of planted factors

FACTORS, PLANTED = ("a", "b", "c", "d"), ("a", "b")


def test_directions_that_each_move_one_factor_recover_all() -> None:
    found = factor_recovery(np.array([[2.0, 0.1, 0.0, 0.0], [0.0, -1.5, 0.2, 0.0]]), FACTORS, PLANTED)
    assert found.moved == found.recovered == ["a", "b"]
    assert found.decoy_hits == 0


def test_a_direction_that_moves_everything_at_once_recovers_one() -> None:
    found = factor_recovery(np.array([[2.0, 1.5, 0.1, 0.0]]), FACTORS, PLANTED)
    assert found.moved == ["a", "b"]
    assert found.recovered == ["a"]


def test_directions_that_move_decoys_recover_nothing() -> None:
    found = factor_recovery(np.array([[0.6, 0.0, 3.0, 0.0], [0.0, 0.9, 0.0, -1.0]]), FACTORS, PLANTED)
    assert found.moved == found.recovered == []
    assert found.decoy_hits == 2


def test_changes_that_are_too_small_count_as_none() -> None:
    found = factor_recovery(np.array([[0.4, 0.1, 0.0, 0.0], [0.0, 0.0, 0.0, 0.45]]), FACTORS, PLANTED)
    assert found.moved == found.recovered == []
    assert found.decoy_hits == 0


def test_two_directions_of_one_factor_recover_it_once() -> None:
    found = factor_recovery(np.array([[2.0, 0, 0, 0], [-3.0, 0, 0, 0]]), FACTORS, PLANTED)
    assert found.recovered == ["a"]


def test_without_planted_factors_there_is_nothing_to_recover() -> None:
    found = factor_recovery(np.array([[2.0, 0, 0, 0]]), FACTORS, ())
    assert found.moved == found.recovered == []
    assert found.decoy_hits == 1


def test_without_measured_factors_nothing_is_found() -> None:
    found = factor_recovery(np.zeros((3, 0)), (), ())
    assert (found.moved, found.recovered, found.decoy_hits) == ([], [], 0)
