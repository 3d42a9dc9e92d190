"""Pictures: every function takes arrays and returns a matplotlib figure.  The only file that imports matplotlib.

Images are uint8 (C, H, W); channels are shown in colours that their names suggest, with a legend, and every tile is
large enough to see a cell.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

Image = NDArray[np.uint8]

COLOURS: dict[str, tuple[float, float, float]] = {
    "dna": (0.25, 0.45, 1.0), "tubulin": (0.1, 0.9, 0.2), "actin": (1.0, 0.25, 0.1), "golgi": (1.0, 0.85, 0.1),
    "mitochondria": (0.95, 0.2, 0.85), "er": (0.1, 0.85, 0.85), "rna": (1.0, 0.6, 0.2), "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0), "grey": (1.0, 1.0, 1.0),
}  # fmt: skip
SPARE = ((0.25, 0.45, 1.0), (0.1, 0.9, 0.2), (1.0, 0.25, 0.1), (1.0, 0.85, 0.1), (0.95, 0.2, 0.85))
TILE = 0.95  # inches a tile: 95 pixels at 100 dots per inch
INK, SOFT, MARK, GOOD = "#1d2733", "#8795a5", "#c0392b", "#1f77b4"


def channel_colours(channels: Sequence[str]) -> list[tuple[float, float, float]]:
    """A colour (red, green, blue in 0..1) for each channel: by name where it is known, else in turn."""
    if len(channels) == 1:
        return [(1.0, 1.0, 1.0)]
    return [COLOURS.get(name.lower(), SPARE[i % len(SPARE)]) for i, name in enumerate(channels)]


Window = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Darkest and brightest intensity of each channel, (C,) and (C,), in 0..255."""


def compose(image: Image, channels: Sequence[str], window: Window) -> NDArray[np.float64]:
    """One colour picture (H, W, 3) in 0..1 from channels (C, H, W): each stretched, in its colour, added up."""
    low, high = (bound[:, None, None] for bound in window)
    stretched = np.clip((image - low) / (high - low), 0, 1)
    return np.clip(np.einsum("chw,ck->hwk", stretched, np.array(channel_colours(channels))), 0, 1)


def brightness(images: NDArray[np.uint8], channels: Sequence[str]) -> Window:
    """One window for a whole figure, so that its tiles stay comparable: quantiles 0.5 and 99.7 % of each channel.

    Photographs (red, green, blue) are shown as they are.
    """
    if {c.lower() for c in channels} <= {"red", "green", "blue"}:
        return np.zeros(len(channels)), np.full(len(channels), 255.0)
    pixels = np.moveaxis(images.reshape(-1, *images.shape[-3:]), 1, 0).reshape(len(channels), -1)
    low, high = np.percentile(pixels, (0.5, 99.7), axis=1)
    return low, np.maximum(high, low + 25)


def _tiles(figure: Figure, rows: int, columns: int, left: float, top: float, gap: float = 0.0) -> list[list[Axes]]:
    width, height = figure.get_size_inches()
    wide, high = 0.96 * TILE / width, 0.96 * TILE / height
    across = [(left + c * TILE) / width for c in range(columns)]
    down = [1 - (top + (r + 1) * (TILE + gap) - gap) / height for r in range(rows)]
    return [[figure.add_axes((x, y, wide, high)) for x in across] for y in down]


def _show(axes: Axes, picture: NDArray[np.floating]) -> None:
    axes.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _legend(figure: Figure, channels: Sequence[str], x: float, y: float) -> None:
    """Channel names in their colours, on a dark strip."""
    width, height = figure.get_size_inches()
    for i, (name, colour) in enumerate(zip(channels, channel_colours(channels), strict=True)):
        figure.text(
            (x + 1.15 * i) / width, 1 - y / height, f" {name} ", fontsize=9, va="center",
            color=[0.3 + 0.7 * part for part in colour],  # pure blue can't be read on black
            bbox={"facecolor": "#101418", "edgecolor": "none", "pad": 2},
        )  # fmt: skip


def image_grid(rows: Mapping[str, Sequence[Image] | Image], channels: Sequence[str], title: str = "") -> Figure:
    """Rows of images with a label each: reconstruction grids and contact sheets.

    Args:
        rows: label -> images (n, C, H, W).
        channels: names of the C channels.
    """
    columns = max(len(images) for images in rows.values())
    left, top = 1.9, 0.75
    figure = Figure(figsize=(left + columns * TILE + 0.1, top + len(rows) * TILE + 0.1))
    window = brightness(np.concatenate([np.asarray(v) for v in rows.values()]), channels)
    grid = _tiles(figure, len(rows), columns, left, top)
    width, height = figure.get_size_inches()
    for r, (label, images) in enumerate(rows.items()):
        figure.text(
            (left - 0.1) / width,
            1 - (top + (r + 0.5) * TILE) / height,
            label,
            ha="right",
            va="center",
            fontsize=9,
            color=INK,
        )
        for c, axes in enumerate(grid[r]):
            if c < len(images):
                _show(axes, compose(images[c], channels, window))
            else:
                axes.set_visible(False)
    figure.text(0.1 / width, 1 - 0.22 / height, title, fontsize=11, color=INK, va="center", weight="bold")
    _legend(figure, channels, left, 0.55)
    return figure


def traversal(
    images: NDArray[np.uint8], probs: NDArray[np.floating], alphas: Sequence[float], channels: Sequence[str], *,
    source: str, target: str, target_index: int, title: str,
) -> Figure:  # fmt: skip
    """Cells along a direction, the classifier's probability of the target under each image.

    Args:
        images: (n, A, C, H, W).
        probs: (n, A, n_classes).
        alphas: (A,) shift in standard deviations.
        target_index: column of the target in ``probs``.
    """
    n, steps = images.shape[:2]
    left, top, gap = 0.35, 1.25, 0.22
    figure = Figure(figsize=(left + steps * TILE + 0.1, top + n * (TILE + gap) + 0.05))
    window = brightness(images, channels)
    grid = _tiles(figure, n, steps, left, top, gap)
    width, height = figure.get_size_inches()
    said = probs.argmax(axis=-1) == target_index
    for r in range(n):
        for c, axes in enumerate(grid[r]):
            _show(axes, compose(images[r, c], channels, window))
            axes.set_xlabel(
                f"{100 * probs[r, c, target_index]:.0f} %", fontsize=8, labelpad=1.5, color=MARK if said[r, c] else INK,
                weight="bold" if said[r, c] else "normal",
            )  # fmt: skip
            if said[r, c]:
                for spine in axes.spines.values():
                    spine.set(visible=True, color=MARK, linewidth=2)
            if r == 0:
                axes.set_title(
                    "reconstruction" if alphas[c] == 0 else f"{alphas[c]:+.0f} sd", fontsize=8, color=INK, pad=3
                )
    room = int((width - 0.2) / 0.088)  # characters of the bold title that fit
    for line, text in enumerate(textwrap.wrap(title, room)[:2]):
        figure.text(
            0.1 / width, 1 - (0.2 + 0.2 * line) / height, text, fontsize=10, color=INK, va="center", weight="bold"
        )
    note = f"cells of {source}; under each the classifier's p({target}); red frame: classified as {target}"
    figure.text(0.1 / width, 1 - 0.92 / height, note, fontsize=8, color=SOFT, va="center")
    _legend(figure, channels, 0.1, 0.67)
    return figure


def ranking(rows: Sequence[Mapping[str, Any]], baseline: Mapping[str, float] | None = None) -> Figure:
    """Flip rate and effect of each ranked direction with intervals, the null beside them.

    Args:
        rows: rows of the ranking table of one pair of classes, best first.
        baseline: ``flip_rate`` and ``effect`` of the class-mean difference.
    """
    figure = Figure(figsize=(8.6, 1.4 + 0.33 * len(rows)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    y = np.arange(len(rows))
    labels = [f"{r['rank']}. direction {r['direction']}{'+' if r['sign'] > 0 else '−'}" for r in rows]
    for axes, value, low, high, null, name in (
        (left, "flip_rate", "flip_low", "flip_high", "null_flip_rate", "flip rate"),
        (right, "effect", "effect_low", "effect_high", "null_effect", f"change of p({rows[0]['target']})"),
    ):
        v, a, b = (np.array([r[k] for r in rows], float) for k in (value, low, high))
        axes.errorbar(v, y, xerr=np.abs([v - a, b - v]), fmt="o", color=GOOD, ecolor=SOFT, capsize=3, ms=6)
        axes.axvline(rows[0][null], color=SOFT, ls=":", label="random directions (mean)")
        if null == "null_flip_rate":
            axes.axvspan(rows[0][null], rows[0]["null_flip_max"], color=SOFT, alpha=0.15, label="to the best of them")
        if baseline:
            axes.axvline(baseline[value], color=MARK, ls="--", lw=1.2, label="class-mean difference")
        axes.set_xlabel(name)
        axes.grid(axis="x", alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    left.set_yticks(y, labels, fontsize=9)
    left.set_xlim(-0.03, 1.03)
    left.invert_yaxis()
    left.legend(fontsize=7.5, frameon=False, loc="best")
    return figure


def phenotypes(
    rows: Sequence[Mapping[str, Any]], words: Callable[[str], str], show: Callable[[str], bool], most: int = 9
) -> Figure:
    """What directions change in the cells beside what the treatment changes in real cells, feature by feature.

    Args:
        rows: rows of the phenotype table; the directions of its first pair are drawn.
        words: a feature's name in words.
        show: which features a reader understands; others are drawn only where there are none.
        most: features of a panel.
    """
    first = (rows[0]["source"], rows[0]["target"])
    mine = [r for r in rows if (r["source"], r["target"]) == first]
    ranks = sorted({r["rank"] for r in mine})[:4]
    panels = []
    for rank_ in ranks:
        of = [r for r in mine if r["rank"] == rank_]
        known = [r for r in of if show(r["feature"])] or of
        size = [max(abs(r["shift"]), 0.3 * abs(r["real"]) if r["real"] == r["real"] else 0.0) for r in known]
        panels.append([known[j] for j in np.argsort(size)[::-1][:most]][::-1])
    figure = Figure(figsize=(11.5, 0.6 + 0.33 * most * -(-len(panels) // 2) + 1.0), layout="constrained")
    grid = np.atleast_1d(figure.subplots(-(-len(panels) // 2), 2)).ravel()
    for axes, panel in zip(grid, panels, strict=False):
        y = np.arange(len(panel))
        shift, real = (np.array([r[k] for r in panel], float) for k in ("shift", "real"))
        low, high = (np.array([r[k] for r in panel], float) for k in ("shift_low", "shift_high"))
        axes.barh(y + 0.2, shift, 0.38, color=GOOD, label="this direction, edited cells")
        axes.errorbar(
            shift, y + 0.2, xerr=np.nan_to_num(np.abs([shift - low, high - shift])), fmt="none", ecolor=INK, lw=0.8
        )
        axes.barh(y - 0.2, np.nan_to_num(real), 0.38, color=SOFT, label=f"real {first[1]} cells against {first[0]}")
        axes.set_yticks(y, [textwrap.shorten(words(r["feature"]), 46, placeholder="…") for r in panel], fontsize=7.5)
        axes.axvline(0, color=INK, lw=0.8)
        axes.tick_params(labelsize=7.5)
        axes.set_title(
            f"{panel[0]['rank']}. direction {panel[0]['direction']}: {panel[0]['verdict']}", fontsize=9, color=INK
        )
        axes.set_xlabel("standard deviations of control cells", fontsize=8)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside upper center", ncols=2)
    return figure


def ways(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """How verdicts change on the way along each followed direction: the classifier's, and those of who else judges.

    Args:
        rows: of the trajectory table; the directions of its first pair are drawn.
    """
    first = (rows[0]["source"], rows[0]["target"])
    mine = [r for r in rows if (r["source"], r["target"]) == first]
    ranks = sorted({r["rank"] for r in mine})[:5]
    figure = Figure(figsize=(2.25 * len(ranks) + 0.9, 2.7), layout="constrained")
    grid = np.atleast_1d(figure.subplots(1, len(ranks), sharey=True))
    judges = {
        "p": ("the classifier", GOOD, "-"),
        "witness": ("the witness", MARK, "--"),
        "robust": ("robust counterpart", SOFT, ":"),
    }
    for axes, rank_ in zip(grid, ranks, strict=True):
        of = [r for r in mine if r["rank"] == rank_]
        steps = sorted({r["step"] for r in of})
        alpha = [np.mean([abs(r["alpha"]) for r in of if r["step"] == s]) for s in steps]
        for judge, (label, colour, line) in judges.items():
            p = [np.mean([r[f"{judge}:{first[1]}"] for r in of if r["step"] == s]) for s in steps]
            axes.plot(alpha, p, line, color=colour, marker="o", ms=3, lw=1.6, label=label)
        axes.set_title(
            f"{rank_}. direction {of[0]['direction']}{'+' if of[0]['sign'] > 0 else '−'}", fontsize=9, color=INK
        )
        axes.set_xlabel("length, sd of the code", fontsize=8)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=7.5)
    grid[0].set_ylabel(f"mean p({first[1]})", fontsize=8)
    grid[0].legend(fontsize=7, frameon=False)
    return figure


def pareto(rows: Sequence[Mapping[str, Any]], front: Sequence[bool]) -> Figure:
    """Trials by flip rate and disentanglement, SSIM as colour, the Pareto front ringed."""
    figure = Figure(figsize=(6.6, 4.6), layout="constrained")
    axes = figure.subplots()
    x, y, colour = (np.array([float(r[k]) for r in rows]) for k in ("flip_rate", "disentanglement", "ssim"))
    low = np.maximum(x - np.array([r.get("flip_rate_low", v) for r, v in zip(rows, x, strict=True)]), 0)
    high = np.maximum(np.array([r.get("flip_rate_high", v) for r, v in zip(rows, x, strict=True)]) - x, 0)
    axes.errorbar(x, y, xerr=[low, high], fmt="none", ecolor=SOFT, alpha=0.5, capsize=2, zorder=1)
    points = axes.scatter(x, y, c=colour, cmap="viridis", s=70, zorder=2)
    chosen = np.array(front, bool)
    axes.scatter(x[chosen], y[chosen], s=190, facecolors="none", edgecolors=MARK, linewidths=1.6, zorder=3)
    for r, a, b in zip(rows, x, y, strict=True):
        axes.annotate(str(r["trial"])[:4], (a, b), xytext=(7, 5), textcoords="offset points", fontsize=7.5, color=INK)
    axes.set(
        xlabel="flip rate of the first direction (95 % interval)", ylabel="disentanglement (1 − overlap of change maps)"
    )
    ring = Line2D([], [], marker="o", ls="", mfc="none", mec=MARK, ms=11)
    axes.legend([ring], ["Pareto front of flip rate, disentanglement, SSIM"], fontsize=8, frameon=False)
    axes.grid(alpha=0.25)
    figure.colorbar(points, label="SSIM of reconstructions")
    return figure


def curves(histories: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> Figure:
    """Training curves: stage -> trial -> history; one panel a loss."""
    panels = [
        (stage, loss)
        for stage, trials in histories.items()
        for loss in sorted({k for h in trials.values() for point in h for k in point if k != "images"})
    ]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.5 * rows), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes, (stage, loss) in zip(grid, panels, strict=False):
        for name, history in histories[stage].items():
            points = [(p["images"] / 1000, p[loss]) for p in history if loss in p]
            if points:
                axes.plot(*zip(*points, strict=True), lw=1.1, label=name)
        axes.set_title(f"{stage}: {loss}", fontsize=9)
        axes.set_xlabel("thousand images", fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.tick_params(labelsize=7, which="both")
        axes.grid(alpha=0.25)
        if loss in ("simple", "loss", "classifier"):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if len(histories) and max(len(t) for t in histories.values()) <= 8:
        grid[0].legend(fontsize=6.5, frameon=False)
    return figure


def settings_effect(rows: Sequence[Mapping[str, Any]], settings: Sequence[str], measures: Sequence[str]) -> Figure:
    """Each objective against each setting that the sweep varied."""
    figure = Figure(figsize=(2.7 * len(settings), 2.1 * len(measures)), layout="constrained")
    grid = np.asarray(figure.subplots(len(measures), len(settings), squeeze=False, sharey="row"))
    for j, setting in enumerate(settings):
        values = [r.get(setting) for r in rows]
        numeric = all(isinstance(v, int | float) for v in values)
        names = sorted({str(v) for v in values})
        x = np.array([float(v) if numeric else names.index(str(v)) for v in values])  # type: ignore[arg-type]
        for i, measure in enumerate(measures):
            axes = grid[i, j]
            axes.scatter(x, [float(r[measure]) for r in rows], s=26, color=GOOD, alpha=0.8)
            axes.grid(alpha=0.25)
            axes.tick_params(labelsize=7)
            if numeric and x.min() > 0 and x.max() / x.min() > 10:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter(NullFormatter())
            elif numeric and len(set(values)) <= 5:
                axes.set_xticks(sorted({float(v) for v in x}))
                axes.margins(x=0.2)
            if not numeric:
                axes.set_xticks(range(len(names)), [n.replace(",", "\n") for n in names], fontsize=6.5)
                axes.set_xlim(-0.5, len(names) - 0.5)
            if i == len(measures) - 1:
                axes.set_xlabel(setting, fontsize=8)
            if j == 0:
                axes.set_ylabel(measure, fontsize=8)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# What is in a store


CLASSES = ("#1f77b4", "#d95f02", "#2a9d57", "#7b5bb5", "#c0392b", "#0f8b8d", "#b5651d", "#d64f9c", "#6b8e23", "#8795a5")
"""Colours of classes, in their order; they repeat after ten."""


def plate_histograms(
    levels: NDArray[np.floating], histograms: Mapping[str, NDArray[np.floating]], channels: Sequence[str]
) -> Figure:
    """Intensities of each channel, a line for each plate: plates that were imaged alike lie on each other.

    Args:
        levels: (bins,) intensity, 0 black to 1 white.
        histograms: plate -> (C, bins) share of the pixels.
        channels: names of the C channels.
    """
    columns = min(4, len(channels))
    rows = -(-len(channels) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.6 * rows + 0.3), layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for c, (axes, name) in enumerate(zip(grid, channels, strict=False)):
        for i, (plate, shares) in enumerate(histograms.items()):
            colour = CLASSES[i % len(CLASSES)] if len(histograms) <= len(CLASSES) else INK
            alpha = 0.9 if len(histograms) <= len(CLASSES) else 0.25
            axes.plot(levels, 100 * np.maximum(shares[c], 1e-6), lw=1.2, color=colour, alpha=alpha, label=plate)
        axes.set_yscale("log")
        axes.set_ylim(1e-3, 120)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("intensity, black 0 to white 1", fontsize=8)
        axes.tick_params(labelsize=7, which="both")
        axes.grid(alpha=0.25)
    grid[0].set_ylabel("% of pixels", fontsize=8)
    for axes in grid[len(channels) :]:
        axes.set_visible(False)
    if 1 < len(histograms) <= len(CLASSES):
        grid[0].legend(fontsize=7, frameon=False, title="plate", title_fontsize=7)
    return figure


def class_by_plate(wells: NDArray[np.integer], classes: Sequence[str], plates: Sequence[str], unit: str) -> Figure:
    """Which class lies on which plate: the number of units in each cell of the table, empty where there is none.

    Args:
        wells: (classes, plates) units.
        unit: what they are called.
    """
    height, width = 0.34 * len(classes) + 1.3, max(5.6, 0.55 * len(plates) + 2.4)
    figure = Figure(figsize=(min(width, 24), min(height, 24)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.ma.masked_equal(wells, 0), cmap="Blues", aspect="auto", vmin=0, vmax=max(1, wells.max()) * 1.6)
    if wells.size <= 600:
        for (r, c), n in np.ndenumerate(wells):
            axes.text(c, r, str(n) if n else "·", ha="center", va="center", fontsize=8, color=INK if n else SOFT)
    axes.set_xticks(range(len(plates)), plates, rotation=60, ha="right", fontsize=7.5)
    axes.set_yticks(range(len(classes)), classes, fontsize=8)
    axes.set_xlabel("plate", fontsize=8)
    axes.set_title(f"{unit} of each class on each plate", fontsize=9, color=INK)
    return figure


def plate_maps(
    wells: Mapping[tuple[str, str], tuple[str, int]], classes: Sequence[str], most: int = 12
) -> Figure | None:
    """Each plate seen from above: the class of every well by colour, the number of its images in it.

    Args:
        wells: (plate, well such as 'C07') -> (class, images).
        classes: in the order of their colours.
        most: plates drawn, at most.

    Returns:
        The figure; None where no well has a name of letters and digits.
    """
    places = {key: place for key in wells if (place := _place(key[1])) is not None}
    plates = sorted({plate for plate, _ in places})[:most]
    if not plates:
        return None
    rows, columns = 1 + max(r for r, _ in places.values()), 1 + max(c for _, c in places.values())
    rows, columns = (
        (8, 12) if rows <= 8 and columns <= 12 else (16, 24) if rows <= 16 and columns <= 24 else (rows, columns)
    )
    across = min(3, len(plates))
    down = -(-len(plates) // across)
    figure = Figure(figsize=(4.6 * across, 4.2 * rows / columns * 1.15 * down + 0.9), layout="constrained")
    grid = np.atleast_1d(figure.subplots(down, across)).ravel()
    for axes, plate in zip(grid, plates, strict=False):
        for key, (r, c) in ((k, v) for k, v in places.items() if k[0] == plate):
            who, n = wells[key]
            axes.scatter(c, r, s=(170 if columns <= 12 else 48), color=CLASSES[classes.index(who) % len(CLASSES)])
            if columns <= 12:
                axes.text(c, r, str(n), ha="center", va="center", fontsize=5.5, color="white")
        axes.set(xlim=(-0.6, columns - 0.4), ylim=(rows - 0.4, -0.6), aspect="equal")
        shown_columns = range(0, columns, 1 if columns <= 12 else 2)
        axes.set_xticks(shown_columns, [str(c + 1) for c in shown_columns], fontsize=6)
        axes.set_yticks(range(rows), [_row_name(r) for r in range(rows)], fontsize=6)
        axes.tick_params(length=0)
        axes.set_title(plate, fontsize=8)
    for axes in grid[len(plates) :]:
        axes.set_visible(False)
    shown = list(classes)[: len(CLASSES) * 2]
    marks = [Line2D([], [], marker="o", ls="", color=CLASSES[i % len(CLASSES)], ms=6) for i in range(len(shown))]
    figure.legend(marks, shown, fontsize=7.5, frameon=False, loc="outside lower center", ncols=min(5, len(shown)))
    return figure


def _place(well: str) -> tuple[int, int] | None:
    """Row and column, from 0, of a well called 'C07', 'c7' or 'AB12'."""
    letters, digits = well.rstrip("0123456789").upper(), well[len(well.rstrip("0123456789")) :]
    if not digits or not 1 <= len(letters) <= 2 or not all("A" <= letter <= "Z" for letter in letters):
        return None
    row = ord(letters[-1]) - 65 + (26 * (ord(letters[0]) - 64) if len(letters) == 2 else 0)
    return (row, int(digits) - 1) if 1 <= int(digits) <= 48 else None


def _row_name(row: int) -> str:
    return chr(65 + row) if row < 26 else "A" + chr(65 + row - 26)
