"""k-NN accuracy and RankMe of the features during training."""

from typing import Any

import pytorch_lightning as L
import torch
import torch.distributed
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from sslvision.data.source import Splits
from sslvision.evaluation.features import Extraction, extract_features, sample_indices
from sslvision.evaluation.knn import SIMILARITIES_AT_ONCE, knn_top
from sslvision.evaluation.placement import place_for
from sslvision.evaluation.rankme import rankme
from sslvision.methods.base import Method
from sslvision.training.callbacks.every import Every
from sslvision.training.trainer import compute_dtype

ON_THE_WAY = 10_000  # images at most: a run on millions should not wait for their features


class OnlineEvaluation(Callback):
    """Log RankMe and, with labels, k-NN accuracy (k = 20) of frozen features during training, on all processes together.

    Args:
        splits: The training images, neighbors of k-NN and images of RankMe, and the held-out images.
        labeled: Whether to compute k-NN accuracy; the last epoch is then left to the evaluation after training.
        every_epochs, every_steps: Epochs and optimizer updates between evaluations; None for never.
        at_most: Maximal number of training images, a random sample if there are more.
        workers: Number of loader processes.
        from_start: Evaluate before the first update and after the last epoch, too: the run starts from weights.

    Attributes:
        measured: The last metrics; empty before.
        measured_at: Optimizer updates done then.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        labeled: bool,
        every_epochs: int | None = None,
        every_steps: int | None = None,
        at_most: int = ON_THE_WAY,
        workers: int = 0,
        from_start: bool = False,
    ):
        self.labeled, self.every, self.workers = labeled, Every(every_epochs, every_steps), workers
        self.from_start = from_start
        self.measured, self.measured_at = dict[str, float](), -1
        sources = [(splits.train, at_most), *([(splits.test, ON_THE_WAY)] if labeled else [])]
        self.evaluated = [(one, sample_indices(one, most, seed=0)) for one, most in sources if one is not None]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate the weights that a run starts from."""
        if self.from_start and trainer.global_step == 0:
            self._measure(trainer, pl_module, epoch=0)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate in mid-epoch; callbacks that measure training are told, as of Lightning's own validation."""
        if self.every.after_batch(trainer, batch_idx):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_validation_start(trainer, pl_module)
            self._measure(trainer, pl_module, trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate and log; the progress bar shows the result."""
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs
        if (last or self.every.after_epoch(trainer)) and (self.from_start or not (last and self.labeled)):
            self._measure(trainer, pl_module, epoch)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule, epoch: float) -> None:
        assert isinstance(pl_module, Method)
        found: list[Tensor] = []
        # By now the data module knows how many processes share the cores.
        workers = getattr(getattr(trainer, "datamodule", None), "workers", self.workers)
        how = Extraction(
            workers=workers,
            precision=compute_dtype(trainer),
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        with pl_module.whole() as method:
            for source, indices in self.evaluated:
                where, features = extract_features(method.pretrained(), method.normalize, source, indices, how=how)
                found += [features] if source.labels is None else [features, source.labels[where]]
        if not all(tensor.isfinite().all() for tensor in found):
            return  # updates are being skipped (skipped_updates.py), which ends the run if it lasts; the evaluation does not
        place = place_for(
            pl_module.device, 4 * found[0].nbytes + 16 * SIMILARITIES_AT_ONCE
        )  # training may need all of the GPU
        found[0] = found[0].to(place)
        metrics = {"rankme": rankme(found[0])}
        if self.labeled and all(len(part) for part in found):  # the final evaluation reports it if no image can be read
            metrics["knn_top1"], _ = knn_top(*found)
        self.measured, self.measured_at = metrics, trainer.global_step
        for name, value in metrics.items():
            trainer.callback_metrics[name] = torch.tensor(value)
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": epoch}, step=trainer.global_step)
