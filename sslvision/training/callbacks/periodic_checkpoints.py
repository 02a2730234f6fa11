"""Save a checkpoint every so many epochs or updates."""

from pathlib import Path
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Checkpoint


class PeriodicCheckpoints(Checkpoint):
    """Save every so many epochs and every so many updates.

    Only right after an update, never between the micro-batches of one. What falls on the last update of an epoch waits for
    the epoch's end, so that a resumed run does not leave out what happens there.

    Args:
        path: the file.
        every_epochs, every_steps: epochs and optimizer updates; None: not by these.
    """

    def __init__(self, path: Path, *, every_epochs: int | None = None, every_steps: int | None = None):
        self.path, self.every_epochs, self.every_steps = path, every_epochs, every_steps
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the position of the trainer."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save, if this batch completed an update and its time has come."""
        updated, self._step = trainer.global_step > self._step, trainer.global_step
        if updated and self._due(trainer) and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save, if this epoch or its last update is one to save at."""
        if self._due(trainer) or (self.every_epochs and (trainer.current_epoch + 1) % self.every_epochs == 0):
            trainer.save_checkpoint(self.path)

    def _due(self, trainer: L.Trainer) -> bool:
        return self.every_steps is not None and trainer.global_step % self.every_steps == 0
