"""Metadata tables however people have saved them, joins that never guess, and paths that never leave their folder."""

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffex.errors import UserError
from diffex.paths import Root, safe_path
from diffex.tables import from_rows, join, metadata_columns, number, number_text, read_table, typed

ROWS = [["Compound", "Dose", "Note"], ["Taxol", "0.3", "bündels, µM"], ['5-"FU"', "3", "a\nb"], ["", "10", "x"]]


def csv_text(rows: list[list[str]], separator: str = ",", end: str = "\n") -> str:
    quoted = ['"' + field.replace('"', '""') + '"' for row in rows for field in row]
    width = len(rows[0])
    return "".join(separator.join(quoted[i : i + width]) + end for i in range(0, len(quoted), width))


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_table_is_the_same_however_it_was_saved(tmp_path: Path, encoding: str, end: str, separator: str) -> None:
    table = read_table(write(tmp_path / "x.csv", csv_text(ROWS, separator, end), encoding))
    assert list(table.columns) == ROWS[0]
    assert [list(row) for row in zip(*table.columns.values(), strict=True)] == ROWS[1:]


def test_a_packed_table_and_a_parquet_table_read_like_a_plain_one(tmp_path: Path) -> None:
    plain = read_table(write(tmp_path / "x.csv", "Well,Dose\nA01,0.003000\nA02,\n"))
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress((tmp_path / "x.csv").read_bytes()))
    columns = {"Well": ["A01", "A02"], "Dose": [0.003, None], "image": [b"x", b"y"]}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert read_table(tmp_path / "x.csv.gz").columns == plain.columns
    assert read_table(tmp_path / "x.parquet").columns == {"Well": ["A01", "A02"], "Dose": ["0.003", ""]}


def test_rows_remember_where_they_stand_in_the_file(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "x.csv", 'a,b\n1,"two\nlines"\n\n3,4\n'))
    assert table.lines == [2, 5]
    assert table.where(1).endswith("row 5")


def test_a_decimal_comma_is_a_decimal_point_where_semicolons_part_the_columns(tmp_path: Path) -> None:
    assert read_table(write(tmp_path / "x.csv", "Well;Dose\nA01;0,003\n")).columns["Dose"] == ["0.003"]
    assert read_table(write(tmp_path / "y.csv", 'Well,Dose\nA01,"0,003"\n')).columns["Dose"] == ["0,003"]


def test_columns_without_a_name_are_passed_over(tmp_path: Path) -> None:
    assert list(read_table(write(tmp_path / "x.csv", ",a\n0,1\n")).columns) == ["a"]


@pytest.mark.parametrize("head", ["2\nYoung Male\n", "Young Male\n", "image_id Young Male\n"])
def test_celebas_attributes_are_parted_by_spaces(tmp_path: Path, head: str) -> None:
    table = read_table(write(tmp_path / "list_attr_celeba.txt", f"{head}000001.jpg -1  1\n000002.jpg  1 -1\n"))
    assert list(table.columns.values()) == [["000001.jpg", "000002.jpg"], ["-1", "1"], ["1", "-1"]]
    assert list(table.columns)[1:] == ["Young", "Male"]


BAD = {
    "no bytes": (b"", "is empty"),
    "blank lines": (b"\n \r\n", "is empty"),
    "a header of numbers": (b"1,2\n3,4\n", "no header"),
    "a column twice": (b"a,b,a\n1,2,3\n", "two columns called 'a'"),
    "a field too many": (b"a,b\n1,2\n1,2,3\n", "row 3 has 3 fields, but the header has 2"),
    "a field too few": (b"a,b\r1,2\r1\r", "row 3 has 1 fields"),
    "NUL bytes": (b"a,b\n1,\0\0\0\n", "NUL"),
    "an open quotation mark": (b'a,b\n1,"2\n3,4\n', "row 2"),
    "half a gzip file": (gzip.compress(b"a,b\n1,2\n" * 99)[:20], "damaged gzip"),
    "half a Parquet file": (b"PAR1" + bytes(40), "not a readable Parquet"),
    "half of UTF-16": (b"\xff\xfea\0,\0b\0\n", "utf-16"),
}


@pytest.mark.parametrize(("content", "told"), BAD.values(), ids=BAD.keys())
def test_a_bad_table_is_refused_by_name_in_one_line(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(UserError, match=told) as error:
        read_table(tmp_path / "x.csv")
    assert "x.csv" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_that_is_not_there_or_too_large_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_table(tmp_path / "x.csv")
    with pytest.raises(UserError, match="no plain file"):
        read_table(tmp_path)
    write(tmp_path / "x.csv", "a,b\n" + "1,2\n" * 100)
    with pytest.raises(UserError, match="max_bytes"):
        read_table(tmp_path / "x.csv", max_bytes=100)
    (tmp_path / "x.gz").write_bytes(gzip.compress(bytes(10**6)))
    with pytest.raises(UserError, match="unpacked"):
        read_table(tmp_path / "x.gz", max_bytes=10**5)


def test_a_missing_column_names_the_nearest(tmp_path: Path) -> None:
    table = read_table(write(tmp_path / "x.csv", "Image_Metadata_Compound,Dose\nx,1\n"))
    assert table.column("compound") == ["x"]
    with pytest.raises(UserError, match="no column 'Doze': did you mean 'Dose'"):
        table.column("Doze")


# ----------------------------------------------------------------------------------------------------------------------
# Values


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_survives_its_text(value: float) -> None:
    assert number(number_text(value)) == value


@pytest.mark.parametrize("text", ["0.003000", "0.003", "3e-3", "3E-03", "+.003"])
def test_a_number_has_one_shortest_text(text: str) -> None:
    value = number(text)
    assert value is not None
    assert number_text(value) == "0.003"


@pytest.mark.parametrize("text", ["", "nan", "inf", "1e999", "0x1", "1_000", "1,5", "A01", "--1"])
def test_what_is_no_number_is_none(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize(
    ("values", "name", "kind"),
    [
        (["1", "-2"], "Replicate", "i"),
        (["1", "2.5"], "Dose", "f"),
        (["1", "", "NA"], "Dose", "f"),
        (["0007", "12"], "Code", "U"),
        (["1", "2"], "Metadata_Plate", "U"),
        (["a", "1"], "Code", "U"),
        (["", ""], "Code", "U"),
        (["99999999999999999999"], "Code", "f"),
    ],
)
def test_a_column_takes_the_narrowest_type_that_loses_nothing(values: list[str], name: str, kind: str) -> None:
    assert typed(values, name).dtype.kind == kind


def test_columns_of_an_image_table_lose_its_prefix_and_the_name_of_the_channel(tmp_path: Path) -> None:
    text = "Image_FileName_DAPI,Image_Metadata_Plate_DAPI,Image_Metadata_Compound,Replicate\nx.tif,P1,DMSO,1\n"
    table = read_table(write(tmp_path / "x.csv", text))
    every = metadata_columns(table)
    assert every == {"Metadata_Plate": ["P1"], "Metadata_Compound": ["DMSO"], "Metadata_Replicate": ["1"]}
    assert set(metadata_columns(table, only_prefixed=True)) == {"Metadata_Plate", "Metadata_Compound"}


def test_two_columns_that_come_to_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two columns would be called 'Metadata_Age'"):
        metadata_columns(read_table(write(tmp_path / "x.csv", "age,Age\n1,2\n")))


# ----------------------------------------------------------------------------------------------------------------------
# Joins

SCREEN = {
    "Metadata_Well": np.array(["A01", "A02", "B01"]),
    "Metadata_Compound": np.array(["taxol", "DMSO", "new"]),
    "Metadata_Concentration": np.array([0.003, 0.0, 1.0]),
}


@pytest.mark.parametrize("doses", [("0.003000", "0.000000"), ("3e-3", "0"), ("0.003", "0.0")])
def test_numbers_join_as_numbers(tmp_path: Path, doses: tuple[str, str]) -> None:
    text = f'"compound",concentration,"moa"\n"taxol",{doses[0]},"Stabilizer"\n"DMSO",{doses[1]},"DMSO"\n'
    joined = join(SCREEN, read_table(write(tmp_path / "moa.csv", text)))
    assert joined["Metadata_Moa"].tolist() == ["Stabilizer", "DMSO", ""]
    assert list(joined)[:3] == list(SCREEN)


def test_wells_join_however_they_are_written(tmp_path: Path) -> None:
    joined = join(SCREEN, read_table(write(tmp_path / "map.csv", "well,Cells,Score\na1,7,1.5\nA-02,8,2.5\n")))
    assert joined["Metadata_Cells"].tolist()[:2] == [7, 8]
    assert np.isnan(joined["Metadata_Score"][2])


def test_rows_that_repeat_are_fine_and_rows_that_contradict_are_named(tmp_path: Path) -> None:
    same = write(tmp_path / "same.csv", "compound,moa,gene\ntaxol,S,1.0\ntaxol,S,1\n")
    assert join(SCREEN, read_table(same))["Metadata_Moa"].tolist() == ["S", "", ""]
    with pytest.raises(UserError, match="row 4 contradicts row 2: Metadata_Moa of taxol is 'T' here, 'S' there"):
        join(SCREEN, read_table(write(tmp_path / "other.csv", "compound,moa\ntaxol,S\nDMSO,D\ntaxol,T\n")))


def test_a_join_on_nothing_or_with_no_match_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shares no column"):
        join(SCREEN, read_table(write(tmp_path / "x.csv", "plate,moa\nP1,S\n")))
    with pytest.raises(UserError, match="no row for any image, e.g. for Metadata_Compound 'taxol'"):
        join(SCREEN, read_table(write(tmp_path / "y.csv", "compound,moa\nPaclitaxel,S\n")))


# ----------------------------------------------------------------------------------------------------------------------
# Paths


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder beside a file that is nobody's business."""
    (tmp_path / "secret.tif").write_bytes(b"secret")
    (tmp_path / "data-old").mkdir()
    (tmp_path / "data-old" / "x.tif").touch()
    root = tmp_path / "data"
    (root / "Week1").mkdir(parents=True)
    (root / "Week1" / "a_é.TIF").touch()
    (root / "out").symlink_to(tmp_path)
    (root / "out.tif").symlink_to(tmp_path / "secret.tif")
    (root / "in.tif").symlink_to(root / "Week1" / "a_é.TIF")
    return root


@pytest.mark.parametrize(
    "name",
    [
        "Week1/a_é.TIF",
        "week1/A_É.tif",
        "Week1\\a_é.TIF",
        "./Week1//a_é.TIF",
        "x/../Week1/a_é.TIF",
        "Week1/a_e\u0301.tif",
    ],
)
def test_a_path_inside_is_found_however_it_is_written(folder: Path, name: str) -> None:
    assert safe_path(folder, name) == folder / "Week1" / "a_é.TIF"
    assert safe_path(folder, str(folder.resolve() / "Week1/a_é.TIF")).name == "a_é.TIF"


def test_a_link_that_stays_inside_is_followed(folder: Path) -> None:
    assert safe_path(folder, "in.tif").is_file()


@pytest.mark.parametrize(
    "name",
    [
        "../secret.tif", "Week1/../../secret.tif", "..\\secret.tif", "/etc/passwd", "C:\\secret.tif", "C:/x",
        "//host/x", "\\\\host\\x", "out/secret.tif", "out.tif", "OUT.TIF", "Week1/\0", "../data-old/x.tif",
    ],
)  # fmt: skip
def test_a_path_that_leaves_is_refused(folder: Path, name: str) -> None:
    with pytest.raises(UserError, match="leads out of") as error:
        safe_path(folder, name)
    assert "\n" not in str(error.value)


def test_an_absolute_path_of_a_neighbour_with_a_longer_name_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="leads out of"):
        safe_path(folder, f"{folder}-old/x.tif")


def test_a_missing_file_is_none_and_two_that_differ_by_case_are_not_guessed(folder: Path) -> None:
    assert Root(folder).locate("Week1/b.tif") is None
    with pytest.raises(UserError, match="there is no 'Week1/b.tif'"):
        safe_path(folder, "Week1/b.tif")
    (folder / "Week1" / "A_É.tif").touch()
    assert Root(folder).locate("Week1/A_É.tif") == folder / "Week1" / "A_É.tif"
    with pytest.raises(UserError, match="could be"):
        Root(folder).locate("week1/a_é.tif")


@given(st.lists(st.sampled_from(["..", ".", "", "a", "Week1", "out", "C:", "\\", "..\\..", "in.tif"]), max_size=6))
def test_no_path_whatsoever_leaves(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    base = tmp_path_factory.getbasetemp() / "any"
    root = base / "data"
    if not root.exists():
        (root / "Week1").mkdir(parents=True)
        (root / "out").symlink_to(base)
    try:
        found = Root(root).locate("/".join(parts))
    except UserError:
        return
    assert found is None or found.resolve().is_relative_to(root.resolve())


def test_a_column_that_the_first_row_lacks_is_kept() -> None:
    table = from_rows([{"a": 1}, {"a": 2.5, "b": "x"}])
    assert table.to_pylist() == [{"a": 1.0, "b": None}, {"a": 2.5, "b": "x"}]
