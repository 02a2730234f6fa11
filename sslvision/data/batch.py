"""A batch, as the loader passes it to a method."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One process's share of a batch: B images.

    Attributes:
        crops: One uint8 tensor (B, C, S, S) for each crop of the method.
        indices: (B,) int64, data set index of each requested image, which its random numbers depend on.
        epoch: (B,) int64.
        unreadable: (index, reason) of images that could not be decoded and were replaced by others.
        shown: (B,) int64, data set index of each image in the crops, which its label belongs to. Differs from `indices` for
            replaced images.
    """

    crops: list[Tensor]
    indices: Tensor
    epoch: Tensor
    unreadable: list[tuple[int, str]]
    shown: Tensor
