"""What search, duplicates, outliers, select and cluster share: opening embeddings, a CSV file, and a contact sheet."""

import csv
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sslvision.data.decode import MAX_PIXELS, read_image
from sslvision.data.eight_bits import value_range_from
from sslvision.data.source import Source, SourceGone, UnreadableImage
from sslvision.embeddings.parts import ABOUT, as_path, as_text
from sslvision.embeddings.vectors import Embeddings, open_embeddings
from sslvision.errors import SSLVisionError, UsageError
from sslvision.evaluation.placement import place_for
from sslvision.figures.contact_sheet import CELL, COLUMNS, SheetRow, contact_sheet
from sslvision.runs.config import refuse_foreign
from sslvision.system.files import written_whole
from sslvision.training.trainer import configure_torch, select_device
from sslvision.workflows.pretraining import open_splits

BESIDE = 1 << 30  # bytes on a GPU for products, beside the vectors
SHOWN = 30  # rows of a contact sheet


class Settings(Protocol):
    """What the settings of these commands share."""

    embeddings: str | None
    center: bool | None
    device: Any
    output_dir: str | None
    overwrite: bool


class Opened:
    """Embeddings, the device that compares them, and the folder of the results.

    Args:
        settings: Settings of the command.
        default: Name of the folder of the results, in that of the embeddings.
        file: Name of the CSV file.
    """

    def __init__(self, settings: Settings, default: str, file: str):
        self.console = Console(soft_wrap=True, highlight=False)
        self.device = select_device(settings.device)
        configure_torch(self.device.type)
        self.csv = _results_folder(settings, default, file) / file
        self.rows: Embeddings = open_embeddings(settings.embeddings or "", center=settings.center)
        whole = self.rows.vectors
        # On a GPU all vectors stay there, if they fit; else blocks of them are sent for each pass.
        self.vectors: Tensor = whole.to(place_for(self.device, whole.nbytes + BESIDE))
        self.pictures = Pictures(self.rows)

    @contextmanager
    def progress(self, text: str) -> Iterator[Callable[[int, int], None]]:
        """Show a bar, which the function that is returned moves."""
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"))
        hidden = not self.console.is_terminal
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True, disable=hidden) as bars:
            bar = bars.add_task(text, total=None)
            yield lambda done, total: bars.update(bar, completed=done, total=total)

    def about(self, row: int) -> list[str]:
        """Return the columns of an image that every CSV file has: path, split, label and prediction, as far as known."""
        columns = (self.rows.splits, self.rows.labels, self.rows.predictions)
        return [in_spreadsheets(self.rows.paths[row]), *(column[row] for column in columns if column is not None)]

    @property
    def headings(self) -> list[str]:
        """Return the headings of those columns."""
        columns = {"split": self.rows.splits, "label": self.rows.labels, "prediction": self.rows.predictions}
        return ["path", *(name for name, column in columns.items() if column is not None)]

    def write(self, headings: Sequence[str], lines: Iterable[Sequence[Any]]) -> int:
        """Write the CSV file, and return the number of rows."""
        count = 0
        self.csv.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(self.csv, "w", newline="", encoding="utf-8") as opened:
            writer = csv.writer(opened)
            writer.writerow(headings)
            for line in lines:
                writer.writerow(line)
                count += 1
        return count

    def draw(self, rows: Sequence[SheetRow], *, title: str, columns: int = COLUMNS) -> Path:
        """Save the contact sheet beside the CSV file, and return its path."""
        file = self.csv.with_suffix(".png")
        figure = contact_sheet(rows, title=title, columns=columns)
        with written_whole(file) as opened:
            figure.savefig(opened, format="png")
        return file

    def sheet_row(self, heading: str, rows: Sequence[int], captions: Sequence[str]) -> SheetRow:
        """Return a row of the contact sheet."""
        return SheetRow(heading, [self.pictures.read(row) for row in rows], captions)

    def end(self, told: str, sheet: Path | None) -> Path:
        """Print what was found and where it is; return the CSV file."""
        self.console.print(told, markup=False)
        self.console.print(f"{self.csv}{f' and {sheet.name}' if sheet else ''}", markup=False)
        if root := self.rows.about["root"]:
            self.console.print(f"Paths are relative to {root}.", markup=False)
        if self.pictures.problem:
            self.console.print(f"The picture lacks images: {self.pictures.problem}", style="yellow", markup=False)
        return self.csv


def _results_folder(settings: Settings, default: str, file: str) -> Path:
    """Return the folder of the results: one without such a file, unless it may be replaced.

    Raises:
        UsageError: The folder that `output_dir` names has one.
    """
    if settings.output_dir is not None:
        folder = Path(settings.output_dir).expanduser()
        if (folder / file).exists() and not settings.overwrite:
            raise UsageError(f"{folder / file} exists: replace it with overwrite=true, or give another output_dir.")
        return folder
    folder = first = Path(settings.embeddings or "").expanduser() / default
    number = 1
    while (folder / file).exists() and not settings.overwrite:
        folder = first.with_name(f"{first.name}-{(number := number + 1)}")
    return folder


def in_spreadsheets(path: str) -> str:
    """Return a path that a spreadsheet does not read as a formula: "./" before it means the same path."""
    return f"./{path}" if path.startswith(("=", "+", "-", "@", "\t", "\r")) else path


class Pictures:
    """The images of embeddings, read again for pictures.

    Image files are found by their paths; images of other sources by opening the source that embeddings.json names.
    """

    def __init__(self, rows: Embeddings):
        self.rows, self.problem = rows, ""
        self.sources: dict[str, Source] = {}
        self.places: dict[str, dict[str, int]] | None = None
        self.value_range = value_range_from(rows.about["data"].get("value_range", "auto"))

    def read(self, row: int) -> Tensor | None:
        """Return an image (C, H, W), perhaps smaller than it is; None if it cannot be read."""
        path = self.file(row)
        try:
            if path is None:
                return self._of_source(row)
            max_pixels = self.rows.about["data"].get("max_pixels", MAX_PIXELS)
            channels = self.rows.about["channels"]
            return read_image(path, channels, at_least=CELL, max_pixels=max_pixels, value_range=self.value_range)
        except (UnreadableImage, SourceGone) as error:
            self.problem = self.problem or f"{self.rows.paths[row]} ({error})."
            return None

    def file(self, row: int) -> str | None:
        """Return the path of an image file; None if there is none."""
        text = self.rows.paths[row]
        found = (os.path.join(self.rows.about["root"], path) for path in (text, as_path(text)))
        return next((path for path in found if os.path.isfile(path)), None)

    def _of_source(self, row: int) -> Tensor | None:
        if self.places is None:
            self.places = self._open()
        split = self.rows.splits[row]
        place = self.places.get(split, {}).get(self.rows.paths[row])
        if place is None:
            self.problem = self.problem or f"{self.rows.paths[row]} is not there any more."
            return None
        return self.sources[split].read(place)

    def _open(self) -> dict[str, dict[str, int]]:
        """Open the source that the embeddings are of, and return the index of each image by split and name."""
        about = self.rows.about
        try:
            refuse_foreign("data", about["data"], self.rows.folder / ABOUT)
            splits = open_splits({**about["data"], "channels": about["channels"]})
        except SSLVisionError as error:
            self.problem = str(error)
            return {}
        found = {name: source for name in ("train", "validation", "test") if (source := getattr(splits, name))}
        if about["root"] and any(os.path.isfile(source.describe(0)) for source in found.values()):
            return {}  # files: those that are there have been found by their paths
        self.sources = found
        return {
            name: {as_text(source.describe(index)): index for index in range(len(source))}
            for name, source in found.items()
        }


def caption(opened: Opened, row: int, number: float | None = None) -> str:
    """Return what is written below an image: a number, and the name of its file or its label."""
    name = opened.rows.paths[row]
    name = name.rpartition("/")[2] if opened.rows.about["root"] else name.rpartition(" image ")[2]
    label = opened.rows.labels[row] if opened.rows.labels is not None else ""
    shown = label or name
    return shown if number is None else f"{number:.3f} {shown}"


def rows_of_paths(opened: Opened, paths: Iterable[str]) -> tuple[list[int], list[str]]:
    """Return the rows of images by their paths, relative to the data's folder or absolute, and the paths that have none."""
    root = os.path.join(opened.rows.about["root"], "") if opened.rows.about["root"] else None
    places = {path: row for row, path in enumerate(opened.rows.paths)}
    found, missing = [], []
    for path in paths:
        text = as_text(path)
        inside = text[len(root) :].replace(os.sep, "/") if root and text.startswith(root) else text.removeprefix("./")
        if (row := places.get(inside, places.get(text))) is None:
            missing.append(path)
        else:
            found.append(row)
    return found, missing


def in_words(count: int, one: str, several: str) -> str:
    """Return a number with its noun."""
    return f"{count:,} {one if count == 1 else several}"
