"""Keeping the budget of a run: its length is corrected on the way, by the time that its updates took."""

import math
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Checkpoint
from rich.console import Console
from rich.markup import escape

from sslvision.training.callbacks.progress import Progress

CORRECTED_AT = (0.2, 0.6)  # shares of the updates: schedules hardly notice, and the rest is short
SKIPPED = 3  # updates of a process whose time does not count: kernels are chosen or compiled in them


class KeepBudget(Checkpoint):
    """Set the updates of a run anew after a fifth and after three fifths of them, so that they fill the rest of its time.

    A few seconds of timing before training know nothing of the minutes after them: processors get warm, other programs come
    and go. Schedules continue with the new length. A checkpoint that has it is saved at once, so that a resumed run has the
    same; as a `Checkpoint`, this is called after other callbacks, whose work at the end of an epoch it must not lack.

    Args:
        budget: The setting, for the message.
        seconds: Time for everything up to the end of training, evaluation on the way excepted.
        spent: Seconds that are over when training begins.
        length: "updates" of the whole run and "corrections" made so far; changed in place. Checkpoints contain it.
        checkpoint: The checkpoint file.
        changed: Called in the first process with the new epochs of the run.
        console: Where to print.
    """

    def __init__(
        self,
        *,
        budget: str,
        seconds: float,
        spent: float,
        length: MutableMapping[str, Any],
        checkpoint: Path,
        changed: Callable[[int], None],
        console: Console,
    ):
        self.budget, self.seconds, self.spent, self.length = budget, seconds, spent, length
        self.checkpoint, self.changed, self.console = checkpoint, changed, console
        self._running_since: float | None = None
        self._measured_from: tuple[int, float] | None = None  # update and seconds spent until then

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run goes on from."""
        return {"spent": self._spent()}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on from the time that was spent before the checkpoint; the start of a process anew does not count."""
        self.spent = state_dict["spent"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start to measure."""
        self._first = self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restart the clock after an evaluation."""
        if self._running_since is None:
            self._running_since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Correct the length if it is due; stop the clock at the end of an epoch, which evaluation may follow."""
        updated, self._step = trainer.global_step > self._step, trainer.global_step
        if updated and self._step == self._first + SKIPPED:
            self._measured_from = self._step, self._spent()
        if updated and not trainer.is_last_batch:
            self._correct(trainer)
        if trainer.is_last_batch:
            self.spent, self._running_since = self._spent(), None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock for an evaluation in mid-epoch."""
        self.spent, self._running_since = self._spent(), None

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Correct the length if that became due with the last update of the epoch."""
        self._correct(trainer)

    def _correct(self, trainer: L.Trainer) -> None:
        done, before = len(self.length["corrections"]), self.length["updates"]
        if done == len(CORRECTED_AT) or self._step < CORRECTED_AT[done] * before or self._measured_from is None:
            return
        (since, then), now = self._measured_from, self._spent()
        if self._step <= since:
            return
        each = (now - then) / (self._step - since)
        left = max(1, round((self.seconds - now) / each))
        updates = int(trainer.strategy.broadcast(self._step + left))
        self.length["updates"] = updates
        self.length["corrections"].append({"at": self._step, "updates": updates})
        self._measured_from = self._step, now
        epochs = math.ceil(updates * trainer.accumulate_grad_batches / trainer.num_training_batches)
        trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.max_epochs = updates, epochs
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Progress):
                callback.total_steps = updates
        if trainer.is_global_zero:
            self.changed(epochs)
            told = f"an update takes {1000 * each:.0f} ms, so the run has {updates:,} instead of {before:,}."
            self.console.print(f"[dim]budget={self.budget}: {escape(told)}[/]")
        trainer.save_checkpoint(self.checkpoint)

    def _spent(self) -> float:
        return self.spent + (time.perf_counter() - self._running_since if self._running_since is not None else 0.0)
