"""Keeping the latest weights that validate as well as any, and restoring them at the end of training."""

import math
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sslvision.evaluation.confidence import standard_error
from sslvision.methods.supervised import Supervised


class KeepBest(Callback):
    """Keep the latest weights with a `val_top1` within one standard error of the highest, and restore them at the end.

    The one-standard-error rule (Breiman et al. 1984, Classification and Regression Trees, section 3.4.3). Of few validation
    images the highest of many accuracies is mostly luck, and training longer is the better guess: of 10 images, a point and
    more on test images is lost otherwise. Of thousands, the standard error is a fraction of a point.

    If Lightning validates before the first update (`num_sanity_val_steps=-1`), the initial weights take part. Works with and
    without EarlyStopping; without validation nothing is restored. The weights of the method's `evaluated` are kept in main
    memory and in every checkpoint.

    Args:
        images: Number of validation images.

    Attributes:
        best: val_top1, val_loss and step of the kept weights; empty before the first validation.
        highest: The highest val_top1.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.best: dict[str, float] = {}
        self.highest = -math.inf
        self._weights: dict[str, Tensor] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Copy the weights if they are as good as any before."""
        metrics = trainer.callback_metrics
        if "val_top1" not in metrics:
            return
        top1, loss = (float(metrics[name]) for name in ("val_top1", "val_loss"))
        self.highest = max(self.highest, top1)
        if top1 >= self.highest - standard_error(self.highest, self.images):
            self.best = {"val_top1": top1, "val_loss": loss, "step": trainer.global_step}
            weights = _evaluated(pl_module).state_dict()
            self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Load the kept weights, after the last checkpoint, which contains the weights at the end of training."""
        if self._weights:
            _evaluated(pl_module).load_state_dict(self._weights)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {"best": self.best, "highest": self.highest, "weights": self._weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.best, self._weights = state_dict["best"], state_dict["weights"]
        self.highest = state_dict.get("highest", self.best.get("val_top1", -math.inf))  # of 0.1.0 and before


def _evaluated(method: L.LightningModule) -> Any:
    assert isinstance(method, Supervised)
    return method.evaluated
