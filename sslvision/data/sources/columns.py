"""Columns of a Parquet list as arrays, batch by batch: no row becomes a Python object, so that a list may have 100 million."""

import io
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from sslvision.data.encoded import PathTable
from sslvision.data.sources.tables import Table
from sslvision.errors import DataError

LARGE = 1 << 28  # bytes of paths that are kept in memory while more are read; more are written to a temporary file


def has_columns(table: Table, path: str, others: Sequence[str]) -> bool:
    """Return whether a table can be read by columns: paths are texts, and the others texts or numbers."""
    if table.batches is None:
        return False
    import pyarrow as pa

    first = next(table.batches([path, *others]), None)
    if first is None:
        return False
    types = {name: first.schema.field(name).type for name in (path, *others)}
    is_text = pa.types.is_string(types[path]) or pa.types.is_large_string(types[path])
    return is_text and not any(pa.types.is_nested(types[name]) or pa.types.is_binary(types[name]) for name in others)


class PathColumns:
    """Collects the paths of several batches."""

    def __init__(self) -> None:
        self.until_done = ExitStack()
        self.file: Any = io.BytesIO()
        self.lengths, self.bytes = list[np.ndarray](), 0

    def add(self, column: Any, change: Callable[[Any], Any]) -> None:
        """Add the paths of an Arrow array of texts, each as `change` returns it."""
        import pyarrow as pa

        column = change(column.cast(pa.large_string()))
        offsets = np.frombuffer(column.buffers()[1], np.int64)[column.offset : column.offset + len(column) + 1]
        texts = memoryview(column.buffers()[2] or b"")[offsets[0] : offsets[-1]]
        if self.bytes <= LARGE < self.bytes + len(texts):
            file = self.until_done.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            file.write(self.file.getbuffer())
            self.file = file
        self.file.write(texts)
        self.bytes += len(texts)
        self.lengths.append(np.diff(offsets).astype(np.int32))

    def table(self) -> PathTable:
        """Return the table of all of them."""
        offsets = np.zeros(1 + sum(map(len, self.lengths)), np.int64)
        place = 1
        for lengths in self.lengths:
            offsets[place : place + len(lengths)] = lengths
            place += len(lengths)
        np.cumsum(offsets, out=offsets)
        if isinstance(self.file, io.BytesIO):
            blob = np.frombuffer(self.file.getbuffer(), np.uint8)
        else:
            self.file.flush()
            blob = np.asarray(np.memmap(self.file, np.uint8, "r"))
        self.until_done.close()  # the file lives as long as it is mapped
        return PathTable.joined(blob, offsets)


def changed_paths(suffix: str, backslashes: bool) -> Callable[[Any], Any]:
    """Return what makes paths of an array of texts: with an ending, and with slashes for backslashes."""
    import pyarrow as pa
    from pyarrow import compute

    def change(column: Any) -> Any:
        if suffix:
            column = compute.binary_join_element_wise(
                column, pa.scalar(suffix, pa.large_string()), pa.scalar("", pa.large_string())
            )
        return compute.replace_substring(column, "\\", "/") if backslashes else column

    return change


def check_filled(column: Any, table: Table, path: str, before: int) -> None:
    """Raise DataError if a row has no path, of which there were `before` before."""
    from pyarrow import compute

    missing = compute.fill_null(compute.equal(column, ""), True)
    if (row := compute.index(missing, True).as_py()) >= 0:
        raise DataError(f"{table.file}, row {before + row + 1:,} has no path (column {path}).")


def numbers_of(column: Any, code: Callable[[Any], int], missing: int) -> np.ndarray:
    """Return the number of each value of an Arrow array, (N,) int32; `code` is called once for each that differs."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    encoded = column.dictionary_encode()
    codes = np.array([*map(code, encoded.dictionary.to_pylist()), missing], np.int32)
    return codes[encoded.indices.fill_null(len(codes) - 1).to_numpy(zero_copy_only=False)]


def batches_of(table: Table, wanted: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the columns of each batch by name."""
    assert table.batches is not None
    for batch in table.batches(wanted):
        yield {name: batch.column(name) for name in wanted}
