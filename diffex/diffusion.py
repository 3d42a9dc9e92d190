"""Gaussian diffusion: schedule, loss, and DDIM both ways, as functions of ``denoise(x_t, t, z) -> eps``.

    q(x_t | x_0)   x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps
    x_0 estimate   x_0^ = (x_t - sqrt(1 - abar_t) eps_theta) / sqrt(abar_t)
    DDIM, eta = 0  x_s = sqrt(abar_s) x_0^ + sqrt(1 - abar_s) eps_theta          for any pair of levels t -> s

Rendering runs the DDIM map down a grid of times; inversion runs it up.  The published inversion evaluates eps at the
level it starts from, so rendering does not return to the image; ``invert(..., iterations > 0)`` instead solves each
rendering step for its input by fixed-point iteration, which makes the pair exact on any grid.

Source: Ho et al., NeurIPS 2020 (schedule, loss); Song et al., "DDIM", ICLR 2021, eq. 12; Nichol & Dhariwal, ICML 2021
(respacing); Pan et al., "AIDI", ICCV 2023 (fixed-point inversion).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``denoise(x_t (B, C, H, W), t (B,) int64, z (B, d)) -> eps (B, C, H, W)``"""

SPACINGS = ("uniform", "quadratic")


@dataclass(frozen=True)
class Schedule:
    """A noise schedule: ``abar[t]`` (T,) float64, the share of signal variance left at time t."""

    abar: Tensor

    @classmethod
    def linear(cls, num_times: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
        """Betas rise linearly from ``first`` to ``last`` over ``num_times`` steps.  Source: Ho et al., section 4."""
        betas = torch.linspace(first, last, num_times, dtype=torch.float64)
        return cls(torch.cumprod(1.0 - betas, dim=0))

    @property
    def num_times(self) -> int:
        return len(self.abar)

    def at(self, t: Tensor, like: Tensor) -> Tensor:
        """abar at times t (B,), shaped to broadcast over images ``like`` (B, C, H, W) in its dtype and device."""
        return self.abar.to(like.device)[t].to(like.dtype).view(-1, *[1] * (like.dim() - 1))

    def grid(self, num_steps: int, spacing: str = "uniform") -> Tensor:
        """Times of a DDIM run, ascending from 0.

        Args:
            num_steps: number of levels, 1 to T.
            spacing: 'uniform' is the published respacing, t = 0, T/n, 2T/n, ...; 'quadratic' puts the levels densely
                near the image, t ~ i^2, so the noise level grows by a near-constant ratio from step to step.

        Returns:
            (n,) int64, strictly ascending; n = num_steps except where quadratic rounding merges neighbours.
        """
        if not 1 <= num_steps <= self.num_times:
            raise ValueError(f"a grid has 1 to {self.num_times} steps, got {num_steps} (rendering.steps)")
        if spacing == "uniform":
            return torch.arange(0, self.num_times, self.num_times // num_steps)[:num_steps]
        if spacing == "quadratic":
            last = self.num_times * (1 - 1 / num_steps)
            return (torch.linspace(0, last**0.5, num_steps, dtype=torch.float64) ** 2).round().long().unique()
        raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)} (rendering.spacing)")


# ----------------------------------------------------------------------------------------------------------------------
# One level


def diffuse(x_0: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """q(x_t | x_0): add noise eps (B, C, H, W) to images x_0 at levels abar (broadcastable)."""
    return abar.sqrt() * x_0 + (1 - abar).sqrt() * eps


def estimate_x_0(x_t: Tensor, eps: Tensor, abar: Tensor) -> Tensor:
    """The image that x_t and its noise eps imply at level abar."""
    return (x_t - (1 - abar).sqrt() * eps) / abar.sqrt()


def ddim_step(x_t: Tensor, eps: Tensor, abar_from: Tensor, abar_to: Tensor, *, clip: bool = False) -> Tensor:
    """Move x_t from level abar_from to abar_to along the deterministic DDIM map (eta = 0).

    ``clip`` clamps the x_0 estimate to [-1, 1] and re-derives eps from it.  Source: Song et al. 2021, eq. 12.
    """
    x_0 = estimate_x_0(x_t, eps, abar_from)
    if clip:
        x_0 = x_0.clamp(-1, 1)
        eps = (x_t - abar_from.sqrt() * x_0) / (1 - abar_from).sqrt()
    return abar_to.sqrt() * x_0 + (1 - abar_to).sqrt() * eps


def simple_loss(
    denoise: Denoise, schedule: Schedule, x_0: Tensor, t: Tensor, z: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Noise-prediction loss ``|| eps - eps_theta(x_t, t, z) ||^2`` and the one-step estimate of x_0.

    Args:
        x_0: (B, C, H, W) images in [-1, 1].
        t: (B,) times.
        z: (B, d) codes.
        noise: (B, C, H, W) standard normal.

    Returns:
        Mean squared error of each image (B,), and x_0^ (B, C, H, W), both with gradient.  Source: Ho et al., eq. 14.
    """
    abar = schedule.at(t, x_0)
    x_t = diffuse(x_0, noise, abar)
    eps = denoise(x_t, t, z).float()
    return (eps - noise).square().flatten(1).mean(1), estimate_x_0(x_t, eps, abar)


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs


def render(denoise: Denoise, schedule: Schedule, x_T: Tensor, z: Tensor, grid: Tensor, *, clip: bool = False) -> Tensor:
    """Run DDIM down the grid: stochastic codes x_T (B, C, H, W) and z (B, d) to images (B, C, H, W).

    Costs ``len(grid)`` evaluations of the network an image.
    """
    x = x_T
    for t, abar_from, abar_to in _downward(schedule, grid, x):
        x = ddim_step(x, denoise(x, t, z).float(), abar_from, abar_to, clip=clip)
    return x


def invert(denoise: Denoise, schedule: Schedule, x_0: Tensor, z: Tensor, grid: Tensor, *, iterations: int = 0,
           clip: bool = False) -> Tensor:  # fmt: skip
    """Run DDIM up the grid: images x_0 (B, C, H, W) and z (B, d) to stochastic codes x_T (B, C, H, W).

    Args:
        iterations: 0 is the published inversion (one evaluation a step, the last step goes to abar = 0; ``clip`` as in
            ``ddim_step``).  n > 0 solves each step of ``render`` on the same grid for its input with n fixed-point
            iterations: rendering then returns to x_0 up to the iteration error.

    Costs ``len(grid) * max(1, iterations)`` evaluations an image.
    """
    if iterations == 0:
        x = x_0
        levels = [schedule.abar[t] for t in grid] + [torch.zeros((), dtype=torch.float64)]
        for t, a, b in zip(grid, levels[:-1], levels[1:], strict=True):
            times = torch.full((len(x),), int(t), device=x.device, dtype=torch.long)
            x = ddim_step(x, denoise(x, times, z).float(), a.to(x), b.to(x), clip=clip)
        return x
    x = x_0
    for t, abar_from, abar_to in reversed(list(_downward(schedule, grid, x))):
        # ddim_step is x_s = ratio * x_t + slope * eps(x_t): iterate x_t <- (x_s - slope * eps(x_t)) / ratio.
        ratio = (abar_to / abar_from).sqrt()
        slope = (1 - abar_to).sqrt() - ratio * (1 - abar_from).sqrt()
        guess = x
        for _ in range(iterations):
            guess = (x - slope * denoise(guess, t, z).float()) / ratio
        x = guess
    return x


def _downward(schedule: Schedule, grid: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The steps of a rendering: times (B,), level they start from, level they end at; the last ends at abar = 1."""
    abar = torch.cat([torch.ones(1, dtype=torch.float64), schedule.abar[grid.cpu()]]).to(x.device).to(x.dtype)
    for i in range(len(grid) - 1, -1, -1):
        yield torch.full((len(x),), int(grid[i]), device=x.device, dtype=torch.long), abar[i + 1], abar[i]
