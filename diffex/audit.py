"""Is an explanation real?  Every audited direction is cross-examined, from tables alone.

A direction is *supported* when what it changes in cells is what the real populations differ in, an independent
classifier follows it, the change survives being encoded again, plates do not explain it, and it comes back when the
directions are trained anew.  Anything else gets the name of the first test that it fails.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from diffex.phenotypes import MOST, Population, Shift, direction_shift, phenotype_words, plate_leakage, population
from diffex.ranking import EffectArrays, arrays
from diffex.statistics import best_of_sphere_p_value, bootstrap_interval, mean_test, unit_means

LEVEL = 0.05
ENOUGH = 5  # flips from which their share is judged; with fewer, the mean change of the verdict is
HALF = 0.5  # least share that counts as "most": of flips followed, of the shift that is real; least cosine of a cycle
GONE = 0.25  # |cosine| that random changes of a dozen dimensions reach: a change this small is none
STABLE = 0.5  # least |cosine| with the partner found by training again


@dataclass(frozen=True)
class Test:
    """One question to a direction.

    Attributes:
        name: key of VERDICTS where failing decides the verdict.
        passed: None where it can't be told.
        value, low, high: what was measured, with its interval where it has one.
        measured: in words.
    """

    name: str
    passed: bool | None
    value: float
    measured: str
    low: float = float("nan")
    high: float = float("nan")


VERDICTS = {
    "witness": "adversarial: an independent classifier does not follow it",
    "cycle": "reconstruction artefact: the change is gone when the edit is encoded again",
    "populations": "unconfirmed: real cells of the two classes are not seen to differ in what it changes",
    "plates": "plate effect: plates differ along it by more than the treatment does",
    "seeds": "unstable: training the directions again does not find it",
}
"""Tests that decide, in the order in which they name the verdict."""


@dataclass(frozen=True)
class Finding:
    """What the audit has found on one direction.

    Attributes:
        source, target, direction, sign, rank: which.
        verdict: 'supported', or the key of VERDICTS that it fails first.
        tests: all questions, those that only inform included.
        words: what it changes in the cells, beside the real effect.
        shift: of features.
    """

    source: str
    target: str
    direction: int
    sign: float
    rank: int
    verdict: str
    tests: tuple[Test, ...]
    words: tuple[str, ...]
    shift: Shift

    def __getitem__(self, name: str) -> Test:
        return next(t for t in self.tests if t.name == name)

    @property
    def supported(self) -> bool:
        return self.verdict == "supported"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Tables of the stages ``effects``, ``real_cells``, ``evidence`` and numbers of ``replicas`` and ``directions``.

    Attributes:
        effects: the effects table, with the columns of judge 'witness' and 'robust'.
        real: features of real held-out cells; cells: of images, reconstructions and edits; cycle: edits encoded again.
        dimensions: of the subspace that directions live in.
        stability: (K,) mean |cosine| of each direction with its partners from other seeds; empty: not known.
    """

    effects: pa.Table
    real: pa.Table
    cells: pa.Table
    cycle: pa.Table
    dimensions: int
    stability: Sequence[float] = ()


def feature_names(table: pa.Table) -> tuple[str, ...]:
    """Columns that hold classical features."""
    return tuple(n for n in table.column_names if n.startswith(("Nuclei_", "Cells_", "Cytoplasm_")))


def matrix(table: pa.Table, names: Sequence[str]) -> NDArray[np.float64]:
    """Columns of a table as (N, F)."""
    return np.stack([column(table, n) for n in names], axis=1).astype(np.float64)


def column(table: pa.Table, name: str) -> NDArray:
    return table[name].to_numpy(zero_copy_only=False)


def populations(real: pa.Table, source: str, target: str) -> Population:
    """Real cells of two classes, compared."""
    names, classes = feature_names(real), column(real, "class_name")
    part = np.isin(classes, (source, target))
    plates = column(real, "Metadata_Plate") if "Metadata_Plate" in real.column_names else np.zeros(len(real), int)
    return population(
        matrix(real, names)[part], names, classes[part] == target, column(real, "group")[part], plates[part]
    )


def audit(e: Evidence, followed: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Cross-examine directions.

    Args:
        e: the tables.
        followed: of each direction ``source, target, direction, sign, rank``, as in the evidence's record.
    """
    compared: dict[tuple[str, str], Population] = {}
    moving: dict[tuple[str, str], NDArray] = {}
    findings = []
    for r in followed:
        pair = (r["source"], r["target"])
        if pair not in compared:
            compared[pair] = populations(e.real, *pair)
            moving[pair] = ranking_p_values(e.effects, *pair, e.dimensions)
        findings.append(_examine(e, r, compared[pair], float(moving[pair][r["direction"]])))
    return findings


def ranking_p_values(effects: pa.Table, source: str, target: str, dimensions: int) -> NDArray[np.floating]:
    """p-value of each direction's pull on the classifier against random ones, adjusted for all of them: (K,).

    See ``statistics.best_of_sphere_p_value``; the pull is the mean change of the logit of p(target) at the reference
    length, of the better sign.
    """
    pull, null = (logit_change(arrays(effects, k, source, target)) for k in ("learned", "random"))
    # A direction that pushes away from the target whichever way it is gone pulls by nothing.
    return best_of_sphere_p_value(np.maximum(pull.max(axis=1), 0.0), null[:, 0], dimensions)


def logit_change(a: EffectArrays) -> NDArray[np.float64]:
    """Mean over images of the change of logit p(target), (K, signs)."""
    return np.asarray((logit(a.before[:, None, None] + a.effect) - logit(a.before)[:, None, None]).mean(axis=0))


def logit(p: NDArray) -> NDArray[np.float64]:
    """Log odds, with p kept from 0 and 1 as far as float32 tells them apart."""
    q = np.clip(np.asarray(p, np.float64), 1e-6, 1 - 1e-6)
    return np.log(q) - np.log1p(-q)


def _examine(e: Evidence, r: Mapping[str, Any], real: Population, p_value: float) -> Finding:
    source, target, k = r["source"], r["target"], r["direction"]
    s = 0 if r["sign"] > 0 else 1
    a = arrays(e.effects, "learned", source, target)
    names = feature_names(e.real)
    kind, of = column(e.cells, "kind"), column(e.cells, "class_name") == source
    edit = of & (kind == "edit") & (column(e.cells, "direction") == k) & (column(e.cells, "target") == target)
    base = of & (kind == "reconstruction")
    edits, bases = e.cells.filter(pa.array(edit)), e.cells.filter(pa.array(base))
    order = np.argsort(column(bases, "row"))  # each edit beside the reconstruction that it starts from
    bases = bases.take(pa.array(order[np.searchsorted(column(bases, "row"), column(edits, "row"), sorter=order)]))
    shift = direction_shift(matrix(edits, names), matrix(bases, names), column(edits, "group"), real)
    moves = Test("moves", p_value <= LEVEL, p_value, f"p = {p_value:.2g} against the best of as many random directions")
    tests = [
        moves, *(_followed(a, k, s, judge) for judge in ("witness", "robust")), _cycle(e.cycle, r, a, s),
        _real(shift, real), _plates(shift, real), _seeds(e.stability, k), _rebuilt(e.cells, source, shift, real),
    ]  # fmt: skip
    by_name = {t.name: t for t in tests}
    # What nobody could see in real cells is not supported; the other questions may stay open.
    failed = [n for n in VERDICTS if by_name[n].passed is False or (n == "populations" and by_name[n].passed is None)]
    verdict = failed[0] if failed else "supported"
    words = tuple(phenotype_words(shift, real, target))
    return Finding(source, target, k, r["sign"], r["rank"], verdict, tuple(tests), words, shift)


def _followed(a: EffectArrays, k: int, s: int, judge: str) -> Test:
    """Do flips of the explained classifier flip another one too?  With few flips: does its verdict move along?"""
    other = a.judges[judge]
    can = a.eligible & other.eligible & a.flips[:, k, s]
    n = int(can.sum())
    if n >= ENOUGH:
        flips = other.flips[can][:, k, s].astype(float)
        low, high = bootstrap_interval(flips, a.groups[can])
        share = float(flips.mean())
        # One well may hold most of the flips: against a direction counts only what its interval leaves no doubt of.
        passed = True if share >= HALF else False if high < HALF else None
        return Test(judge, passed, share, f"{100 * share:.0f} % of {n} flips followed", low, high)
    change = other.effect[:, k, s]
    p = float(mean_test(unit_means(change, a.groups)[:, None], alternative="greater")[0])
    text = f"too few flips; its p(target) changes by {change.mean():+.3f} (p = {p:.2g})"
    return Test(judge, True if p <= LEVEL else None, float(change.mean()), text)


def _cycle(cycle: pa.Table, r: Mapping[str, Any], a: EffectArrays, s: int) -> Test:
    """Is the change still there when the edit is encoded again, with the unedited cell's verdict, and rendered?"""
    same = [column(cycle, n) == r[n] for n in ("source", "target", "direction")]
    part = cycle.filter(pa.array(np.logical_and.reduce(same)))
    at = np.searchsorted(a.rows, column(part, "row"))
    names = [n.removeprefix("p:") for n in part.column_names if n.startswith("p:")]
    said = matrix(part, [f"p:{n}" for n in names]).argmax(axis=1) == names.index(r["target"])
    flipped = a.eligible[at] & a.flips[at, r["direction"], s]
    cosine, groups = column(part, "cosine").astype(float), a.groups[at]
    low, high = bootstrap_interval(cosine, groups)
    value, n = float(cosine.mean()), int(flipped.sum())
    text = f"the code moves as before (cosine {value:.2f})"
    if n:
        text += f"; {100 * said[flipped].mean():.0f} % of {n} flips kept"
    passed = True if value >= HALF else False if high < GONE else None
    return Test("cycle", passed, value, text, low, high)


def _real(shift: Shift, real: Population) -> Test:
    if not real.names:
        return Test("populations", None, float("nan"), "no feature could be measured in nearly all cells")
    if real.confounded:
        return Test(
            "populations", None, float("nan"), "no plate holds both classes: treatment and plate can't be told apart"
        )
    text = (
        f"{100 * shift.shared:.0f} % of the change is what real cells differ in, {100 * shift.opposed:.0f} % the "
        f"opposite ({int(shift.moved.sum())} features moved, {int(real.differs.sum())} of {len(real.names)} differ in "
        f"{int(real.treated.sum())} treated and {int((~real.treated).sum())} control wells)"
    )
    return Test("populations", shift.shared >= HALF and shift.opposed <= HALF / 2, shift.agreement, text)


def _plates(shift: Shift, real: Population) -> Test:
    if real.confounded:  # then nobody knows what the treatment does along it
        return Test("plates", None, float("nan"), "no plate holds both classes")
    found = plate_leakage(shift, real)
    if np.isnan(found.p_value):
        return Test("plates", None, float("nan"), "not enough plates with control wells")
    text = f"{found.plates} plates spread by {found.ratio:.2f} of the real effect along it (p = {found.p_value:.2g})"
    return Test("plates", not found.leaks, found.ratio, text)


def _rebuilt(cells: pa.Table, source: str, shift: Shift, real: Population) -> Test:
    """How much rendering alone changes the cells' features, beside what the direction does (informs only)."""
    names, kind = real.names, column(cells, "kind")
    of = column(cells, "class_name") == source
    image, rebuilt = (cells.filter(pa.array(of & (kind == k))).sort_by("row") for k in ("image", "reconstruction"))
    if len(image) != len(rebuilt) or not len(image):
        return Test("reconstruction", None, float("nan"), "images were not measured")
    change = unit_means((matrix(rebuilt, names) - matrix(image, names)) / real.spread, column(image, "group"))
    size = float(np.sqrt(np.nanmean(np.square(np.nanmean(np.clip(change, -MOST, MOST), axis=0)))))
    edit = float(np.sqrt(np.mean(np.square(np.clip(shift.difference, -MOST, MOST)))))
    text = f"rendering alone changes features by {size:.2f} sd, the direction by {edit:.2f} sd"
    return Test("reconstruction", size < HALF * edit, size, text)


def _seeds(stability: Sequence[float], k: int) -> Test:
    if len(stability) <= k:
        return Test("seeds", None, float("nan"), "directions were trained once")
    value = float(stability[k])
    return Test("seeds", value >= STABLE, value, f"|cosine| {value:.2f} with its partner when trained again")


def phenotype_table(findings: Sequence[Finding], real: pa.Table) -> pa.Table:
    """One row per audited direction and feature: its shift with interval, beside the real difference, both with q."""
    parts = []
    for f in findings:
        p, s = populations(real, f.source, f.target), f.shift
        n = len(p.names)
        parts.append(pa.table({
            "source": [f.source] * n, "target": [f.target] * n, "direction": [f.direction] * n, "rank": [f.rank] * n,
            "verdict": [f.verdict] * n, "feature": list(p.names), "shift": s.difference, "shift_low": s.low,
            "shift_high": s.high, "shift_q": s.q_value, "shift_ratio": s.ratio, "moved": s.moved,
            "real": p.contrast.difference, "real_q": p.q_value, "real_ratio": p.ratio, "differs": p.differs,
        }))  # fmt: skip
    return pa.concat_tables(parts)
