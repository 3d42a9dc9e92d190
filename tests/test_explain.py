"""Stage 3 above the table: edits are rendered and judged as the table says, and single images get their answer."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Autoencoder, Rendering
from diffex.directions import DirectionSet, Subspace
from diffex.errors import UserError
from diffex.explain import MAP, Attribution, Edit, Explainer, Measure, choose_rows, effects_table, plan_edits, traversal
from diffex.model import DiffusionAutoencoder
from diffex.networks import ResidualClassifier

NAMES = ("control", "other", "treated")
B, C, SIZE, K = 4, 2, 16, 3
ALPHAS = (1.0, 2.0, 4.0)


@pytest.fixture(scope="module")
def explainer() -> Explainer:
    """An autoencoder that has learnt nothing, yet renders something; a classifier that is sure of itself."""
    torch.manual_seed(0)
    settings = Autoencoder(code_dim=6, widths=(8, 8), encoder_widths=(8, 8))
    rendering = Rendering(steps=3, iterations=3)
    model = DiffusionAutoencoder(
        settings, rendering, channels=C, size=SIZE, num_classes=3, compute=Compute(torch.device("cpu"), False)
    )
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    network = ResidualClassifier(C, 3, width=4)
    nn.init.normal_(network.head.weight)
    subspace = Subspace.of(torch.randn(100, 6), "whitened", 0.9)
    directions = DirectionSet.fixed(torch.randn(K, subspace.rank), subspace)
    return Explainer(model.eval().requires_grad_(False), directions, FrozenClassifier(network, NAMES))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(B, C, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def table(explainer: Explainer, x: Tensor, edits: list[Edit], **options: object) -> pa.Table:
    sets = {"learned": explainer.directions, "random": explainer.directions}
    rows = torch.arange(100, 100 + len(x))
    options = {"reference": 1.5, **options}
    return effects_table(explainer.model, explainer.classifier, sets, edits, x, rows, **options)  # type: ignore[arg-type]


def column(made: pa.Table, name: str) -> np.ndarray:
    return made[name].to_numpy()


# ----------------------------------------------------------------------------------------------------------------------
# The plan of edits


def test_learned_directions_go_both_ways_at_every_length() -> None:
    edits = plan_edits(2, (0.5, 3.0), 0, {})
    assert len(edits) == len(set(edits)) == 2 * 2 * 3
    assert {(e.sign, e.alpha) for e in edits if e.direction == 1} == {
        (s, a) for s in (1.0, -1.0) for a in (0.5, 3.0, None)
    }


def test_random_directions_and_baselines_go_one_way_at_the_reference_length() -> None:
    edits = plan_edits(1, (), 3, {"class_mean": 1, "principal": 2})[2:]
    assert [(e.kind, e.direction) for e in edits] == [
        ("random", 0), ("random", 1), ("random", 2), ("class_mean", 0), ("principal", 0), ("principal", 1)
    ]  # fmt: skip
    assert {(e.sign, e.alpha) for e in edits} == {(1.0, None)}


# ----------------------------------------------------------------------------------------------------------------------
# The effects table


def test_the_table_has_a_row_for_every_image_and_edit(explainer: Explainer, x: Tensor) -> None:
    edits = plan_edits(K, (0.5,), 2, {})
    made = table(explainer, x, edits)
    assert len(made) == B * len(edits)
    keys = list(zip(*(made[n].to_pylist() for n in ("row", "kind", "direction", "alpha")), strict=True))
    wanted = {
        (100 + i, e.kind, e.direction, e.sign * (1.5 if e.alpha is None else e.alpha)) for i in range(B) for e in edits
    }
    assert len(set(keys)) == len(keys)
    assert set(keys) == wanted


def test_the_table_has_the_documented_columns(explainer: Explainer, x: Tensor) -> None:
    measure = Measure(("size", "shape"), lambda images: images.mean(dim=(2, 3)))
    made = table(explainer, x, [Edit("learned", 0, 1.0, None)], measure=measure)
    assert set(made.column_names) == {
        "row", "kind", "direction", "alpha", "reference", "length_z", "ssim", "l1", "changed", "change", "shift:size",
        "shift:shape", *(f"p_{what}:{c}" for what in ("original", "reconstruction", "edit") for c in NAMES),
    }  # fmt: skip
    assert made.schema.field("change").type == pa.list_(pa.float32(), C * MAP * MAP)


def test_only_edits_at_the_reference_length_are_marked_so(explainer: Explainer, x: Tensor) -> None:
    made = table(explainer, x, [Edit("learned", 0, -1.0, 1.5), Edit("learned", 1, -1.0, None)])
    assert column(made, "alpha").tolist() == [-1.5] * 8
    assert made["reference"].to_pylist() == [False] * 4 + [True] * 4


def test_an_edit_of_no_length_is_the_reconstruction(explainer: Explainer, x: Tensor) -> None:
    made = table(explainer, x, [Edit("learned", 0, 1.0, 0.0)])
    for c in NAMES:
        assert column(made, f"p_edit:{c}") == pytest.approx(column(made, f"p_reconstruction:{c}"), abs=1e-5)
    assert column(made, "ssim") == pytest.approx(1.0, abs=1e-4)
    assert column(made, "l1") == pytest.approx(0.0, abs=1e-6)
    assert column(made, "length_z") == pytest.approx(0.0)
    assert np.abs(np.stack(made["change"].to_numpy())).max() < 1e-6


def test_probabilities_are_those_of_original_reconstruction_and_edit(explainer: Explainer, x: Tensor) -> None:
    made = table(explainer, x, [Edit("learned", 2, -1.0, 3.0)])
    model, classifier = explainer.model, explainer.classifier
    code = model.encode(x, classifier.probabilities(x))
    shown = {
        "original": x,
        "reconstruction": model.decode(code.z, code.x_T),
        "edit": model.decode(explainer.directions.shift(code.z, 2, -3.0), code.x_T),
    }
    for what, images in shown.items():
        expected = classifier.probabilities(images).numpy()
        found = np.stack([column(made, f"p_{what}:{c}") for c in NAMES], axis=1)
        assert found == pytest.approx(expected, abs=1e-4)
    assert not np.allclose(column(made, "p_edit:treated"), column(made, "p_reconstruction:treated"), atol=1e-3)


def test_changes_are_measured_from_the_reconstruction(explainer: Explainer, x: Tensor) -> None:
    """Signed maps, pooled, and the mean modulus, both in units of the full range of intensities."""
    measure = Measure(("mean",), lambda images: images.mean(dim=(1, 2, 3))[:, None])
    made = table(explainer, x, [Edit("learned", 1, 1.0, 3.0)], measure=measure)
    code = explainer.model.encode(x, explainer.classifier.probabilities(x))
    before = explainer.model.decode(code.z, code.x_T)
    after = explainer.model.decode(explainer.directions.shift(code.z, 1, 3.0), code.x_T)
    change = (after - before) / 2
    maps = np.stack(made["change"].to_numpy())
    assert maps == pytest.approx(F.avg_pool2d(change, SIZE // MAP).flatten(1).numpy(), abs=1e-4)
    assert column(made, "l1") == pytest.approx(change.abs().mean(dim=(1, 2, 3)).numpy(), abs=1e-4)
    assert column(made, "shift:mean") == pytest.approx((after - before).mean(dim=(1, 2, 3)).numpy(), abs=1e-4)
    assert (column(made, "ssim") < 0.9999).all()


def test_lengths_are_those_that_the_code_moved(explainer: Explainer, x: Tensor) -> None:
    made = table(explainer, x, [Edit("learned", 1, -1.0, 2.0)])
    code = explainer.model.encode(x, explainer.classifier.probabilities(x))
    moved = (explainer.directions.shift(code.z, 1, -2.0) - code.z).norm(dim=1)
    assert column(made, "length_z") == pytest.approx(moved.numpy(), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_the_table_does_not_depend_on_the_size_of_batches(explainer: Explainer, x: Tensor, batch_size: int) -> None:
    edits = plan_edits(K, (), 1, {})
    a, b = table(explainer, x, edits, batch_size=batch_size), table(explainer, x, edits)
    assert a["kind"].equals(b["kind"])
    for name in ("row", "direction", "alpha", "p_edit:treated", "l1", "length_z"):
        assert column(a, name) == pytest.approx(column(b, name), abs=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Explaining single images


def test_an_attribution_has_the_documented_shapes(explainer: Explainer, x: Tensor) -> None:
    why = explainer.attribute(x, "treated", alphas=ALPHAS)
    shapes = {f.name: tuple(getattr(why, f.name).shape) for f in fields(Attribution) if f.name != "target"}
    assert shapes == {
        "effect": (B, K, 2), "flips_at": (B, K, 2), "direction": (B,), "sign": (B,), "p_target": (B, 2),
        "counterfactual": (B, C, SIZE, SIZE), "reconstruction": (B, C, SIZE, SIZE),
    }  # fmt: skip
    assert why.target == "treated"
    assert why.counterfactual.abs().max() <= 1


def test_a_class_may_be_asked_for_by_name_or_number(explainer: Explainer, x: Tensor) -> None:
    assert torch.equal(explainer.attribute(x, "other").effect, explainer.attribute(x, 1).effect)


def test_effects_are_those_at_the_longest_alpha(explainer: Explainer, x: Tensor) -> None:
    why = explainer.attribute(x, "treated", alphas=(4.0, 1.0))
    made = table(explainer, x, [Edit("learned", k, s, 4.0) for k in range(K) for s in (1.0, -1.0)])
    effect = column(made, "p_edit:treated") - column(made, "p_reconstruction:treated")
    assert why.effect.permute(1, 2, 0).flatten().numpy() == pytest.approx(effect, abs=1e-4)


class Bright(nn.Module):
    """Says 'treated' of images whose mean exceeds a limit, more surely the brighter they are."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        over = 20 * (x.mean(dim=(1, 2, 3)) - self.limit)
        return torch.stack([torch.zeros_like(over), torch.full_like(over, -99.0), over], dim=1)


def judged_by(explainer: Explainer, limit: float) -> Explainer:
    return Explainer(explainer.model, explainer.directions, FrozenClassifier(Bright(limit), NAMES))


def test_where_nothing_flips_there_is_no_alpha(explainer: Explainer, x: Tensor) -> None:
    why = judged_by(explainer, 2.0).attribute(x, "treated", alphas=ALPHAS)
    assert why.flips_at.isnan().all()


def test_what_is_the_target_already_flips_at_once(explainer: Explainer, x: Tensor) -> None:
    why = judged_by(explainer, -2.0).attribute(x, "treated", alphas=ALPHAS)
    assert (why.flips_at == ALPHAS[0]).all()


def test_the_alpha_of_a_flip_is_the_smallest_at_which_the_classifier_says_target(
    explainer: Explainer, x: Tensor
) -> None:
    """The limit lies among the brightnesses that edits reach, so that some flip sooner, some later, some never."""
    judge, flips = between(explainer, x)
    why = judge.attribute(x, "treated", alphas=ALPHAS)
    assert torch.equal(why.flips_at.nan_to_num(99.0), flips.nan_to_num(99.0))


def between(explainer: Explainer, x: Tensor) -> tuple[Explainer, Tensor]:
    """A judge by brightness, and by hand what it must find: (B, K, 2) smallest alpha, or NaN."""
    code = explainer.model.encode(x, judged_by(explainer, 0.0).classifier.probabilities(x))
    brightness = torch.empty(B, K, 2, len(ALPHAS))
    for k, s, a in np.ndindex(K, 2, len(ALPHAS)):
        moved = explainer.directions.shift(code.z, k, ALPHAS[a] * (1 - 2 * s))
        brightness[:, k, s, a] = explainer.model.decode(moved, code.x_T).mean(dim=(1, 2, 3))
    reached = brightness.flatten().sort().values
    limit = float(reached[len(reached) * 3 // 4 : len(reached) * 3 // 4 + 2].mean())
    judge = judged_by(explainer, limit)
    # What the judge says of the originals enters the code: it must be the same for both limits, or else not matter.
    said = judge.classifier.probabilities(x)
    code = judge.model.encode(x, said)
    flips = torch.full((B, K, 2), torch.nan)
    for k, s in np.ndindex(K, 2):
        for alpha in reversed(ALPHAS):
            edited = judge.model.decode(judge.directions.shift(code.z, k, alpha * (1 - 2 * s)), code.x_T)
            flips[edited.mean(dim=(1, 2, 3)) > limit, k, s] = alpha
    assert flips.isnan().any()
    assert len(flips[~flips.isnan()].unique()) > 1
    return judge, flips


def test_the_counterfactual_takes_the_shortest_way_that_flips(explainer: Explainer, x: Tensor) -> None:
    judge, flips = between(explainer, x)
    why = judge.attribute(x, "treated", alphas=ALPHAS)
    signs = ((1 - why.sign) / 2).long()
    chosen = flips[torch.arange(B), why.direction, signs]
    shortest = flips.nan_to_num(torch.inf).flatten(1).min(dim=1).values
    assert torch.equal(chosen.nan_to_num(torch.inf), shortest)
    said = judge.classifier.probabilities(why.counterfactual).argmax(dim=1) == 2
    assert torch.equal(said, shortest.isfinite())


def test_where_nothing_flips_the_counterfactual_has_the_largest_effect(explainer: Explainer, x: Tensor) -> None:
    why = judged_by(explainer, 0.3).attribute(x, "treated", alphas=ALPHAS)
    assert why.flips_at.isnan().all()
    best = why.effect.flatten(1).argmax(dim=1)
    assert torch.equal(why.direction, best // 2)
    assert torch.equal(why.sign, 1.0 - 2.0 * (best % 2))
    change = why.p_target[:, 1] - why.p_target[:, 0]
    assert torch.allclose(change, why.effect.flatten(1).max(dim=1).values, atol=1e-4)


def test_an_attribution_does_not_depend_on_its_company(explainer: Explainer, x: Tensor) -> None:
    together = explainer.attribute(x, "treated", alphas=ALPHAS, batch_size=2)
    alone = explainer.attribute(x[1:2], "treated", alphas=ALPHAS)
    assert torch.allclose(together.effect[1:2], alone.effect, atol=1e-4)
    assert together.direction[1] == alone.direction[0]


def test_double_precision_images_are_taken(explainer: Explainer, x: Tensor) -> None:
    double = explainer.attribute(x.double(), "treated", alphas=ALPHAS)
    assert torch.allclose(double.effect.float(), explainer.attribute(x, "treated", alphas=ALPHAS).effect, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [(B, C, SIZE), (C, SIZE, SIZE), (B, 3, SIZE, SIZE), (B, C, 32, 32), (0, C, SIZE, SIZE)]
)
def test_images_of_another_shape_are_refused(explainer: Explainer, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"images of shape \(B, 2, 16, 16\), got \(") as caught:
        explainer.attribute(torch.zeros(shape), "treated")
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize("value", [1.5, -2.0, 255.0, float("nan"), float("inf")])
def test_images_out_of_range_are_refused(explainer: Explainer, x: Tensor, value: float) -> None:
    wrong = x.clone()
    wrong[1, 0, 3, 3] = value
    with pytest.raises(UserError, match=r"finite images in \[-1, 1\]"):
        explainer.attribute(wrong, "treated")


@pytest.mark.parametrize(
    ("target", "complaint"),
    [("tretaed", "did you mean 'treated'"), (3, "no class 3: the classes are 0 to 2"), (-1, "no class -1")],
)
def test_a_class_that_is_not_there_is_named(explainer: Explainer, x: Tensor, target: str | int, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        explainer.attribute(x, target)


def test_without_lengths_there_is_nothing_to_try(explainer: Explainer, x: Tensor) -> None:
    with pytest.raises(UserError, match="alpha"):
        explainer.attribute(x, "treated", alphas=())


# ----------------------------------------------------------------------------------------------------------------------
# Traversals, and the choice of images


def test_a_traversal_shows_every_image_at_every_length(explainer: Explainer, x: Tensor) -> None:
    images, probs = traversal(explainer, x, 1, [-2.0, 0.0, 2.0])
    assert images.shape == (B, 3, C, SIZE, SIZE)
    assert probs.shape == (B, 3, 3)
    code = explainer.model.encode(x, explainer.classifier.probabilities(x))
    for a, alpha in enumerate((-2.0, 0.0, 2.0)):
        edited = explainer.model.decode(explainer.directions.shift(code.z, 1, alpha), code.x_T)
        assert torch.allclose(images[:, a], edited, atol=1e-4)
        assert torch.allclose(probs[:, a], explainer.classifier.probabilities(edited), atol=1e-4)


LABELS = np.array([0, 1] * 30)
WELLS = np.repeat(np.arange(6), 10)


def chosen(num: int, predicted: np.ndarray = LABELS, groups: np.ndarray = WELLS, seed: int = 0) -> np.ndarray:
    return choose_rows(LABELS, predicted, groups, np.arange(10, 60), 1, num, seed)


def test_chosen_images_are_candidates_of_the_class_and_rightly_classified() -> None:
    predicted = LABELS.copy()
    predicted[[11, 13, 15]] = 0
    rows = chosen(1000, predicted)
    assert sorted(rows.tolist()) == [r for r in range(10, 60) if r % 2 and r not in (11, 13, 15)]


@pytest.mark.parametrize("num", [5, 10, 15])
def test_chosen_images_are_spread_evenly_over_units(num: int) -> None:
    assert np.bincount(WELLS[chosen(num)], minlength=6).tolist() == [0] + [num // 5] * 5


def test_small_units_give_all_they_have_before_others_fill_up() -> None:
    groups = np.where(np.arange(60) < 12, 0, 1)
    rows = chosen(6, groups=groups)
    assert np.bincount(groups[rows]).tolist() == [1, 5]


def test_the_choice_is_random_but_of_its_seed() -> None:
    assert chosen(10).tolist() == chosen(10).tolist()
    assert chosen(10).tolist() != chosen(10, seed=1).tolist()
    assert chosen(10)[:5].tolist() == chosen(5).tolist()  # a larger choice keeps the smaller one
