"""`budget=30m`: a run as long as a time, measured before training with the method, the images and the devices of the run.

`max_steps=20000`: a run of so many updates, for which nothing is measured.

Updates take another time after minutes than in the first seconds, so the length is corrected twice on the way.

The settings of a recipe that count epochs keep their share of the run: a warm-up of 3 of 60 epochs becomes 0.4 of 8. Those
given on the command line stay as they are. A resumed run takes its length from the checkpoint and measures nothing before
training.
"""

import dataclasses
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from sslvision.data.datamodule import ImageData
from sslvision.errors import UsageError
from sslvision.methods.base import Method
from sslvision.runs import run_files
from sslvision.runs.resume import Resume
from sslvision.settings import Pretrain
from sslvision.training.callbacks.keep_budget import KeepBudget
from sslvision.training.trainer import build_trainer, configure_for, fit

SHARE, LONGEST_S = 0.05, 60.0  # of the budget, for measuring; at most so long
FEWEST, MOST = 10, 1000  # updates that are timed
RECORD = "budget"  # fact in the record of a checkpoint
WHOLE = ("knn_every_epochs", "checkpoint_every_epochs")  # settings in whole epochs, besides those of the method


@dataclasses.dataclass(frozen=True)
class Length:
    """The length of a run with a budget or a number of updates.

    Attributes:
        settings: The settings, with epochs and what counts them in accordance.
        record: What checkpoints keep, for `recorded_length`: "updates" of the whole run, with which its last epoch ends, the
            "words" of `words`, and the "corrections" made on the way.
        spent: Seconds that are over when training begins.
        words: What was measured and what follows, for the printed configuration.
    """

    settings: Pretrain
    record: dict[str, Any]
    spent: float
    words: str

    @property
    def updates(self) -> int:
        """Return the optimizer updates of the whole run."""
        return int(self.record["updates"])


def fill_budget(settings: Pretrain, method: Method, data: ImageData, words: Sequence[str], *, started: float) -> Length:
    """Return the length of a run that ends its training when the budget is over.

    Args:
        settings: All settings; `budget` is given.
        method: The method, with which updates are made and timed: the run needs a new one.
        data: The images.
        words: The command line, whose settings stay as they are.
        started: Time of `time.perf_counter` from which the budget counts. Evaluation on the way is not part of it.

    Raises:
        UsageError: The budget does not suffice for some updates.
    """
    seconds = settings.budget_seconds
    assert seconds is not None
    timed = time_updates(settings, method, data, seconds=min(SHARE * seconds, LONGEST_S))
    spent = time.perf_counter() - started + timed.startup
    left = seconds - spent
    updates = timed.agreed(int(left / timed.each))
    if updates < FEWEST:
        raise UsageError(
            f"budget={settings.budget} is over before training begins: preparing took {spent:.0f} s, and an update "
            f"takes {timed.each:.3g} s. Give at least budget={math.ceil(spent + 100 * timed.each)}s."
        )
    per_epoch = len(data.splits.train) // settings.batch_size
    scaled, changes = scale_epochs(settings, updates / per_epoch, words)
    told = f"an update takes {1000 * timed.each:.0f} ms (mean of {timed.updates}): {updates:,} updates fill {settings.budget}"
    told = "; ".join([told, *changes])
    return Length(scaled, {"updates": updates, "words": told, "corrections": []}, spent, told)


def length_of_steps(settings: Pretrain, images: int, words: Sequence[str], resume: Resume | None = None) -> Length:
    """Return the length of a run of `max_steps` updates; `words`, the command line, have settings that stay as they are."""
    assert settings.max_steps is not None
    if resume is not None:
        return Length(_counted_as_then(settings, resume), {"updates": settings.max_steps}, 0.0, "")
    per_epoch = max(1, images // settings.batch_size)
    scaled, changes = scale_epochs(settings, settings.max_steps / per_epoch, words)
    return Length(scaled, {"updates": settings.max_steps}, 0.0, "; ".join(changes))


def recorded_length(settings: Pretrain, resume: Resume) -> Length:
    """Return the length that a run had from the start, and the settings that follow from it.

    Raises:
        UsageError: The run had no budget.
    """
    if (found := resume.record.get(RECORD)) is None:
        raise UsageError(
            f"{resume.path} is of a run without a budget, which ends after its epochs: resume it without budget=."
        )
    corrected = [f"on the way {one['updates']:,}" for one in found.get("corrections", [])]
    return Length(_counted_as_then(settings, resume), dict(found), 0.0, "; ".join([found["words"], *corrected]))


def _counted_as_then(settings: Pretrain, resume: Resume) -> Pretrain:
    """Return the settings with the epochs, and what counts them, that the run had from the start."""
    then = resume.record["settings"]
    method = {key: then["method"].get(key, value) for key, value in settings.method.items() if counts_epochs(key)}
    whole = {key: then[key] for key in ("epochs", *WHOLE)}
    return dataclasses.replace(settings, method={**settings.method, **method}, **whole)


def keep_budget(
    length: Length, record: dict[str, Any], folder: Path, words: Sequence[str], console: Console
) -> list[Callback]:
    """Return the callback that corrects the length on the way; none for a run from before there were corrections.

    Args:
        length: The length, whose record is changed in place.
        record: The record of checkpoints; the epochs in it are changed, too.
        folder: The run folder, whose config.yaml has them as well.
        words: The command line, for the record.
        console: Where to print.
    """
    settings, seconds = length.settings, length.settings.budget_seconds
    if "corrections" not in length.record:
        return []
    assert seconds is not None

    def changed(epochs: int) -> None:
        record["settings"]["epochs"] = epochs
        run_files.describe(folder, dataclasses.asdict(dataclasses.replace(settings, epochs=epochs)), words)

    return [
        KeepBudget(
            budget=str(settings.budget),
            seconds=seconds,
            spent=length.spent,
            length=length.record,
            checkpoint=folder / "checkpoints" / "last.ckpt",
            changed=changed,
            console=console,
        )
    ]


def scale_epochs(settings: Pretrain, epochs: float, words: Sequence[str]) -> tuple[Pretrain, list[str]]:
    """Return the settings of a run of so many epochs, and the changes in words."""
    given = {word.split("=")[0].removeprefix("method.") for word in words}
    ratio = epochs / settings.epochs
    method = {
        key: float(f"{value * ratio:.3g}")
        for key, value in settings.method.items()
        if counts_epochs(key) and key not in given and value
    }
    whole = {
        key: max(1, round(value * ratio)) for key in WHOLE if key not in given and (value := getattr(settings, key))
    }
    before = {**settings.method, **{key: getattr(settings, key) for key in WHOLE}}
    changes = [
        f"{key} {before[key]:g} -> {value:g}" for key, value in {**method, **whole}.items() if value != before[key]
    ]
    scaled = dataclasses.replace(settings, epochs=math.ceil(epochs), method={**settings.method, **method}, **whole)
    return scaled, changes


def counts_epochs(key: str) -> bool:
    """Return whether a setting of a method is a number of epochs."""
    return key.endswith("_epochs")


class Clocked(Callback):
    """Time updates once kernels are chosen or compiled and batches that lay ready are used up; then end the training.

    Args:
        seconds: Time to spend on it.
        skipped: Updates that are not timed.

    Attributes:
        startup: Seconds from the start of the fit that are not due to updates: of worker processes and of the first step.
        each: Seconds of an update.
        updates: Number of updates timed.
    """

    def __init__(self, *, seconds: float, skipped: int):
        self.seconds, self.skipped = seconds, skipped
        self.startup, self.each, self.updates = 0.0, 0.0, FEWEST
        self._fit_began = time.perf_counter()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep the trainer's way to agree on a number."""
        self._broadcast = trainer.strategy.broadcast

    def agreed(self, number: int) -> int:
        """Return the number of the first process."""
        return int(self._broadcast(number))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Read the clock after the skipped updates, after FEWEST more, and after all."""
        timed = trainer.global_step - self.skipped
        if timed not in (0, FEWEST, self.updates) or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).synchronize()
        now = time.perf_counter()
        if timed == 0:
            self._began = now
            return
        self.each = (now - self._began) / timed
        if self.updates == FEWEST:  # now it is known how many fit into the time
            self.updates = self.agreed(min(MOST, max(FEWEST, int(self.seconds / self.each))))
        if timed >= self.updates:
            self.startup = max(0.0, self._began - self._fit_began - self.skipped * self.each)
            trainer.should_stop = True


def time_updates(settings: Pretrain, method: Method, data: ImageData, *, seconds: float) -> Clocked:
    """Train for some updates as the run will, and return what they took. Nothing is written."""
    clocked = Clocked(seconds=seconds, skipped=3 + 4 * data.workers)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            folder=Path(folder),
            epochs=-1,
            max_steps=clocked.skipped + MOST + FEWEST,
            steps=settings.epochs * (len(data.splits.train) // settings.batch_size),
            dry_run=False,
            loggers=[],
            callbacks=[clocked],
            options={**settings.trainer, "enable_progress_bar": False},
        )
        configure_for(trainer, method, compile=settings.compile, cuda_graphs=settings.cuda_graphs)
        fit(trainer, method, data, checkpoint=None)
    return clocked
