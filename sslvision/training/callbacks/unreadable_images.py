"""Counting, listing and limiting the images that cannot be read."""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
import torch.distributed
from pytorch_lightning.callbacks import Callback

from sslvision.data.batch import Batch
from sslvision.data.source import Source
from sslvision.errors import DataError


class UnreadableImages(Callback):
    """Count, list and limit the images that cannot be read.

    Each process counts its own share; the first one gathers and writes the list after every epoch.

    Args:
        source: The training images.
        file: unreadable.csv of the run folder.
        max_unreadable: The share of the training images that may be unreadable.
    """

    def __init__(self, source: Source, file: Path, max_unreadable: float):
        self.source, self.file, self.max_unreadable = source, file, max_unreadable
        self.found: dict[int, str] = {}  # index: reason

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Record what the loader could not read for this batch.

        Raises:
            DataError: Too many images are unreadable, or none could replace them.
        """
        self.found.update(batch.unreadable)
        if batch.unreadable and (not batch.crops or len(self.found) > self.max_unreadable * len(self.source)):
            self._write()
            raise DataError(
                f"{self.summary()} That is more than data.max_unreadable={self.max_unreadable:g} of them: repair or remove "
                "them, or raise data.max_unreadable."
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather and write the list."""
        if trainer.world_size > 1:
            shares: list[dict[int, str]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(shares, self.found)
            self.found = {place: reason for share in shares for place, reason in share.items()}
        if self.found and trainer.is_global_zero:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.found = dict(state_dict["found"])

    def summary(self) -> str:
        """Return how many images could not be read, the first of them, and where all are listed, as a sentence."""
        examples = [f"{self.source.describe(place)} ({reason})" for place, reason in sorted(self.found.items())[:3]]
        return (
            f"{len(self.found)} of {len(self.source)} images cannot be read and were replaced by others: "
            f"{', '.join(examples)}{', ...' if len(self.found) > 3 else ''}; all are listed in {self.file}."
        )

    def _write(self) -> None:
        with open(self.file, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "reason"])
            rows.writerows([self.source.describe(place), reason] for place, reason in sorted(self.found.items()))
