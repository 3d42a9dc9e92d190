"""What a statistician would say of a store: each warning where it is due, and none where all is well."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from numpy.typing import NDArray

from diffex.data import ImageStore, write_index
from diffex.ingest import ingest
from diffex.inspection import Inspection, inspect
from diffex.report import write_inspection
from diffex.screen import Read, Screen, Split

RNG = np.random.default_rng(0)
SIDE = 8


def noisy(brightness: float = 100.0) -> NDArray[np.uint8]:
    return np.clip(RNG.normal(brightness, 25.0, (SIDE, SIDE)), 0, 255).astype(np.uint8)


def encoded(image: NDArray, path: Path) -> bytes:
    tifffile.imwrite(path, image, photometric="minisblack")
    return path.read_bytes()


Make = Callable[..., ImageStore]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Ingest images of so many wells a class and plate, so many cells a well."""

    def made(
        wells: Sequence[tuple[str, str, str, int]], *, image: Callable[..., NDArray] = lambda plate, name: noisy(),
        by: tuple[str, ...] = ("auto",),
    ) -> ImageStore:  # fmt: skip
        rows: dict[str, list[Any]] = {"image": [], "class_name": [], "plate": [], "well": []}
        for plate, well, name, count in wells:
            for _ in range(count):
                rows["image"].append(encoded(image(plate, name), tmp_path / "one.tif"))
                rows["class_name"].append(name)
                rows["plate"].append(plate)
                rows["well"].append(well)
        pq.write_table(pa.table(rows), tmp_path / "cells.parquet")
        ingest(tmp_path / "cells.parquet", Screen(split=Split(by=by)), tmp_path / "store")
        return ImageStore(tmp_path / "store")

    return made


def layout(
    classes: Sequence[str] = ("DMSO", "drug"), plates: Sequence[str] = ("p1", "p2"), wells: int = 18, cells: int = 6
) -> list[tuple[str, str, str, int]]:
    """Every class on every plate in as many wells."""
    return [
        (plate, f"{chr(65 + c)}{w + 1:02}", name, cells)
        for plate in plates for c, name in enumerate(classes) for w in range(wells)
    ]  # fmt: skip


def changed(store: ImageStore, **columns: NDArray) -> ImageStore:
    """The same store with other columns in its index, as a careless hand might leave it."""
    table = store.table
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    write_index(store.path / "index.new", iter([table]))
    (store.path / "index.new").replace(store.path / "index.arrow")
    return ImageStore(store.path)


def told(found: Inspection, severity: str = "") -> list[str]:
    return [f.text for f in found.findings if not severity or f.severity == severity]


def test_a_balanced_screen_of_enough_wells_draws_no_warning(make: Make) -> None:
    found = inspect(make(layout()))
    assert told(found, "serious") == told(found, "caution") == []
    assert len(told(found, "good")) == 4  # plates, their look, units, duplicates


def test_classes_that_share_no_plate_are_named(make: Make) -> None:
    wells = [*layout(["DMSO"], ["p1"]), *layout(["drug"], ["p2"])]
    found = told(inspect(make(wells)), "serious")
    assert any("1 of 1 pairs of classes share no plate (DMSO and drug)" in text for text in found)
    assert any("the plate alone tells the class of 100% of the images" in text for text in found)


def test_a_plate_that_leans_to_a_class_is_measured(make: Make) -> None:
    wells = [
        *layout(["DMSO"], ["p1"], wells=16), *layout(["drug"], ["p1"], wells=4),
        *layout(["DMSO"], ["p2"], wells=4), *layout(["drug"], ["p2"], wells=16),
    ]  # fmt: skip
    found = inspect(make(wells))
    assert any("the plate alone tells the class of 80% of the images (the largest class alone: 50%)" in text
               for text in told(found, "caution"))  # fmt: skip
    assert not any("share no plate" in text for text in told(found))


@pytest.mark.parametrize("shift", [0.0, 60.0])
def test_plates_that_look_different_are_told_by_wells_that_were_held_out(make: Make, shift: float) -> None:
    found = inspect(make(layout(), image=lambda plate, name: noisy(80.0 + shift * (plate == "p2"))))
    assert any("plates look different" in text for text in told(found, "caution")) == (shift > 0)
    assert any("plates look alike" in text for text in told(found, "good")) == (shift == 0)


def test_a_phenotype_is_no_plate_effect(make: Make) -> None:
    found = inspect(make(layout(), image=lambda plate, name: noisy(60.0 + 80.0 * (name == "drug"))))
    assert any("plates look alike" in text for text in told(found, "good"))


def test_copies_across_parts_are_serious_and_within_one_a_caution(make: Make) -> None:
    twin = noisy()
    wells = layout()
    many = iter(range(len(wells) * 6))
    across = inspect(make(wells, image=lambda plate, name: twin if next(many) % 6 == 0 else noisy()))
    assert any("in two parts (the very same pixels)" in text for text in told(across, "serious"))


def test_copies_within_one_part_are_counted(make: Make) -> None:
    store = make(layout())
    hashes = store.table["hash"].to_numpy().copy()
    hashes[np.flatnonzero(store.part_numbers == 0)[:3]] = 7
    found = inspect(changed(store, hash=hashes))
    assert "2 images are copies of others (the very same pixels), within one part." in told(found, "caution")


def test_an_uneven_class_and_too_few_wells_are_named(make: Make) -> None:
    wells = [*layout(["DMSO"], ["p1"], wells=30, cells=12), *layout(["drug"], ["p1"], wells=3, cells=2)]
    found = inspect(make(wells))
    assert any("classes are uneven: DMSO has 360 images, drug 6" in text for text in told(found, "caution"))
    assert any("fewer than 3 test wells: drug (1)" in text for text in told(found, "serious"))


def test_a_class_of_two_wells_cannot_be_in_three_parts(make: Make) -> None:
    wells = [*layout(["DMSO"], ["p1"], wells=20), *layout(["drug"], ["p1"], wells=2)]
    assert any("drug: too few wells for training, validation and test" in t for t in told(inspect(make(wells))))


def test_without_a_unit_the_reader_is_warned(make: Make) -> None:
    found = told(inspect(make(layout(), by=())), "caution")
    assert any("no well, plate or donor is known" in text for text in found)


def test_a_unit_torn_between_parts_is_found(make: Make) -> None:
    store = make(layout())
    torn = changed(store, part=(np.arange(len(store)) % 3).astype(np.int8))
    assert any("72 wells lie in more than one part" in text for text in told(inspect(torn), "serious"))


def test_quality_control_that_leans_on_one_class_is_told(make: Make) -> None:
    store = make(layout())
    pq.write_table(pa.table({"Class": ["drug"] * 100, "Reason": ["too small"] * 100}), store.path / "rejected.parquet")
    found = inspect(store)
    assert found.rejected == {("drug", "too small"): 100}
    assert any("quality control leaves out 32% of drug, but 0% of DMSO" in text for text in told(found, "caution"))


def test_an_empty_and_a_cut_off_channel_are_named(make: Make) -> None:
    def image(plate: str, name: str) -> NDArray[np.uint8]:
        bright = noisy()
        bright[:3] = 255
        return np.stack([np.full((SIDE, SIDE), 9, np.uint8), bright])

    found = inspect(make(layout(), image=image))
    assert any("channel channel 0 shows nothing" in text for text in told(found, "serious"))
    assert any("38% of the pixels of channel channel 1 are cut off" in text for text in told(found, "caution"))


def test_one_class_alone_is_no_task_for_a_classifier(make: Make) -> None:
    assert any("one class only (DMSO)" in text for text in told(inspect(make(layout(["DMSO"])))))


def test_the_worst_comes_first(make: Make) -> None:
    wells = [*layout(["DMSO"], ["p1"]), *layout(["drug"], ["p2"], wells=5)]
    ranks = [("serious", "caution", "good").index(f.severity) for f in inspect(make(wells)).findings]
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 1


def test_counts_agree_with_the_index(make: Make) -> None:
    store = make(layout(wells=10))
    counts = inspect(store).counts
    assert counts.images.sum() == len(store)
    assert counts.units.sum(axis=1).tolist() == [20, 20]
    assert counts.by_plate.tolist() == [[60, 60], [60, 60]]
    assert counts.wells_by_plate.tolist() == [[10, 10], [10, 10]]
    assert counts.wells["p1", "A01"] == ("DMSO", 6)


def test_a_contact_sheet_draws_every_well_before_a_second_cell_of_any(make: Make) -> None:
    store = make([("p1", "A01", "DMSO", 200), *layout(["DMSO", "drug"], ["p2"], wells=11, cells=2)],
                 image=lambda plate, name: noisy(220.0 if plate == "p1" else 60.0))  # fmt: skip
    sheet = inspect(store, per_class=12).sheet["DMSO"]
    assert (sheet.reshape(12, -1).mean(axis=1) > 150).sum() == 1  # of the well with nine tenths of the cells


def test_histograms_are_shares_of_the_pixels_of_each_plate(make: Make) -> None:
    found = inspect(make(layout(), image=lambda plate, name: noisy(60.0 if plate == "p1" else 180.0)))
    assert list(found.histograms) == ["p1", "p2"]
    for shares in found.histograms.values():
        assert shares.sum(axis=1) == pytest.approx([1.0])
    middle = {plate: float(shares[0] @ found.levels) for plate, shares in found.histograms.items()}
    assert middle["p1"] == pytest.approx(60 / 255, abs=0.02)
    assert middle["p2"] == pytest.approx(180 / 255, abs=0.02)


def test_a_store_of_many_classes_shows_its_largest(make: Make) -> None:
    wells = [("p1", f"{chr(65 + i % 16)}{i // 16 + 1:02}", f"drug {i:02}", 3 + i % 5) for i in range(60)]
    store = make(wells)
    found = inspect(store)
    assert len(found.sheet) == 24
    shown = [(store.labels == store.info.class_names.index(name)).sum() for name in found.sheet]
    assert min(shown) >= np.sort(np.bincount(store.labels))[-24]


def test_the_page_stands_alone_and_its_table_counts_every_image(make: Make, tmp_path: Path) -> None:
    store = make(layout(["DMSO", "<b>drug</b>"]))
    found = inspect(store)
    page = write_inspection(tmp_path / "page", store, found)
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 4  # sheet, plates, maps, histograms
    assert "<script src" not in text and "http" not in text.replace("http://www.w3.org", "")
    assert "&lt;b&gt;drug&lt;/b&gt;" in text and "<b>drug</b>" not in text
    assert all(f.text in text for f in found.findings)
    with (tmp_path / "page" / "counts.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["images"]) for row in rows) == len(store)


def test_a_store_without_plates_or_wells_has_a_page_too(tmp_path: Path) -> None:
    for name in ("ape", "zebra"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(10):
            tifffile.imwrite(tmp_path / "in" / name / f"{i}.tif", noisy(), photometric="minisblack")
    ingest(tmp_path / "in", Screen(read=Read(layout="folder")), tmp_path / "store")
    store = ImageStore(tmp_path / "store")
    page = write_inspection(tmp_path / "page", store, inspect(store))
    assert page.read_text(encoding="utf-8").count("data:image/png;base64,") == 2
