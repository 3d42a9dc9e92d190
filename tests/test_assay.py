"""The simulated assay: equal seeds give equal cells, planted factors show, decoys stay, nuisances are fair."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from diffex.assay import (
    CHANNELS,
    CHUNK,
    CONTROL,
    DESIGNS,
    FACTORS,
    NUISANCES,
    Plan,
    draw,
    plan,
    planted_factors,
    visible_factors,
)
from diffex.errors import UserError

NAMES = list(FACTORS)
SHIFTS = {"actin_rim": -2.0, "nucleus_area": 1.5}


def screen(
    treatments: dict[str, dict[str, float]] | None = None, channels: tuple[str, ...] = ("DNA", "actin"), **more: object
) -> Plan:
    """A small screen without random effects of wells and plates, unless they are asked for."""
    settings = {"num_images": 96, "num_plates": 2, "wells_per_class": 2, "well_sd": 0.0, "plate_sd": 0.0, **more}
    return plan(treatments=treatments or {"drug": SHIFTS}, channels=channels, **settings)  # type: ignore[arg-type]


def pictures(p: Plan, size: int = 32, indices: list[int] | None = None) -> NDArray[np.uint8]:
    return np.concatenate(list(draw(p, size, indices)))


def with_factor(p: Plan, name: str, score: float) -> Plan:
    """The same cells, but for one factor, which is alike in all of them."""
    scores = p.scores.copy()
    scores[:, NAMES.index(name)] = score
    return replace(p, scores=scores)


# ----------------------------------------------------------------------------------------------------------------------
# Reproducible


def test_equal_seeds_give_equal_screens_to_the_bit() -> None:
    a, b = screen(seed=3, well_sd=0.2), screen(seed=3, well_sd=0.2)
    assert (a.scores == b.scores).all()
    assert (pictures(a) == pictures(b)).all()


def test_another_seed_gives_other_cells_and_other_pixel_noise() -> None:
    a, b = screen(seed=3), screen(seed=4)
    assert (a.scores != b.scores).any(axis=1).all()
    noise_only = replace(a, seed=4)
    assert (pictures(a) != pictures(noise_only)).any(axis=(1, 2, 3)).all()


def test_a_cell_does_not_depend_on_which_others_are_drawn() -> None:
    p = screen()
    every = pictures(p)
    assert len(p) > 2 * CHUNK
    chosen = [70, 3, 4, 95, 33]
    assert (pictures(p, indices=chosen) == every[chosen]).all()


def test_cells_are_drawn_in_chunks_in_the_order_asked_for() -> None:
    sizes = [len(chunk) for chunk in draw(screen(), 32, list(range(CHUNK + 5)))]
    assert sizes == [CHUNK, 5]


def test_drawing_no_cell_yields_nothing() -> None:
    assert list(draw(screen(), 32, [])) == []


def test_the_same_cell_appears_at_every_size() -> None:
    """Shrunk to 32 pixels, a cell drawn at 128 resembles itself drawn at 32, and no other as much."""
    p = screen(channels=("actin",), num_images=12, num_plates=1)
    small, large = pictures(p, 32)[:, 0].astype(float), pictures(p, 128)[:, 0].astype(float)
    shrunk = large.reshape(-1, 32, 4, 32, 4).mean(axis=(2, 4))
    alike = np.corrcoef(small.reshape(12, -1), shrunk.reshape(12, -1))[:12, 12:]
    assert (alike.argmax(axis=1) == np.arange(12)).all()
    assert alike.diagonal().min() > 0.7


# ----------------------------------------------------------------------------------------------------------------------
# Channels and sizes


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_one_to_five_channels_are_drawn_as_bytes(count: int) -> None:
    images = pictures(screen(channels=CHANNELS[:count], num_images=8, num_plates=1))
    assert images.shape == (8, count, 32, 32)
    assert images.dtype == np.uint8


@pytest.mark.parametrize("size", [32, 48, 65, 128])
def test_any_size_from_32_to_128_is_drawn(size: int) -> None:
    assert pictures(screen(), size, [0]).shape == (1, 2, size, size)


@pytest.mark.parametrize("size", [31, 129, 8])
def test_other_sizes_are_refused_with_the_range(size: int) -> None:
    with pytest.raises(UserError, match=rf"32 to 128.*got {size}.*data\.size"):
        next(draw(screen(), size))


def test_the_order_of_the_channels_is_the_order_asked_for() -> None:
    ab, ba = screen(channels=("DNA", "actin")), screen(channels=("actin", "DNA"))
    correlation = np.corrcoef(pictures(ab, indices=[0])[0, 0].ravel(), pictures(ba, indices=[0])[0, 1].ravel())
    assert correlation[0, 1] > 0.95  # all but the pixel noise


@pytest.mark.parametrize("channel", CHANNELS)
def test_every_channel_shows_a_bright_cell_on_a_dark_ground_without_saturating(channel: str) -> None:
    images = pictures(screen(channels=(channel,)))[:, 0]
    inner, outer = images[:, 8:24, 8:24], images[:, :2, :2]
    assert inner.mean() > 2 * outer.mean()
    assert (images == 255).mean() < 0.02


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"channels": ("DNA", "actine")}, "'actine'.*DNA, tubulin, actin, Golgi, mitochondria"),
        ({"channels": ("DNA", "DNA")}, "different channels"),
        ({"channels": ()}, "1 to 5"),
        ({"treatments": {"drug": {"actin": 1.0}}}, "'actin'.*actin_rim"),
        ({"treatments": {CONTROL: {}}}, "control"),
        ({"num_images": 7}, "assay.num_images = 7.*8 wells"),
        ({"num_plates": 0}, "num_plates >= 1"),
        ({"wells_per_class": 0}, "wells_per_class >= 1"),
        ({"doses": ()}, "doses"),
        ({"doses": (1.0, -0.5)}, "doses >= 0"),
    ],
)
def test_an_impossible_screen_is_refused_with_what_is_possible(settings: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        screen(**settings)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------------
# Layout


def test_there_are_enough_factors_and_nuisances() -> None:
    assert len(FACTORS) >= 7
    assert len(NUISANCES) >= 4
    assert len(visible_factors(("DNA", "tubulin", "actin"))) >= 7


def test_a_factor_that_no_chosen_channel_shows_is_not_listed() -> None:
    assert "golgi_dispersion" not in visible_factors(("DNA", "tubulin", "actin"))
    assert "golgi_dispersion" in visible_factors(("DNA", "Golgi"))
    assert set(visible_factors(("DNA",))) == {"nucleus_area", "nucleus_count", "chromatin_texture"}
    assert set(visible_factors(CHANNELS)) == set(FACTORS)


def test_planted_factors_are_those_moved_and_visible() -> None:
    treatments = {"a": {"actin_rim": 1.0, "nucleus_area": 0.0}, "b": {"golgi_dispersion": 2.0}}
    assert planted_factors(treatments, ("DNA", "actin")) == ("actin_rim",)
    assert set(planted_factors(treatments, ("actin", "Golgi"))) == {"actin_rim", "golgi_dispersion"}


@pytest.mark.parametrize("design", DESIGNS)
def test_every_design_makes_its_classes_and_a_control_of_nearly_equal_size(design: str) -> None:
    p = screen(DESIGNS[design], num_images=400)
    assert p.class_names == tuple(sorted({CONTROL, *DESIGNS[design]}))
    counts = np.bincount(p.labels, minlength=len(p.class_names))
    wells_of_a_class = 4
    assert counts.max() - counts.min() <= wells_of_a_class


def test_the_multiclass_design_has_more_than_two_classes() -> None:
    assert len(screen(DESIGNS["multiclass"]).class_names) >= 4


def test_the_golgi_design_moves_a_factor_of_the_golgi_channel() -> None:
    assert "golgi_dispersion" in planted_factors(DESIGNS["golgi"], ("DNA", "Golgi"))


def test_the_null_design_plants_nothing() -> None:
    assert planted_factors(DESIGNS["null"], CHANNELS) == ()


def test_every_plate_holds_wells_of_every_class_and_a_well_holds_one_class_and_dose() -> None:
    p = screen(num_images=200, wells_per_class=3, doses=(0.5, 1.0))
    plates, wells = p.metadata["Metadata_Plate"], p.metadata["Metadata_Well"]
    held: dict[tuple[str, str], set[tuple[int, float]]] = {}
    for key in zip(plates, wells, p.labels, p.metadata["Metadata_Dose"], strict=True):
        held.setdefault(key[:2], set()).add(key[2:])
    assert len(held) == 2 * 2 * 3
    assert all(len(inside) == 1 for inside in held.values())
    assert all(set(p.labels[plates == plate]) == {0, 1} for plate in set(plates))


def test_metadata_have_one_entry_a_cell() -> None:
    p = screen()
    assert {len(column) for column in p.metadata.values()} == {len(p)}
    assert (np.array(p.class_names)[p.labels] == p.metadata["Metadata_Compound"]).all()


def test_the_control_is_given_no_dose() -> None:
    p = screen(doses=(0.5, 2.0))
    control = p.metadata["Metadata_Compound"] == CONTROL
    assert (p.metadata["Metadata_Dose"][control] == 0).all()
    assert set(p.metadata["Metadata_Dose"][~control]) == {0.5, 2.0}


# ----------------------------------------------------------------------------------------------------------------------
# Factors


def class_difference(p: Plan, chosen: NDArray[np.bool_] | None = None) -> NDArray:
    """Mean score of the treated (or of those chosen) less that of the control, for every factor."""
    control = p.metadata["Metadata_Compound"] == CONTROL
    treated = ~control if chosen is None else chosen
    return p.scores[treated].mean(axis=0) - p.scores[control].mean(axis=0)


def test_planted_factors_move_by_their_shift_and_decoys_stay() -> None:
    p = screen(num_images=8000)
    planted = np.array([SHIFTS.get(name, 0.0) for name in NAMES])
    error = np.sqrt(2 / 4000)
    assert np.abs(class_difference(p) - planted).max() < 4.5 * error


def test_at_half_the_dose_planted_factors_move_by_half() -> None:
    p = screen(num_images=8000, doses=(0.5, 1.0))
    planted = np.array([SHIFTS.get(name, 0.0) for name in NAMES])
    for dose in (0.5, 1.0):
        moved = class_difference(p, p.metadata["Metadata_Dose"] == dose)
        assert np.abs(moved - dose * planted).max() < 4.5 * np.sqrt(1 / 2000 + 1 / 4000)


def test_scores_of_the_control_are_standard_normal() -> None:
    p = screen(num_images=8000)
    control = p.scores[p.metadata["Metadata_Compound"] == CONTROL]
    assert np.abs(control.mean(axis=0)).max() < 4.5 / np.sqrt(4000)
    assert np.abs(control.std(axis=0) - 1).max() < 4.5 / np.sqrt(2 * 4000)
    assert np.abs(np.corrcoef(control.T) - np.eye(len(NAMES))).max() < 4.5 / np.sqrt(4000)


def test_in_the_null_design_classes_have_the_same_scores_and_pixels() -> None:
    p = screen(DESIGNS["null"], num_images=1200, channels=("DNA", "tubulin", "actin"))
    assert np.abs(class_difference(p)).max() < 4.5 * np.sqrt(2 / 600)
    images = pictures(p).astype(float)
    summaries = np.concatenate([images.mean(axis=(2, 3)), images.std(axis=(2, 3)), images.max(axis=(2, 3))], axis=1)
    a, b = summaries[p.labels == 0], summaries[p.labels == 1]
    z = (a.mean(axis=0) - b.mean(axis=0)) / np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
    assert np.abs(z).max() < 4


def test_in_the_binary_design_pixels_of_the_classes_differ() -> None:
    """The other half of the null: the same summaries do tell classes apart where something is planted."""
    p = screen(DESIGNS["binary"], num_images=200)
    brightness = pictures(p)[:, 1].mean(axis=(1, 2))
    a, b = brightness[p.labels == 0], brightness[p.labels == 1]
    assert abs(a.mean() - b.mean()) > 8 * np.sqrt(a.var() / len(a) + b.var() / len(b))


def test_nuisances_have_the_same_distribution_in_every_class() -> None:
    p = screen(DESIGNS["binary"], num_images=6000)
    for name, values in p.nuisance.items():
        flat = values.reshape(len(p), -1).astype(float)
        a, b = flat[p.labels == 0], flat[p.labels == 1]
        z = (a.mean(axis=0) - b.mean(axis=0)) / np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
        assert np.abs(z).max() < 4.5, name


def test_visible_scores_count_what_has_a_threshold() -> None:
    p = screen(num_images=500)
    visible = p.visible_scores()
    for i, (name, factor) in enumerate(FACTORS.items()):
        if factor.threshold is None:
            assert (visible[:, i] == p.scores[:, i]).all(), name
        else:
            assert set(visible[:, i]) == {1.0, 2.0}, name


@pytest.mark.parametrize("name", NAMES)
def test_a_physical_value_is_positive_and_rises_with_its_score(name: str) -> None:
    values = FACTORS[name].physical(np.linspace(-6, 6, 49, dtype=np.float32))
    assert (values > 0).all()
    assert np.isfinite(values).all()
    assert (np.diff(values) >= 0).all()
    assert values[-1] > values[0]


# ----------------------------------------------------------------------------------------------------------------------
# Factors in pixels


@pytest.mark.parametrize("name", NAMES)
def test_a_factor_shows_in_its_channels_and_hardly_elsewhere(name: str) -> None:
    p = screen(channels=CHANNELS, num_images=32, num_plates=1)
    low, high = (pictures(with_factor(p, name, u)).astype(float) for u in (-2.0, 2.0))
    change = np.abs(high - low).mean(axis=(0, 2, 3))
    shown = np.array([channel in FACTORS[name].channels for channel in CHANNELS])
    assert change[shown].min() > 1.5, change
    assert shown.all() or change[~shown].max() < change[shown].min() / 3, change


def test_a_stronger_rim_brightens_the_actin_channel_and_no_other_pixel() -> None:
    p = screen(channels=("DNA", "tubulin", "actin"), num_images=32, num_plates=1)
    low, high = (pictures(with_factor(p, "actin_rim", u)) for u in (-1.5, 1.5))
    assert (low[:, :2] == high[:, :2]).all()
    assert (high[:, 2].mean(axis=(1, 2)) > low[:, 2].mean(axis=(1, 2))).all()


def test_a_larger_nucleus_covers_more_of_the_dna_channel() -> None:
    p = with_factor(screen(channels=("DNA",), num_images=32, num_plates=1), "nucleus_count", 0.0)
    areas = []
    for u in (-1.5, 0.0, 1.5):
        image = pictures(with_factor(p, "nucleus_area", u))[:, 0, 6:26, 6:26].astype(float)  # without neighbours
        areas.append((image > 0.5 * np.quantile(image, 0.99, axis=(1, 2), keepdims=True)).sum(axis=(1, 2)))
    assert (areas[0] < areas[1]).mean() > 0.95
    assert (areas[1] < areas[2]).mean() > 0.95


def test_two_nuclei_hold_more_dna_than_one() -> None:
    p = screen(channels=("DNA",), num_images=32, num_plates=1)
    one, two = (pictures(with_factor(p, "nucleus_count", u)).sum(axis=(1, 2, 3)) for u in (0.0, 2.0))
    assert (two > one).mean() > 0.9  # where the second one lies outside the cell it is cut off


def test_a_larger_cell_covers_more_of_the_actin_channel() -> None:
    p = screen(channels=("actin",), num_images=32, num_plates=1)
    small, large = (pictures(with_factor(p, "cytoplasm_area", u))[:, 0] for u in (-1.5, 1.5))
    assert ((large > 40).sum(axis=(1, 2)) > (small > 40).sum(axis=(1, 2))).mean() > 0.95


@pytest.mark.parametrize(
    "nuisance",
    ["position", "rotation", "outline", "neighbour_angle", "focus", "illumination", "background", "gain"],
)
def test_every_nuisance_shows(nuisance: str) -> None:
    p = screen(channels=("actin",), num_images=32, num_plates=1)
    values = np.roll(p.nuisance[nuisance], 1, axis=0)  # every cell takes its neighbour's value
    other = replace(p, nuisance={**p.nuisance, nuisance: values})
    assert np.abs(pictures(p).astype(float) - pictures(other)).mean() > 0.5


# ----------------------------------------------------------------------------------------------------------------------
# Wells and plates


def spread_of_wells(p: Plan) -> float:
    """Variance of the wells' mean scores within a class, in units of what sampling alone would give."""
    names = np.char.add(p.metadata["Metadata_Plate"], p.metadata["Metadata_Well"])
    well = np.unique(names, return_inverse=True)[1]
    cells = len(p) / (well.max() + 1)
    means = np.array([p.scores[well == w].mean(axis=0) for w in range(well.max() + 1)])
    label = np.array([p.labels[well == w][0] for w in range(well.max() + 1)])
    within = np.concatenate([means[label == c] - means[label == c].mean(axis=0) for c in np.unique(label)])
    return float(within.var() * cells)


def test_wells_differ_by_more_than_sampling_noise_where_they_are_asked_to() -> None:
    layout = {"num_images": 3200, "num_plates": 2, "wells_per_class": 8}
    assert 0.6 < spread_of_wells(screen(DESIGNS["null"], **layout)) < 1.3
    assert spread_of_wells(screen(DESIGNS["null"], well_sd=0.5, **layout)) > 10


def test_plates_differ_by_more_than_sampling_noise_where_they_are_asked_to() -> None:
    layout = {"num_images": 3200, "num_plates": 8, "wells_per_class": 2}
    for plate_sd, low, high in ((0.0, 0.5, 1.5), (0.5, 20.0, np.inf)):
        p = screen(DESIGNS["null"], plate_sd=plate_sd, **layout)
        plates = p.metadata["Metadata_Plate"]
        means = np.array([p.scores[plates == name].mean(axis=0) for name in np.unique(plates)])
        assert low < means.var(axis=0, ddof=1).mean() * 400 < high


def test_a_plate_has_its_own_gain() -> None:
    p = screen(DESIGNS["null"], plate_sd=0.4, num_images=800, num_plates=4)
    gain = np.log(p.nuisance["gain"])
    plates = p.metadata["Metadata_Plate"]
    means = np.array([gain[plates == name].mean(axis=0) for name in np.unique(plates)])
    assert means.std(axis=0).mean() > 5 * 0.08 / np.sqrt(200)
