"""Metadata tables as people have them.

CSV and TSV in any usual encoding, line end and separator, packed with gzip or not, and Parquet: all become columns of
text.  Numbers are compared as numbers: ``0.003000``, ``0.003`` and ``3e-3`` are one dose.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import re
import unicodedata
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from diffex.errors import UserError, did_you_mean
from diffex.readers import MAX_BYTES, read_file

TABLES = (".csv", ".tsv", ".txt", ".parquet", ".pq")  # the first three also with .gz
IDENTITIES = (
    "Plate",
    "Well",
    "Site",
    "Field",
    "Week",
    "Batch",
    "Barcode",
    "Donor",
    "Patient",
    "Subject",
    "Movie",
    "File",
)
MISSING = ("", "na", "nan", "null", "none")
CLASS_COLUMNS = tuple(
    f"Metadata_{name}"
    for name in (
        "Class", "Compound", "Treatment", "Perturbation", "pert_iname", "JCP2022", "gene", "gene_symbol",
        "broad_sample",
    )
)  # fmt: skip
FILE_COLUMN = re.compile(r"(?:Image_)?(?:FileName|PathName|URL)_(?P<channel>.+)")
WELL = re.compile(r"([A-Za-z]{1,2})\s*[-_]?\s*(\d{1,2})")


@dataclass(frozen=True)
class Table:
    """Columns of text, in order.

    Attributes:
        name: the file, for messages.
        columns: name -> values, all of one length.
        lines: where each row begins in the file: its line, the header's being 1.
    """

    name: str
    columns: dict[str, list[str]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def find(self, *names: str) -> str | None:
        """The first of the names that is a column, in any case and with or without ``Image_`` and ``Metadata_``."""
        known = {_bare(c): c for c in reversed(self.columns)}
        return next((known[_bare(n)] for n in names if _bare(n) in known), None)

    def column(self, *names: str, setting: str = "") -> list[str]:
        """The values of the column that ``find`` finds.

        Raises:
            UserError: no such column; the message names the nearest, and ``setting``.
        """
        found = self.find(*names)
        if found is None:
            hint = did_you_mean(names[0], self.columns)
            raise UserError(f"{self.name} has no column {names[0]!r}: {hint}{f' ({setting})' if setting else ''}")
        return self.columns[found]

    def where(self, row: int) -> str:
        """A row, for messages."""
        return f"{self.name} row {self.lines[row]}"


def from_rows(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table with a column for every key that any row has; pyarrow by itself takes those of the first row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])


def read_table(path: Path, max_bytes: int = MAX_BYTES) -> Table:
    """Read a CSV, TSV or Parquet file; of a ``.txt`` file, spaces may part the columns.

    Args:
        path: the file; its content decides the format.
        max_bytes: largest size, unpacked.

    Raises:
        UserError: not readable or empty, no header, a column twice, a row with too few or too many fields.
    """
    content = read_file(path, max_bytes)
    if content[:2] == b"\x1f\x8b":
        content = _gunzip(content, path, max_bytes)
    if content[:4] == b"PAR1":
        return _parquet(content, path)
    text = _text(content, path)
    if not text.strip():
        raise UserError(f"{str(path)!r} is empty: it should be a table with a header")
    try:
        return _table(str(path), text, spaces=".txt" in path.name.lower())
    except csv.Error as error:
        raise UserError(f"{str(path)!r} is not a readable CSV file: {error}") from None


def _gunzip(content: bytes, path: Path, max_bytes: int) -> bytes:
    try:
        with gzip.open(io.BytesIO(content)) as packed:
            content = packed.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{str(path)!r} is a damaged gzip file: {error}") from None
    if len(content) > max_bytes:
        raise UserError(f"{str(path)!r} has more than {max_bytes:,} bytes unpacked (read.max_bytes)")
    return content


def _parquet(content: bytes, path: Path) -> Table:
    try:
        file = pq.ParquetFile(io.BytesIO(content))
        schema = file.schema_arrow
        names = [n for n in schema.names if not _is_binary(schema.field(n).type)]
        table = file.read(columns=names)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{str(path)!r} is not a readable Parquet file: {str(error).splitlines()[0]}") from None
    columns = {n: [_as_text(v) for v in table[n].to_pylist()] for n in names}
    return Table(str(path), columns, list(range(2, table.num_rows + 2)))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_nested(kind))


def _as_text(value: object) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return number_text(value) if isinstance(value, float) else str(value)


def _text(content: bytes, path: Path) -> str:
    """Decode a text file: by its byte order mark, as UTF-8, or else as Windows and older files are."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if content.startswith(mark):
            try:
                return content.decode(encoding)
            except UnicodeDecodeError as error:
                raise UserError(f"{str(path)!r} is not {encoding} as it says: {error.reason}") from None
    if b"\0" in content:
        zeros = np.frombuffer(content[: len(content) // 2 * 2], np.uint8).reshape(-1, 2) == 0
        for encoding, side in (("utf-16-le", 1), ("utf-16-be", 0)):
            if len(zeros) and zeros[:, side].mean() > 0.8 and not zeros[:, 1 - side].any():
                return content.decode(encoding, errors="replace")
        raise UserError(f"{str(path)!r} holds NUL bytes: it is damaged, or no text file")
    for encoding in ("utf-8", "cp1252"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            pass
    return content.decode("latin-1")


def _table(name: str, text: str, spaces: bool) -> Table:
    lines = io.StringIO(text, newline="")
    first = next((line for line in lines if line.strip()), "")
    if spaces and (table := _by_spaces(name, text)):
        return table
    unquoted = re.sub(r'"[^"]*"', "", first)
    separator = max(",;\t", key=unquoted.count)
    lines.seek(0)
    reader = csv.reader(lines, delimiter=separator, strict=True)
    header: list[str] | None = None
    rows: list[list[str]] = []
    numbers: list[int] = []
    line = 1
    try:
        for fields in reader:
            begin, line = line, reader.line_num + 1
            values = [f.strip() for f in fields]
            if not any(values):
                continue
            if header is None:
                header = values
                continue
            if len(values) != len(header):
                raise UserError(f"{name} row {begin} has {len(values)} fields, but the header has {len(header)}")
            rows.append(values)
            numbers.append(begin)
    except csv.Error as error:
        raise UserError(f"{name} row {line} is not readable: {error}; look for a quotation mark too many") from None
    assert header is not None
    _check_header(name, header)
    columns = {n: [row[i] for row in rows] for i, n in enumerate(header) if n}  # pandas and R write unnamed numbers
    if separator == ";":  # spreadsheets of many countries write 0,003
        columns = {n: [re.sub(r"^([-+]?\d+),(\d+)$", r"\1.\2", v) for v in values] for n, values in columns.items()}
    return Table(name, columns, numbers)


def _by_spaces(name: str, text: str) -> Table | None:
    """A table such as CelebA's: perhaps the number of rows, names of attributes, then rows of file and values."""
    lines = [(i, line.split()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if lines and len(lines[0][1]) == 1 and lines[0][1][0].isdecimal():
        lines = lines[1:]
    if len(lines) < 2 or any(c in text.splitlines()[lines[0][0] - 1] for c in ",;\t"):
        return None
    header = lines[0][1]
    if len(lines[1][1]) == len(header) + 1:
        header = ["File", *header]
    if len(header) < 2 or any(len(fields) != len(header) for _, fields in lines[1:]):
        return None
    _check_header(name, header)
    columns = {n: [fields[i] for _, fields in lines[1:]] for i, n in enumerate(header)}
    return Table(name, columns, [i for i, _ in lines[1:]])


def _check_header(name: str, header: Sequence[str]) -> None:
    named = [n for n in header if n]
    if not named or all(number(n) is not None for n in named):
        raise UserError(f"{name} has no header: its first row must name the columns")
    double = next((n for n in named if named.count(n) > 1), None)
    if double is not None:
        raise UserError(f"{name} has two columns called {double!r}; rename or remove one")


# ----------------------------------------------------------------------------------------------------------------------
# Values and columns


def number(text: str) -> float | None:
    """The finite number that a text stands for, or None."""
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def number_text(value: float) -> str:
    """The shortest text of a number: 3.0 -> '3', 0.003 -> '0.003'."""
    return repr(float(value)).removesuffix(".0")


def typed(values: Sequence[str], name: str) -> NDArray:
    """A column of text as whole numbers, numbers (missing: NaN) or text; names of wells and the like stay text.

    Args:
        values: N texts.
        name: the column's name.
    """
    short = name.removeprefix("Metadata_")
    if short in IDENTITIES or any(re.match(r"[-+]?0\d", v) for v in values):  # 00012 is a name
        return np.array(values, dtype=np.str_)
    numbers = [number(v) for v in values]
    known = [n for n in numbers if n is not None]
    if not known or any(n is None and v.lower() not in MISSING for n, v in zip(numbers, values, strict=True)):
        return np.array(values, dtype=np.str_)
    if len(known) == len(values) and all(re.fullmatch(r"[-+]?\d{1,18}", v) for v in values):
        return np.array([int(v) for v in values], dtype=np.int64)
    return np.array([math.nan if n is None else n for n in numbers])


def texts(values: Iterable[object]) -> list[str]:
    """The values of a column as texts; NaN and None are empty."""
    return [_as_text(v) for v in (values.tolist() if isinstance(values, np.ndarray) else values)]


def well_name(text: str) -> str:
    """``a1``, ``A-1`` and ``A01`` as ``A01``; other texts as they are."""
    match = WELL.fullmatch(text)
    return f"{match[1].upper()}{int(match[2]):02d}" if match else text


def metadata_name(name: str) -> str:
    """The name of a metadata column: ``compound`` and ``Image_Metadata_Compound`` become ``Metadata_Compound``."""
    name = name.removeprefix("Image_").strip()
    return name if name.startswith("Metadata_") else f"Metadata_{name[:1].upper()}{name[1:]}"


def metadata_columns(table: Table, only_prefixed: bool = False) -> dict[str, list[str]]:
    """The columns of a table as metadata, under their ``Metadata_`` names; columns of image files are left out.

    CellProfiler's image tables name a channel in some (``Image_Metadata_Plate_DAPI``): that is taken off.

    Args:
        table: what was read.
        only_prefixed: take the columns only that are called ``Metadata_`` already.

    Raises:
        UserError: two columns that come to the same name.
    """
    channels = {m["channel"] for n in table.columns if (m := FILE_COLUMN.fullmatch(n))}
    result: dict[str, list[str]] = {}
    for column, values in table.columns.items():
        prefixed = column.removeprefix("Image_").startswith("Metadata_")
        if FILE_COLUMN.fullmatch(column) or (only_prefixed and not prefixed):
            continue
        name = metadata_name(column)
        ending = next((f"_{c}" for c in channels if prefixed and name.endswith(f"_{c}")), "")
        name = name.removesuffix(ending)
        if name in result and result[name] != values:
            raise UserError(f"{table.name}: two columns would be called {name!r}, one of them {column!r}; rename one")
        result[name] = values
    return result


def _bare(name: str) -> str:
    return name.lower().removeprefix("image_").removeprefix("metadata_")


def _key(value: str, column: str) -> str:
    """What makes two values of a key column equal."""
    if column == "Metadata_Well":
        return well_name(value)
    as_number = number(value)
    return number_text(as_number) if as_number is not None else unicodedata.normalize("NFC", value)


def join(metadata: Mapping[str, NDArray], table: Table) -> dict[str, NDArray]:
    """Add the columns of a table to metadata, row by row, where all ``Metadata_`` columns that both have agree.

    Args:
        metadata: columns, each (N,).
        table: one row for each key; the prefix ``Metadata_`` is added to its names where they lack it.

    Returns:
        All columns, each (N,); new ones are empty (NaN where they hold numbers) where the table has no row.

    Raises:
        UserError: no column in common, no row in common, or rows of one key that contradict each other.
    """
    added = metadata_columns(table)
    lower = {name.lower(): name for name in metadata}
    keys = {name: lower[name.lower()] for name in added if name.lower() in lower}
    if not keys:
        raise UserError(
            f"{table.name} shares no column with the images: it has {', '.join(added)}; they have "
            f"{', '.join(metadata) or 'none'} (read.join)"
        )
    new = [name for name in added if name not in keys]
    known = unique_rows(table, {n: added[n] for n in keys}, {n: added[n] for n in new})
    wanted = [[_key(v, name) for v in texts(metadata[mine])] for name, mine in keys.items()]
    rows = [known.get(key) for key in zip(*wanted, strict=True)]
    if rows and not any(row is not None for row in rows):
        example = ", ".join(f"{n} {texts(metadata[mine][:1])[0]!r}" for n, mine in keys.items())
        raise UserError(f"{table.name} has no row for any image, e.g. for {example} (read.join)")
    result = dict(metadata)
    for name in new:
        result[name] = typed(["" if row is None else added[name][row] for row in rows], name)
    return result


def unique_rows(
    table: Table, keys: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[str]]
) -> dict[tuple[str, ...], int]:
    """First row of each key; rows that repeat one are fine if they say the same.

    Raises:
        UserError: two rows of one key that contradict each other; the message names them.
    """
    first: dict[tuple[str, ...], int] = {}
    columns = [[_key(v, name) for v in column] for name, column in keys.items()]
    for row, key in enumerate(zip(*columns, strict=True)):
        before = first.setdefault(key, row)
        for name, column in values.items() if before != row else ():
            if _key(column[before], name) != _key(column[row], name):
                raise UserError(
                    f"{table.where(row)} contradicts row {table.lines[before]}: {name} of {', '.join(key)} is "
                    f"{column[row]!r} here, {column[before]!r} there"
                )
    return first
