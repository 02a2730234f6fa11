"""Saving checkpoints every N epochs or N updates."""

from pathlib import Path
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Checkpoint


class PeriodicCheckpoints(Checkpoint):
    """Save a checkpoint every N epochs and every N updates.

    Checkpoints are saved right after an update, never between accumulated batches. A save due at the last update of an
    epoch waits for the end of the epoch, so that a resumed run does not skip what happens there.

    Args:
        path: The checkpoint file.
        every_epochs, every_steps: Epochs and optimizer updates between checkpoints; None for never.
    """

    def __init__(self, path: Path, *, every_epochs: int | None = None, every_steps: int | None = None):
        self.path, self.every_epochs, self.every_steps = path, every_epochs, every_steps
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start at the trainer's step."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if this batch completed an update and a checkpoint is due."""
        updated, self._step = trainer.global_step > self._step, trainer.global_step
        if updated and self._due(trainer) and not trainer.is_last_batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save if a checkpoint is due for this epoch or its last update."""
        if self._due(trainer) or (self.every_epochs and (trainer.current_epoch + 1) % self.every_epochs == 0):
            trainer.save_checkpoint(self.path)

    def _due(self, trainer: L.Trainer) -> bool:
        return self.every_steps is not None and trainer.global_step % self.every_steps == 0
