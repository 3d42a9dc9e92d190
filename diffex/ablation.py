"""Ablations: one hypothesis that can turn out false, cells of settings, seeds, and the test that decides.

An ablation runs every *cell* (a few settings that differ from the base) from every *seed*.  Cells at one seed are
compared with each other, so what a seed decides (the screen, the split, all trainings) cancels.  A claim is one number
a seed, positive where it holds; over seeds it has a mean and a Student interval:

    the hypothesis is supported    if the interval of every claim lies above 0,
                      refuted      if the interval of one lies below 0,
                      undecided    otherwise, and always with one seed.

With 95 % intervals a false hypothesis is called supported in at most 2.5 % of ablations, and a true one with k claims
refuted in at most 2.5 k %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from diffex.config import Experiment
from diffex.errors import UserError
from diffex.measures import METRICS, over_seeds
from diffex.pipeline import stage_digests
from diffex.settings import digest, flat
from diffex.statistics import mean_test

Rows = Mapping[str, Mapping[str, Any]]
"""Rows of one seed: cell -> its row, see ``Ablation.table``."""

X = "x:"
"""Prefix of the columns that hold what cells are drawn against."""
SUPPORTED, REFUTED, UNDECIDED = "supported", "refuted", "undecided"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One setting of an ablation.

    Attributes:
        settings: dotted settings that differ from the base; a list is written 'a,b'.
        x: what the cell is drawn and regressed against: words -> number.
        why: what it is there for, for people.
    """

    settings: Mapping[str, Any]
    x: Mapping[str, float] = field(default_factory=dict)
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A part of a hypothesis, in one number a seed.

    Attributes:
        words: the claim as a sentence.
        unit: what the number counts.
        statistic: rows of one seed -> the number: positive where the claim holds, NaN where it can't be told.
    """

    words: str
    unit: str
    statistic: Callable[[Rows], float]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number over n seeds: mean, 95 % Student interval, two-sided p-value that it is not 0; NaN where unknown."""

    mean: float
    low: float
    high: float
    p_value: float
    n: int

    def __str__(self) -> str:
        interval = "" if np.isnan(self.low) else f" [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.mean:+.2f}{interval}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim, its number for each seed, and what they come to.  ``holds``: None where the interval contains 0."""

    claim: Claim
    values: Mapping[int, float]
    estimate: Estimate
    holds: bool | None


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """Cells x seeds, and the hypothesis that they test.

    Attributes:
        name: of the script and of the MLflow experiment.
        question: what is asked, for people.
        hypothesis: a sentence that can turn out false.
        claims: what it says in numbers; all must hold.
        base: settings that all cells share.
        cells: name -> cell.
        measures: key of the scoreboard -> words; the first is the primary measure, on which alone claims should rest.
        varied: settings that a seed raises by one each; cells at one seed agree in all of them.
        notes: said beside the result: what was left out, what the reader must know.
    """

    name: str
    question: str
    hypothesis: str
    claims: tuple[Claim, ...]
    base: Experiment
    cells: Mapping[str, Cell]
    measures: Mapping[str, str]
    varied: tuple[str, ...] = ("run.seed", "data.seed", "assay.seed")
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.cells) < 2 or not self.claims or not self.measures:
            raise UserError(f"ablation {self.name!r} needs two cells or more, a claim and a measure")
        if "run.seed" not in self.varied:
            raise UserError(f"ablation {self.name!r}: seeds must change the training, so 'run.seed' must vary")
        for name in self.measures:
            if name not in METRICS:
                raise UserError(f"ablation {self.name!r} measures {name!r}, which is no column of the scoreboard")
        seen: dict[str, str] = {}
        for name, cell in self.cells.items():
            if set(cell.settings) & set(self.varied):
                raise UserError(f"cell {name!r} sets {sorted(set(cell.settings) & set(self.varied))}, which seeds vary")
            if cell.x.keys() != next(iter(self.cells.values())).x.keys():
                raise UserError(f"cell {name!r} is drawn against {list(cell.x)}, other cells against something else")
            for setting, value in cell.settings.items():
                if not isinstance(value, str | int | float | None):
                    raise UserError(
                        f"cell {name!r}: {setting} must be a number or a word (a list is written 'a,b'), got {value!r}"
                    )
            twin = seen.setdefault(digest(self.base.with_settings(cell.settings)), name)
            if twin != name:
                raise UserError(f"cells {twin!r} and {name!r} are the same experiment")

    @property
    def primary(self) -> str:
        """Key of the measure on which the hypothesis rests."""
        return next(iter(self.measures))

    @property
    def xs(self) -> tuple[str, ...]:
        """What cells are drawn against."""
        return tuple(next(iter(self.cells.values())).x)

    @property
    def digest(self) -> str:
        """Names the ablation: base, cells, data and code, but not the number of seeds, which can be raised later."""
        cells = {name: dict(cell.settings) for name, cell in self.cells.items()}
        code = stage_digests(self.base)["pictures"]
        return digest([self.name, digest(self.base), cells, list(self.varied), code])

    @property
    def settings(self) -> tuple[str, ...]:
        """Every setting that a cell or a seed decides."""
        return (*dict.fromkeys(s for cell in self.cells.values() for s in cell.settings), *self.varied)

    def seeds(self, count: int) -> tuple[int, ...]:
        """``run.seed`` of each seed: the base's and those after it.

        Raises:
            UserError: not a positive number.
        """
        if count < 1:
            raise UserError(f"--seeds must be at least 1, got {count}")
        return tuple(range(self.base.run.seed, self.base.run.seed + count))

    def points(self, count: int) -> dict[tuple[str, int], dict[str, Any]]:
        """(cell, seed) -> value of each of ``settings``, seed by seed, so that a stopped ablation has whole seeds."""
        base = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in flat(self.base).items()}
        found = {}
        for step, seed in enumerate(self.seeds(count)):
            moved = {name: int(base[name]) + step for name in self.varied}
            for name, cell in self.cells.items():
                found[name, seed] = {**{s: base[s] for s in self.settings}, **cell.settings, **moved}
        return found

    def table(self, rows: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
        """Finished rows of trials as the ablation's table: ``cell``, ``seed``, ``x:...`` and all that a row holds."""
        finished = [r for r in rows if r.get("status") == "finished"]
        table = []
        for (name, seed), point in self.points(count).items():
            found = next((r for r in finished if all(r.get(s) == v for s, v in point.items())), None)
            if found is not None:
                x = {X + k: v for k, v in self.cells[name].x.items()}
                table.append({"cell": name, "seed": seed, **x, **found})
        return table


# ----------------------------------------------------------------------------------------------------------------------
# Statistics of one seed


def contrast(measure: str, cell: str, other: str) -> Callable[[Rows], float]:
    """How much larger a measure is in one cell than in another."""
    return lambda rows: number(rows[cell], measure) - number(rows[other], measure)


def slopes(rows: Rows, measure: str, xs: Sequence[str]) -> dict[str, float]:
    """What one more of each x adds to a measure while the other x stay: least squares over the cells of one seed.

    Args:
        rows: of one seed.
        measure: key of the scoreboard.
        xs: what to regress on, as cells name it.

    Returns:
        Slope of each x; NaN where a cell has no value, or the cells can't tell the x apart.
    """
    y = np.array([number(r, measure) for r in rows.values()])
    design = np.array([[1.0, *(r[X + x] for x in xs)] for r in rows.values()])
    if np.isnan(y).any() or np.linalg.matrix_rank(design) < design.shape[1]:
        return dict.fromkeys(xs, float("nan"))
    return dict(zip(xs, np.linalg.lstsq(design, y)[0][1:].tolist(), strict=True))


def number(row: Mapping[str, Any], name: str) -> float:
    """A row's value as a float; NaN where it has none."""
    value = row.get(name)
    return float(value) if isinstance(value, int | float) else float("nan")


def correlation(cells: Mapping[str, Cell], a: str, b: str) -> float:
    """Correlation of two x over the cells: what can't be told apart has 1 or -1; NaN where one does not vary."""
    x, y = (np.array([cell.x[name] for cell in cells.values()], float) for name in (a, b))
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else float("nan")


# ----------------------------------------------------------------------------------------------------------------------
# Over seeds


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean over seeds, Student's interval and p-value; NaN are left out, and one seed has no interval.

    Seeds that all give the same number leave Student's test nothing to divide by.  Then the signs decide: all n alike
    has probability 2^(1-n) by chance, and where that is small enough the interval is the number itself.
    """
    there = np.array([v for v in values if not np.isnan(v)], float)
    n = len(there)
    nothing = float("nan")
    if n < 2:
        return Estimate(mean=float(there[0]) if n else nothing, low=nothing, high=nothing, p_value=nothing, n=n)
    mean, error = float(there.mean()), float(there.std(ddof=1)) / n**0.5
    if error <= 1e-12 * max(1.0, abs(mean)):
        p = 1.0 if mean == 0 else 2.0 ** (1 - n)
        bound = mean if mean == 0 or p <= 1 - confidence else nothing
        return Estimate(mean=mean, low=bound, high=bound, p_value=p, n=n)
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * error
    return Estimate(mean=mean, low=mean - half, high=mean + half, p_value=float(mean_test(there)), n=n)


def by_seed(table: Sequence[Mapping[str, Any]], cells: Mapping[str, Cell]) -> dict[int, dict[str, Mapping[str, Any]]]:
    """Rows of each seed of which every cell has finished; only those can be compared."""
    found: dict[int, dict[str, Mapping[str, Any]]] = {}
    for row in table:
        found.setdefault(row["seed"], {})[row["cell"]] = row
    return {seed: {c: rows[c] for c in cells} for seed, rows in found.items() if rows.keys() == cells.keys()}


def findings(ablation: Ablation, table: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What the rows say to each claim."""
    found = []
    for claim in ablation.claims:
        values = {seed: float(claim.statistic(rows)) for seed, rows in by_seed(table, ablation.cells).items()}
        e = estimate(list(values.values()))
        holds = True if e.low > 0 else False if e.high < 0 else None  # comparisons with NaN are false
        found.append(Finding(claim=claim, values=values, estimate=e, holds=holds))
    return found


def verdict(found: Sequence[Finding]) -> str:
    """'supported', 'refuted' or 'undecided'."""
    if any(f.holds is False for f in found):
        return REFUTED
    return SUPPORTED if all(f.holds for f in found) else UNDECIDED


def rule(ablation: Ablation) -> str:
    """How the verdict is reached, told before anything is run."""
    claims = "; and that ".join(f"{c.words} ({c.unit} > 0)" for c in ablation.claims)
    return (
        f"Claimed is that {claims}. Each is one number a seed, from cells at that seed. Supported: the 95 % Student "
        f"interval over seeds lies above 0{' for every claim' if len(ablation.claims) > 1 else ''}; refuted: "
        f"{'one' if len(ablation.claims) > 1 else 'it'} lies below 0; undecided otherwise, and always from one seed."
    )


def explained(found: Sequence[Finding]) -> list[str]:
    """A sentence for each claim: the claim, the number and interval that it rests on, and whether it holds."""
    answers = {True: "Holds", False: "Does not hold", None: "Can't be told"}
    lines = []
    for f in found:
        e = f.estimate
        p = "" if np.isnan(e.p_value) else f", p = {e.p_value:.2g}"
        seeds = f"{e.n} seed{'s' if e.n != 1 else ''}"
        measured = f"{e} {f.claim.unit} over {seeds}{p}" if e.n else "no seed has all cells"
        answer = answers[f.holds] + (" from one seed" if e.n == 1 else "")
        lines.append(f"{answer}: {f.claim.words} ({measured}).")
    return lines


def summary(ablation: Ablation, table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a cell: settings, ``x:...``, ``seeds`` (n), and of each measure the mean over seeds with its interval.

    From a single seed there is no interval: ``_low`` and ``_high`` are NaN then.
    """
    several = {r["cell"]: r for r in over_seeds(table, ["cell"])}
    rows = []
    for name, cell in ablation.cells.items():
        mine = [r for r in table if r["cell"] == name]
        row = {"cell": name, **cell.settings, **{X + k: v for k, v in cell.x.items()}, "seeds": len(mine)}
        for key in METRICS:
            values = [number(r, key) for r in mine]
            known = several.get(name, {})
            if key in known:
                row |= {key: known[key], f"{key}_low": known[f"{key}_low"], f"{key}_high": known[f"{key}_high"]}
            elif any(not np.isnan(v) for v in values) or key in ablation.measures:
                e = estimate(values)
                row |= {key: e.mean, f"{key}_low": e.low, f"{key}_high": e.high}
        rows.append(row)
    return rows


def separate_effects(ablation: Ablation, table: Sequence[Mapping[str, Any]], measure: str) -> dict[str, Estimate]:
    """What one more of each x adds to a measure at equal other x, over seeds."""
    found = [slopes(rows, measure, ablation.xs) for rows in by_seed(table, ablation.cells).values()]
    return {x: estimate([s[x] for s in found]) for x in ablation.xs}
