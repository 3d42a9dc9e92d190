"""Metrics of images and of sets of directions: perfect, useless and duplicate cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from torch import Tensor

from diffex.metrics import consistency, effective_rank, mean_overlap, mse, psnr, ssim


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
