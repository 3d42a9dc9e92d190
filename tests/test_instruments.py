"""The instruments: regressors are calibrated within classes, and read each factor from its own features."""

from __future__ import annotations

import numpy as np
import pytest

from diffex.instruments import FactorRegression, calibration

RNG = np.random.default_rng(0)


def cells(n: int = 400, shift: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Two factors, both moved by the treatment, each seen by two features of its own and a third that sees nothing."""
    labels, groups = np.arange(n) % 2, np.arange(n) // 2 % 10
    factors = RNG.standard_normal((n, 2)) + shift * labels[:, None]
    noise = RNG.standard_normal((n, 5))
    features = np.stack(
        [factors[:, 0], 2 * factors[:, 0], factors[:, 1], -factors[:, 1], np.zeros(n)], axis=1
    ) + 0.3 * noise  # fmt: skip
    return features, factors, labels, groups


def test_a_perfect_regressor_has_slope_one() -> None:
    _, factors, labels, _ = cells()
    assert calibration(factors, factors, labels) == pytest.approx([1.0, 1.0])


def test_shrinkage_is_measured_within_classes() -> None:
    """Half the slope within classes is found, however well the classes' means are told apart."""
    _, factors, labels, _ = cells()
    means = np.stack([factors[labels == c].mean(axis=0) for c in (0, 1)])[labels]
    assert calibration(means + 0.5 * (factors - means), factors, labels) == pytest.approx([0.5, 0.5])


def test_a_useless_regressor_does_not_blow_up() -> None:
    _, factors, labels, _ = cells()
    assert calibration(np.zeros_like(factors), factors, labels) == pytest.approx([0.1, 0.1])


def test_features_tell_factors_they_see() -> None:
    features, factors, labels, groups = cells()
    ruler = FactorRegression.fit(features, factors, labels, groups, ("size", "light"))
    assert ruler.factors == ("size", "light")
    assert min(ruler.r2.values()) > 0.8
    found = ruler(features) - ruler(features).mean(axis=0)
    within = factors.copy()
    for c in (0, 1):
        within[labels == c] -= within[labels == c].mean(axis=0)
        found[labels == c] -= found[labels == c].mean(axis=0)
    slope = (found * within).sum(axis=0) / (within**2).sum(axis=0)
    assert slope == pytest.approx([1.0, 1.0], abs=0.12)  # in standard deviations within classes, which are 1 here


def test_a_factor_s_features_do_not_credit_the_other_that_moves_with_it() -> None:
    """The treatment moves both factors; an edit of one alone must not show as a shift of the other."""
    features, factors, labels, groups = cells()
    ruler = FactorRegression.fit(features, factors, labels, groups, ("size", "light"))
    edit = np.array([[2.0, 4.0, 0.0, 0.0, 0.0]])
    size, light = (ruler(edit) - ruler(np.zeros((1, 5))))[0]
    assert size == pytest.approx(2.0, abs=0.3)
    assert abs(light) < 0.15


def test_a_factor_that_no_feature_sees_is_not_measured() -> None:
    features, factors, labels, groups = cells()
    unseen = np.column_stack([factors, RNG.standard_normal(len(factors))])
    ruler = FactorRegression.fit(features, unseen, labels, groups, ("size", "light", "taste"))
    assert ruler.factors == ("size", "light")
    assert ruler.r2["taste"] < 0.2


def test_missing_and_constant_features_are_harmless() -> None:
    features, factors, labels, groups = cells()
    holes = np.column_stack([features, np.full(len(features), np.nan), np.full(len(features), 7.0)])
    holes[::17, 0] = np.nan
    ruler = FactorRegression.fit(holes, factors, labels, groups, ("size", "light"))
    assert np.isfinite(ruler(holes)).all()
    assert min(ruler.r2.values()) > 0.8
