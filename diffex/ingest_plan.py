"""What an ingest will do: which images, in which part each, in which tasks, and what the survey of each plate looks at.

Decided from the list of images alone, before any pixel is read.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffex.errors import UserError
from diffex.layouts import open_screen
from diffex.screen import Screen
from diffex.sources import Listed
from diffex.splits import group_ids, split, split_columns, unit_name

SHARE = 256  # tasks that a screen is cut into, roughly
FIELDS = (4, 32)  # fewest and most fields of a task
IMAGES = (256, 4096)  # the same for single cells
SAMPLE = 64  # single-cell images that are looked at before all are read
CONTROLS = ("dmso", "control", "untreated", "negative control", "negcon")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done.

    Attributes:
        rows: rows of the source to be read, ascending.
        parts: part of every row of the source (index into ``PARTS``), (N,); -1 where it is not read.
        split_by: columns whose groups lie in one part each.
        tasks: rows of each task, none of which knows two plates.
        plates: names of the plates; one called "" where plates play no part.
        plate_of: number of the plate of every row of the source, (N,); -1 where no row of it is read.
        surveyed: for each plate, rows that its survey reads, and which of them are reference rows.
        notes: what the user should know.
    """

    rows: NDArray[np.int64]
    parts: NDArray[np.int64]
    split_by: tuple[str, ...]
    tasks: tuple[NDArray[np.int64], ...]
    plates: tuple[str, ...]
    plate_of: NDArray[np.int64]
    surveyed: tuple[tuple[NDArray[np.int64], NDArray[np.bool_]], ...]
    notes: list[str]


def scales_plates(source: Listed, screen: Screen) -> bool:
    """Whether every plate gets a window of its own."""
    return screen.intensity.scale == "plate" or (screen.intensity.scale == "auto" and source.content == "fields")


def make_plan(source: Listed, screen: Screen) -> Plan:
    """Choose, split and cut into tasks.

    Raises:
        UserError: a class, column or reference that is not there.
    """
    notes = list(source.notes)
    rows = _choose(source, screen, notes)
    by, groups = _units(source, rows, screen, notes)
    classes = np.unique(source.class_names[rows], return_inverse=True)[1].astype(np.int64)
    parts = np.full(len(source.class_names), -1, np.int64)
    parts[rows] = split(
        groups, classes, valid_fraction=screen.split.valid_fraction, test_fraction=screen.split.test_fraction,
        seed=screen.split.seed,
    )  # fmt: skip
    fields = source.content == "fields"
    by_plates = fields or scales_plates(source, screen)
    plate = [n for n in source.metadata if n.lower() == "metadata_plate" and by_plates]
    names = np.array([str(v) for v in source.metadata[plate[0]]]) if plate else np.full(len(parts), "")
    plates = np.unique(names[rows])
    plate_of = np.searchsorted(plates, names).clip(max=len(plates) - 1)
    plate_of[names != plates[plate_of]] = -1
    share = int(np.clip(len(rows) // SHARE, *(FIELDS if fields else IMAGES)))
    by_plate = [rows[plate_of[rows] == p] for p in range(len(plates))]
    surveyed: tuple[tuple[NDArray[np.int64], NDArray[np.bool_]], ...] = ()
    if by_plates:
        surveyed = _surveyed(source, screen, by_plate, plate_of, plates.tolist(), notes)
    return Plan(
        rows=rows, parts=parts, split_by=by, plates=tuple(plates.tolist()), plate_of=plate_of, surveyed=surveyed,
        tasks=tuple(mine[i : i + share] for mine in by_plate for i in range(0, len(mine), share)), notes=notes,
    )  # fmt: skip


def _choose(source: Listed, screen: Screen, notes: list[str]) -> NDArray[np.int64]:
    """Rows with a class that is wanted, ascending."""
    rows = np.flatnonzero(source.class_names != "")
    if not len(rows):
        raise UserError(f"{source.name}: no image has a class; choose another read.class_column")
    without = len(source.class_names) - len(rows)
    if without:
        why = "of no class in read.classes" if screen.read.classes else "without a class"
        notes.append(f"{without:,} of {len(source.class_names):,} images are left out: {why}")
    return rows


def _units(
    source: Listed, rows: NDArray[np.int64], screen: Screen, notes: list[str]
) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Columns whose groups stay in one part, and the group of each row; without any, every image is a group."""
    by = split_columns(screen.split.by, source.metadata, source.name, "split.by")
    if by:
        return by, group_ids({n: source.metadata[n][rows] for n in by})
    if source.content == "fields":
        by = ("Metadata_Field",)
    notes.append(
        f"no well, plate or donor is known: split by {unit_name(by).lower()}, so cells of one well may lie in two "
        "parts; name a column with split.by, or give read.pattern or read.table"
    )
    return by, np.arange(len(rows))


def _surveyed(
    source: Listed, screen: Screen, by_plate: list[NDArray[np.int64]], plate_of: NDArray[np.int64], plates: list[str],
    notes: list[str],
) -> tuple[tuple[NDArray[np.int64], NDArray[np.bool_]], ...]:  # fmt: skip
    """A sample of each plate: half of it reference rows, where there are as many."""
    reference = _reference(source, screen)
    surveyed, bare = [], []
    for p, mine in enumerate(by_plate):
        rng = np.random.default_rng([screen.split.seed, p])
        known = np.flatnonzero((plate_of == p) & reference)  # whether or not they have a class
        others = np.setdiff1d(mine, known)
        if not len(known):
            bare.append(plates[p] or "the screen")
            known, others = others, known
        count = screen.illumination.images
        chosen = rng.permutation(known)[: max(count // 2, count - len(others))]
        rest = rng.permutation(others)[: count - len(chosen)]
        both = np.sort(np.concatenate([chosen, rest]))
        surveyed.append((both, np.isin(both, chosen)))
    if bare and screen.intensity.reference is not None:
        raise UserError(
            f"intensity.reference = {screen.intensity.reference!r} finds no image on plate {bare[0]!r} "
            f"({len(bare)} of {len(plates)} plates): every plate needs reference wells, or set intensity.scale=none"
        )
    if bare and screen.intensity.scale != "none":
        notes.append(
            f"no control wells known on {len(bare)} of {len(plates)} plates ({', '.join(bare[:3])}): their intensity "
            "window rests on all wells; name the controls with intensity.reference"
        )
    return tuple(surveyed)


def _reference(source: Listed, screen: Screen) -> NDArray[np.bool_]:
    """Rows of the reference wells, (N,)."""
    query = screen.intensity.reference
    if query is None:
        compound = next((source.metadata[n] for n in source.metadata if n.lower() == "metadata_compound"), ())
        for column in (compound, source.class_names):
            found = np.array([str(v).lower() in CONTROLS for v in column], bool)
            if found.any():
                return found
        return np.zeros(len(source.class_names), bool)
    _check_query(query)
    import pandas as pd

    table = pd.DataFrame({n: v for n, v in source.metadata.items() if n.startswith("Metadata_")})
    try:
        rows = table.query(query, engine="python", local_dict={}, global_dict={}).index.to_numpy()
    except Exception as error:  # pandas passes on whatever its parser and the columns' types raise
        raise UserError(
            f"intensity.reference = {query!r} is no query on {', '.join(table.columns)}: {str(error).splitlines()[0]}; "
            "write e.g. \"Metadata_Compound == 'DMSO'\""
        ) from None
    if not len(rows):
        raise UserError(f"intensity.reference = {query!r} finds no image in {source.name}")
    return np.isin(np.arange(len(table)), rows)


WORDS = ("contains", "startswith", "endswith", "match", "fullmatch", "lower", "upper", "strip", "len")
TESTS = ("isin", "isna", "notna", "isnull", "notnull", "between")
PARTS_OF_QUERY = (
    ast.Expression, ast.BoolOp, ast.boolop, ast.UnaryOp, ast.unaryop, ast.Compare, ast.cmpop, ast.Name, ast.Load,
    ast.Constant, ast.List, ast.Tuple, ast.keyword, ast.BinOp, ast.BitAnd, ast.BitOr, ast.Add, ast.Sub, ast.Mult,
    ast.Div, ast.Mod,
)  # fmt: skip


def _check_query(query: str) -> None:
    """Refuse a query that does more than compare columns: pandas would run any method it names, and so any code.

    Raises:
        UserError: naming what is not allowed.
    """
    try:
        tree = ast.parse(re.sub(r"`[^`]*`", "_column", query.strip()), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        tree = None
    allowed: set[ast.AST] = set()
    odd: ast.AST | None = None
    for node in ast.walk(tree) if tree is not None else ():  # a parent comes before its parts
        if isinstance(node, ast.Call) and isinstance(at := node.func, ast.Attribute):
            owner = at.value
            if at.attr in TESTS and isinstance(owner, ast.Name):
                allowed |= {node, at}
            elif at.attr in WORDS and isinstance(owner, ast.Attribute) and owner.attr == "str":
                allowed |= {node, at, owner}
        if node not in allowed and not isinstance(node, PARTS_OF_QUERY):
            odd = odd or node
    if tree is None or odd is not None:
        what = ast.unparse(odd) if odd is not None and isinstance(odd, ast.expr) else query
        raise UserError(
            f"intensity.reference = {query!r} is no query: {what!r} is not a comparison of columns; write e.g. "
            "\"Metadata_Compound == 'DMSO'\""
        )


def preview(path: Path, screen: Screen) -> list[str]:
    """What an ingest would read, in lines for people; no pixel is opened."""
    source = open_screen(path, screen.read)
    plan = make_plan(source, screen)
    names, counts = np.unique(source.class_names[plan.rows], return_counts=True)
    shown = ", ".join(f"{n} ({c:,})" for n, c in zip(names[:12], counts[:12], strict=True))
    kind = "a field of cells" if source.content == "fields" else "one cell"
    return [
        f"{source.name}: {len(plan.rows):,} images, each {kind}; {len(plan.tasks)} tasks",
        f"channels: {', '.join(source.channels) if source.channels else 'as the images say'}",
        f"{len(names)} classes: {shown}{', ...' if len(names) > 12 else ''}",
        f"metadata: {', '.join(source.metadata)}",
        f"split by {unit_name(plan.split_by)}",
        *plan.notes,
    ]
