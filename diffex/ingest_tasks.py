"""The two kinds of task of an ingest: survey a plate, and cut a run of images into a shard.

A task may run anywhere and be repeated: it leaves its files and, last, a record by which it is known to be done.  A
user's mistake travels back as words, ``{"error": ...}``.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffex.data import ShardWriter
from diffex.errors import UserError
from diffex.fields import PlateSurvey, check_field, cut_cells, scaled
from diffex.ingest_plan import Plan
from diffex.plates import survey_images, survey_plate, unknown_survey
from diffex.readers import fit_square
from diffex.screen import Screen
from diffex.sources import Listed

LEAVE_OUT = "or leave such images out, and have them listed, with --skip-bad"


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that a task needs; it travels to every worker once.

    Attributes:
        source: what is read.
        screen: all settings.
        plan: what is to be done.
        folder: where tasks leave their files; visible to every worker.
        skip_bad: note images that can't be used, and go on.
        channels: names of the C channels.
        pixels: type of the source's pixels.
        surveys: what the survey found, by plate; empty before it, and where it has nothing to find.
        crop, size: sides of crops and of stored images in pixels.
        dtype: of stored images.
    """

    source: Listed
    screen: Screen
    plan: Plan
    folder: Path
    skip_bad: bool
    channels: tuple[str, ...] = ()
    pixels: str = ""
    surveys: tuple[PlateSurvey, ...] = ()
    crop: int = 0
    size: int = 0
    dtype: str = ""

    def survey_file(self, p: int) -> Path:
        """Where the survey of plate p lies."""
        return self.folder / f"survey-{p:05}.json"

    def file(self, kind: str, k: int, ending: str) -> Path:
        """Where task k leaves something."""
        return self.folder / f"{kind}-{k:05}.{ending}"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What the system says of a failed write, in one line: a full disk is no crash."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise UserError(f"can't write to {str(folder)!r}: {reason}; mend that, and the same command goes on") from None


def put(file: Path, content: Any) -> None:
    """Write JSON so that the file is whole or absent."""
    waiting = file.with_suffix(".tmp")
    waiting.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    waiting.replace(file)


def usable(job: Job, rows: Iterable[int], bad: list[tuple[int, str]]) -> Iterator[tuple[int, str, NDArray]]:
    """Row, name and pixels (H, W, C) of each image; one that can't be used is noted in ``bad``, or ends it all."""
    for row in rows:
        with _forgiven(job, int(row), bad):
            name, image = next(job.source.images([int(row)], 0))
            _check(job, name, image)
            yield int(row), name, image


def _check(job: Job, name: str, image: NDArray) -> None:
    """Refuse an image that shows nothing or is unlike the others, as far as it is known yet what they are like.

    Raises:
        UserError: naming the image.
    """
    if (image == image[:1, :1]).all():
        raise UserError(f"{name}: every pixel is {image[0, 0].tolist()}, an empty image; remove it")
    if job.channels and image.shape[2] != len(job.channels):
        raise UserError(f"{name} has {image.shape[2]} channels, but the others have {len(job.channels)}")
    if job.pixels and str(image.dtype) != job.pixels:
        raise UserError(f"{name} has {image.dtype} pixels, but the others have {job.pixels}: convert them")
    if job.channels and job.source.content == "fields":
        check_field(image, job.channels, name)
        crop = job.screen.cells.crop or 0
        if min(image.shape[:2]) < crop:  # it would only seem to show no whole cell
            height, width = image.shape[:2]
            raise UserError(
                f"{name}: a field of {height} x {width} pixels is smaller than one crop of {crop} (cells.crop)"
            )


@contextmanager
def _forgiven(job: Job, row: int, bad: list[tuple[int, str]]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        if not job.skip_bad:
            raise UserError(f"{error}; {LEAVE_OUT}") from None
        bad.append((row, str(error)))


def survey_task(job: Job, p: int) -> dict[str, Any]:
    """Survey plate p."""
    if job.survey_file(p).is_file():
        return {"plate": p}
    rows, reference = job.plan.surveyed[p]
    is_reference = dict(zip(rows.tolist(), reference.tolist(), strict=True))
    name = f"plate {job.plan.plates[p]!r}" if job.plan.plates[p] else job.source.name

    def images() -> Iterator[tuple[bool, NDArray]]:
        return ((is_reference[row], image) for row, _, image in usable(job, rows, []))

    try:
        if job.skip_bad and not any(True for _ in images()):
            survey = unknown_survey(job.channels)  # the cuts will list its images, one by one
        elif job.source.content == "fields":
            survey = survey_plate(images, job.channels, job.screen, name)
        else:
            survey = survey_images(images(), job.channels, job.screen, name)
        with writing(job.folder):
            put(job.survey_file(p), survey.to_dict())
    except UserError as error:
        return {"error": str(error)}
    return {"plate": p}


def cut_task(job: Job, k: int) -> dict[str, Any]:
    """Read the images of task k, cut out their cells, and write its shard, the cells' table and what was left out."""
    done = job.file("done", k, "json")
    if done.is_file():
        return dict(json.loads(done.read_text(encoding="utf-8")))
    bad: list[tuple[int, str]] = []
    kept: list[pa.Table] = []
    rejected: list[pa.Table] = []
    try:
        with writing(job.folder):
            writer = ShardWriter(
                job.file("images", k, "arrow"), np.dtype(job.dtype), (len(job.channels), job.size, job.size)
            )
            for row, name, image in usable(job, job.plan.tasks[k], bad):
                with _forgiven(job, row, bad):
                    pictures, known, left_out = _cells(job, row, name, image)
                    for picture in pictures:
                        writer.add(picture)
                    kept.append(_table(row, {"hash": np.array([_hash(p) for p in pictures], np.int64), **known}))
                    rejected.append(_table(row, left_out))
            writer.close()
            tables = {"cells": [t for t in kept if len(t)], "rejected": [t for t in rejected if len(t)]}
            for kind, parts in tables.items():
                if parts:
                    pq.write_table(pa.concat_tables(parts), job.file(kind, k, "parquet"))
            rows = [t["source_row"].to_numpy() for t in tables["cells"]]
            record = {
                "task": k, "rows": len(job.plan.tasks[k]), "images": writer.count, "bad": bad,
                "classes": Counter(job.source.class_names[np.concatenate(rows)].tolist()) if rows else {},
                "rejected": Counter(why for t in tables["rejected"] for why in t["Reason"].to_pylist()),
            }  # fmt: skip
            put(done, record)
    except UserError as error:
        return {"error": str(error)}
    return record


def _table(row: int, columns: dict[str, NDArray]) -> pa.Table:
    count = len(next(iter(columns.values()))) if columns else 0
    return pa.table({"source_row": np.full(count, row, np.int64), **columns})


def _hash(picture: NDArray) -> int:
    """Sixty-four bits by which copies of an image are found."""
    digest = hashlib.blake2b(np.ascontiguousarray(picture).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _cells(
    job: Job, row: int, name: str, image: NDArray
) -> tuple[Sequence[NDArray], dict[str, NDArray], dict[str, NDArray]]:
    """Pictures (C, size, size) to be stored, a column for each thing known of them, and what was left out and why."""
    survey = job.surveys[job.plan.plate_of[row]] if job.surveys else None
    if job.source.content == "cells":
        picture = fit_square(image, job.size)
        if survey is not None:
            picture = scaled(picture, survey, job.screen)
        return [picture], {}, {}
    assert survey is not None
    found = cut_cells(image, job.channels, survey, job.screen, job.crop, name)
    pictures: Sequence[NDArray] = list(found.images)
    if job.size != job.crop:
        pictures = [fit_square(p.transpose(1, 2, 0), job.size) for p in pictures]
    return pictures, {f"Metadata_{n}": v for n, v in found.columns.items()}, found.rejected
