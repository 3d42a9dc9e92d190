"""Diffusion: against Gaussian data, for which the best denoiser and the whole DDIM path are known in closed form.

For data N(mu, s^2) the best prediction of the noise is eps*(x_t) = sqrt(1 - abar) (x_t - sqrt(abar) mu) / var_t with
var_t = abar s^2 + 1 - abar, and the exact flow carries x_T to mu + s (x_T - sqrt(abar_T) mu) / sqrt(var_T).
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffex.diffusion import SPACINGS, Schedule, ddim_step, diffuse, estimate_x_0, invert, render, simple_loss

SCHEDULE = Schedule.linear()
MU, S = 0.3, 0.5
NO_CODE = torch.zeros(1, 1, dtype=torch.float64)


def gaussian(x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """The best denoiser of data N(MU, S^2); float64, since ``float()`` in the loops is not what is measured here."""
    abar = SCHEDULE.at(t, x_t)
    return (1 - abar).sqrt() * (x_t - abar.sqrt() * MU) / (abar * S**2 + 1 - abar)


def curved(x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """A denoiser that is not linear in x_t: that of equal shares of N(-0.5, 0.3^2) and N(0.5, 0.3^2)."""
    abar = SCHEDULE.at(t, x_t)
    var = abar * 0.09 + 1 - abar
    mean = abar.sqrt() * 0.5 * torch.tanh(abar.sqrt() * 0.5 * x_t / var)
    return (1 - abar).sqrt() * (x_t - mean) / var


def flow(x_T: Tensor, t: int) -> Tensor:
    """Where the exact flow takes x_T from time t."""
    abar = SCHEDULE.abar[t]
    return MU + S * (x_T - abar.sqrt() * MU) / (abar * S**2 + 1 - abar).sqrt()


def noise(n: int = 64) -> Tensor:
    return torch.randn(1, 1, n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def image(n: int = 16) -> Tensor:
    return noise(n).clamp(-1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Schedule and grids


def test_signal_falls_from_nearly_all_to_nearly_nothing() -> None:
    abar = SCHEDULE.abar
    assert (abar.diff() < 0).all()
    assert abar[0] == pytest.approx(1 - 1e-4)
    assert abar[-1] < 1e-4


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 333, 1000])
def test_a_grid_ascends_from_zero_within_the_schedule(steps: int, spacing: str) -> None:
    grid = SCHEDULE.grid(steps, spacing)
    assert grid[0] == 0
    assert (grid.diff() > 0).all()
    assert grid[-1] < SCHEDULE.num_times
    assert 1 <= len(grid) <= steps


def test_a_uniform_grid_has_just_the_asked_for_steps() -> None:
    assert all(len(SCHEDULE.grid(n)) == n for n in range(1, 1001))


def test_a_quadratic_grid_starts_finely() -> None:
    grid = SCHEDULE.grid(10, "quadratic")
    assert len(grid) == 10
    assert (grid.diff().diff() > 0).all()


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_grid_reaches_up_to_one_step_below_the_top(spacing: str) -> None:
    assert SCHEDULE.grid(10, spacing)[-1] == 900


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_grid_needs_a_possible_number_of_steps(steps: int) -> None:
    with pytest.raises(ValueError, match=r"1 to 1000 steps.*rendering\.steps"):
        SCHEDULE.grid(steps)


def test_an_unknown_spacing_is_named() -> None:
    with pytest.raises(ValueError, match=r"'cubic'.*uniform, quadratic"):
        SCHEDULE.grid(10, "cubic")


# ----------------------------------------------------------------------------------------------------------------------
# One level


def test_diffused_images_keep_unit_variance() -> None:
    x_0, eps = noise(256), torch.randn(1, 1, 256, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for t in (0, 300, 999):
        assert float(diffuse(x_0, eps, SCHEDULE.abar[t]).var()) == pytest.approx(1.0, abs=0.02)


def test_the_estimate_undoes_diffusion_with_the_true_noise() -> None:
    x_0, eps = image(), noise(16).flip(-1)
    t = torch.tensor([700])
    abar = SCHEDULE.at(t, x_0)
    assert torch.allclose(estimate_x_0(diffuse(x_0, eps, abar), eps, abar), x_0)


def test_a_step_to_no_noise_gives_the_estimate() -> None:
    x_t, eps, abar = noise(8), noise(8).flip(-1), SCHEDULE.abar[400]
    assert torch.allclose(ddim_step(x_t, eps, abar, torch.tensor(1.0)), estimate_x_0(x_t, eps, abar))


def test_a_step_up_undoes_a_step_down_with_the_same_noise() -> None:
    x_t, eps = noise(8), noise(8).flip(-1)
    a, b = SCHEDULE.abar[500], SCHEDULE.abar[400]
    assert torch.allclose(ddim_step(ddim_step(x_t, eps, a, b), eps, b, a), x_t)


def test_clipping_keeps_the_estimate_in_range_and_the_step_consistent() -> None:
    x_t, eps, a, b = 3 * noise(8), noise(8).flip(-1), SCHEDULE.abar[500], SCHEDULE.abar[400]
    x_s = ddim_step(x_t, eps, a, b, clip=True)
    x_0 = estimate_x_0(x_t, eps, a).clamp(-1, 1)
    implied = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
    assert not torch.allclose(implied, eps)
    assert torch.allclose(x_s, diffuse(x_0, implied, b))


def test_the_loss_of_the_best_denoiser_is_the_posterior_variance() -> None:
    """E |eps - eps*|^2 = abar s^2 / var_t for Gaussian data."""
    x_0 = MU + S * noise(256).expand(3, -1, -1, -1)
    t = torch.tensor([100, 400, 800])
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    error, _ = simple_loss(gaussian, SCHEDULE, x_0, t, NO_CODE, eps)
    abar = SCHEDULE.abar[t]
    assert torch.allclose(error.double(), abar * S**2 / (abar * S**2 + 1 - abar), rtol=0.03)


def test_the_loss_is_given_image_by_image() -> None:
    x_0, eps = torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)
    error, _ = simple_loss(lambda x, t, z: t.float().view(-1, 1, 1, 1).expand_as(x), SCHEDULE, x_0,
                           torch.tensor([1, 2, 3]), NO_CODE, eps)  # fmt: skip
    assert error.tolist() == [1.0, 4.0, 9.0]


# ----------------------------------------------------------------------------------------------------------------------
# Rendering


@pytest.mark.parametrize("spacing", SPACINGS)
def test_rendering_converges_to_the_exact_flow(spacing: str) -> None:
    """The error falls about as the number of steps grows: DDIM is a method of first order."""
    x_T = noise()
    errors = []
    for steps in (10, 20, 40, 80, 160):
        grid = SCHEDULE.grid(steps, spacing)
        x = render(gaussian, SCHEDULE, x_T, NO_CODE, grid)
        errors.append(float((x - flow(x_T, int(grid[-1]))).abs().max()))
    ratios = [a / b for a, b in pairwise(errors)]
    assert all(ratio > 1.6 for ratio in ratios), errors
    assert errors[-1] < 0.04


def test_quadratic_spacing_renders_better_than_uniform_at_ten_steps() -> None:
    def error(spacing: str) -> float:
        grid = SCHEDULE.grid(10, spacing)
        x_T = noise()
        return float((render(gaussian, SCHEDULE, x_T, NO_CODE, grid) - flow(x_T, int(grid[-1]))).abs().mean())

    assert error("quadratic") < error("uniform")


def test_rendering_noise_gives_the_distribution_of_the_data() -> None:
    x = render(gaussian, SCHEDULE, noise(128), NO_CODE, SCHEDULE.grid(250))
    assert float(x.mean()) == pytest.approx(MU, abs=0.02)
    assert float(x.std()) == pytest.approx(S, abs=0.02)


def test_rendering_evaluates_the_network_once_a_step_from_noisy_to_clean() -> None:
    times: list[int] = []

    def count(x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        times.append(int(t[0]))
        return torch.zeros_like(x)

    render(count, SCHEDULE, noise(4), NO_CODE, SCHEDULE.grid(5))
    assert times == [800, 600, 400, 200, 0]


# ----------------------------------------------------------------------------------------------------------------------
# Inversion


def round_trip(
    denoise: object, steps: int, iterations: int, spacing: str = "quadratic", encode: int | None = None
) -> float:
    x_0, grid = image(), SCHEDULE.grid(steps, spacing)
    up = grid if encode is None else SCHEDULE.grid(encode, spacing)
    x_T = invert(denoise, SCHEDULE, x_0, NO_CODE, up, iterations=iterations)  # type: ignore[arg-type]
    return float((render(denoise, SCHEDULE, x_T, NO_CODE, grid) - x_0).abs().max())  # type: ignore[arg-type]


@pytest.mark.parametrize("denoise", [gaussian, curved])
def test_every_fixed_point_iteration_brings_the_round_trip_nearer(denoise: object) -> None:
    errors = [round_trip(denoise, 10, n) for n in (1, 2, 4, 8, 16)]
    assert all(a > 1.5 * b for a, b in pairwise(errors)), errors
    assert errors[-1] < 1e-3


@pytest.mark.parametrize("denoise", [gaussian, curved])
def test_finer_steps_bring_the_round_trip_nearer(denoise: object) -> None:
    errors = [round_trip(denoise, n, 3) for n in (5, 10, 20, 40)]
    assert all(a > b for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("denoise", [gaussian, curved])
def test_fixed_point_inversion_beats_the_published_one_at_equal_cost(denoise: object, spacing: str) -> None:
    """Fifty evaluations each: 50 published steps, or 10 steps of 5 iterations."""
    assert round_trip(denoise, 10, 5, spacing) < round_trip(denoise, 10, 0, spacing, encode=50)


def test_published_inversion_ends_without_signal() -> None:
    """Its last step goes to abar = 0, where x_T is the predicted noise itself."""
    x_T = invert(lambda x, t, z: torch.full_like(x, 0.7), SCHEDULE, image(), NO_CODE, SCHEDULE.grid(10))
    assert torch.allclose(x_T, torch.full_like(x_T, 0.7))


def test_published_inversion_approaches_the_exact_flow_of_its_last_level() -> None:
    """With the exact denoiser and many steps x_T is the standardised image."""
    x_0 = image()

    def error(steps: int) -> float:
        x_T = invert(gaussian, SCHEDULE, x_0, NO_CODE, SCHEDULE.grid(steps))
        return float((x_T - (x_0 - MU) / S).abs().max())

    assert error(1000) < error(100) < error(20)
    assert error(1000) < 0.1


@pytest.mark.parametrize(("iterations", "evaluations"), [(0, 5), (1, 5), (4, 20)])
def test_inversion_costs_steps_times_iterations(iterations: int, evaluations: int) -> None:
    calls: list[int] = []

    def count(x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        calls.append(int(t[0]))
        return torch.zeros_like(x)

    invert(count, SCHEDULE, noise(4), NO_CODE, SCHEDULE.grid(5), iterations=iterations)
    assert len(calls) == evaluations
    assert calls == sorted(calls)


def test_codes_reach_the_network() -> None:
    z = torch.tensor([[1.0], [2.0]])
    seen: list[Tensor] = []

    def listen(x: Tensor, t: Tensor, given: Tensor) -> Tensor:
        seen.append(given)
        return torch.zeros_like(x)

    x = torch.zeros(2, 1, 4, 4)
    render(listen, SCHEDULE, x, z, SCHEDULE.grid(2))
    invert(listen, SCHEDULE, x, z, SCHEDULE.grid(2))
    invert(listen, SCHEDULE, x, z, SCHEDULE.grid(2), iterations=1)
    assert len(seen) == 6
    assert all(given is z for given in seen)
