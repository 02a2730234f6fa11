"""Count, name and bound the images that cannot be read."""

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
    """Count, name and bound the images that cannot be read.

    Each process watches its own share; the first one gathers and writes the names after every epoch, and at the end.

    Args:
        source: the training images.
        file: unreadable.csv of the run folder.
        max_unreadable: the share of the training images that may be unreadable.
    """

    def __init__(self, source: Source, file: Path, max_unreadable: float):
        self.source, self.file, self.max_unreadable = source, file, max_unreadable
        self.found: dict[int, str] = {}  # place: reason

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Take note of what the loader could not read for this batch.

        Raises:
            DataError: too many, or none that could stand in.
        """
        self.found.update(batch.unreadable)
        if batch.unreadable and (not batch.crops or len(self.found) > self.max_unreadable * len(self.source)):
            self._write()
            raise DataError(
                f"{self.summary()} That is more than data.max_unreadable={self.max_unreadable:g} of them: mend or remove "
                "them, or raise data.max_unreadable."
            )

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather and write the names."""
        if trainer.world_size > 1:
            shares: list[dict[int, str]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(shares, self.found)
            self.found = {place: reason for share in shares for place, reason in share.items()}
        if self.found and trainer.is_global_zero:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run is to know."""
        return {"found": self.found}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.found = dict(state_dict["found"])

    def summary(self) -> str:
        """Return in words how many could not be read, the first of them by name, and where all are named."""
        examples = [f"{self.source.describe(place)} ({reason})" for place, reason in sorted(self.found.items())[:3]]
        return (
            f"{len(self.found)} of {len(self.source)} images cannot be read and others stood in for them: "
            f"{', '.join(examples)}{', ...' if len(self.found) > 3 else ''}; all are named in {self.file}."
        )

    def _write(self) -> None:
        with open(self.file, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["image", "reason"])
            rows.writerows([self.source.describe(place), reason] for place, reason in sorted(self.found.items()))
