"""k-NN accuracy and RankMe of the features during training."""

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
from sslvision.training.trainer import compute_dtype


class OnlineEvaluation(Callback):
    """Log RankMe and, with labels, k-NN accuracy (k = 20) of frozen features during training, on all processes together.

    Args:
        splits: The training images, neighbors of k-NN and images of RankMe, and the held-out images.
        labeled: Whether to compute k-NN accuracy; the last epoch is then left to the evaluation after training.
        every_epochs: Epochs between evaluations.
        at_most: Maximal number of training images, a random sample if there are more.
        workers: Number of loader processes.
    """

    def __init__(self, splits: Splits, *, labeled: bool, every_epochs: int, at_most: int = 10_000, workers: int = 0):
        self.labeled, self.every_epochs, self.workers = labeled, every_epochs, workers
        sources = [splits.train, splits.test] if labeled else [splits.train]
        self.evaluated = [(source, sample_indices(source, at_most, seed=0)) for source in sources if source is not None]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluate and log; the progress bar shows the result."""
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs
        if not (last or epoch % self.every_epochs == 0) or (last and self.labeled):
            return
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
        for source, indices in self.evaluated:
            where, features = extract_features(pl_module.pretrained(), pl_module.normalize, source, indices, how=how)
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
        for name, value in metrics.items():
            trainer.callback_metrics[name] = torch.tensor(value)
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "epoch": epoch}, step=trainer.global_step)
