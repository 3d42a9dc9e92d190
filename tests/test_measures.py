"""Rows over seeds: mean and interval of what was trained again, and nothing that was not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffex.measures import METRICS, over_seeds


def row(seed: int, flip_rate: float, **more: Any) -> dict[str, Any]:
    return {"run.seed": seed, "trial": f"t{seed}", "flip_rate": flip_rate, "ssim": 0.9, **more}


def test_seeds_give_mean_and_student_s_interval() -> None:
    values = [0.5, 0.7, 0.9]
    (found,) = over_seeds([row(i, v) for i, v in enumerate(values)], ["run.seed"])
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert found["seeds"] == 3
    assert found["trials"] == ["t0", "t1", "t2"]
    assert found["flip_rate"] == pytest.approx(0.7)
    assert (found["flip_rate_low"], found["flip_rate_high"]) == pytest.approx((low, high))
    assert found["flip_rate_sd"] == pytest.approx(0.2)


def test_equal_seeds_leave_no_doubt() -> None:
    (found,) = over_seeds([row(0, 0.5), row(1, 0.5)], ["run.seed"])
    assert found["ssim_low"] == found["ssim"] == found["ssim_high"] == pytest.approx(0.9)


def test_other_settings_make_groups_of_their_own() -> None:
    rows = [row(s, 0.1 * k, **{"directions.lambda2": k}) for k in (1, 5) for s in (0, 1)]
    found = over_seeds(rows, ["directions.lambda2", "run.seed"])
    assert [(g["directions.lambda2"], g["seeds"]) for g in found] == [(1, 2), (5, 2)]
    assert [g["flip_rate"] for g in found] == pytest.approx([0.1, 0.5])
    assert all("run.seed" not in g for g in found)


def test_a_single_seed_is_no_group() -> None:
    rows = [row(0, 0.1, **{"directions.tau": 1}), row(0, 0.2, **{"directions.tau": 2})]
    assert over_seeds(rows, ["directions.tau"]) == []
    assert over_seeds([], ["run.seed"]) == []


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_a_measure_that_a_seed_lacks_is_left_out(missing: float | None) -> None:
    rows = [row(0, 0.5, kl=0.1), row(1, 0.5, kl=missing)]
    (found,) = over_seeds(rows, ["run.seed"])
    assert "kl" not in found
    assert "ssim" in found


def test_only_documented_measures_are_brought_together() -> None:
    (found,) = over_seeds([row(0, 0.5, colour=1.0), row(1, 0.5, colour=2.0)], ["run.seed"])
    names = {n.removesuffix("_low").removesuffix("_high").removesuffix("_sd") for n in found} - {"seeds", "trials"}
    assert names <= set(METRICS)
