"""The record of a comparison: its folder, its settings, and every training that has ended."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sslvision.errors import UsageError
from sslvision.runs import run_files
from sslvision.runs.redaction import redact
from sslvision.settings import Finetune
from sslvision.system.files import written_whole

MAY_CHANGE = ("labels_per_class", "seeds", "name", "output_dir", "resume", "overwrite", "about", "logger")

CONTENTS = """\
# {name}

Made by `{command}`. The same command continues where it was stopped.

| file | what it is |
| --- | --- |
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
    record, kept = folder / "cells.jsonl", folder / "settings.json"
    plain = json.loads(json.dumps(redact(dataclasses.asdict(settings))))
    resumes = kept.is_file() and not (settings.overwrite or settings.dry_run)
    done = recorded_trainings(record) if resumes else {}
    if done:  # before the first training is done, any setting may be corrected
        before = json.loads(kept.read_text())
        changed = [key for key in plain if key not in MAY_CHANGE and plain[key] != before.get(key)]
        if changed:
            differing = ", ".join(f"{key}={plain[key]} (it was {before.get(key)})" for key in changed)
            raise UsageError(
                f"{folder} holds a comparison with other settings: {differing}. Use another name= or overwrite=true."
            )
    run_files.claim(folder, overwrite=settings.overwrite or settings.dry_run, resume=resumes)
    run_files.describe(folder, dataclasses.asdict(settings), words, command="finetune", contents=CONTENTS)
    run_files.write_json(kept, plain)
    with written_whole(record, "w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in done.values())
    return done


def recorded_trainings(file: Path) -> dict[Point, dict[str, Any]]:
    """Return the trainings recorded in cells.jsonl; its last line may be incomplete after a kill."""
    lines = file.read_text().splitlines() if file.is_file() else []
    entries = [json.loads(line) for line in lines if line.endswith("}")]
    return {(entry["arm"], entry["labels"], entry["seed"], entry["lr_ratio"]): entry for entry in entries}
