"""Stage 1: the classifier-aware diffusion autoencoder.

    z      = Linear(concat[p(x), E(x)])                                    p(x) = softmax C(x), the classifier's verdict
    L      = L_simple + lambda_1 * KL( p(x) || p(x^) )
    x^     = the one-step estimate of x at the sampled time, weighted by abar_t ('one_step'), or the end of the last n
             DDIM steps, differentiated through ('truncated'); either way the gradient reaches encoder and U-Net

The U-Net's output stands for eps (published) or for v = sqrt(abar) eps - sqrt(1 - abar) x_0; ``denoise`` always
returns eps.  Weighting 'v' is the error of v, which is the eps error divided by abar_t: it keeps the noisy end, where
only z says what the image is, in the loss.

Source: Bourou et al., "DiffEx", arXiv 2502.09663; Preechakul et al., CVPR 2022; Salimans & Ho, ICLR 2022 (v).
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffex import diffusion
from diffex.compute import Compute
from diffex.config import Autoencoder, Rendering
from diffex.diffusion import Schedule
from diffex.errors import UserError
from diffex.networks import Encoder, UNet


class Code(NamedTuple):
    """What an image is encoded to: z (B, d), the classifier's p (B, n_classes), and x_T (B, C, H, W)."""

    z: Tensor
    probs: Tensor
    x_T: Tensor


class DiffusionAutoencoder(nn.Module):
    """Semantic encoder, conditioned on the classifier's verdict, and conditional diffusion decoder.

    Args:
        settings: section ``autoencoder``.
        rendering: section ``rendering``.
        channels: image channels C.
        size: side of the images.
        num_classes: width of p.
        compute: device and precision; the module is moved there.
    """

    def __init__(
        self,
        settings: Autoencoder,
        rendering: Rendering,
        *,
        channels: int,
        size: int,
        num_classes: int,
        compute: Compute,
    ) -> None:
        super().__init__()
        s, self.rendering = settings, rendering
        self.settings = settings
        self.shape, self.num_classes, self.compute = (channels, size, size), num_classes, compute
        self.schedule = Schedule.linear()
        self.unet = UNet(
            channels, size, widths=s.widths, blocks=s.blocks, attention=s.attention, code_dim=s.code_dim,
            patch=s.patch, coordinates=s.coordinates, dropout=s.dropout,
        )  # fmt: skip
        self.encoder = Encoder(
            channels, size, widths=s.encoder_widths, blocks=s.encoder_blocks, attention=s.attention,
            code_dim=s.code_dim, patch=s.patch, coordinates=s.coordinates, standardise=s.standardise,
        )  # fmt: skip
        self.project = nn.Linear(num_classes + s.code_dim, s.code_dim)
        self.to(compute.device)

    # ------------------------------------------------------------------------------------------------------------------
    # Encoding and decoding

    @property
    def grid(self) -> Tensor:
        """Times of rendering (and of fixed-point inversion), ascending."""
        return self.schedule.grid(self.rendering.steps, self.rendering.spacing)

    @property
    def encode_evaluations(self) -> int:
        """U-Net evaluations that inverting one image costs."""
        s = self.rendering
        return len(self.grid) * s.iterations if s.inversion == "fixed_point" else s.encode_steps

    @property
    def render_evaluations(self) -> int:
        """U-Net evaluations that rendering one image costs."""
        return len(self.grid)

    def semantic(self, x: Tensor, probs: Tensor) -> Tensor:
        """Codes z (B, d) float32 of images x (B, C, H, W) with the classifier's verdict probs (B, n_classes)."""
        with self.compute.autocast():
            w = self.encoder(x)
        return self.project(torch.cat([probs, w.float()], dim=1))

    def denoise(self, x_t: Tensor, t: Tensor, z: Tensor) -> Tensor:
        """The noise eps (B, C, H, W) float32 in x_t at times t (B,), given codes z (B, d)."""
        with self.compute.autocast():
            out = self.unet(x_t, t, z)
        out = out.float()
        if self.settings.prediction == "eps":
            return out
        abar = self.schedule.at(t, x_t)
        return abar.sqrt() * out + (1 - abar).sqrt() * x_t

    @torch.no_grad()
    def encode(self, x: Tensor, probs: Tensor) -> Code:
        """Encode images x (B, C, H, W) in [-1, 1], with the classifier's probs (B, n_classes), to both codes."""
        z = self.semantic(x, probs)
        return Code(z, probs, self.invert(x, z))

    @torch.no_grad()
    def invert(self, x: Tensor, z: Tensor) -> Tensor:
        """Stochastic codes x_T (B, C, H, W) from which rendering with z returns to x."""
        s = self.rendering
        if s.inversion == "fixed_point":
            return diffusion.invert(self.denoise, self.schedule, x, z, self.grid, iterations=s.iterations)
        grid = self.schedule.grid(s.encode_steps, s.spacing)
        return diffusion.invert(self.denoise, self.schedule, x, z, grid)

    @torch.no_grad()
    def decode(self, z: Tensor, x_T: Tensor) -> Tensor:
        """Render images (B, C, H, W) in [-1, 1] from codes z (B, d) and x_T (B, C, H, W)."""
        return diffusion.render(self.denoise, self.schedule, x_T, z, self.grid).clamp_(-1.0, 1.0)

    def expected_image(self, z: Tensor) -> Tensor:
        """What z alone says of the image: the one-step estimate from the noisiest time, at zero noise, (B, C, H, W).

        One network evaluation; differentiable in z.  With little left of x_0 in x_T this is the mean image given z.
        """
        x_T = torch.zeros(len(z), *self.shape, device=z.device)
        t = torch.full((len(z),), self.schedule.num_times - 1, device=z.device, dtype=torch.long)
        return diffusion.estimate_x_0(x_T, self.denoise(x_T, t, z), self.schedule.at(t, x_T))

    # ------------------------------------------------------------------------------------------------------------------
    # Training

    def loss(
        self, x: Tensor, probs: Tensor, t: Tensor, noise: Tensor, *, classifier: nn.Module | None = None,
        lambda1: float = 0.0,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Total loss and its parts, for images x (B, C, H, W) with verdicts probs (B, n_classes).

        Args:
            t: (B,) times.
            noise: (B, C, H, W) standard normal.
            classifier: frozen classifier; None or lambda1 = 0 leave the classifier term out.
            lambda1: weight of the classifier term.

        Returns:
            Scalar loss with gradient, and detached scalars ``simple`` and, with the term, ``classifier``.
        """
        z = self.semantic(x, probs)
        error, estimate = diffusion.simple_loss(self.denoise, self.schedule, x, t, z, noise)
        weight = 1.0 / self.schedule.at(t, error) if self.settings.weighting == "v" else 1.0
        simple = (weight * error).mean()
        parts = {"simple": simple.detach()}
        if classifier is None or lambda1 == 0:
            return simple, parts
        if self.settings.classifier_term == "one_step":
            # A blurred estimate tells little about the verdict: its share falls with the signal left at time t.
            share = self.schedule.at(t, error)
            term = (share * classifier_divergence(probs, classifier(estimate))).mean()
        else:
            term = classifier_divergence(probs, classifier(self._last_steps(x, z, noise))).mean()
        parts["classifier"] = term.detach()
        return simple + lambda1 * term, parts

    def _last_steps(self, x: Tensor, z: Tensor, noise: Tensor) -> Tensor:
        """Render the last n DDIM steps from a diffused image, with gradient through all of them."""
        grid = self.grid[: self.settings.truncated_steps]
        start = diffusion.diffuse(x, noise, self.schedule.abar[grid[-1]].to(x))
        return diffusion.render(self.denoise, self.schedule, start, z, grid)

    # ------------------------------------------------------------------------------------------------------------------
    # Files

    def save(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into the folder."""
        config = {"autoencoder": asdict(self.settings), "channels": self.shape[0], "size": self.shape[1],
                  "num_classes": self.num_classes}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        save_file({k: v.contiguous().cpu() for k, v in self.state_dict().items()}, folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path, rendering: Rendering, compute: Compute) -> DiffusionAutoencoder:
        """Read a model written by ``save``: evaluation mode, no gradients into parameters."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            settings: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in config.pop("autoencoder").items()
            }
            model = cls(Autoencoder(**settings), rendering, compute=compute, **config)
            model.load_state_dict(load_file(folder / "model.safetensors", device=str(compute.device)))
        except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{str(folder)!r} holds no readable diffusion autoencoder: {error}") from None
        return model.eval().requires_grad_(False)


def classifier_divergence(probs: Tensor, logits: Tensor) -> Tensor:
    """``KL( p(x) || p(x^) )`` of each image, (B,), in nats; gradient flows to the logits.

    Args:
        probs: p(x), (B, n_classes).
        logits: C(x^), (B, n_classes).
    """
    return F.kl_div(logits.log_softmax(dim=1), probs, reduction="none").sum(dim=1)
