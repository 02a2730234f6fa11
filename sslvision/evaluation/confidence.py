"""The scores of a classifier on a test set: accuracies, confidence interval, confusion matrix."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sslvision.errors import DataError

Z = 1.959964  # standard normal quantile of 0.975
LOGITS_AT_ONCE = 1 << 24  # limits memory to 128 MiB of indices while sorting


@dataclass(frozen=True, eq=False)
class Scores:
    """The scores of one classifier on one test set, in percent except for the confusion matrix.

    Attributes:
        top1: Test images whose first class is the right one.
        top5: Test images with the right class among the first five.
        interval: 95 % confidence interval of top1, over test sets of this size.
        per_class: (C,) top-1 accuracy of each class; NaN for a class without test images.
        confusion: (C, C) int64 counts of images; rows are true classes, columns predicted ones.
    """

    top1: float
    top5: float
    interval: tuple[float, float]
    per_class: Tensor
    confusion: Tensor

    @property
    def mean_per_class(self) -> float:
        """Mean accuracy over the classes that have test images, in percent; rare classes count as much as frequent ones."""
        return float(self.per_class.nanmean())


def wilson_interval(correct: float, images: int) -> tuple[float, float]:
    """Return the 95 % score interval of an accuracy, in percent (Wilson 1927, J. Am. Stat. Assoc. 22: 209-212).

    It is the set of true accuracies that the score test does not reject. Its width is never 0, and it stays within 0 to
    100, also where all images are right, or none, and where there are few; its coverage is near 95 % there, where the
    bootstrap and the normal approximation fail (Newcombe 1998, Stat. Med. 17: 857-872).

    Args:
        correct: Number of images that are right; a fraction for the mean of several classifiers on the same images.
        images: Number of test images, above 0.
    """
    share = correct / images
    center = share + Z**2 / (2 * images)
    reach = Z * math.sqrt(share * (1 - share) / images + (Z / (2 * images)) ** 2)
    low, high = ((center + side) / (1 + Z**2 / images) for side in (-reach, reach))
    # At the ends the formula gives the end itself, up to rounding.
    return 100 * (low if correct > 0 else 0.0), 100 * (high if correct < images else 1.0)


def standard_error(top1: float, images: int) -> float:
    """Return the standard error of an accuracy, both in percent, never 0 (Agresti and Coull 1998, Am. Stat. 52: 119-126).

    Args:
        top1: The accuracy.
        images: Number of test images.
    """
    share = (images * top1 / 100 + 2) / (images + 4)
    return 100 * math.sqrt(share * (1 - share) / (images + 4))


def score(ranking: Tensor, labels: Tensor, *, classes: int) -> Scores:
    """Compare the classes given to M test images with the true ones.

    Args:
        ranking: (M, R) int64, R of 1 to 5 classes for each image, best first.
        labels: (M,) int64, the true ones.
        classes: how many there are, C; all of `ranking` and `labels` lie in 0..C-1.

    Returns:
        the scores, on the CPU. The interval is `wilson_interval`: it says how far another test set may differ, not
        another training run.

    Raises DataError for arguments that do not fit.
    """
    ranking, labels = ranking.cpu(), labels.cpu()
    M, C = len(labels), classes
    if ranking.ndim != 2 or not 1 <= ranking.shape[1] <= 5 or labels.shape != ranking.shape[:1] or not M:
        raise DataError(
            "Scores need a ranking (M, 1 to 5) and labels (M,) with M above 0, "
            f"but got {tuple(ranking.shape)} and {tuple(labels.shape)}."
        )
    for name, values in (("predicted classes", ranking), ("labels", labels)):
        if values.min() < 0 or values.max() >= C:
            raise DataError(
                f"The {name} reach from {values.min()} to {values.max()}, but there are {C} classes, 0..{C - 1}. "
                "Is every test image labeled, and the classifier one for this data set?"
            )
    confusion = (labels * C + ranking[:, 0]).bincount(minlength=C * C).view(C, C)
    hits = confusion.diag()  # (C,)
    correct = int(hits.sum())
    return Scores(
        top1=100 * correct / M,
        top5=100 * int((ranking == labels[:, None]).any(1).sum()) / M,
        interval=wilson_interval(correct, M),
        per_class=100 * hits.double() / confusion.sum(1),  # 0 / 0 is NaN
        confusion=confusion,
    )


def ranking_of(logits: Tensor) -> Tensor:
    """Return the best classes of each image, (M, min(5, C)) int64, best first; of equal ones the first by index.

    `logits` are (M, C). Raises DataError if any is NaN.
    """
    M, C = logits.shape
    if logits.isnan().any():
        raise DataError(
            f"The logits of {int(logits.isnan().any(1).sum())} of {M} images are NaN: the classifier has diverged."
        )
    parts = logits.split(max(1, LOGITS_AT_ONCE // C))
    return torch.cat([part.sort(dim=1, descending=True, stable=True).indices[:, :5].clone() for part in parts])


def as_json(scores: Scores, class_names: Sequence[str]) -> dict[str, object]:
    """Return the scores as JSON can hold them, percent with two digits, None for what has no value.

    Of classes that share a name (ImageNet has two "crane") each gets its number behind it. The confusion stays out.
    """
    shared = {name for name, count in Counter(class_names).items() if count > 1}
    names = [f"{name} ({index})" if name in shared else name for index, name in enumerate(class_names)]
    return {
        "top1": round(scores.top1, 2),
        "top5": round(scores.top5, 2),
        "top1_interval": [round(end, 2) for end in scores.interval],
        "mean_per_class": round(scores.mean_per_class, 2),
        "per_class": {
            name: None if percent != percent else round(percent, 2)
            for name, percent in zip(names, scores.per_class.tolist(), strict=True)
        },
    }
