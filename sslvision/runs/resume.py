"""Resuming a run: from which checkpoint, under which settings, and which metrics will be written again."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger

from sslvision import __version__
from sslvision.data import order
from sslvision.errors import UsageError
from sslvision.runs import run_files
from sslvision.runs.checkpoint import RECORD, newest_good, read_head
from sslvision.runs.metrics import MetricsCSV
from sslvision.runs.redaction import redact
from sslvision.runs.renamed_settings import renamed
from sslvision.settings import locate
from sslvision.system.checkpoint_folders import is_folder_of_shards, is_of_lightning, remove

# Settings that may differ when a run is resumed, and why. All others determine what is computed, and must be the same.
UNRECORDED = {"scratch_warmup": 0.0}  # settings that earlier versions did not have: the values they acted by
MAY_DIFFER = {
    "where the run folder is, and how the run starts": ("name", "output_dir", "overwrite", "resume"),
    "how the same numbers are computed, up to rounding": ("activation_checkpointing", "compile", "cuda_graphs"),
    "used before the first update only; the checkpoint contains the result": ("init_from",),
    "how long processes wait for one another, and what is planned only": ("timeout", "plan_gb"),
    "descriptions and loggers": ("about", "reference", "logger"),
    "monitoring, checkpoints, and when to give up": (
        *("health", "max_skipped", "knn_every_epochs", "knn_every_steps", "evaluate_images", "probe_data"),
        *("checkpoint_every_epochs", "checkpoint_every_steps", "keep_checkpoints"),
    ),
    "where and how the images are read; their number is compared": (
        *("data.root", "data.workers", "data.max_unreadable", "data.cache_dir", "data.index_dir", "data.rescan"),
        *("data.cache_gb", "data.shard_dir", "data.verify"),
    ),
    "the machine; every update has the same images on any": tuple(
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
    """Where a run resumes.

    Attributes:
        path: The checkpoint.
        step: Optimizer updates done.
        record: Settings and facts of the run that wrote it, from `record`.
        damaged: Newer checkpoints in the same folder that are damaged, with the reasons.
    """

    path: Path
    step: int
    record: dict[str, Any]
    damaged: dict[Path, str]

    @property
    def findings(self) -> list[str]:
        """Return what the user should know."""
        names = ", ".join(file.name for file in self.damaged)
        reasons = " ".join(self.damaged.values())
        found = [f"Resumed from {self.path.name} (update {self.step}) instead of {names}: {reasons}"] if names else []
        if self.record.get("order", 1) != order.VERSION and self.record.get("images", 0) > order.SORTED:
            found.append(
                f"{self.path.name} is of an earlier version, which put more than {order.SORTED:,} images in another order: "
                "in the epoch that it is in, some images will be seen twice and others not at all. Later epochs are whole."
            )
        return found

    def set_aside(self) -> None:
        """Rename the damaged checkpoints, so that none is mistaken for a good one later."""
        for file in self.damaged:
            aside = file.with_name(f"{file.name}.damaged")
            if aside.exists() and (aside.is_dir() or file.is_dir()):  # a folder does not replace anything
                remove(aside)
            file.rename(aside)


def checkpoint_to_resume(resume: str | None, folder: Path) -> Resume | None:
    """Return the checkpoint that `resume` means; None if it is None, or "auto" and there is no checkpoint yet.

    Of a run the newest undamaged checkpoint is used; a checkpoint is used itself.

    Raises:
        UsageError: There is no checkpoint at the given path, or all are damaged.
    """
    if resume is None:
        return None
    given = Path(resume).absolute()
    if resume != "auto" and (given.is_file() or is_folder_of_shards(given)):
        return _resume(given, read_head(given), {})
    checkpoints = (folder if resume == "auto" else given) / "checkpoints"
    if others := sorted(filter(is_of_lightning, checkpoints.glob("*.ckpt"))):
        raise UsageError(
            f"resume={resume}: {others[0]} is a folder of shards, which Lightning writes with strategies other than ours. "
            f"python -m pytorch_lightning.utilities.consolidate_checkpoint {others[0]} makes one file of it, whose weights a "
            "new run can start from (init_from=FILE). Move the folder away to resume without it."
        )
    found = newest_good(checkpoints)
    if found.path is not None:
        return _resume(found.path, found.head, found.damaged)
    if found.damaged:
        raise UsageError(
            f"resume={resume}: every checkpoint in {checkpoints} is damaged. {' '.join(found.damaged.values())} Start again "
            "with overwrite=true and without resume, or with another name=."
        )
    if resume == "auto":
        return None
    raise UsageError(f"resume={resume}: there is no checkpoint. Give a .ckpt file, a run folder, or auto.")


def _resume(file: Path, head: dict[str, Any], damaged: dict[Path, str]) -> Resume:
    if RECORD not in head or "global_step" not in head:
        raise UsageError(
            f"{file} does not contain the settings of its run, so it cannot be resumed. init_from= starts from its weights."
        )
    return Resume(file, head["global_step"], head[RECORD], damaged)


def may_restart(resume: str | None, folder: Path) -> bool:
    """Return whether resume=auto may restart the run in `folder`, because it ended before its first checkpoint."""
    if resume != "auto" or not folder.is_dir() or newest_good(folder / "checkpoints").path is not None:
        return False
    # A run creates these two first.
    return (folder / "config.yaml").is_file() or {file.name for file in folder.iterdir()} <= {
        "figures",
        run_files.LOCK,
    }


def take_folder(folder: Path, settings: Any, resume: Resume | None) -> None:
    """Claim a run folder: a new one, one to empty, or the one to resume in; rename its damaged checkpoints.

    Args:
        folder: The run folder.
        settings: Settings with `resume`, `overwrite` and `dry_run`.
        resume: Where the run resumes, if it does.

    Raises:
        UsageError: The folder is in use.
    """
    continues = resume is not None or may_restart(settings.resume, folder)
    run_files.claim(folder, overwrite=settings.overwrite or settings.dry_run, resume=continues)
    if resume is not None:
        resume.set_aside()


def record(settings: Any, **facts: Any) -> dict[str, Any]:
    """Return what a checkpoint records about its run: settings (a dataclass; secrets redacted), facts, and our version."""
    return {"version": __version__, "order": order.VERSION, "settings": redact(dataclasses.asdict(settings)), **facts}


def check_same(resume: Resume, now: Mapping[str, Any]) -> None:
    """Compare the record of a checkpoint with the record of this run.

    Raises:
        UsageError: Settings differ; the message has each of them with both values.
    """
    then = dict(resume.record)
    targets = [one["settings"].get("method", {}).get("_target_") for one in (then, now)]
    then["settings"] = renamed(then["settings"], str(resume.path), trusted=targets[0] == targets[1])
    free = {key for keys in MAY_DIFFER.values() for key in keys}
    before, after = (flat(one["settings"]) for one in (then, now))
    before = {key: value for key, value in UNRECORDED.items() if key in after} | before
    if targets[0] == targets[1]:  # a setting of the method that one of them does not name has its default
        defaults = _defaults(targets[0])
        before, after = ({**{key: defaults[key] for key in defaults if key in other}, **one}
                         for one, other in ((before, after), (after, before)))  # fmt: skip
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
            f"{resume.path} was made under other settings, and cannot be resumed with these. "
            + "; ".join(differing)
            + ". Restore them, or start a new run with another name= (pretraining can start from these weights: "
            f"init_from={resume.path})."
        )


def _defaults(target: str | None) -> dict[str, Any]:
    """Return the defaults of a method's settings, under their keys."""
    if target is None:
        return {}
    parameters = inspect.signature(locate("method", target)).parameters
    found = {f"method.{name}": one.default for name, one in parameters.items() if one.default is not one.empty}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys; lists are values."""
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
    """Delete the metrics of updates after the checkpoint, which will be made again."""
    for logger in loggers:
        if isinstance(logger, MetricsCSV):
            logger.rewind(resume.step if resume is not None else 0)
