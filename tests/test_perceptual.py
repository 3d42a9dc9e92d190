"""Perceptual distances: LPIPS's formula whatever the network, the authors' file read strictly, and honest orderings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.signal import convolve2d
from torch import Tensor, nn

from diffex.assay import DESIGNS, draw, plan
from diffex.errors import UserError
from diffex.networks import ResidualClassifier
from diffex.perceptual import AlexLPIPS, critic_distance, embed, feature_maps, load_lpips

CHANNELS = ("DNA", "tubulin", "actin")


def cells(n: int = 48, size: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cells of the simulated assay in [-1, 1], and their classes."""
    screen = plan(
        treatments=DESIGNS["binary"], channels=CHANNELS, num_images=n, num_plates=1, wells_per_class=4, seed=seed
    )
    pixels = np.concatenate(list(draw(screen, size)))
    return torch.from_numpy(pixels).float() / 127.5 - 1, torch.from_numpy(screen.labels)


def noise(n: int = 3, channels: int = 3, size: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def blurred(x: Tensor, sigma: float) -> Tensor:
    g = torch.exp(-(torch.arange(-6, 7).float() ** 2) / (2 * sigma**2))
    g = (g / g.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (6, 6, 6, 6), mode="replicate"), g, groups=x.shape[1])
    return F.conv2d(x, g.transpose(2, 3), groups=x.shape[1])


def changes(x: Tensor) -> dict[str, Tensor]:
    """From nothing to all: the same cells, noise of 1 % of the range, blur of a pixel, and other cells."""
    shaken = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return {
        "identical": x,
        "noise": (x + 0.02 * shaken).clamp(-1, 1),
        "blur": blurred(x, 1.0),
        "another": x.roll(1, dims=0),
    }


def in_order(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> None:
    found = {name: distance(x, y) for name, y in changes(x).items()}
    assert torch.equal(found["identical"], torch.zeros(len(x)))
    mean = {name: float(d.mean()) for name, d in found.items()}
    assert 0 < mean["noise"] < mean["blur"] < mean["another"], mean


def network(channels: int = 3) -> ResidualClassifier:
    """A network whose batch normalisation has seen data; left in training mode."""
    torch.manual_seed(0)
    made = ResidualClassifier(channels, 2, width=6)
    for _ in range(3):
        made(2 * torch.randn(16, channels, 32, 32) + 0.5)
    return made


@pytest.fixture(scope="module")
def trained() -> ResidualClassifier:
    """A small classifier after a few seconds on the simulated assay."""
    torch.manual_seed(0)
    x, labels = cells(512, seed=1)
    made = ResidualClassifier(3, 2, width=8)
    optimiser = torch.optim.AdamW(made.parameters(), 3e-3)
    for _ in range(60):
        batch = torch.randint(len(x), (64,))
        loss = F.cross_entropy(made(x[batch] + 0.05 * torch.randn(64, 3, 32, 32)), labels[batch])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    unseen, truth = cells(128, seed=2)
    with torch.no_grad():
        assert (made.eval()(unseen).argmax(dim=1) == truth).float().mean() > 0.9
    return made


# ----------------------------------------------------------------------------------------------------------------------
# Features of a classifier


def test_the_head_on_the_features_gives_the_network_s_output() -> None:
    made, x = network(), noise(5, size=32)
    assert torch.allclose(made.head(embed(made, x)), made.eval()(x), atol=1e-6)


def test_features_do_not_depend_on_the_size_of_batches() -> None:
    made, x = network(), noise(5, size=32)
    assert torch.allclose(embed(made, x, batch_size=2), embed(made, x), atol=1e-6)
    y = noise(5, size=32, seed=1)
    assert torch.allclose(critic_distance(made, x, y, batch_size=2), critic_distance(made, x, y), atol=1e-6)


def test_there_is_a_map_of_the_stem_and_of_every_stage() -> None:
    maps = feature_maps(network(), noise(2, size=32))
    assert [tuple(m.shape) for m in maps] == [(2, 6, 32, 32), (2, 6, 16, 16), (2, 12, 8, 8), (2, 24, 4, 4)]


def test_measuring_leaves_the_network_as_it_was() -> None:
    made = network()
    made.stages[1].eval()  # a part that its owner froze stays frozen
    modes = [m.training for m in made.modules()]
    state = {name: value.clone() for name, value in made.state_dict().items()}
    x = noise(2, size=32).requires_grad_()
    found = [critic_distance(made, x, -x), embed(made, x), *feature_maps(made, x)]
    assert not any(f.requires_grad for f in found)
    assert [m.training for m in made.modules()] == modes
    assert len(set(modes)) == 2
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    assert all(p.grad is None for p in made.parameters())


def test_the_mode_is_put_back_after_an_error() -> None:
    made = network(3)
    with pytest.raises(RuntimeError):
        embed(made, noise(2, channels=2, size=32))
    assert made.training


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_the_critic_s_distance_is_lpips_s_formula(channels: int) -> None:
    """The formula, position by position."""
    made, a, b = network(channels), noise(2, channels, 32, 0), noise(2, channels, 32, 1)
    found = critic_distance(made, a, b)
    for i in range(2):
        total = 0.0
        for p, q in zip(feature_maps(made, a[i : i + 1]), feature_maps(made, b[i : i + 1]), strict=True):
            here = []
            for h in range(p.shape[2]):
                for w in range(p.shape[3]):
                    u, v = p[0, :, h, w].double(), q[0, :, h, w].double()
                    u, v = u / u.norm().clamp_min(1e-10), v / v.norm().clamp_min(1e-10)
                    here.append(float((u - v).square().sum()))
            total += float(np.mean(here))
        assert float(found[i]) == pytest.approx(total, rel=1e-4)


def test_the_critic_s_distance_is_a_distance() -> None:
    made, a, b = network(), noise(3, size=32), noise(3, size=32, seed=1)
    assert torch.equal(critic_distance(made, a, a), torch.zeros(3))
    assert torch.allclose(critic_distance(made, a, b), critic_distance(made, b, a), atol=1e-6)
    assert (critic_distance(made, a, b) > 0).all()


def test_a_network_that_sees_nothing_finds_no_distance() -> None:
    """Useless: features of zero everywhere neither divide by zero nor differ."""
    made = network()
    for parameter in made.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(critic_distance(made, noise(2, size=32), noise(2, size=32, seed=1)), torch.zeros(2))


def test_doubled_features_measure_the_same() -> None:
    """Duplicated: two copies of every channel of the stem change no unit-normalised difference."""
    made, twice = network(), network()
    twice.stem = nn.Conv2d(3, 12, 3, padding=1)
    twice.stem.load_state_dict({name: torch.cat([value, value]) for name, value in made.stem.state_dict().items()})
    made.stages, twice.stages = nn.Sequential(), nn.Sequential()
    a, b = noise(2, size=32), noise(2, size=32, seed=1)
    assert torch.allclose(critic_distance(made, a, b), critic_distance(twice, a, b), atol=1e-5)


def test_images_of_different_number_are_not_compared() -> None:
    with pytest.raises(ValueError, match="one by one"):
        critic_distance(network(), noise(3, size=32), noise(1, size=32))


def test_a_trained_critic_orders_changes_of_cells(trained: ResidualClassifier) -> None:
    in_order(lambda a, b: critic_distance(trained, a, b), cells(64, seed=3)[0])


# ----------------------------------------------------------------------------------------------------------------------
# LPIPS

LAYOUT = {
    "scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1),
    "net.slice1.0.weight": (64, 3, 11, 11), "net.slice1.0.bias": (64,), "net.slice1.1.filt": (64, 1, 3, 3),
    "net.slice2.4.filt": (64, 1, 3, 3), "net.slice2.5.weight": (192, 64, 5, 5), "net.slice2.5.bias": (192,),
    "net.slice3.8.filt": (192, 1, 3, 3), "net.slice3.9.weight": (384, 192, 3, 3), "net.slice3.9.bias": (384,),
    "net.slice4.11.weight": (256, 384, 3, 3), "net.slice4.11.bias": (256,),
    "net.slice5.13.weight": (256, 256, 3, 3), "net.slice5.13.bias": (256,),
    "lin0.model.1.weight": (1, 64, 1, 1), "lin1.model.1.weight": (1, 192, 1, 1), "lin2.model.1.weight": (1, 384, 1, 1),
    "lin3.model.1.weight": (1, 256, 1, 1), "lin4.model.1.weight": (1, 256, 1, 1),
}  # fmt: skip
"""Names and shapes in the authors' file."""


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights in the layout of the authors' file, with the constants that it holds."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in LAYOUT.items():
        fan_in = int(np.prod(shape[1:]))
        made[name] = torch.randn(shape, generator=generator) * (2 / fan_in) ** 0.5
        if name.startswith("lin"):
            made[name] = made[name].abs()
        if name.endswith("filt"):
            made[name] = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]).div(16).expand(shape).contiguous()
    made["scaling_layer.shift"] = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    made["scaling_layer.scale"] = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    return made


@pytest.fixture(scope="module")
def weights(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "alex_shift_tolerant.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def alex(weights: Path) -> AlexLPIPS:
    return AlexLPIPS.load(weights)


def test_the_network_has_the_layout_of_the_authors_file() -> None:
    assert {name: tuple(value.shape) for name, value in AlexLPIPS().state_dict().items()} == LAYOUT


def test_the_constants_are_those_of_the_authors_file(state: dict[str, Tensor]) -> None:
    own = AlexLPIPS().state_dict()
    for name in LAYOUT:
        if name.startswith("scaling_layer") or name.endswith("filt"):
            assert torch.equal(own[name], state[name]), name


def test_what_is_loaded_is_what_the_file_holds(alex: AlexLPIPS, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, state[name]) for name, value in alex.state_dict().items())
    assert not alex.training
    assert not any(p.requires_grad for p in alex.parameters())


def test_lpips_is_a_distance(alex: AlexLPIPS) -> None:
    a, b = noise(), noise(seed=1)
    assert torch.equal(alex(a, a), torch.zeros(3))
    assert torch.allclose(alex(a, b), alex(b, a), rtol=1e-5)
    assert (alex(a, b) > 0).all()


def test_lpips_passes_gradients_to_images(alex: AlexLPIPS) -> None:
    a = noise(1).requires_grad_()
    alex(a, noise(1, seed=1)).sum().backward()
    assert a.grad is not None
    assert a.grad.abs().sum() > 0


def test_lpips_is_a_sum_over_layers_that_its_heads_weigh(state: dict[str, Tensor], alex: AlexLPIPS) -> None:
    """Additive and linear in the heads: one head alone, then its double."""
    a, b, parts = noise(1), noise(1, seed=1), []
    for kept in range(5):
        alone = AlexLPIPS()
        off = {n: v * (0 if n.startswith("lin") and n[3] != str(kept) else 1) for n, v in state.items()}
        alone.load_state_dict(off)
        parts.append(float(alone(a, b)))
        off[f"lin{kept}.model.1.weight"] = 2 * off[f"lin{kept}.model.1.weight"]
        alone.load_state_dict(off)
        assert float(alone(a, b)) == pytest.approx(2 * parts[-1], rel=1e-5)
    assert min(parts) > 0
    assert float(alex(a, b)) == pytest.approx(sum(parts), rel=1e-5)


def test_the_first_layer_is_convolution_blur_and_rectification(state: dict[str, Tensor]) -> None:
    """By scipy, from the published description: stride 1, then a reflected binomial filter at every second pixel."""
    first = AlexLPIPS()
    first.load_state_dict(state)
    a = noise(1)
    x = ((a - state["scaling_layer.shift"]) / state["scaling_layer.scale"])[0].double().numpy()
    kernel, bias = state["net.slice1.0.weight"].double().numpy(), state["net.slice1.0.bias"].double().numpy()
    found = first.net[0](first.scaling_layer(a))[0]
    assert found.shape == (64, 30, 30)
    for c in (0, 17):
        h = bias[c] + sum(convolve2d(np.pad(x[k], 2), kernel[c, k, ::-1, ::-1], mode="valid") for k in range(3))
        h = np.pad(h, 2, mode="reflect")
        h = convolve2d(h, np.outer([1, 2, 1], [1, 2, 1]) / 16, mode="valid")[::2, ::2]
        assert np.allclose(found[c].numpy(), np.maximum(h, 0), atol=1e-4)


def test_lpips_does_not_depend_on_the_size_of_batches(weights: Path) -> None:
    a, b = noise(5), noise(5, seed=1)
    assert torch.allclose(load_lpips(str(weights), batch_size=2)(a, b), load_lpips(str(weights))(a, b), rtol=1e-5)


def test_one_channel_is_compared_as_a_grey_picture(alex: AlexLPIPS) -> None:
    a, b = noise(channels=1), noise(channels=1, seed=1)
    assert torch.allclose(alex(a, b), alex(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)), rtol=1e-5)


@pytest.mark.parametrize("channels", [2, 5])
def test_more_channels_are_averaged(alex: AlexLPIPS, channels: int) -> None:
    a, b = noise(2, channels), noise(2, channels, seed=1)
    each = torch.stack([alex(a[:, c : c + 1], b[:, c : c + 1]) for c in range(channels)])
    assert torch.allclose(alex(a, b), each.mean(dim=0), rtol=1e-5)


def test_small_images_are_enlarged_to_64_pixels(alex: AlexLPIPS) -> None:
    a, b = noise(size=32), noise(size=32, seed=1)
    large = [F.interpolate(x, size=64, mode="bilinear", align_corners=False) for x in (a, b)]
    assert torch.allclose(alex(a, b), alex(*large), rtol=1e-5)


def test_larger_images_are_taken_as_they_are(alex: AlexLPIPS) -> None:
    a, b = noise(1, size=80), noise(1, size=80, seed=1)
    small = [F.interpolate(x, size=64, mode="bilinear", align_corners=False) for x in (a, b)]
    assert not torch.allclose(alex(a, b), alex(*small), rtol=1e-2)


def test_a_loaded_distance_keeps_no_gradient(weights: Path) -> None:
    assert not load_lpips(str(weights))(noise(1).requires_grad_(), noise(1, seed=1)).requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# Files and packages that can't be used


def spoil(how: str, state: dict[str, Tensor], path: Path) -> None:
    if how == "text":
        path.write_text("no weights")
    elif how == "empty":
        path.touch()
    elif how == "code":
        torch.save(nn.Linear(2, 2), path)  # a pickled module: reading it would run code
    elif how == "list":
        torch.save([torch.zeros(1)], path)
    elif how == "lacks":
        torch.save({n: v for n, v in state.items() if n != "lin3.model.1.weight"}, path)
    elif how == "more":
        torch.save(state | {"net.slice6.16.weight": torch.zeros(1)}, path)
    elif how == "shape":
        torch.save(state | {"net.slice1.0.weight": torch.zeros(64, 3, 7, 7)}, path)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "there is no file"), ("text", "not a file of tensors"), ("empty", "not a file of tensors"),
        ("code", "not a file of tensors"), ("list", "no table of tensors"), ("lacks", "lacks 'lin3.model.1.weight'"),
        ("more", "unknown 'net.slice6.16.weight'"), ("shape", r"\(64, 3, 7, 7\), not \(64, 3, 11, 11\)"),
    ],
)  # fmt: skip
def test_a_file_of_other_weights_is_refused(how: str, says: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    spoil(how, state, path)
    with pytest.raises(UserError, match=says) as caught:
        load_lpips(str(path))
    assert "evaluation.lpips" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_package_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match=r"evaluation.lpips.*pip install 'diffex\[lpips\]'"):
        load_lpips("lpips")


def package(make: Callable[..., nn.Module]) -> ModuleType:
    made = ModuleType("lpips")
    made.LPIPS = make  # type: ignore[attr-defined]
    return made


def test_weights_that_can_t_be_fetched_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(**_: object) -> nn.Module:
        raise URLError("no route to host")

    monkeypatch.setitem(sys.modules, "lpips", package(offline))
    with pytest.raises(UserError, match="evaluation.lpips.*weights can't be had.*no route to host"):
        load_lpips("lpips")


def test_the_package_is_asked_for_its_alexnet_and_shown_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two channels of 32 pixels: four grey pictures of 64, whose distances (n, 1, 1, 1) are averaged by image."""
    shown = []

    class Theirs(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            assert (net, verbose) == ("alex", False)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            shown.append(tuple(a.shape))
            return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", package(Theirs))
    a = torch.zeros(2, 2, 32, 32)
    b = torch.tensor([[0.1, 0.3], [0.5, 0.9]])[:, :, None, None].expand_as(a)
    assert load_lpips("lpips")(a, b).tolist() == pytest.approx([0.2, 0.7])
    assert shown == [(4, 3, 64, 64)]


# ----------------------------------------------------------------------------------------------------------------------
# The authors' weights


@pytest.fixture(scope="module")
def published() -> Callable[[Tensor, Tensor], Tensor]:
    path = os.environ.get("DIFFEX_STLPIPS_WEIGHTS")
    if not path:
        pytest.skip("DIFFEX_STLPIPS_WEIGHTS doesn't give the path of alex_shift_tolerant.pth (package stlpips-pytorch)")
    return load_lpips(path)


@pytest.mark.parametrize("size", [32, 64])
def test_lpips_orders_changes_of_cells(published: Callable[[Tensor, Tensor], Tensor], size: int) -> None:
    in_order(published, cells(16, size, seed=3)[0])


def test_lpips_forgives_a_shift_of_one_pixel(published: Callable[[Tensor, Tensor], Tensor]) -> None:
    """What its authors trained it for."""
    x = cells(16, 64, seed=3)[0]
    there, here = x[..., :-1], x[..., 1:]
    assert published(there, here).mean() < 0.5 * published(x, changes(x)["another"]).mean()
