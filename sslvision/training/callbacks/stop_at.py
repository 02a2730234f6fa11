"""Ending a training when its time is over, or when it does worse than others, with what it has."""

import time
from collections.abc import Callable

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback

from sslvision.methods.base import Method


class StopAt(Callback):
    """End training after the first update at which the time is over.

    Args:
        deadline: Time of `time.perf_counter`; None for no end.

    Attributes:
        stopped_at: Updates done when the time was over; None if it was not.
    """

    def __init__(self, deadline: float | None):
        self.deadline = deadline
        self.stopped_at: int | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Read the clock, unless training is complete."""
        left = trainer.global_step < trainer.max_steps or trainer.max_steps < 0
        if left and self.deadline is not None and time.perf_counter() >= self.deadline:
            self.stopped_at = trainer.global_step
            trainer.should_stop = True


class Prune(Callback):
    """Score a training at some updates, and end it where a judge says that it is not worth going on.

    Args:
        at: Updates at which to score.
        score: Returns the score of a method.
        judge: Is told the percentage of the updates that are done and the score, and returns whether to stop.

    Attributes:
        scores: The scores by update.
        stopped: Whether training was ended.
    """

    def __init__(self, at: list[int], score: Callable[[Method], float], judge: Callable[[int, float], bool]):
        self.at, self.score, self.judge = at, score, judge
        self.scores: dict[int, float] = {}
        self.stopped = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Score and ask."""
        step = trainer.global_step
        if step not in self.at or step in self.scores:
            return
        assert isinstance(pl_module, Method)
        was_training = pl_module.training
        self.scores[step] = self.score(pl_module)
        pl_module.train(was_training)
        self.stopped = self.judge(round(100 * step / trainer.max_steps), self.scores[step])
        trainer.should_stop = trainer.should_stop or self.stopped
