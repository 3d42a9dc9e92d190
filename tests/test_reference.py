"""Every formula shared with the reference implementation reproduces its numbers.

Tolerances are relative to the largest entry of an array: 1e-6 unless a test says why it is wider.  The vectors and
where they come from are described in ``reference.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffex import metrics
from diffex.compute import Compute
from diffex.config import Autoencoder, Rendering
from diffex.diffusion import Schedule, ddim_step, diffuse, estimate_x_0, invert, render, simple_loss
from diffex.directions import DirectionModels, contrastive_loss, projector, published_covariance
from diffex.model import DiffusionAutoencoder, classifier_divergence
from diffex.networks import timestep_embedding
from diffex.ranking import SIGNS, greedy_selection

SCHEDULE = Schedule.linear()


@pytest.fixture(scope="module")
def ref() -> Mapping[str, Tensor]:
    with np.load(Path(__file__).with_name("reference.npz")) as file:
        return {name: torch.from_numpy(np.array(file[name])) for name in file.files}


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, over the largest entry of the reference b."""
    assert a.shape == b.shape
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def analytic(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    """The stand-in for a network with which the reference ran its loops."""
    return 0.3 * x + 0.1 * cond.mean(dim=1)[:, None, None, None] + 1e-3 * t[:, None, None, None]


# ----------------------------------------------------------------------------------------------------------------------
# Diffusion


def test_noise_schedule(ref: Mapping[str, Tensor]) -> None:
    assert relative(SCHEDULE.abar, ref["schedule/alphas_cumprod"]) < 1e-15


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 250])
def test_uniform_respacing(ref: Mapping[str, Tensor], steps: int) -> None:
    grid = SCHEDULE.grid(steps)
    assert torch.equal(grid, ref[f"spaced{steps}/timesteps"])
    assert relative(SCHEDULE.abar[grid], ref[f"spaced{steps}/alphas_cumprod"]) < 1e-15


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 250])
def test_rendering_ends_at_no_noise_and_inversion_at_no_signal(ref: Mapping[str, Tensor], steps: int) -> None:
    abar = SCHEDULE.abar[SCHEDULE.grid(steps)]
    down = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
    up = torch.cat([abar[1:], torch.zeros(1, dtype=torch.float64)])
    assert relative(down, ref[f"spaced{steps}/alphas_cumprod_prev"]) < 1e-15
    assert relative(up, ref[f"spaced{steps}/alphas_cumprod_next"]) < 1e-15


STEPS = [(steps, i) for steps, places in ((20, (0, 1, 10, 18, 19)), (50, (0, 1, 25, 48, 49))) for i in places]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("steps", "i"), STEPS)
def test_one_ddim_step_both_ways(ref: Mapping[str, Tensor], steps: int, i: int, clip: bool) -> None:
    """Clipping at t = 0 divides by sqrt(1 - abar_0) = 0.01: float32 leaves 1e-4 of the noise derived there, and 1e-5
    of the estimate near the noisy end, where the unclipped one is 500 times larger."""
    x, eps, case = ref["ddim/x"], ref["ddim/eps"], f"ddim/T{steps}/i{i}/clip{int(clip)}"
    grid = SCHEDULE.grid(steps)
    assert int(grid[i]) == int(ref[f"{case}/model_t"][0])
    abar = SCHEDULE.abar[grid].float()
    levels = torch.cat([torch.ones(1), abar, torch.zeros(1)])
    down = ddim_step(x, eps, abar[i], levels[i], clip=clip)
    up = ddim_step(x, eps, abar[i], levels[i + 2], clip=clip)
    assert relative(down, ref[f"{case}/step_sample"]) < (4e-6 if clip and i == 0 else 1e-6)
    assert relative(up, ref[f"{case}/reverse_sample"]) < (1e-4 if clip and i == 0 else 1.1e-6)
    estimate = estimate_x_0(x, eps, abar[i])
    estimate = estimate.clamp(-1, 1) if clip else estimate
    assert relative(estimate, ref[f"{case}/step_pred_xstart"]) < (5e-6 if clip else 1e-6)


def test_diffusing_images(ref: Mapping[str, Tensor]) -> None:
    x_0, t = ref["ddim/x0"], ref["ddim/qsample_t"]
    assert relative(diffuse(x_0, ref["ddim/eps"], SCHEDULE.at(t, x_0)), ref["ddim/qsample"]) < 1e-6


def test_inversion_in_fifty_steps(ref: Mapping[str, Tensor]) -> None:
    """Fifty float32 steps accumulate 2.6e-6."""
    x_T = invert(analytic, SCHEDULE, ref["loop/x0"], ref["loop/cond"], SCHEDULE.grid(50), clip=True)
    assert relative(x_T, ref["loop/encode50"]) < 5e-6


def test_rendering_in_twenty_steps(ref: Mapping[str, Tensor]) -> None:
    """Twenty float32 steps accumulate 1.7e-6."""
    x = render(analytic, SCHEDULE, ref["loop/encode50"], ref["loop/cond"], SCHEDULE.grid(20), clip=True)
    assert relative(x, ref["loop/render20"]) < 5e-6


def test_inversion_then_rendering(ref: Mapping[str, Tensor]) -> None:
    """Seventy float32 steps accumulate 2.2e-6."""
    x_T = invert(analytic, SCHEDULE, ref["loop/x0"], ref["loop/cond"], SCHEDULE.grid(50), clip=True)
    x = render(analytic, SCHEDULE, x_T, ref["loop/cond"], SCHEDULE.grid(20), clip=True)
    assert relative(x, ref["loop/render20"]) < 5e-6


def test_training_loss_and_estimate(ref: Mapping[str, Tensor]) -> None:
    noise, x_0, t = ref["ddim/eps"], ref["ddim/x0"], ref["ddim/qsample_t"]
    loss, estimate = simple_loss(lambda x_t, t, z: 0.9 * noise, SCHEDULE, x_0, t, ref["loop/cond"], noise)
    assert relative(loss, ref["train/loss_per_sample"]) < 1e-6
    assert relative(estimate, ref["train/pred_xstart"]) < 1e-6


def test_time_embedding(ref: Mapping[str, Tensor]) -> None:
    assert relative(timestep_embedding(ref["temb/t"], 32), ref["temb/dim32"]) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# The classifier's part in stage 1


def test_semantic_code_joins_probabilities_and_encoding(ref: Mapping[str, Tensor]) -> None:
    settings = Autoencoder(code_dim=16, widths=(8,), encoder_widths=(8,))
    model = DiffusionAutoencoder(
        settings, Rendering(), channels=1, size=8, num_classes=2, compute=Compute(torch.device("cpu"), False)
    )
    model.project.load_state_dict({"weight": ref["zsem/weight"], "bias": ref["zsem/bias"]})
    model.encoder.forward = lambda x: ref["zsem/w"]  # type: ignore[method-assign]
    z = model.semantic(torch.zeros(4, 1, 8, 8), ref["zsem/logits"].softmax(dim=1))
    assert relative(z, ref["zsem/z"]) < 1e-6


def test_classifier_divergence(ref: Mapping[str, Tensor]) -> None:
    each = classifier_divergence(ref["kl/logits_original"].softmax(dim=1), ref["kl/logits_generated"])
    assert relative(each.mean(), ref["kl/batchmean"]) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2


def test_contrastive_loss_and_its_gradient(ref: Mapping[str, Tensor]) -> None:
    """The loss is a small difference of two logarithms near 1: 1e-6 of those, not of their difference."""
    features = ref["contrastive/features"].clone().requires_grad_()
    loss = contrastive_loss(features.view(5, 8, 16), tau=0.5)
    loss.backward()
    assert abs(float(loss.detach() - ref["contrastive/abs1_mean_loss"])) < 1e-6
    assert relative(features.grad, ref["contrastive/grad_abs1_mean"]) < 1e-6


def test_published_covariance(ref: Mapping[str, Tensor]) -> None:
    assert relative(published_covariance(ref["cov/dz_k_n_size"]), ref["cov/non_diag_sum"]) < 1e-6


def direction_models(ref: Mapping[str, Tensor], kind: str) -> DirectionModels:
    """Three direction models with the weights of the reference, network by network."""
    models = DirectionModels(3, 8, kind={"nonlinear": "mlp"}.get(kind, kind), depth=3)
    if kind == "fixed":
        models.load_state_dict({"anchor": ref["dir/fixed/state/params"]})
        return models

    def each(name: str) -> Tensor:
        return torch.stack([ref[f"dir/{kind}/state/nets.{k}.{name}"] for k in range(3)])

    state = models.state_dict()
    for layer in range(len(models.weights)):
        state[f"weights.{layer}"] = each(f"linear_{layer + 1}.weight")
    for layer in range(len(models.biases)):
        state[f"biases.{layer}"] = each(f"linear_{layer + 1}.bias")
    for layer in range(len(models.norms)):
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[f"norms.{layer}.{name}"] = each(f"batchnorm_{layer + 1}.{name}").flatten()
    models.load_state_dict(state)
    return models


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", ["nonlinear", "linear", "fixed"])
def test_shifted_codes(ref: Mapping[str, Tensor], kind: str, mode: str) -> None:
    models = direction_models(ref, kind).train(mode == "train")
    z = ref["dir/z"]
    shifted = z + 0.1 * models.unit(z)
    assert relative(shifted.reshape(18, 8), ref[f"dir/{kind}/{mode}_out"]) < 1e-6


@pytest.mark.parametrize("kind", ["nonlinear", "linear", "fixed"])
def test_one_direction_backwards(ref: Mapping[str, Tensor], kind: str) -> None:
    models = direction_models(ref, kind).eval()
    z = ref["dir/z"]
    assert relative(z - 3.0 * models.unit(z)[1], ref[f"dir/{kind}/eval_single_k1_alpha_minus3"]) < 1e-6


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_projector(ref: Mapping[str, Tensor], mode: str) -> None:
    network = projector(8, 4, 6)
    places = {"linear_1": 0, "batchnorm_1": 1, "linear_2": 3, "batchnorm_2": 4, "linear_3": 6}
    state = network.state_dict()
    for name, place in places.items():
        for part in ("weight", "bias", "running_mean", "running_var"):
            if f"proj/state/net.{name}.{part}" in ref:
                state[f"{place}.{part}"] = ref[f"proj/state/net.{name}.{part}"]
    network.load_state_dict(state)
    out = F.normalize(network.train(mode == "train")(ref["dir/z"]), dim=-1)
    assert relative(out, ref[f"proj/{mode}_out"]) < 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Stage 3


def test_image_similarity(ref: Mapping[str, Tensor]) -> None:
    a, b = ref["metric/a"] * 2 - 1, ref["metric/b"] * 2 - 1  # the reference measures images in [0, 1]
    assert relative(metrics.ssim(a, b), ref["metric/ssim_per_image"]) < 1e-6
    assert relative(metrics.mse(a, b), ref["metric/mse"]) < 1e-6
    assert relative(metrics.psnr(a, b), ref["metric/psnr"]) < 1e-6


def test_greedy_selection(ref: Mapping[str, Tensor]) -> None:
    chosen, unexplained = greedy_selection(ref["attfind/E_n_k_sign"].numpy(), int(ref["attfind/M"]))
    assert [c.direction for c in chosen] == ref["attfind/clean/coords"].tolist()
    assert [SIGNS[c.sign] for c in chosen] == ref["attfind/clean/signs"].tolist()
    assert [c.unexplained for c in chosen] == ref["attfind/clean/images_alive_when_chosen"].tolist()
    assert [c.effect for c in chosen] == pytest.approx(ref["attfind/clean/effects"].tolist(), rel=1e-6)
    assert unexplained.tolist() == ref["attfind/clean/alive_at_end"].tolist()
