"""The simulated screen: its files are those its tables name, its pixels are a camera's, and its truth is true."""

import csv
import errno
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

from diffex import simulate
from diffex.assay import CONTROL, DEFAULT_CHANNELS, FACTORS, visible_factors
from diffex.config import Assay
from diffex.errors import UserError
from diffex.simulate import LIMIT, OFFSET, STEP, illumination, write_screen

Columns = dict[str, NDArray]
SMALL = {"field_size": (160, 192), "cell_size": 32, "cells_per_field": 12, "fields_per_well": 2}
DEFECTS = {"out_of_focus": 0.2, "debris_per_field": 1.0, "saturated": 0.05}
SCREEN = Assay(design="multiclass", num_plates=2, wells_per_class=3, doses=(0.5, 1.0), plate_sd=0.2, seed=7)


def columns(path: Path) -> Columns:
    table = pq.read_table(path)
    return {
        name: np.array(table[name].to_pylist(), object if "Debris_" in name else None) for name in table.schema.names
    }


def digests(root: Path) -> dict[str, str]:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def small(out: Path, settings: Assay = SCREEN, channels: tuple[str, ...] = DEFAULT_CHANNELS, **more: object) -> Path:
    write_screen(settings, channels, out, **{**SMALL, **more})  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def screen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen with many defects: 2 plates, 4 classes, 48 fields."""
    out = tmp_path_factory.mktemp("simulate") / "screen"
    return small(out, **DEFECTS)


@pytest.fixture(scope="module")
def cells(screen: Path) -> Columns:
    return columns(screen / "truth.parquet")


@pytest.fixture(scope="module")
def fields(screen: Path) -> Columns:
    return columns(screen / "truth_fields.parquet")


def image(screen: Path, fields: Columns, row: int, channel: str = "DNA") -> NDArray[np.float64]:
    """Counts above the offset of one channel of one field, in counts of the camera."""
    return tifffile.imread(screen / fields[f"File_{channel}"][row]).astype(float) / STEP - OFFSET


def labels(screen: Path, fields: Columns, row: int) -> NDArray[np.uint16]:
    return tifffile.imread(screen / "truth" / f"{fields['Field'][row]}.tif")


def each_field(screen: Path, fields: Columns, cells: Columns) -> Iterator[tuple[int, NDArray[np.uint16], Columns]]:
    """Row of each field, its labels, and the truth of its cells."""
    for row, name in enumerate(fields["Field"]):
        here = cells["Field"] == name
        yield row, labels(screen, fields, row), {key: column[here] for key, column in cells.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Files


def test_equal_settings_give_equal_folders_to_the_byte_and_another_seed_does_not(tmp_path: Path) -> None:
    one = Assay(num_plates=1, wells_per_class=1, seed=1)
    a, b = digests(small(tmp_path / "a", one)), digests(small(tmp_path / "b", one))
    assert a == b
    c = digests(small(tmp_path / "c", Assay(num_plates=1, wells_per_class=1, seed=2)))
    pictures = {name for name in a if name.startswith("Week1")}
    assert pictures
    assert not pictures & set(c)
    assert not {a[name] for name in pictures} & set(c.values())


def test_the_tables_have_the_genuine_header_quoting_and_line_ends(screen: Path) -> None:
    text = (screen / "BBBC021_v1_image.csv").read_bytes().decode()
    assert text.startswith(
        'TableNumber,ImageNumber,"Image_FileName_DAPI","Image_PathName_DAPI","Image_FileName_Tubulin",'
        '"Image_PathName_Tubulin","Image_FileName_Actin","Image_PathName_Actin","Image_Metadata_Plate_DAPI",'
        '"Image_Metadata_Well_DAPI",Replicate,"Image_Metadata_Compound",Image_Metadata_Concentration\n'
    )
    assert "\r" not in text
    guid = "[0-9A-F]{8}(-[0-9A-F]{4}){3}-[0-9A-F]{12}"
    files = ",".join(rf'"[A-H]\d\d_s\d_w{n}{guid}\.tif","Week1/Week1_\d+"' for n in (1, 2, 4))
    line = rf'\d+,\d+,{files},"Week1_\d+","[A-H]\d\d",\d,"[^"]+",\d+\.\d{{6}}'
    assert all(re.fullmatch(line, row) for row in text.splitlines()[1:])
    assert (screen / "BBBC021_v1_moa.csv").read_text().splitlines()[0] == '"compound",concentration,"moa"'


def test_every_row_names_three_files_and_every_file_is_in_a_row(screen: Path, fields: Columns) -> None:
    with (screen / "BBBC021_v1_image.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 3 * 2 == len(fields["Field"])
    for channel, stain in zip(DEFAULT_CHANNELS, ("DAPI", "Tubulin", "Actin"), strict=True):
        named = [f"{r[f'Image_PathName_{stain}']}/{r[f'Image_FileName_{stain}']}" for r in rows]
        assert named == fields[f"File_{channel}"].tolist()
        assert all((screen / name).is_file() for name in named)
    assert len(list(screen.glob("Week1/*/*.tif"))) == 3 * len(rows)
    for key, told in {"Plate_DAPI": "Plate", "Well_DAPI": "Well"}.items():
        assert [r[f"Image_Metadata_{key}"] for r in rows] == fields[f"Metadata_{told}"].tolist()
    assert [float(r["Image_Metadata_Concentration"]) for r in rows] == fields["Metadata_Concentration"].tolist()


def test_every_treatment_has_a_mechanism_and_a_line_among_the_compounds(screen: Path, fields: Columns) -> None:
    given = set(zip(fields["Metadata_Compound"], fields["Metadata_Concentration"], strict=True))
    with (screen / "BBBC021_v1_moa.csv").open(newline="") as file:
        moa = list(csv.DictReader(file))
    assert {(r["compound"], float(r["concentration"])) for r in moa} == given
    assert len(moa) == len(given) == 3 * 2 + 1
    assert {r["moa"] for r in moa if r["compound"] == CONTROL} == {CONTROL}
    with (screen / "BBBC021_v1_compound.csv").open(newline="") as file:
        assert [r["compound"] for r in csv.DictReader(file)] == sorted({name for name, _ in given})


def test_pixels_are_twelve_bits_in_steps_of_sixteen_above_the_offset(screen: Path, fields: Columns) -> None:
    for channel in DEFAULT_CHANNELS:
        raw = np.stack([tifffile.imread(screen / name) for name in fields[f"File_{channel}"]])
        assert raw.dtype == np.uint16
        assert raw.shape[1:] == SMALL["field_size"]
        assert not (raw % STEP).any()
        assert 0 < raw.min() < OFFSET * STEP + 400
        assert raw.max() == LIMIT * STEP


def test_any_channels_are_written_as_files_by_class(tmp_path: Path) -> None:
    settings = Assay(design="golgi", num_plates=1, wells_per_class=1)
    out = small(tmp_path / "golgi", settings, ("DNA", "Golgi"), layout="files", fields_per_well=1)
    names = sorted(str(PurePosixPath(p.relative_to(out))) for p in (out / "images").rglob("*.tif"))
    assert [n.split("/")[1] for n in names] == [CONTROL] * 2 + ["secretion inhibitor"] * 2
    assert {n.rsplit("_", 1)[1] for n in names} == {"DNA.tif", "Golgi.tif"}
    assert set(columns(out / "truth_fields.parquet")["File_Golgi"]) == {n for n in names if "Golgi" in n}


# ----------------------------------------------------------------------------------------------------------------------
# Truth


def test_a_cell_has_a_row_and_a_nucleus_its_label(screen: Path, fields: Columns, cells: Columns) -> None:
    assert len(cells["Cell"]) == len(fields["Field"]) * 12 == len(set(cells["Cell"].tolist()))
    for _, image_labels, mine in each_field(screen, fields, cells):
        areas = np.bincount(image_labels.ravel(), minlength=25)
        told = {}
        for k in (1, 2):
            told |= dict(zip(mine[f"Label_{k}"].tolist(), mine[f"Area_{k}"].tolist(), strict=True))
        told.pop(0, None)
        assert told == {int(v): int(areas[v]) for v in np.unique(image_labels) if v}


def test_a_nucleus_lies_where_it_is_said_to(screen: Path, fields: Columns, cells: Columns) -> None:
    """The middle of each label is the truth to a fraction of a pixel, and DNA is bright in labels and dark beside."""
    height, width = SMALL["field_size"]  # type: ignore[misc]
    for row, image_labels, mine in each_field(screen, fields, cells):
        for k in (1, 2):
            y, x, label = mine[f"y_{k}"], mine[f"x_{k}"], mine[f"Label_{k}"]
            whole = (label > 0) & (y > 12) & (y < height - 13) & (x > 12) & (x < width - 13)
            found = np.array(ndimage.center_of_mass(image_labels > 0, image_labels, label[whole])).reshape(-1, 2)
            assert np.abs(found - np.stack([y, x], 1)[whole]).max(initial=0) < 0.01
        if not fields["Out_of_focus"][row] and not fields["Debris"][row]:
            dna, inside = image(screen, fields, row), image_labels > 0
            beside = ~ndimage.binary_dilation(inside, iterations=3)
            assert np.quantile(dna[inside], 0.1) > 3 * np.quantile(dna[beside], 0.9)


def test_cells_overlap_often_but_nuclei_of_two_cells_never_meet(screen: Path, fields: Columns, cells: Columns) -> None:
    assert 0.3 < cells["Touches"].mean() < 0.95
    near = 0
    for _, image_labels, _ in each_field(screen, fields, cells):
        owner = (image_labels.astype(int) + 1) // 2  # the cell, numbered from 1
        for axis in (0, 1):
            a, b = np.moveaxis(owner, axis, 0)[:-1], np.moveaxis(owner, axis, 0)[1:]
            assert not ((a > 0) & (b > 0) & (a != b)).any()
        grown = ndimage.maximum_filter(owner, 5)
        near += int(((owner > 0) & (grown != owner)).any())
    assert near > len(fields["Field"]) / 4  # but some come within two pixels


def test_a_cell_that_touches_none_stands_alone(screen: Path, fields: Columns, cells: Columns) -> None:
    """Nearest neighbours of touching cells are nearer than those of others."""
    distance = np.full(len(cells["Cell"]), np.inf)
    for name in fields["Field"]:
        here = np.flatnonzero(cells["Field"] == name)
        at = np.stack([cells["y"][here], cells["x"][here]], 1)
        apart = np.hypot(*(at[:, None] - at[None]).transpose(2, 0, 1)) + 1e9 * np.eye(len(here))
        distance[here] = apart.min(axis=1)
    assert np.median(distance[cells["Touches"]]) + 5 < np.median(distance[~cells["Touches"]])


def test_a_border_cell_is_one_whose_crop_leaves_the_field(cells: Columns) -> None:
    height, width = SMALL["field_size"]  # type: ignore[misc]
    y, x, half = np.floor(cells["y"] + 0.5), np.floor(cells["x"] + 0.5), 16
    leaves = (y < half) | (x < half) | (y + half > height) | (x + half > width)
    assert (leaves == cells["Border"]).all()
    assert 0.1 < leaves.mean() < 0.7


def test_factors_are_what_pixels_show(cells: Columns) -> None:
    assert {f"Factor_{name}" for name in FACTORS} <= set(cells)
    assert set(cells["Factor_nucleus_count"]) == {1.0, 2.0}
    assert (cells["Nuclei"] <= cells["Factor_nucleus_count"]).all()
    single = (cells["Factor_nucleus_count"] == 1) & ~cells["Border"]
    area = np.log(cells["Area_1"][single])
    assert np.corrcoef(area, cells["Factor_nucleus_area"][single])[0, 1] > 0.95


def test_factors_show_in_a_field_as_in_an_image_of_one_cell(screen: Path, fields: Columns, cells: Columns) -> None:
    """Tubulin around a nucleus rises with the density of microtubules, and with no factor of another channel."""
    light, score = [], []
    fine = ~(
        cells["Border"] | cells["Touches"] | cells["Saturated"] | cells["Out_of_focus"] | (cells["Debris_share"] > 0)
    )
    for row, name in enumerate(fields["Field"]):
        tubulin = image(screen, fields, row, "tubulin")
        for i in np.flatnonzero((cells["Field"] == name) & fine):
            y, x = np.rint([cells["y"][i], cells["x"][i]]).astype(int)
            light.append(np.log(tubulin[y - 6 : y + 7, x - 6 : x + 7].mean()))
            score.append(
                [cells[f"Factor_{f}"][i] for f in ("microtubule_density", "chromatin_texture", "actin_fibres")]
            )
    assert len(light) > 60
    correlation = np.corrcoef(light, np.array(score).T)[0, 1:]
    assert correlation[0] > 0.7
    assert np.abs(correlation[1:]).max() < 0.35


def test_what_spoils_a_cell_tells_nothing_of_its_factors(cells: Columns) -> None:
    names = [f"Factor_{name}" for name in visible_factors(DEFAULT_CHANNELS)]
    control = cells["Metadata_Compound"] == CONTROL
    factors = np.stack([cells[name][control] for name in names])
    nuisance = [cells[n][control].astype(float) for n in ("y", "x", "Saturated", "Debris_share", "Out_of_focus")]
    correlation = np.corrcoef(factors, np.stack(nuisance))[: len(names), len(names) :]
    assert np.abs(correlation).max() < 4.5 / np.sqrt(control.sum())


def test_what_spoils_a_field_is_the_same_whatever_the_treatments_do(
    screen: Path, fields: Columns, cells: Columns, tmp_path: Path
) -> None:
    other = replace(SCREEN, treatments={name: {"nucleus_area": 3.0, "cytoplasm_area": 2.0} for name in "abc"})
    moved = small(tmp_path / "other", other, **DEFECTS)
    their_fields, their_cells = columns(moved / "truth_fields.parquet"), columns(moved / "truth.parquet")
    assert (their_cells["Factor_nucleus_area"] != cells["Factor_nucleus_area"]).mean() > 0.5
    for name in ("Out_of_focus", "Blur", "Focus", "Background", "Debris", "Saturated_cells"):
        assert (their_fields[name] == fields[name]).all(), name
    assert their_fields["Debris_x"].tolist() == fields["Debris_x"].tolist()
    assert (their_cells["Saturated_channel"] == cells["Saturated_channel"]).all()


# ----------------------------------------------------------------------------------------------------------------------
# Defects


def test_the_mean_field_of_a_plate_is_its_light(tmp_path: Path) -> None:
    settings = Assay(design="null", num_plates=2, wells_per_class=2, seed=3)
    out = small(tmp_path / "lit", settings, fields_per_well=6, shading=0.6, debris_per_field=0.0, saturated=0.0)
    fields = columns(out / "truth_fields.parquet")
    match = np.zeros((2, 2))
    for channel in DEFAULT_CHANNELS:
        lights = [illumination(3, plate, channel, SMALL["field_size"], 0.6) for plate in (0, 1)]  # type: ignore[arg-type]
        for i, name in enumerate(("Week1_20001", "Week1_20002")):
            saved = np.load(out / "truth" / f"light_{name}.npy")[DEFAULT_CHANNELS.index(channel)]
            assert (saved == lights[i]).all()
            assert saved.mean() == pytest.approx(1, abs=1e-4)
            assert np.ptp(saved) == pytest.approx(0.6, abs=1e-4)
            rows = np.flatnonzero(fields["Metadata_Plate"] == name)
            ground = np.median([image(out, fields, row, channel) for row in rows], axis=0)
            match[i] = [np.corrcoef(ndimage.uniform_filter(ground, 9).ravel(), x.ravel())[0, 1] for x in lights]
        assert (match.argmax(axis=1) == (0, 1)).all(), channel
        assert match.diagonal().min() > 0.6, channel


def test_without_shading_the_light_is_even() -> None:
    assert (illumination(0, 0, "DNA", (64, 80), 0.0) == 1).all()


def test_fields_out_of_focus_are_blurred_and_others_are_not(tmp_path: Path) -> None:
    settings = Assay(design="null", num_plates=1, wells_per_class=4, seed=2)
    out = small(tmp_path / "blurred", settings, out_of_focus=0.4, debris_per_field=0.0, saturated=0.0)
    fields = columns(out / "truth_fields.parquet")

    def sharpness(row: int) -> float:
        smooth = ndimage.gaussian_filter(image(out, fields, row, "tubulin"), 1.0)
        return float(np.hypot(*np.gradient(smooth)).max() / np.ptp(smooth))

    sharp, blurred = np.array([sharpness(row) for row in range(16)]), fields["Out_of_focus"]
    assert 3 <= blurred.sum() <= 13
    assert 1.5 * sharp[blurred].max() < sharp[~blurred].min()
    assert ((fields["Blur"] > 0) == blurred).all()


def test_debris_outshines_every_nucleus_at_the_places_told(screen: Path, fields: Columns) -> None:
    height, width = SMALL["field_size"]  # type: ignore[misc]
    ratios = []
    for row in np.flatnonzero(~fields["Out_of_focus"].astype(bool)):
        dna, nuclei = image(screen, fields, row), labels(screen, fields, row) > 0
        assert len(fields["Debris_y"][row]) == fields["Debris"][row] == len(fields["Debris_radius"][row])
        for y, x, radius in zip(*(fields[f"Debris_{k}"][row] for k in ("y", "x", "radius")), strict=True):
            if min(y, x, height - y, width - x) > radius > 0:
                window = dna[int(y - radius) : int(y + radius) + 1, int(x - radius) : int(x + radius) + 1]
                ratios.append(window.max() / np.median(dna[nuclei]))
    assert len(ratios) > 10
    assert np.min(ratios) > 2


def test_saturated_cells_reach_the_limit(cells: Columns) -> None:
    hit = cells["Saturated"] & ~cells["Border"] & ~cells["Out_of_focus"]
    assert hit.sum() >= 5
    assert cells["Saturated_share"][hit].min() > 0.02
    assert set(cells["Saturated_channel"][~cells["Saturated"]]) == {""}
    assert set(cells["Saturated_channel"][cells["Saturated"]]) == set(DEFAULT_CHANNELS)


def test_defects_can_be_switched_off(tmp_path: Path) -> None:
    none = {"shading": 0.0, "out_of_focus": 0.0, "debris_per_field": 0.0, "saturated": 0.0}
    out = small(tmp_path / "clean", Assay(num_plates=1, wells_per_class=1), **none)
    cells, fields = columns(out / "truth.parquet"), columns(out / "truth_fields.parquet")
    for name in ("Saturated", "Saturated_share", "Debris_share", "Debris_on_nucleus", "Out_of_focus"):
        assert not cells[name].any(), name
    assert max(image(out, fields, row, c).max() for row in range(4) for c in DEFAULT_CHANNELS) < 0.5 * LIMIT


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


def test_an_output_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UserError, match="isn't an empty folder"):
        small(tmp_path)
    with pytest.raises(UserError, match="isn't an empty folder"):
        small(tmp_path / "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    small(tmp_path / "empty", Assay(num_plates=1, wells_per_class=1))
    assert (tmp_path / "empty" / "truth.parquet").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def full(path: Path, *_: object, **__: object) -> None:
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(b"image")

    monkeypatch.setattr(simulate.tifffile, "imwrite", full)
    with pytest.raises(UserError, match="the disk is full.*GB"):
        small(tmp_path / "out", Assay(num_plates=1, wells_per_class=1))
    assert list(tmp_path.iterdir()) == []


def test_a_screen_larger_than_the_disk_is_refused_before_it_is_begun(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs .* GB, and .* has .* GB left"):
        small(tmp_path / "out", field_size=(1_000_000, 1_000_000))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_simulation_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_every_field(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    small(
        tmp_path / "out",
        Assay(num_plates=1, wells_per_class=1),
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(k, 4) for k in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"channels": ("DNA", "Golgi")}, "DNA, tubulin, actin, not DNA, Golgi.*'files'"),
        ({"layout": "bbbc21"}, "'bbbc21'.*did you mean 'bbbc021'"),
        ({"cell_size": 16}, "cell_size.*32 to 128.*16"),
        ({"field_size": (50, 200)}, "50 x 200.*cell_size = 32"),
        ({"cells_per_field": 31}, "cells_per_field must be 1 to 30.*31"),
        ({"fields_per_well": 0}, "fields_per_well.*got 0"),
        ({"shading": 1.5}, "shading.*1.5"),
        ({"debris_per_field": -1.0}, "debris_per_field.*-1"),
        ({"saturated": float("nan")}, "saturated.*nan"),
        ({"settings": Assay(wells_per_class=60, num_plates=1)}, "120 wells.*96.*wells_per_class"),
        ({"settings": Assay(treatments={"a/b": {}}), "layout": "files"}, "'a/b'.*folder.*assay.treatments"),
    ],
)
def test_an_impossible_screen_is_refused_with_what_is_possible(
    settings: dict[str, object], told: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        small(tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
