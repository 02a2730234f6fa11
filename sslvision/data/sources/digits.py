"""Handwritten digits: a small labeled set in the package, for transfer without a download.

1,797 gray images of 8 x 8 pixels in ten classes, each pixel a count from 0 to 16; here scaled to 0..255 and enlarged.
Of each class the first two thirds are for training and the rest for testing, in the file's order, unshuffled.

Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998, CC BY 4.0, in the copy
of scikit-learn (see NOTICE in this folder). `scripts/make_digits.py` made the file.
"""

from pathlib import Path

import numpy as np
import torch

from sslvision.augment.crops import resize
from sslvision.data.source import Splits
from sslvision.data.sources.embedded import MemorySource
from sslvision.errors import UsageError

FILE = Path(__file__).with_name("digits.npz")
CLASSES = tuple("0123456789")
SMALLEST = 8  # pixels, the side of the images in the file


def open_digits(*, channels: int = 1, size: int = 32) -> Splits:
    """Return the digits, (N, 1, size, size) uint8, with labels in 0..9; `channels=3` repeats the gray.

    Raises UsageError for any other number of channels, or a size below that of the images in the file.
    """
    if channels not in (1, 3):
        raise UsageError(f"The digits are gray: data.channels must be 1, or 3 to repeat it, not {channels}.")
    if size < SMALLEST:
        raise UsageError(f"The digits are {SMALLEST} pixels wide: data.size must be at least that, not {size}.")
    with np.load(FILE, allow_pickle=False) as arrays:
        counts = torch.from_numpy(arrays["images"])  # (N, 8, 8)
        labels = torch.from_numpy(arrays["labels"]).long()
    images = resize((counts * (255 / 16)).round().byte(), (size, size))  # (N, size, size)
    images = images[:, None].repeat(1, channels, 1, 1)  # (N, C, size, size)
    is_train = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(CLASSES)):
        (indices,) = torch.where(labels == label)
        is_train[indices[: round(len(indices) * 2 / 3)]] = True
    name = f"digits ({int(is_train.sum()):,} + {int((~is_train).sum()):,})"
    train, test = (
        MemorySource(name, channels, CLASSES, labels[chosen], images[chosen], split)
        for chosen, split in ((is_train, "train"), (~is_train, "test"))
    )
    return Splits(train, test)
