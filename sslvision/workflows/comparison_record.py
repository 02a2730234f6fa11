"""The record of a comparison: its folder, its settings, and every training that has ended."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslvision.settings import Finetune
from sslvision.workflows import trainings_record

RECORD = "cells.jsonl"
MAY_CHANGE = ("labels_per_class", "seeds", "name", "output_dir", "resume", "overwrite", "about", "logger")

CONTENTS = """\
# {name}

Made by `{command}`. The same command continues where it was stopped.

| file | what it is |
| --- | --- |
| report.html | all of it to look at; opens in a browser without a network |
| comparison.csv | top-1 for each arm and number of labels: mean and standard deviation over the seeds; low, high: its 95 % \
interval over test sets of this size |
| comparison.png | the same as a figure |
| results.json | what was left out of the images or guessed, and how many could not be read, under `findings` |
| cells.jsonl | every training: arm, labels, seed, learning rate, validation and test accuracy, seconds |
| config.yaml, environment.json | all settings; versions, git commit and hardware |
"""

Point = tuple[str, Any, int, float]  # arm, labels per class, seed, learning rate as a ratio to pretraining's


def claim(settings: Finetune, folder: Path, words: Sequence[str]) -> dict[Point, dict[str, Any]]:
    """Claim the comparison's folder, and return the trainings done before.

    Raises:
        UsageError: The folder is used by something else, or by a comparison with other settings.
    """
    done = trainings_record.claim(
        settings,
        folder,
        words,
        file=RECORD,
        kind="comparison",
        command="finetune",
        contents=CONTENTS,
        may_change=MAY_CHANGE,
    )
    return {(entry["arm"], entry["labels"], entry["seed"], entry["lr_ratio"]): entry for entry in done}
