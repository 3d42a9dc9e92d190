"""What an ablation leaves behind: two tables, a figure, a page; and the table on the terminal."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from diffex.ablation import (
    UNDECIDED,
    Ablation,
    X,
    by_seed,
    explained,
    findings,
    rule,
    separate_effects,
    summary,
    verdict,
)
from diffex.ablation_figures import cell_letters, cells_against
from diffex.measures import METRICS
from diffex.report import embed_image, page_template, save_figure
from diffex.settings import describe
from diffex.tables import from_rows
from diffex.version import __version__

ALWAYS = ("classifier.accuracy", "flip_rate", "ssim")
"""Shown beside an ablation's measures: what a reader asks of every cell before believing the rest."""


def write_ablation(
    ablation: Ablation, table: Sequence[Mapping[str, Any]], output: Path, *, command: str, failed: Sequence[str] = ()
) -> list[Path]:
    """Write table.parquet, summary.parquet, figure.png, figure.svg and ablation.html.

    Args:
        ablation: what was asked.
        table: its rows, see ``Ablation.table``.
        output: folder, with the trials' own folders under ``trials``.
        command: what was typed.
        failed: why trials failed.

    Returns:
        The files.
    """
    cells = summary(ablation, table)
    pq.write_table(from_rows(table), output / "table.parquet")
    pq.write_table(from_rows(cells), output / "summary.parquet")
    drawn = [r for r in cells if all(not np.isnan(r[m]) for m in ablation.measures)]
    figure = cells_against(
        drawn, [r for r in table if r["cell"] in {d["cell"] for d in drawn}], measures=ablation.measures,
        xs={X + x: x for x in ablation.xs}, notes=_slopes(ablation, table),
    )  # fmt: skip
    picture = save_figure(figure, output / "figure.png")
    figure.savefig(output / "figure.svg", facecolor="white")
    page = output / "ablation.html"
    page.write_text(_page(ablation, table, cells, output, picture, command, failed), encoding="utf-8")
    return [output / "table.parquet", output / "summary.parquet", picture, output / "figure.svg", page]


def _slopes(ablation: Ablation, table: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """What is written above the panels: what one more of the x adds."""
    notes = {}
    for measure in ablation.measures:
        for x, e in separate_effects(ablation, table, measure).items():
            if e.n:
                others = [o for o in ablation.xs if o != x]
                given = f" at equal {' and '.join(others)}" if others else ""
                notes[measure, X + x] = f"one more{given}: {e}"
    return notes


def _page(
    ablation: Ablation, table: Sequence[Mapping[str, Any]], cells: Sequence[Mapping[str, Any]], output: Path,
    picture: Path, command: str, failed: Sequence[str],
) -> str:  # fmt: skip
    found = findings(ablation, table)
    whole = by_seed(table, ablation.cells)
    notes = list(ablation.notes)
    unfinished = len({r["seed"] for r in table}) - len(whole)
    if unfinished:
        notes.append(f"Left out of the test, as not all of their cells have finished: {unfinished} seed(s).")
    notes += [f"A trial failed: {reason}" for reason in failed]
    seed = min(whole, default=min((r["seed"] for r in table), default=0))
    first = {r["cell"]: output / "trials" / str(r["trial"]) for r in table if r["seed"] == seed}
    shown = {cell: sorted(folder.glob("traversal-1*.png")) for cell, folder in first.items()}
    used = ("torch", "ray", "mlflow", "optuna", "numpy")
    return page_template("ablation").render(
        title=f"Ablation: {ablation.name.replace('_', ' ')}", version=__version__, ablation=ablation, findings=found,
        verdict=verdict(found), explained=explained(found), rule=rule(ablation), notes=notes,
        figure=embed_image(picture),
        summary=cells, columns=[m for m in dict.fromkeys([*ablation.measures, *ALWAYS]) if any(m in c for c in cells)],
        meanings=METRICS, letters=cell_letters(list(ablation.cells)), seeds=sorted(whole), seed=seed,
        pictures={cell: embed_image(files[0]) for cell, files in shown.items() if files}, command=command,
        versions=", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in used)]),
        experiment=describe(ablation.base),
    )  # fmt: skip


def parent_metrics(ablation: Ablation, table: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The ablation's own numbers for MLflow: each claim's estimate, and the primary measure of each cell."""
    numbers: dict[str, float] = {"trials.finished": float(len(table))}
    for i, f in enumerate(findings(ablation, table), start=1):
        e = f.estimate
        numbers |= {f"claim_{i}": e.mean, f"claim_{i}_low": e.low, f"claim_{i}_high": e.high,
                    f"claim_{i}.p_value": e.p_value, f"claim_{i}.seeds": float(e.n)}  # fmt: skip
    for row in summary(ablation, table):
        numbers[f"cell.{row['cell']}.{ablation.primary}"] = row[ablation.primary]
    return numbers


def print_ablation(ablation: Ablation, table: Sequence[Mapping[str, Any]]) -> None:
    """Cells with their measures, and the verdict."""
    keys = list(dict.fromkeys([*ablation.measures, *ALWAYS]))
    lines = [["cell", *ablation.xs, "seeds", *(k.split(".")[-1].replace("_", " ") for k in keys)]]
    for r in summary(ablation, table):
        values = [f"{r[X + x]:g}" for x in ablation.xs]
        lines.append([r["cell"], *values, str(r["seeds"]), *(_with_interval(r, k) for k in keys)])
    widths = [max(len(line[c]) for line in lines) for c in range(len(lines[0]))]
    print()
    for line in lines:
        print("  ".join(v.rjust(w) if c else v.ljust(w) for c, (v, w) in enumerate(zip(line, widths, strict=True))))
    found = findings(ablation, table)
    print(f"\nhypothesis: {ablation.hypothesis}\n{verdict(found).upper()}")
    for said in explained(found):
        print(f"  {said}")
    if verdict(found) == UNDECIDED:
        print("  More --seeds make the intervals narrower.")


def _with_interval(row: Mapping[str, Any], key: str) -> str:
    if key not in row or np.isnan(row[key]):
        return "-"
    interval = "" if np.isnan(row[f"{key}_low"]) else f" [{row[f'{key}_low']:.2f}, {row[f'{key}_high']:.2f}]"
    return f"{row[key]:.2f}{interval}"
