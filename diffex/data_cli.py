"""``diffex data ingest | inspect | features | simulate``: from a screen on the disk to a store, and what is in it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffex.config import load
from diffex.errors import UserError
from diffex.progress import Bars
from diffex.screen import Screen
from diffex.settings import build, describe, parse_settings, read_yaml, replaced
from diffex.splits import PARTS, unit_name, unit_noun

if TYPE_CHECKING:
    from diffex.ingest import Summary

VERBS = {
    "ingest": (
        "read a screen (fields or single cells), find the cells, judge, scale and split them into a store",
        "diffex data ingest BBBC021/ --output bbbc021-store",
    ),
    "inspect": (
        "show what is in a store: contact sheets, counts, intensities, and what a statistician would warn of",
        "diffex data inspect bbbc021-store",
    ),
    "features": (
        "measure every cell of a store: a table in pycytominer's form",
        "diffex data features bbbc021-store --output features.parquet",
    ),
    "simulate": (
        "write a simulated screen whose every cell is known, as a microscope's folder of fields",
        "diffex data simulate --layout bbbc021 --output screen",
    ),
}


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands to ``diffex data``, which alone reads an experiment's images."""
    verbs = parser.add_subparsers(dest="data_verb", metavar="{" + ",".join(VERBS) + "}")
    made = {
        name: verbs.add_parser(
            name, help=help_, description=help_[0].upper() + help_[1:] + ".", epilog=f"Example: {example}"
        )
        for name, (help_, example) in VERBS.items()
    }
    ingest = made["ingest"]
    ingest.add_argument("source", type=Path, nargs="?", help="folder or file of the screen")
    ingest.add_argument("--output", type=Path, help="folder of the store to be made")
    ingest.add_argument("--settings", dest="settings_file", type=Path, help="YAML file of ingest settings")
    ingest.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="a.b=v", help="replace a setting; repeatable"
    )
    ingest.add_argument(
        "--skip-bad", action="store_true", help="quarantine images that can't be used, and go on; they are listed"
    )
    ingest.add_argument(
        "--dry-run", action="store_true", help="print the settings and what would be read; write nothing"
    )
    inspect = made["inspect"]
    inspect.add_argument("store", type=Path, help="folder of the store")
    inspect.add_argument("--output", type=Path, help="folder for the pages and tables (default: STORE-inspection)")
    features = made["features"]
    features.add_argument("store", type=Path, help="folder of the store")
    features.add_argument("--output", type=Path, required=True, help="table to be written: .parquet, .csv or .csv.gz")
    features.add_argument(
        "--nucleus-channel", help="channel that shows nuclei (default: the one called DNA, DAPI, ...)"
    )
    features.add_argument("--cell-channel", help="channel that shows whole cells (default: all others)")
    features.add_argument(
        "--full", action="store_true", help="all that CellProfiler measures; slower, needs pip install 'diffex[cells]'"
    )
    for verb in (ingest, features):
        verb.add_argument("--workers", type=int, help="tasks at a time (default: the CPUs of this machine or cluster)")
    simulate = made["simulate"]
    simulate.add_argument(
        "--layout", default="bbbc021", choices=("bbbc021", "files"), help="how the folder is laid out"
    )
    simulate.add_argument("--output", type=Path, required=True, help="folder to be made")
    simulate.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="a.b=v",
        help="assay.* and data.channels, as in an experiment; repeatable",
    )  # fmt: skip
    simulate.add_argument("--fields-per-well", type=int, default=4, help="fields of a well (default: 4)")
    simulate.add_argument("--cells-per-field", type=int, default=24, help="cells of a field (default: 24)")
    simulate.add_argument("--field-size", type=int, default=512, help="side of a field in pixels (default: 512)")


def run_data_verb(options: argparse.Namespace) -> int:
    """Run the sub-command that the options name."""
    return {"ingest": _ingest, "inspect": _inspect, "features": _features, "simulate": _simulate}[options.data_verb](
        options
    )


def screen_of(options: argparse.Namespace) -> Screen:
    """The ingest settings that the options describe."""
    screen = Screen()
    if options.settings_file is not None:
        if not options.settings_file.is_file():
            raise UserError(f"there is no settings file {str(options.settings_file)!r} (--settings)")
        text = options.settings_file.read_bytes()
        screen = build(Screen, read_yaml(text, f"settings file {str(options.settings_file)!r}"))
    return replaced(screen, parse_settings(options.settings))


class Workers:
    """Runs tasks here, or on Ray where there are many of them; Ray is started when first needed.

    Args:
        asked: tasks at a time; None: the CPUs of this machine, or of the cluster that RAY_ADDRESS names.
    """

    FEW = 8  # tasks that are done sooner than a local Ray has started

    def __init__(self, asked: int | None) -> None:
        if asked is not None and asked < 1:
            raise UserError(f"--workers must be at least 1, got {asked}")
        self.asked = asked
        self._open = ExitStack()
        self._cpus: int | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def __call__(self, task: Callable[[Any, Any], Any], job: Any, items: Sequence[Any]) -> Iterator[Any]:
        from diffex.ingest import run_here

        few = len(items) <= self.FEW and self.asked is None and not os.environ.get("RAY_ADDRESS")
        if few or self.asked == 1 or len(items) <= 1:
            return run_here(task, job, items)
        from diffex.cluster import connected, run_tasks

        if self._cpus is None:
            self._cpus = self._open.enter_context(connected(self.asked)).cpus
        return run_tasks(task, job, items, workers=self.asked or self._cpus)


def _ingest(options: argparse.Namespace) -> int:
    from diffex.ingest import ingest
    from diffex.ingest_plan import preview

    screen = screen_of(options)
    if options.source is None and options.dry_run:
        print(describe(screen), end="")
        return 0
    if options.source is None:
        raise UserError("name the folder or file of the screen, e.g. diffex data ingest cells/ --output store")
    if options.dry_run:
        print(describe(screen), end="")
        for line in preview(options.source, screen):
            print(f"# {line}")
        return 0
    if options.output is None:
        raise UserError("--output is missing: name the folder of the store to be made")
    bars = Bars()
    try:
        with Workers(options.workers) as run:
            summary = ingest(options.source, screen, options.output, skip_bad=options.skip_bad, run=run, progress=bars)
    finally:
        bars.close()
    _tell(summary, options.output)
    return 0


def _tell(summary: Summary, output: Path) -> None:
    if not summary.fresh:
        print(f"{output} is there already, made from just this: nothing to do")
    for note in summary.notes:
        print(f"note: {note}")
    print(f"{summary.images:,} images of {summary.size} px ({', '.join(summary.channels)}) from {summary.read:,} read")
    width = max(map(len, summary.classes))
    print(f"{'class':<{width}}  {'train':>8} {'valid':>8} {'test':>8}   (split by {unit_name(summary.split_by)})")
    for name, counts in summary.classes.items():
        print(f"{name:<{width}}  " + " ".join(f"{n:8,}" for n in counts))
    for reason, count in sorted(summary.rejected.items(), key=lambda item: -item[1]):
        print(f"left out: {count:,} {reason}")
    if summary.bad:
        print(f"left out: {summary.bad:,} images that can't be used, listed in {output / 'quarantine.csv'}")
    print(f"next: diffex data inspect {output}")


def _simulate(options: argparse.Namespace) -> int:
    from diffex.assay import DEFAULT_CHANNELS
    from diffex.simulate import write_screen

    e = load("assay", parse_settings(options.settings))
    bars = Bars()
    try:
        facts = write_screen(
            e.assay, e.data.channels or DEFAULT_CHANNELS, options.output, layout=options.layout,
            field_size=(options.field_size, options.field_size), cells_per_field=options.cells_per_field,
            fields_per_well=options.fields_per_well, progress=lambda done, total: bars("fields", done, total),
        )  # fmt: skip
    finally:
        bars.close()
    told = ", ".join(f"{facts[n]:,} {n}" for n in ("plates", "wells", "fields", "cells"))
    images = options.output if options.layout == "bbbc021" else options.output / "images"
    print(f"{options.output}: {told}; what is true of them is in truth.parquet, truth_fields.parquet and truth/")
    print(f"next: diffex data ingest {images} --output {options.output}-store")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from diffex.data import ImageStore
    from diffex.inspection import inspect
    from diffex.report import write_inspection

    store = ImageStore(options.store)
    found = inspect(store)
    folder = options.output or options.store.with_name(options.store.name + "-inspection")
    page = write_inspection(folder, store, found)
    info, counts = store.info, found.counts
    print(f"{info.count:,} images of {info.size} px, {info.dtype}: {', '.join(info.channels)}; from {info.source}")
    width = max(map(len, info.class_names))
    print(f"{'class':<{width}}  " + "  ".join(f"{f'{part} ({unit_noun(info.split_by)})':>16}" for part in PARTS))
    for c, name in enumerate(info.class_names):
        cells = (f"{n:,} ({u:,})" for n, u in zip(counts.images[c], counts.units[c], strict=True))
        print(f"{name:<{width}}  " + "  ".join(f"{cell:>16}" for cell in cells))
    print(f"split by {unit_name(info.split_by).lower()}; {len(counts.plates)} plates")
    for finding in found.findings:
        print(f"{finding.severity:<8} {finding.text}")
    print(f"page: {page}")
    return 0


def _features(options: argparse.Namespace) -> int:
    from diffex.data import ImageStore
    from diffex.profiles import write_profiles

    bars = Bars()
    try:
        with Workers(options.workers) as run:
            cells, features = write_profiles(
                ImageStore(options.store), options.output, nucleus_channel=options.nucleus_channel,
                cell_channel=options.cell_channel, full=options.full, run=run, progress=bars,
            )  # fmt: skip
    finally:
        bars.close()
    print(f"{options.output}: {cells:,} cells, {features} features (load it with pycytominer or pandas)")
    return 0
