"""Evaluation of a backbone: k-NN and linear probe on frozen features of labeled images, and raw pixels for comparison."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.data.loader import evaluation_loader
from sslvision.data.source import Source, Splits
from sslvision.errors import DataError
from sslvision.evaluation.confidence import wilson_interval
from sslvision.evaluation.features import DEFAULT, Extraction, extract_features, sample_indices
from sslvision.evaluation.knn import knn_top
from sslvision.evaluation.linear_probe import bytes_of_fit, linear_probe
from sslvision.evaluation.placement import place_for
from sslvision.evaluation.rankme import rankme
from sslvision.nn.normalize import Normalize

PIXELS = 32  # side of the square of as many pixels as the images have whose pixels are compared

Encoded = tuple[Tensor, Tensor]  # indices (N,) of the images that can be read, and their features (N, D)


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
    """Return `scores_of` frozen features.

    Args:
        backbone: The backbone; its own pooling gives the features.
        normalize: Normalization of pretraining.
        splits: Labeled images; the features of `train` are the neighbors and the training set of the probe.
        at_most: Maximal number of training images and of test images, a random sample if there are more.
        seed: Seed for the sample and for the probe's held-out part.
        workers: Number of loader processes.
        precision: dtype of the backbone's matrix products.
    """
    assert splits.test is not None
    how = Extraction(workers=workers, precision=precision)
    encoded = encode(backbone, normalize, [splits.train, splits.test], at_most=at_most, seed=seed, how=how)
    return scores_of(encoded, splits, at_most=at_most, seed=seed, device=next(backbone.parameters()).device)


def encode(
    backbone: Backbone,
    normalize: Normalize,
    sources: Sequence[Source],
    *,
    at_most: int,
    seed: int = 0,
    how: Extraction = DEFAULT,
) -> list[Encoded]:
    """Return the features of each source, or of a random sample of `at_most` of its images."""
    return [
        extract_features(backbone, normalize, source, sample_indices(source, at_most, seed=seed), how=how)
        for source in sources
    ]


def intervals_of(scores: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each accuracy of `scores_of`, in percent, over test sets of the same size."""
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
    crop_pct: float | None = None,
    at_most: int,
    test_at_most: int | None = None,
    seed: int = 0,
    workers: int = 0,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Return `scores_of` the pixels of what a backbone sees, at `size_of_pixels`, as features.

    It is computed on `device` (None: the CPU). `image_size` and `crop_pct` are the backbone's. Of the test images there
    are `test_at_most`, or `at_most` too.
    """
    size = size_of_pixels(image_size)

    def pixels(source: Source, most: int) -> Encoded:
        indices = sample_indices(source, most, seed=seed)
        batches = list(evaluation_loader(source, size, indices, workers=workers, crop_pct=crop_pct))
        where = torch.cat([where for where, _ in batches])
        rows = [images.flatten(1) for _, images in batches if images.numel()]
        return where, torch.cat(rows).float() / 255 if rows else torch.empty(0)

    assert splits.test is not None
    encoded = [pixels(splits.train, at_most), pixels(splits.test, test_at_most or at_most)]
    return scores_of(encoded, splits, at_most=at_most, seed=seed, device=device or torch.device("cpu"))


def scores_of(
    encoded: Sequence[Encoded], splits: Splits, *, at_most: int, seed: int = 0, device: torch.device
) -> dict[str, float]:
    """Return knn_top1, knn_top5 and linear_top1 in percent, and rankme, the effective rank of the training features.

    The scores are those of the held_out test images that can be read; unreadable_share is the share of the others.

    Args:
        encoded: The features of training and test images.
        splits: The images, with labels.
        at_most: Maximal number of training images and of test images that were encoded.
        seed: Seed for the probe's held-out part.
        device: Where features are compared and the probe is fitted, if it has enough memory.

    Raises:
        DataError: None of the training images, or of the test images, can be read.
    """
    (train_indices, train_features), (test_indices, test_features) = encoded
    train, test = splits.train, splits.test
    assert test is not None
    assert train.labels is not None
    assert test.labels is not None
    if not len(train_indices) or not len(test_indices):
        raise DataError(f"None of the {'training' if len(test_indices) else 'test'} images can be read: {test.name}.")
    train_features = train_features.to(place_for(device, bytes_of_fit(train_features, int(train.labels.max()) + 1)))
    labeled = (train_features, train.labels[train_indices], test_features, test.labels[test_indices])
    top1, top5 = knn_top(*labeled)
    probe = linear_probe(*labeled, seed=seed)
    unreadable = 1 - len(test_indices) / min(len(test), at_most)
    scores = {"knn_top1": top1, "knn_top5": top5, "linear_top1": probe.top1, "rankme": rankme(train_features)}
    return scores | {"unreadable_share": unreadable, "held_out": len(test_indices)}
