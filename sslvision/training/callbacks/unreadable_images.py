"""Counting, listing and limiting the images that cannot be read."""

import csv
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import Callback

from sslvision.data.batch import Batch
from sslvision.data.source import Source
from sslvision.errors import DataError

TOGETHER = 50  # batches of a process after which all tell one another what they have found


class UnreadableImages(Callback):
    """Count, list and limit the images that cannot be read.

    A process sees its own share of the images. Every 50 batches, and after every epoch, all tell one another what is new, so
    that all of them stop at the same update when it is too much; the first one writes the list after every epoch.

    Args:
        source: The training images.
        file: unreadable.csv of the run folder.
        max_unreadable: The share of the training images that may be unreadable.
        timeout: Seconds to wait for another process.
    """

    def __init__(self, source: Source, file: Path, max_unreadable: float, *, timeout: int = 1800):
        self.source, self.file, self.max_unreadable = source, file, max_unreadable
        self.timeout = timedelta(seconds=timeout)
        self.found: dict[int, str] = {}  # index: reason; of all processes
        self._new: dict[int, str] = {}  # what the others do not know yet
        self._group: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Have the processes speak without their devices, which would wait for it."""
        if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)  # type: ignore[assignment]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Record what the loader could not read for this batch.

        Raises:
            DataError: Too many images are unreadable, or none could replace them.
        """
        self._new |= {place: reason for place, reason in batch.unreadable if place not in self.found}
        if self._group is None or not batch.crops or (batch_idx + 1) % TOGETHER == 0:
            self._tell(trainer, alone=not batch.crops)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gather and write the list.

        Raises:
            DataError: Too many images are unreadable.
        """
        self._tell(trainer)
        if self.found and trainer.is_global_zero:
            self._write()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """End speaking with the others."""
        self._end_group()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """End speaking with the others."""
        self._end_group()

    def _end_group(self) -> None:
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def _tell(self, trainer: L.Trainer, *, alone: bool = False) -> None:
        """Add what all processes have found since the last time; `alone`: this one can go no further, and asks nobody."""
        shares = [self._new]
        if self._group is not None and not alone:
            number = torch.tensor(len(self._new))
            dist.all_reduce(number, group=self._group)
            if number:
                shares = [{} for _ in range(trainer.world_size)]
                dist.all_gather_object(shares, self._new, group=self._group)
        told = any(shares)
        self.found |= {place: reason for share in shares for place, reason in share.items()}
        self._new = {}
        if alone or (told and len(self.found) > self.max_unreadable * len(self.source)):
            if alone or trainer.is_global_zero:
                self._write()
            raise DataError(
                f"{self.summary()} That is more than data.max_unreadable={self.max_unreadable:g} of them: repair or remove "
                "them, or raise data.max_unreadable."
            )

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
