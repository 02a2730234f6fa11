"""Saying in words, while a run still trains, that it has stopped learning."""

from typing import Any, Literal

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.markup import escape

from sslvision.errors import Diverged
from sslvision.methods.base import Method

# For so long a fault must show in all written metrics: the first steps of a healthy run can look like any collapse.
PATIENCE, PATIENCE_STEPS = 5, 50


class Health(Callback):
    """Ask the method what its logged metrics mean, and pass on what it keeps finding wrong.

    The metrics are means over all processes, so all of them come to the same finding.

    Args:
        action: "warn" prints a finding, once, and training goes on; "stop" raises it.
        console: where to print.
    """

    def __init__(self, action: Literal["warn", "stop"], console: Console | None = None):
        self.action, self.console = action, console or Console(stderr=True, soft_wrap=True, highlight=False)
        self.found: dict[str, str] = {}  # fault: in words
        self._since: dict[str, tuple[int, int]] = {}  # fault: since which step it shows without a break, how many times
        self._seen: dict[str, float] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the metrics when new ones have been written.

        Raises:
            Diverged: there is a finding, and the action is "stop".
        """
        assert isinstance(pl_module, Method)
        if not pl_module.logged or pl_module.logged is self._seen:
            return
        self._seen = pl_module.logged
        faults = pl_module.diagnose(self._seen, pl_module.clock)
        step = trainer.global_step
        before, self._since = self._since, {}
        for fault, words in faults.items():
            first, times = before.get(fault, (step, 0))
            self._since[fault] = (first, times + 1)
            if fault not in self.found and times + 1 >= PATIENCE and step - first >= PATIENCE_STEPS:
                self.found[fault] = f"{fault}, from step {first:,} to {step:,}: {words}"
                if self.action == "stop":
                    raise Diverged(f"{self.found[fault]} (health=stop ended the run; with health=warn it goes on.)")
                if trainer.is_global_zero:
                    self.console.print(f"[bold yellow]{escape(self.found[fault])}[/]")
