"""What may go from a store: entries that no kept result rests on, and what killed attempts left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffex.errors import UserError
from diffex.measures import OBJECTIVES, pareto_front
from diffex.records import Key
from diffex.store import DAMAGED, FINISHED, LEFTOVER, PARTIAL, Info, Store

DAY = 86400.0


@dataclass
class Collected:
    """What a collection took, or would take.

    Attributes:
        taken: what went, the first first.
        left: bytes that stay.
        kept: bytes of them that kept results and running computations rest on.
        recent: bytes of them that stay only because they were used a short time ago.
    """

    taken: list[Info] = field(default_factory=list)
    left: int = 0
    kept: int = 0
    recent: int = 0

    @property
    def freed(self) -> int:
        """Bytes that went."""
        return sum(info.bytes for info in self.taken)


def collect(
    store: Store, *, keep: Collection[Key] = frozenset(), older_than: float = 30 * DAY, max_bytes: float | None = None,
    recent: float = DAY, dry_run: bool = True, removed: Callable[[Info], None] | None = None,
) -> Collected:  # fmt: skip
    """Remove what nobody needs: what was not used for long, then, oldest-used first, what is over the size budget.

    Never removed is what is being computed, what that is made from, and what is kept.  A checkpoint of unfinished work
    stays until it is older than ``older_than``; a damaged entry, or progress of a finished one, goes at once.

    Args:
        store: the store.
        keep: addresses of entries that must stay, with all that they are made from; see ``protected``.
        older_than: seconds without use after which anything that is not kept goes.
        max_bytes: size budget of the store; None: none.
        recent: seconds; finished entries used within them stay, because a running trial may be reading them.
        dry_run: only tell.
        removed: told of each removal.
    """
    now, found, running = store.now(), sorted(store.entries(), key=lambda i: i.used), store.running()
    finished = {i.key: i for i in found if i.state == FINISHED}
    safe = set(running)
    queue = [*keep, *(need for needs in running.values() for need in needs)]
    while queue:
        key = queue.pop()
        if key not in safe:
            safe.add(key)
            queue.extend(finished[key].needs if key in finished else ())
    result = Collected(left=sum(i.bytes for i in found))
    for info in found:
        idle = now - info.used
        over = max_bytes is not None and result.left > max_bytes
        goes = {
            FINISHED: info.key not in safe and (idle >= older_than or over),
            DAMAGED: True,
            PARTIAL: info.key in finished or idle >= older_than,
            LEFTOVER: idle >= max(older_than, recent),
        }[info.state]
        if info.key in running or not goes:
            result.kept += info.bytes if info.key in safe else 0
        elif info.state == FINISHED and idle < recent:
            result.recent += info.bytes
        elif dry_run or store.remove(info):
            result.taken.append(info)
            result.left -= info.bytes
            if removed:
                removed(info)
    return result


def protected(outputs: Sequence[str | Path], best: int | None = None) -> set[Key]:
    """Addresses of the entries that the trials of output folders rest on.

    Args:
        outputs: folders that ``diffex run`` and ``diffex sweep`` wrote.
        best: None: every trial counts; otherwise, of each folder, that many of the highest scores, the Pareto front,
            the trial that finished last, and trials that have not finished.

    Raises:
        UserError: a folder that holds no trials, or one whose records can't be read: better than to protect nothing.
    """
    if best is not None and best < 0:
        raise UserError(f"--best must be 0 or more, got {best}")
    found: set[Key] = set()
    for output in map(Path, outputs):
        trials = {file.parent: _read(file) for file in sorted(output.glob("trials/*/stages.json"))}
        if not trials:
            raise UserError(f"{str(output)!r} holds no trials: name a folder that diffex run or diffex sweep wrote")
        for folder in trials if best is None else _chosen(list(trials), best):
            found |= {(Path(p).parent.name, Path(p).name) for p in trials[folder].values()}
    return found


def _chosen(trials: Sequence[Path], best: int) -> set[Path]:
    """The trials that count."""
    rows = {t: _read(t / "row.json") for t in trials if (t / "row.json").is_file()}
    rows = {t: row for t, row in rows.items() if row.get("status", "finished") == "finished"}
    chosen = set(trials) - rows.keys()
    if rows:
        ranked = sorted(rows, key=lambda t: -_number(rows[t].get("score"), -math.inf))
        values = [{o: _number(row.get(o), math.nan) for o in OBJECTIVES} for row in rows.values()]
        front = [t for t, good in zip(rows, pareto_front(values, OBJECTIVES), strict=True) if good]
        last = max(rows, key=lambda t: (t / "row.json").stat().st_mtime)
        chosen |= {*ranked[:best], *front, last}
    return chosen


def _number(value: Any, otherwise: float) -> float:
    """A finite number, or ``otherwise``."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else otherwise


def _read(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{str(file)!r} can't be read: run its command again, or move its folder away")
    return value


def verify(store: Store) -> Iterator[tuple[Info, str]]:
    """All entries of a store, and what is wrong with each, its files read; empty: nothing."""
    for info in store.entries():
        if info.state in (FINISHED, DAMAGED):
            yield info, store.check(info)
