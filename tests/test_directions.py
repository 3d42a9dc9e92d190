"""Stage 2: the space of directions, their models, the losses that tell them apart, and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffex.config import Directions
from diffex.directions import (
    DirectionModels,
    DirectionSet,
    Objective,
    Responses,
    Subspace,
    contrastive_loss,
    feature_covariance,
    measure_responses,
    needs_responses,
    pairwise_overlap,
    projector,
    published_covariance,
    share_of_verdict,
)
from diffex.errors import UserError

KINDS = pytest.mark.parametrize("kind", ["anchored", "mlp", "linear", "fixed"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def codes(n: int = 400, d: int = 8, rank: int = 3) -> Tensor:
    """Codes that vary in ``rank`` of d dimensions only, by very different amounts, and hardly in the others."""
    axes = torch.linalg.qr(torch.randn(d, d))[0]
    spread = torch.full((d,), 1e-3)
    spread[:rank] = torch.tensor([5.0, 1.0, 0.5])[:rank]
    return torch.randn(n, d) * spread @ axes.T + torch.randn(d)


# ----------------------------------------------------------------------------------------------------------------------
# The space


def test_whitened_coordinates_are_centred_uncorrelated_and_of_unit_variance() -> None:
    z = codes()
    v = Subspace.of(z, "whitened", 0.999).coordinates(z)
    assert torch.allclose(v.mean(dim=0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(torch.cov(v.T, correction=0), torch.eye(3), atol=1e-3)


@pytest.mark.parametrize(("explained", "rank"), [(0.5, 1), (0.97, 2), (0.999, 3), (1.0, 8)])
def test_the_whitened_space_has_as_many_axes_as_the_asked_for_variance_needs(explained: float, rank: int) -> None:
    z = codes()
    z = torch.cat([z, 2 * z.mean(dim=0) - z])
    space = Subspace.of(z, "whitened", explained)
    assert space.rank == rank
    kept = (space.coordinates(z) * space.scale).var(dim=0, correction=0).sum() / z.var(dim=0, correction=0).sum()
    assert float(kept) >= explained - 1e-4


def test_standardised_coordinates_keep_every_dimension_at_unit_variance() -> None:
    z = codes()
    v = Subspace.of(z, "standardised").coordinates(z)
    assert v.shape == z.shape
    assert torch.allclose(v.mean(dim=0), torch.zeros(8), atol=1e-4)
    assert torch.allclose(v.std(dim=0), torch.ones(8), atol=1e-4)


def test_raw_coordinates_are_the_code_itself() -> None:
    z = codes()
    space = Subspace.of(z, "raw")
    assert torch.equal(space.coordinates(z), z)
    assert torch.equal(space.shift(z), z)


@pytest.mark.parametrize("name", ["whitened", "standardised", "raw"])
def test_a_shift_of_the_code_is_that_shift_of_coordinates(name: str) -> None:
    z = codes()
    space = Subspace.of(z, name, 0.999)
    dv = torch.randn(len(z), space.rank)
    moved = space.coordinates(z + space.shift(dv))
    assert torch.allclose(moved, space.coordinates(z) + dv, atol=1e-3)


def test_a_whitened_shift_leaves_what_the_codes_do_not_span_alone() -> None:
    z = codes()
    space = Subspace.of(z, "whitened", 0.999)
    unused = torch.linalg.eigh(torch.cov(z.T))[1][:, :5]
    assert (space.shift(torch.randn(20, 3)) @ unused).abs().max() < 0.01


def test_a_unit_whitened_shift_is_one_standard_deviation_of_the_data() -> None:
    z = codes()
    space = Subspace.of(z, "whitened", 0.999)
    for axis in torch.eye(3):
        along = F.normalize(space.shift(axis), dim=0)
        assert float(space.shift(axis).norm()) == pytest.approx(float((z @ along).std()), rel=0.01)


def test_a_dimension_that_never_changes_does_no_harm() -> None:
    z = codes()
    z[:, 0] = 1.0
    for name in ("whitened", "standardised"):
        assert torch.isfinite(Subspace.of(z, name, 1.0).coordinates(z)).all()


def test_an_unknown_space_is_named() -> None:
    with pytest.raises(UserError, match=r"directions\.space = 'latent' is not one of whitened"):
        Subspace.of(codes(), "latent")


# ----------------------------------------------------------------------------------------------------------------------
# The models


def alone(models: DirectionModels, k: int) -> DirectionModels:
    """Direction k of the set as a set of its own."""
    single = DirectionModels(1, models.dim, kind=models.kind, depth=len(models.weights))
    state = {}
    for name, value in models.state_dict().items():
        if name.startswith("norms") and value.dim():
            state[name] = value.view(models.num, -1)[k]
        else:
            state[name] = value[k : k + 1] if value.dim() else value
    single.load_state_dict(state)
    return single


@pytest.mark.parametrize("training", [True, False])
@KINDS
def test_models_in_one_batch_equal_models_one_by_one(kind: str, training: bool) -> None:
    models, v = DirectionModels(4, 5, kind=kind), torch.randn(16, 5)
    models.train()(v)  # running statistics that differ from direction to direction
    models.train(training)
    separate = torch.cat([alone(models, k).train(training)(v) for k in range(4)])
    together = models(v)
    assert together.shape == (4, 16, 5)
    assert torch.allclose(together, separate, atol=1e-6)


def test_gradients_of_one_direction_do_not_touch_the_others() -> None:
    models = DirectionModels(3, 5)
    models(torch.randn(16, 5))[1].square().sum().backward()
    for weight in (*models.weights, *models.biases):
        assert not weight.grad[0].any()
        assert not weight.grad[2].any()
    assert models.weights[0].grad[1].any()


@KINDS
def test_shifts_have_unit_length(kind: str) -> None:
    u = DirectionModels(4, 32, kind=kind).unit(torch.randn(16, 32))
    assert torch.allclose(u.norm(dim=-1), torch.ones(4, 16), atol=1e-5)


def test_anchored_directions_shift_every_image_however_few_the_dimensions() -> None:
    """A narrow published mlp leaves some images where they are: those for which all its hidden units are dead."""
    v = torch.randn(1000, 3)
    lengths = {kind: DirectionModels(4, 3, kind=kind).unit(v).norm(dim=-1) for kind in ("anchored", "mlp")}
    assert torch.allclose(lengths["anchored"], torch.ones(4, 1000), atol=1e-5)
    assert lengths["mlp"].min() == 0.0


def test_an_anchored_direction_bends_one_shift() -> None:
    models, v = DirectionModels(2, 5, kind="anchored", depth=2), torch.randn(16, 5)
    plain = DirectionModels(2, 5, kind="mlp", depth=2)
    plain.load_state_dict({name: value for name, value in models.state_dict().items() if name != "anchor"})
    assert torch.allclose(models(v), plain(v) + models.anchor[:, None], atol=1e-6)


@KINDS
def test_directions_start_different(kind: str) -> None:
    u = DirectionModels(4, 5, kind=kind).unit(torch.randn(16, 5))
    assert pairwise_overlap(u) < 0.9


def test_fixed_directions_do_not_depend_on_the_code() -> None:
    u = DirectionModels(2, 5, kind="fixed").unit(torch.randn(16, 5))
    assert (u == u[:, :1]).all()


@pytest.mark.parametrize("kind", ["anchored", "mlp", "linear"])
def test_conditional_directions_depend_on_the_code(kind: str) -> None:
    u = DirectionModels(2, 5, kind=kind).unit(torch.randn(16, 5))
    assert (u - u[:, :1])[:, 1:].abs().amax(dim=-1).min() > 1e-3


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_an_mlp_has_the_asked_for_layers_the_last_without_bias(depth: int) -> None:
    models = DirectionModels(2, 5, kind="mlp", depth=depth)
    assert [len(models.weights), len(models.biases), len(models.norms)] == [depth, depth - 1, depth - 1]
    assert models(torch.randn(4, 5)).shape == (2, 4, 5)


def test_the_projector_halves_and_quarters() -> None:
    layers = [layer for layer in projector(64) if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in layers] == [(64, 32), (32, 32), (32, 16)]
    assert layers[-1].bias is None


# ----------------------------------------------------------------------------------------------------------------------
# The losses


def separated(k: int, b: int = 6) -> Tensor:
    """Features of K directions, each all along an axis of its own."""
    return torch.eye(k)[:, None].expand(k, b, k).contiguous()


def test_perfect_separation_gives_minus_tau() -> None:
    for tau in (0.5, 2.0):
        assert float(contrastive_loss(separated(4), tau)) == pytest.approx(-tau, abs=1e-6)


def test_identical_directions_give_zero() -> None:
    same = F.normalize(torch.randn(8), dim=0).expand(4, 6, 8)
    assert float(contrastive_loss(same)) == pytest.approx(0.0, abs=1e-6)


def test_separated_directions_have_a_lower_loss_than_mixed_ones() -> None:
    mixed = F.normalize(torch.randn(4, 6, 4), dim=-1)
    assert contrastive_loss(separated(4)) < contrastive_loss(mixed) - 0.1


@pytest.mark.parametrize("signed", [False, True])
def test_the_contrastive_loss_does_not_see_the_order_of_directions(signed: bool) -> None:
    f = F.normalize(torch.randn(4, 6, 8), dim=-1)
    assert torch.allclose(contrastive_loss(f.flip(0), signed=signed), contrastive_loss(f, signed=signed), atol=1e-6)


def test_the_published_contrastive_loss_does_not_see_signs() -> None:
    f = F.normalize(torch.randn(4, 6, 8), dim=-1)
    signs = torch.tensor([1.0, -1.0]).repeat(12).view(4, 6, 1)
    assert torch.allclose(contrastive_loss(f * signs), contrastive_loss(f), atol=1e-6)


def test_the_signed_contrastive_loss_wants_all_images_pushed_the_same_way() -> None:
    signs = torch.tensor([1.0, -1.0]).repeat(12).view(4, 6, 1)
    assert float(contrastive_loss(separated(4), signed=True)) == pytest.approx(-0.5, abs=1e-6)
    assert contrastive_loss(separated(4) * signs, signed=True) > -0.2


def test_the_signed_contrastive_loss_keeps_opposite_directions_apart_like_equal_ones() -> None:
    """A direction and its reverse are one direction: going both ways is what signs are for."""
    axis = F.normalize(torch.randn(8), dim=0).expand(1, 6, 8)
    opposite, equal = torch.cat([axis, -axis]), torch.cat([axis, axis])
    assert torch.allclose(contrastive_loss(opposite, signed=True), contrastive_loss(equal, signed=True), atol=1e-6)


def test_a_single_direction_is_pulled_together() -> None:
    spread = F.normalize(torch.randn(1, 6, 8), dim=-1)
    assert contrastive_loss(spread[:, :1].expand(1, 6, 8)) < contrastive_loss(spread)


def test_overlap_is_one_for_duplicates_and_nothing_for_disjoint_ones() -> None:
    assert float(pairwise_overlap(torch.randn(6, 8).abs().expand(3, 6, 8))) == pytest.approx(1.0, abs=1e-5)
    assert float(pairwise_overlap(separated(5))) == 0.0


def test_overlap_of_two_directions_is_their_squared_cosine() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    pair = torch.stack([a, 3 * b])[:, None].expand(2, 5, 2)  # lengths don't count
    assert float(pairwise_overlap(pair)) == pytest.approx(0.36, abs=1e-6)


def test_overlap_is_measured_image_by_image() -> None:
    """Directions that are equal on average, but never on the same image, do not overlap."""
    a = torch.eye(2)
    assert float(pairwise_overlap(torch.stack([a, a.flip(0)]))) == 0.0


def test_a_single_direction_overlaps_with_nothing() -> None:
    assert float(pairwise_overlap(torch.randn(1, 6, 8))) == 0.0


def test_feature_covariance_is_nothing_for_uncorrelated_features_only() -> None:
    axes = torch.cat([torch.eye(4), -torch.eye(4)])[None]  # mean 0, no two features together
    assert float(feature_covariance(axes)) == pytest.approx(0.0, abs=1e-7)
    tied = torch.randn(1, 50, 1).expand(1, 50, 4)
    variance = float(tied[0, :, 0].var())
    assert float(feature_covariance(tied)) == pytest.approx(12 * variance**2 / 4, rel=1e-4)


def test_published_covariance_all_but_vanishes_at_the_published_length() -> None:
    u = F.normalize(torch.randn(10, 128, 512), dim=-1)
    at_one, at_tenth = float(published_covariance(u)), float(published_covariance(0.1 * u))
    assert at_tenth == pytest.approx(1e-4 * at_one, rel=1e-3)
    assert at_tenth / 128 < 1e-7


# ----------------------------------------------------------------------------------------------------------------------
# Responses


def linear_decoder(z: Tensor) -> Tensor:
    """Dimension j of the code lights up pixel j of a 4 x 4 image."""
    return F.pad(z, (0, 16 - z.shape[1])).view(len(z), 1, 4, 4)


def first_pixel(x: Tensor) -> Tensor:
    """A classifier that reads the first pixel."""
    first = x[:, 0, 0, 0]
    return torch.stack([first, -first], dim=1)


def test_responses_of_a_linear_decoder_are_its_matrix() -> None:
    z = 0.1 * codes()
    space = Subspace.of(z, "whitened", 0.999)
    found = measure_responses(z[:10] * 0.1, space, linear_decoder, first_pixel, step=0.01)
    matrix = torch.stack([linear_decoder(space.shift(axis)[None]).flatten() for axis in torch.eye(3)], dim=1)
    assert found.image.shape == (10, 16, 3)
    assert found.verdict.shape == (10, 2, 3)
    assert torch.allclose(found.image, matrix.expand(10, -1, -1), atol=1e-3)
    assert torch.allclose(found.verdict[:, 0], matrix[0].expand(10, -1), atol=1e-3)


def test_verdicts_ignore_what_moves_all_logits_alike() -> None:
    z = torch.zeros(3, 2)
    space = Subspace.of(codes(d=2, rank=2), "raw")
    found = measure_responses(z, space, linear_decoder, lambda x: x[:, 0, 0, :1].expand(-1, 3), step=0.1)
    assert found.verdict.abs().max() < 1e-6


def test_image_responses_are_pooled() -> None:
    z = torch.zeros(3, 2)
    space = Subspace.of(codes(d=2, rank=2), "raw")
    found = measure_responses(z, space, linear_decoder, first_pixel, step=0.1, pool=2)
    assert torch.allclose(found.image[0, :, 0], torch.tensor([0.25, 0, 0, 0]), atol=1e-5)


def test_responses_cost_two_evaluations_an_axis() -> None:
    counted: list[int] = []

    def decoder(z: Tensor) -> Tensor:
        counted.append(len(z))
        return linear_decoder(z)

    told: list[tuple[int, int]] = []
    z = codes()
    space = Subspace.of(z, "whitened", 0.999)
    measure_responses(z[:10], space, decoder, first_pixel, step=1.0, batch_size=4,
                      progress=lambda *call: told.append(call))  # fmt: skip
    assert sum(counted) == 2 * 3 * 10
    assert max(counted) == 4
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_share_of_the_verdict_is_one_along_its_gradient_and_nothing_across() -> None:
    verdict = torch.tensor([[2.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]).expand(5, 2, 3)
    u = torch.eye(3)[:, None].expand(3, 5, 3)
    assert torch.allclose(share_of_verdict(verdict, u), torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)


def test_pushing_images_apart_is_no_share_of_the_verdict() -> None:
    verdict = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).expand(4, 2, 2)
    both_ways = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])[None]
    assert float(share_of_verdict(verdict, both_ways)) == pytest.approx(0.0, abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# The objective

PUBLISHED = Directions(
    num_directions=3,
    kind="mlp",
    depth=3,
    space="raw",
    features="code",
    signed=False,
    covariance="published",
    lambda3=0.0,
    alpha=0.1,
)
OURS = Directions(num_directions=3)


def objective(settings: Directions, r: int = 24, n: int = 20) -> tuple[Objective, Tensor, Tensor]:
    responses = Responses(torch.randn(n, 9, r), torch.randn(n, 2, r)) if needs_responses(settings) else None
    models = DirectionModels(settings.num_directions, r, kind=settings.kind, depth=settings.depth)
    network = projector(9, 16, 64) if settings.features == "image" else projector(r)
    rows = torch.arange(n)[::2]
    return Objective(settings, models, network, responses), torch.randn(len(rows), r), rows


def test_published_settings_need_no_responses_and_ours_do() -> None:
    assert not needs_responses(PUBLISHED)
    assert needs_responses(OURS)
    assert needs_responses(replace(PUBLISHED, lambda3=0.1))
    assert needs_responses(replace(PUBLISHED, covariance="image"))


def test_published_features_are_normalised_differences_of_projections() -> None:
    loss_of, v, rows = objective(replace(PUBLISHED, lambda2=0.0, alpha=1.0))
    loss_of.models.eval()
    loss_of.projector.eval()
    u, P = loss_of.models.unit(v), loss_of.projector
    f = torch.stack([F.normalize(P(v + u[k]) - P(v), dim=-1) for k in range(3)])
    assert float(loss_of(v, rows)[0].detach()) == pytest.approx(float(contrastive_loss(f).detach()), abs=1e-6)


def test_the_unshifted_code_gets_no_gradient() -> None:
    """As published: P(z) is a target, not something to be moved.  With it, this gradient would be zero."""
    loss_of, v, rows = objective(replace(PUBLISHED, lambda2=0.0))
    loss_of.projector.eval()
    still = v.clone().requires_grad_()
    with_graph = []
    loss_of.projector.register_forward_hook(lambda module, given, out: with_graph.append(out.requires_grad))
    loss_of(still, rows)
    assert sorted(with_graph) == [False, True]


@pytest.mark.parametrize("covariance", ["image", "shifts", "features", "published"])
@pytest.mark.parametrize("features", ["code", "image"])
def test_every_objective_trains_every_parameter_of_the_directions(features: str, covariance: str) -> None:
    loss_of, v, rows = objective(replace(OURS, features=features, covariance=covariance))
    loss, parts = loss_of(v, rows)
    loss.backward()
    assert set(parts) == {"contrastive", "covariance", "moved", "moved_mean"}
    assert all(p.grad.any() for p in loss_of.models.weights)
    assert all(p.grad.any() for p in loss_of.projector.parameters() if p.dim() == 2)


@pytest.mark.parametrize("covariance", ["image", "shifts", "features", "published"])
def test_the_loss_is_the_weighted_sum_of_its_parts(covariance: str) -> None:
    loss_of, v, rows = objective(replace(OURS, covariance=covariance, lambda2=0.7, lambda3=0.2))
    loss, parts = loss_of(v, rows)
    moved = parts["moved"] + parts["moved_mean"]
    assert torch.allclose(loss, parts["contrastive"] + 0.7 * parts["covariance"] - 0.2 * moved, atol=1e-6)


def test_change_maps_overlap_where_they_change_the_same_pixels_even_in_opposite_ways() -> None:
    """Pixels brightened by one direction and, elsewhere in common, darkened by another must not cancel."""
    loss_of, v, rows = objective(replace(OURS, lambda3=0.0))
    loss_of.models.eval()
    u = loss_of.models.unit(v)
    change = torch.einsum("bpr,kbr->kbp", loss_of.responses.image[rows], u)  # type: ignore[union-attr]
    covariance = loss_of(v, rows)[1]["covariance"]
    assert torch.allclose(covariance, pairwise_overlap(change.abs()), atol=1e-6)
    assert not torch.allclose(covariance, pairwise_overlap(change), atol=1e-2)


def test_responses_are_those_of_the_rows() -> None:
    """Rows whose image does not respond have no say in the overlap of change maps."""
    loss_of, v, rows = objective(replace(OURS, lambda3=0.0))
    a = loss_of(v, rows)[1]["covariance"]
    loss_of.responses.image[1::2] += 7.0  # type: ignore[union-attr]
    loss_of.models.eval()
    b = loss_of(v, rows)[1]["covariance"]
    loss_of.responses.image[1::2] -= 7.0  # type: ignore[union-attr]
    assert torch.equal(b, loss_of(v, rows)[1]["covariance"])
    assert torch.isfinite(a)
    loss_of.responses.image[rows] += 7.0  # type: ignore[union-attr]
    assert not torch.equal(b, loss_of(v, rows)[1]["covariance"])


def test_projected_image_features_do_not_depend_on_the_unit_of_intensity() -> None:
    loss_of, v, rows = objective(replace(OURS, lambda3=0.0))
    loss_of.projector.eval()
    loss_of.models.eval()
    a = loss_of(v, rows)[0]
    loss_of.responses = Responses(1000 * loss_of.responses.image, loss_of.responses.verdict)  # type: ignore[union-attr]
    assert torch.allclose(loss_of(v, rows)[0], a, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Sets


def trained_set(kind: str = "linear", depth: int = 3) -> tuple[DirectionSet, Tensor]:
    z = codes()
    space = Subspace.of(z, "whitened", 0.999)
    models = DirectionModels(4, space.rank, kind=kind, depth=depth).train()
    models(space.coordinates(z))  # moves the running statistics
    return DirectionSet(models, space), z


@pytest.mark.parametrize(
    ("kind", "depth"), [("anchored", 2), ("mlp", 3), ("mlp", 1), ("mlp", 5), ("linear", 3), ("fixed", 3)]
)
def test_a_loaded_set_shifts_alike(tmp_path: Path, kind: str, depth: int) -> None:
    directions, z = trained_set(kind, depth)
    directions.save(tmp_path)
    loaded = DirectionSet.load(tmp_path)
    assert len(loaded) == 4
    for k in range(4):
        assert torch.allclose(loaded.shift(z, k, 1.5), directions.shift(z, k, 1.5), atol=1e-5)


def test_a_shift_is_alpha_standard_deviations_long() -> None:
    directions, z = trained_set()
    space = directions.subspace
    moved = space.coordinates(directions.shift(z, 2, -1.5)) - space.coordinates(z)
    assert torch.allclose(moved, -1.5 * directions.unit(z)[2], atol=1e-3)
    assert torch.allclose(moved.norm(dim=1), torch.full((len(z),), 1.5), atol=1e-3)


def test_alpha_may_differ_from_image_to_image() -> None:
    directions, z = trained_set()
    alpha = torch.linspace(-2, 2, len(z))
    each = torch.cat([directions.shift(z[i : i + 1], 1, float(alpha[i])) for i in range(5)])
    assert torch.allclose(directions.shift(z, 1, alpha)[:5], each, atol=1e-5)


def test_no_shift_leaves_the_code_alone() -> None:
    directions, z = trained_set()
    assert torch.equal(directions.shift(z, 0, 0.0), z)


@pytest.mark.parametrize("k", [-1, 4])
def test_a_direction_that_is_not_there_is_named(k: int) -> None:
    directions, z = trained_set()
    with pytest.raises(UserError, match=rf"no direction {k}: this set has 0 to 3"):
        directions.shift(z, k, 1.0)


def test_a_set_is_frozen_and_does_not_depend_on_its_batch() -> None:
    directions, z = trained_set()
    assert not any(p.requires_grad for p in directions.parameters())
    assert torch.allclose(directions.unit(z)[:, :3], directions.unit(z[:3]), atol=1e-5)


def test_fixed_vectors_become_directions() -> None:
    directions, z = trained_set()
    vectors = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    fixed = DirectionSet.fixed(vectors, directions.subspace)
    assert torch.allclose(fixed.unit(z[:2])[0], torch.tensor([1.0, 0.0, 0.0]).expand(2, 3))
    assert torch.allclose(fixed.unit(z[:2])[1], torch.tensor([0.0, 0.5**0.5, 0.5**0.5]).expand(2, 3))


def test_a_folder_without_directions_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no readable directions"):
        DirectionSet.load(tmp_path)


@pytest.mark.parametrize("name", ["directions.json", "directions.safetensors"])
def test_a_file_that_holds_no_directions_is_named(tmp_path: Path, name: str) -> None:
    trained_set()[0].save(tmp_path)
    (tmp_path / name).write_bytes(b"not what it says")
    with pytest.raises(UserError, match=r"holds no readable directions"):
        DirectionSet.load(tmp_path)
