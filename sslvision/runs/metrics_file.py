"""Reading a run's `metrics.csv`, which `MetricsCSV` writes. Imports nothing slow."""

import csv
import io
import os
from pathlib import Path

from sslvision.errors import DataError

Row = dict[str, str]  # the cells as in the file


def read_metrics(path: str | os.PathLike[str]) -> dict[str, list[float | None]]:
    """Return the columns of a `metrics.csv`, in its order; None where a row has no value. Raises DataError."""
    columns, rows = parse_metrics(Path(path))
    return {name: [float(row[name]) if row.get(name) else None for row in rows] for name in columns}


def parse_metrics(path: Path) -> tuple[list[str], list[Row]]:
    """Return the columns of a `metrics.csv`, and its rows without empty cells. Raises DataError."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise DataError(f"There is no {path}: has this run logged anything yet?") from None
    whole = text[: text.rfind("\n") + 1]  # without an incomplete last line
    reader = csv.DictReader(io.StringIO(whole))
    columns = list(reader.fieldnames or ["step", "epoch"])
    if columns[:2] != ["step", "epoch"]:
        raise DataError(f"{path} is not a metrics file of this program: its columns begin with {columns[:2]}.")
    return columns, [{name: cell for name, cell in row.items() if cell} for row in reader]
