"""Subsets of a labeled source: a few images per class, or a held-out part for validation.

All draws depend only on (labels, seed).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslvision.augment.randomness import permutation
from sslvision.data.source import Source
from sslvision.errors import DataError, UsageError


class Subset:
    """A source of some of the images of another one.

    Args:
        source: Source of the images.
        indices: (M,) int64, indices of the images, in the order of the subset.
    """

    def __init__(self, source: Source, indices: Tensor):
        self.source, self.indices = source, indices
        self.name, self.channels, self.classes = source.name, source.channels, source.classes
        self.version = getattr(source, "version", "")  # see EncodedSource
        self.labels = None if source.labels is None else source.labels[indices]  # (M,)
        groups = getattr(source, "groups", None)  # see ArchiveSource
        self.groups = None if groups is None else groups.take(indices.numpy())
        self.images = None if source.images is None else source.images[indices]  # (M, C, H, W), a copy

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        """Return image `index` of the subset as (C, H, W) uint8; raises what the source raises."""
        return self.source.read(int(self.indices[index]))

    def prefetch(self, shards: Sequence[int]) -> None:
        """Have the source fetch shards that are needed soon."""
        if (prefetch := getattr(self.source, "prefetch", None)) is not None:
            prefetch(shards)

    def describe(self, index: int) -> str:
        """Return the source's name of image `index` of the subset."""
        return self.source.describe(int(self.indices[index]))


def draw_per_class(
    labels: Tensor, per_class: int | None, *, seed: int, classes: tuple[str, ...] | None = None
) -> Tensor:
    """Draw the same number of images from every class that has any.

    Args:
        labels: (N,) int64.
        per_class: Images per class; None selects all. With the same seed, a smaller draw is a subset of a larger one.
        seed: Seed of the draw.
        classes: Names of the labels, for the error message.

    Returns:
        Indices (M,) int64, ascending.

    Raises:
        UsageError: `per_class` is less than one.
        DataError: A class has fewer images.
    """
    if per_class is None:
        return torch.arange(len(labels))
    if per_class < 1:
        raise UsageError(f"There must be at least one image per class, not {per_class}.")
    sizes = labels.bincount()
    label = int(torch.where(sizes > 0, sizes, len(labels) + 1).argmin())  # the rarest class
    if sizes[label] < per_class:
        name = classes[label] if classes else label
        raise DataError(
            f"Class {name} has only {int(sizes[label])} image(s), and {per_class} of each class were asked for: ask for "
            "fewer, or add images."
        )
    return draw_up_to(labels, per_class, seed=seed)


def draw_up_to(labels: Tensor, per_class: int | None, *, seed: int) -> Tensor:
    """Return the same for classes of any size: all images of those that have fewer."""
    if per_class is None:
        return torch.arange(len(labels))
    order = permutation(len(labels), seed=seed, epoch=0)
    return order[_rank_in_class(labels[order]) < per_class].sort().values


def split_off(source: Source, *, fraction: float, at_most: int | None = None, seed: int) -> tuple[Subset, Subset]:
    """Divide a labeled source into the rest and a held-out part, each in the source's order.

    Args:
        source: Source with labels.
        fraction: Fraction of every class to hold out: at least one image, but never the only one.
        at_most: Maximum number of held-out images; all classes are reduced in proportion.
        seed: Seed of the draw.

    Raises:
        UsageError: A value is out of range.
        DataError: The source has no labels, or no class with two images.
    """
    if not 0 < fraction < 1 or (at_most is not None and at_most < 1):
        raise UsageError(
            f"Images are held out by a fraction between 0 and 1, and at least one of them: {fraction=}, {at_most=}."
        )
    labels = source.labels
    if labels is None:
        raise DataError(f"{source.name} has no labels (class folders), so images cannot be held out class by class.")
    if not len(labels) or labels.bincount().max() < 2:
        raise DataError(f"No class of {source.name} has two images, one to hold out and one to keep: add images.")
    held = stratified_holdout(labels, fraction=fraction, seed=seed)  # (N,) bool
    indices = held.nonzero()[:, 0]
    if at_most is not None and len(indices) > at_most:
        shuffled = indices[permutation(len(indices), seed=seed, epoch=0)]
        of = labels[shuffled]
        share = (_rank_in_class(of) + 0.5) / of.bincount()[of]  # fraction of its class before an image
        indices = shuffled[share.argsort(stable=True)[:at_most]].sort().values
        held = torch.zeros_like(held).index_fill(0, indices, True)
    return Subset(source, (~held).nonzero()[:, 0]), Subset(source, indices)


def _rank_in_class(labels: Tensor) -> Tensor:
    """Return (N,) int64, the number of equal labels before each."""
    order = labels.argsort(stable=True)
    sizes = labels.bincount()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[order]]
    return rank


def stratified_holdout(labels: Tensor, *, fraction: float, seed: int) -> Tensor:
    """Return (N,) bool, True for held-out images: `fraction` of every class, at least one, but never its only one."""
    N = len(labels)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    order = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled within
    sizes = labels.bincount()
    place = torch.arange(N, device=labels.device) - (sizes.cumsum(0) - sizes)[labels[order]]  # rank within the class
    quota = torch.minimum((sizes * fraction).round().clamp(min=1), sizes - 1)
    held = torch.zeros(N, dtype=torch.bool, device=labels.device)
    held[order] = place < quota[labels[order]]
    if not held.any():
        raise DataError("The linear probe holds images out to choose its L2 strength: some class needs two images.")
    return held
