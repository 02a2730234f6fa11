"""A run that continues from weights: is it still better than they were? The best weights are kept."""

import math
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.markup import escape
from torch import Tensor

from sslvision.methods.base import Method
from sslvision.training.callbacks.online_evaluation import OnlineEvaluation

RANKME_NOISE = 0.1  # of RankMe: a fall that is nothing to speak of


class Continued(Callback):
    """Compare every evaluation on the way with the first, of the weights that the run started from, and keep the best.

    The score is k-NN accuracy, or RankMe without labels. A fall below the start by more than noise is told once, while it
    happens. The weights of `method.pretrained()` with the highest score are kept in main memory and in every checkpoint.

    Args:
        evaluation: Evaluates before the first update, on the way and after the last epoch; stands before this in the Trainer.
        console: Where to print.

    Attributes:
        scores: (epoch, score) of each evaluation, the first before training.
        best: Place of the best one in `scores`.
        weights: Its weights, on the CPU.
    """

    def __init__(self, evaluation: OnlineEvaluation, console: Console | None = None):
        self.evaluation = evaluation
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self.scores: list[tuple[float, float]] = []
        self.best, self.weights = 0, dict[str, Tensor]()
        self._told, self._added_at = False, -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the score of the start."""
        if self.evaluation.measured_at == trainer.global_step == 0:
            self._add(trainer, pl_module, epoch=0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare and keep, if there was an evaluation in mid-epoch."""
        if self.evaluation.measured_at == trainer.global_step != self._added_at:
            epoch = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
            self._add(trainer, pl_module, epoch=round(epoch, 2))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare and keep, if there was an evaluation."""
        if self.evaluation.measured_at == trainer.global_step != self._added_at:
            self._add(trainer, pl_module, epoch=trainer.current_epoch + 1)

    def _add(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: float) -> None:
        assert isinstance(pl_module, Method)
        self._added_at = trainer.global_step
        score = self.evaluation.measured.get(self.name)
        if score is None:  # no image could be read
            return
        self.scores.append((epoch, score))
        trainer.callback_metrics[f"{self.name}_start"] = torch.tensor(self.scores[0][1])  # for the progress bar
        if len(self.scores) == 1 or score > self.scores[self.best][1]:
            self.best = len(self.scores) - 1
            with pl_module.whole() as method:
                state = method.pretrained().state_dict()
                self.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
        if self.found and not self._told:
            self._told = True
            if trainer.is_global_zero:
                self.console.print(f"[bold yellow]{escape(self.summary())}[/]")

    @property
    def name(self) -> str:
        """Return the name of the score among the metrics."""
        return "knn_top1" if self.evaluation.labeled else "rankme"

    @property
    def noise(self) -> float:
        """Return the difference from the start that chance explains: two standard errors of k-NN, a tenth of RankMe."""
        start = self.scores[0][1]
        if not self.evaluation.labeled:
            return RANKME_NOISE * start
        images = len(self.evaluation.evaluated[1][1])
        share = min(max(start / 100, 1 / images), 1 - 1 / images)
        return 200 * math.sqrt(2 * share * (1 - share) / images)

    @property
    def found(self) -> bool:
        """Return whether the last score is below that of the start by more than noise."""
        return bool(self.scores) and self.scores[-1][1] < self.scores[0][1] - self.noise

    @property
    def best_epoch(self) -> float:
        """Return the epoch after which the score was best; 0 for the start."""
        return self.scores[self.best][0]

    @property
    def improved_until_the_end(self) -> bool:
        """Return whether the last evaluation was the best one."""
        return self.best == len(self.scores) - 1

    def summary(self) -> str:
        """Return the fall in words, with its usual causes."""
        (epoch, last), (_, start), (_, best) = self.scores[-1], self.scores[0], self.scores[self.best]
        label, unit = ("k-NN accuracy", " %") if self.evaluation.labeled else ("RankMe", "")
        kept = f"after epoch {self.best_epoch:g}, {best:.1f}{unit}" if self.best else "those of the start"
        return (
            f"{label} is below that of the weights the run started from: {last:.1f}{unit} after epoch {epoch:g}, "
            f"{start:.1f}{unit} at the start; {self.noise:.1f} would be noise. Usual causes: a learning rate for random "
            "weights (try a tenth of it), a head or decoder that starts random and pulls the backbone along "
            "(freeze_backbone_epochs), a teacher that follows too fast (momentum nearer to 1), few images or others than the "
            "scores are about, other pixel statistics (data.normalize). The best weights, "
            f"{kept}, are kept and exported to export-best/."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"scores": [list(pair) for pair in self.scores], "best": self.best, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.scores = [(epoch, score) for epoch, score in state_dict["scores"]]
        self.best, self.weights = state_dict["best"], state_dict["weights"]
        self._told = any(score < self.scores[0][1] - self.noise for _, score in self.scores)
