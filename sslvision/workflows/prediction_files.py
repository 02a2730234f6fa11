"""The files of predictions: a CSV file with a row for each image, and the accuracy on images in folders named as classes."""

import csv
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sslvision.errors import StorageError, UsageError
from sslvision.evaluation.confidence import as_json, score
from sslvision.runs.run_files import write_json
from sslvision.system.files import written_whole


class Prediction(NamedTuple):
    """The most likely classes of one image, or the reason why it could not be read."""

    image: str  # path relative to the folder, with "/" on every operating system
    labels: tuple[str, ...]  # most likely first
    probabilities: tuple[float, ...]
    problem: str


def check_output(file: Path) -> None:
    """Make the folder of the CSV file, and try to write there.

    Raises:
        UsageError: There is something else of that name.
        StorageError: The folder cannot be made, or nothing can be written to it.
    """
    if os.path.exists(file) and not os.path.isfile(file):
        what = (
            f"a folder: say output={file / 'predictions.csv'}" if file.is_dir() else "a device: give the path of a file"
        )
        raise UsageError(f"output={file} is {what}.")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise StorageError(
            f"{file.absolute()} cannot be written: {error.strerror}. Give the path of a CSV file in a folder that is "
            "writable: output=..."
        ) from error


def write_csv(rows: Iterable[Prediction], file: str | Path, *, top: int) -> tuple[int, int]:
    """Write image, label, probability, label_2, probability_2, ... and problem, row by row as they are computed.

    The file appears when it is complete; until then a hidden one is written beside it. A path that a spreadsheet would read
    as a formula (=, +, -, @) gets the prefix "./", which means the same path. Names of classes are not changed.

    Args:
        rows: Predictions, from `predict`.
        file: The CSV file; it is replaced if it exists, and its folder is created if necessary.
        top: Number of label columns; at most the number of classes.

    Returns:
        The number of rows, and the number of rows with a problem.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    count = problems = 0
    # surrogateescape: file names are bytes, and are written unchanged.
    with written_whole(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
        writer = csv.writer(opened)
        writer.writerow(["image", "label", "probability", *_columns(top), "problem"])
        for row in rows:
            cells: list[Any] = [
                cell
                for label, probability in zip(row.labels, row.probabilities, strict=True)
                for cell in (label, f"{probability:.6f}")
            ]
            image = f"./{row.image}" if row.image.startswith(("=", "+", "-", "@", "\t", "\r")) else row.image
            writer.writerow([image, *(cells or [""] * (2 * top)), row.problem])
            count, problems = count + 1, problems + bool(row.problem)
    return count, problems


def _columns(top: int) -> list[str]:
    return [f"{column}_{place}" for place in range(2, top + 1) for column in ("label", "probability")]


def with_true_classes(
    rows: Iterable[Prediction], classes: Sequence[str], known: list[tuple[str, tuple[str, ...]]]
) -> Iterator[Prediction]:
    """Yield predictions unchanged; append (class, predicted labels) to `known` for readable images in a class's folder.

    The folder is the nearest one above the image that has the name of a class.
    """
    names = set(classes)
    for row in rows:
        folders = [folder for folder in row.image.split("/")[:-1] if folder in names]
        if folders and row.labels:
            known.append((folders[-1], row.labels))
        yield row


def write_accuracy(
    known: Sequence[tuple[str, tuple[str, ...]]], classes: Sequence[str], output: Path, *, unknown: int
) -> str:
    """Write the accuracy on images in class folders beside the CSV file, and return it in words.

    Args:
        known: Pairs of the true class and the predicted ones, best first.
        classes: Names of all classes.
        output: The CSV file.
        unknown: Number of readable images in no class's folder.
    """
    index = {name: number for number, name in reversed([*enumerate(classes)])}
    ranking = torch.tensor([[index[label] for label in labels[:5]] for _, labels in known])  # (M, <= 5)
    scores = score(ranking, torch.tensor([index[name] for name, _ in known]), classes=len(classes))
    facts = as_json(scores, classes)
    if ranking.shape[1] < min(5, len(classes)):
        del facts["top5"]  # fewer classes were asked for
    file = accuracy_file(output)
    write_json(file, {**facts, "images": len(known), "images_without_a_class": unknown})
    low, high = scores.interval
    return (
        f"{scores.top1:.1f} % of {len(known):,} images in folders named as a class are predicted as that class (95 % interval "
        f"{low:.1f} to {high:.1f}): {file.absolute()}"
        + (f". {unknown:,} images lie in no such folder, and are not counted." if unknown else "")
    )


def accuracy_file(output: Path) -> Path:
    """Return the file beside the predictions that has their accuracy."""
    return output.with_name(f"{output.stem}-accuracy.json")
