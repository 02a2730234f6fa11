"""Evaluation of a backbone: k-NN and linear probe on frozen features of labeled images, and raw pixels for comparison."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.data.loader import evaluation_loader
from sslvision.data.source import Source, Splits
from sslvision.errors import DataError
from sslvision.evaluation.confidence import wilson_interval
from sslvision.evaluation.features import Extraction, extract_features, sample_indices
from sslvision.evaluation.knn import knn_top
from sslvision.evaluation.linear_probe import bytes_of_fit, linear_probe
from sslvision.evaluation.placement import place_for
from sslvision.evaluation.rankme import rankme
from sslvision.nn.normalize import Normalize

PIXELS = 32  # side of the square of as many pixels as the images have whose pixels are compared

Features = Callable[[Source, list[int]], tuple[Tensor, Tensor]]


def has_labels(splits: Splits) -> bool:
    """Return whether features can be evaluated: training and test images have labels, of more than one class."""
    train, test = splits.train, splits.test
    return train.labels is not None and test is not None and test.labels is not None and int(train.labels.max()) > 0


def why_not_evaluated(splits: Splits) -> str:
    """Return why `has_labels` is False, as the beginning of a sentence."""
    train = splits.train
    if train.labels is None:
        return f"{train.name} has no labels (class folders)"
    if int(train.labels.max()) < 1:
        return f"{train.name} has only one class"
    return f"{train.name} has no labeled images that are held out (data.holdout, or a folder val/)"


def evaluate_backbone(
    backbone: Backbone,
    normalize: Normalize,
    splits: Splits,
    *,
    at_most: int,
    seed: int = 0,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Return knn_top1, knn_top5 and linear_top1 in percent of frozen features, and rankme, their effective rank.

    The scores are those of the held_out test images that can be read; unreadable_share is the share of the others.

    Args:
        backbone: The backbone; its own pooling gives the features.
        normalize: Normalization of pretraining.
        splits: Labeled images; the features of `train` are the neighbors and the training set of the probe.
        at_most: Maximal number of training images, a random sample if there are more.
        seed: Seed for the sample and for the probe's held-out part.
        workers: Number of loader processes.
        precision: dtype of the backbone's matrix products.
    """
    how = Extraction(workers=workers, precision=precision)
    return _evaluate(
        lambda source, indices: extract_features(backbone, normalize, source, indices, how=how),
        splits,
        at_most=at_most,
        seed=seed,
        device=next(backbone.parameters()).device,
    )


def intervals_of(scores: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each accuracy of `evaluate_backbone`, in percent, over test sets of the same size."""
    images = int(scores.get("held_out", 0))
    return {
        name: wilson_interval(round(value / 100 * images), images)
        for name, value in scores.items()
        if name.endswith("_top1") and images
    }


def size_of_pixels(image_size: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width at which pixels are compared: 32x32, or about as many in the shape of a rectangle."""
    stretch = math.sqrt(image_size[1] / image_size[0])
    return max(1, round(PIXELS / stretch)), max(1, round(PIXELS * stretch))


def evaluate_pixels(
    splits: Splits,
    image_size: tuple[int, int] = (PIXELS, PIXELS),
    *,
    at_most: int,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Return the same scores with the pixels of what a backbone sees, at `size_of_pixels`, as features.

    They are computed on `device` (None: the CPU). `image_size` is the backbone's.
    """
    size = size_of_pixels(image_size)

    def pixels(source: Source, indices: list[int]) -> tuple[Tensor, Tensor]:
        batches = list(evaluation_loader(source, size, indices, workers=workers))
        where = torch.cat([where for where, _ in batches])
        rows = [images.flatten(1) for _, images in batches if images.numel()]
        return where, torch.cat(rows).float() / 255 if rows else torch.empty(0)

    return _evaluate(pixels, splits, at_most=at_most, seed=seed, device=device or torch.device("cpu"))


def _evaluate(features: Features, splits: Splits, *, at_most: int, seed: int, device: torch.device) -> dict[str, float]:
    train, test = splits.train, splits.test
    assert test is not None
    assert train.labels is not None
    assert test.labels is not None
    train_indices, train_features = features(train, sample_indices(train, at_most, seed=seed))
    test_indices, test_features = features(test, sample_indices(test, at_most, seed=seed))
    if not len(train_indices) or not len(test_indices):
        raise DataError(f"None of the {'training' if len(test_indices) else 'test'} images can be read: {test.name}.")
    train_features = train_features.to(place_for(device, bytes_of_fit(train_features, int(train.labels.max()) + 1)))
    labeled = (train_features, train.labels[train_indices], test_features, test.labels[test_indices])
    top1, top5 = knn_top(*labeled)
    probe = linear_probe(*labeled, seed=seed)
    unreadable = 1 - len(test_indices) / min(len(test), at_most)
    scores = {"knn_top1": top1, "knn_top5": top5, "linear_top1": probe.top1, "rankme": rankme(train_features)}
    return scores | {"unreadable_share": unreadable, "held_out": len(test_indices)}
