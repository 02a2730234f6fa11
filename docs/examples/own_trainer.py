"""MAE under a Trainer of one's own: `fit(folder)` trains on images in memory. Docs and tests use this file as it is."""

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from sslvision import MAE, build_backbone


def fit(folder: str) -> MAE:
    """Pretrain, and return the method of the best checkpoint."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)  # or floats in 0..1: the method normalizes them
    loader = DataLoader(TensorDataset(images), batch_size=16, shuffle=True, drop_last=True)
    backbone = build_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2)
    method = MAE(backbone, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2, lr=1e-3, warmup_epochs=1)
    best = ModelCheckpoint(folder, monitor="loss", filename="best", save_last=True)
    trainer = L.Trainer(
        max_epochs=3,
        callbacks=[best, EarlyStopping("loss", patience=2)],
        default_root_dir=folder,
        log_every_n_steps=1,
        enable_progress_bar=False,
    )
    trainer.fit(method, loader)
    return MAE.load_from_checkpoint(best.best_model_path)  # backbone.pool(backbone.encode(images)): its features
