"""Saving checkpoints every N epochs or N updates."""

from pathlib import Path
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Checkpoint

from sslvision.training.callbacks.every import Every


class PeriodicCheckpoints(Checkpoint):
    """Save a checkpoint every N epochs and every N updates.

    Args:
        path: The checkpoint file.
        every_epochs, every_steps: Epochs and optimizer updates between checkpoints; None for never.
    """

    def __init__(self, path: Path, *, every_epochs: int | None = None, every_steps: int | None = None):
        self.path, self.every = path, Every(every_epochs, every_steps)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if this batch completed an update and a checkpoint is due."""
        if self.every.after_batch(trainer, batch_idx):
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save if a checkpoint is due for this epoch or its last update."""
        if self.every.after_epoch(trainer):
            trainer.save_checkpoint(self.path)
