"""The picture of an ablation: each measure against each x, cells as letters, seeds as dots."""

from __future__ import annotations

import string
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

INK, SOFT = "#1d2733", "#8795a5"
LETTERS = (*string.ascii_uppercase, *string.ascii_lowercase)


def cell_letters(cells: Sequence[str]) -> dict[str, str]:
    """A letter for each cell: what stands for it in the picture and in tables."""
    return {cell: LETTERS[i] if i < len(LETTERS) else str(i + 1) for i, cell in enumerate(cells)}


def cells_against(
    summary: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]], *, measures: Mapping[str, str],
    xs: Mapping[str, str], notes: Mapping[tuple[str, str], str],
) -> Figure:  # fmt: skip
    """Means over seeds with intervals; a row of panels for each measure, a column for each x.

    Where there are two x, colour tells the one that the panel does not show, and lines join cells that agree in it: a
    level line says that what the panel shows makes no difference by itself.

    Args:
        summary: one row a cell: ``cell``, x, each measure with ``_low`` and ``_high`` (NaN: no interval).
        table: one row a cell and seed.
        measures: key -> words.
        xs: key -> words; may be empty, then cells stand beside each other.
        notes: (measure, x) -> what is written above the panel.
    """
    keys = list(xs) or [""]
    cells = [r["cell"] for r in summary]
    letters = cell_letters(cells)
    legend_rows = -(-len(cells) // 3)
    below = 0.25 * legend_rows + 0.15  # inches for the names of the cells
    width, panel = max(4.6 * len(keys), 6.4), 2.9
    height = panel * len(measures) + below + 0.6
    engine = ConstrainedLayoutEngine(rect=(0, below / height, 1, 1 - below / height))
    figure = Figure(figsize=(width, height), layout=engine)
    grid = figure.subplots(len(measures), len(keys), squeeze=False, sharey="row")
    for j, x in enumerate(keys):
        other = next((k for k in keys if k != x), "") if len(keys) == 2 else ""
        colours = _colours([r.get(other, 0) for r in summary])
        places = _places(summary, x, other)
        for i, (measure, words) in enumerate(measures.items()):
            axes = grid[i, j]
            _panel(axes, summary, table, measure, other, letters, places, colours)
            axes.set_title(notes.get((measure, x), ""), fontsize=9, color=INK)
            if x:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_xlabel(xs[x], fontsize=9, color=INK)
            else:
                axes.set_xticks([])
            if j == 0:
                axes.set_ylabel(textwrap.fill(words, 36), fontsize=9, color=INK)
            if other and i == 0:
                handles = [Line2D([], [], marker="o", ls="-", color=c, label=f"{v:g}") for v, c in colours.items()]
                axes.legend(handles=handles, title=xs[other], fontsize=8, title_fontsize=8, frameon=False, ncols=2)
    for n, cell in enumerate(cells):
        column, row = divmod(n, legend_rows)
        figure.text(
            0.03 + column * 0.32, (0.25 * (legend_rows - row) - 0.05) / height, f"{letters[cell]}  {cell}", fontsize=9,
            color=INK, va="center",
        )  # fmt: skip
    return figure


def _colours(values: Sequence[float]) -> dict[float, Any]:
    """A colour for each value, dark to light; one colour where they are all alike."""
    levels = sorted(set(values))
    return dict(zip(levels, matplotlib.colormaps["viridis"](np.linspace(0.05, 0.82, len(levels))), strict=True))


def _places(summary: Sequence[Mapping[str, Any]], x: str, other: str) -> dict[str, float]:
    """Where each cell stands: at its x, beside others of equal x, in the order of the other x."""
    if not x:
        return {r["cell"]: float(i) for i, r in enumerate(summary)}
    places = {}
    values = sorted({r[x] for r in summary})
    room = 0.8 * min(np.diff(values), default=1.0)
    most = max(sum(r[x] == v for r in summary) for v in values)
    for value in values:
        here = sorted((r for r in summary if r[x] == value), key=lambda r: r.get(other, 0))
        for i, r in enumerate(here):
            places[r["cell"]] = value + (i - (len(here) - 1) / 2) * room / max(most, 3)
    return places


def _panel(
    axes: Axes, summary: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]], measure: str, other: str,
    letters: Mapping[str, str], places: Mapping[str, float], colours: Mapping[float, Any],
) -> None:  # fmt: skip
    if other:
        for level, colour in colours.items():
            line = sorted((places[r["cell"]], r[measure]) for r in summary if r[other] == level)
            axes.plot(*zip(*line, strict=True), color=colour, lw=1.3, alpha=0.55, zorder=1)
    beside = 0.025 * max(1.0, float(np.ptp(list(places.values()))))  # dots beside the bar, not under it
    for r in summary:
        colour = colours[r.get(other, 0)]
        seeds = [float(t[measure]) for t in table if t["cell"] == r["cell"] and t.get(measure) is not None]
        axes.scatter([places[r["cell"]] + beside] * len(seeds), seeds, s=11, color=SOFT, zorder=2, linewidths=0)
        if not np.isnan(r[f"{measure}_low"]):
            bounds = [[r[measure] - r[f"{measure}_low"]], [r[f"{measure}_high"] - r[measure]]]
            axes.errorbar(
                [places[r["cell"]]], [r[measure]], yerr=bounds, color=colour, capsize=3, lw=1.4, zorder=3, alpha=0.8
            )
        axes.scatter([places[r["cell"]]], [r[measure]], s=150, color=[colour], zorder=4, edgecolors="white")
        axes.text(
            places[r["cell"]], r[measure], letters[r["cell"]], color="white", fontsize=8, weight="bold", ha="center",
            va="center_baseline", zorder=5, clip_on=True,
        )  # fmt: skip
    axes.grid(axis="y", alpha=0.25)
    axes.margins(x=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
