"""A run's metrics as one wide `metrics.csv`, for spreadsheets and for the figures.

Lightning's CSVLogger deletes the earlier metrics when a run is resumed in its folder. This one appends; only `rewind`
deletes rows.
"""

import csv
import io
import os
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from sslvision.runs.metrics_file import Row, parse_metrics
from sslvision.runs.metrics_file import read_metrics as read_metrics
from sslvision.system.files import written_whole


class MetricsCSV(Logger):
    """Writes `folder/metrics.csv`: columns `step`, `epoch` and then the metrics in their order of appearance.

    Every row is written when it is logged, so a killed process loses none. A new column rewrites the file through a
    temporary one. Metrics logged for the step of the last row are added to that row. Existing metrics in the folder are
    kept. Only rank zero reads or writes. Of the rows, only the last one is kept in memory.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self._columns = ["step", "epoch"]
        self._last: Row | None = None
        self._last_row_at: int | None = None  # its offset in bytes; None: the file has not been read yet

    @property
    def name(self) -> str:
        """Empty: the folder has no subfolders for names and versions."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as `name`."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: hyper-parameters have their own file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write one row, or complete the last one when `step` is its own (or None)."""
        self._open()
        if step is None:
            step = int(self._last["step"]) if self._last else 0
        row = {"step": str(step)} | {name: _cell(value) for name, value in metrics.items() if name != "step"}
        same_step = self._last is not None and self._last["step"] == row["step"]
        if same_step:
            row = (self._last or {}) | row
        new = [name for name in row if name not in self._columns]
        if new:
            _, rows = parse_metrics(self.path)
            self._columns += new
            self._rewrite([*(rows[:-1] if same_step else rows), row])
        else:
            self._write_last(row, over_the_last=same_step)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Delete what was logged after `step`, when a run resumes from a checkpoint of that step."""
        self._open()
        _, rows = parse_metrics(self.path)
        kept = [row for row in rows if int(row["step"]) <= step]
        if len(kept) < len(rows):
            self._rewrite(kept)

    def _open(self) -> None:
        """Read existing metrics; the last row may be incomplete if the process was killed."""
        if self._last_row_at is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows: list[Row] = []
        if self.path.exists():
            self._columns, rows = parse_metrics(self.path)
        self._rewrite(rows)

    def _write_last(self, row: Row, *, over_the_last: bool) -> None:
        with self.path.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            self._last_row_at = self._last_row_at if over_the_last else end
            assert self._last_row_at is not None
            file.seek(self._last_row_at)
            file.write(self._lines([row]))  # one write, so that a reader never sees a part of it
            file.truncate()
        self._last = row

    def _rewrite(self, rows: list[Row]) -> None:
        head = self._lines([dict(zip(self._columns, self._columns, strict=True)), *rows[:-1]])
        with written_whole(self.path) as file:
            file.write(head + self._lines(rows[-1:]))
        self._last, self._last_row_at = (rows[-1] if rows else None), len(head)

    def _lines(self, rows: list[Row]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, restval="", lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, int) else f"{float(value):.8g}"  # 8 digits: the precision of fp32
