"""Ranking: on tables made by hand, where the answer is known; and free of the defects of the published search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from diffex.errors import UserError
from diffex.ranking import SIGNS, arrays, baseline, classes_of, flip_curve, greedy_selection, rank, transition_matrix

LENGTH = 1.5
COLUMNS = {
    "rank", "direction", "sign", "chosen_by", "source", "target", "n", "units", "alpha", "effect", "effect_low",
    "effect_high", "flip_n", "flip_rate", "flip_low", "flip_high", "null_effect", "null_flip_rate", "null_flip_max",
    "excess", "excess_low", "excess_high", "p_value", "ssim", "l1", "length_z",
}  # fmt: skip


def table(
    p_edit: Mapping[str, NDArray], before: NDArray, *, classes: Sequence[str] = ("a", "b"),
    of: Sequence[str] | None = None, groups: Sequence[int] | None = None, other_alphas: Sequence[float] = (),
) -> pa.Table:  # fmt: skip
    """An effects table by hand, shuffled.

    Args:
        p_edit: kind -> (N, K, S, n_classes) probabilities after the edit at the reference length.
        before: (N, n_classes) of the reconstruction.
        of: class of each image (default: the first).
        groups: unit of each image (default: itself).
        other_alphas: further lengths, at which nothing happens.
    """
    n = len(before)
    of, groups = of or [classes[0]] * n, groups if groups is not None else range(n)
    rows = []
    for kind, probs in p_edit.items():
        for i, k, s in np.ndindex(probs.shape[:3]):
            for alpha in (LENGTH, *(other_alphas if kind == "learned" else ())):
                p = probs[i, k, s] if alpha == LENGTH else before[i]
                rows.append({
                    "row": 10 + 3 * i, "kind": kind, "direction": k, "alpha": np.float32(SIGNS[s] * alpha),
                    "reference": alpha == LENGTH, "class_name": of[i], "group": groups[i],
                    "ssim": 0.9 - 0.01 * k, "l1": 0.1 * (k + 1), "length_z": 2.0 + i,
                    "change": [float(k), float(s), float(i), 1.0], "shift:size": k + 0.5 * s,
                    **{f"p_original:{c}": before[i, j] for j, c in enumerate(classes)},
                    **{f"p_reconstruction:{c}": before[i, j] for j, c in enumerate(classes)},
                    **{f"p_edit:{c}": p[j] for j, c in enumerate(classes)},
                })  # fmt: skip
    order = np.random.default_rng(0).permutation(len(rows))
    made = pa.Table.from_pylist([rows[j] for j in order])
    place = made.column_names.index("change")
    return made.set_column(place, "change", made["change"].cast(pa.list_(pa.float32(), 4)))


def two_classes(
    learned: NDArray, p_target: float | NDArray = 0.2, random: NDArray | None = None, *, target: str = "b",
    groups: Sequence[int] | None = None, **kinds: NDArray,
) -> pa.Table:  # fmt: skip
    """A table of effects (N, K, S) on p(target), whichever of the classes a and b that is."""
    n = len(learned)
    start = np.broadcast_to(np.asarray(p_target, float), (n,))
    random = np.zeros((n, 3, 1)) if random is None else random

    def probabilities(p: NDArray) -> NDArray:
        return np.stack([1 - p, p] if target == "b" else [p, 1 - p], axis=-1)

    edits = {
        kind: probabilities(start[:, None, None] + effect)
        for kind, effect in {"learned": learned, "random": random, **kinds}.items()
    }
    source = "a" if target == "b" else "b"
    return table(edits, probabilities(start), of=[source] * n, groups=groups)


def effects(*columns: Sequence[float], both: bool = True) -> NDArray:
    """(N, K, 2) effects of K columns of N images; the reverse of a direction undoes it."""
    plus = np.array(columns, float).T
    return np.stack([plus, -plus if both else np.zeros_like(plus)], axis=-1)


def ranked(made: pa.Table, source: str = "a", target: str = "b", **options: object) -> list[dict]:
    options = {"draws": 200, **options}
    return rank(made, source, target, **options).to_pylist()  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------------
# Greedy selection


def test_the_direction_with_the_largest_mean_effect_comes_first() -> None:
    chosen, _ = greedy_selection(effects([0.1, 0.2, 0.1], [0.3, 0.2, 0.4], [0.0, 0.1, 0.0]), 1)
    assert (chosen[0].direction, chosen[0].sign, chosen[0].unexplained) == (1, 0, 3)
    assert chosen[0].effect == pytest.approx(0.3)


def test_a_direction_that_helps_backwards_is_chosen_with_its_other_sign() -> None:
    chosen, _ = greedy_selection(effects([-0.5, -0.6]), 1)
    assert (chosen[0].direction, SIGNS[chosen[0].sign]) == (0, -1.0)


def test_images_that_a_direction_explains_leave() -> None:
    """The second choice is the best of what is left, not the second best of all."""
    first, second, third = [0.9, 0.9, 0.0, 0.0], [0.7, 0.7, 0.1, 0.1], [0.0, 0.0, 0.3, 0.3]
    chosen, unexplained = greedy_selection(effects(first, second, third), 3)
    assert [c.direction for c in chosen] == [0, 2]
    assert [c.unexplained for c in chosen] == [4, 2]
    assert unexplained.tolist() == []


def test_a_given_threshold_decides_who_is_explained() -> None:
    e = effects([0.9, 0.5, 0.1], [0.2, 0.2, 0.2])
    assert greedy_selection(e, 1)[1].tolist() == [2]
    assert greedy_selection(e, 1, explained_at=0.6)[1].tolist() == [1, 2]
    assert greedy_selection(e, 1, explained_at=0.05)[1].tolist() == []


def test_a_threshold_that_nothing_reaches_still_ends() -> None:
    chosen, unexplained = greedy_selection(effects([0.2, 0.2], [0.1, 0.1]), 10, explained_at=5.0)
    assert [c.direction for c in chosen] == [0, 1]
    assert unexplained.tolist() == [0, 1]


def test_the_search_ends_once_every_image_is_explained() -> None:
    chosen, unexplained = greedy_selection(effects([0.5, 0.5], [0.4, 0.4], [0.3, 0.3]), 3)
    assert len(chosen) == 1
    assert len(unexplained) == 0


def test_more_directions_may_be_asked_for_than_there_are() -> None:
    chosen, _ = greedy_selection(effects([0.5, 0.0, 0.0], [0.0, 0.5, 0.0]), 10)
    assert sorted(c.direction for c in chosen) == [0, 1]


def test_without_a_positive_effect_nothing_is_chosen() -> None:
    chosen, unexplained = greedy_selection(effects([-0.5, -0.1], both=False), 3)
    assert chosen == []
    assert unexplained.tolist() == [0, 1]


def test_no_direction_is_chosen_twice() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        chosen, _ = greedy_selection(rng.standard_normal((20, 5, 2)), 5)
        assert len({c.direction for c in chosen}) == len(chosen)


def test_choices_do_not_depend_on_the_order_of_images() -> None:
    e = np.random.default_rng(0).standard_normal((20, 5, 2))
    assert [c.direction for c in greedy_selection(e, 5)[0]] == [c.direction for c in greedy_selection(e[::-1], 5)[0]]


def test_no_images_give_no_choice() -> None:
    assert greedy_selection(np.zeros((0, 3, 2)), 3)[0] == []


# ----------------------------------------------------------------------------------------------------------------------
# Cutting arrays out of the table


def test_effects_are_measured_from_the_reconstruction() -> None:
    made = two_classes(effects([0.1, 0.2], [0.3, -0.1]), p_target=np.array([0.2, 0.4]))
    assert np.allclose(arrays(made, "learned", "a", "b").effect, effects([0.1, 0.2], [0.3, -0.1]))


def test_only_edits_at_the_reference_length_are_compared() -> None:
    p = np.broadcast_to([0.1, 0.9], (2, 1, 2, 2))
    made = table({"learned": p}, np.array([[0.8, 0.2]] * 2), other_alphas=(0.5, 3.0))
    a = arrays(made, "learned", "a", "b")
    assert np.allclose(a.effect, 0.7)
    assert np.allclose(a.alpha, LENGTH)


def test_only_images_of_the_source_are_taken() -> None:
    before = np.array([[0.8, 0.2], [0.1, 0.9], [0.7, 0.3]])
    made = table({"learned": np.zeros((3, 1, 2, 2)) + 0.5}, before, of=["a", "b", "a"], groups=[5, 6, 7])
    a = arrays(made, "learned", "a", "b")
    assert a.rows.tolist() == [10, 16]
    assert a.groups.tolist() == [5, 7]


def test_every_measure_lands_at_its_image_direction_and_sign() -> None:
    made = two_classes(effects([0.1, 0.2, 0.3], [0.3, -0.1, 0.0]))
    a = arrays(made, "learned", "a", "b")
    for i, k, s in np.ndindex(3, 2, 2):
        assert a.change[i, k, s].tolist() == [k, s, i, 1.0]
        assert a.shifts[i, k, s].tolist() == [k + 0.5 * s]
        assert a.extra["length_z"][i, k, s] == 2.0 + i
    assert a.factors == ("size",)


def test_only_images_not_yet_called_target_can_flip() -> None:
    made = two_classes(effects([0.1, 0.1, 0.4]), p_target=np.array([0.2, 0.6, 0.2]))
    a = arrays(made, "learned", "a", "b")
    assert a.eligible.tolist() == [True, False, True]
    assert a.flips[:, 0, 0].tolist() == [False, True, True]


def test_random_directions_and_baselines_go_one_way() -> None:
    made = two_classes(effects([0.1, 0.2]), random=np.full((2, 5, 1), 0.05))
    assert arrays(made, "random", "a", "b").effect.shape == (2, 5, 1)


def test_classes_keep_the_order_of_the_table() -> None:
    probs = np.full((1, 1, 2, 3), 1 / 3)
    assert classes_of(table({"learned": probs}, probs[:, 0, 0], classes=("x", "y", "z"))) == ("x", "y", "z")


@pytest.mark.parametrize(("source", "target", "wrong"), [("a", "c", "c"), ("d", "b", "d")])
def test_a_class_that_is_not_there_is_named(source: str, target: str, wrong: str) -> None:
    with pytest.raises(UserError, match=rf"no class '{wrong}': it has a, b"):
        arrays(two_classes(effects([0.1])), "learned", source, target)


def test_a_kind_or_source_without_edits_is_named() -> None:
    made = two_classes(effects([0.1]))
    with pytest.raises(UserError, match=r"no linear edits of class 'a'"):
        arrays(made, "linear", "a", "b")
    with pytest.raises(UserError, match=r"no learned edits of class 'b'"):
        arrays(made, "learned", "b", "a")


# ----------------------------------------------------------------------------------------------------------------------
# Ranking

FIRST, SECOND, THIRD = [0.9, 0.9, 0.0, 0.0], [0.7, 0.7, 0.1, 0.1], [0.0, 0.0, 0.3, 0.3]


@pytest.mark.parametrize(("source", "target"), [("a", "b"), ("b", "a")])
def test_either_class_may_be_the_target(source: str, target: str) -> None:
    """The published search removes explained images only where the target is class 1."""
    made = two_classes(effects(FIRST, SECOND, THIRD) * 0.8, p_target=0.1, target=target)
    rows = ranked(made, source, target)
    assert [r["direction"] for r in rows] == [0, 2, 1]
    assert [r["chosen_by"] for r in rows] == ["greedy", "greedy", "mean effect"]


def test_ranking_by_effect_counts_every_image_for_every_direction() -> None:
    made = two_classes(effects(FIRST, SECOND, THIRD) * 0.8, p_target=0.1)
    rows = ranked(made, order="effect")
    assert [r["direction"] for r in rows] == [0, 1, 2]
    assert [r["effect"] for r in rows] == pytest.approx([0.36, 0.32, 0.12])
    assert {r["chosen_by"] for r in rows} == {"mean effect"}


@pytest.mark.parametrize("order", ["effect", "greedy"])
def test_every_direction_is_ranked_once(order: str) -> None:
    rows = ranked(two_classes(np.random.default_rng(0).uniform(-0.2, 0.2, (8, 6, 2))), top=2, order=order)
    assert [r["rank"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert sorted(r["direction"] for r in rows) == [0, 1, 2, 3, 4, 5]


def test_directions_that_are_not_chosen_follow_by_mean_effect_of_their_better_sign() -> None:
    made = two_classes(effects([0.5] * 4, [0.1] * 4, [-0.3] * 4, [0.2] * 4), p_target=0.3)
    rows = ranked(made)
    assert [(r["direction"], r["sign"]) for r in rows] == [(0, 1.0), (2, -1.0), (3, 1.0), (1, 1.0)]


def test_a_table_without_helpful_directions_is_ranked_all_the_same() -> None:
    made = two_classes(effects([-0.1] * 3, [-0.2] * 3, both=False) - 0.01)
    rows = ranked(made)
    assert {r["chosen_by"] for r in rows} == {"mean effect"}
    assert all(r["effect"] < 0 for r in rows)


def test_a_ranking_has_the_documented_columns() -> None:
    assert set(ranked(two_classes(effects([0.1, 0.2, 0.3])))[0]) == COLUMNS


def test_numbers_of_a_direction_are_those_of_its_edits() -> None:
    made = two_classes(
        effects([0.1, 0.4, 0.6, 0.3], [0.0, 0.0, 0.0, 0.0]),
        p_target=np.array([0.2, 0.2, 0.3, 0.55]),
        groups=[0, 0, 1, 2],
    )
    first = ranked(made)[0]
    assert first["effect"] == pytest.approx(0.35)
    assert (first["n"], first["units"], first["flip_n"]) == (4, 3, 3)
    assert first["flip_rate"] == pytest.approx(2 / 3)  # the fourth was called target before
    assert first["alpha"] == LENGTH
    assert first["length_z"] == pytest.approx(3.5)
    assert first["l1"] == pytest.approx(0.1)
    assert first["ssim"] == pytest.approx(0.9)


def test_intervals_contain_the_mean() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        made = two_classes(rng.uniform(-0.3, 0.6, (24, 3, 2)), p_target=0.3, groups=(np.arange(24) // 3).tolist())
        for r in ranked(made):
            assert r["effect_low"] <= r["effect"] <= r["effect_high"]
            assert r["flip_low"] <= r["flip_rate"] <= r["flip_high"]
            assert r["excess_low"] <= r["excess"] <= r["excess_high"]


def test_images_of_one_well_count_as_one() -> None:
    effect = np.random.default_rng(0).uniform(0.0, 0.3, 6).repeat(10)
    as_images = ranked(two_classes(effects(effect)))[0]
    as_wells = ranked(two_classes(effects(effect), groups=(np.arange(60) // 10).tolist()))[0]
    assert (as_wells["units"], as_images["units"]) == (6, 60)
    wide, narrow = (r["effect_high"] - r["effect_low"] for r in (as_wells, as_images))
    assert wide > 2 * narrow
    assert as_wells["p_value"] > as_images["p_value"]


def test_the_null_is_the_random_directions() -> None:
    random = np.array([[0.0, 0.7, 0.0, 0.0], [0.1, 0.7, 0.1, 0.1]])[:, :, None]
    first = ranked(two_classes(effects([0.6, 0.6]), p_target=0.1, random=random))[0]
    assert first["null_effect"] == pytest.approx(np.mean([0.175, 0.25]))
    assert first["null_flip_rate"] == pytest.approx(0.25)
    assert first["null_flip_max"] == pytest.approx(1.0)
    assert first["excess"] == pytest.approx(0.6 - first["null_effect"])


def test_a_direction_no_better_than_random_ones_is_seldom_significant() -> None:
    """Both drawn from one distribution; the other sign always fails, so that no choice of signs helps."""
    rng = np.random.default_rng(0)
    p_values = []
    for _ in range(60):
        drawn = 0.2 * rng.standard_normal((12, 9))
        learned = np.stack([drawn[:, :1], np.full((12, 1), -0.9)], axis=-1)
        made = two_classes(learned, p_target=0.95, random=drawn[:, 1:, None])
        p_values.append(ranked(made, draws=50)[0]["p_value"])
    assert np.mean(np.array(p_values) <= 0.05) < 0.15
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.12)


def test_a_direction_better_than_random_ones_is_significant() -> None:
    drawn = 0.05 * np.random.default_rng(0).standard_normal((12, 9))
    made = two_classes(effects(drawn[:, 0] + 0.3), random=drawn[:, 1:, None])
    assert ranked(made)[0]["p_value"] < 0.01


def test_where_no_image_can_flip_there_is_no_flip_rate() -> None:
    first = ranked(two_classes(effects([0.1, 0.2]), p_target=0.7))[0]
    assert first["flip_n"] == 0
    assert np.isnan(first["flip_rate"])


def test_ranking_is_the_same_every_time() -> None:
    made = two_classes(np.random.default_rng(0).uniform(-0.2, 0.2, (8, 4, 2)))
    assert rank(made, "a", "b").equals(rank(made, "a", "b"))


# ----------------------------------------------------------------------------------------------------------------------
# Baselines, curves, transitions


def test_a_baseline_is_its_best_direction() -> None:
    made = two_classes(
        effects([0.1, 0.1]), p_target=0.3, principal=np.array([[0.1, 0.5, 0.2], [0.1, 0.1, 0.0]])[:, :, None]
    )
    found = baseline(made, "principal", "a", "b", draws=200)
    assert (found["kind"], found["direction"]) == ("principal", 1)
    assert found["effect"] == pytest.approx(0.3)
    assert found["flip_rate"] == pytest.approx(0.5)
    assert set(found) >= COLUMNS - {"rank", "sign", "chosen_by"}


def test_a_flip_curve_gives_the_share_at_every_alpha() -> None:
    p = np.broadcast_to([0.9, 0.1], (4, 2, 2, 2)).copy()
    p[:3, 1, 0] = [0.2, 0.8]  # forwards, direction 1 flips three of four
    made = table({"learned": p, "random": p[:, :, :1]}, np.array([[0.9, 0.1]] * 4), other_alphas=(0.5,))
    alphas, shares = flip_curve(made, 1, "a", "b")
    assert alphas.tolist() == [-1.5, -0.5, 0.5, 1.5]
    assert shares.tolist() == [0.0, 0.0, 0.0, 0.75]
    assert not flip_curve(made, 0, "a", "b")[1].any()


def test_a_transition_matrix_names_the_best_direction_of_every_pair() -> None:
    classes = ("x", "y", "z")
    before = np.full((6, 3), 0.1)
    before[[0, 1], 0] = before[[2, 3], 1] = before[[4, 5], 2] = 0.8
    p = np.broadcast_to(before[:, None, None], (6, 3, 2, 3)).copy()
    for k in range(3):  # direction k leads to class k forwards, and to the class after it backwards
        p[:, k, 0] = np.eye(3)[k] * 0.8 + 0.1 * (1 - np.eye(3)[k])
        p[:, k, 1] = np.eye(3)[(k + 1) % 3] * 0.6 + 0.2 * (1 - np.eye(3)[(k + 1) % 3])
    p[:, 2, 0] = before  # forwards, direction 2 does nothing: z is reached by direction 1 backwards
    made = table({"learned": p}, before, classes=classes, of=["x", "x", "y", "y", "z", "z"])
    pairs = [(s, t) for s in classes for t in classes if s != t]
    found = {(r["source"], r["target"]): r for r in transition_matrix(made, pairs).to_pylist()}
    assert set(found) == set(pairs)
    for (_, target), r in found.items():
        assert (r["direction"], r["sign"]) == {"x": (0, 1.0), "y": (1, 1.0), "z": (1, -1.0)}[target]
        assert r["effect"] == pytest.approx(0.5 if target == "z" else 0.7)
        assert r["flip_rate"] == 1.0
        assert r["n"] == 2
