"""Keeping the weights with the best validation accuracy, and restoring them at the end of training."""

from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sslvision.methods.supervised import Supervised


class KeepBest(Callback):
    """Keep the weights with the highest `val_top1`, and restore them at the end of training.

    Ties are decided by the smaller `val_loss`, then by the earlier step. If Lightning validates before the first update
    (`num_sanity_val_steps=-1`), the initial weights take part. Works with and without EarlyStopping; without validation
    nothing is restored. The weights of the method's `evaluated` are kept in main memory and in every checkpoint.

    Attributes:
        best: val_top1, val_loss and step of the kept weights; empty before the first validation.
    """

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self._weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the weights if they are better than those kept."""
        metrics = trainer.callback_metrics
        if "val_top1" not in metrics:
            return
        top1, loss = (float(metrics[name]) for name in ("val_top1", "val_loss"))
        if not self.best or (top1, -loss) > (self.best["val_top1"], -self.best["val_loss"]):
            self.best = {"val_top1": top1, "val_loss": loss, "step": trainer.global_step}
            weights = _evaluated(pl_module).state_dict()
            self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the kept weights, after the last checkpoint, which contains the weights at the end of training."""
        if self._weights:
            _evaluated(pl_module).load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"best": self.best, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.best, self._weights = state_dict["best"], state_dict["weights"]


def _evaluated(method: L.LightningModule) -> Any:
    assert isinstance(method, Supervised)
    return method.evaluated
