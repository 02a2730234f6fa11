"""Segmentation by frozen patch features: which class has each pixel? A vote of nearest patches, and a linear classifier.

A patch of a training image has the class of most of its pixels. The classes of a test image's patches, as scores, are
interpolated to the size of its mask, so that the result is compared pixel by pixel: as in the linear evaluation of DINOv2
(Oquab et al. 2023, arXiv:2304.07193, section 7.4). The vote is that of k-NN, and the classifier the linear probe's.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.errors import UsageError
from sslvision.evaluation.knn import knn_votes
from sslvision.evaluation.linear_probe import FittedProbe, probe_logits

SAMPLES = 8  # pixels along a side of a patch that its class is counted on
CLASSES_AT_ONCE = 8  # that are interpolated at a time, which bounds memory
RESAMPLED = 1000  # test sets drawn for an interval
PIXELS = 4  # side of the colors of a patch, as a feature to compare with

Encoder = Callable[[Tensor], Tensor]  # normalized images (B, C, H, W) to features (B, rows, columns, D)


def patch_features(backbone: Backbone) -> Encoder:
    """Return the function from images to the backbone's patch tokens.

    Raises:
        UsageError: The backbone has none.
    """
    rows, columns = backbone.grid
    if not rows * columns:
        raise UsageError(f"A {type(backbone.model).__name__} has no features of patches.")

    def encode(images: Tensor) -> Tensor:
        tokens = backbone.encode(images)[:, backbone.num_prefix :]  # (B, L, D)
        return tokens.reshape(len(images), rows, columns, -1)

    return encode


def patch_colors(grid: tuple[int, int]) -> Encoder:
    """Return the function from images to the colors of each patch, reduced to PIXELS by PIXELS."""

    def encode(images: Tensor) -> Tensor:
        small = F.adaptive_avg_pool2d(images, (PIXELS * grid[0], PIXELS * grid[1]))
        return F.pixel_unshuffle(small, PIXELS).permute(0, 2, 3, 1)  # (B, rows, columns, C * PIXELS ** 2)

    return encode


def patch_classes(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the class of most pixels of each patch (rows, columns); -1 where that is none.

    Args:
        mask: (h, w) int64, -1 where there is no class.
        grid: Rows and columns of patches.
    """
    sampled = mask[None, None].double()
    sampled = F.interpolate(sampled, (SAMPLES * grid[0], SAMPLES * grid[1]), mode="nearest-exact").long()[0, 0]
    values, places = sampled.unique(return_inverse=True)
    counts = F.avg_pool2d(F.one_hot(places, len(values)).permute(2, 0, 1)[None].float(), SAMPLES)[
        0
    ]  # (K, rows, columns)
    return values[counts.argmax(dim=0)]


def full_size(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the best class of each pixel (h, w) from scores (rows, columns, K) of patches, interpolated."""
    maps = scores.permute(2, 0, 1)[None]  # (1, K, rows, columns)
    best = torch.full(size, -torch.inf, device=maps.device)
    classes = torch.zeros(size, dtype=torch.int64, device=maps.device)
    for first in range(0, maps.shape[1], CLASSES_AT_ONCE):
        part = F.interpolate(maps[:, first : first + CLASSES_AT_ONCE], size, mode="bilinear", align_corners=False)
        highest, which = part[0].max(dim=0)
        better = highest > best
        best, classes = torch.where(better, highest, best), torch.where(better, which + first, classes)
    return classes


@dataclass(frozen=True, eq=False)
class Bank:
    """Features of training patches and what is learned from them.

    Attributes:
        features: (N, D).
        classes: (N,) int64 in 0..K-1.
        fitted: The linear classifier.
        number: K.
        k: Neighbors that vote.
    """

    features: Tensor
    classes: Tensor
    fitted: FittedProbe
    number: int
    k: int

    def knn_scores(self, features: Tensor) -> Tensor:
        """Return the shares of votes (..., K) for features (..., D)."""
        flat = features.flatten(0, -2)
        votes = torch.cat(
            [
                of_k[self.k]
                for of_k in knn_votes(self.features, self.classes, flat, ks=[self.k], num_classes=self.number)
            ]
        )
        return (votes / votes.sum(dim=1, keepdim=True)).reshape(*features.shape[:-1], self.number)

    def linear_scores(self, features: Tensor) -> Tensor:
        """Return the probabilities (..., K) for features (..., D)."""
        logits = probe_logits(self.fitted, features.flatten(0, -2))
        return logits.softmax(dim=1).reshape(*features.shape[:-1], self.number)


@dataclass(frozen=True, eq=False)
class Overlaps:
    """How predicted and true classes overlap in each of M images.

    Attributes:
        both: (M, K) pixels that have and get a class.
        either: (M, K) pixels that have or get it.
        true: (M, K) pixels that have it.
    """

    both: Tensor
    either: Tensor
    true: Tensor

    @staticmethod
    def of(predicted: Tensor, true: Tensor, number: int) -> "Overlaps":
        """Compare one image (h, w); -1 in `true` is left out."""
        known = true >= 0
        predicted, true = predicted[known].cpu(), true[known].cpu()
        both = torch.bincount(true[predicted == true], minlength=number)
        has, gets = torch.bincount(true, minlength=number), torch.bincount(predicted, minlength=number)
        return Overlaps(both[None], (has + gets - both)[None], has[None])

    @staticmethod
    def joined(parts: "list[Overlaps]") -> "Overlaps":
        """Return the overlaps of all images."""
        columns = ([part.both for part in parts], [part.either for part in parts], [part.true for part in parts])
        return Overlaps(*(torch.cat(column).double() for column in columns))

    def per_class(self) -> Tensor:
        """Return the intersection over union of each class (K,) in percent; NaN where no pixel has the class."""
        both, either, true = self.both.sum(0), self.either.sum(0), self.true.sum(0)
        return torch.where(true > 0, 100 * both / either.clamp(min=1), torch.nan)

    @property
    def miou(self) -> float:
        """The mean over the classes that test masks have, in percent."""
        return float(self.per_class().nanmean())

    @property
    def accuracy(self) -> float:
        """Pixels that get their class, in percent."""
        return float(100 * self.both.sum() / self.true.sum())

    def interval(self) -> tuple[float, float]:
        """Return the 95 % bootstrap interval of the mean, over test sets of so many images with a known pixel."""
        known = self.true.sum(1) > 0  # (M,)
        images = int(known.sum())
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(images, (RESAMPLED, images), generator=generator)
        weights = torch.zeros(RESAMPLED, images, dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        both, either, true = (weights @ one[known] for one in (self.both, self.either, self.true))  # (RESAMPLED, K)
        means = torch.where(true > 0, 100 * both / either.clamp(min=1), torch.nan).nanmean(dim=1)
        low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
        return float(low), float(high)
