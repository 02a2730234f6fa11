"""The data set in the package: a class-balanced part of Fashion-MNIST, so that a first run needs no download.

10,000 training and 2,000 test images: the first 1,000 and 200 of each class, in the authors' order. Gray, 28 x 28,
padded with zeros to 32 x 32. Fashion-MNIST is copyright 2017 Zalando SE, MIT license (see NOTICE in this folder).
`scripts/make_embedded_data.py` made the file. Xiao, Rasul, Vollgraf, "Fashion-MNIST", 2017, arXiv:1708.07747.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from sslvision.data.source import Splits
from sslvision.errors import UsageError

FILE = Path(__file__).with_name("fashion_mnist.npz")
CLASSES = (
    "T-shirt/top",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)


@dataclass(eq=False)
class MemorySource:
    """A source whose images are one tensor, (N, C, H, W) uint8."""

    name: str
    channels: int
    classes: tuple[str, ...] | None
    labels: Tensor | None
    images: Tensor | None  # the contract's type; never None here
    split: str  # "train" or "test", for `describe`

    def __len__(self) -> int:
        assert self.images is not None
        return len(self.images)

    def read(self, index: int) -> Tensor:
        assert self.images is not None
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"{self.name}, {self.split} image {index}"


def open_embedded(*, channels: int = 1) -> Splits:
    """Return the embedded images, (N, 1, 32, 32) uint8, with labels in 0..9; `channels=3` repeats the gray.

    Raises UsageError for any other number of channels.
    """
    if channels not in (1, 3):
        raise UsageError(f"The embedded images are gray: data.channels must be 1, or 3 to repeat it, not {channels}.")
    with np.load(FILE, allow_pickle=False) as arrays:
        train, test = (_source(arrays, split, channels) for split in ("train", "test"))
    return Splits(train, test)


def _source(arrays: np.lib.npyio.NpzFile, split: str, channels: int) -> MemorySource:
    images = torch.from_numpy(arrays[f"{split}_images"])[:, None]  # (N, 1, 28, 28)
    images = pad(images, (2, 2, 2, 2)).repeat(1, channels, 1, 1)  # (N, C, 32, 32)
    labels = torch.from_numpy(arrays[f"{split}_labels"]).long()
    return MemorySource("embedded (Fashion-MNIST, 10,000 + 2,000)", channels, CLASSES, labels, images, split)
