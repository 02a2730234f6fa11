"""What a method sees in its first batch: the statistics of its pixels, and how far its features tell images apart."""

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback

from sslvision.data.batch import Batch
from sslvision.methods.base import Method
from sslvision.methods.mae import MAE

AT_MOST = 64  # images whose features are computed


class FirstBatch(Callback):
    """Measure the first batch before the first update.

    Attributes:
        pixel_mean, pixel_std: Of the normalized pixels.
        spread: Standard deviation of the features over images, as a share of their root mean square.
        targets: Mean square of MAE's targets; 0 for another method.
        predictions: What MAE's initialization makes of the mean square of its predictions, see step_verdicts.Start.
    """

    pixel_mean = pixel_std = spread = targets = predictions = 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Measure."""
        if batch_idx or not isinstance(batch, Batch):
            return
        assert isinstance(pl_module, Method)
        was_training = pl_module.training
        pl_module.eval()
        with torch.no_grad():
            images = pl_module.normalize(batch.crops[0][:AT_MOST])  # (B, C, h, w)
            self.pixel_mean, self.pixel_std = float(images.mean()), float(images.std())
            backbone = pl_module.pretrained()
            features = backbone.pool(backbone.encode(images)).float()  # (B, D)
            size = features.square().mean().sqrt()
            self.spread = float(features.std(dim=0).square().mean().sqrt() / size) if size else 0.0
            if isinstance(pl_module, MAE):
                rows, columns = pl_module.backbone.grid
                every = torch.arange(rows * columns, device=images.device).expand(len(images), -1)
                self.targets = float(pl_module.targets(images, every).square().mean())
                last = pl_module.decoder_pred
                self.predictions = 2 * last.in_features / (last.in_features + last.out_features)
        pl_module.train(was_training)
