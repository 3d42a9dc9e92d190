"""Nuclei and cells: found, told apart and outlined, whatever the camera's gain and offset, and only where they are."""

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from diffex.assay import FACTORS, draw, plan, scene
from diffex.cells import (
    NUCLEUS_NAMES,
    central_cell,
    compartments,
    find_channel,
    nucleus_diameter,
    segment_cells,
    segment_nuclei,
    shared_cells,
    slow_background,
)
from diffex.errors import UserError

SIDE = 160
RNG = np.random.default_rng(0)
GRID = [(y, x) for y in (30, 80, 130) for x in (30, 80, 130)]


def discs(
    centres: list[tuple[float, float]], radius: float = 10.0, brightness: float = 1000.0, side: int = SIDE
) -> NDArray[np.float32]:
    """Blurred bright discs on black."""
    y, x = np.indices((side, side))
    inside = np.zeros((side, side))
    for cy, cx in centres:
        inside = np.maximum(inside, (np.hypot(y - cy, x - cx) <= radius) * brightness)
    return ndimage.gaussian_filter(inside, 1.2).astype(np.float32)


def noisy(plane: NDArray, offset: float = 200.0, noise: float = 15.0) -> NDArray[np.float32]:
    return (plane + offset + np.random.default_rng(1).normal(0, noise, plane.shape)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Nuclei


@pytest.mark.parametrize("radius", [5.0, 10.0, 18.0])
def test_discs_are_found_at_their_places_with_their_area(radius: float) -> None:
    labels = segment_nuclei(noisy(discs(GRID, radius)))
    assert labels.max() == len(GRID)
    centres = ndimage.center_of_mass(labels > 0, labels, np.arange(1, 10))
    assert np.abs(np.sort(np.array(centres), axis=0) - np.sort(np.array(GRID), axis=0)).max() < 1.0
    assert np.bincount(labels.ravel())[1:].mean() == pytest.approx(np.pi * radius**2, rel=0.12 if radius > 5 else 0.25)


def test_labels_run_in_raster_order() -> None:
    labels = segment_nuclei(noisy(discs(GRID)))
    firsts = [int(np.flatnonzero(labels.ravel() == k)[0]) for k in range(1, labels.max() + 1)]
    assert all(a < b for a, b in pairwise(firsts))


@pytest.mark.parametrize("radius", [5.0, 10.0, 18.0])
def test_the_typical_diameter_is_measured(radius: float) -> None:
    assert nucleus_diameter(noisy(discs(GRID, radius))) == pytest.approx(2 * radius, rel=0.1)


@pytest.mark.parametrize("distance", [16.0, 20.0, 24.0])
def test_nuclei_that_touch_are_split_at_the_neck(distance: float) -> None:
    pair = [(80.0, 80.0 - distance / 2), (80.0, 80.0 + distance / 2)]
    labels = segment_nuclei(noisy(discs([*pair, (30, 30), (130, 130), (30, 130)])), 20.0)
    assert labels.max() == 5
    assert labels[80, int(80 - distance / 2)] != labels[80, int(80 + distance / 2)]


def test_a_dim_nucleus_beside_bright_ones_keeps_its_size() -> None:
    plane = discs(GRID[1:]) + discs(GRID[:1], brightness=250.0)
    areas = np.bincount(segment_nuclei(noisy(plane)).ravel())[1:]
    assert len(areas) == 9
    assert areas[0] == pytest.approx(np.median(areas), rel=0.15)


def test_gain_and_offset_change_nothing() -> None:
    plane = noisy(discs(GRID))
    assert (segment_nuclei(plane) == segment_nuclei(3.5 * plane + 400.0)).mean() > 0.999


def test_turned_and_mirrored_images_have_the_same_nuclei() -> None:
    plane = noisy(discs([(30, 40), (80, 80), (84, 99), (130, 50)]))
    mask = segment_nuclei(plane, 20.0) > 0
    for turned, back in ((np.rot90(plane), lambda m: np.rot90(m, -1)), (plane[:, ::-1], lambda m: m[:, ::-1])):
        assert (back(segment_nuclei(np.ascontiguousarray(turned), 20.0) > 0) != mask).mean() < 0.002


def test_uneven_background_is_no_nucleus() -> None:
    slope = np.linspace(0, 400, 2 * SIDE)[None] * np.ones((2 * SIDE, 1))
    plane = noisy(discs(GRID, side=2 * SIDE)) + slope.astype(np.float32)
    assert segment_nuclei(plane, 20.0).max() == len(GRID)


@pytest.mark.parametrize(
    "plane",
    [
        np.zeros((64, 64), np.float32), np.full((64, 64), 1000.0, np.float32),
        RNG.normal(200, 10, (64, 64)).astype(np.float32), RNG.poisson(50, (128, 128)).astype(np.float32),
    ],
    ids=["black", "constant", "noise", "shot noise"],
)  # fmt: skip
def test_where_there_is_no_nucleus_none_is_found(plane: NDArray) -> None:
    assert segment_nuclei(plane).max() == 0
    assert np.isnan(nucleus_diameter(plane))


def test_specks_are_dropped() -> None:
    assert segment_nuclei(noisy(discs(GRID) + discs([(55, 55), (105, 105)], 1.5)), 20.0).max() == len(GRID)


def test_a_slow_background_is_found_beneath_the_nuclei() -> None:
    slope = (np.linspace(100, 400, SIDE)[None] * np.ones((SIDE, 1))).astype(np.float32)
    found = slow_background(discs(GRID, 4.0) + slope, 40.0)
    assert np.abs(found - slope)[20:-20, 20:-20].max() < 60.0


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def test_each_nucleus_gets_the_body_around_it() -> None:
    nuclei = segment_nuclei(noisy(discs(GRID, 8.0)), 16.0)
    bodies = discs(GRID, 20.0)
    cells = segment_cells(bodies / bodies.max(), nuclei)
    assert (cells[nuclei > 0] == nuclei[nuclei > 0]).all()
    assert np.bincount(cells.ravel())[1:].mean() == pytest.approx(np.pi * 20**2, rel=0.1)


def test_bodies_that_touch_are_shared_out_between_their_nuclei() -> None:
    centres = [(80.0, 62.0), (80.0, 98.0)]
    nuclei = segment_nuclei(noisy(discs(centres, 8.0)), 16.0)
    bodies = discs(centres, 20.0)
    cells = segment_cells(bodies / bodies.max(), nuclei)
    areas = np.bincount(cells.ravel())[1:]
    assert areas[0] == pytest.approx(areas[1], rel=0.05)
    assert cells[80, 66] == nuclei[80, 62] != cells[80, 94]


@pytest.mark.parametrize("border", [False, True])
def test_two_nuclei_are_one_cell_only_where_nothing_parts_them(border: bool) -> None:
    centres = [(80.0, 72.0), (80.0, 88.0)]
    dna = discs(centres, 8.0)
    body = discs([(80.0, 80.0)], 34.0)
    if border:  # a bright membrane between them
        body[:, 78:83] *= 1.8
    nuclei = segment_nuclei(noisy(dna), 16.0)
    assert nuclei.max() == 2
    shared = shared_cells(np.stack([dna, body]), 0, nuclei)
    assert shared.max() == (2 if border else 1)


def test_without_another_channel_nuclei_stay_as_they_are() -> None:
    nuclei = segment_nuclei(noisy(discs(GRID)))
    assert (shared_cells(discs(GRID)[None], 0, nuclei) == nuclei).all()


def test_the_central_cell_is_told_from_its_neighbours() -> None:
    dna = discs([(32, 32), (8, 8), (58, 50)], 7.0, side=64)
    body = discs([(32, 32), (8, 8), (58, 50)], 13.0, side=64)
    nuclei, cell, count = central_cell(np.stack([dna, body]), 0)
    assert count == 1
    assert cell[32, 32] and not cell[8, 8] and not cell[58, 50]
    assert (cell | ~nuclei).all()


@pytest.mark.parametrize("own", [[(32, 32)], [(32, 22), (32, 42)]], ids=["one", "two"])
def test_a_neighbours_nucleus_that_the_border_cuts_is_not_the_cells_own(own: list[tuple[int, int]]) -> None:
    """One body holds all of them, so nothing parts the neighbour; but a crop is centred on its own cell's nuclei."""
    image = np.stack([discs([*own, (55, 32)], 10.0, side=64), discs([(36, 32)], 30.0, side=64)])
    single = segment_nuclei(image[0])
    assert single.max() == len(own) + 1 and shared_cells(image, 0, single).max() == 1
    nuclei, cell, count = central_cell(image, 0, background=0.0)
    assert count == len(own)
    assert all(nuclei[y, x] for y, x in own)
    assert not nuclei[55, 32] and not cell[58, 32]


@pytest.mark.parametrize("channels", [("DNA", "tubulin", "actin"), ("DNA", "actin")])
def test_simulated_cells_are_outlined_and_their_nuclei_counted(channels: tuple[str, ...]) -> None:
    """Single-cell images with neighbours reaching in; measured: median overlap of cells 0.91 and 0.81, nuclei 0.98."""
    cells = plan(treatments={"none": {}}, channels=channels, num_images=64, num_plates=1, wells_per_class=1)
    true = scene(cells, 64, np.arange(64))
    found = [central_cell(image.astype(np.float32), 0) for image in np.concatenate(list(draw(cells, 64)))]
    body, nuclei = true.body > 0.5, np.maximum(*true.nuclei) > 0.5
    for part, truth, least, typical in ((1, body, 0.5, 0.75), (0, nuclei, 0.8, 0.95)):
        overlap = [(t & f[part]).sum() / (t | f[part]).sum() for t, f in zip(truth, found, strict=True)]
        assert np.quantile(overlap, 0.05) >= least
        assert np.median(overlap) >= typical
    counts = cells.visible_scores()[:, list(FACTORS).index("nucleus_count")]
    assert np.mean([f[2] for f in found] == counts) >= 0.95


# ----------------------------------------------------------------------------------------------------------------------
# Channels


@pytest.mark.parametrize(
    ("channels", "position"),
    [
        (("actin", "DNA"), 1), (("OrigER", "OrigDNA"), 1), (("Hoechst 33342", "GFP"), 0), (("w1 DAPI", "w2"), 0),
        (("ER", "AGP"), None), (("cDNA2", "x"), None),
    ],
)  # fmt: skip
def test_the_channel_of_nuclei_is_told_by_its_name(channels: tuple[str, ...], position: int | None) -> None:
    assert find_channel(channels, None, NUCLEUS_NAMES) == position


def test_a_channel_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no channel 'DNS': did you mean 'DNA'"):
        find_channel(("DNA", "actin"), "DNS")


# ----------------------------------------------------------------------------------------------------------------------
# Photographs


def photograph(radius: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """A red blood cell: a disc darker than the ground, with a pale middle and a stain; and its true mask."""
    y, x = np.mgrid[:32, :32] - 15.5
    disc = np.hypot(y, x) < radius
    image = np.full((3, 32, 32), 0.95, np.float32) - 0.3 * disc
    image[:, np.hypot(y, x) < 4] += 0.1
    image[1, np.hypot(y - 4, x) < 2] -= 0.3
    return image + 0.01 * np.random.default_rng(0).standard_normal(image.shape).astype(np.float32), disc


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_in_photographs_cells_are_darker_than_the_ground() -> None:
    image, disc = photograph()
    masks, count = compartments(image, ("red", "green", "blue"))
    assert count is None
    assert set(masks) == {"Cells"}
    assert overlap(masks["Cells"], disc) > 0.75  # blurred a little, a small disc grows by a pixel


def test_the_negative_of_a_photograph_under_the_name_of_a_stain_is_the_same_cell() -> None:
    image, _ = photograph()
    negative = image.max(axis=(1, 2), keepdims=True) - image
    seen = compartments(negative, ("actin", "tubulin", "ER"))[0]["Cells"]
    assert (seen == compartments(image, ("Red", "Green", "Blue"))[0]["Cells"]).all()


def test_one_stain_among_them_makes_it_no_photograph() -> None:
    image, disc = photograph()
    masks, count = compartments(image, ("red", "green", "DNA"))
    assert count is not None
    assert overlap(masks["Cells"], disc) < 0.75
