"""Screens of every layout become the same list of images: pixels, channels, metadata and classes as they lie there."""

import gzip
import json
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
import zarr
from numpy.typing import NDArray

from diffex.config import Assay, Data
from diffex.errors import UserError
from diffex.layouts import detect, open_screen, open_source
from diffex.patterns import auto_pattern
from diffex.screen import Read
from diffex.sources import Listed

RNG = np.random.default_rng(0)


def plane(*shape: int) -> NDArray:
    return RNG.integers(0, 60000, shape or (8, 10), dtype=np.uint16)


def tif(path: Path, image: NDArray | None = None, **how: Any) -> NDArray:
    """Write a TIFF and return what it shows."""
    image = plane() if image is None else image
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, image, **{"photometric": "minisblack", **how})
    return image


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def image(source: Listed, row: int) -> NDArray:
    """Pixels of a row, read by a copy that has travelled to a worker."""
    return next(iter(pickle.loads(pickle.dumps(source)).images([row], 0)))[1]


def row_of(source: Listed, **labels: str) -> int:
    rows = [
        i for i in range(len(source.class_names))
        if all(str(source.metadata[f"Metadata_{n}"][i]) == v for n, v in labels.items())
    ]  # fmt: skip
    assert len(rows) == 1, f"{len(rows)} rows with {labels}"
    return rows[0]


def refused(told: str, path: Path, **read: Any) -> str:
    """Opening, or else reading all images, ends in one line that matches."""
    with pytest.raises(UserError, match=told) as error:
        source = open_screen(path, Read(**read))
        list(source.images(range(len(source.class_names)), 0))
    assert "\n" not in str(error.value)
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# BBBC021

FIELDS = [  # plate, well, site, compound, dose, moa
    ("Week1_22123", "C02", 1, "DMSO", 0.0, "DMSO"),
    ("Week1_22123", "C02", 2, "DMSO", 0.0, "DMSO"),
    ("Week1_22123", "D05", 1, "taxol", 0.0003, "Microtubule stabilizers"),
    ("Week4_27481", "G10", 1, "5-fluorouracil", 0.003, ""),
    ("Week4_27481", "G11", 1, 'odd, "name"', 10.0, "Actin disruptors"),
]
STAINS = {"DAPI": "w1", "Tubulin": "w2", "Actin": "w4"}


def name_of(field: tuple[Any, ...], stain: str) -> str:
    plate, well, site = field[:3]
    return f"{plate[:5]}_150607_{well}_s{site}_{STAINS[stain]}E54F0108-F44A-4F6E-9637-6A9DE80F08{len(well)}{site}.tif"


def bbbc021_tables(folder: Path, variant: str = "quoted") -> None:
    """The tables of a small screen in one of the textual forms in which they go round."""
    quote = (lambda v: f'"{v}"'.replace('""', '"')) if variant == "quoted" else str
    quoted = lambda v: '"' + v.replace('"', '""') + '"' if "," in v or variant == "quoted" else v
    dose = (lambda v: f"{v:.6f}") if variant == "quoted" else (lambda v: f"{v:g}".replace("0.0003", "3e-4"))
    header = ["TableNumber", "ImageNumber"]
    for stain in STAINS:
        header += [f"Image_FileName_{stain}", f"Image_PathName_{stain}"]
    header += ["Image_Metadata_Plate_DAPI", "Image_Metadata_Well_DAPI", "Replicate", "Image_Metadata_Compound"]
    header += ["Image_Metadata_Concentration"]
    if variant == "bare":
        header = [h.removeprefix("Image_") for h in header]
    lines = [",".join(map(quote, header))]
    for i, f in enumerate(FIELDS):
        files = [v for stain in STAINS for v in (name_of(f, stain), f"{f[0][:5]}/{f[0]}")]
        lines.append(
            ",".join(["4", str(i), *map(quoted, files), *map(quoted, (f[0], f[1])), "1", quoted(f[3]), dose(f[4])])
        )
    end = {"quoted": "\n", "bare": "\r\n"}.get(variant, "\r")
    image_table = (end.join(lines) + end).encode("utf-8-sig" if variant == "bare" else "utf-8")
    moa = [*sorted({(f[3], f[4], f[5]) for f in FIELDS if f[5]}), ("unused", 1.0, "Epithelial")]
    moa_lines = ["compound,concentration,moa", *(f"{quoted(c)},{dose(d)},{quoted(m)}" for c, d, m in moa)]
    moa_table = (end.join(moa_lines) + end).encode()
    folder.mkdir(parents=True, exist_ok=True)
    if variant == "packed":
        (folder / "BBBC021_v1_image.unquoted.csv.gz").write_bytes(gzip.compress(image_table))
        (folder / "bbbc021_v1_MOA.cr-line-ends.CSV").write_bytes(moa_table)
    else:
        (folder / "BBBC021_v1_image.csv").write_bytes(image_table)
        (folder / "BBBC021_v1_moa.csv").write_bytes(moa_table)


@pytest.fixture
def bbbc021(tmp_path: Path) -> Path:
    bbbc021_tables(tmp_path / "screen")
    for f in FIELDS:
        for stain in STAINS:
            tif(tmp_path / "screen" / f[0][:5] / f[0] / name_of(f, stain))
    return tmp_path / "screen"


def test_bbbc021_is_found_and_read_with_its_channels_and_classes(bbbc021: Path) -> None:
    source = open_screen(bbbc021, Read())
    assert (source.content, source.channels) == ("fields", ("DNA", "tubulin", "actin"))
    assert source.class_names.tolist() == [f[5] for f in FIELDS]
    for name, k in {"Plate": 0, "Well": 1, "Compound": 3, "Concentration": 4, "MOA": 5}.items():
        assert source.metadata[f"Metadata_{name}"].tolist() == [f[k] for f in FIELDS]
    assert source.metadata["Metadata_Site"].tolist() == [str(f[2]) for f in FIELDS]
    assert source.metadata["Metadata_Week"].tolist() == [f[0][:5] for f in FIELDS]
    assert source.metadata["Metadata_Replicate"].tolist() == [1] * 5
    folder = bbbc021 / "Week1" / "Week1_22123"
    wanted = [tifffile.imread(folder / name_of(FIELDS[2], stain)) for stain in STAINS]
    assert (image(source, 2) == np.stack(wanted, axis=2)).all()
    assert set(source.files()) == {p for p in bbbc021.rglob("*") if p.is_file()}


@pytest.mark.parametrize("variant", ["bare", "packed"])
def test_every_textual_form_of_bbbc021s_tables_gives_the_same_table(bbbc021: Path, variant: str) -> None:
    first = open_screen(bbbc021, Read())
    for table in bbbc021.glob("*.csv"):
        table.unlink()
    bbbc021_tables(bbbc021, variant)
    second = open_screen(bbbc021, Read())
    assert list(first.metadata) == list(second.metadata)
    for name, column in first.metadata.items():
        assert column.dtype == second.metadata[name].dtype
        assert column.tolist() == second.metadata[name].tolist()
    assert first.class_names.tolist() == second.class_names.tolist()


def test_structures_join_where_the_compound_table_is_there(bbbc021: Path) -> None:
    text(bbbc021 / "BBBC021_v1_compound.csv", "compound,smiles\ntaxol,CC1=C2\n")
    smiles = open_screen(bbbc021, Read()).metadata["Metadata_SMILES"].tolist()
    assert smiles == ["", "", "CC1=C2", "", ""]


def test_plates_that_are_not_there_are_left_out_with_a_note(bbbc021: Path) -> None:
    shutil.rmtree(bbbc021 / "Week1")
    (bbbc021 / "Week4").rename(bbbc021 / "moved")
    (bbbc021 / "images").mkdir()
    (bbbc021 / "moved").rename(bbbc021 / "images" / "Week4")
    source = open_screen(bbbc021, Read())
    assert set(source.metadata["Metadata_Plate"]) == {"Week4_27481"}
    assert "3 of 5 images are left out" in source.notes[0]
    assert image(source, 1).shape == (8, 10, 3)
    shutil.rmtree(bbbc021 / "images")
    refused("none of the files.*read.root", bbbc021)


def test_a_missing_channel_matters_only_where_it_is_read(bbbc021: Path) -> None:
    file = bbbc021 / "Week1" / "Week1_22123" / name_of(FIELDS[1], "Actin")
    file.unlink()
    assert file.name in refused("no such file", bbbc021)
    source = open_screen(bbbc021, Read(channels=("tubulin", "DNA")))
    assert source.channels == ("tubulin", "DNA")
    two = [tifffile.imread(file.parent / name_of(FIELDS[1], stain)) for stain in ("Tubulin", "DAPI")]
    assert (image(source, 1) == np.stack(two, axis=2)).all()


def test_channels_of_different_size_or_type_are_named(bbbc021: Path) -> None:
    file = bbbc021 / "Week1" / "Week1_22123" / name_of(FIELDS[1], "Actin")
    tif(file, plane(8, 9))
    assert file.name in refused("differ in size: 8 x 9 and 8 x 10", bbbc021)
    tif(file, plane().astype(np.uint8))
    assert file.name in refused("has uint8 pixels, but .* has uint16", bbbc021)
    tif(file, plane(3, 8, 10))
    assert file.name in refused("holds 3 channels where a file for each channel is expected", bbbc021)
    tif(file, np.stack([plane().astype(np.uint16)] * 3, axis=2), photometric="rgb")  # grey, saved as colour
    assert image(open_screen(bbbc021, Read()), 1).shape == (8, 10, 3)


def test_rows_that_repeat_are_read_once_and_rows_that_contradict_are_refused(bbbc021: Path) -> None:
    table = bbbc021 / "BBBC021_v1_image.csv"
    lines = table.read_text().splitlines()
    text(table, "\n".join([*lines, lines[1]]) + "\n")
    source = open_screen(bbbc021, Read())
    assert len(source.class_names) == 5
    assert "1 rows say the same" in source.notes[0]
    text(table, "\n".join([*lines, lines[1].replace("DMSO", "taxol")]) + "\n")
    refused("row 7 contradicts row 2: Metadata_Compound", bbbc021)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("Image_FileName_Actin", "Image_FileName_Aktin", "no column 'FileName_Actin': did you mean"),
        ("Image_Metadata_Compound", "Treatment", "no column 'Image_Metadata_Compound'"),
        ("0.003000", "some", "row 5: concentration 'some' is not a number"),
        ("Week4/Week4_27481", "../Week4_27481", "row 5: .*leads out of"),
        ("Week4/Week4_27481", "/data/Week4_27481", "row 5: .*leads out of"),
    ],
)
def test_a_bad_image_table_is_refused_by_row_and_column(bbbc021: Path, old: str, new: str, told: str) -> None:
    table = bbbc021 / "BBBC021_v1_image.csv"
    text(table, table.read_text().replace(old, new))
    assert "BBBC021_v1_image.csv" in refused(told, bbbc021)


def test_an_experiment_sends_fields_to_the_ingest(bbbc021: Path) -> None:
    with pytest.raises(UserError, match="fields of many cells: .*diffex data ingest"):
        open_source(Data(path=str(bbbc021)), Assay())


@pytest.mark.parametrize("packed", [False, True])
def test_crops_take_their_metadata_from_the_image_table_by_the_name_of_the_field(bbbc021: Path, packed: bool) -> None:
    crops = bbbc021.parent / "crops"
    crops.mkdir()
    for f in FIELDS[:4]:
        for cell in (3, 12):
            np.save(crops / f"{Path(name_of(f, 'DAPI')).stem}_{cell}.npy", plane(6, 6, 3))
    if packed:
        with zipfile.ZipFile(bbbc021.parent / "crops.zip", "w") as archive:
            for file in crops.iterdir():
                archive.write(file, file.name)
    read = Read(
        layout="files", table=str(bbbc021 / "BBBC021_v1_image.csv"), pattern=r"(?P<Key>.+)_(?P<Cell>\d+)\.npy$",
        join=(str(bbbc021 / "BBBC021_v1_moa.csv"),), class_column="moa", channel_names=("DNA", "actin", "tubulin"),
    )  # fmt: skip
    source = open_screen(crops.with_suffix(".zip") if packed else crops, read)
    assert (source.content, source.channels) == ("cells", ("DNA", "actin", "tubulin"))
    assert sorted(source.class_names.tolist()) == ["", "", *["DMSO"] * 4, *["Microtubule stabilizers"] * 2]
    row = row_of(source, Plate="Week1_22123", Well="D05", Cell="12")
    assert (image(source, row) == np.load(crops / f"{Path(name_of(FIELDS[2], 'DAPI')).stem}_12.npy")).all()


# ----------------------------------------------------------------------------------------------------------------------
# load_data.csv


def load_data(folder: Path, prefix: str = "", urls: bool = False, plate: str = "BR1") -> Path:
    """A plate of Cell Painting: two wells, channels DNA and ER, and the table as the pipeline keeps it."""
    lines = []
    for well, compound in (("A01", "DMSO"), ("A02", "drug")):
        files = {c: f"{plate}/Images/{well}-{c}.tiff" for c in ("DNA", "ER")}
        for file in files.values():
            tif(folder / file)
        cells = [f"{prefix}{f}" for f in files.values()]
        cells = cells if urls else [v for c in cells for v in (Path(c).name, str(Path(c).parent))]
        lines.append(",".join([*cells, "illum.npy", "/illum", plate, well, compound]))
    columns = ["URL_OrigDNA", "URL_OrigER"]
    if not urls:
        columns = ["FileName_OrigDNA", "PathName_OrigDNA", "FileName_OrigER", "PathName_OrigER"]
    columns += ["FileName_IllumDNA", "PathName_IllumDNA", "Metadata_Plate", "Metadata_Well", "Metadata_Compound"]
    return text(folder / f"load_data/{plate}/load_data_with_illum.csv", "\n".join([",".join(columns), *lines]) + "\n")


def test_load_data_names_channels_and_metadata_and_leaves_out_illumination(tmp_path: Path) -> None:
    load_data(tmp_path)
    load_data(tmp_path, plate="BR2")
    source = open_screen(tmp_path, Read())
    assert (source.content, source.channels) == ("fields", ("DNA", "ER"))
    assert source.class_names.tolist() == ["DMSO", "drug"] * 2
    assert source.metadata["Metadata_Plate"].tolist() == ["BR1", "BR1", "BR2", "BR2"]
    row = row_of(source, Plate="BR2", Well="A02")
    assert (image(source, row)[..., 1] == tifffile.imread(tmp_path / "BR2/Images/A02-ER.tiff")).all()


def test_a_column_that_one_plate_lacks_is_empty_there_and_keeps_its_type(tmp_path: Path) -> None:
    table = load_data(tmp_path)
    text(table, table.read_text().replace("FileName_IllumDNA", "Metadata_Dose").replace("illum.npy", "1.5"))
    load_data(tmp_path, plate="BR2")
    dose = open_screen(tmp_path, Read()).metadata["Metadata_Dose"]
    assert dose[:2].tolist() == [1.5, 1.5]
    assert np.isnan(dose[2:]).all()


def test_load_data_may_be_packed_or_parquet_and_be_named_itself(tmp_path: Path) -> None:
    table = load_data(tmp_path)
    plain = open_screen(table, Read(root=str(tmp_path)))
    packed = table.with_name("load_data.csv.gz")
    packed.write_bytes(gzip.compress(table.read_bytes()))
    rows = [line.split(",") for line in table.read_text().splitlines()]
    parquet = table.with_name("load_data.parquet")
    pq.write_table(pa.table(dict(zip(rows[0], map(list, zip(*rows[1:], strict=True)), strict=True))), parquet)
    for file in (packed, parquet):
        other = open_screen(file, Read(root=str(tmp_path)))
        assert {n: c.tolist() for n, c in other.metadata.items()} == {n: c.tolist() for n, c in plain.metadata.items()}


@pytest.mark.parametrize("urls", [False, True])
@pytest.mark.parametrize("prefix", ["/home/ubuntu/bucket/batch/", "s3://gallery/cpg0016/batch/"])
def test_paths_from_elsewhere_are_refused_until_their_beginning_is_stripped(
    tmp_path: Path, urls: bool, prefix: str
) -> None:
    load_data(tmp_path, prefix if urls or prefix[0] == "/" else "/elsewhere/batch/", urls)
    message = refused("perhaps --set read.strip=", tmp_path)
    strip = message.split("read.strip='")[1].split("'")[0]
    source = open_screen(tmp_path, Read(strip=strip))
    assert image(source, 1).shape == (8, 10, 2)


def test_the_class_of_load_data_is_never_guessed_between_two_columns(tmp_path: Path) -> None:
    table = load_data(tmp_path)
    text(table, table.read_text().replace("Metadata_Well", "Metadata_gene"))
    assert "Metadata_Compound" in refused("which column is the class.*read.class_column", tmp_path)
    assert open_screen(tmp_path, Read(class_column="gene")).class_names.tolist() == ["A01", "A02"]
    refused("no column 'Kompound': did you mean 'Compound'", tmp_path, class_column="Kompound")


def test_a_plate_map_joins_load_data(tmp_path: Path) -> None:
    load_data(tmp_path)
    table = text(tmp_path / "map.tsv", "Metadata_Well\tdose\ttarget\na1\t0\t\nA02\t1.5\tTUBB\n")
    source = open_screen(tmp_path, Read(join=(str(table),), class_column="target"))
    assert source.metadata["Metadata_Dose"].tolist() == [0.0, 1.5]
    assert source.class_names.tolist() == ["", "TUBB"]
    assert table in source.files()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("FileName_Orig", "Name_", "no columns FileName_"),
        ("FileName_IllumDNA,PathName_IllumDNA", "Frame_OrigDNA,x", "'Frame_OrigDNA' picks planes"),
        ("BR1/Images", "../BR1", "row 2: .*leads out of"),
        ("A01-DNA.tiff,BR1/Images,A01-ER.tiff", ",BR1/Images,", "row 2 names no image file"),
    ],
)
def test_a_bad_load_data_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    table = load_data(tmp_path)
    text(table, table.read_text().replace(old, new))
    refused(told, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Names that follow a pattern

NAMES = {
    "ImageXpress": (
        "{plate}/x_{well}_s{site}_{c}6F89C55C-7808-4136-82E4-E066F8E3CB{n}.tif", ("w1", "w2"),
        {"A01": "A01", "B12": "B12"},
    ),
    "Harmony": (
        "{plate}/Images/r{well}f0{site}p01-{c}sk1fk1fl1.tiff", ("ch1", "ch2"), {"A01": "01c01", "B12": "02c12"}
    ),
    "InCell": (
        "{plate}/{well}(fld {site} wv {c} - {c}).tif", ("DAPI", "FITC"), {"A01": "A - 01", "B12": "B - 12"}
    ),
    "names of one's own": ("exported/{plate}_{well}_s{site}_{c}.tif", ("DNA", "actin"), {"A01": "A01", "B12": "B12"}),
}  # fmt: skip


@pytest.mark.parametrize("microscope", NAMES)
def test_a_microscopes_files_are_grouped_by_plate_well_and_site(tmp_path: Path, microscope: str) -> None:
    pattern, channels, wells = NAMES[microscope]
    written = {}
    for plate in ("P1", "P2"):
        for k, (well, coded) in enumerate(wells.items()):
            for site in "12":
                for c in channels:
                    name = pattern.format(plate=plate, well=coded, site=site, c=c, n=f"{k}{c[-1]}")
                    written[plate, well, site, c] = tif(tmp_path / name)
    text(
        tmp_path / "map.csv",
        "Plate,Well,Compound\n" + "".join(f"{p},{w},{w[0]}\n" for p in ("P1", "P2") for w in wells),
    )
    read = Read(join=(str(tmp_path / "map.csv"),), class_column="Compound")
    source = open_screen(tmp_path, read)
    assert (source.content, source.channels) == ("fields", channels)
    assert len(source.class_names) == 8
    for plate, well, site in {k[:3] for k in written}:
        row = row_of(source, Plate=plate, Well=well, Site=site.zfill(len(str(source.metadata["Metadata_Site"][0]))))
        assert (image(source, row) == np.stack([written[plate, well, site, c] for c in channels], axis=2)).all()
        assert source.class_names[row] == well[0]


@pytest.mark.parametrize(
    "form", ["{kind}/{c}/{n}.tif", "{c}/{kind}/{n}.tif", "{kind}/{n}_{c}.tif", "{kind}/{n}-{c}.TIF"]
)
def test_a_golgi_folder_pairs_green_and_blue(tmp_path: Path, form: str) -> None:
    written = {
        (kind, n, c): tif(tmp_path / form.format(kind=kind, n=n, c=c))
        for kind in ("dispersed", "compact") for n in ("cell1", "cell2") for c in ("green", "blue")
    }  # fmt: skip
    (tmp_path / "Thumbs.db").touch()
    source = open_screen(tmp_path, Read())
    assert (source.channels, source.content) == (("blue", "green"), "cells")
    assert sorted(source.class_names.tolist()) == ["compact"] * 2 + ["dispersed"] * 2
    for row, kind in enumerate(source.class_names):
        pair = image(source, row)
        assert any(
            (pair == np.stack([written[kind, n, c] for c in ("blue", "green")], 2)).all() for n in ("cell1", "cell2")
        )
    assert open_screen(tmp_path, Read(channels=("green",))).channels == ("green",)


def test_groups_of_the_users_own_pattern_are_class_and_metadata(tmp_path: Path) -> None:
    for donor in ("d1", "d2"):
        for c in ("488", "405"):
            tif(tmp_path / f"{donor}-{'ill' if donor == 'd1' else 'well'}-{c}nm.tif")
    read = Read(pattern=r"^(?P<Donor>\w+)-(?P<Class>\w+)-(?P<Channel>\d+)nm")
    source = open_screen(tmp_path, read)
    assert source.channels == ("405", "488")
    assert source.class_names.tolist() == ["ill", "well"]
    assert source.metadata["Metadata_Donor"].tolist() == ["d1", "d2"]


def test_an_image_without_one_of_its_channels_is_named_before_anything_is_read(tmp_path: Path) -> None:
    for kind in "ab":
        for n in "123":
            for c in ("green", "blue"):
                tif(tmp_path / kind / f"{n}_{c}.tif")
    (tmp_path / "a" / "2_green.tif").unlink()
    assert "a/2_blue.tif" in refused("no file for channel 'green'", tmp_path)
    assert len(open_screen(tmp_path, Read(channels=("blue",))).class_names) == 6


def test_focal_planes_are_projected(tmp_path: Path) -> None:
    stack = [tif(tmp_path / "P" / f"r01c01f01p{z:02d}-ch1sk1fk1fl1.tiff") for z in (1, 2, 10)]
    text(tmp_path / "map.csv", "Well,Class\nA01,x\n")
    for how, wanted in {
        "max": np.max(stack, 0), "mean": np.rint(np.mean(stack, 0)).astype(np.uint16), "middle": stack[1]
    }.items():  # fmt: skip
        read = Read(layout="files", join=(str(tmp_path / "map.csv"),), projection=how)
        assert (image(open_screen(tmp_path, read), 0)[..., 0] == wanted).all()


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        (r"(?P<Channel>\d", "no regular expression"),
        (r"(?P<Channel>z\d)", "fits no file"),
        (r"(?P<Kind>x)_(?P<Channel>c\d)", "are the same channel of the same image"),
    ],
)
def test_a_pattern_that_does_not_fit_is_refused(tmp_path: Path, pattern: str, told: str) -> None:
    for n in "12":
        tif(tmp_path / "a" / f"x_c1_{n}.tif")
    refused(f"{told}|read.pattern.*{told}", tmp_path, pattern=pattern)


def test_class_folders_of_whole_images_are_no_channels(tmp_path: Path) -> None:
    for kind in ("red", "blue", "a"):
        tif(tmp_path / kind / f"{kind}_1.tif")
    assert detect(tmp_path, Read()) == "folder"
    assert auto_pattern(["a/cell_w1.tif", "a/cell_w2.tif", "b/cell 9.tif"]) is None
    assert open_screen(tmp_path, Read()).class_names.tolist() == ["a", "blue", "red"]


# ----------------------------------------------------------------------------------------------------------------------
# Folders with a table of attributes


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """FFHQ: numbered images in folders by the thousand."""
    for i in (0, 1, 2, 1000):
        tif(tmp_path / "images1024x1024" / f"{i // 1000:02d}000" / f"{i:05d}.tif", plane(8, 8, 3), photometric="rgb")
    return tmp_path / "images1024x1024"


@pytest.mark.parametrize("keys", ["{i}", "{i:05d}", "{i:05d}.tif", "00000/{i:05d}.TIF", "C:\\x\\{i:05d}.tif"])
def test_attributes_find_their_image_by_number_stem_or_name(faces: Path, keys: str) -> None:
    rows = "".join(
        f"{20 + i % 7},{keys.format(i=i).replace('00000/01', '01000/01')},{'FM'[i % 2]}\n" for i in (1000, 2, 1, 0, 77)
    )
    table = text(faces.parent / "labels.csv", f"age,image,gender\n{rows}")
    source = open_screen(faces, Read(table=str(table), class_column="Gender"))
    assert source.class_names.tolist() == ["F", "M", "F", "F"]
    assert source.metadata["Metadata_Age"].tolist() == [20, 21, 22, 26]
    assert image(source, 3).shape == (8, 8, 3)
    assert open_screen(faces, Read(table=str(table), class_column="gender", key="image")).class_names.tolist() == list(
        "FMFF"
    )


def test_attributes_of_celeba_are_read_as_they_come(tmp_path: Path) -> None:
    for n in ("000001", "000002"):
        tif(tmp_path / "img" / f"{n}.jpg")
    text(tmp_path / "img" / "list_attr_celeba.txt", "2\nYoung Male\n000001.jpg  1 -1\n000002.jpg -1 -1\n")
    source = open_screen(tmp_path / "img", Read(class_column="Young"))
    assert source.class_names.tolist() == ["1", "-1"]


def test_images_without_a_row_are_left_out_with_a_note(faces: Path) -> None:
    table = text(faces.parent / "labels.csv", "image,gender\n1,F\n2,M\n")
    source = open_screen(faces, Read(table=str(table), class_column="gender"))
    assert source.class_names.tolist() == ["F", "M"]
    assert "2 of 4 images are left out" in source.notes[0]


@pytest.mark.parametrize(
    ("rows", "read", "told"),
    [
        ("image,gender\n1,F\n1,M\n", {}, "row 3 contradicts row 2: Metadata_Gender of 1"),
        ("image,gender\na,F\nb,M\n", {}, "no column names the images"),
        ("image,gender\n1,F\n", {"key": "gender"}, "column 'gender' names none of the images"),
        ("image,gender\n1,F\n", {"key": "imago"}, "no column 'imago': did you mean 'image'.*read.key"),
        ("image,gender\n1,F\n", {"class_column": "sex"}, "no column 'sex'.*read.class_column"),
        ("image,gender\n1,F\n", {"class_column": None}, "which column is the class"),
    ],
)
def test_a_bad_table_of_attributes_is_refused(faces: Path, rows: str, read: dict[str, Any], told: str) -> None:
    table = text(faces.parent / "labels.csv", rows)
    refused(told, faces, **{"table": str(table), "class_column": "gender", **read})


def test_two_images_of_one_row_are_refused(faces: Path) -> None:
    table = text(faces.parent / "labels.csv", "image,gender\n1,F\n2,M\n")
    shutil.copytree(faces, faces.parent / "thumbnails")
    refused("fits 'images1024x1024/00000/00001.tif' and 'thumb", faces.parent, table=str(table), class_column="gender")


# ----------------------------------------------------------------------------------------------------------------------
# OME-TIFF

OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def ome(path: Path, axes: str = "CYX", shape: tuple[int, ...] = (2, 8, 10), **how: Any) -> NDArray:
    names = {"Channel": {"Name": ["DAPI", "Golgi", "ER"][: shape[axes.index("C")]]}} if "C" in axes else {}
    return tif(path, plane(*shape), ome=True, metadata={"axes": axes, **names}, **how)


def test_an_ome_tiff_tells_its_channels_and_the_name_its_well(tmp_path: Path) -> None:
    first, second = ome(tmp_path / "x" / "A02_s3.ome.tif"), ome(tmp_path / "x" / "B11_s1.ome.tiff")
    table = text(tmp_path / "map.csv", "Well,Compound\nA2,DMSO\nB11,drug\n")
    source = open_screen(tmp_path / "x", Read(join=(str(table),), class_column="Compound"))
    assert (source.content, source.channels) == ("fields", ("DAPI", "Golgi"))
    assert (image(source, 0) == first.transpose(1, 2, 0)).all()
    assert (image(source, 1) == second.transpose(1, 2, 0)).all()
    assert source.metadata["Metadata_Site"].tolist() == ["3", "1"]
    assert source.class_names.tolist() == ["DMSO", "drug"]
    only = open_screen(tmp_path / "x", Read(join=(str(table),), class_column="Compound", channels=("Golgi",)))
    assert (image(only, 1)[..., 0] == second[1]).all()


@pytest.mark.parametrize("axes", ["TCZYX", "TZCYX", "CTZYX"])
@pytest.mark.parametrize("projection", ["max", "mean", "middle"])
@pytest.mark.parametrize("how", [{}, {"compression": "zlib"}, {"imagej": True}], ids=["plain", "packed", "ImageJ"])
def test_time_points_are_images_and_focal_planes_one_whatever_the_order_of_the_axes(
    tmp_path: Path, axes: str, projection: str, how: dict[str, Any]
) -> None:
    if how.get("imagej"):
        axes = "TZCYX"
    sizes = {"T": 2, "C": 3, "Z": 4, "Y": 8, "X": 10}
    shape = tuple(sizes[a] for a in axes)
    if how.get("imagej"):
        written = tif(tmp_path / "x.tif", plane(*shape), imagej=True, metadata={"axes": axes})
    else:
        written = ome(tmp_path / "x.ome.tif", axes, shape, **how)
    path = next(tmp_path.iterdir())
    source = open_screen(path, Read(projection=projection, class_column="Timepoint"))
    assert source.metadata["Metadata_Timepoint"].tolist() == [0, 1]
    tzc = np.moveaxis(written, [axes.index(a) for a in "TZCYX"], range(5)).astype(float)
    whole = {"max": tzc.max(1), "mean": np.rint(tzc.mean(1)), "middle": tzc[:, 2]}[projection]
    for t in range(2):
        assert (image(source, t) == whole[t].transpose(1, 2, 0)).all()


def test_colour_samples_of_an_ome_tiff_are_channels(tmp_path: Path) -> None:
    written = tif(tmp_path / "x.ome.tif", plane(8, 10, 3), ome=True, photometric="rgb", metadata={"axes": "YXS"})
    source = open_screen(tmp_path / "x.ome.tif", Read(class_column="File"))
    assert (image(source, 0) == written).all()
    assert source.channels == ("red", "green", "blue")


def test_series_are_images_and_a_plate_in_the_description_places_them(tmp_path: Path) -> None:
    path = tmp_path / "x.ome.tif"
    written = [plane(2, 8, 10), plane(2, 8, 10)]
    with tifffile.TiffWriter(path, ome=True) as writer:
        for i, w in enumerate(written):
            writer.write(w, photometric="minisblack", metadata={"axes": "CYX", "Name": f"field {i}"})
    wells = "".join(
        f'<Well ID="Well:{i}" Row="{r}" Column="{c}"><WellSample ID="WellSample:{i}" Index="{i}">'
        f'<ImageRef ID="Image:{i}"/></WellSample></Well>' for i, (r, c) in enumerate([(0, 1), (27, 10)])
    )  # fmt: skip
    description = tifffile.tiffcomment(path).replace("</OME>", f'<Plate ID="Plate:0" Name="P7">{wells}</Plate></OME>')
    tifffile.tiffcomment(path, description.encode())
    source = open_screen(path, Read(class_column="Well"))
    assert source.class_names.tolist() == ["A02", "AB11"]
    assert source.metadata["Metadata_Plate"].tolist() == ["P7", "P7"]
    assert source.metadata["Metadata_Image"].tolist() == ["field 0", "field 1"]
    assert all((image(source, i) == w.transpose(1, 2, 0)).all() for i, w in enumerate(written))


@pytest.mark.parametrize(
    ("spoil", "read", "told"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:300]), {}, "x.ome.tif"),
        (lambda p: p.write_bytes(b"hello"), {}, "x.ome.tif: unreadable"),
        (lambda p: p.write_bytes(b""), {}, "x.ome.tif: unreadable"),
        (lambda p: None, {"max_values": 159}, "x.ome.tif: the header announces"),
        (lambda p: None, {"max_bytes": 159}, "x.ome.tif.*read.max_bytes"),
        (lambda p: tif(p, plane().astype(np.complex64), ome=True), {}, "complex64"),
        (lambda p: tif(p, np.full((8, 8), np.nan, np.float32), ome=True), {}, "x.ome.tif.*NaN"),
        (lambda p: ome(p.with_name("y.ome.tif"), "CYX", (3, 8, 10)), {}, "has channels DAPI, Golgi, ER"),
        (lambda p: tifffile.tiffcomment(p, f'<OME xmlns="{OME}"><BinaryOnly MetadataFile="x"/></OME>'), {}, "compani"),
    ],
)  # fmt: skip
def test_a_bad_ome_tiff_is_refused_by_name(
    tmp_path: Path, spoil: Callable[[Path], Any], read: dict[str, Any], told: str
) -> None:
    ome(tmp_path / "x.ome.tif")
    spoil(tmp_path / "x.ome.tif")
    refused(told, tmp_path, layout="ome_tiff", class_column="File", **read)


def test_a_set_of_ome_files_is_listed_once_and_never_reaches_outside(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    written = [ome(folder / f"{i}.ome.tif") for i in range(2)]
    images = "".join(
        f'<Image ID="Image:{i}" Name="{i}"><Pixels ID="Pixels:{i}" DimensionOrder="XYCZT" Type="uint16" SizeX="10" '
        f'SizeY="8" SizeC="2" SizeZ="1" SizeT="1"><Channel ID="Channel:{i}:0" Name="a"/><Channel ID="Channel:{i}:1" '
        f'Name="b"/><TiffData IFD="0" PlaneCount="2"><UUID FileName="{i}.ome.tif">urn:uuid:{i}</UUID></TiffData>'
        f"</Pixels></Image>" for i in range(2)
    )  # fmt: skip
    for i in range(2):
        tifffile.tiffcomment(folder / f"{i}.ome.tif", f'<OME xmlns="{OME}" UUID="urn:uuid:{i}">{images}</OME>')
    source = open_screen(folder, Read(class_column="File"))
    assert source.class_names.tolist() == ["0.ome.tif", "1.ome.tif"]
    assert all((image(source, i) == w.transpose(1, 2, 0)).all() for i, w in enumerate(written))
    (folder / "1.ome.tif").rename(tmp_path / "1.ome.tif")
    refused("'1.ome.tif' is missing", folder, class_column="File")
    (folder / "1.ome.tif").symlink_to(tmp_path / "1.ome.tif")
    refused("leads out of", folder, class_column="File")


# ----------------------------------------------------------------------------------------------------------------------
# OME-Zarr


def ome_zarr(path: Path, version: str, axes: str = "cyx", shape: tuple[int, ...] = (2, 8, 10)) -> NDArray:
    """Write an image with two resolutions as OME-Zarr."""
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    written = plane(*shape)
    for level, pixels in (("full", written), ("half", written[..., ::2, ::2])):
        array = group.create_array(level, shape=pixels.shape, chunks=(*(1,) * (len(shape) - 2), 4, 5), dtype="uint16")
        array[...] = pixels
    told = {
        "multiscales": [{"axes": [{"name": a} for a in axes], "datasets": [{"path": "full"}, {"path": "half"}]}],
        "omero": {"channels": [{"label": n} for n in ("DNA", "ER", "AGP")[: shape[axes.index("c")]]]},
    }
    group.attrs.update(told if version == "0.4" else {"ome": {"version": version, **told}})
    return written


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(("axes", "shape"), [("cyx", (2, 8, 10)), ("tczyx", (2, 3, 2, 8, 10)), ("czyx", (2, 3, 8, 10))])
def test_an_ome_zarr_image_is_read_at_full_resolution(
    tmp_path: Path, version: str, axes: str, shape: tuple[int, ...]
) -> None:
    written = ome_zarr(tmp_path / "x.zarr", version, axes, shape)
    source = open_screen(tmp_path / "x.zarr", Read(class_column="File"))
    assert (source.content, source.channels) == ("fields", ("DNA", "ER", "AGP")[: shape[axes.index("c")]])
    whole = written if "t" in axes else written[None]
    whole = whole.max(2) if "z" in axes else whole
    assert len(source.class_names) == len(whole)
    for t, wanted in enumerate(whole):
        assert (image(source, t) == wanted.transpose(1, 2, 0)).all()
    one = open_screen(tmp_path / "x.zarr", Read(class_column="File", channels=("ER",)))
    assert (image(one, 0)[..., 0] == whole[0, 1]).all()


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_plate_of_ome_zarr_names_wells_and_sites(tmp_path: Path, version: str) -> None:
    plate = tmp_path / "P1.zarr"
    group = zarr.open_group(str(plate), mode="w", zarr_format=2 if version == "0.4" else 3)
    wells = ["A/1", "B/12"]

    def describe(g: Any, told: dict[str, Any]) -> None:
        g.attrs.update(told if version == "0.4" else {"ome": {"version": version, **told}})

    describe(group, {"plate": {"name": "Plate 1", "wells": [{"path": w} for w in wells]}})
    written = {}
    for w in wells:
        describe(group.require_group(w), {"well": {"images": [{"path": "0"}, {"path": "1"}]}})
        for site in "01":
            written[w, site] = ome_zarr(plate / w / site, version)
    for path in (plate, tmp_path):
        source = open_screen(path, Read(class_column="Well"))
        assert source.class_names.tolist() == ["A01", "A01", "B12", "B12"]
        assert set(source.metadata["Metadata_Plate"]) == {"Plate 1"}
        assert (image(source, row_of(source, Well="B12", Site="1")) == written["B/12", "1"].transpose(1, 2, 0)).all()


def spoil_json(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        told = json.loads((path / name).read_text())
        change(told)
        (path / name).write_text(json.dumps(told))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda p: (p / ".zattrs").write_text("{"), "zattrs' is damaged"),
        (lambda p: (p / ".zattrs").write_text("[]"), "zattrs' is damaged"),
        (spoil_json(".zattrs", lambda t: t.clear()), "no multiscales or plate"),
        (spoil_json(".zattrs", lambda t: t["multiscales"][0].pop("datasets")), "list of datasets"),
        (spoil_json(".zattrs", lambda t: t.update(multiscales=3)), "list of datasets"),
        (spoil_json(".zattrs", lambda t: t["multiscales"][0].update(axes=["c", "y"])), "axes c, y"),
        (
            spoil_json(".zattrs", lambda t: t["multiscales"][0]["datasets"][0].update(path="../x")),
            "x.zarr' is damaged|leads",
        ),
        (lambda p: shutil.rmtree(p / "full"), "names 'full', which is not there"),
        (spoil_json("full/.zarray", lambda t: t.update(shape=[1 << 20, 1 << 20, 1 << 20])), "1048576 channels"),
        (spoil_json("full/.zarray", lambda t: t.update(shape=[1, 1 << 20, 1 << 20])), "the header announces"),
        (
            spoil_json("full/.zarray", lambda t: t.update(chunks=[1, 1 << 20, 1 << 20])),
            "tiles of 1 x 1048576 x 1048576",
        ),
        (spoil_json("full/.zarray", lambda t: t.update(dtype="|O", filters=[{"id": "pickle"}])), "type '|O'"),
        (spoil_json("full/.zarray", lambda t: t.update(filters=[{"id": "pickle"}])), "are no image"),
        (lambda p: [f.write_bytes(b"xx") for f in (p / "full").glob("*.*.*")], "x.zarr.*unreadable"),
        (lambda p: [f.unlink() for f in (p / "full").glob("[0-9]*")], "no pixels at all"),
    ],
)
def test_a_damaged_ome_zarr_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], Any], told: str) -> None:
    ome_zarr(tmp_path / "x.zarr", "0.4")
    spoil(tmp_path / "x.zarr")
    assert "x.zarr" in refused(told, tmp_path / "x.zarr", layout="ome_zarr", class_column="File")


def test_a_missing_zarr_is_told_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ome_zarr(tmp_path / "x.zarr", "0.5")
    monkeypatch.setitem(sys.modules, "zarr", None)
    refused(r"pip install 'diffex\[zarr\]'", tmp_path / "x.zarr")


# ----------------------------------------------------------------------------------------------------------------------
# NumPy


@pytest.mark.parametrize("shape", [(6, 8, 9), (6, 2, 8, 9), (6, 8, 9, 2)])
@pytest.mark.parametrize("packed", [None, "stored", "deflated"])
def test_arrays_of_images_are_read_by_row(tmp_path: Path, shape: tuple[int, ...], packed: str | None) -> None:
    images, labels = plane(*shape), np.arange(6) % 2
    path = tmp_path / ("x.npz" if packed else "x.npy")
    table = text(tmp_path / "x.csv", "well,class_name\n" + "".join(f"A0{i},{'ab'[i % 2]}\n" for i in range(6)))
    if packed:
        save = np.savez if packed == "stored" else np.savez_compressed
        save(path, images=images, labels=labels, class_names=np.array(["a", "b"]))
        source = open_screen(path, Read())
    else:
        np.save(path, images)
        source = open_screen(path, Read(table=str(table)))
        assert source.metadata["Metadata_Well"].tolist() == [f"A0{i}" for i in range(6)]
    assert source.class_names.tolist() == list("ababab")
    hwc = images[..., None] if images.ndim == 3 else np.moveaxis(images, 1, -1) if shape[1] == 2 else images
    assert all((image(source, i) == hwc[i]).all() for i in (0, 3, 5))
    if hwc.shape[3] == 2:
        two = open_screen(path, Read(table=None if packed else str(table), channel_names=("p", "q"), channels=("q",)))
        assert (image(two, 2) == hwc[2][..., 1:]).all()


def test_a_folder_holds_an_array_for_each_class(tmp_path: Path) -> None:
    arrays = {n: plane(k, 3, 8, 8) for n, k in (("taxol", 2), ("DMSO", 3))}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    source = open_screen(tmp_path, Read())
    assert source.class_names.tolist() == ["DMSO"] * 3 + ["taxol"] * 2
    assert (image(source, 4) == arrays["taxol"][1].transpose(1, 2, 0)).all()


@pytest.mark.parametrize(
    ("array", "read", "told"),
    [
        (np.array([[[None]]]), {}, "Python objects are never loaded"),
        (np.zeros((2, 3), np.uint8), {}, r"shape \(2, 3\); expected"),
        (np.zeros((0, 8, 8), np.uint8), {}, "expected"),
        (np.zeros((2, 8, 8, 8), np.uint8), {}, "which axis is the channels"),
        (np.zeros((2, 8, 8), np.uint8), {"max_values": 63}, "the header announces"),
        (np.full((2, 8, 8), np.nan), {}, "image 0: NaN"),
        (np.zeros((2, 8, 8), complex), {}, "complex128"),
    ],
)
def test_a_bad_array_is_refused_by_name(tmp_path: Path, array: NDArray, read: dict[str, Any], told: str) -> None:
    np.save(tmp_path / "x.npy", array, allow_pickle=True)
    assert "x.npy" in refused(told, tmp_path / "x.npy", class_column="File", **read)
    np.savez(tmp_path / "x.npz", images=array)
    assert "x.npz" in refused(told, tmp_path / "x.npz", class_column="File", **read)


def test_a_cut_array_a_wrong_table_and_a_wrong_archive_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", plane(4, 8, 8))
    table = text(tmp_path / "x.csv", "class\na\nb\n")
    refused("2 rows, but .* 4 images", tmp_path / "x.npy", table=str(table))
    os.truncate(tmp_path / "x.npy", 400)
    refused("x.npy is cut off", tmp_path / "x.npy", class_column="File")
    np.savez(tmp_path / "x.npz", pictures=plane(4, 8, 8))
    refused("x.npz' needs an array 'images'; it has pictures", tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", images=plane(4, 8, 8), labels=np.array([0, 1]))
    refused("4 images, but labels of shape", tmp_path / "y.npz")
    (tmp_path / "z.npz").write_bytes(b"PK\3\4 or so")
    refused("z.npz", tmp_path / "z.npz")


# ----------------------------------------------------------------------------------------------------------------------
# What holds for all


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for kind in ("DMSO", "taxol", "nocodazole"):
        for i in range(2):
            tif(tmp_path / "cells" / kind / f"{i}.tif", plane(4, 8, 8))
    return tmp_path / "cells"


def test_classes_that_are_not_asked_for_stay_listed_without_a_class(classes: Path) -> None:
    source = open_screen(classes, Read(classes=("taxol", "DMSO")))
    assert source.class_names.tolist() == ["DMSO", "DMSO", "", "", "taxol", "taxol"]
    refused("no class 'Taxol': did you mean 'taxol'.*read.classes", classes, classes=("Taxol",))


def test_channels_are_chosen_by_name_or_number_in_the_order_asked(classes: Path) -> None:
    whole = image(open_screen(classes, Read()), 3)
    for wanted in (("er", "DNA"), ("2", "0"), ("ER", "0")):
        source = open_screen(classes, Read(channel_names=("DNA", "AGP", "ER", "RNA"), channels=wanted))
        assert source.channels == ("ER", "DNA")
        assert (image(source, 3) == whole[..., [2, 0]]).all()


@pytest.mark.parametrize(
    ("read", "told"),
    [
        ({"channels": ("DNA",)}, "asks for 'DNA', but .* has channel 0, channel 1"),
        ({"channels": ("4",)}, "0 to 3"),
        ({"channels": ("0", "0")}, "names a channel twice"),
        ({"channel_names": ("a", "b")}, "must give 4 different names"),
        ({"channel_names": ("a", "b", "c", "c")}, "must give 4 different names"),
        ({"layout": "bbbc021"}, "no table such as BBBC021_v1_image.csv"),
        ({"layout": "load_data"}, "no load_data.csv"),
        ({"layout": "ome_zarr"}, "no OME-Zarr"),
        ({"layout": "numpy"}, "no .npy file"),
        ({"layout": "table"}, "read.table"),
        ({"layout": "files"}, "follow no pattern.*read.pattern"),
        ({"table": "missing.csv"}, "no table 'missing.csv'"),
        ({"join": ("missing.csv",)}, "missing.csv': there is no such file"),
        ({"root": "/nowhere"}, "no folder '/nowhere'.*read.root"),
        ({"max_bytes": 100}, "read.max_bytes"),
        ({"max_values": 255}, "read.max_values"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(classes: Path, read: dict[str, Any], told: str) -> None:
    refused(told, classes, **read)


def test_a_path_without_a_layout_is_refused_with_the_layouts_there_are(tmp_path: Path) -> None:
    refused("no file or folder", tmp_path / "x")
    refused("has no layout that is known.*bbbc021, load_data", text(tmp_path / "x.doc", "hello"))
    text(tmp_path / "store" / "store.json", "{}")
    refused("is an image store already", tmp_path / "store")


def test_what_an_image_shows_can_be_set(classes: Path) -> None:
    assert open_screen(classes, Read()).content == "cells"
    assert open_screen(classes, Read(content="fields")).content == "fields"
    with pytest.raises(UserError, match="one class|sub-folder per class|no layout"):
        open_source(Data(path=str(text(classes.parent / "x.doc", "x"))), Assay())
