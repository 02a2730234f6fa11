"""What fine-tuning and its comparisons share: one training of a classifier on a labeled."""

import dataclasses
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, EarlyStopping, ProgressBar
from pytorch_lightning.loggers import Logger
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sslvision.augment.randaugment import RandAugment
from sslvision.augment.randomness import permutation
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.load import load_backbone
from sslvision.data.datamodule import ImageData
from sslvision.data.loader import evaluation_loader
from sslvision.data.source import Splits
from sslvision.evaluation.linear_probe import linear_probe
from sslvision.evaluation.scores import Scores, score
from sslvision.methods.supervised import Supervised
from sslvision.nn.normalize import Normalize
from sslvision.runs.checkpoint import AtomicCheckpoints
from sslvision.runs.resume import train_from
from sslvision.settings import Finetune
from sslvision.training.callbacks.keep_best import KeepBest
from sslvision.training.callbacks.skipped_updates import SkippedUpdates
from sslvision.training.trainer import build_trainer, choose_layers
from sslvision.workflows.labeled_data import LabeledData, encode, labels_of, untrained

ADAPT_TO = 10_000  # images, at most

Head = tuple[Tensor, Tensor]  # weight (K, D), bias (K,)


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A trained classifier, its best validation (val_top1 in percent, val_loss; none without validation images)."""

    method: Supervised
    best: Mapping[str, float]
    updates: int
    seconds: float
    trainer: L.Trainer


def build(config: Finetune, *, pretrained: bool, seed: int) -> Backbone:
    """Return the network without a head: its pretrained weights, or random ones that are a function of the seed."""
    run, options = config.run or "", dict(config.backbone)
    pretrained = options.pop("pretrained", True) and pretrained
    before = None if pretrained else untrained(run, seed=seed, **options)
    return before or load_backbone(run, head=False, seed=seed, pretrained=pretrained, **options).backbone


def classifier(
    config: Finetune,
    labeled: LabeledData,
    backbone: Backbone,
    *,
    lr: float,
    seed: int,
) -> Supervised:
    """Return the method that trains a backbone on a labeled.

    Args:
        config: all settings.
        labeled: what to learn.
        backbone: without a head.
        lr: peak learning rate of the highest layer.
        seed: of everything random. The same seed shows the same images in the same order, whatever the weights.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of the head's weights
        method = Supervised(
            backbone,
            classes=labeled.classes,
            labels=labels_of(labeled.train),
            validation_labels=labels_of(labeled.validation) if labeled.validation is not None else None,
            lr=lr,
            mean=labeled.mean,
            std=labeled.std,
            seed=seed,
            **config.method,
        )
    if config.activation_checkpointing:
        method.enable_activation_checkpointing()
    return method


def fit_head(labeled: LabeledData, backbone: Backbone, *, precision: torch.dtype, seed: int) -> tuple[Head, Scores]:
    """Fit the head on frozen features of the training images; return it, and its scores on the test images."""
    learnt, tested = (
        encode(backbone, labeled, source, precision=precision) for source in (labeled.train, labeled.test)
    )
    validation = None
    if labeled.validation is not None:
        validation = encode(backbone, labeled, labeled.validation, precision=precision)[1:]
    probe = linear_probe(
        learnt.features.to(next(backbone.parameters()).device),
        learnt.labels,
        tested.features,
        tested.labels,
        validation=validation,
        num_classes=len(labeled.classes),
        seed=seed,
    )
    return (probe.weight, probe.bias), score(probe.ranking, tested.labels, classes=len(labeled.classes))


@torch.no_grad()
def adapt_statistics(backbone: Backbone, labeled: LabeledData, *, seed: int) -> bool:
    """Give the batch norms that are to train the statistics of the training images, and return whether there are any.

    Training normalizes by its own batches. A head fitted on features that were normalized by pretraining's statistics would
    not fit those of the first step. Frozen norms stay as they are. (Li et al. 2016, arXiv:1603.04779)
    """
    norms = [
        module
        for module in backbone.modules()
        if isinstance(module, _BatchNorm) and any(parameter.requires_grad for parameter in module.parameters())
    ]
    batch = min(64, len(labeled.train))
    if not norms or batch < 2:
        return False
    indices = permutation(len(labeled.train), seed=seed, epoch=0)[:ADAPT_TO].tolist()
    loader = evaluation_loader(
        labeled.train, backbone.image_size[0], indices, batch_size=batch, workers=labeled.workers
    )
    device, momenta = next(backbone.parameters()).device, [norm.momentum for norm in norms]
    backbone.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for found, images in loader:
        if len(found) == batch:
            backbone(Normalize(labeled.mean, labeled.std).to(device)(images.to(device)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return True


def fit(
    config: Finetune,
    labeled: LabeledData,
    method: Supervised,
    *,
    folder: Path,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
    checkpoints: AtomicCheckpoints | None = None,
    resume_from: Path | None = None,
) -> Fitted:
    """Train a classifier, and keep the weights that validated best.

    Args:
        config: all settings.
        labeled: what to learn.
        method: see `classifier`.
        folder: for what the trainer writes.
        loggers, callbacks, checkpoints: of the trainer.
        resume_from: a checkpoint of the same training.
    """
    started, batch = time.perf_counter(), batch_size(config, labeled)
    updates, every = plan(config, len(labeled.train), batch)
    data = ImageData(
        Splits(labeled.train, None, labeled.validation),
        method.crops,
        batch_size=batch,
        seed=method.seed,
        workers=labeled.workers,
        augment=RandAugment(magnitude=config.randaugment) if config.randaugment else None,
    )
    best = KeepBest()
    watchers: list[Callback] = [*(callbacks or []), SkippedUpdates(folder, config.max_skipped), best]
    if config.patience and labeled.validation is not None:
        watchers.append(EarlyStopping("val_top1", mode="max", patience=config.patience))
    trainer = build_trainer(
        folder=folder,
        epochs=-1,
        steps=updates,
        max_steps=updates,
        dry_run=config.dry_run,
        loggers=loggers or [],
        callbacks=watchers,
        checkpoints=checkpoints,
        options={
            "enable_checkpointing": any(isinstance(one, Checkpoint) for one in watchers),
            "enable_progress_bar": any(isinstance(one, ProgressBar) for one in watchers),
            "val_check_interval": every * int(config.trainer.get("accumulate_grad_batches", 1)),
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": -1 if method.has_fitted_head else 0,  # a fitted head may be best as it is
            **{key: value for key, value in config.trainer.items() if key != "enable_progress_bar"},
        },
    )
    choose_layers(method, trainer.strategy.root_device, compiled=config.compile)
    train_from(resume_from, trainer, method, data)
    method.float()  # whatever precision it was trained in
    return Fitted(method, dict(best.best), updates, time.perf_counter() - started, trainer)


def with_method(config: Finetune, **settings: Any) -> Finetune:
    """Return the settings with some of the method's replaced."""
    return dataclasses.replace(config, method={**config.method, **settings})


def from_scratch(config: Finetune) -> Finetune:
    """Return the settings by which the same network trains from random weights: longer, and all layers alike."""
    longer = {key: config.scratch_longer * getattr(config, key) for key in ("epochs", "min_updates", "evaluations")}
    return dataclasses.replace(with_method(config, freeze=0, freeze_stages=0, layer_decay=1.0), **longer)


def batch_size(config: Finetune, labeled: LabeledData) -> int:
    """Return the images of an update: as many as set, or as there are, in whole shares for devices and accumulated batches."""
    options = config.trainer
    devices = options.get("devices", 1)
    devices = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    shares = max(1, devices) * int(options.get("num_nodes", 1)) * int(options.get("accumulate_grad_batches", 1))
    return (
        config.batch_size if len(labeled.train) >= config.batch_size else max(1, len(labeled.train) // shares) * shares
    )


def plan(config: Finetune, images: int, batch: int) -> tuple[int, int]:
    """Return the optimizer updates of a training, and after how many of them each it is validated; the last time at the end.

    A small set is gone through more often than `epochs` says, for `min_updates`.
    """
    if config.dry_run:
        return 2, 1
    updates = max(config.epochs * (images // batch), config.min_updates, 1)
    every = max(1, round(updates / config.evaluations))
    return math.ceil(updates / every) * every, every
