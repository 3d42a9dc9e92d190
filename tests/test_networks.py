"""The networks: shapes, what modulates them, and that what is folded can be unfolded."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffex.networks import Encoder, ResidualBlock, ResidualClassifier, SelfAttention, UNet, fold, timestep_embedding


def unet(channels: int = 3, **settings: object) -> UNet:
    torch.manual_seed(0)
    usual = {"size": 16, "widths": (8, 16), "blocks": 1, "attention": (), "code_dim": 6}
    network = UNet(channels, **(usual | settings))  # type: ignore[arg-type]
    wake(network)
    return network


def wake(network: nn.Module) -> None:
    """Replace the zeros of a fresh network, which make every output nothing, by small numbers."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)


def inputs(channels: int = 3, size: int = 16, code_dim: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, size, size, generator=generator)
    return x, torch.tensor([10, 900]), torch.randn(2, code_dim, generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# U-Net and encoder


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_unet_returns_the_shape_it_was_given(channels: int, patch: int) -> None:
    x, t, z = inputs(channels)
    assert unet(channels, patch=patch)(x, t, z).shape == x.shape


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_encoder_returns_a_code_for_each_image(channels: int) -> None:
    encoder = Encoder(channels, 16, widths=(8, 16), blocks=1, attention=(8,), code_dim=6, patch=2, coordinates=True)
    assert encoder(inputs(channels)[0]).shape == (2, 6)


def test_fresh_unet_predicts_nothing() -> None:
    x, t, z = inputs()
    fresh = UNet(3, 16, widths=(8, 16), blocks=1, attention=(), code_dim=6)
    assert not fresh(x, t, z).any()


def test_time_changes_the_prediction() -> None:
    network, (x, t, z) = unet(), inputs()
    assert not torch.allclose(network(x, t, z), network(x, t.flip(0), z), atol=1e-4)


def test_code_changes_the_prediction() -> None:
    network, (x, t, z) = unet(), inputs()
    assert not torch.allclose(network(x, t, z), network(x, t, z.flip(0)), atol=1e-4)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    network, (x, t, z) = unet(attention=(8,)), inputs()
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], z[i : i + 1]) for i in range(2)])
    assert torch.allclose(network(x, t, z), alone, atol=1e-5)


def test_every_parameter_of_the_unet_is_used() -> None:
    network, (x, t, z) = unet(attention=(8,), coordinates=True, patch=2), inputs()
    network(x, t, z).square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


def test_attention_is_put_at_the_asked_for_sides_only() -> None:
    def count(*sides: int) -> int:
        return sum(isinstance(m, SelfAttention) for m in unet(attention=sides).modules())

    assert count() == 0
    assert count(4) == 0  # no feature map of this network has that side
    assert count(16) > 0
    assert count(8, 16) == count(8) + count(16)


def test_attention_sees_the_other_end_of_the_image() -> None:
    layer = SelfAttention(8)
    wake(layer)
    x = torch.randn(1, 8, 8, 8)
    moved = x.clone()
    moved[..., -1, -1] += 3.0
    assert (layer(x) - layer(moved))[..., 0, 0].abs().max() > 1e-5


def test_without_coordinates_a_shifted_image_is_predicted_shifted() -> None:
    """Away from the border, and by a multiple of the coarsest pixel; with coordinates it is not so."""
    x, t, z = inputs(size=64)
    x[:] = 0
    x[..., 28:32, 28:32] = 1.0
    shifted = x.roll((4, 4), dims=(2, 3))

    def differs(coordinates: bool) -> float:
        network = unet(size=64, coordinates=coordinates)
        for module in network.modules():  # group normalisation averages over the whole image, border included
            if isinstance(module, nn.GroupNorm):
                module.forward = lambda h: h  # type: ignore[method-assign]
        change = network(x, t, z).roll((4, 4), dims=(2, 3)) - network(shifted, t, z)
        return float(change[..., 24:40, 24:40].detach().abs().max())

    assert differs(coordinates=False) < 1e-5
    assert differs(coordinates=True) > 1e-3


def test_standardised_codes_have_unit_variance_over_the_batch_in_training() -> None:
    torch.manual_seed(0)
    encoder = Encoder(2, 16, widths=(8,), blocks=1, attention=(), code_dim=5, standardise=True).train()
    nn.init.normal_(encoder.head[0].weight, std=10.0)  # type: ignore[arg-type]
    w = encoder(torch.randn(64, 2, 16, 16)).detach()
    assert torch.allclose(w.mean(dim=0), torch.zeros(5), atol=1e-4)
    assert torch.allclose(w.var(dim=0, unbiased=False), torch.ones(5), atol=0.02)


def test_standardised_codes_do_not_depend_on_the_batch_in_evaluation() -> None:
    torch.manual_seed(0)
    encoder = Encoder(2, 16, widths=(8,), blocks=1, attention=(), code_dim=5, standardise=True)
    encoder.train()(torch.randn(16, 2, 16, 16))
    x = torch.randn(4, 2, 16, 16)
    assert torch.allclose(encoder.eval()(x)[:1], encoder(x[:1]), atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Pieces


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_folding_keeps_every_pixel(patch: int) -> None:
    x = torch.randn(2, 3, 8, 8)
    folded = fold(x, patch, coordinates=False)
    assert folded.shape == (2, 3 * patch * patch, 8 // patch, 8 // patch)
    assert torch.equal(F.pixel_shuffle(folded, patch), x)


@pytest.mark.parametrize("patch", [1, 2])
def test_coordinates_run_from_corner_to_corner(patch: int) -> None:
    where = fold(torch.randn(2, 3, 8, 8), patch, coordinates=True)[:, -2:]
    assert torch.equal(where[:, :, 0, 0], torch.full((2, 2), -1.0))
    assert torch.equal(where[:, :, -1, -1], torch.full((2, 2), 1.0))
    assert torch.equal(where[:, 0, 0, -1], torch.full((2,), -1.0))  # the first counts downwards


def test_adaptive_normalisation_scales_by_code_and_scales_and_shifts_by_time() -> None:
    """h = (1 + z_s) * ((1 + t_s) * GroupNorm(h) + t_b), read off with convolutions and activation taken away."""
    torch.manual_seed(0)
    block = ResidualBlock(4, 4, time_dim=3, code_dim=5)
    seen: list[Tensor] = []
    block.conv1, block.dropout = nn.Identity(), nn.Identity()
    block.norm1 = nn.Identity()  # type: ignore[assignment]
    block.conv2.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    x, time, code = torch.randn(2, 4, 6, 6), torch.randn(2, 3), torch.randn(2, 5)
    block(x, time, code)
    t_s, t_b = block.time(time).chunk(2, dim=1)
    z_s = block.code(code)
    h = block.norm2(F.silu(x))
    each = (part[:, :, None, None] for part in (t_s, t_b, z_s))
    scale, shift, by_code = each
    assert torch.allclose(seen[0], F.silu((1 + by_code) * ((1 + scale) * h + shift)), atol=1e-6)


@pytest.mark.parametrize(("change", "side"), [("down", 4), ("up", 16), (None, 8)])
def test_a_block_changes_size_as_asked(change: str | None, side: int) -> None:
    assert ResidualBlock(4, 6, change=change)(torch.randn(1, 4, 8, 8)).shape == (1, 6, side, side)


def test_a_fresh_block_passes_its_input_through() -> None:
    x = torch.randn(1, 4, 8, 8)
    assert torch.equal(ResidualBlock(4, 4)(x), x)


def test_time_embedding_tells_neighbouring_times_apart() -> None:
    embedded = timestep_embedding(torch.arange(1000), 32)
    assert embedded.shape == (1000, 32)
    distance = torch.cdist(embedded, embedded) + 10 * torch.eye(1000)
    assert distance.min() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Classifier


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_classifier_returns_the_asked_for_numbers(channels: int) -> None:
    network = ResidualClassifier(channels, 4, width=4)
    assert network(torch.randn(2, channels, 16, 16)).shape == (2, 4)


def test_classifier_takes_images_of_any_size() -> None:
    network = ResidualClassifier(2, 3, width=4).eval()
    assert network(torch.randn(1, 2, 20, 28)).shape == (1, 3)
