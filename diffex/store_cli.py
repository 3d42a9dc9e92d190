"""``diffex store ls | gc | verify``: what a store holds, what may go, and whether all is as it was written."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from diffex.errors import UserError
from diffex.store import FINISHED, Info, Store
from diffex.units import human_age, human_size, size, span

if TYPE_CHECKING:
    from diffex.garbage import Collected

DEFAULT = "diffex-output/store"

VERBS = {
    "ls": ("list what a store holds, with sizes", "diffex store ls --stage autoencoder"),
    "gc": (
        "remove what no kept result rests on; without --yes only tell",
        "diffex store gc --keep-output diffex-output/sweep --best 3 --max-size 20GB",
    ),
    "verify": ("read every entry and compare it with its digests", "diffex store verify --repair"),
}


def add_verbs(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands to ``diffex store``."""
    verbs = parser.add_subparsers(dest="store_verb", metavar="{" + ",".join(VERBS) + "}", required=True)
    for name, (help_, example) in VERBS.items():
        made = verbs.add_parser(
            name, help=help_, description=help_[0].upper() + help_[1:] + ".", epilog=f"Example: {example}"
        )
        made.add_argument(
            "--store",
            default=DEFAULT,
            help=f"folder or URI (s3://..., gs://..., file:///...) of it (default: {DEFAULT})",
        )
        if name == "ls":
            made.add_argument("--stage", help="only this stage")
            made.add_argument("--json", action="store_true", help="one JSON list instead of a table")
        elif name == "gc":
            made.add_argument(
                "--keep-output", type=Path, action="append", default=[], metavar="DIR",
                help="keep what the trials of this output folder rest on; repeatable",
            )  # fmt: skip
            made.add_argument(
                "--best", type=int, metavar="N",
                help="of each kept folder only the N best trials, its Pareto front and the last one (default: all)",
            )  # fmt: skip
            made.add_argument(
                "--older-than", type=span, default=span("30d"), metavar="TIME",
                help="remove what was not used for so long, e.g. 12h, 30d (default: 30d)",
            )  # fmt: skip
            made.add_argument(
                "--max-size", type=size, metavar="SIZE",
                help="then remove, longest unused first, until no more is left, e.g. 20GB (default: no limit)",
            )  # fmt: skip
            made.add_argument(
                "--recent", type=span, default=span("1d"), metavar="TIME",
                help="but leave entries used within this time: a running trial may be reading them (default: 1d)",
            )  # fmt: skip
            made.add_argument("--yes", action="store_true", help="do it; without this it is only told")
        else:
            made.add_argument(
                "--repair", action="store_true", help="remove damaged entries, so that they are made again"
            )


def run_store_verb(options: argparse.Namespace) -> int:
    """Run the sub-command that the options name; returns the exit status."""
    store = Store.existing(options.store)
    if store is None:
        raise UserError(f"there is no store {options.store!r}: name its folder or URI (--store)")
    return {"ls": _ls, "gc": _gc, "verify": _verify}[options.store_verb](store, options)


def table(infos: Sequence[Info], now: float) -> str:
    """One line an entry, aligned."""
    rows = [("STAGE", "DIGEST", "SIZE", "MADE", "USED", "STATE")]
    rows += [
        (i.stage, i.digest, human_size(i.bytes), time.strftime("%Y-%m-%d %H:%M", time.localtime(i.made)),
         human_age(now - i.used) + " ago", i.state)
        for i in infos
    ]  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(5)]
    right = (False, False, True, False, True)
    cells = (
        [*(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row[:5], widths, right, strict=True)), row[5]]
        for row in rows
    )
    return "\n".join("  ".join(row).rstrip() for row in cells)


def _ls(store: Store, options: argparse.Namespace) -> int:
    found = [i for i in store.entries() if options.stage in (None, i.stage)]
    if options.json:
        print(json.dumps([asdict(i) for i in found], indent=1))
        return 0
    if found:
        print(table(found, store.now()))
    states = Counter(i.state for i in found)
    told = ", ".join(f"{number:,} {state}" for state, number in states.items()) or "nothing"
    print(f"{store.shown}: {told}, {human_size(sum(i.bytes for i in found))}")
    return 0


def _gc(store: Store, options: argparse.Namespace) -> int:
    from diffex.garbage import collect, protected

    if options.best is not None and not options.keep_output:
        raise UserError("--best chooses among the trials of an output folder: name one with --keep-output")
    keep = protected(options.keep_output, options.best)
    result = collect(
        store, keep=keep, older_than=options.older_than, max_bytes=options.max_size, recent=options.recent,
        dry_run=not options.yes,
    )  # fmt: skip
    if result.taken:
        print(table(result.taken, store.now()))
    print(_summary(result, options.yes))
    if options.max_size is not None and result.left > options.max_size:
        print(
            f"that is more than {human_size(options.max_size)}: {human_size(result.kept)} are kept for results and "
            f"running computations, {human_size(result.recent)} were used in the last {human_age(options.recent)} "
            "(--recent)"
        )
    if result.taken and not options.yes:
        print("nothing was removed: give --yes to do it")
    return 0


def _summary(result: Collected, done: bool) -> str:
    number = len(result.taken)
    things = f"{number:,} {'thing' if number == 1 else 'things'}"
    return (
        f"{'removed' if done else 'would remove'} {things}, {human_size(result.freed)}; "
        f"{human_size(result.left)} {'stay' if done else 'would stay'}"
    )


def _verify(store: Store, options: argparse.Namespace) -> int:
    from diffex.garbage import verify

    good = bad = mended = 0
    for info, problem in verify(store):
        if not problem:
            good += 1
            continue
        bad += 1
        removed = options.repair and store.remove(info)
        mended += removed
        busy = "" if removed or not options.repair else " (not removed: it is being computed now)"
        print(f"{info.stage}/{info.digest}: {problem}{'; removed' if removed else busy}")
    print(
        f"{store.shown}: {good:,} {FINISHED} and whole, {bad:,} damaged" + (f", {mended:,} removed" if mended else "")
    )
    if bad > mended and not options.repair:
        print("damaged entries are never used; --repair removes them, so that they are made again")
    return 0 if bad == mended else 1
