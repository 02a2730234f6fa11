"""When something that is done every N epochs or N updates is due."""

from dataclasses import dataclass

import pytorch_lightning as L


@dataclass(frozen=True)
class Every:
    """Every N epochs and every N optimizer updates.

    What is due with the last update of an epoch, or of the run, waits for the end of the epoch, so that a resumed run does
    not skip what happens there.

    Args:
        epochs, steps: Epochs and optimizer updates between two times; None for never.
    """

    epochs: int | None = None
    steps: int | None = None

    def after_batch(self, trainer: L.Trainer, batch_idx: int) -> bool:
        """Return whether it is due after a batch: right after an update, never between accumulated batches."""
        updated = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        ends = trainer.is_last_batch or trainer.global_step == trainer.max_steps
        return updated and not ends and self._steps_are_over(trainer)

    def after_epoch(self, trainer: L.Trainer) -> bool:
        """Return whether it is due after an epoch."""
        epochs_are_over = self.epochs is not None and (trainer.current_epoch + 1) % self.epochs == 0
        return epochs_are_over or self._steps_are_over(trainer)

    def _steps_are_over(self, trainer: L.Trainer) -> bool:
        return self.steps is not None and trainer.global_step % self.steps == 0
