"""The labeled images of fine-tuning, as the backbone reads them, and their frozen features."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.load import Loaded, load_backbone
from sslvision.backbones.weight_sources import refuse_loading
from sslvision.data.datamodule import available_workers, pixel_statistics
from sslvision.data.source import Source, Splits, remarks_in_errors
from sslvision.data.sources.list_images import share
from sslvision.data.subsets import Subset, draw_per_class, split_off
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.central_crop import choose_crop_pct
from sslvision.evaluation.confidence import ranking_of
from sslvision.evaluation.features import Extraction, extract_features
from sslvision.nn.normalize import Normalize
from sslvision.runs.config import config_file, read_settings, refuse_foreign
from sslvision.settings import Finetune
from sslvision.workflows.method import build_method
from sslvision.workflows.pretraining import decided_from, open_splits, read_as_in_training

ASSUMED_BASE_LR = 1e-3  # per 256 images, where the pretraining is unknown
VALIDATE_ON = 5_000  # images at most, where they are split off the training images


@dataclasses.dataclass(frozen=True)
class LabeledData:
    """Labeled images, and what is known of the weights that will classify them.

    Attributes:
        train, validation, test: The images.
        classes: Names of the classes.
        mean, std: Statistics of the pixels in pretraining, or of the training images if nothing was pretrained.
        workers: Number of loader processes.
        base_lr: Learning rate of pretraining per 256 images.
        weights: Where the pretrained weights come from, for the user.
        crop_pct: Central share of every image that is evaluated.
        remarks: What was left out of the images or guessed, in sentences, for the user.
        value_range: The setting data.value_range, as it was given or decided.
    """

    train: Source
    validation: Source | None
    test: Source
    classes: tuple[str, ...]
    mean: list[float]
    std: list[float]
    workers: int
    base_lr: float
    weights: str
    crop_pct: float
    remarks: tuple[str, ...] = ()
    value_range: Any = None


class Features(NamedTuple):
    """Features of the readable images of a source: their indices (M,), features (M, D) and labels (M,)."""

    indices: Tensor
    features: Tensor
    labels: Tensor


def open_labeled_data(settings: Finetune, *, validate_on: int = VALIDATE_ON) -> LabeledData:
    """Open the labeled images as the backbone reads them.

    Args:
        settings: All settings.
        validate_on: Maximal number of images that are split off the training images for validation.

    Raises:
        UsageError, DataError: There are no such weights or images, or the images have no labels.
    """
    loaded = load_backbone(settings.run or "", head=False, **settings.backbone)
    data = read_as_in_training(settings.data, settings.run or "")
    splits = open_splits({**data, "channels": loaded.backbone.channels})
    settings.data |= decided_from(splits)
    with remarks_in_errors(splits.remarks):
        train, validation, test, remarks = labeled_sources(splits, settings, validate_on=validate_on)
    mean, std = statistics_of(loaded, train, settings.data)
    workers = settings.data.get("workers")
    assert splits.train.labels is not None
    return LabeledData(
        train=train,
        validation=validation,
        test=test,
        classes=splits.train.classes or tuple(str(number) for number in range(int(splits.train.labels.max()) + 1)),
        mean=mean,
        std=std,
        workers=available_workers() if workers is None else workers,
        base_lr=pretraining_base_lr(settings.run or ""),
        weights=loaded.weights,
        remarks=remarks,
        value_range=settings.data.get("value_range"),
        crop_pct=choose_crop_pct([train, validation, test], loaded.backbone.image_size),
    )


def statistics_of(loaded: Loaded, train: Source, data: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the pixels that come with the weights; of the training images for random weights."""
    if loaded.mean is None or loaded.std is None:
        return pixel_statistics(train, data.get("normalize", "computed"))
    return loaded.mean, loaded.std


def untrained_backbone(run: str, *, seed: int, **options: Any) -> Backbone | None:
    """Return the backbone as it was before pretraining, with random weights; None if `run` is no pretraining run.

    Its weights are initialized by the run's method: MAE's initial weights and position embeddings differ from timm's. None
    also for a method outside sslvision: code that a run's files name is not executed.
    """
    if (file := config_file(run)) is None:
        return None
    recorded = read_settings(file, ("method", "backbone", "data"))
    try:
        refuse_foreign("method", recorded["method"], file)
    except UsageError:
        return None
    refuse_loading(recorded["backbone"], file)
    recorded["backbone"] |= options
    channels = int(recorded["data"].get("channels", 3))
    try:
        return build_method(recorded["method"], recorded["backbone"], channels=channels, lr=1.0, seed=seed).pretrained()
    except TypeError as error:
        raise UsageError(f"{file} was not written by sslvision, or was edited: {error}.") from error


def labeled_sources(
    splits: Splits, settings: Finetune, *, validate_on: int
) -> tuple[Source, Source | None, Source, tuple[str, ...]]:
    """Return training, validation and test images, and remarks on them; `labels_per_class` limits the first two together.

    Without labeled test images, some of the training images are set aside for testing: never those that the weights are
    chosen by.

    Raises:
        DataError: There are no labels, or no labeled test images and `holdout` is 0.
    """
    train, test, validation, remarks = splits
    if train.labels is None or int(train.labels.max()) < 1:
        why = "".join(f" {remark}" for remark in remarks)
        raise DataError(
            f"{train.name} has no labels to learn: it needs two or more classes, each a folder of images.{why}"
        )
    if test is None or test.labels is None:
        if not settings.holdout:
            raise DataError(
                f"{train.name} has no labeled images for testing: put some into val/, or set data.holdout=0.1."
            )
        given, unlabeled = (
            len(train),
            "" if test is None else f", only {len(test):,} without labels, which are not used",
        )
        train, test = split_off(train, fraction=settings.holdout, at_most=validate_on, seed=settings.seed)
        aside = f"{share(len(test), given, 'training images')}, drawn class by class, are set aside for testing"
        remarks += (f"There are no labeled test images{unlabeled}: {aside} (holdout={settings.holdout}).",)
    assert train.labels is not None
    if settings.labels_per_class is not None and not settings.compare:
        train = Subset(
            train, draw_per_class(train.labels, settings.labels_per_class, seed=settings.seed, classes=train.classes)
        )
    assert train.labels is not None
    if validation is None and settings.holdout and int(train.labels.bincount().max()) < 2:
        remarks += (
            "Each class has one image to train on: none is held out to choose weights, and the last ones are kept.",
        )
    elif validation is None and settings.holdout:
        train, validation = split_off(train, fraction=settings.holdout, at_most=validate_on, seed=settings.seed)
    if validation is not None and (validation.labels is None or not len(validation)):
        validation = None
    return train, validation, test, remarks


def pretraining_base_lr(run: str) -> float:
    """Return the learning rate per 256 images of a pretraining run, from its settings.yaml; a default for other weights."""
    if (file := config_file(run)) is None:
        return ASSUMED_BASE_LR
    recorded = read_settings(file)
    try:
        base_lr = recorded["base_lr"] if recorded["lr"] is None else recorded["lr"] * 256 / recorded["batch_size"]
        return ASSUMED_BASE_LR if base_lr is None else float(base_lr)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(
            f"{file} was not written by sslvision, or was edited: lr or base_lr, or batch_size is missing."
        ) from error


def rank_classes(
    backbone: Backbone, labeled: LabeledData, source: Source, *, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return a classifier's best classes (M, <= 5) for the readable images of a source, and their labels (M,)."""
    found = frozen_features(backbone, labeled, source, precision=precision)
    head = backbone.model.get_classifier()
    logits = F.linear(found.features, head.weight.detach().float().cpu(), head.bias.detach().float().cpu())
    return ranking_of(logits), found.labels


def frozen_features(backbone: Backbone, labeled: LabeledData, source: Source, *, precision: torch.dtype) -> Features:
    """Return the features of the images of a source."""
    normalize = Normalize(labeled.mean, labeled.std).to(next(backbone.parameters()).device)
    how = Extraction(workers=labeled.workers, precision=precision)
    indices, features = extract_features(backbone, normalize, source, range(len(source)), how=how)
    return Features(indices, features, labels_of(source)[indices])


def labels_of(source: Source) -> Tensor:
    """Return the labels of a source that has them."""
    assert source.labels is not None
    return source.labels
