"""The networks: AdaGN U-Net, semantic encoder, small residual classifier.

Shapes are ``(B, C, H, W)``; images are float in [-1, 1].  Widths and depths are arguments, nothing is global.
Source: Preechakul et al., "Diffusion Autoencoders", CVPR 2022 (two-condition AdaGN); Dhariwal & Nichol, "Diffusion
Models Beat GANs", NeurIPS 2021 (residual up/down blocks, attention heads).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffex.team import ALONE, Team

# ----------------------------------------------------------------------------------------------------------------------
# Pieces


def timestep_embedding(t: Tensor, dim: int, *, max_period: float = 10_000.0) -> Tensor:
    """Sinusoidal embedding of the diffusion time.

    Args:
        t: (B,) times in 0..T-1, integer or float.
        dim: even width of the embedding.

    Returns:
        (B, dim) float32: cosines, then sines, of t at dim/2 geometric frequencies.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    angle = t.float()[:, None] * frequency[None]
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 32) if channels % 32 else 32, channels)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """A zero-initialised output convolution: the residual branch starts as nothing."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """Residual block, optionally conditioned by AdaGN: ``h = (1 + z_s) * ((1 + t_s) * GroupNorm(h) + t_b)``.

    ``change`` is 'up', 'down' or None: the resolution change happens inside the block, on both branches.
    """

    def __init__(
        self, inside: int, outside: int, *, time_dim: int = 0, code_dim: int = 0, change: str | None = None,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.change = change
        self.norm1, self.conv1 = _norm(inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2, self.conv2 = _norm(outside), _zero(nn.Conv2d(outside, outside, 3, padding=1))
        self.time = nn.Linear(time_dim, 2 * outside) if time_dim else None
        self.code = nn.Linear(code_dim, outside) if code_dim else None
        self.dropout = nn.Dropout(dropout)
        self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

    def _resample(self, x: Tensor) -> Tensor:
        if self.change == "down":
            return F.avg_pool2d(x, 2)
        if self.change == "up":
            return F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x

    def forward(self, x: Tensor, time: Tensor | None = None, code: Tensor | None = None) -> Tensor:
        h = self.conv1(self._resample(F.silu(self.norm1(x))))
        h = self.norm2(h)
        if self.time is not None and time is not None:
            t_s, t_b = self.time(time)[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + t_s) + t_b
        if self.code is not None and code is not None:
            h = h * (1 + self.code(code)[:, :, None, None])
        h = self.conv2(self.dropout(F.silu(h)))
        return self.skip(self._resample(x)) + h


class SelfAttention(nn.Module):
    """Multi-head self-attention over all pixels of a feature map, residual, zero-initialised."""

    def __init__(self, channels: int, *, head_dim: int = 32) -> None:
        super().__init__()
        self.heads = max(1, channels // head_dim)
        self.norm, self.qkv = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        q, k, v = (
            self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, height * width).transpose(-1, -2).unbind(1)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, height, width)
        return x + self.out(h)


def fold(x: Tensor, patch: int, coordinates: bool) -> Tensor:
    """What the first convolution sees: pixels folded into channels by ``patch``, and where each of them lies.

    The two coordinate channels run from -1 to 1.  A convolutional decoder fed with pure noise has no other way of
    knowing left from right, so without them a code can hardly say *where* something is.
    """
    x = F.pixel_unshuffle(x, patch) if patch > 1 else x
    if not coordinates:
        return x
    down, across = (torch.linspace(-1, 1, side, device=x.device, dtype=x.dtype) for side in x.shape[2:])
    where = torch.stack([down[:, None].expand(x.shape[2:]), across[None, :].expand(x.shape[2:])])
    return torch.cat([x, where.expand(len(x), -1, -1, -1)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Batch normalisation over a team


class BatchNorm(_BatchNorm):
    """Batch normalisation of (B, C, ...) by the images of all workers, as if one had them all.

    In evaluation mode, or alone, it is torch's own.  Statistics are float32; parameters and buffers have torch's names.
    With gradient accumulation a batch is what the workers hold at a time, not the whole batch.

    Source: Ioffe & Szegedy, ICML 2015; variances of shares are put together as in Chan et al., Am. Stat. 37 (1983).
    """

    team: Team = ALONE

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.dim() < 2:
            raise ValueError(f"batch normalisation of {list(input.shape)}: give (B, C, ...)")

    def forward(self, x: Tensor) -> Tensor:
        if self.team.size == 1 or not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        h, axes, size = x.float(), [0, *range(2, x.dim())], self.team.size
        n = h.numel() // h.shape[1]
        if n:
            var, mean = torch.var_mean(h, axes, correction=0)
        else:  # a worker without a share takes part in the exchange all the same, on the way back too
            var = mean = h.sum(axes)
        facts = self.team.gather(torch.stack([torch.full_like(mean, n), mean, var])[None], size)
        count, means, variances = facts.unbind(1)
        total = count[:, 0].sum()
        share = count / total
        mean = (share * means).sum(0)
        var = (share * (variances + (means - mean).square())).sum(0)
        self._remember(mean.detach(), var.detach() * total / (total - 1).clamp_min(1))
        shape = [1, -1, *[1] * (x.dim() - 2)]
        h = (h - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            h = h * self.weight.view(shape) + self.bias.view(shape)
        return h.to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(var.to(self.running_var), momentum)


def join(network: nn.Module, team: Team) -> None:
    """Make every batch normalisation inside a network, in place, one over the team; alone, nothing changes.

    Parameters and buffers, and their names, stay what they are.
    """
    if team.size == 1:
        return
    for parent in list(network.modules()):
        for name, old in list(parent.named_children()):
            if isinstance(old, _BatchNorm):
                new = BatchNorm(old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats)
                new._parameters, new._buffers = old._parameters, old._buffers
                new.training, new.team = old.training, team
                setattr(parent, name, new)


# ----------------------------------------------------------------------------------------------------------------------
# Networks


class UNet(nn.Module):
    """Noise predictor ``eps_theta(x_t, t, z)``: ADM U-Net, every block modulated by time and semantic code.

    Args:
        channels: image channels C.
        size: side H = W of the images in pixels; ``patch * 2**(len(widths) - 1)`` must divide it.
        widths: feature channels of each level, finest first.
        blocks: residual blocks a level.
        attention: feature-map sides (in pixels of the feature map) that get self-attention.
        code_dim: d, width of z.
        patch: pixels are folded into channels by this factor first (1: the paper's network; 2: a quarter of the cost).
        coordinates: whether the network is told where each pixel lies (published: not).
        dropout: dropout inside the residual blocks.
    """

    def __init__(
        self, channels: int, size: int, *, widths: Sequence[int], blocks: int, attention: Sequence[int],
        code_dim: int, patch: int = 1, coordinates: bool = False, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.coordinates = patch, coordinates
        folded, side = channels * patch * patch, size // patch
        time_dim = 4 * widths[0]
        self.base = widths[0]
        self.time = nn.Sequential(nn.Linear(widths[0], time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim), nn.SiLU())
        condition: dict[str, Any] = {"time_dim": time_dim, "code_dim": code_dim, "dropout": dropout}

        self.stem = nn.Conv2d(folded + 2 * coordinates, widths[0], 3, padding=1)
        self.down, skips, width = nn.ModuleList(), [widths[0]], widths[0]
        for level, out in enumerate(widths):
            for _ in range(blocks):
                self.down.append(_Stage(width, out, attend=side in attention, **condition))
                width = out
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(_Stage(width, width, change="down", **condition))
                side //= 2
                skips.append(width)
        self.middle = nn.ModuleList(
            [_Stage(width, width, attend=side in attention, **condition), _Stage(width, width, **condition)]
        )
        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(_Stage(width + skips.pop(), out, attend=side in attention, **condition))
                width = out
            if level > 0:
                self.up.append(_Stage(width, width, change="up", **condition))
                side *= 2
        self.norm, self.head = _norm(width), _zero(nn.Conv2d(width, folded, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """Predict the noise in x_t (B, C, H, W) at times t (B,) given codes z (B, d); returns (B, C, H, W)."""
        time = self.time(timestep_embedding(t, self.base).to(z.dtype))
        h = self.stem(fold(x_t, self.patch, self.coordinates))
        skips = [h]
        for stage in self.down:
            h = stage(h, time, z)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, time, z)
        for stage in self.up:
            h = stage(h if stage.changes_size else torch.cat([h, skips.pop()], dim=1), time, z)
        h = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(h, self.patch) if self.patch > 1 else h


class _Stage(nn.Module):
    """A residual block and, where asked, attention after it."""

    def __init__(self, inside: int, outside: int, *, attend: bool = False, change: str | None = None,
                 time_dim: int = 0, code_dim: int = 0, dropout: float = 0.0) -> None:  # fmt: skip
        super().__init__()
        self.changes_size = change is not None
        self.block = ResidualBlock(
            inside, outside, time_dim=time_dim, code_dim=code_dim, change=change, dropout=dropout
        )
        self.attention = SelfAttention(outside) if attend else nn.Identity()

    def forward(self, x: Tensor, time: Tensor | None = None, code: Tensor | None = None) -> Tensor:
        return self.attention(self.block(x, time, code))


class Encoder(nn.Module):
    """Semantic encoder ``E(x) -> w``: the down half of the U-Net without conditions, averaged over pixels.

    Args:
        channels, size, widths, blocks, attention, patch, coordinates: as in ``UNet``.
        code_dim: d, width of w.
        standardise: give every dimension of w mean 0 and variance 1 over the batch (published: not).
    """

    def __init__(
        self, channels: int, size: int, *, widths: Sequence[int], blocks: int, attention: Sequence[int],
        code_dim: int, patch: int = 1, coordinates: bool = False, standardise: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.patch, self.coordinates = patch, coordinates
        side, width = size // patch, widths[0]
        stages: list[nn.Module] = [nn.Conv2d(channels * patch * patch + 2 * coordinates, width, 3, padding=1)]
        for level, out in enumerate(widths):
            for _ in range(blocks):
                stages.append(_Stage(width, out, attend=side in attention))
                width = out
            if level < len(widths) - 1:
                stages.append(_Stage(width, width, change="down"))
                side //= 2
        self.body = nn.Sequential(*stages, _norm(width), nn.SiLU())
        # Pooled features differ little from image to image, so an untrained code hardly varies and is learnt slowly:
        # normalising it over the batch gives the decoder something to listen to from the first step.
        normalise = [nn.BatchNorm1d(code_dim, affine=False, momentum=0.02)] if standardise else []
        self.head = nn.Sequential(nn.Linear(width, code_dim), *normalise)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images (B, C, H, W) in [-1, 1] to w (B, d)."""
        h = self.body(fold(x, self.patch, self.coordinates))
        return self.head(h.mean(dim=(2, 3)))


class ResidualClassifier(nn.Module):
    """Small residual network with batch normalisation: images to ``outputs`` numbers (logits, or regressed factors).

    Args:
        channels: image channels C.
        outputs: numbers returned for an image.
        width: channels of the first level; doubled at each of the ``levels``, each halving the side.
    """

    def __init__(self, channels: int, outputs: int, *, width: int = 24, levels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        stages, inside = [], width
        for level in range(levels):
            stages.append(_DownBlock(inside, width * 2**level))
            inside = width * 2**level
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inside, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] to (B, outputs)."""
        return self.head(self.stages(self.stem(x)).mean(dim=(2, 3)))


class _DownBlock(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.skip = nn.Conv2d(inside, outside, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.skip(x))
