"""The light of a plate: the polynomial that was planted is found, and none is made up where nothing is to be seen."""

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.transform import resize_local_mean

from diffex.illumination import EVEN, Camera, background_level, coarse, fit_flat, surface

PLANTED = ((1.0, 0.10, -0.08), (-0.06, 0.0, 0.0), (-0.10, 0.0, 0.0))


def fields(count: int, light: NDArray, seed: int = 0) -> NDArray[np.float32]:
    """Blobs of random brightness at random places under the light, as ``coarse`` gives them."""
    rng = np.random.default_rng(seed)
    y, x = np.indices(light.shape)
    stack = []
    for _ in range(count):
        plane = np.full(light.shape, 20.0)
        for _ in range(30):
            cy, cx = rng.uniform(0, light.shape[0], 2)
            plane += (np.hypot(y - cy, x - cx) < 5) * rng.lognormal(6.0, 0.25)
        stack.append(plane * light + rng.normal(0, 2.0, light.shape))
    return np.array(stack, np.float32)


@pytest.mark.parametrize("count", [12, 48])
def test_the_light_that_was_planted_is_found(count: int) -> None:
    light = surface(PLANTED, (128, 128))
    found = surface(fit_flat(fields(count, light), 4), (128, 128))
    ratio = found / light
    assert np.std(ratio) / np.mean(ratio) < (0.05 if count == 12 else 0.035)
    assert np.std(ratio) / np.mean(ratio) < 0.4 * np.std(light)


def test_under_even_light_hardly_anything_is_corrected() -> None:
    found = surface(fit_flat(fields(24, np.ones((128, 128))), 4), (128, 128))
    assert np.std(found) < 0.03


def test_fewer_fields_give_a_flatter_field_not_a_wilder_one() -> None:
    light = surface(PLANTED, (128, 128))
    assert np.std(surface(fit_flat(fields(3, light, 1), 4), (128, 128))) < 1.5 * np.std(light)


@pytest.mark.parametrize("stack", [np.zeros((4, 128, 128)), np.full((4, 128, 128), 7.0)], ids=["black", "constant"])
def test_where_nothing_is_to_be_seen_the_light_is_even(stack: NDArray) -> None:
    assert fit_flat(stack.astype(np.float32), 4) == EVEN


def test_degree_zero_corrects_nothing() -> None:
    assert fit_flat(fields(4, surface(PLANTED, (128, 128))), 0) == EVEN


def test_a_surface_has_mean_one_at_any_size() -> None:
    for shape in ((64, 64), (100, 333)):
        assert surface(PLANTED, shape).mean() == pytest.approx(1.0, abs=0.002)


@pytest.mark.parametrize("shape", [(384, 384), (1024, 1280), (100, 131)])
def test_coarse_planes_are_local_means(shape: tuple[int, int]) -> None:
    plane = np.random.default_rng(0).integers(0, 65000, shape).astype(np.uint16)
    assert np.abs(coarse(plane) - resize_local_mean(plane.astype(np.float64), (128, 128))).max() < 0.01


def test_noise_does_not_lower_the_background() -> None:
    rng = np.random.default_rng(0)
    plane = 300.0 + rng.normal(0, 40.0, (128, 128))
    plane[40:80, 40:80] += 2000.0
    assert background_level(plane.astype(np.float32)) == pytest.approx(300.0, abs=12.0)


def test_a_camera_is_full_where_pixels_pile_up() -> None:
    rng = np.random.default_rng(0)
    camera = Camera()
    for _ in range(4):
        camera.see(np.minimum(rng.exponential(900, (128, 128)), 4095).astype(np.uint16))
    assert camera.ceiling() == 4095


def test_without_a_pile_the_type_is_the_limit_in_the_steps_it_takes() -> None:
    rng = np.random.default_rng(0)
    camera = Camera()
    camera.see((rng.integers(10, 900, (128, 128)) * 16).astype(np.uint16))
    assert camera.ceiling() == 65535 // 16 * 16
    floats = Camera()
    floats.see(rng.random((128, 128)).astype(np.float32))
    assert floats.ceiling() == float("inf")
