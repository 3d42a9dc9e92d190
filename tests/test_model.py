"""Stage 1: the classifier term trains encoder and U-Net, codes lead back to their images, files lead back to models."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Autoencoder, Rendering
from diffex.diffusion import diffuse, estimate_x_0
from diffex.errors import UserError
from diffex.model import DiffusionAutoencoder, classifier_divergence
from diffex.networks import ResidualClassifier

SETTINGS = Autoencoder(code_dim=6, widths=(8, 8), encoder_widths=(8, 8))
RENDERING = Rendering(steps=4, iterations=4)
CPU = Compute(torch.device("cpu"), False)


def autoencoder(channels: int = 2, rendering: Rendering = RENDERING, **changes: object) -> DiffusionAutoencoder:
    """A fresh autoencoder, with small numbers where a fresh network has zeros: it predicts something."""
    torch.manual_seed(0)
    settings = replace(SETTINGS, **changes)  # type: ignore[arg-type]
    model = DiffusionAutoencoder(settings, rendering, channels=channels, size=16, num_classes=2, compute=CPU)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def frozen(channels: int = 2) -> FrozenClassifier:
    """A classifier that has not learnt anything, but is sure of itself."""
    torch.manual_seed(1)
    network = ResidualClassifier(channels, 2, width=4)
    nn.init.normal_(network.head.weight, std=5.0)
    return FrozenClassifier(network, ("a", "b"))


def inputs(channels: int = 2, n: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, the classifier's verdicts on them, times and noise."""
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(n, channels, 16, 16, generator=generator) * 2 - 1
    t = torch.randint(0, 1000, (n,), generator=generator)
    return x, frozen(channels).probabilities(x), t, torch.randn(x.shape, generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# The classifier term

TERMS = pytest.mark.parametrize("term", ["one_step", "truncated"])


def classifier_term(model: DiffusionAutoencoder) -> float:
    with torch.no_grad():
        return float(model.loss(*inputs(), classifier=frozen(), lambda1=1.0)[1]["classifier"])


@TERMS
@pytest.mark.parametrize("part", ["encoder", "unet", "project"])
def test_the_classifier_term_trains_the(part: str, term: str) -> None:
    """Its gradient in that part alone is the slope of the term: a small step against it lowers it as predicted."""
    model = autoencoder(classifier_term=term)
    parameters = [p for name, p in model.named_parameters() if name.startswith(part)]
    weight = 1e6  # so that the gradient of the other loss, taken off again, leaves no rounding behind
    with_term, without = (model.loss(*inputs(), classifier=frozen(), lambda1=w)[0] for w in (weight, 0.0))
    gradients = [
        (a - b) / weight
        for a, b in zip(
            torch.autograd.grad(with_term, parameters), torch.autograd.grad(without, parameters), strict=True
        )
    ]
    slope = sum(float(g.square().sum()) for g in gradients)
    before = classifier_term(model)
    assert slope > 1e-8 * before**2
    step = 0.01 * before / slope  # predicted to lower the term by a hundredth
    with torch.no_grad():
        step = min(step, 0.05 / max(float(g.abs().max()) for g in gradients))
        for p, g in zip(parameters, gradients, strict=True):
            p -= step * g
    assert before - classifier_term(model) == pytest.approx(step * slope, rel=0.3)


@TERMS
def test_the_classifier_itself_gets_no_gradient(term: str) -> None:
    model, classifier = autoencoder(classifier_term=term), frozen()
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    loss, _ = model.loss(*inputs(), classifier=classifier, lambda1=1.0)
    loss.backward()
    assert all(p.grad is None for p in classifier.parameters())
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())


@TERMS
def test_the_classifier_term_is_weighted_by_lambda1(term: str) -> None:
    model, classifier = autoencoder(classifier_term=term), frozen()
    plain, parts = model.loss(*inputs())
    total, with_term = model.loss(*inputs(), classifier=classifier, lambda1=2.5)
    assert "classifier" not in parts
    assert float(with_term["classifier"]) > 0
    assert float(total.detach()) == pytest.approx(float(plain.detach() + 2.5 * with_term["classifier"]), rel=1e-5)


def test_lambda1_of_zero_is_as_no_classifier_at_all() -> None:
    model = autoencoder()
    without, parts = model.loss(*inputs())
    zero, zero_parts = model.loss(*inputs(), classifier=frozen(), lambda1=0.0)
    assert torch.equal(without, zero)
    assert set(parts) == set(zero_parts) == {"simple"}


def test_the_one_step_term_counts_less_at_the_noisy_end() -> None:
    """It is the divergence of the one-step estimate, times the signal left at time t."""
    model, classifier = autoencoder(), frozen()
    x, probs, t, noise = inputs()
    abar = model.schedule.at(t, x)
    x_t = diffuse(x, noise, abar)
    estimate = estimate_x_0(x_t, model.denoise(x_t, t, model.semantic(x, probs)), abar)
    expected = (abar.flatten() * classifier_divergence(probs, classifier(estimate))).mean()
    _, parts = model.loss(x, probs, t, noise, classifier=classifier, lambda1=1.0)
    assert float(parts["classifier"]) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_the_truncated_term_judges_the_end_of_the_rendering() -> None:
    """Near the image there is little noise to mistake: with one step from t = 0 the verdict hardly changes."""
    x, probs, t, noise = inputs()
    terms = []
    for steps in (1, 3):
        model = autoencoder(classifier_term="truncated", truncated_steps=steps)
        terms.append(float(model.loss(x, probs, t, noise, classifier=frozen(), lambda1=1.0)[1]["classifier"]))
    assert terms[0] < terms[1]


def test_divergence_is_zero_only_for_the_same_verdict() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    probs = logits.softmax(dim=1)
    assert torch.allclose(classifier_divergence(probs, logits), torch.zeros(2), atol=1e-6)
    assert torch.allclose(classifier_divergence(probs, logits + 7.0), torch.zeros(2), atol=1e-6)
    assert (classifier_divergence(probs, logits.flip(1) + torch.tensor([0.0, 1.0, 0.0])) > 1e-2).all()


def test_divergence_is_the_weighted_log_ratio() -> None:
    p, q = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.4, 0.6]])
    expected = 0.8 * torch.tensor(2.0).log() + 0.2 * torch.tensor(1 / 3).log()
    assert float(classifier_divergence(p, q.log())) == pytest.approx(float(expected), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Prediction and weighting


def test_v_and_eps_stand_for_the_same_noise() -> None:
    """A network that answers the true v, or the true eps, denoises to the true eps."""
    x, probs, t, noise = inputs()
    for prediction in ("v", "eps"):
        model = autoencoder(prediction=prediction)
        abar = model.schedule.at(t, x)
        answer = noise if prediction == "eps" else abar.sqrt() * noise - (1 - abar).sqrt() * x
        model.unet.forward = lambda x_t, t, z, answer=answer: answer  # type: ignore[method-assign,misc]
        eps = model.denoise(diffuse(x, noise, abar), t, model.semantic(x, probs))
        assert torch.allclose(eps, noise, atol=1e-5)


def test_weighting_v_is_the_error_of_v() -> None:
    x, probs, t, noise = inputs()
    model = autoencoder(weighting="v", prediction="v")
    abar = model.schedule.at(t, x)
    answer = model.unet(diffuse(x, noise, abar), t, model.semantic(x, probs)).detach()
    v = abar.sqrt() * noise - (1 - abar).sqrt() * x
    assert float(model.loss(x, probs, t, noise)[0].detach()) == pytest.approx(
        float((answer - v).square().mean()), rel=1e-4
    )


def test_weighting_simple_is_the_error_of_eps() -> None:
    x, probs, t, noise = inputs()
    model = autoencoder(weighting="simple", prediction="eps")
    abar = model.schedule.at(t, x)
    answer = model.unet(diffuse(x, noise, abar), t, model.semantic(x, probs)).detach()
    assert float(model.loss(x, probs, t, noise)[0].detach()) == pytest.approx(
        float((answer - noise).square().mean()), rel=1e-5
    )


def test_bfloat16_codes_and_noise_come_back_as_float32() -> None:
    model = autoencoder()
    exact = model.semantic(*inputs()[:2])
    model.compute = Compute(torch.device("cpu"), True)
    x, probs, t, _ = inputs()
    z = model.semantic(x, probs)
    assert z.dtype == model.denoise(x, t, z).dtype == torch.float32
    assert not torch.equal(z, exact)
    assert torch.allclose(z, exact, atol=0.05)


# ----------------------------------------------------------------------------------------------------------------------
# Encoding and decoding


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_number_of_channels_go_there_and_back(channels: int) -> None:
    model = autoencoder(channels)
    x, probs, _, _ = inputs(channels)
    code = model.encode(x, probs)
    assert code.z.shape == (4, 6)
    assert model.decode(code.z, code.x_T).shape == x.shape


def round_trip(**rendering: object) -> float:
    model = autoencoder(rendering=replace(RENDERING, steps=10, **rendering))  # type: ignore[arg-type]
    x, probs, _, _ = inputs()
    x = 0.5 * x  # away from the ends of the range, where decode clamps
    code = model.encode(x, probs)
    return float((model.decode(code.z, code.x_T) - x).abs().mean())


def test_more_iterations_bring_the_image_back_better() -> None:
    errors = [round_trip(iterations=n) for n in (1, 2, 4, 8)]
    assert all(a > 1.5 * b for a, b in pairwise(errors)), errors


def test_fixed_point_inversion_brings_the_image_back_better_than_the_published_one() -> None:
    assert round_trip(iterations=5) < round_trip(inversion="ddim", encode_steps=50)


def test_decoded_images_are_in_range() -> None:
    model = autoencoder()
    x = model.decode(torch.randn(4, 6), 5 * torch.randn(4, 2, 16, 16))
    assert float(x.abs().max()) == 1.0


def test_the_code_depends_on_the_verdict() -> None:
    model = autoencoder()
    x, probs, _, _ = inputs()
    assert not torch.allclose(model.semantic(x, probs), model.semantic(x, probs.flip(1)), atol=1e-4)


def test_encoding_and_decoding_draw_no_random_numbers() -> None:
    model = autoencoder(dropout=0.5)
    x, probs, _, _ = inputs()
    a, b = model.encode(x, probs), model.encode(x, probs)
    assert torch.equal(a.x_T, b.x_T)
    assert torch.equal(model.decode(a.z, a.x_T), model.decode(a.z, a.x_T))


@pytest.mark.parametrize("inversion", ["fixed_point", "ddim"])
def test_costs_are_what_the_network_is_really_asked(inversion: str) -> None:
    model = autoencoder(rendering=replace(RENDERING, inversion=inversion, encode_steps=7))
    calls: list[int] = []
    model.unet.register_forward_pre_hook(lambda module, given: calls.append(len(given[0])))
    x, probs, _, _ = inputs()
    code = model.encode(x, probs)
    assert sum(calls) == model.encode_evaluations * len(x)
    calls.clear()
    model.decode(code.z, code.x_T)
    assert sum(calls) == model.render_evaluations * len(x)


def test_the_expected_image_follows_the_code_with_gradient() -> None:
    model = autoencoder()
    z = torch.randn(3, 6, requires_grad=True)
    x = model.expected_image(z)
    assert x.shape == (3, 2, 16, 16)
    x.square().sum().backward()
    assert z.grad is not None
    assert (z.grad.norm(dim=1) > 0).all()


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_a_loaded_model_gives_identical_outputs(tmp_path: Path) -> None:
    model = autoencoder(channels=3)
    model.train()
    x, probs, t, noise = inputs(3)
    model.loss(x, probs, t, noise)  # moves the running statistics
    model.eval().save(tmp_path)
    loaded = DiffusionAutoencoder.load(tmp_path, RENDERING, CPU)
    a, b = model.encode(x, probs), loaded.encode(x, probs)
    assert torch.equal(a.z, b.z)
    assert torch.equal(model.decode(a.z, a.x_T), loaded.decode(b.z, b.x_T))
    assert loaded.settings == model.settings


def test_a_loaded_model_is_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    autoencoder().train().save(tmp_path)
    loaded = DiffusionAutoencoder.load(tmp_path, RENDERING, CPU)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("damage", ["nothing there", "no weights", "other widths"])
def test_a_folder_that_holds_no_model_is_named(tmp_path: Path, damage: str) -> None:
    if damage != "nothing there":
        autoencoder().save(tmp_path)
    if damage == "no weights":
        (tmp_path / "model.safetensors").unlink()
    if damage == "other widths":
        config = json.loads((tmp_path / "config.json").read_text())
        config["autoencoder"]["widths"] = [16, 16]
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds no readable diffusion autoencoder"):
        DiffusionAutoencoder.load(tmp_path, RENDERING, CPU)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, name: str) -> None:
    autoencoder().save(tmp_path)
    (tmp_path / name).write_bytes(b"not what it says")
    with pytest.raises(UserError, match=r"holds no readable diffusion autoencoder"):
        DiffusionAutoencoder.load(tmp_path, RENDERING, CPU)
