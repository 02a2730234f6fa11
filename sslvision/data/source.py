"""What the rest of the package knows of data: a source of images in a fixed order, and its splits."""

from typing import NamedTuple, Protocol

from torch import Tensor

from sslvision.errors import DataError


class UnreadableImage(Exception):
    """One image that cannot be decoded; the loader counts it, names it and goes on."""


class SourceGone(DataError):
    """No image can be read any more: their folder is gone, as when a disk is unmounted. Ends whatever reads."""

    def __init__(self, message: str):
        # A loader's worker hands on its whole traceback as the message, with ours at the end.
        super().__init__(message.rpartition(f"{SourceGone.__name__}: ")[2].strip())


class Source(Protocol):
    """Images in a fixed order, each an 8-bit array.

    `images` is the whole set as one tensor when all images have one size and fit in memory (crops are then cut in one
    batched operation on the training device), and None otherwise (crops are then cut by the loader's workers).
    """

    name: str  # what tables and messages call it
    channels: int
    classes: tuple[str, ...] | None
    labels: Tensor | None  # (N,) int64; None when the images have no labels
    images: Tensor | None  # (N, C, H, W) uint8

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Return image `index` as (C, H, W) uint8. Raises UnreadableImage with the reason in words, or SourceGone."""
        ...

    def describe(self, index: int) -> str:
        """Return what a person would call image `index`: its path, or its place in the set."""
        ...


class Splits(NamedTuple):
    """The images to train on, those that scores are measured on, and those that choices are made by (None: there are none)."""

    train: Source
    test: Source | None
    validation: Source | None = None
