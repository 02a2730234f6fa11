"""Early stopping that a resumed run knows of."""

import pytorch_lightning as L
from pytorch_lightning.callbacks import EarlyStopping


class StopEarly(EarlyStopping):
    """Lightning's EarlyStopping, which stays stopped when training is resumed.

    Its checkpoint says how many validations brought no improvement, but the trainer would go on until the next one.
    """

    @property
    def state_key(self) -> str:
        """Return the key of EarlyStopping itself, under which checkpoints have its state."""
        return super().state_key.replace(type(self).__qualname__, EarlyStopping.__qualname__)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop before the first update if the checkpoint, which is loaded by now, is from a training that was stopped."""
        if self.wait_count >= self.patience:
            trainer.should_stop = True
