"""Images listed in CSV files that have the columns `path` (relative to the file) and, if there are labels, `label`."""

import csv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvision import Splits
from sslvision.data.decode import read_image
from sslvision.errors import DataError


class CSVSource:
    """A `sslvision.Source` of image files."""

    images = None  # not in memory: the loader's processes read one image at a time

    def __init__(self, file: str, channels: int):
        with open(file, newline="") as lines:
            rows: list[dict[str, Any]] = list(csv.DictReader(lines))
        if not rows or "path" not in rows[0]:
            raise DataError(f"data.file={file} must have a column `path` and at least one row.")
        self.name, self.channels = file, channels
        self.paths = [str(Path(file).parent / row["path"]) for row in rows]
        self.classes: tuple[str, ...] | None = None
        self.labels: Tensor | None = None
        if "label" in rows[0]:
            self.classes = tuple(sorted({row["label"] for row in rows}))
            self.labels = torch.tensor([self.classes.index(row["label"]) for row in rows])

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor:
        return read_image(self.paths[index], self.channels)  # (C, H, W) uint8

    def describe(self, index: int) -> str:
        return self.paths[index]


def open_csv(*, file: str, test_file: str | None = None, channels: int = 3) -> Splits:
    """Return the images to train on and, if given, those to test on."""
    return Splits(CSVSource(file, channels), None if test_file is None else CSVSource(test_file, channels))
