"""The way to a counterfactual: rendered and judged as by hand, and measured on paths of known shape."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffex import metrics
from diffex.classifier import FrozenClassifier
from diffex.compute import Compute
from diffex.config import Autoencoder, Rendering
from diffex.directions import DirectionSet, Subspace
from diffex.explain import render_trajectory
from diffex.model import Code, DiffusionAutoencoder
from diffex.networks import ResidualClassifier
from diffex.trajectories import flip_area, smallest_flip, smoothness, trajectory_table

NAMES = ("control", "treated")
B, C, SIZE = 3, 2, 16
ALPHAS = (0.0, 1.5, 3.0, 4.5)
ROWS = torch.tensor([70, 5, 31])


@pytest.fixture(scope="module")
def model() -> DiffusionAutoencoder:
    """An autoencoder that has learnt nothing, yet renders something."""
    torch.manual_seed(0)
    made = DiffusionAutoencoder(
        Autoencoder(code_dim=6, widths=(8, 8), encoder_widths=(8, 8)), Rendering(steps=3, iterations=3), channels=C,
        size=SIZE, num_classes=2, compute=Compute(torch.device("cpu"), False),
    )  # fmt: skip
    for parameter in made.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def directions() -> DirectionSet:
    torch.manual_seed(1)
    subspace = Subspace.of(torch.randn(100, 6), "whitened", 0.9)
    return DirectionSet.fixed(torch.randn(3, subspace.rank), subspace)


@pytest.fixture(scope="module")
def code(model: DiffusionAutoencoder) -> Code:
    x = torch.rand(B, C, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return model.encode(x, torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]))


@pytest.fixture(scope="module")
def images(model: DiffusionAutoencoder, directions: DirectionSet, code: Code) -> Tensor:
    return render_trajectory(model, directions, code, 1, ALPHAS)


@pytest.fixture(scope="module")
def judges() -> dict[str, FrozenClassifier]:
    made = {}
    for seed, name in enumerate(("p", "witness")):
        torch.manual_seed(seed)
        network = ResidualClassifier(C, 2, width=4)
        nn.init.normal_(network.head.weight)
        made[name] = FrozenClassifier(network, NAMES)
    return made


def distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(dim=1)


@pytest.fixture(scope="module")
def table(images: Tensor, judges: dict[str, FrozenClassifier]) -> pa.Table:
    return trajectory_table(images, ALPHAS, ROWS, judges, distance)


def column(made: pa.Table, name: str) -> NDArray:
    """A column as (A, B): every step of all images comes together."""
    return np.asarray(made[name].to_numpy()).reshape(len(ALPHAS), B)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures and verdicts


def test_every_step_is_the_image_of_its_shifted_code(
    model: DiffusionAutoencoder, directions: DirectionSet, code: Code, images: Tensor
) -> None:
    assert images.shape == (len(ALPHAS), B, C, SIZE, SIZE)
    for alpha, found in zip(ALPHAS, images, strict=True):
        assert torch.allclose(found, model.decode(directions.shift(code.z, 1, alpha), code.x_T), atol=1e-5)
    assert distance(images[0], images[-1]).min() > 1e-4, "the codes move the images at all"


def test_the_way_starts_at_the_reconstruction(model: DiffusionAutoencoder, code: Code, images: Tensor) -> None:
    assert torch.allclose(images[0], model.decode(code.z, code.x_T), atol=1e-5)


def test_negative_lengths_go_the_other_way(
    model: DiffusionAutoencoder, directions: DirectionSet, code: Code, images: Tensor
) -> None:
    back = render_trajectory(model, directions, code, 1, (0.0, -3.0))
    assert torch.allclose(back[1], model.decode(directions.shift(code.z, 1, -3.0), code.x_T), atol=1e-5)
    assert not torch.allclose(back[1], images[2], atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_that_part_steps_change_nothing(
    model: DiffusionAutoencoder, directions: DirectionSet, code: Code, images: Tensor, batch_size: int
) -> None:
    again = render_trajectory(model, directions, code, 1, ALPHAS, batch_size)
    assert torch.allclose(again, images, atol=1e-5)


def test_the_table_has_a_row_for_every_image_and_step(table: pa.Table) -> None:
    assert len(table) == len(ALPHAS) * B
    keys = zip(*(table[n].to_pylist() for n in ("row", "step", "alpha")), strict=True)
    assert set(keys) == {(r, s, a) for r in ROWS.tolist() for s, a in enumerate(ALPHAS)}


def test_the_table_has_the_documented_columns(table: pa.Table) -> None:
    assert set(table.column_names) == {
        "row", "step", "alpha", "step_distance", "distance", "ssim", "l1", "p:control", "p:treated", "witness:control",
        "witness:treated",
    }  # fmt: skip


def test_verdicts_are_those_of_each_judge_on_each_image(
    table: pa.Table, images: Tensor, judges: dict[str, FrozenClassifier]
) -> None:
    for name, judge in judges.items():
        probs = torch.stack([judge.probabilities(step) for step in images]).numpy()
        for j, c in enumerate(NAMES):
            assert column(table, f"{name}:{c}") == pytest.approx(probs[:, :, j], abs=1e-5)
    assert not np.allclose(column(table, "p:treated"), column(table, "witness:treated"))


def test_distances_are_to_the_start_and_to_the_step_before(table: pa.Table, images: Tensor) -> None:
    for s, step in enumerate(images):
        start = images[0]
        assert column(table, "distance")[s] == pytest.approx(distance(start, step).numpy(), rel=1e-4, abs=1e-8)
        assert column(table, "ssim")[s] == pytest.approx(metrics.ssim(start, step).numpy(), abs=1e-5)
        assert column(table, "l1")[s] == pytest.approx((step - start).abs().mean(dim=(1, 2, 3)).numpy() / 2, abs=1e-6)
        before = images[max(s - 1, 0)]
        assert column(table, "step_distance")[s] == pytest.approx(distance(before, step).numpy(), rel=1e-4, abs=1e-8)


def test_nothing_has_happened_at_the_first_step(table: pa.Table) -> None:
    for name in ("step", "alpha", "step_distance", "distance", "l1"):
        assert (column(table, name)[0] == 0).all()
    assert column(table, "ssim")[0] == pytest.approx(1.0, abs=1e-4)


def test_rows_of_the_table_belong_to_the_images_of_their_number(table: pa.Table, images: Tensor) -> None:
    """An image's own rows, found by its number, tell its own way."""
    mine = table.filter(pc.equal(table["row"], 5))
    assert mine["distance"].to_numpy() == pytest.approx([float(distance(images[:1, 1], x[None])) for x in images[:, 1]])


# ----------------------------------------------------------------------------------------------------------------------
# Shape of the way


def walk(*places: float) -> tuple[NDArray, NDArray]:
    """Squared distances of consecutive places on a line, and of the first and the last, of one image."""
    x = np.array([places])
    return np.diff(x) ** 2, (x[:, -1] - x[:, 0]) ** 2


def test_a_straight_even_way_is_perfect() -> None:
    found = smoothness(np.linspace(0.1, 0.9, 6)[None], *walk(0, 1, 2, 3, 4, 5))
    assert found.evenness == pytest.approx([1.0])
    assert found.detour == pytest.approx([1.0])
    assert found.monotonic == pytest.approx([1.0])
    assert found.curvature == pytest.approx([0.0], abs=1e-12)


def test_a_jump_is_straight_but_happens_at_once() -> None:
    found = smoothness(np.array([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), *walk(0, 0, 0, 5, 5, 5))
    assert found.evenness == pytest.approx([1 / 5])
    assert found.detour == pytest.approx([1.0])
    assert found.monotonic == pytest.approx([1.0])
    assert found.curvature == pytest.approx([2 / 4])


def test_the_way_there_and_back_is_no_straight_one() -> None:
    p = np.array([[0.0, 0.5, 1.0, 0.5, 0.0]])
    found = smoothness(p, *walk(0, 1, 2, 1, 0))
    assert found.evenness == pytest.approx([1.0])
    assert np.isinf(found.detour).all()
    assert found.monotonic == pytest.approx([0.5])
    assert smoothness(p, *walk(0, 1, 2, 1, 0.5)).detour == pytest.approx([3.5 / 0.5])


def test_a_way_that_goes_nowhere_is_even_and_straight() -> None:
    found = smoothness(np.full((1, 4), 0.3), *walk(2, 2, 2, 2))
    assert [float(v[0]) for v in vars(found).values()] == [1.0, 1.0, 1.0, 0.0]


def test_a_verdict_that_jumps_to_and_fro_is_as_curved_as_can_be() -> None:
    found = smoothness(np.array([[0.0, 1.0, 0.0, 1.0, 0.0]]), *walk(0, 1, 2, 3, 4))
    assert found.curvature == pytest.approx([2.0])
    assert found.monotonic == pytest.approx([0.5])


def test_a_fall_by_less_than_two_hundredths_is_noise() -> None:
    found = smoothness(np.array([[0.5, 0.49, 0.48], [0.5, 0.47, 0.44]]), *(np.ones((2, 2)), np.ones(2)))
    assert found.monotonic.tolist() == [1.0, 0.0]


def test_lengths_are_the_roots_of_the_distances() -> None:
    """Distances are squares: steps of 1 and 3 on a line have distances of 1 and 9, and their sum one of 16."""
    found = smoothness(np.array([[0.0, 0.5, 1.0]]), np.array([[1.0, 9.0]]), np.array([16.0]))
    assert found.evenness == pytest.approx([2 / 3])
    assert found.detour == pytest.approx([1.0])


def test_detour_is_never_below_one_in_a_space_of_features() -> None:
    x = np.random.default_rng(0).standard_normal((50, 7, 4)).cumsum(axis=1)
    step, whole = (np.diff(x, axis=1) ** 2).sum(axis=2), ((x[:, -1] - x[:, 0]) ** 2).sum(axis=1)
    found = smoothness(np.zeros((50, 7)), step, whole)
    assert (found.detour >= 1.0).all()
    assert ((found.evenness > 1 / 6) & (found.evenness < 1.0)).all()


def test_each_image_has_its_own_numbers() -> None:
    p, step, whole = np.array([[0.0, 0.5, 1.0], [0.0, 1.0, 0.0]]), np.array([[1.0, 1], [1, 0]]), np.array([4.0, 1])
    both = smoothness(p, step, whole)
    for i in range(2):
        alone = smoothness(p[i : i + 1], step[i : i + 1], whole[i : i + 1])
        assert [v[i] for v in vars(both).values()] == [v[0] for v in vars(alone).values()]


def test_a_single_step_has_no_curvature() -> None:
    assert smoothness(np.array([[0.1, 0.9]]), *walk(0, 1)).curvature.tolist() == [0.0]


# ----------------------------------------------------------------------------------------------------------------------
# Where the verdict flips


def flips(*steps: int) -> NDArray[np.bool_]:
    return np.array([steps], bool)


@pytest.mark.parametrize(
    ("steps", "area"),
    [((1, 1, 1, 1, 1), 1.0), ((0, 0, 0, 0, 0), 0.0), ((0, 1, 1, 1, 1), 7 / 8), ((0, 0, 0, 0, 1), 1 / 8),
     ((0, 0, 1, 0, 0), 1 / 4)],
    ids=["at once", "never", "at the first step", "at the last", "and back"],
)  # fmt: skip
def test_the_area_is_the_share_of_the_way_that_is_flipped(steps: tuple[int, ...], area: float) -> None:
    assert flip_area(flips(*steps), np.arange(5.0)) == pytest.approx([area])


def test_the_area_goes_by_length_not_by_steps() -> None:
    alphas = np.array([0.0, 1.0, 2.0, 10.0])
    assert flip_area(flips(0, 0, 1, 1), alphas) == pytest.approx([0.85])
    assert flip_area(flips(0, 0, 1, 1), -3 * alphas) == pytest.approx([0.85])


def test_the_flip_lies_where_the_probability_crosses_one_half() -> None:
    p = np.array([[0.1, 0.3, 0.7, 0.9], [0.1, 0.4, 0.8, 0.9], [0.1, 0.2, 0.3, 0.6]])
    found = smallest_flip(p, p > 0.5, np.array([0.0, 2.0, 4.0, 6.0]))
    assert found == pytest.approx([3.0, 2.5, 4 + 2 * 0.2 / 0.3])


def test_a_negative_way_has_positive_lengths() -> None:
    p = np.array([[0.1, 0.3, 0.7]])
    assert smallest_flip(p, p > 0.5, np.array([0.0, -2.0, -4.0])) == pytest.approx([3.0])


def test_the_first_flip_counts_though_it_turns_back() -> None:
    p = np.array([[0.0, 1.0, 0.0, 1.0]])
    assert smallest_flip(p, p > 0.5, np.arange(4.0)) == pytest.approx([0.5])


def test_what_is_flipped_already_flips_at_nothing_and_what_never_flips_at_no_length() -> None:
    p = np.array([[0.9, 0.9, 0.9], [0.1, 0.2, 0.3]])
    found = smallest_flip(p, p > 0.5, np.arange(3.0))
    assert found == pytest.approx([0.0, np.nan], nan_ok=True)


def test_among_many_classes_a_flip_below_one_half_lies_at_its_step() -> None:
    """The largest of three probabilities can be less than one half; where between the steps is not known."""
    p = np.array([[0.1, 0.3, 0.4, 0.7]])
    assert smallest_flip(p, flips(0, 0, 1, 1), np.arange(4.0)).tolist() == [2.0]


def test_a_tie_flips_where_it_is_broken() -> None:
    p = np.array([[0.2, 0.5, 0.8]])
    assert smallest_flip(p, flips(0, 0, 1), np.arange(3.0)) == pytest.approx([1.0])


def test_a_flip_is_never_before_the_last_step_that_was_not_nor_after_the_first_that_was() -> None:
    p = np.random.default_rng(0).random((200, 6))
    p[:, 0] *= 0.5
    found, first = smallest_flip(p, p > 0.5, np.arange(6.0)), (p > 0.5).argmax(axis=1)
    can = (p > 0.5).any(axis=1)
    assert ((found[can] >= first[can] - 1) & (found[can] <= first[can])).all()
    assert np.isnan(found[~can]).all()
