"""The record of several trainings in one folder: their settings, and each training that has ended, which is not repeated."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sslvision.errors import UsageError
from sslvision.runs import run_files
from sslvision.runs.redaction import redact
from sslvision.runs.resume import UNRECORDED
from sslvision.settings import Finetune, Pretrain
from sslvision.system.files import written_whole


def claim(
    settings: Pretrain | Finetune,
    folder: Path,
    words: Sequence[str],
    *,
    file: str,
    kind: str,
    command: str,
    contents: str,
    may_change: Sequence[str],
) -> list[dict[str, Any]]:
    """Claim the folder of several trainings, and return the records of those done before.

    Args:
        settings: All settings. With `overwrite` or `dry_run`, nothing that was done before counts.
        folder: The folder.
        words: The command line, for the record.
        file: Name of the file of records, one line of JSON for each training.
        kind: What the trainings are together, for messages.
        command: Name of the command.
        contents: Template of README.md.
        may_change: Settings that may differ from those of the trainings done before.

    Raises:
        UsageError: The folder is used by something else, or by trainings with other settings.
    """
    record, kept, overwrite = folder / file, folder / "settings.json", settings.overwrite or bool(settings.dry_run)
    plain = json.loads(json.dumps(redact(dataclasses.asdict(settings))))
    resumes = kept.is_file() and not overwrite
    done = recorded(record) if resumes else []
    if done:  # before the first training is done, any setting may be corrected
        before = {**UNRECORDED, **json.loads(kept.read_text())}
        changed = [key for key in plain if key not in may_change and plain[key] != before.get(key)]
        if changed:
            differing = ", ".join(f"{key}={plain[key]} (it was {before.get(key)})" for key in changed)
            raise UsageError(
                f"{folder} holds a {kind} with other settings: {differing}. Use another name= or overwrite=true."
            )
    run_files.claim(folder, overwrite=overwrite, resume=resumes)
    run_files.describe(folder, dataclasses.asdict(settings), words, command=command, contents=contents)
    run_files.write_json(kept, plain)
    with written_whole(record, "w") as whole:
        whole.writelines(json.dumps(entry) + "\n" for entry in done)
    return done


def recorded(file: Path) -> list[dict[str, Any]]:
    """Return the trainings on record; the last line may be incomplete after a kill."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def append(file: Path, entry: Mapping[str, Any]) -> None:
    """Record a training that has ended, on the disk when this returns."""
    with open(file, "a") as opened:
        opened.write(json.dumps(entry) + "\n")
        opened.flush()
        os.fsync(opened.fileno())
