"""An ingest: from fields or single cells to a store that any number of workers writes alike, whose units stay whole."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from heads import several_nodes

from diffex.cli import main
from diffex.config import Assay, Data
from diffex.data import ImageStore
from diffex.data_cli import Workers
from diffex.errors import UserError
from diffex.ingest import Summary, ingest
from diffex.prepare import build_store
from diffex.screen import Cells, Intensity, Read, Screen, Split
from diffex.settings import build
from diffex.splits import PARTS

RNG = np.random.default_rng(0)
REFERENCED = Screen(intensity=Intensity(reference="Metadata_Compound == 'DMSO'"))


def contents(folder: Path) -> dict[str, str]:
    """Every file of a folder and what is in it."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*")) if p.is_file()
    }  # fmt: skip


def cells_of(tmp: Path, count: int = 120, side: int = 12, channels: int = 2, kind: type = np.uint16) -> Path:
    """Single-cell images: one array of all, and a table of plates, wells, sites, donors and doses."""
    images = RNG.integers(0, 4000, (count, channels, side, side)).astype(kind)
    row = np.arange(count)
    columns = {
        "Metadata_Compound": np.where(row % 2, "taxol", "DMSO"),
        "Metadata_Plate": np.char.add("p", (row // 2 % 4).astype(str)),
        "Metadata_Well": np.char.add("A", (row % 24 // 2).astype(str)),
        "Metadata_Donor": row % 6,
        "Metadata_Site": row % 8,
    }  # fmt: skip
    tmp.mkdir(exist_ok=True)
    np.save(tmp / "cells.npy", images)
    pq.write_table(pa.table(columns), tmp / "cells.parquet")
    return tmp / "cells.npy"


def reading(tmp: Path, **more: Any) -> Read:
    return Read(table=str(tmp / "cells.parquet"), class_column="Compound", **more)


# ----------------------------------------------------------------------------------------------------------------------
# What is in the store


def test_fields_become_crops_with_the_metadata_of_their_well(fields: tuple[ImageStore, Summary], screen: Path) -> None:
    store, summary = fields
    assert store.info.channels == ("DNA", "tubulin", "actin")
    assert store.info.dtype == "uint16"
    assert store.info.size == summary.size
    assert {"Metadata_Plate", "Metadata_Well", "Metadata_Site", "Metadata_Compound"} <= set(store.table.column_names)
    truth = pq.read_table(screen / "truth.parquet").to_pandas()
    well = ["Metadata_Plate", "Metadata_Well"]
    compound = truth.groupby(well).Metadata_Compound.first()
    known = store.table.to_pandas().set_index(well).Metadata_Compound
    assert (known == compound.reindex(known.index)).all()


def test_every_crop_shows_a_cell_that_is_there(fields: tuple[ImageStore, Summary], screen: Path) -> None:
    store, _ = fields
    truth = pq.read_table(screen / "truth.parquet").to_pandas()
    known = store.table.to_pandas()
    near = 0
    for key, crops in known.groupby(["Metadata_Plate", "Metadata_Well", "Metadata_Site"]):
        plate, well, site = key
        cells = truth[
            (truth.Metadata_Plate == plate) & (truth.Metadata_Well == well) & (truth.Metadata_Site == int(site))
        ]
        y = crops.Metadata_Nuclei_Location_Center_Y.to_numpy()[:, None] - cells.y.to_numpy()
        x = crops.Metadata_Nuclei_Location_Center_X.to_numpy()[:, None] - cells.x.to_numpy()
        near += int((np.hypot(y, x).min(axis=1) < 6).sum())
    assert near / len(store) > 0.95


def test_what_is_left_out_says_why_and_what_was_measured(fields: tuple[ImageStore, Summary]) -> None:
    store, summary = fields
    table = pq.read_table(store.path / "rejected.parquet").to_pandas()
    assert table.Reason.value_counts().to_dict() == summary.rejected
    assert summary.rejected["border"] > 0
    bright = table[table.Reason == "too bright: debris"]
    assert len(bright) and (bright.Value > bright.Limit).all()
    assert set(table.Class) <= set(store.info.class_names)


def test_every_image_of_the_store_is_counted_once(fields: tuple[ImageStore, Summary]) -> None:
    store, summary = fields
    assert len(store) == summary.images == sum(map(sum, summary.classes.values()))
    for c, name in enumerate(store.info.class_names):
        assert [int(((store.labels == c) & (store.part_numbers == p)).sum()) for p in range(3)] == summary.classes[name]


def test_reference_wells_fix_one_window_for_each_plate(
    fields: tuple[ImageStore, Summary], screen: Path, tmp_path: Path
) -> None:
    """Plates whose gain differs look alike after scaling by their own DMSO wells, and do not before."""

    def spread(store: ImageStore) -> float:
        """Largest difference between the plates' bright levels, as a share of their mean."""
        plates = store.metadata()["Metadata_Plate"]
        control = store.labels == store.info.class_names.index("DMSO")
        rows = [np.flatnonzero(control & (plates == p)) for p in np.unique(plates)]
        bright = [np.percentile(store.pixels(mine), 95.0, axis=(0, 2, 3)) for mine in rows]
        return float((np.ptp(bright, axis=0) / np.mean(bright, axis=0)).max())

    ingest(screen, Screen(intensity=Intensity(scale="none")), tmp_path / "raw")
    assert spread(fields[0]) < 0.5 * spread(ImageStore(tmp_path / "raw"))


def test_single_cells_are_stored_as_they_are(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in")
    ingest(path, Screen(read=reading(tmp_path / "in", channel_names=("DNA", "actin"))), tmp_path / "store")
    store = ImageStore(tmp_path / "store")
    assert store.info.channels == ("DNA", "actin")
    assert (store.pixels(np.arange(len(store))) == np.load(path)).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 5])
def test_any_type_and_number_of_channels_survives(tmp_path: Path, kind: type, channels: int) -> None:
    images = (RNG.random((40, channels, 12, 12)) * 200).astype(kind)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "cells.npy", images)
    pq.write_table(pa.table({"Metadata_Class": ["a", "b"] * 20}), tmp_path / "in" / "cells.parquet")
    ingest(
        tmp_path / "in" / "cells.npy",
        Screen(read=Read(table=str(tmp_path / "in" / "cells.parquet"), class_column="Class")), tmp_path / "store",
    )  # fmt: skip
    store = ImageStore(tmp_path / "store")
    assert store.pixels([3, 0]).dtype == kind
    assert (store.pixels([3, 0]) == images[[3, 0]]).all()


def test_single_cells_are_scaled_by_the_reference_wells_of_their_plate_where_asked(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in")
    images = np.load(path)
    plate = np.arange(len(images)) // 2 % 4
    np.save(path, (images * (1.0 + plate)[:, None, None, None]).astype(np.uint16))
    how = Screen(read=reading(tmp_path / "in"), intensity=Intensity(scale="plate", headroom=1.0, low=0.0, high=100.0))
    ingest(path, how, tmp_path / "store")
    store = ImageStore(tmp_path / "store")
    raw, scaled = images[np.argsort(plate, kind="stable")] / images.max(), store.pixels(np.arange(len(store))) / 65535
    assert np.abs(raw - scaled).max() < 0.01  # the gain of each plate is gone


def test_images_get_the_size_asked_for(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in")
    ingest(path, Screen(read=reading(tmp_path / "in"), cells=Cells(size=8)), tmp_path / "store")
    assert ImageStore(tmp_path / "store").pixels([0]).shape == (1, 2, 8, 8)


# ----------------------------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize(
    ("by", "unit"),
    [
        (("auto",), ("Metadata_Plate", "Metadata_Well")), (("Well",), ("Metadata_Well",)),
        (("plate",), ("Metadata_Plate",)), (("Donor",), ("Metadata_Donor",)),
        (("Metadata_Site",), ("Metadata_Site",)), (("Donor", "Site"), ("Metadata_Donor", "Metadata_Site")),
    ],
)  # fmt: skip
def test_no_unit_is_in_two_parts_whatever_column_it_is(tmp_path: Path, by: Any, unit: tuple[str, ...]) -> None:
    path = cells_of(tmp_path / "in")
    ingest(path, Screen(read=reading(tmp_path / "in"), split=Split(by=by)), tmp_path / "store")
    store = ImageStore(tmp_path / "store")
    assert store.info.split_by == unit
    known = store.metadata()
    units: dict[tuple[Any, ...], set[str]] = {}
    for *key, part in zip(*(known[n] for n in unit), store.parts, strict=True):
        units.setdefault(tuple(key), set()).add(part)
    assert all(len(parts) == 1 for parts in units.values())
    assert set(store.parts) == set(PARTS)


def test_crops_of_one_field_share_its_part(fields: tuple[ImageStore, Summary]) -> None:
    store, _ = fields
    parts = store.table.to_pandas().groupby(["Metadata_Plate", "Metadata_Well"]).part.nunique()
    assert (parts == 1).all()
    assert len(parts) >= 12


def test_an_experiment_views_the_store_and_keeps_its_split(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in")
    ingest(path, Screen(read=reading(tmp_path / "in")), tmp_path / "store")
    origin = ImageStore(tmp_path / "store")
    (tmp_path / "view").mkdir()
    build_store(Data(path=str(origin.path), size=12, channels=("1",)), Assay(), tmp_path / "view")
    view = ImageStore(tmp_path / "view")
    assert not list((tmp_path / "view").glob("images*"))  # no pixel is copied
    assert (view.pixels([5, 2]) == origin.pixels([5, 2])[:, 1:]).all()
    assert (view.parts == origin.parts).all()
    assert view.info.split_by == origin.info.split_by


def test_an_experiment_of_another_size_copies_and_keeps_the_split_too(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in")
    ingest(path, Screen(read=reading(tmp_path / "in")), tmp_path / "store")
    (tmp_path / "copy").mkdir()
    build_store(Data(path=str(tmp_path / "store"), size=8), Assay(), tmp_path / "copy")
    copy, origin = ImageStore(tmp_path / "copy"), ImageStore(tmp_path / "store")
    assert copy.pixels([0]).shape == (1, 2, 8, 8)
    assert (copy.parts == origin.parts).all()
    assert copy.info.window == origin.info.window


def test_an_experiment_may_ask_another_question_of_the_same_store(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in")
    ingest(path, Screen(read=reading(tmp_path / "in"), split=Split(by=("Site",))), tmp_path / "store")
    (tmp_path / "view").mkdir()
    data = Data(path=str(tmp_path / "store"), size=12, class_column="donor", classes=("1", "3"), split_by=("Well",))
    build_store(data, Assay(), tmp_path / "view")
    view = ImageStore(tmp_path / "view")
    assert view.info.class_names == ("1", "3")
    assert (np.array(view.info.class_names)[view.labels] == view.metadata()["Metadata_Donor"].astype(str)).all()
    assert len(view) == 40


def test_a_view_whose_store_is_gone_or_another_one_says_where_it_was(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in")
    ingest(path, Screen(read=reading(tmp_path / "in")), tmp_path / "store")
    (tmp_path / "view").mkdir()
    build_store(Data(path=str(tmp_path / "store"), size=12), Assay(), tmp_path / "view")
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="which is gone or another one now"):
        ImageStore(tmp_path / "view")
    assert len(ImageStore(tmp_path / "view", origin=tmp_path / "moved")) == 120
    ingest(path, Screen(read=reading(tmp_path / "in"), split=Split(seed=1)), tmp_path / "store")
    with pytest.raises(UserError, match="which is gone or another one now"):
        ImageStore(tmp_path / "view")


# ----------------------------------------------------------------------------------------------------------------------
# Again, elsewhere, by many


def test_the_same_command_again_does_nothing(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in")
    first = ingest(path, Screen(read=reading(tmp_path / "in")), tmp_path / "store")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "store").iterdir()}

    def none(task: Any, job: Any, items: Sequence[Any]) -> Iterator[Any]:
        raise AssertionError("no task may run")

    again = ingest(path, Screen(read=reading(tmp_path / "in")), tmp_path / "store", run=none)
    assert (first.fresh, again.fresh) == (True, False)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "store").iterdir()} == before


def test_workers_of_a_cluster_write_the_same_bytes(
    screen: Path, fields: tuple[ImageStore, Summary], tmp_path: Path
) -> None:
    with Workers(2) as run:
        ingest(screen, REFERENCED, tmp_path / "store", run=run)
    assert contents(tmp_path / "store") == contents(fields[0].path)


def test_a_node_that_is_lost_in_the_middle_costs_nothing(
    screen: Path, fields: tuple[ImageStore, Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = several_nodes(num_cpus=1)
    try:
        other = cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        lost: list[int] = []

        def progress(what: str, done: int, total: int) -> None:
            if what == "images" and not lost:
                lost.append(done)
                cluster.remove_node(other, allow_graceful=False)

        with Workers(None) as run:
            ingest(screen, REFERENCED, tmp_path / "store", run=run, progress=progress)
    finally:
        cluster.shutdown()
    assert 0 < lost[0] < fields[1].read
    assert contents(tmp_path / "store") == contents(fields[0].path)


def test_tasks_may_end_in_any_order(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in", count=1200)
    how = Screen(read=reading(tmp_path / "in"))

    def backwards(task: Any, job: Any, items: Sequence[Any]) -> Iterator[Any]:
        return (task(job, item) for item in reversed(items))

    ingest(path, how, tmp_path / "forwards")
    ingest(path, how, tmp_path / "backwards", run=backwards)
    assert len(list((tmp_path / "forwards").glob("images-*.arrow"))) > 2
    assert contents(tmp_path / "forwards") == contents(tmp_path / "backwards")


def test_a_source_that_changed_makes_another_store(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in")
    how = Screen(read=reading(tmp_path / "in"))
    ingest(path, how, tmp_path / "store")
    np.save(path, np.load(path)[::-1])
    with pytest.raises(UserError, match="was made from other images or settings; choose another --output"):
        ingest(path, how, tmp_path / "store")


def test_a_store_says_what_it_was_made_of(screen: Path, fields: tuple[ImageStore, Summary]) -> None:
    record = json.loads((fields[0].path / "ingest.json").read_text(encoding="utf-8"))
    assert build(Screen, record["settings"]) == REFERENCED
    assert [s["plate"] for s in record["surveys"]] == sorted(set(fields[0].metadata()["Metadata_Plate"]))
    assert all(np.isfinite(s["nucleus_diameter"]) for s in record["surveys"])


def test_progress_ends_at_the_number_of_images(tmp_path: Path) -> None:
    path = cells_of(tmp_path / "in", count=600)
    told: list[tuple[str, int, int]] = []
    ingest(path, Screen(read=reading(tmp_path / "in")), tmp_path / "store", progress=lambda *now: told.append(now))
    assert told[-1] == ("images", 600, 600)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


# ----------------------------------------------------------------------------------------------------------------------
# The commands


def test_a_dry_run_tells_what_would_be_read_and_writes_nothing(
    screen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "ingest", str(screen), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "fields" in shown or "each a field of cells" in shown
    assert "# channels: DNA, tubulin, actin" in shown
    assert "# split by Plate and Well" in shown
    assert not list(tmp_path.iterdir())


def test_the_settings_that_are_printed_can_be_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "ingest", "--dry-run", "--set", "cells.crop=48"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["data", "ingest", "--dry-run", "--settings", str(tmp_path / "mine.yaml")]) == 0
    assert "crop: 48" in capsys.readouterr().out


def test_from_simulated_fields_to_inspection_by_commands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--fields-per-well", "1", "--cells-per-field", "10", "--field-size", "320"]
    sets = ["--set", "assay.num_plates=1", "--set", "assay.wells_per_class=4"]
    assert main(["data", "simulate", "--output", "screen", *few, *sets]) == 0
    assert main(["data", "ingest", "screen", "--output", "store", "--workers", "1"]) == 0
    assert "next: diffex data inspect store" in capsys.readouterr().out
    assert main(["data", "ingest", "screen", "--output", "store", "--workers", "1"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["data", "inspect", "store"]) == 0
    shown = capsys.readouterr().out
    assert "none of the wells lies in two parts" in shown
    assert (tmp_path / "store-inspection" / "inspection.html").is_file()
    assert (tmp_path / "store-inspection" / "sheet.png").is_file()
