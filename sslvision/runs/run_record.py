"""What the folder of a run tells, read without torch: settings, environment, results, metrics, pictures, and how it ended.

A folder of an earlier version, or of a run that was killed, has fewer files; what cannot be read is said.
"""

import csv
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from sslvision.errors import SSLVisionError, UsageError
from sslvision.runs.config import read_settings
from sslvision.runs.metrics_file import read_metrics
from sslvision.runs.redaction import redact
from sslvision.system.files import written_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Kind = Literal["pretrain", "finetune", "compare", "probe", "scale", "tune", "other"]
Status = Literal["finished", "running", "stopped"]
Metrics = dict[str, list[float | None]]

STOPPED = "stopped.json"  # why a run ended before its end, and when
TRAININGS = ("trials.csv", "steps.jsonl", "rungs.jsonl")  # what a search, the seven steps or a ladder records
LOGS = ("metrics.csv", "scratch/metrics.csv", "cells.jsonl", *TRAININGS)  # what a run writes while it goes on


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder tells it; what the folder does not have is empty.

    Attributes:
        folder: The run folder.
        kind: What kind of run it is.
        status: Whether it has ended. A run is `stopped` also if it was killed.
        settings: The content of config.yaml, under current names.
        environment: The content of environment.json.
        results: The content of results.json; of a run that was stopped, empty.
        metrics: The columns of metrics.csv.
        scratch: Those of the training from scratch of a fine-tuning run.
        trainings: What is recorded of each training of a search, of the seven steps, or of a ladder.
        pictures: Files of pictures by name.
        reason: Why it was stopped, if that is known.
        ended: When it ended, or wrote something last.
        problems: What could not be read, in sentences.
    """

    folder: Path
    kind: Kind
    status: Status
    settings: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)
    scratch: Metrics = field(default_factory=dict)
    trainings: tuple[dict[str, Any], ...] = ()
    pictures: dict[str, Path] = field(default_factory=dict)
    reason: str = ""
    ended: datetime | None = None
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the folder."""
        return self.folder.name

    @property
    def steps(self) -> int:
        """Return the number of updates that were logged."""
        return int(max((step for step in self.metrics.get("step", []) if step is not None), default=0))

    def curve(self, name: str, *, scratch: bool = False) -> tuple[list[float], list[float]]:
        """Return the epochs at which a metric was logged, and its values."""
        metrics = self.scratch if scratch else self.metrics
        pairs = zip(metrics.get("epoch", []), metrics.get(name, []), strict=False)
        kept = [(epoch, value) for epoch, value in pairs if epoch is not None and value is not None]
        return [epoch for epoch, _ in kept], [value for _, value in kept]


def read_run(folder: Path, *, own: bool = False) -> RunRecord:
    """Read the folder of a run.

    Args:
        folder: The folder.
        own: Whether this process works in it, and has ended the run.

    Raises:
        UsageError: It is not the folder of a run.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not the folder of a run: there is no such folder.")
    if not (folder / "config.yaml").is_file():
        near = sorted(file.parent.name for file in folder.glob("*/config.yaml"))
        inside = f" It contains runs: {', '.join(near[:5])}{', ...' if len(near) > 5 else ''}." if near else ""
        raise UsageError(f"{folder} is not the folder of a run: it has no config.yaml.{inside}")
    problems: list[str] = []
    settings = read_settings(folder / "config.yaml")
    environment = _json(folder / "environment.json", problems)
    stopped, results = _json(folder / STOPPED, problems), _json(folder / "results.json", problems)
    kind = kind_of(settings)
    status = _status(folder, kind, settings, results, own=own)
    return RunRecord(
        folder=folder,
        kind=kind,
        status=status,
        settings=settings,
        environment=environment,
        results=results,
        metrics=_metrics(folder / "metrics.csv", problems),
        scratch=_metrics(folder / "scratch" / "metrics.csv", problems),
        trainings=_trainings(folder, problems),
        pictures=_pictures(folder),
        reason=str(stopped.get("reason", "")) if status == "stopped" else "",
        ended=_ended(folder),
        problems=tuple(problems),
    )


def kind_of(settings: Mapping[str, Any]) -> Kind:
    """Return the kind of a run, by the settings that only it has."""
    if "rungs" in settings:
        return "scale"
    if "trial_epochs" in settings:
        return "tune"
    if "protocol" in settings:
        return "probe"
    if "lr_ratio" in settings or "labels_per_class" in settings:
        return "compare" if settings.get("compare") else "finetune"
    if "method" in settings and "data" in settings:
        return "pretrain"
    return "other"


def record_stop(folder: Path, reason: str) -> None:
    """Write why a run ended before its end."""
    told = {"reason": redact(reason), "when": datetime.now().astimezone().isoformat(timespec="seconds")}
    with written_whole(folder / STOPPED, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(told, file, indent=2, ensure_ascii=False)


def is_held(folder: Path) -> bool:
    """Return whether another process works in a folder (run_files.claim); False where there are no locks.

    Not for the folder of a run of this process: closing the file would release its lock.
    """
    if fcntl is None:
        return False
    try:
        opened = os.open(folder / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.lockf(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(opened)
    return False


def _status(folder: Path, kind: Kind, settings: Mapping[str, Any], results: Mapping[str, Any], *, own: bool) -> Status:
    """Return whether a run has ended. Whoever has trained in Python keeps the folder's lock after its end."""
    written = max(map(_time, (folder / name for name in LOGS)))
    stopped, done = _time(folder / STOPPED), _time(folder / "results.json") if results else 0.0
    if not own and max(stopped, done) <= written and is_held(folder):
        return "running"
    if kind == "compare" and done > stopped:
        arms = len({cell.get("arm") for cell in results.get("cells", [])})
        missing = len(results.get("cells", [])) < arms * len(settings.get("labels_per_class") or [])
        return "stopped" if missing else "finished"
    return "finished" if done > stopped else "stopped"


def _time(file: Path) -> float:
    return file.stat().st_mtime if file.is_file() else 0.0


def _json(file: Path, problems: list[str]) -> dict[str, Any]:
    """Return the content of a JSON file; empty if there is none, or if it is not one."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{file.name} cannot be read: {error}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{file.name} is not as sslvision writes it.")
        return {}
    return content


def _metrics(file: Path, problems: list[str]) -> Metrics:
    if not file.is_file():
        return {}
    try:
        return read_metrics(file)
    except (OSError, ValueError, SSLVisionError) as error:
        problems.append(f"{file.name} cannot be read: {error}")
        return {}


def _trainings(folder: Path, problems: list[str]) -> tuple[dict[str, Any], ...]:
    """Return what is recorded of the trainings of a folder; the last line may be incomplete after a kill."""
    found: list[dict[str, Any]] = []
    for name in TRAININGS:
        file = folder / name
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            if name.endswith(".csv"):
                found += csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
            else:
                found += [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        except (OSError, ValueError, csv.Error) as error:
            problems.append(f"{name} cannot be read: {error}")
    return tuple(found)


def _pictures(folder: Path) -> dict[str, Path]:
    files = [*sorted(folder.glob("*.png")), *sorted((folder / "figures").glob("*.png"))]
    return {file.stem: file for file in files}


def _ended(folder: Path) -> datetime | None:
    for name in ("results.json", STOPPED, "metrics.csv", "config.yaml"):
        if (folder / name).is_file():
            return datetime.fromtimestamp((folder / name).stat().st_mtime).astimezone()
    return None
