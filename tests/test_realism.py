"""Distances of distributions: closed forms and brute force, wells as the unit, and intervals that cover."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import sqrtm
from threadpoolctl import threadpool_limits

from diffex.errors import UserError
from diffex.realism import Distance, distance_with_interval, frechet_distance, kernel_distance


@pytest.fixture(autouse=True, scope="module")
def _one_blas_thread() -> Iterator[None]:
    """Small matrices gain nothing from more, and on a busy machine threads wait for each other."""
    with threadpool_limits(1):
        yield


def normal(n: int, d: int, seed: int, *, mean: float = 0.0, scale: float = 1.0) -> NDArray:
    return mean + scale * np.random.default_rng(seed).standard_normal((n, d))


def wells(rng: np.random.Generator, num: int, cells: int, d: int, *, mean: float = 0.0, scale: float = 1.0) -> NDArray:
    """Features whose variances fall as 1 / k^2, as those of networks do; wells differ by half a cell's deviation."""
    spread = 1 / np.arange(1, d + 1)
    own = 0.5 * np.repeat(rng.standard_normal((num, d)), cells, axis=0)
    return (mean + scale * (own + rng.standard_normal((num * cells, d)))) * spread


def names(prefix: str, num: int, cells: int) -> NDArray:
    return np.repeat([f"{prefix}{i}" for i in range(num)], cells)


# ----------------------------------------------------------------------------------------------------------------------
# Fréchet


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 8), (50, 300, 20), (400, 400, 1)])
def test_the_frechet_distance_is_that_of_a_matrix_square_root(n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(0)
    a = normal(n, d, 1) @ rng.standard_normal((d, d))
    b = normal(m, d, 2, mean=0.5) @ rng.standard_normal((d, d))
    c_a, c_b = np.atleast_2d(np.cov(a, rowvar=False)), np.atleast_2d(np.cov(b, rowvar=False))
    root = np.atleast_2d(sqrtm(c_a @ c_b)).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(c_a + c_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_diagonal_gaussians_have_the_closed_form() -> None:
    """Sum of (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2, on sets with exactly those moments."""
    mean_a, mean_b, sd_a, sd_b = np.array([[0, 1, 2], [3, 1, -1], [1, 2, 3], [1, 4, 0.5]], float)
    exact = np.linalg.qr(np.c_[np.ones(40), normal(40, 3, 0)])[0][:, 1:] * np.sqrt(39)  # mean 0, covariance 1
    expected = np.square(mean_a - mean_b).sum() + np.square(sd_a - sd_b).sum()
    assert frechet_distance(mean_a + sd_a * exact, mean_b + sd_b * exact) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("n", [2, 10, 64, 65, 300])
def test_fewer_images_than_features_are_no_trouble(n: int) -> None:
    """Singular covariances: a set shifted by a vector is at that vector's squared length, whatever N."""
    a, shift = normal(n, 64, 0), normal(1, 64, 1)
    assert frechet_distance(a, a + shift) == pytest.approx(np.square(shift).sum(), rel=1e-9)
    assert frechet_distance(a, 3 * a - 2 * a.mean(0)) == pytest.approx(4 * a.var(0, ddof=1).sum(), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself() -> None:
    for n in (5, 40, 200):
        a = normal(n, 40, 0)
        assert frechet_distance(a, a) < 1e-10
        assert frechet_distance(a, a[::-1]) < 1e-10


def test_constant_features_are_no_trouble() -> None:
    assert frechet_distance(np.ones((5, 3)), np.ones((8, 3))) == 0.0
    assert frechet_distance(np.ones((5, 3)), np.zeros((8, 3))) == pytest.approx(3.0)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_the_order_of_the_sets_does_not_matter(distance) -> None:  # type: ignore[no-untyped-def]
    a, b = normal(30, 12, 0), normal(50, 12, 1, mean=0.3)
    assert distance(a, b) == pytest.approx(distance(b, a), rel=1e-9)


def test_the_frechet_distance_does_not_depend_on_the_axes() -> None:
    a, b = normal(30, 12, 0), normal(50, 12, 1, mean=0.3)
    turn = np.linalg.qr(normal(12, 12, 2))[0]
    assert frechet_distance(a @ turn + 100, b @ turn + 100) == pytest.approx(frechet_distance(a, b), rel=1e-8)


def test_a_duplicated_feature_counts_twice() -> None:
    a, b = normal(60, 4, 0), normal(70, 4, 1, mean=1.0)
    assert frechet_distance(np.c_[a, a], np.c_[b, b]) == pytest.approx(2 * frechet_distance(a, b), rel=1e-9)
    assert kernel_distance(np.c_[a, a], np.c_[b, b]) == pytest.approx(kernel_distance(a, b), rel=1e-9)


def test_half_precision_features_are_measured_in_double() -> None:
    a, b = normal(60, 4, 0).astype(np.float32), normal(70, 4, 1, mean=1.0).astype(np.float32)
    assert frechet_distance(a, b) == frechet_distance(a.astype(float), b.astype(float))


# ----------------------------------------------------------------------------------------------------------------------
# Kernel


def brute(a: NDArray, b: NDArray, units_a: NDArray, units_b: NDArray) -> float:
    """The double sums over pairs of different units, one pair after the other."""

    def mean(x: NDArray, y: NDArray, u: NDArray, v: NDArray) -> float:
        pairs = [(i, j) for i in range(len(x)) for j in range(len(y)) if u[i] != v[j]]
        return sum((float(x[i] @ y[j]) / x.shape[1] + 1) ** 3 for i, j in pairs) / len(pairs)

    return mean(a, a, units_a, units_a) + mean(b, b, units_b, units_b) - 2 * mean(a, b, units_a, units_b)


def test_the_kernel_distance_is_the_double_sum() -> None:
    a, b = normal(13, 7, 0), normal(9, 7, 1, mean=0.5)
    assert kernel_distance(a, b) == pytest.approx(brute(a, b, np.arange(13), 100 + np.arange(9)), rel=1e-10)


def test_the_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    """Unbiased: below 0 about as often as above, where the Fréchet distance is far from 0."""
    found = np.array([kernel_distance(normal(20, 10, 2 * s), normal(30, 10, 2 * s + 1)) for s in range(400)])
    assert abs(found.mean()) < 3 * found.std() / 20
    assert 0.3 < (found < 0).mean() < 0.8
    assert frechet_distance(normal(20, 10, 0), normal(30, 10, 1)) > 1


def test_the_kernel_distance_does_not_depend_on_the_number_of_images() -> None:
    small = np.array([kernel_distance(normal(10, 6, 2 * s), normal(10, 6, 2 * s + 1, mean=0.5)) for s in range(400)])
    large = np.array([kernel_distance(normal(90, 6, 2 * s), normal(90, 6, 2 * s + 1, mean=0.5)) for s in range(100)])
    assert abs(small.mean() - large.mean()) < 3 * (small.var() / 400 + large.var() / 100) ** 0.5


def test_distances_grow_with_the_change() -> None:
    a = normal(100, 16, 0)
    for distance in (frechet_distance, kernel_distance):
        found = [distance(a, normal(100, 16, 1, mean=shift)) for shift in (0.0, 0.3, 1.0, 3.0)]
        assert np.all(np.diff(found) > 0)


# ----------------------------------------------------------------------------------------------------------------------
# Intervals


def measure(a: NDArray, b: NDArray, units_a: NDArray, units_b: NDArray, **options) -> Distance:  # type: ignore[no-untyped-def]
    return distance_with_interval(a, b, units_a, units_b, **options)


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
@pytest.mark.parametrize("mean", [0.0, 0.5])
def test_intervals_cover_the_expected_distance(kind: str, mean: float) -> None:
    """16 wells of 4 cells, 24 features: a bootstrap of so few units is a little narrow, 87 to 100 % pass for 95 %."""
    rng = np.random.default_rng(0)

    def pair() -> tuple[NDArray, NDArray]:
        return wells(rng, 16, 4, 24), wells(rng, 16, 4, 24, mean=mean, scale=1.2)

    units = names("a", 16, 4), names("b", 16, 4)
    expected = np.mean([measure(*pair(), *units, kind=kind, draws=1).value for _ in range(600)])
    found = [measure(*pair(), *units, kind=kind, draws=100, seed=s) for s in range(150)]
    assert 0.87 <= np.mean([d.low <= expected <= d.high for d in found]) <= 1.0


def test_a_percentile_interval_would_miss_the_expected_distance() -> None:
    """What moving the draws is for: those of the Fréchet distance of one distribution all lie above it."""
    a, b = normal(64, 32, 0), normal(64, 32, 1)
    rng = np.random.default_rng(0)
    drawn = [frechet_distance(a[rng.integers(0, 64, 64)], b[rng.integers(0, 64, 64)]) for _ in range(100)]
    found = measure(a, b, np.arange(64), 64 + np.arange(64))
    assert np.quantile(drawn, 0.025) > found.value
    assert found.low < found.value < found.high


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
def test_taking_images_for_units_would_be_too_sure(kind: str) -> None:
    rng = np.random.default_rng(0)
    a, b = wells(rng, 8, 40, 4), wells(rng, 8, 40, 4, mean=2.0)
    by_well = measure(a, b, names("a", 8, 40), names("b", 8, 40), kind=kind)
    by_cell = measure(a, b, np.arange(320), 320 + np.arange(320), kind=kind)
    assert by_well.high - by_well.low > 2 * (by_cell.high - by_cell.low)


def test_pairs_of_one_unit_do_not_count_in_the_kernel_distance() -> None:
    a, b = normal(12, 5, 0), normal(15, 5, 1, mean=0.4)
    units_a, units_b = np.arange(12) // 3, 2 + np.arange(15) // 3  # two units are in both sets
    assert measure(a, b, units_a, units_b, kind="kernel").value == pytest.approx(brute(a, b, units_a, units_b))


def test_the_kernel_distance_of_wells_is_that_of_the_population() -> None:
    """Cells of a well are alike: counting their pairs would find a distance between sets of the same population."""
    rng = np.random.default_rng(0)
    units, right, naive = (names("a", 6, 10), names("b", 6, 10)), [], []
    for _ in range(200):
        a, b = wells(rng, 6, 10, 4), wells(rng, 6, 10, 4)
        right.append(measure(a, b, *units, kind="kernel", draws=1).value)
        naive.append(kernel_distance(a, b))
    assert abs(np.mean(right)) < 3 * np.std(right) / 200**0.5
    assert np.mean(naive) > 6 * np.std(naive) / 200**0.5


def test_where_every_image_is_a_unit_the_value_is_the_plain_distance() -> None:
    a, b = normal(20, 6, 0), normal(30, 6, 1)
    units = np.arange(20), 20 + np.arange(30)
    assert measure(a, b, *units, kind="kernel").value == pytest.approx(kernel_distance(a, b), rel=1e-9)
    assert measure(a, b, *units, kind="frechet").value == pytest.approx(frechet_distance(a, b), rel=1e-9)


def test_units_of_both_sets_are_drawn_for_both() -> None:
    """Reconstructions that miss their cells by the same vector everywhere: no choice of wells changes the distance."""
    rng = np.random.default_rng(0)
    a, units = wells(rng, 10, 6, 8), names("a", 10, 6)
    joint = measure(a, a + 0.5, units, units)
    assert joint.value == pytest.approx(8 * 0.25)
    assert joint.high - joint.low < 1e-9
    apart = measure(a, a + 0.5, units, names("b", 10, 6))
    assert apart.high - apart.low > 0.5


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
def test_a_surer_interval_is_wider_and_each_is_that_of_its_seed(kind: str) -> None:
    a, b, units = normal(40, 6, 0), normal(40, 6, 1, mean=0.5), (names("a", 10, 4), names("b", 10, 4))
    narrow, wide = (measure(a, b, *units, kind=kind, confidence=c) for c in (0.5, 0.95))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
    assert wide == measure(a, b, *units, kind=kind)
    assert wide != measure(a, b, *units, kind=kind, seed=1)
    assert (wide.n, wide.m) == (40, 40)


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
def test_one_unit_tells_nothing_of_the_spread(kind: str) -> None:
    a, b = normal(10, 3, 0), normal(12, 3, 1)
    plain = {"frechet": frechet_distance, "kernel": kernel_distance}[kind]
    found = measure(a, b, np.zeros(10), 1 + np.arange(12), kind=kind)
    assert found.value == plain(a, b)
    assert np.isnan([found.low, found.high]).all()


def test_two_units_of_one_image_are_enough_not_to_fail() -> None:
    for kind in ("frechet", "kernel"):
        found = measure(normal(2, 3, 0), normal(2, 3, 1), np.array([0, 1]), np.array([2, 3]), kind=kind)
        assert np.isfinite([found.value, found.low, found.high]).all()


def test_a_frechet_interval_does_not_reach_below_zero() -> None:
    a = normal(64, 2, 0)
    assert measure(a, normal(64, 2, 1), np.arange(64), 64 + np.arange(64)).low >= 0.0


@pytest.mark.parametrize("kind", ["frechet", "kernel"])
def test_a_draw_takes_a_few_milliseconds(kind: str) -> None:
    """On one thread, at the sizes that the scoreboard uses."""
    a, b = normal(128, 96, 0), normal(128, 96, 1)
    start = time.process_time()
    measure(a, b, np.arange(128), 128 + np.arange(128), kind=kind, draws=50)
    assert (time.process_time() - start) / 50 < 0.005


# ----------------------------------------------------------------------------------------------------------------------
# What can't be measured


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "two images a side, got 1 and 5"),
        (np.zeros((4, 3)), np.zeros((5, 2)), "features must be"),
        (np.zeros(4), np.zeros((5, 2)), "features must be"),
        (np.full((4, 3), np.nan), np.zeros((5, 3)), "not finite"),
    ],
)
def test_features_that_can_t_be_compared_are_refused(a: NDArray, b: NDArray, says: str) -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(UserError, match=says):
            distance(a, b)


def test_unknown_kinds_and_missing_units_are_refused() -> None:
    a = normal(4, 3, 0)
    with pytest.raises(UserError, match="'frechet' or 'kernel'"):
        measure(a, a, np.arange(4), np.arange(4), kind="kid")
    with pytest.raises(UserError, match="units"):
        measure(a, a, np.arange(4), np.arange(3))
