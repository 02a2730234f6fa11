"""What becomes of updates that were left out because their gradients were not finite: they are told, kept, and counted."""

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

KEPT = 20  # batches whose images are named; the first one's crops are kept as well


class SkippedUpdates(Callback):
    """Write the batches of updates that were left out to the run's folder, and end the run when there is nothing else.

    The method finds out when it writes its log, so that no step waits for the device; weights are safe meanwhile. Which images
    were in an update, and how they were cropped, follows from the seed and its number.

    Args:
        folder: of the run; `not_finite/` is made in it when it is needed.
        at_most: so many in a row may be left out.
        console: where to print.
    """

    def __init__(self, folder: Path, at_most: int, console: Console | None = None):
        self.folder, self.at_most = folder / "not_finite", at_most
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self.found: list[int] = []  # updates left out, counted from 1
        self._told = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Do not tell again what a resumed run has told."""
        assert isinstance(pl_module, Method)
        self.found, self._told = pl_module.skipped, len(pl_module.skipped)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell and keep what is new.

        Raises:
            Diverged: too many in a row.
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
                f"[bold yellow]The gradients of update {updates} were not finite and it was left out; its images are named in "
                f"{escape(str(self.folder))}.[/]"
            )
        if (row := longest_row(self.found)) > self.at_most:
            self._diverged(trainer, f"The loss or its gradients were not finite in {row} updates in a row")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """See that the weights of the end are good for something.

        Raises:
            Diverged: the last updates were all left out.
        """
        last = trainer.global_step
        if last in self.found and (last - 1 in self.found or last == 1):
            self._diverged(trainer, "The loss or its gradients were not finite in the last updates")

    def summary(self) -> str:
        """Return in words how many updates were left out."""
        return (
            f"{len(self.found)} updates were left out, as their gradients were not finite; their images are named in "
            f"{self.folder}."
        )

    def _diverged(self, trainer: L.Trainer, what: str) -> None:
        rate = max(group["lr"] for group in trainer.optimizers[0].param_groups)
        raise Diverged(
            f"{what} (to update {self.found[-1]:,}; max_skipped={self.at_most}): training has diverged. The weights are those "
            f"of before. Lower the learning rate (it is {rate:.3g} now), lengthen the warm-up, or set "
            f"trainer.gradient_clip_val=1. The images are named in {self.folder}."
        )

    def _keep(self, trainer: L.Trainer, update: int) -> None:
        """Name the images of an update; of the first one keep the crops as the method got them, uint8, for torch.load."""
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


def longest_row(updates: list[int]) -> int:
    """Return how many of ascending numbers follow one another without a gap, at most."""
    longest = row = 0
    for place, update in enumerate(updates):
        row = row + 1 if place and update == updates[place - 1] + 1 else 1
        longest = max(longest, row)
    return longest
