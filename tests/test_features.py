"""Classical features: right on shapes whose numbers are known, in the image's units, missing where nothing is there."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from diffex.errors import UserError
from diffex.features import measure, measure_many

CHANNELS = ("DNA", "actin")
SIDE = 64


def cell(
    nucleus: float = 7.0, body: float = 20.0, stretch: float = 1.0, dna: float = 800.0, actin: float = 500.0,
    rim: float = 0.0,
) -> NDArray[np.float32]:  # fmt: skip
    """A round nucleus in a body that is ``stretch`` times as long as wide, with a bright ``rim``."""
    y, x = np.indices((SIDE, SIDE)) - (SIDE - 1) / 2
    r = np.hypot(y / np.sqrt(stretch), x * np.sqrt(stretch))
    planes = [(np.hypot(y, x) <= nucleus) * dna, (r <= body) * actin + ((r <= body) & (r > body - 3)) * rim]
    return np.array([ndimage.gaussian_filter(p, 0.8) for p in planes], np.float32)


def test_areas_diameters_and_form_are_those_of_discs() -> None:
    found = measure(cell(), CHANNELS, background=0.0)
    assert found["Nuclei_AreaShape_Area"] == pytest.approx(np.pi * 7**2, rel=0.1)
    assert found["Nuclei_AreaShape_EquivalentDiameter"] == pytest.approx(14, rel=0.05)
    assert found["Cells_AreaShape_Area"] == pytest.approx(np.pi * 20**2, rel=0.08)
    assert found["Cells_AreaShape_Eccentricity"] < 0.2
    assert found["Cells_AreaShape_FormFactor"] == pytest.approx(1.0, abs=0.12)
    assert found["Cells_Children_Nuclei_Count"] == 1
    assert found["Cytoplasm_AreaShape_Area"] == found["Cells_AreaShape_Area"] - found["Nuclei_AreaShape_Area"]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float64])
def test_the_type_of_the_pixels_changes_nothing(kind: type) -> None:
    image = np.rint(cell(dna=200.0, actin=120.0))
    assert measure(image.astype(kind), CHANNELS) == pytest.approx(measure(image, CHANNELS), nan_ok=True)


@pytest.mark.parametrize("turn", [np.rot90, np.fliplr, np.flipud])
def test_a_turned_or_mirrored_cell_has_the_same_features(turn: Callable[[NDArray], NDArray]) -> None:
    rng = np.random.default_rng(0)
    image = cell(body=16.0, stretch=1.6, rim=200.0) + rng.normal(20, 2, (2, SIDE, SIDE)).astype(np.float32)
    turned = np.stack([turn(plane) for plane in image])
    one, other = measure(image, CHANNELS, background=0.0), measure(turned, CHANNELS, background=0.0)
    assert other == pytest.approx(one, rel=0.01, abs=3e-3, nan_ok=True)  # wedges share the pixels on their borders


def test_channels_may_have_any_name_if_they_are_told() -> None:
    named = measure(cell(), CHANNELS, background=0.0)
    told = measure(cell(), ("w1", "w2"), nucleus_channel="w1", cell_channel="w2", background=0.0)
    assert list(told.values()) == pytest.approx(list(named.values()), nan_ok=True)
    assert {n.replace("DNA", "w1").replace("actin", "w2") for n in named} == set(told)


def test_a_long_cell_has_the_aspect_of_its_axes() -> None:
    found = measure(cell(body=16.0, stretch=2.0), CHANNELS, background=0.0)
    assert found["Cells_AreaShape_AspectRatio"] == pytest.approx(2.0, rel=0.1)
    assert found["Cells_AreaShape_Eccentricity"] == pytest.approx(np.sqrt(1 - 0.25), rel=0.05)


def test_intensities_are_in_the_images_own_units() -> None:
    once = measure(cell(), CHANNELS, background=0.0)
    assert once["Nuclei_Intensity_MedianIntensity_DNA"] == pytest.approx(800.0, rel=0.02)
    assert once["Cytoplasm_Intensity_MedianIntensity_actin"] == pytest.approx(500.0, rel=0.02)
    twice = measure(2 * cell(), CHANNELS, background=0.0)
    for name, value in once.items():
        kind = name.split("_")[1]
        scale = 2.0 if kind == "Intensity" else 1.0
        assert twice[name] == pytest.approx(scale * value, rel=1e-3, abs=1e-6, nan_ok=True), name


def test_a_bright_rim_is_light_in_the_outer_rings() -> None:
    plain, rimmed = (measure(cell(rim=r), CHANNELS, background=0.0) for r in (0.0, 800.0))
    outer, inner = (f"Cells_RadialDistribution_MeanFrac_actin_{k}of4" for k in (4, 1))
    assert rimmed[outer] > 1.15 * plain[outer]
    assert rimmed[inner] < plain[inner]
    shares = [rimmed[f"Cells_RadialDistribution_FracAtD_actin_{k}of4"] for k in range(1, 5)]
    assert sum(shares) == pytest.approx(1.0, abs=1e-6)


def test_speckles_are_granular_and_smooth_bodies_are_not() -> None:
    speckled = cell()
    speckled[1] *= 1.0 + 0.5 * (np.indices((SIDE, SIDE)).sum(axis=0) % 4 == 0)
    plain, rough = (measure(image, CHANNELS, background=0.0) for image in (cell(), speckled))
    assert rough["Cells_Granularity_1_actin"] > 3 * plain["Cells_Granularity_1_actin"]
    assert rough["Cells_Texture_Contrast_actin_1"] > plain["Cells_Texture_Contrast_actin_1"]


def test_channels_that_are_one_correlate_and_opposite_ones_do_not() -> None:
    image = cell(rim=300.0)
    same = measure(np.stack([image[0], image[1], image[1]]), ("DNA", "a", "b"), background=0.0)
    assert same["Cells_Correlation_Correlation_a_b"] == pytest.approx(1.0, abs=1e-6)
    against = measure(np.stack([image[0], image[1], image[1].max() - image[1]]), ("DNA", "a", "b"), cell_channel="a")
    assert against["Cells_Correlation_Correlation_a_b"] == pytest.approx(-1.0, abs=1e-6)


def test_without_a_nucleus_its_features_are_missing_and_the_cell_is_measured() -> None:
    image = cell()
    image[0] = 0.0
    found = measure(image, CHANNELS, background=0.0)
    assert found["Cells_Children_Nuclei_Count"] == 0
    assert all(np.isnan(v) for n, v in found.items() if n.startswith(("Nuclei_", "Cytoplasm_")))
    assert found["Cells_AreaShape_Area"] == pytest.approx(np.pi * 20**2, rel=0.3)


@pytest.mark.parametrize("value", [0.0, 700.0])
def test_an_empty_image_has_no_feature_at_all(value: float) -> None:
    found = measure(np.full((2, SIDE, SIDE), value, np.float32), CHANNELS)
    assert found["Cells_Children_Nuclei_Count"] == 0
    assert all(np.isnan(v) for n, v in found.items() if n != "Cells_Children_Nuclei_Count"), {
        n: v for n, v in found.items() if not np.isnan(v)
    }


def test_every_image_of_the_same_channels_has_the_same_names() -> None:
    images = [cell(), cell(stretch=1.5), np.zeros((2, SIDE, SIDE), np.float32)]
    names = [list(measure(image, CHANNELS)) for image in images]
    assert names[0] == names[1] == names[2]
    assert {n.split("_")[0] for n in names[0]} == {"Nuclei", "Cells", "Cytoplasm"}
    many = measure_many(np.stack(images), CHANNELS)
    assert list(many) == names[0]
    assert all(values.shape == (3,) for values in many.values())


def test_without_a_channel_of_nuclei_there_are_features_of_the_cell_only() -> None:
    found = measure(cell()[1:], ("grey",))
    assert {n.split("_")[0] for n in found} == {"Cells"}
    assert found["Cells_AreaShape_Area"] == pytest.approx(np.pi * 20**2, rel=0.3)


def test_a_channel_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(UserError, match="no channel 'actn': did you mean 'actin'"):
        measure(cell(), CHANNELS, cell_channel="actn")
