"""What there is to learn in stage two: labeled images as a backbone reads them, and the frozen features of these."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.load import Loaded, load_backbone, refuse_loading
from sslvision.data.datamodule import available_workers, pixel_statistics
from sslvision.data.source import Source, Splits
from sslvision.data.subsets import Subset, draw_per_class, split_off
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.features import extract_features
from sslvision.evaluation.scores import ranking_of
from sslvision.nn.normalize import Normalize
from sslvision.runs.config import config_file, read_settings, refuse_foreign
from sslvision.settings import Finetune
from sslvision.workflows.pretraining import build_method, open_splits

ASSUMED_BASE_LR = 1e-3  # per 256 images, of a pretraining that nothing is known of
VALIDATE_ON = 5_000  # images at most, where they are taken from the training images


@dataclasses.dataclass(frozen=True)
class LabeledData:
    """What there is to learn.

    Attributes:
        train, validation, test: to learn from, to choose by, to score by.
        classes: their names.
        mean, std: of the pixels in pretraining, or of the training images if nothing was pretrained.
        workers: loader processes.
        base_lr: pretraining's learning rate per 256 images.
        weights: where the pretrained weights come from, in words.
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


class Encoded(NamedTuple):
    """The readable images of a source: their indices (M,), features (M, D) and labels (M,)."""

    indices: Tensor
    features: Tensor
    labels: Tensor


def open_labeled_data(config: Finetune, *, validate_on: int = VALIDATE_ON) -> LabeledData:
    """Open the labeled images as the backbone reads them.

    Args:
        config: all settings.
        validate_on: so many images at most are taken from the training images to validate on.

    Raises:
        UsageError, DataError: no such weights or images, or images without labels.
    """
    loaded = load_backbone(config.run or "", head=False, **config.backbone)
    splits = open_splits({**config.data, "channels": loaded.backbone.channels})
    train, validation, test = labeled_sources(splits, config, validate_on=validate_on)
    mean, std = statistics_of(loaded, train, config.data)
    workers = config.data.get("workers")
    assert splits.train.labels is not None
    return LabeledData(
        train=train,
        validation=validation,
        test=test,
        classes=splits.train.classes or tuple(str(number) for number in range(int(splits.train.labels.max()) + 1)),
        mean=mean,
        std=std,
        workers=available_workers() if workers is None else workers,
        base_lr=pretraining_rate(config.run or ""),
        weights=loaded.weights,
    )


def statistics_of(loaded: Loaded, train: Source, data: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return the pixels' mean and deviation that the weights know, or, of random ones, those of the training images."""
    if loaded.mean is None or loaded.std is None:
        return pixel_statistics(train, data.get("normalize", "computed"))
    return loaded.mean, loaded.std


def untrained(run: str, *, seed: int, **options: Any) -> Backbone | None:
    """Return the backbone as it was before pretraining, with weights of a seed; None if `run` is no pretraining run.

    It begins as its method begins: MAE's with other weights and position embeddings than timm's. None too for a method
    that is not sslvision's own: what a run's files name is not run.
    """
    if (file := config_file(run)) is None:
        return None
    told = read_settings(file, ("method", "backbone", "data"))
    try:
        refuse_foreign("method", told["method"], file)
    except UsageError:
        return None
    refuse_loading(told["backbone"], file)
    told["backbone"] |= options
    channels = int(told["data"].get("channels", 3))
    try:
        return build_method(told["method"], told["backbone"], channels=channels, lr=1.0, seed=seed).pretrained()
    except TypeError as error:
        raise UsageError(f"{file} is not as sslvision writes it: {error}.") from error


def labeled_sources(splits: Splits, config: Finetune, *, validate_on: int) -> tuple[Source, Source | None, Source]:
    """Return the images to learn from, to choose by and to score by; `labels_per_class` bounds the first two together.

    Raises:
        DataError: there are no labels, or none to score by.
    """
    train, validation, test = splits.train, splits.validation, splits.test
    if train.labels is None or int(train.labels.max()) < 1:
        raise DataError(
            f"{train.name} has no labels to learn: put the images of each class into a folder of their own, for two "
            "classes or more."
        )
    if config.labels_per_class is not None and not config.compare:
        train = Subset(train, draw_per_class(train.labels, config.labels_per_class, seed=config.seed))
    if validation is None and config.holdout:
        train, validation = split_off(train, fraction=config.holdout, at_most=validate_on, seed=config.seed)
    if validation is not None and (validation.labels is None or not len(validation)):
        validation = None
    if test is None or test.labels is None:
        test = validation
    if test is None:
        raise DataError(f"{train.name} has no labeled images to score by: put some into val/, or set data.holdout=0.1.")
    return train, validation, test


def pretraining_rate(run: str) -> float:
    """Return the learning rate per 256 images that a run of ours was pretrained with, as its config.yaml tells.

    A fine-tuned run does not: it may have been told a ratio alone.
    """
    if (file := config_file(run)) is None:
        return ASSUMED_BASE_LR
    told = read_settings(file)
    try:
        rate = told["base_lr"] if told["lr"] is None else told["lr"] * 256 / told["batch_size"]
        return ASSUMED_BASE_LR if rate is None else float(rate)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UsageError(f"{file} is not as sslvision writes it: it tells no lr or base_lr, and batch_size.") from error


def rank(backbone: Backbone, labeled: LabeledData, source: Source, *, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the best classes (M, <= 5) that a classifier gives to the readable images of a source, and their labels (M,)."""
    encoded = encode(backbone, labeled, source, precision=precision)
    head = backbone.model.get_classifier()
    logits = F.linear(encoded.features, head.weight.detach().float().cpu(), head.bias.detach().float().cpu())
    return ranking_of(logits), encoded.labels


def encode(backbone: Backbone, labeled: LabeledData, source: Source, *, precision: torch.dtype) -> Encoded:
    """Return the frozen features of a source's images."""
    normalize = Normalize(labeled.mean, labeled.std).to(next(backbone.parameters()).device)
    indices, features = extract_features(
        backbone, normalize, source, range(len(source)), workers=labeled.workers, precision=precision
    )
    return Encoded(indices, features, labels_of(source)[indices])


def labels_of(source: Source) -> Tensor:
    """Return the labels of a source that has them."""
    assert source.labels is not None
    return source.labels
