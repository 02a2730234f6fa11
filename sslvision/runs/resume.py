"""Going on with a run: from which checkpoint, whether under the same settings, and what of the run's files is made again."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.loggers import Logger

from sslvision import __version__
from sslvision.errors import UsageError
from sslvision.runs import run_folder
from sslvision.runs.checkpoint import RECORD, newest_good, read_head
from sslvision.runs.metrics import MetricsCSV
from sslvision.runs.redaction import redact
from sslvision.runs.renamed_settings import renamed

# Settings that may differ when a run goes on, and why. All others say what is computed, and must be the same.
MAY_DIFFER = {
    "where the run lies and how it is begun": ("name", "output_dir", "overwrite", "resume"),
    "how the same numbers are computed, but for rounding": ("activation_checkpointing", "compile", "cuda_graphs"),
    "read before the first update only; the checkpoint has its outcome": ("init_from",),
    "what is said of the run": ("about", "reference", "logger"),
    "what looks on, and when it gives up": (
        *("health", "max_skipped", "knn_every_epochs", "evaluate_images"),
        *("checkpoint_every_epochs", "checkpoint_every_steps", "keep_checkpoints"),
    ),
    "where and how the images are read; their number is compared": (
        *("data.root", "data.workers", "data.max_unreadable", "data.cache_dir"),
    ),
    "the machine; the images of every update are the same on any": tuple(
        f"trainer.{key}"
        for key in (
            *("accelerator", "devices", "num_nodes", "strategy", "accumulate_grad_batches", "plugins", "benchmark"),
            *("enable_progress_bar", "log_every_n_steps", "profiler", "deterministic", "detect_anomaly", "barebones"),
            *("enable_model_summary", "enable_checkpointing", "default_root_dir", "max_time"),
            "precision",  # the one in effect is compared
        )
    ),
}


@dataclasses.dataclass(frozen=True)
class Resume:
    """Where a run goes on.

    Attributes:
        path: of the checkpoint.
        step: optimizer updates done.
        record: settings and facts of the run that wrote it, as `record` made them.
        damaged: newer checkpoints in the same folder that are not whole, with the reasons.
    """

    path: Path
    step: int
    record: dict[str, Any]
    damaged: dict[Path, str]

    @property
    def findings(self) -> list[str]:
        """Return what a person should know, in words."""
        names = ", ".join(file.name for file in self.damaged)
        reasons = " ".join(self.damaged.values())
        return [f"Went on from {self.path.name} (update {self.step}), not from {names}: {reasons}"] if names else []

    def set_aside(self) -> None:
        """Rename the damaged checkpoints, so that none is taken for a good one again."""
        for file in self.damaged:
            file.rename(file.with_name(f"{file.name}.damaged"))


def checkpoint_to_resume(resume: str | None, folder: Path) -> Resume | None:
    """Return the checkpoint that `resume` means; none if it is None, or "auto" and there is none yet.

    A folder's checkpoints stand in for one another: the newest whole one is taken. A file is that file.

    Raises:
        UsageError: a path was given and nothing is there; or nothing whole is there.
    """
    if resume is None:
        return None
    given = Path(resume).absolute()
    if resume != "auto" and given.is_file():
        return _resume(given, read_head(given), {})
    checkpoints = (folder if resume == "auto" else given) / "checkpoints"
    found = newest_good(checkpoints)
    if found.path is not None:
        return _resume(found.path, found.head, found.damaged)
    if found.damaged:
        raise UsageError(
            f"resume={resume}: no checkpoint in {checkpoints} is whole. {' '.join(found.damaged.values())} Begin anew with "
            "overwrite=true and without resume, or under another name=."
        )
    if resume == "auto":
        return None
    raise UsageError(f"resume={resume}: there is no checkpoint. Give a .ckpt file, a run folder, or auto.")


def _resume(file: Path, head: dict[str, Any], damaged: dict[Path, str]) -> Resume:
    if RECORD not in head or "global_step" not in head:
        raise UsageError(
            f"{file} does not say by which settings it was made, so it cannot be gone on with. init_from= takes its weights."
        )
    return Resume(file, head["global_step"], head[RECORD], damaged)


def may_begin_again(resume: str | None, folder: Path) -> bool:
    """Return whether `folder` is of a run that ended before its first checkpoint, and resume=auto so begins it again."""
    if resume != "auto" or not folder.is_dir() or newest_good(folder / "checkpoints").path is not None:
        return False
    # These two are what a run makes first.
    return (folder / "config.yaml").is_file() or {file.name for file in folder.iterdir()} <= {
        "figures",
        run_folder.LOCK,
    }


def take_folder(folder: Path, settings: Any, resume: Resume | None) -> None:
    """Take a run's folder: a new one, one to be emptied, or its own to go on in; set its damaged checkpoints aside.

    Args:
        folder: of the run.
        settings: have `resume`, `overwrite` and `dry_run`.
        resume: where the run goes on, if it does.

    Raises:
        UsageError: the folder is in use.
    """
    again = resume is not None or may_begin_again(settings.resume, folder)
    run_folder.claim(folder, overwrite=settings.overwrite or settings.dry_run, resume=again)
    if resume is not None:
        resume.set_aside()


def record(settings: Any, **facts: Any) -> dict[str, Any]:
    """Return what a checkpoint says of its run: settings (a dataclass; secrets redacted), facts, and our version."""
    return {"version": __version__, "settings": redact(dataclasses.asdict(settings)), **facts}


def check_same(resume: Resume, now: Mapping[str, Any]) -> None:
    """Compare the record of a checkpoint with this run's.

    Raises:
        UsageError: naming every setting that differs, with both values.
    """
    then = dict(resume.record)
    targets = [one["settings"].get("method", {}).get("_target_") for one in (then, now)]
    then["settings"] = renamed(then["settings"], str(resume.path), trusted=targets[0] == targets[1])
    free = {key for keys in MAY_DIFFER.values() for key in keys}
    before, after = (flat(one["settings"]) for one in (then, now))
    differing = [
        f"{key}: {_shown(before.get(key))} then, {_shown(after.get(key))} now"
        for key in dict.fromkeys([*before, *after])
        if key not in free and before.get(key) != after.get(key)
    ]
    facts = {"precision": "trainer.precision in effect", "images": "training images", "batch": "images per update"}
    differing += [
        f"{words}: {_shown(then.get(key))} then, {_shown(now.get(key))} now"
        for key, words in facts.items()
        if then.get(key) != now.get(key)
    ]
    if differing:
        raise UsageError(
            f"{resume.path} was made under other settings, and going on under these would be neither run. "
            + "; ".join(differing)
            + ". Set them as they were, or begin a new run under another name= (pretraining can start from these weights: "
            f"init_from={resume.path})."
        )


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def rewind_metrics(loggers: Sequence[Logger], resume: Resume | None) -> None:
    """Drop the metrics of updates that are about to be made again."""
    for logger in loggers:
        if isinstance(logger, MetricsCSV):
            logger.rewind(resume.step if resume is not None else 0)


def train_from(
    resume_from: Path | None, trainer: L.Trainer, method: L.LightningModule, data: L.LightningDataModule
) -> None:
    """Train, from a checkpoint if there is one."""
    # Lightning would read the checkpoint into single precision, and turn that into double afterwards.
    trainer.precision_plugin.convert_module(method)
    trainer.fit(method, datamodule=data, ckpt_path=resume_from, weights_only=True if resume_from else None)
