"""Progress during training: a bar in a terminal, a plain line at intervals in a log.

    epoch 3/40  ━━━━━━━━━━━━━━  312/1,560 steps  5,321 img/s  loss 0.8312  k-NN 74.2  ETA 0:03:10

Bar and ETA are for the whole run. Images per second exclude evaluation; the ETA includes it.
"""

import math
from collections import deque
from datetime import timedelta
from time import monotonic
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from sslvision.training.callbacks.data_waits import WORTH_TELLING, DataWaits

WINDOW = 120  # samples of the clock, at least SAMPLE_EVERY_S apart
SAMPLE_EVERY_S = 0.25
SHORTEST_BAR = 6  # characters


class Progress(ProgressBar):
    """Show epoch, step, images per second, the method's metrics, the online k-NN accuracy and the remaining time.

    Where a terminal is too narrow for all of them, the method's metrics but the first are left out, the last one first, then
    RankMe, waiting for data, and k-NN accuracy.

    The method keeps its last metrics as detached tensors in `pl_module.latest`; those in `pl_module.shown` (default:
    "loss") are displayed with its labels. `knn_top1`, `rankme` and `val_top1` come from the trainer's callback metrics, with
    the value of a run's start, `knn_top1_start`, if there is one. They are read from the device only when the display is
    refreshed: every 0.25 s, or every second on an accelerator.

    Args:
        total_steps: Optimizer steps of the whole run.
        steps_per_epoch: Optimizer steps of an epoch.
        images_per_step: Images of a step, over all processes and accumulated batches.
        waits: Measures waiting for images, which is shown above a tenth of the time.
        plain_every_s: Minimal seconds between lines without a terminal.
        console: Where to print.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        steps_per_epoch: int,
        images_per_step: int,
        waits: DataWaits | None = None,
        plain_every_s: float = 10.0,
        console: Console | None = None,
    ) -> None:
        super().__init__()
        self.total_steps, self.steps_per_epoch, self.images_per_step = total_steps, steps_per_epoch, images_per_step
        self.waits, self.plain_every_s = waits, plain_every_s
        self.console = console or Console()
        self.is_enabled = True  # LightningModule.print asks
        self.images_per_second: float | None = None  # of all of training, evaluation not counted; known at its end
        self._bar: Bar | None = None
        self._started_at: float | None = None  # when the first batch of this session was requested
        self._paused_at: float | None = None  # when training was last interrupted by something else
        self._paused_s = 0.0
        self._refreshed_at = -math.inf

    def disable(self) -> None:
        """Show nothing from now on; Lightning calls this on every process but the first."""
        self.is_enabled = False
        self._stop()

    def enable(self) -> None:
        """Show progress again, from the next start of training."""
        self.is_enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the bar, at the step the run resumes from."""
        self._started_at, self._paused_at, self._paused_s = None, None, 0.0
        self._first_step = step = trainer.global_step
        self._refresh_every_s = 0.25 if pl_module.device.type == "cpu" else 1.0
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            self._refresh_every_s = max(self._refresh_every_s, self.plain_every_s)
        elif self.is_enabled:
            epoch = TextColumn(
                "{task.description}", table_column=Column(no_wrap=True, min_width=len(self._epoch(step)))
            )
            text = TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True))
            columns = epoch, BarColumn(bar_width=None), text
            self._bar = Bar(*columns, console=self.console, auto_refresh=False, expand=True)
            self._bar.add_task(self._epoch(step), total=self.total_steps, completed=step, text="starting")
            self._bar.start()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start or restart the clock: evaluation between two epochs does not count as training."""
        self._resume()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of a run resumed in mid-epoch, for which Lightning skips `on_train_epoch_start`."""
        self._resume()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sample the clock, and refresh the display if it is due."""
        now, step = monotonic(), trainer.global_step
        clock = self._clock(now)
        if step > self._samples[-1][1] and clock - self._samples[-1][0] >= SAMPLE_EVERY_S:
            self._samples.append((clock, step))
        if self.is_enabled and now - self._refreshed_at >= self._refresh_every_s:
            self._refreshed_at = now
            self._show(trainer, pl_module, f"ETA {_duration(self._seconds_left(step, now))}")
        if trainer.is_last_batch:
            self._pause()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock during an evaluation in mid-epoch; the next batch restarts it."""
        self._pause()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the final step, the mean speed and the duration."""
        if self.is_enabled and self._started_at is not None:
            now = monotonic()
            self._samples = deque([(self._started_at, self._first_step), (self._clock(now), trainer.global_step)])
            self.images_per_second = self._steps_per_second() * self.images_per_step
            self._show(trainer, pl_module, f"in {_duration(now - self._started_at)}")
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave the terminal to the error message."""
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the terminal."""
        self._stop()

    def _show(self, trainer: L.Trainer, pl_module: L.LightningModule, time: str) -> None:
        step, latest = trainer.global_step, getattr(pl_module, "latest", {})
        ranked = [(0, f"{step:,}/{self.total_steps:,} steps")]  # (rank, text): a narrow terminal shows the lowest ranks
        if rate := self._steps_per_second():
            ranked.append((0, f"{rate * self.images_per_step:,.0f} img/s"))
        shown = {name: label for name, label in getattr(pl_module, "shown", {"loss": "loss"}).items() if name in latest}
        for rank, (name, label) in enumerate(shown.items()):
            ranked.append((rank and rank + 3, f"{label} {_number(latest[name])}"))
        for rank, name, label in ((1, "knn_top1", "k-NN"), (3, "rankme", "RankMe"), (1, "val_top1", "validation")):
            if (value := trainer.callback_metrics.get(name)) is not None:
                start = trainer.callback_metrics.get(f"{name}_start")
                since = "" if start is None else f" (start {float(start):.1f})"
                ranked.append((rank, f"{label} {float(value):.1f}{since}"))
        if self.waits is not None and (share := self.waits.recent or 0) > WORTH_TELLING:
            ranked.append((2, f"waiting for data {share:.0f} %"))
        ranked.append((0, time))
        if self._bar is None:
            text = "  ".join(part for _, part in ranked)
            self.console.print(f"{self._epoch(step)}  {text}", soft_wrap=True, markup=False, highlight=False)
        else:
            text = _fitting(ranked, self.console.width - len(self._epoch(self.total_steps)) - SHORTEST_BAR - 2)
            self._bar.update(self._bar.task_ids[0], description=self._epoch(step), completed=step, text=text)
            self._bar.refresh()

    def _epoch(self, step: int) -> str:
        epochs = math.ceil(self.total_steps / self.steps_per_epoch)
        return f"epoch {max(1, math.ceil(step / self.steps_per_epoch))}/{epochs}"

    def _steps_per_second(self) -> float:
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if last > first else 0.0

    def _seconds_left(self, step: int, now: float) -> float:
        """Return the remaining seconds at the recent speed, with the share of evaluation so far."""
        assert self._started_at is not None
        rate, elapsed = self._steps_per_second(), now - self._started_at
        return (self.total_steps - step) / rate * elapsed / (elapsed - self._paused_s) if rate else math.inf

    def _clock(self, now: float) -> float:
        """Return the time without pauses."""
        return (now if self._paused_at is None else self._paused_at) - self._paused_s

    def _pause(self) -> None:
        if self._started_at is not None and self._paused_at is None:
            self._paused_at = monotonic()

    def _resume(self) -> None:
        if self._started_at is None:
            self._started_at = self._refreshed_at = monotonic()
            self._samples = deque([(self._started_at, self._first_step)], maxlen=WINDOW)  # (clock, step)
        elif self._paused_at is not None:
            self._paused_s += monotonic() - self._paused_at
            self._paused_at = None

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _fitting(ranked: list[tuple[int, str]], room: int) -> str:
    """Return the texts in one line, without those of the highest ranks if it would have more than `room` characters."""
    kept = list(ranked)
    while len(text := "  ".join(part for _, part in kept)) > room and (last := max(rank for rank, _ in kept)) > 0:
        if last == 1 and len(text.replace(" steps", "")) <= room:
            break
        kept.remove(next(one for one in reversed(kept) if one[0] == last))
    if len(text) > room:
        text = text.replace(" steps", "")
    return text if len(text) <= room else text.replace("  ", " ")


def _number(value: Any) -> str:
    """Format with four significant digits; trailing zeros keep the width constant."""
    return f"{float(value):#.4g}".rstrip(".")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "?"
