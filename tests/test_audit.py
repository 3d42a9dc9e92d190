"""The audit: on tables made by hand, where it is known which directions are real and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from diffex.audit import (
    ENOUGH,
    VERDICTS,
    Evidence,
    Finding,
    audit,
    feature_names,
    logit,
    logit_change,
    phenotype_table,
    populations,
    ranking_p_values,
)
from diffex.ranking import arrays

NAMES = (
    "Nuclei_AreaShape_Area", "Cells_AreaShape_Area", "Cells_AreaShape_Eccentricity",
    "Nuclei_Intensity_MeanIntensity_DNA", "Cells_Intensity_MeanIntensity_actin",
    "Cells_RadialDistribution_FracAtD_actin_1of4",
    "Cells_RadialDistribution_FracAtD_actin_4of4", "Cytoplasm_Texture_Contrast_actin_1", "Cells_Granularity_1_actin",
    "Nuclei_Texture_Entropy_DNA_1",
)  # fmt: skip
F = len(NAMES)
CLASSES = ("control", "other", "treated")
IMAGES, RANDOM, DIMENSIONS = 24, 12, 10


def along(**sizes: float) -> NDArray:
    """Changes of features in standard deviations, (F,): ``f0=1`` changes the first."""
    out = np.zeros(F)
    for name, value in sizes.items():
        out[int(name[1:])] = value
    return out


EFFECT = along(f0=1.2, f1=-1.2, f4=1.2)
"""What the treatment does to real cells."""


def real_cells(
    effects: dict[str, NDArray] | None = None, *, plates: int = 4, wells: int = 3, cells: int = 8, seed: int = 0,
    plate_effect: NDArray | float = 0.0, confounded: bool = False, by_chance: bool = False,
) -> pa.Table:  # fmt: skip
    """Features of real cells: wells differ by a third of a cell's standard deviation.

    Args:
        effects: class -> change of its cells, (F,).
        plates, wells, cells: plates, wells of a class on each, cells of a well.
        plate_effect: standard deviation between plates of each feature, or (F,) a pattern that plates have more or less
            of.
        confounded: every plate holds one class only.
        by_chance: wells are named by chance, whatever their cells are.
    """
    effects = {"treated": EFFECT} if effects is None else effects
    names = ("control", *effects)
    rng = np.random.default_rng(seed)
    columns: dict[str, list] = {"class_name": [], "group": [], "Metadata_Plate": []}
    values = []
    for plate in range(plates):
        if isinstance(plate_effect, np.ndarray):
            shift = (plate - (plates - 1) / 2) * plate_effect
        else:
            shift = plate_effect * rng.standard_normal(F)
        of_wells = [names[plate % len(names)]] * wells * len(names) if confounded else list(names) * wells
        said = rng.permutation(of_wells) if by_chance else of_wells
        for w, (own, name) in enumerate(zip(of_wells, said, strict=True)):
            centre = shift + effects.get(own, np.zeros(F)) + rng.standard_normal(F) / 3
            values.append(centre + rng.standard_normal((cells, F)))
            columns["class_name"] += [str(name)] * cells
            columns["group"] += [100 * plate + w] * cells
            columns["Metadata_Plate"] += [f"plate {plate}"] * cells
    x = 100 + 10 * np.concatenate(values)  # in a unit of their own
    return pa.table({**columns, **{n: x[:, j] for j, n in enumerate(NAMES)}})


@dataclass(frozen=True)
class Direction:
    """What a direction truly is.

    Attributes:
        change: of the features of a cell at the reference length, in standard deviations, (F,).
        pull, witness, robust: change of the logit of p(target) of each judge.
        kept: cosine of the code's change after the edit is encoded again.
        stability: |cosine| with its partner when trained again.
        target: class that it leads to.
        sign: the way that is followed; the other way does the opposite.
    """

    change: NDArray = field(default_factory=lambda: EFFECT)
    pull: float = 6.0
    witness: float = 6.0
    robust: float = 6.0
    kept: float = 0.9
    stability: float = 0.95
    target: str = "treated"
    sign: float = 1.0


REAL = Direction()


def probabilities(logits: NDArray) -> NDArray:
    return np.asarray(special.softmax(logits, axis=-1))


def evidence(
    directions: Sequence[Direction], real: pa.Table | None = None, *, seed: int = 0, wells: int = 8,
    classes: Sequence[str] = ("control", "treated"), start: float = 3.0, noise: float = 0.5, random_pull: float = 1.0,
    rendering: float = 0.01,
) -> tuple[Evidence, list[dict]]:  # fmt: skip
    """The tables that the stages would write of such directions, and the list of the directions followed.

    Args:
        wells: that the explained cells are of.
        start: mean logit of the source class before an edit.
        noise: standard deviation of the logit's change from image to image.
        random_pull: root mean square change of the logit along random directions.
        rendering: what rendering alone adds to every feature, in standard deviations.
    """
    rng = np.random.default_rng([seed, 1])
    real = real_cells(seed=seed) if real is None else real
    rows, groups = 7 + 2 * np.arange(IMAGES), np.arange(IMAGES) % wells
    source = 0
    before = {judge: rng.standard_normal((IMAGES, len(classes))) * 0.5 for judge in ("p", "witness", "robust")}
    for logits in before.values():
        logits[:, source] += start
    sphere = rng.standard_normal((RANDOM, DIMENSIONS))
    pulls = random_pull * DIMENSIONS**0.5 * sphere[:, 0] / np.linalg.norm(sphere, axis=1)
    edits = [("learned", k, s) for k in range(len(directions)) for s in (1.0, -1.0)]
    edits += [("random", k, 1.0) for k in range(RANDOM)]
    parts = []
    for kind, k, s in edits:
        d = (
            directions[k]
            if kind == "learned"
            else Direction(*(np.zeros(F), pulls[k], pulls[k], pulls[k]), target=classes[-1])
        )
        columns: dict[str, object] = {
            "row": rows, "kind": [kind] * IMAGES, "direction": np.full(IMAGES, k), "alpha": np.full(IMAGES, 2.0 * s),
            "reference": np.ones(IMAGES, bool), "class_name": [classes[source]] * IMAGES, "group": groups,
            "change": pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(IMAGES, np.float32)), 1),
        }  # fmt: skip
        for judge, pull in {"p": d.pull, "witness": d.witness, "robust": d.robust}.items():
            after = before[judge].copy()
            after[:, classes.index(d.target)] += s * d.sign * pull + noise * rng.standard_normal(IMAGES)
            for c, name in enumerate(classes):
                columns[f"{judge}_reconstruction:{name}"] = probabilities(before[judge])[:, c]
                columns[f"{judge}_edit:{name}"] = probabilities(after)[:, c]
        parts.append(pa.table(columns))
    base = 100 + 10 * rng.standard_normal((IMAGES, F))

    def cells(values: NDArray, kind: str, target: str, direction: int) -> pa.Table:
        about = {"class_name": classes[source], "kind": kind, "target": target, "direction": direction}
        return pa.table({
            "row": rows, "group": groups, **{n: [v] * IMAGES for n, v in about.items()},
            **{n: values[:, j] for j, n in enumerate(NAMES)},
        })  # fmt: skip

    image = base - 10 * rendering
    measured, cycles, followed = [cells(image, "image", "", -1), cells(base, "reconstruction", "", -1)], [], []
    for k, d in enumerate(directions):
        # The edit moves every cell a little differently.
        moved = base + 10 * (d.change + 0.1 * rng.standard_normal((IMAGES, F)))
        measured.append(cells(moved, "edit", d.target, k))
        again = probabilities(np.where(np.array(classes) == d.target, 2.0, 0.0) * np.ones((IMAGES, 1)))
        about = {"source": classes[source], "target": d.target, "direction": k, "sign": d.sign, "rank": k + 1}
        followed.append(about)
        cycles.append(pa.table({
            "row": rows, "cosine": d.kept + 0.05 * rng.standard_normal(IMAGES), "group": groups,
            **{f"p:{name}": again[:, c] for c, name in enumerate(classes)},
            **{n: [v] * IMAGES for n, v in about.items()},
        }))  # fmt: skip
    made = Evidence(
        effects=pa.concat_tables(parts), real=real, cells=pa.concat_tables(measured), cycle=pa.concat_tables(cycles),
        dimensions=DIMENSIONS, stability=[d.stability for d in directions],
    )  # fmt: skip
    return made, followed


def examined(direction: Direction, real: pa.Table | None = None, **options: object) -> Finding:
    """What the audit finds on one direction."""
    return audit(*evidence([direction], real, **options))[0]  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------------------------------
# What is real, and what fails which question


def test_a_direction_that_does_what_the_treatment_does_is_supported() -> None:
    found = examined(REAL)
    assert (found.verdict, found.supported) == ("supported", True)
    asked = ["moves", "witness", "robust", "cycle", "populations", "plates", "seeds", "reconstruction"]
    assert [t.name for t in found.tests] == asked
    assert all(t.passed for t in found.tests)
    assert found.shift.agreement > 0.9
    assert any("agrees with the real effect of treated" in words for words in found.words)


@pytest.mark.parametrize(
    ("verdict", "wrong"),
    [
        ("witness", replace(REAL, witness=0.0)),
        ("cycle", replace(REAL, kept=0.1)),
        ("populations", replace(REAL, change=along(f2=1.5, f8=1.5))),  # real classes don't differ in these
        ("populations", replace(REAL, change=-EFFECT)),
        ("populations", replace(REAL, change=np.zeros(F))),
        ("populations", replace(REAL, change=EFFECT / 2 + along(f2=1.5, f5=1.5))),  # in part real, mostly not
        ("populations", replace(REAL, change=EFFECT * along(f0=1, f1=1, f4=-1))),  # two of three features are right
        ("seeds", replace(REAL, stability=0.2)),
    ],
)
def test_what_is_wrong_with_a_direction_names_its_verdict(verdict: str, wrong: Direction) -> None:
    found = examined(wrong)
    assert found.verdict == verdict
    assert found[verdict].passed is False
    failed = {t.name for t in found.tests if t.passed is False}
    assert failed - {"reconstruction"} == {verdict}  # a direction that changes nothing changes less than rendering


def test_the_opposite_of_the_treatment_opposes_it() -> None:
    found = examined(replace(REAL, change=-EFFECT))
    assert found["populations"].value < -0.9
    assert any("against the real effect" in words for words in found.words)


def test_a_direction_along_which_plates_differ_more_than_classes_is_a_plate_effect() -> None:
    """It does what the treatment does; but plates do more of the same."""
    found = examined(REAL, real_cells(plate_effect=1.5 * EFFECT))
    assert found.verdict == "plates"
    assert found["populations"].passed
    assert found["plates"].value > 1
    assert examined(REAL, real_cells(plate_effect=0.2 * EFFECT)).verdict == "supported"


def test_plates_that_differ_in_something_else_do_no_harm() -> None:
    assert examined(REAL, real_cells(plate_effect=along(f2=3.0, f8=3.0))).verdict == "supported"


def test_class_and_plate_that_can_not_be_told_apart_support_nothing() -> None:
    """However strong the difference of the two sets of plates: it may be the plates'."""
    for plate_effect in (0.0, 2.0):
        found = examined(REAL, real_cells(confounded=True, plate_effect=plate_effect))
        assert found.verdict == "populations"
        assert found["populations"].passed is None
        assert found["plates"].passed is None
        assert "can't be told apart" in found["populations"].measured


def test_without_plates_and_with_one_training_the_other_questions_decide() -> None:
    one_plate = real_cells(plates=1, wells=12).drop_columns(["Metadata_Plate"])
    made, followed = evidence([REAL, replace(REAL, kept=0.0)], one_plate)
    found = audit(replace(made, stability=()), followed)
    assert [f.verdict for f in found] == ["supported", "cycle"]
    assert found[0]["plates"].passed is None
    assert found[0]["seeds"].passed is None


def test_the_first_failure_names_the_verdict() -> None:
    """In the order of VERDICTS: each loses its reason, and the next one shows."""
    assert tuple(VERDICTS) == ("witness", "cycle", "populations", "plates", "seeds")
    plates = real_cells(plate_effect=1.5 * EFFECT)
    wrong = replace(REAL, witness=0.0, kept=0.1, change=-EFFECT, stability=0.2)
    seen = []
    for mended in ({}, {"witness": 6.0}, {"kept": 0.9}, {"change": EFFECT}):
        wrong = replace(wrong, **mended)
        seen.append(examined(wrong, plates).verdict)
    assert [*seen, examined(wrong).verdict] == list(VERDICTS)


def test_how_hard_it_moves_the_classifier_and_what_the_robust_counterpart_says_only_inform() -> None:
    found = examined(replace(REAL, robust=0.0))
    assert found["robust"].passed is False
    assert found.supported
    found = examined(REAL, random_pull=8.0)
    assert found["moves"].passed is False
    assert found.supported


def test_the_followed_sign_is_the_one_that_is_judged() -> None:
    """The way back leads away from the target: its flips are none."""
    assert examined(replace(REAL, sign=-1.0)).verdict == "supported"
    made, followed = evidence([replace(REAL, sign=-1.0)])
    assert audit(made, [{**followed[0], "sign": 1.0}])[0]["witness"].passed is not True


@pytest.mark.parametrize("direction", [REAL, replace(REAL, witness=0.0), replace(REAL, change=-EFFECT)])
def test_a_twin_gets_the_verdict_of_its_twin(direction: Direction) -> None:
    made, followed = evidence([direction, replace(REAL, kept=0.2)])
    twin = [{**followed[0], "rank": 3}, *followed, followed[0]]
    first, other, _, again = (
        (f.verdict, [(t.name, t.passed, t.value, t.low, t.high) for t in f.tests], f.words) for f in audit(made, twin)
    )
    assert repr(first) == repr(other) == repr(again)  # also where there are nan


def test_the_order_of_rows_does_not_matter() -> None:
    """Each edit is compared with the reconstruction that it starts from."""
    made, followed = evidence([REAL, replace(REAL, change=along(f2=1.0))])
    rng = np.random.default_rng(5)
    shuffled = {
        name: getattr(made, name).take(pa.array(rng.permutation(len(getattr(made, name)))))
        for name in ("effects", "cells", "cycle", "real")
    }
    for a, b in zip(audit(made, followed), audit(replace(made, **shuffled), followed), strict=True):
        assert a.verdict == b.verdict
        assert a.shift.difference == pytest.approx(b.shift.difference)
        assert a.shift.low == pytest.approx(b.shift.low)


def test_several_pairs_are_each_held_to_their_own_classes() -> None:
    other = along(f3=1.2, f7=-1.2)
    real = real_cells({"other": other, "treated": EFFECT})
    directions = [
        REAL, replace(REAL, change=other, target="other"), replace(REAL, change=other), replace(REAL, target="other")
    ]  # fmt: skip
    made, followed = evidence(directions, real, classes=CLASSES)
    found = audit(made, followed)
    assert [f.verdict for f in found] == ["supported", "supported", "populations", "populations"]
    assert [f.target for f in found] == ["treated", "other", "treated", "other"]


def test_what_a_direction_does_on_its_way_to_another_class_does_not_count() -> None:
    elsewhere = replace(REAL, change=-EFFECT, kept=0.0, target="other")
    made, followed = evidence([REAL, elsewhere], real_cells({"other": -EFFECT, "treated": EFFECT}), classes=CLASSES)
    one = {}
    for name in ("cells", "cycle"):
        table = getattr(made, name)
        place, k = table.column_names.index("direction"), table["direction"].to_numpy()
        one[name] = table.set_column(place, "direction", pa.array(np.where(k == 1, 0, k)))
    apart, together = (audit(m, followed[:1])[0] for m in (made, replace(made, **one)))
    assert together.verdict == "supported"
    assert together.shift.difference == pytest.approx(apart.shift.difference)
    assert together["cycle"].value == apart["cycle"].value


# ----------------------------------------------------------------------------------------------------------------------
# Few flips


def test_with_few_flips_a_verdict_that_moves_along_is_followed() -> None:
    found = examined(Direction(pull=1.0, witness=1.0, robust=1.0))
    assert found["witness"].passed is True
    assert "too few flips" in found["witness"].measured
    assert found.supported


def test_with_few_flips_nothing_is_adversarial() -> None:
    """Neither a witness that stays where it is nor one that goes astray in single images proves anything."""
    for seed in range(5):
        found = examined(Direction(pull=1.0, witness=0.0), seed=seed, noise=0.2)
        assert found["witness"].passed is not False
        assert found.verdict != "witness"


@pytest.mark.parametrize("flips", [0, 1, ENOUGH - 1, ENOUGH, ENOUGH + 3])
def test_flips_are_counted_from_a_handful_on(flips: int) -> None:
    """So many flips, and not one that the witness makes too."""
    made, followed = evidence([Direction(pull=0.0, witness=0.0)], noise=0.0)
    flipped = np.flatnonzero(made.effects["row"].to_numpy() < 7 + 2 * flips)[:IMAGES]
    p = np.array(made.effects["p_edit:treated"])
    p[flipped] = 0.9
    effects = made.effects.set_column(made.effects.column_names.index("p_edit:treated"), "p_edit:treated", pa.array(p))
    place = effects.column_names.index("p_edit:control")
    effects = effects.set_column(place, "p_edit:control", pa.array(1 - p))
    found = audit(replace(made, effects=effects), followed)[0]
    assert (found.verdict == "witness") == (flips >= ENOUGH)
    assert found["witness"].passed is (False if flips >= ENOUGH else None)


def test_half_of_the_flips_must_be_followed() -> None:
    """The witness's logit must rise by 3 to flip: a pull of so much takes half of the cells over.  What lies below one
    half, but whose interval reaches it, can't be told."""
    shares = [examined(replace(REAL, witness=pull), noise=2.0)["witness"] for pull in (1.0, 2.0, 4.0, 6.0)]
    assert [t.passed for t in shares] == [False, None, True, True]
    assert [t.passed for t in shares] == [True if t.value >= 0.5 else False if t.high < 0.5 else None for t in shares]
    assert all(t.low <= t.value <= t.high for t in shares)


def test_what_rendering_alone_changes_is_told_beside_the_direction() -> None:
    fine, coarse = examined(REAL)["reconstruction"], examined(REAL, rendering=2.0)["reconstruction"]
    assert fine.passed is True
    assert fine.value == pytest.approx(0.01, rel=0.1)
    assert coarse.passed is False
    assert coarse.value == pytest.approx(2.0, rel=0.1)


# ----------------------------------------------------------------------------------------------------------------------
# Under the null, and with something to find

RUNS = 120


def supported_of(runs: int, effect: float, change: str) -> int:
    """How many directions are supported in so many screens, whose other questions are all answered with yes.

    Args:
        effect: of the treatment, as a share of EFFECT.
        change: what the directions do to cells: 'treatment', 'chance', or 'held out': just what the two halves of the
            held-out cells differ in, the most that any direction can know.
    """
    count = 0
    for seed in range(runs):
        real = real_cells(
            {"treated": effect * EFFECT}, plates=3, wells=2, cells=6, seed=seed, plate_effect=0.3, by_chance=effect == 0
        )
        chance = np.random.default_rng([seed, 2]).standard_normal(F)
        moved = EFFECT if change == "treatment" else chance
        if change == "held out":
            moved = populations(real, "control", "treated").contrast.difference
        count += examined(replace(REAL, change=moved), real, seed=seed).supported
    return count


@pytest.mark.parametrize("change", ["chance", "held out"])
def test_where_classes_are_given_to_wells_by_chance_hardly_anything_is_supported(change: str) -> None:
    """At most the 5 % that the false discovery rate allows, within the binomial interval."""
    assert supported_of(RUNS, 0.0, change) <= stats.binom.ppf(0.975, RUNS, 0.05)


def test_where_the_treatment_works_most_directions_that_do_the_same_are_supported() -> None:
    assert supported_of(20, 1.0, "treatment") >= 17
    assert supported_of(20, 1.0, "chance") <= 5


# ----------------------------------------------------------------------------------------------------------------------
# Does it move the classifier more than the best of as many random directions?


def p_values(pulls: Sequence[float], **options: object) -> NDArray:
    made, _ = evidence([replace(REAL, pull=p) for p in pulls], noise=0.0, **options)  # type: ignore[arg-type]
    return ranking_p_values(made.effects, "control", "treated", DIMENSIONS)


def test_a_strong_direction_moves_the_classifier_and_weak_ones_do_not() -> None:
    p = p_values([8.0, 0.5, -8.0, 0.0])
    assert p.shape == (4,)
    assert (p[[0, 2]] < 0.01).all()  # a direction may be gone backwards
    assert (p[[1, 3]] > 0.2).all()


def test_directions_that_pull_alike_are_alike() -> None:
    p = p_values([2.5, 2.5, 1.0])
    assert p[0] == p[1] < p[2]


def test_more_directions_need_a_stronger_pull() -> None:
    few, many = p_values([2.5]), p_values([2.5] + [0.0] * 11)
    assert few[0] < many[0]


def test_a_single_direction_in_many_dimensions_is_held_to_students_t() -> None:
    """There, coordinates of random unit vectors are normal, and the ratio to the root mean square of R is Student's."""
    for pull in (1.0, 2.0, 3.0):
        made, _ = evidence([replace(REAL, pull=pull)], noise=0.0)
        moved, null = (logit_change(arrays(made.effects, kind, "control", "treated")) for kind in ("learned", "random"))
        ratio = moved.max() / np.sqrt(np.mean(null[:, 0] ** 2))
        found = ranking_p_values(made.effects, "control", "treated", 100_000)
        assert found[0] == pytest.approx(2 * stats.t.sf(ratio, RANDOM), abs=0.01)


def test_random_directions_taken_for_learned_ones_are_seldom_significant() -> None:
    """The smallest of K adjusted p-values is uniform."""
    rng = np.random.default_rng(0)
    least = []
    for seed in range(100):
        sphere = rng.standard_normal((4, DIMENSIONS))
        pulls = DIMENSIONS**0.5 * sphere[:, 0] / np.linalg.norm(sphere, axis=1)
        least.append(float(p_values(pulls.tolist(), seed=seed).min()))
    assert (np.array(least) <= 0.05).sum() <= stats.binom.ppf(0.975, 100, 0.05)
    assert stats.kstest(least, "uniform").pvalue > 0.01


def test_a_direction_that_leads_away_from_the_target_both_ways_does_not_move_it() -> None:
    made, _ = evidence([REAL], noise=0.0)
    p = np.array(made.effects["p_edit:treated"])
    p[: 2 * IMAGES] = 1e-6
    effects = made.effects.set_column(made.effects.column_names.index("p_edit:treated"), "p_edit:treated", pa.array(p))
    assert ranking_p_values(effects, "control", "treated", DIMENSIONS)[0] == 1.0


def test_log_odds_are_finite_where_the_classifier_is_certain() -> None:
    p = np.array([0.2, 0.5, 0.9])
    assert logit(p) == pytest.approx(special.logit(p))
    assert np.isfinite(logit(np.array([0.0, 1.0], np.float32))).all()
    assert logit(np.array([0.0])) == pytest.approx(-logit(np.array([1.0])))


# ----------------------------------------------------------------------------------------------------------------------
# The table of phenotypes


def test_the_phenotype_table_has_a_row_for_every_direction_and_feature() -> None:
    wrong = replace(REAL, change=along(f2=0.8))
    made, followed = evidence([REAL, wrong])
    table = phenotype_table(audit(made, followed), made.real)
    assert table.column_names == [
        "source", "target", "direction", "rank", "verdict", "feature", "shift", "shift_low", "shift_high", "shift_q",
        "shift_ratio", "moved", "real", "real_q", "real_ratio", "differs",
    ]  # fmt: skip
    assert feature_names(made.real) == NAMES
    assert len(table) == 2 * F
    by = {(r["direction"], r["feature"]): r for r in table.to_pylist()}
    assert {(k, n) for k in range(2) for n in NAMES} == set(by)
    assert {r["verdict"] for (k, _), r in by.items() if k == 1} == {"populations"}
    for k, change in enumerate((EFFECT, wrong.change)):
        for j, name in enumerate(NAMES):
            r = by[k, name]
            # The unit is the control cells' own spread: those of a well, and a third of that between wells.
            assert r["shift"] == pytest.approx(change[j] / (1 + 1 / 9) ** 0.5, abs=0.2)
            assert r["shift_low"] <= r["shift"] <= r["shift_high"]
            assert r["moved"] == (change[j] != 0)
            assert r["differs"] == (r["real_q"] <= 0.05)
            assert r["differs"] or EFFECT[j] == 0
            assert r["real"] == pytest.approx(EFFECT[j], abs=0.6)
