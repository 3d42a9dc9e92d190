"""From a screen on the disk to an image store.

    source -> plan -> survey, plate by plate -> shards, task by task -> index and store.json -> one rename

All work lies in ``STORE.partial`` until the last step, so a store is whole or absent.  A run that was ended goes on
with the tasks that left no record.  Which images a task gets depends on the settings and the source alone, so any
number of workers writes the same bytes.  Tasks read one image at a time: memory grows with the list of images, never
with pixels.
"""

from __future__ import annotations

import fcntl
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffex.data import RECORD, Progress, StoreInfo, index_columns, pixel_window, write_index
from diffex.errors import ImageError, UserError
from diffex.fields import PlateSurvey
from diffex.ingest_plan import SAMPLE, make_plan, scales_plates
from diffex.ingest_tasks import LEAVE_OUT, Job, cut_task, put, survey_task, usable, writing
from diffex.layouts import open_screen
from diffex.plates import crop_side
from diffex.screen import Screen
from diffex.settings import digest, to_dict
from diffex.sources import Listed, default_channels
from diffex.splits import PARTS
from diffex.version import __version__

Run = Callable[[Callable[[Any, Any], Any], Any, Sequence[Any]], Iterator[Any]]
"""``run(task, job, items)`` yields ``task(job, item)`` for every item, in any order, perhaps on other machines."""

FEW = 5  # fields that tell what the others are like
LARGE = 200  # pixels, of the side of an image that may well be a field of many cells
KEPT = ("ingest.json", RECORD, "index.arrow", "rejected.parquet", "quarantine.csv")


def run_here(task: Callable[[Any, Any], Any], job: Any, items: Sequence[Any]) -> Iterator[Any]:
    """Run the tasks one after the other in this process."""
    return (task(job, item) for item in items)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What came of an ingest; kept in the store's ``ingest.json``.

    Attributes:
        read: images of the source that were read.
        images: images in the store.
        classes: class -> images in the training, validation and test part.
        rejected: reason -> number of cells or fields left out by the rules of ``quality``.
        bad: images that could not be used at all (with ``--skip-bad``), listed in quarantine.csv.
        channels, size, split_by: of the store.
        notes: what the user should know.
        fresh: made by this call.
    """

    read: int
    images: int
    classes: dict[str, list[int]]
    rejected: dict[str, int]
    bad: int
    channels: list[str]
    size: int
    split_by: list[str]
    notes: list[str]
    fresh: bool = True


def ingest(
    path: Path, screen: Screen, output: Path, *, skip_bad: bool = False, run: Run = run_here,
    progress: Progress = lambda what, done, total: None,
) -> Summary:  # fmt: skip
    """Make an image store of a screen.

    Args:
        path: file or folder of the screen.
        screen: how to read it, find cells, judge and scale them, and split them.
        output: folder of the store.  If it is there and was made from just this, nothing is done.
        skip_bad: quarantine images that can't be used instead of stopping at the first.
        run: runs the tasks, here or on a cluster that sees ``path`` and ``output``.
        progress: told of every task that ends.

    Returns:
        Counts of what was read, kept, rejected and quarantined.

    Raises:
        UserError: whatever the user must mend; ``output`` is untouched then, and the same command goes on later.
    """
    try:
        source = open_screen(path, screen.read, lenient=skip_bad)
    except ImageError as error:
        raise UserError(f"{error}; {LEAVE_OUT}") from None
    if path.is_dir() and output.resolve().is_relative_to(path.resolve()):
        raise UserError(
            f"{str(output)!r} lies in the source {str(path)!r}, which stays as it is; choose another --output"
        )
    identity = digest([__version__, to_dict(screen), source.name, fingerprint(source)])
    there = _finished(output, identity)
    if there is not None:
        return there
    partial = output.absolute()
    partial = partial.with_name(partial.name + ".partial")
    with _claimed(partial, identity):
        there = _finished(output, identity)  # another process may have ended just now
        if there is not None:
            return there
        plan = make_plan(source, screen)
        job = Job(source=source, screen=screen, plan=plan, folder=partial, skip_bad=skip_bad)
        job, window = _survey(job, run, progress)
        return _finish(job, _cut(job, run, progress), output, identity, window)


def fingerprint(source: Listed) -> list[list[Any]]:
    """Name, size and time of every file that a source rests on."""
    return [[str(p), s.st_size, s.st_mtime_ns] for p in sorted(set(source.files())) for s in [p.stat()]]


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def _finished(output: Path, identity: str) -> Summary | None:
    """The summary of a store made from just this; None where nothing is there.

    Raises:
        UserError: something else is there.
    """
    try:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return None
    except OSError as error:
        raise UserError(f"can't write to {str(output)!r}: {error.strerror}; choose another --output") from None
    try:
        record = dict(json.loads((output / "ingest.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{str(output)!r} exists and is not an ingested store; choose another --output") from None
    if record.get("identity") != identity:
        raise UserError(f"{str(output)!r} was made from other images or settings; choose another --output")
    try:
        info = StoreInfo.read(output)
        files = ["index.arrow", *(name for name, _ in info.shards)]
        lacks = [f"{name} is missing" for name in files if not (output / name).is_file()]
    except UserError:
        lacks = [f"{RECORD} can't be read"]
    if lacks:
        raise UserError(f"{str(output)!r} is damaged: {lacks[0]}; remove it, and the same command makes it again")
    if list(output.glob("done-*.json")):  # ended between its last two steps
        _tidy(output, info)
    return Summary(**{**record["summary"], "fresh": False})


@contextmanager
def _claimed(partial: Path, identity: str) -> Iterator[None]:
    """Make or take up the folder of an unfinished ingest, and keep others out of it."""
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock = (partial / "lock").open("w")
    except OSError as error:
        raise UserError(f"can't write to {str(partial)!r}: {error.strerror}; choose another --output") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing {str(partial)!r}: wait for it to end") from None
        owner = partial / "identity"
        started = any(partial.glob("*-*.json"))  # a survey or task that has left its record
        if started and owner.is_file() and owner.read_text(encoding="utf-8") != identity:
            raise UserError(
                f"{str(partial)!r} is an unfinished ingest of other images or settings: remove it, or choose another "
                "--output"
            )
        with writing(partial):
            if not owner.is_file() or owner.read_text(encoding="utf-8") != identity:  # a full disk would empty it
                owner.write_text(identity, encoding="utf-8")
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Survey and shards


def _survey(job: Job, run: Run, progress: Progress) -> tuple[Job, tuple[tuple[float, float], ...]]:
    """Look at a sample, and decide what all tasks must agree on; also the stored values that become -1 and 1."""
    source, plan, screen = job.source, job.plan, job.screen
    fields = source.content == "fields"
    first = _probe(job, FEW if fields else SAMPLE)
    depth = first[0].shape[2]
    job = replace(job, channels=_channel_names(source, depth), pixels=str(first[0].dtype))
    if plan.surveyed:
        for done, _ in enumerate(_answers(run(survey_task, job, range(len(plan.plates)))), 1):
            progress("survey", done, len(plan.plates))
        files = [job.survey_file(p) for p in range(len(plan.plates))]
        job = replace(job, surveys=tuple(PlateSurvey.from_dict(json.loads(f.read_text("utf-8"))) for f in files))
    if fields:
        crop = crop_side(job.surveys, screen)
        job = replace(job, crop=crop, size=screen.cells.size or crop)
    else:
        sides = [min(image.shape[:2]) for image in first]
        job = replace(job, size=screen.cells.size or int(np.median(sides)))
        if job.size > LARGE and screen.read.content == "auto":
            plan.notes.append(
                f"images of {job.size} px are taken for single cells; if they show fields of many, set "
                "read.content=fields"
            )
        if len(set(sides)) > 1 and screen.cells.size is None:
            plan.notes.append(
                f"images differ in size ({min(sides)} to {max(sides)} px); all become {job.size} px (cells.size)"
            )
    scaled = scales_plates(source, screen)
    job = replace(job, dtype=screen.intensity.dtype if scaled else job.pixels)
    if scaled:
        return job, ((0.0, float(np.iinfo(screen.intensity.dtype).max)),) * depth
    if fields:
        ends = np.array([s.window for s in job.surveys if np.isfinite(s.window).all()] or [((0.0, 1.0),) * depth])
        return job, tuple(zip(ends[..., 0].min(axis=0).tolist(), ends[..., 1].max(axis=0).tolist(), strict=True))
    return job, pixel_window(np.dtype(job.dtype), [image.reshape(-1, depth).T for image in first], job.channels)


def _probe(job: Job, count: int) -> list[NDArray]:
    """Some usable images, evenly spread over those to be read: those of the most common type and number of channels."""
    rows = job.plan.rows
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64))]
    found = [image for _, _, image in usable(job, chosen, [])]
    if not found:  # all of those are bad: take what comes
        found = [image for _, _, image in islice(usable(job, rows, []), count)]
    if not found:
        raise UserError(f"{job.source.name}: not one of its {len(rows):,} images can be used")
    kinds = [(image.dtype, image.shape[2]) for image in found]
    usual = Counter(kinds).most_common(1)[0][0]
    return [image for image, kind in zip(found, kinds, strict=True) if kind == usual]


def _channel_names(source: Listed, depth: int) -> tuple[str, ...]:
    names = source.channels or default_channels(depth)
    if len(names) != depth:
        raise UserError(
            f"read.channel_names names {len(names)} channels ({', '.join(names)}), but the images of {source.name} "
            f"have {depth}"
        )
    return tuple(names)


def _answers(results: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The tasks' answers; the first complaint ends them."""
    for answer in results:
        if "error" in answer:
            raise UserError(answer["error"])
        yield answer


def _cut(job: Job, run: Run, progress: Progress) -> list[dict[str, Any]]:
    """Run all tasks that have no record yet; records in the order of the tasks."""
    records, read = {}, 0
    for record in _answers(run(cut_task, job, range(len(job.plan.tasks)))):
        records[int(record["task"])] = record
        read += record["rows"]
        progress("images", read, len(job.plan.rows))
    return [records[k] for k in range(len(records))]


# ----------------------------------------------------------------------------------------------------------------------
# The store


def _finish(
    job: Job, records: list[dict[str, Any]], output: Path, identity: str, window: tuple[tuple[float, float], ...]
) -> Summary:
    """Write the index and what the store says of itself, and give it its name."""
    folder, source, plan = job.folder, job.source, job.plan
    shards = tuple((job.file("images", r["task"], "arrow").name, int(r["images"])) for r in records if r["images"])
    reasons: Counter[str] = sum((Counter(r["rejected"]) for r in records), Counter())
    bad = [(str(row), reason) for r in records for row, reason in r["bad"]]
    bad += [("", reason) for reason in source.unlisted]
    if not shards:
        why = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        raise UserError(
            f"{source.name}: nothing is left to be stored ({why or f'{len(bad)} images that could not be used'}); "
            "look at quality.* and cells.*"
        )
    class_names = tuple(sorted(set().union(*(r["classes"] for r in records))))
    counts = np.zeros((len(class_names), len(PARTS)), np.int64)
    metadata = {n: pa.array(v) for n, v in source.metadata.items() if n.startswith(("Metadata_", "Factor_"))}
    if source.content == "fields" and "Metadata_Field" not in metadata:
        metadata["Metadata_Field"] = pa.array(np.arange(len(plan.parts)))

    def tables(kind: str) -> Iterator[tuple[NDArray[np.int64], dict[str, Any]]]:
        """Rows of the source, and columns, of what the tasks kept ('cells') or left out ('rejected')."""
        for record in records:
            file = job.file(kind, record["task"], "parquet")
            if file.is_file():
                table = pq.read_table(file)
                rows = table["source_row"].to_numpy()
                known = {name: column.take(pa.array(rows)) for name, column in metadata.items()}
                yield rows, known | {n: table[n] for n in table.column_names if n not in ("source_row", *known)}

    def index() -> Iterator[pa.Table]:
        for rows, columns in tables("cells"):
            labels, parts = np.searchsorted(class_names, source.class_names[rows]), plan.parts[rows]
            np.add.at(counts, (labels, parts), 1)
            yield pa.table({**index_columns(labels, parts), **columns})

    with writing(folder):
        write_index(folder / "index.arrow", index())
        writer = None
        for rows, columns in tables("rejected"):
            table = pa.table({"Class": source.class_names[rows], **columns})
            writer = writer or pq.ParquetWriter(folder / "rejected.parquet", table.schema)
            writer.write_table(table)
        if writer is not None:
            writer.close()
        if bad:
            listed = {"row": [row for row, _ in bad], "reason": [reason for _, reason in bad]}
            pyarrow.csv.write_csv(pa.table(listed), folder / "quarantine.csv")
        info = StoreInfo(
            channels=job.channels, class_names=class_names, size=job.size, dtype=job.dtype, window=window,
            count=sum(n for _, n in shards), source=source.name, split_by=plan.split_by, simulated=False, shards=shards,
            depth=len(job.channels), identity=identity,
        )  # fmt: skip
        info.write(folder)
        summary = Summary(
            read=len(plan.rows), images=info.count, rejected=dict(reasons), bad=len(bad),
            classes=dict(zip(class_names, counts.tolist(), strict=True)), channels=list(info.channels), size=info.size,
            split_by=list(info.split_by), notes=plan.notes,
        )  # fmt: skip
        surveys = [{"plate": plate, **s.to_dict()} for plate, s in zip(plan.plates, job.surveys, strict=False)]
        made_of = {"diffex": __version__, "settings": to_dict(job.screen), "crop": job.crop, "surveys": surveys}
        put(folder / "ingest.json", {"identity": identity, "summary": asdict(summary), **made_of})
        if output.is_dir():
            output.rmdir()  # empty, or this fails
        folder.rename(output)
        _tidy(output, info)
    return summary


def _tidy(output: Path, info: StoreInfo) -> None:
    """Remove the tasks' own files from a finished store: they have served."""
    for file in output.iterdir():
        if file.name not in (*KEPT, *(name for name, _ in info.shards)):
            file.unlink()
