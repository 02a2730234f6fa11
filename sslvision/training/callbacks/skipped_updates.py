"""Reporting, recording and limiting updates that were skipped because their gradients were not finite."""

import csv
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.markup import escape

from sslvision.data.datamodule import ImageData
from sslvision.data.loader import TrainingImages, cut_crops
from sslvision.errors import Diverged
from sslvision.methods.base import Method

KEPT = 20  # updates whose images are listed; the crops of the first one are saved too


class SkippedUpdates(Callback):
    """List the images of skipped updates in the run folder, and end the run if too many updates are skipped in a row.

    The method notices when it writes its log, so that no step waits for the device; weights are safe meanwhile. The images of
    an update, and their crops, follow from the seed and the number of the update.

    Args:
        folder: The run folder; `not_finite/` is created in it when needed.
        at_most: Maximal number of consecutive skipped updates.
        console: Where to print.
    """

    def __init__(self, folder: Path, at_most: int, console: Console | None = None):
        self.folder, self.at_most = folder / "not_finite", at_most
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self.found: list[int] = []  # skipped updates, counted from 1
        self._told = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do not report again what was reported before the run was resumed."""
        assert isinstance(pl_module, Method)
        self.found, self._told = pl_module.skipped, len(pl_module.skipped)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report and record new skipped updates.

        Raises:
            Diverged: Too many consecutive updates were skipped.
        """
        assert isinstance(pl_module, Method)
        self.found = pl_module.skipped
        new, self._told = self.found[self._told :], len(self.found)
        if not new:
            return
        if trainer.is_global_zero:
            for update in new[: max(0, KEPT - len(self.found) + len(new))]:
                self._keep(trainer, update)
            updates = f"{new[0]:,}" if len(new) == 1 else f"{new[0]:,} to {new[-1]:,} ({len(new)})"
            self.console.print(
                f"[bold yellow]Update {updates} was skipped, because its gradients were not finite; its images are listed in "
                f"{escape(str(self.folder))}.[/]"
            )
        if (skipped := longest_sequence(self.found)) > self.at_most:
            self._diverged(trainer, f"The loss or its gradients were not finite in {skipped} updates in a row")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check that training did not end with skipped updates.

        Raises:
            Diverged: The last updates were skipped.
        """
        last = trainer.global_step
        if last in self.found and (last - 1 in self.found or last == 1):
            self._diverged(trainer, "The loss or its gradients were not finite in the last updates")

    def summary(self) -> str:
        """Return how many updates were skipped, as a sentence."""
        return (
            f"{len(self.found)} updates were skipped, because their gradients were not finite; their images are listed in "
            f"{self.folder}."
        )

    def _diverged(self, trainer: L.Trainer, what: str) -> None:
        rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        raise Diverged(
            f"{what} (to update {self.found[-1]:,}; max_skipped={self.at_most}): training has diverged. The weights are from "
            f"before. Lower the learning rate (it is {rate:.3g} now), lengthen the warm-up, or set "
            f"trainer.gradient_clip_val=1. The images are listed in {self.folder}."
        )

    def _keep(self, trainer: L.Trainer, update: int) -> None:
        """List the images of an update; for the first one, save the uint8 crops too, for torch.load."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, ImageData)
        source, keys = data.splits.train, data.batches_of(trainer).of_update(update - 1)
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"update-{update:08}.csv"
        with open(file, "w", newline="") as opened:
            rows = csv.writer(opened)
            rows.writerow(["epoch", "place", "image"])
            rows.writerows([epoch, place, source.describe(place)] for epoch, place in keys)
        if update == self.found[0]:
            batch = TrainingImages(source, data.crops, data.seed, data.augment).__getitems__(keys)
            if source.images is not None and data.augment is None:
                batch = cut_crops(batch, data.crops, data.seed)
            torch.save(batch._asdict(), file.with_suffix(".pt"))


def longest_sequence(updates: list[int]) -> int:
    """Return the length of the longest sequence of consecutive numbers in an ascending list."""
    longest = length = 0
    for index, update in enumerate(updates):
        length = length + 1 if index and update == updates[index - 1] + 1 else 1
        longest = max(longest, length)
    return longest
