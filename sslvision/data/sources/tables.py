"""Tables of images in files: CSV, TSV, JSON lines, Parquet, and plain text with a path in each line.

Rows are read one after the other and only the columns that are asked for, so that a table may be larger than memory.
"""

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from sslvision.data.sources.list_images import EXTENSIONS, some
from sslvision.errors import DataError, UsageError

KINDS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".lst": "text",
    ".list": "text",
}
DELIMITERS = "\t;,|"
LONGEST = 1 << 24  # characters of a value
LOOK_AT = 200  # rows that columns are told by

Row = tuple[Any, ...]


@dataclass
class Table:
    """A table in a file.

    Attributes:
        file: Its path.
        columns: Names of the columns; "1", "2", ... if the file has none.
        rows: Returns the values of some columns, row by row; None where a row has none.
        header: Whether the file names its columns.
        batches: Returns the same as Arrow batches; None if the file is not Parquet.
    """

    file: str
    columns: list[str]
    rows: Callable[[Sequence[str]], Iterator[Row]]
    header: bool = True
    batches: Callable[[Sequence[str]], Iterator[Any]] | None = None

    def first(self, columns: Sequence[str] | None = None, most: int = LOOK_AT) -> list[Row]:
        """Return the first rows, of all columns if none are given."""
        return [row for row, _ in zip(self.rows(columns or self.columns), range(most), strict=False)]

    def check(self, column: str, setting: str) -> str:
        """Return a column that a setting names.

        Raises:
            UsageError: There is no such column.
        """
        if column not in self.columns:
            unnamed = "" if self.header else " It has no line of names: columns are counted from 1."
            raise UsageError(
                f"{setting}={column}: {self.file} has no such column. It has {some(self.columns)}.{unnamed}"
            )
        return column


def open_table(file: str, setting: str = "data.file") -> Table:
    """Open a table by the ending of its name; `.gz` may follow.

    Raises:
        UsageError: The ending is none of KINDS.
        DataError: There is no such file, or nothing in it.
    """
    plain = file.removesuffix(".gz")
    kind = KINDS.get(os.path.splitext(plain)[1].lower())
    if kind is None or (plain != file and kind == "parquet"):
        raise UsageError(
            f"{setting}={file} is not a list of images: expected {', '.join(KINDS)}, or .csv.gz and the like."
        )
    if not os.path.isfile(file):
        what = "is a folder: data=folder data.root=... reads it" if os.path.isdir(file) else "does not exist"
        raise DataError(f"{file} {what}. Set {setting} to a list of images.")
    if not os.path.getsize(file):
        raise DataError(f"{file} is empty: a list has a row for each image.")
    try:
        return {"csv": _csv, "json": _json, "parquet": _parquet, "text": _text}[kind](file)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file} cannot be read as {kind}: {' '.join(str(error).split())[:300]}") from error


def is_image_path(value: Any) -> bool:
    """Return whether a value ends as the path of an image does."""
    return isinstance(value, str) and value.lower().endswith(EXTENSIONS)


def _opened(file: str) -> io.TextIOBase:
    # surrogateescape: paths need not be text
    options: Any = {"mode": "rt", "encoding": "utf-8-sig", "errors": "surrogateescape", "newline": ""}
    return gzip.open(file, **options) if file.endswith(".gz") else open(file, **options)


def _numbered(count: int) -> list[str]:
    return [str(number) for number in range(1, count + 1)]


def _csv(file: str) -> Table:
    with _opened(file) as opened:
        head = next((line for line in opened if line.strip()), "")
    delimiter = max(DELIMITERS, key=head.count)
    first = next(csv.reader([head], delimiter=delimiter), [])
    header = not any(is_image_path(cell.strip()) for cell in first)
    columns = [cell.strip() for cell in first] if header else _numbered(len(first))
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{file} names several columns {some(twice)}: columns need different names.")

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        places = [columns.index(name) for name in wanted]
        with _opened(file) as opened:
            csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
            reader = csv.reader(opened, delimiter=delimiter, strict=True)
            skipped = not header
            for cells in _whole(reader, file):
                if not any(cells):
                    continue
                if not skipped:
                    skipped = True
                    continue
                if len(cells) > len(columns):
                    raise DataError(
                        f"{file}, line {reader.line_num:,}: {len(cells)} values for {len(columns)} columns "
                        f"({some(columns)}). Put values that hold {delimiter!r} into quotation marks."
                    )
                yield tuple(cells[place].strip() if place < len(cells) else None for place in places)

    return Table(file, columns, rows, header)


def _whole(reader: Any, file: str) -> Iterator[list[str]]:
    """Yield the rows of a reader. Raises DataError for a value that is quoted in part, which would hide rows."""
    began = 1
    try:
        for cells in reader:
            yield cells
            began = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{file}, line {began:,}: {error}. A value that begins with a quotation mark ends with the next one; write "
            'those inside a value twice: "the ""big"" dog".'
        ) from error


def _json(file: str) -> Table:
    def objects() -> Iterator[dict[str, Any]]:
        with _opened(file) as opened:
            if file.removesuffix(".gz").endswith(".json"):
                yield from _of_list(file, json.load(opened))
                return
            for number, line in enumerate(opened, 1):
                if line.strip():
                    try:
                        value = json.loads(line)
                    except ValueError as error:
                        raise DataError(f"{file}, line {number:,} is not JSON: {error}") from error
                    yield value if isinstance(value, dict) else _refuse_value(file, value)

    columns: dict[str, None] = {}
    for one, _ in zip(objects(), range(LOOK_AT), strict=False):
        columns |= dict.fromkeys(one)

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        return (tuple(one.get(name) for name in wanted) for one in objects())

    return Table(file, list(columns), rows)


def _of_list(file: str, value: Any) -> Iterable[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return value
    return _refuse_value(file, value)


def _refuse_value(file: str, value: Any) -> NoReturn:
    raise DataError(
        f'{file} holds {type(value).__name__} values: expected an object for each image, such as {{"path": "a.jpg", "label": '
        '"cat"}, one in each line (.jsonl) or in a list (.json).'
    )


def _parquet(file: str) -> Table:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f'{file} needs the package pyarrow: pip install "sslvision[parquet]", or write the list as CSV.'
        ) from error
    schema = parquet.read_schema(file)

    def batches(wanted: Sequence[str]) -> Iterator[Any]:
        with parquet.ParquetFile(file, memory_map=True) as opened:
            yield from opened.iter_batches(batch_size=1 << 16, columns=list(dict.fromkeys(wanted)))

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        for batch in batches(wanted):
            columns = {name: batch.column(name).to_pylist() for name in set(wanted)}
            yield from zip(*(columns[name] for name in wanted), strict=True)

    return Table(file, list(schema.names), rows, batches=batches)


def _text(file: str) -> Table:
    """Return a path in each line; or a path and a label, if what is before the last space or tab ends like an image."""

    def lines() -> Iterator[str]:
        with _opened(file) as opened:
            yield from (text for line in opened if (text := line.strip()))

    def pair(line: str) -> list[str]:
        return [part.strip() for part in line.rsplit(None, 1)]

    head = [line for line, _ in zip(lines(), range(LOOK_AT), strict=False)]
    labeled = bool(head) and all(not is_image_path(line) and is_image_path(pair(line)[0]) for line in head)

    def rows(wanted: Sequence[str]) -> Iterator[Row]:
        for number, line in enumerate(lines(), 1):
            cells = pair(line) if labeled else [line]
            if len(cells) < 1 + labeled:
                raise DataError(f"{file}, entry {number:,}: {line!r} has no label, as the others have.")
            yield tuple(cells[int(name) - 1] for name in wanted)

    return Table(file, _numbered(1 + labeled), rows, header=False)
