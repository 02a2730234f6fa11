"""Reporting during training that a method has collapsed or that its loss jumped."""

from collections import deque
from statistics import median
from typing import Any, Literal

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.markup import escape

from sslvision.errors import Diverged
from sslvision.methods.base import Method

# A fault must show in so many consecutive logs and steps: the first steps of a healthy run can look like a collapse.
PATIENCE, PATIENCE_STEPS = 5, 50
# A loss this many times the median of the last logged ones is a spike; at most three are reported.
SPIKE, SPIKE_WINDOWS, SPIKES_TOLD = 10, 10, 3


class Health(Callback):
    """Let the method diagnose its logged metrics, and report faults that persist.

    The metrics are means over all processes, so all processes come to the same result.

    Args:
        action: "warn" prints a fault once, and training continues; "stop" raises it.
        console: Where to print.
    """

    def __init__(self, action: Literal["warn", "stop"], console: Console | None = None):
        self.action, self.console = action, console or Console(stderr=True, soft_wrap=True, highlight=False)
        self.found: dict[str, str] = {}  # fault: description
        self._since: dict[
            str, tuple[int, int]
        ] = {}  # fault: first step of the current sequence, length of the sequence
        self._seen: dict[str, float] = {}
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOWS)  # the last logged ones

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check new metrics.

        Raises:
            Diverged: A fault persists, and the action is "stop".
        """
        assert isinstance(pl_module, Method)
        if not pl_module.logged or pl_module.logged is self._seen:
            return
        self._seen = pl_module.logged
        faults = pl_module.diagnose(self._seen, pl_module.clock)
        step = trainer.global_step
        self._look_for_spike(pl_module, step, trainer.is_global_zero)
        before, self._since = self._since, {}
        for fault, words in faults.items():
            first, times = before.get(fault, (step, 0))
            self._since[fault] = (first, times + 1)
            if fault not in self.found and times + 1 >= PATIENCE and step - first >= PATIENCE_STEPS:
                self.found[fault] = f"{fault}, from step {first:,} to {step:,}: {words}"
                if self.action == "stop":
                    raise Diverged(f"{self.found[fault]} (health=stop ended the run; with health=warn it continues.)")
                if trainer.is_global_zero:
                    self.console.print(f"[bold yellow]{escape(self.found[fault])}[/]")

    def _look_for_spike(self, method: Method, step: int, first: bool) -> None:
        """Report an update whose loss was far above the losses logged before."""
        usual, highest = median(self._losses) if self._losses else 0.0, max(method.losses_logged, default=0.0)
        told = sum(name.startswith("spike") for name in self.found)
        if 0 < SPIKE * usual < highest and told < SPIKES_TOLD:
            began = step - len(method.losses_logged) + 1
            when = f"at update {step:,}" if began >= step else f"between updates {began:,} and {step:,}"
            self.found[f"spike {step}"] = (
                f"The loss jumped {when}: {highest:.3g}, {highest / usual:.0f} times the {usual:.3g} of before. If it does not "
                "recover, start again from earlier weights (init_from=.../checkpoints/last-1.ckpt) with a lower learning "
                "rate, a longer warm-up, or trainer.gradient_clip_val=1."
            )
            if first:
                self.console.print(f"[bold yellow]{escape(self.found[f'spike {step}'])}[/]")
        self._losses.append(self._seen["loss"])
