"""Whether training waits for its images: measured all along, shown by the progress bar, and told at the end."""

from collections import deque
from time import monotonic
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Checkpoint

from sslvision.data.datamodule import available_cores

WORTH_TELLING = 10.0  # percent
LEAST, RECENT = 20, 100  # batches: so many must be measured; so many are what the progress bar shows


class DataWaits(Checkpoint):
    """Measure the share of time between one batch's last work and the next one's first, when the next one is not there.

    On a CPU by the clock. A GPU works off what the host has queued, and may be busy while the host waits for a worker: there
    by events in the device's own queue, the second of which is reached at once unless the device has run dry. They are read
    when they have passed, so that nothing waits for the measurement. The transfer of the images counts as waiting.

    The first batch of an epoch, and what follows a validation or a checkpoint, is left out.

    (A `Checkpoint` is called after all other callbacks; what these do between two batches is not waiting.)

    Args:
        workers: loader processes of a device.
        cached: whether images come from a cache, already decoded.
    """

    def __init__(self, *, workers: int, cached: bool = False):
        self.workers, self.cached = workers, cached
        self.devices, self.batches, self._waited, self._total = 1, 0, 0.0, 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # seconds waited, and in all, of a batch
        self._started: Any = None  # marks of the current batch's start and the end of the one before
        self._ended: Any = None
        self._pending: deque[tuple[Any, Any, Any]] = deque()  # end of the batch before, start, end

    @property
    def share(self) -> float | None:
        """Return how much of the time so far was waiting, in percent; None if too little has been seen to tell."""
        return 100 * self._waited / self._total if self.batches >= LEAST and self._total else None

    @property
    def recent(self) -> float | None:
        """Return the same of the last batches."""
        waited, total = (sum(times) for times in zip(*self._recent, strict=True)) if self._recent else (0.0, 0.0)
        return 100 * waited / total if self.batches >= LEAST and total else None

    @property
    def found(self) -> bool:
        """Return whether a person should know."""
        return (self.share or 0) > WORTH_TELLING

    def summary(self) -> str:
        """Return in words how much of the time it was, and what may help."""
        cores, remedies = available_cores(), []
        if self.workers * self.devices < cores:
            remedies.append(f"raise data.workers ({self.workers} now, {cores} cores here)")
        if not self.cached:
            remedies.append("set data.cache=ram")
        advice = " or ".join(remedies) or (
            f"{self.workers} workers for each device take all {cores} cores, and images are decoded already: more cores, or "
            "fewer or smaller crops, would help"
        )
        return f"Data-bound: {self.share:.0f} % of the time went into waiting for images; {advice}."

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin."""
        self.devices, self._ended = trainer.num_devices, None
        self.workers = getattr(getattr(trainer, "datamodule", None), "workers", self.workers)  # shared by the devices

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note when the images were there."""
        self._started = mark(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note when the batch was done with, and add up what has become known."""
        ended = mark(pl_module.device)
        if self._ended is not None:
            self._pending.append((self._ended, self._started, ended))
        self._ended = None if trainer.is_last_batch else ended
        while self._pending and has_passed(self._pending[0][2]):
            before, started, after = self._pending.popleft()
            waited, total = seconds(before, started), seconds(before, after)
            self._recent.append((waited, total))
            self.batches, self._waited, self._total = self.batches + 1, self._waited + waited, self._total + total

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave out what this takes."""
        self._ended = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave out what this takes."""
        self._ended = None


def mark(device: torch.device) -> Any:
    """Return this moment: of the clock, or where a GPU will have done what it was told so far."""
    if device.type == "cpu":
        return monotonic()
    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record()
    return event


def has_passed(moment: Any) -> bool:
    """Return whether it is over, without waiting for it."""
    return isinstance(moment, float) or moment.query()


def seconds(before: Any, after: Any) -> float:
    """Return the time between two moments that have passed."""
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3
