"""Training one classifier, for fine-tuning and its comparisons: the plan, the network, its head, the trainer."""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint, ProgressBar
from pytorch_lightning.loggers import Logger
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from sslvision.augment.randaugment import RandAugment
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.load import load_backbone
from sslvision.data.datamodule import ImageData
from sslvision.data.loader import evaluation_loader
from sslvision.data.order import Order
from sslvision.data.source import Splits
from sslvision.evaluation.confidence import Scores, score
from sslvision.evaluation.linear_probe import linear_probe
from sslvision.methods.supervised import Supervised
from sslvision.nn.normalize import Normalize
from sslvision.runs.checkpoint import AtomicCheckpoints
from sslvision.settings import Finetune
from sslvision.training.callbacks.keep_best import KeepBest
from sslvision.training.callbacks.skipped_updates import SkippedUpdates
from sslvision.training.callbacks.stop_early import StopEarly
from sslvision.training.trainer import Machine, build_trainer, configure_method, fit
from sslvision.workflows.labeled_data import LabeledData, frozen_features, labels_of, untrained_backbone

ADAPT_ON = 10_000  # images at most, for the statistics of batch norms

Head = tuple[Tensor, Tensor]  # weight (K, D), bias (K,)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """How one classifier is trained: computed once, from settings, data and machine.

    Attributes:
        settings: The settings of this training.
        folder: Where the trainer writes.
        machine: Device, number of processes, and dtype of matrix products.
        pretrained: Whether it starts from pretrained weights or from random ones.
        head_first: Whether its head is fitted on frozen features before training.
        seed: Seed for everything random. The same seed shows the same images in the same order, whatever the weights.
        lr: Peak learning rate of the highest layer.
        batch_size: Images per update.
        updates: Optimizer updates.
        validate_every: Updates between validations; the last validation is at the end.
    """

    settings: Finetune
    folder: Path
    machine: Machine
    pretrained: bool
    head_first: bool
    seed: int
    lr: float
    batch_size: int
    updates: int
    validate_every: int


def plan_training(
    settings: Finetune,
    labeled: LabeledData,
    machine: Machine,
    *,
    folder: Path,
    lr_ratio: float,
    seed: int,
    pretrained: bool,
    head_first: bool,
) -> TrainingPlan:
    """Plan the training of a classifier.

    A batch has as many images as set, or as there are, in equal shares for devices and accumulated batches. The learning
    rate is `lr`, or `base_lr` per 256 images, or `lr_ratio` times the rate of pretraining per 256 images.
    """
    images = len(labeled.train)
    shares = machine.world_size * int(settings.trainer.get("accumulate_grad_batches", 1))
    batch_size = settings.batch_size if images >= settings.batch_size else max(1, images // shares) * shares
    updates, validate_every = count_updates(settings, images, batch_size)
    if not pretrained:
        settings = warmed_up(settings, epochs=updates / max(1, images // batch_size))
    base_lr = settings.base_lr if settings.base_lr is not None else lr_ratio * labeled.base_lr
    return TrainingPlan(
        settings=settings,
        folder=folder,
        machine=machine,
        pretrained=pretrained,
        head_first=head_first,
        seed=seed,
        lr=settings.lr if settings.lr is not None else base_lr * batch_size / 256,
        batch_size=batch_size,
        updates=updates,
        validate_every=validate_every,
    )


def count_updates(settings: Finetune, images: int, batch_size: int) -> tuple[int, int]:
    """Return the number of updates, a multiple of the number between validations, and the latter.

    A small data set gets more epochs than `epochs`, for `min_updates`.
    """
    if settings.dry_run:
        return 2, 1
    updates = max(settings.epochs * (images // batch_size), settings.min_updates, 1)
    validate_every = max(1, round(updates / settings.evaluations))
    return math.ceil(updates / validate_every) * validate_every, validate_every


def from_scratch(settings: Finetune) -> Finetune:
    """Return the settings to train the same network from random weights: longer, and all layers alike."""
    longer = {key: settings.scratch_longer * getattr(settings, key) for key in ("epochs", "min_updates", "evaluations")}
    alike = with_method(settings, freeze=0, freeze_stages=0, layer_decay=1.0)
    return dataclasses.replace(alike, lr=None, base_lr=None, **longer)


def warmed_up(settings: Finetune, *, epochs: float) -> Finetune:
    """Return the settings of a training from random weights with its warm-up, without which a ViT is held back by high rates.

    The authors of MAE warm up for 20 of 300 epochs (He et al. 2021, arXiv:2111.06377, appendix A.2).
    """
    given = settings.scratch_longer * settings.method.get("warmup_epochs", 0)
    return with_method(settings, warmup_epochs=max(given, settings.scratch_warmup * epochs))


def with_method(settings: Finetune, **replaced: Any) -> Finetune:
    """Return the settings with some of the method's settings replaced."""
    return dataclasses.replace(settings, method={**settings.method, **replaced})


def build_classifier(plan: TrainingPlan, labeled: LabeledData) -> Supervised:
    """Return the backbone with a new head, as the method that trains it."""
    backbone = build_network(plan.settings, labeled, pretrained=plan.pretrained, seed=plan.seed)
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed)  # for the weights of the head
        method = Supervised(
            backbone,
            classes=labeled.classes,
            labels=labels_of(labeled.train),
            validation_labels=labels_of(labeled.validation) if labeled.validation is not None else None,
            lr=plan.lr,
            mean=labeled.mean,
            std=labeled.std,
            seed=plan.seed,
            **plan.settings.method,
        )
    if plan.settings.activation_checkpointing:
        method.enable_activation_checkpointing()
    return method


def build_network(settings: Finetune, labeled: LabeledData, *, pretrained: bool, seed: int) -> Backbone:
    """Return the backbone without a head, with pretrained weights or with random weights that are a function of the seed."""
    run, options = settings.run or "", dict(settings.backbone)
    pretrained = options.pop("pretrained", True) and pretrained
    untrained = None if pretrained else untrained_backbone(run, seed=seed, **options)
    backbone = untrained or load_backbone(run, head=False, seed=seed, pretrained=pretrained, **options).backbone
    backbone.crop_pct = labeled.crop_pct
    return backbone


def fit_head(labeled: LabeledData, backbone: Backbone, *, precision: torch.dtype, seed: int) -> tuple[Head, Scores]:
    """Fit the head on frozen features of the training images; return it, and its scores on the test images."""
    train, test = (
        frozen_features(backbone, labeled, source, precision=precision) for source in (labeled.train, labeled.test)
    )
    validation = None
    if labeled.validation is not None:
        found = frozen_features(backbone, labeled, labeled.validation, precision=precision)
        validation = (found.features, found.labels) if len(found.labels) else None
    probe = linear_probe(
        train.features.to(next(backbone.parameters()).device),
        train.labels,
        test.features,
        test.labels,
        validation=validation,
        num_classes=len(labeled.classes),
        seed=seed,
    )
    return (probe.weight, probe.bias), score(probe.ranking, test.labels, classes=len(labeled.classes))


@torch.no_grad()
def adapt_batch_norms(backbone: Backbone, labeled: LabeledData, *, seed: int) -> bool:
    """Give the trainable batch norms the statistics of the training images, and return whether they were changed.

    Training normalizes by its own batches. A head fitted on features that were normalized by the statistics of pretraining
    would not fit those of the first step. Frozen norms stay as they are, and all do if too few images can be read. (Li et
    al. 2016, arXiv:1603.04779)
    """
    norms = [
        module
        for module in backbone.modules()
        if isinstance(module, _BatchNorm) and any(parameter.requires_grad for parameter in module.parameters())
    ]
    batch_size = min(64, len(labeled.train))
    if not norms or batch_size < 2:
        return False
    indices = Order(len(labeled.train), seed=seed, epoch=0)[:ADAPT_ON].tolist()
    loader = evaluation_loader(
        labeled.train,
        backbone.image_size,
        indices,
        batch_size=batch_size,
        workers=labeled.workers,
        crop_pct=backbone.crop_pct,
    )
    device, momenta = next(backbone.parameters()).device, [norm.momentum for norm in norms]
    before = copy.deepcopy([norm.state_dict() for norm in norms])
    adapted = False
    backbone.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for read, images in loader:
        if len(read) >= max(2, batch_size // 2):  # unreadable images leave gaps; statistics of a few would be noise
            adapted = True
            backbone(Normalize(labeled.mean, labeled.std).to(device)(images.to(device)))
    for norm, momentum, state in zip(norms, momenta, before, strict=True):
        norm.momentum = momentum
        if not adapted:
            norm.load_state_dict(state)
    return adapted


def build_classifier_trainer(
    plan: TrainingPlan,
    labeled: LabeledData,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    checkpoints: AtomicCheckpoints | None = None,
) -> L.Trainer:
    """Build the trainer of a classifier: it validates as planned, and keeps the latest of the best weights.

    Args:
        plan: How to train.
        labeled: The labeled images.
        callbacks: Further callbacks.
        loggers: Where metrics go.
        checkpoints: How checkpoints are written.

    Raises:
        UsageError: Lightning rejects an option.
    """
    settings = plan.settings
    best = KeepBest(0 if labeled.validation is None else len(labeled.validation))
    used: list[Callback] = [*callbacks, SkippedUpdates(plan.folder, settings.max_skipped), best]
    if settings.patience and labeled.validation is not None:
        used.append(StopEarly("val_top1", mode="max", patience=settings.patience))
    return build_trainer(
        folder=plan.folder,
        epochs=-1,
        steps=plan.updates,
        max_steps=plan.updates,
        dry_run=settings.dry_run,
        loggers=list(loggers),
        callbacks=used,
        checkpoints=checkpoints,
        options={
            "enable_checkpointing": any(isinstance(one, Checkpoint) for one in used),
            "enable_progress_bar": any(isinstance(one, ProgressBar) for one in used),
            "val_check_interval": plan.validate_every * int(settings.trainer.get("accumulate_grad_batches", 1)),
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": -1 if plan.head_first else 0,  # a fitted head may be best before the first update
            **{key: value for key, value in settings.trainer.items() if key != "enable_progress_bar"},
        },
    )


def train_classifier(
    plan: TrainingPlan, labeled: LabeledData, method: Supervised, trainer: L.Trainer, *, checkpoint: Path | None = None
) -> Mapping[str, float]:
    """Train a classifier, and leave in `method` the weights that `KeepBest` keeps.

    Args:
        plan: How to train.
        labeled: The labeled images.
        method: From `build_classifier`.
        trainer: From `build_classifier_trainer`.
        checkpoint: A checkpoint of the same training to resume from.

    Returns:
        val_top1 (in percent), val_loss and step of their validation; empty without validation images.
    """
    data = ImageData(
        Splits(labeled.train, None, labeled.validation),
        method.crops,
        batch_size=plan.batch_size,
        seed=plan.seed,
        workers=labeled.workers,
        augment=RandAugment(magnitude=plan.settings.randaugment) if plan.settings.randaugment else None,
        crop_pct=labeled.crop_pct,
    )
    configure_method(method, trainer.strategy.root_device, compile=plan.settings.compile)
    fit(trainer, method, data, checkpoint=checkpoint)
    method.float()  # whatever precision it was trained in
    (best,) = (callback for callback in trainer.callbacks if isinstance(callback, KeepBest))  # type: ignore[attr-defined]
    return dict(best.best)
