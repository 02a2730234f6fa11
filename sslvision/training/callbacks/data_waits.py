"""The share of time that training waits for images: measured throughout, shown by the progress bar, reported at the end."""

from collections import deque
from time import monotonic
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Checkpoint

from sslvision.data.datamodule import available_cores

WORTH_TELLING = 10.0  # percent
LEAST, RECENT = 20, 100  # batches: the minimum for a measurement, and the window of the progress bar


class DataWaits(Checkpoint):
    """Measure the share of time between the end of one batch and the start of the next.

    On a CPU this is clock time. A GPU executes what the host has queued, and may be busy while the host waits for a worker;
    there, it is the time between two events in the device's queue, the second of which follows at once unless the queue is
    empty. Events are read after they have passed, so that measuring does not synchronize. Transferring the images counts as
    waiting.

    The first batch of an epoch, and the first after a validation or a checkpoint, are not measured.

    (A `Checkpoint` is called after all other callbacks; what these do between two batches is not waiting.)

    Args:
        workers: Number of loader processes per device.
        cached: Whether images come decoded from a cache.
    """

    def __init__(self, *, workers: int, cached: bool = False):
        self.workers, self.cached = workers, cached
        self.devices, self.batches, self._waited, self._total = 1, 0, 0.0, 0.0
        self._recent: deque[tuple[float, float]] = deque(
            maxlen=RECENT
        )  # per batch: seconds of waiting, seconds in total
        self._started: Any = None  # start of the current batch, end of the previous one
        self._ended: Any = None
        self._pending: deque[tuple[Any, Any, Any]] = deque()  # end of the previous batch, start, end

    @property
    def share(self) -> float | None:
        """Return the percentage of time spent waiting; None if too few batches were measured."""
        return 100 * self._waited / self._total if self.batches >= LEAST and self._total else None

    @property
    def recent(self) -> float | None:
        """Return the same for the most recent batches."""
        waited, total = (sum(times) for times in zip(*self._recent, strict=True)) if self._recent else (0.0, 0.0)
        return 100 * waited / total if self.batches >= LEAST and total else None

    @property
    def found(self) -> bool:
        """Return whether the user should know."""
        return (self.share or 0) > WORTH_TELLING

    def summary(self) -> str:
        """Return the share of time as a sentence, with advice."""
        cores, remedies = available_cores(), []
        if self.workers * self.devices < cores:
            remedies.append(f"raise data.workers ({self.workers} now, {cores} cores here)")
        if not self.cached:
            remedies.append("set data.cache=ram")
        advice = " or ".join(remedies) or (
            f"{self.workers} workers per device use all {cores} cores, and images are already decoded: use more cores, or "
            "fewer or smaller crops"
        )
        return f"Data-bound: {self.share:.0f} % of the time was spent waiting for images; {advice}."

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the clock."""
        self.devices, self._ended = trainer.num_devices, None
        self.workers = getattr(getattr(trainer, "datamodule", None), "workers", self.workers)  # shared by the devices

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Record when the images arrived."""
        self._started = mark(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record when the batch was done, and add up the measurements that are available."""
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
        """Do not count this time."""
        self._ended = None

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Do not count this time."""
        self._ended = None


def mark(device: torch.device) -> Any:
    """Return the current time on the CPU, or an event at the end of a GPU's queue."""
    if device.type == "cpu":
        return monotonic()
    event = torch.get_device_module(device).Event(enable_timing=True)
    event.record()
    return event


def has_passed(moment: Any) -> bool:
    """Return whether a moment has passed, without waiting for it."""
    return isinstance(moment, float) or moment.query()


def seconds(before: Any, after: Any) -> float:
    """Return the seconds between two moments that have passed."""
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1e3
