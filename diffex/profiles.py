"""Feature tables in pycytominer's form: a row for each cell, columns ``Metadata_*``, ``Nuclei_*``, ``Cells_*``, ..."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from diffex.cellprofiler import measurements
from diffex.data import ImageStore, Progress
from diffex.errors import UserError
from diffex.features import measure_many
from diffex.ingest import Run, run_here

ROWS = 256  # images of a task
ENDINGS = (".parquet", ".csv", ".csv.gz")


@dataclass(frozen=True)
class Job:
    """What every task needs: the store, channels that show nuclei and cells (None: by name), black, and which set."""

    store: Path
    nucleus_channel: str | None
    cell_channel: str | None
    background: float | None
    full: bool


def measure_task(job: Job, span: tuple[int, int]) -> tuple[int, pa.Table]:
    """Measure the images of the rows from the first up to the second number; the table has metadata first."""
    store = ImageStore(job.store)
    rows = np.arange(*span)
    images = (store.batch(rows).x.numpy() + 1) / 2
    features = measure_many(
        images, store.info.channels, nucleus_channel=job.nucleus_channel, cell_channel=job.cell_channel,
        background=job.background, full=job.full,
    )  # fmt: skip
    part = store.table.slice(span[0], len(rows))
    known = {n: part[n] for n in part.column_names if n.startswith(("Metadata_", "Factor_"))}
    own = {
        "Metadata_Class": pa.array(np.array(store.info.class_names)[store.labels[rows]].tolist()),
        "Metadata_Part": pa.array(store.parts[rows].tolist()),
        "Metadata_Row": pa.array(rows),
    }
    return span[0], pa.table({**own, **known, **{n: pa.array(v) for n, v in features.items()}})


def write_profiles(
    store: ImageStore, path: Path, *, nucleus_channel: str | None = None, cell_channel: str | None = None,
    full: bool = False, run: Run = run_here, progress: Progress = lambda what, done, total: None,
) -> tuple[int, int]:  # fmt: skip
    """Measure every image of a store and write one table, readable by pycytominer.

    Args:
        store: any image store; intensities are measured in its window, 0 black to 1 white.
        path: the table: .parquet, .csv or .csv.gz; it must not be there yet.
        nucleus_channel, cell_channel: channels that show nuclei and whole cells; None: by name, and all others.
        full: all that CellProfiler measures, about ten times as slow; False: the core set.
        run: runs the tasks, here or on a cluster.
        progress: told of every task that ends.

    Returns:
        Number of cells, number of features.

    Raises:
        UserError: the file is there, has another ending, or can't be written; a channel has no such name; or the full
            set is asked for and cp_measure is not installed.
    """
    if full:
        measurements()  # complains here, not in a task
    if not path.name.lower().endswith(ENDINGS):
        raise UserError(f"{str(path)!r}: a feature table ends with {', '.join(ENDINGS)} (--output)")
    if path.exists():
        raise UserError(f"{str(path)!r} is there already; choose another --output")
    waiting = path.with_name(f".{path.name}.partial")
    spans = [(start, min(start + ROWS, len(store))) for start in range(0, len(store), ROWS)]
    black = 0.0 if store.ingest_record().get("crop") else None  # cut out of fields: their background is subtracted
    done = features = 0
    try:
        waiting.touch()  # before hours of work
        results = run(measure_task, Job(store.path.resolve(), nucleus_channel, cell_channel, black, full), spans)
        with ExitStack() as stack:
            writer: Any = None
            for table in _in_order(results, [first for first, _ in spans]):
                if writer is None:
                    writer = stack.enter_context(_writer(waiting, path.name.lower(), table.schema, stack))
                    features = sum(not n.startswith(("Metadata_", "Factor_")) for n in table.column_names)
                writer.write_table(table)
                done += len(table)
                progress("cells", done, len(store))
        waiting.replace(path)
    except OSError as error:
        raise UserError(f"can't write {str(path)!r}: {error.strerror or error}") from None
    finally:
        waiting.unlink(missing_ok=True)
    return done, features


def _in_order(results: Iterator[tuple[int, pa.Table]], starts: list[int]) -> Iterator[pa.Table]:
    """Results as they lie in the store, whatever order they come in."""
    early: dict[int, pa.Table] = {}
    for start in starts:
        while start not in early:
            at, table = next(results)
            early[at] = table
        yield early.pop(start)


def _writer(file: Path, name: str, schema: pa.Schema, stack: ExitStack) -> Any:
    if name.endswith(".parquet"):
        return pq.ParquetWriter(file, schema)
    stream = stack.enter_context(pa.output_stream(str(file), compression="gzip" if name.endswith(".gz") else None))
    return pyarrow.csv.CSVWriter(stream, schema)
