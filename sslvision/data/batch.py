"""What travels from the loader to a method."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One process's share of a batch of B images.

    Attributes:
        crops: uint8 crops (B, C, S, S), one tensor for each of the method's crops.
        indices: (B,) int64, the place in the data set of each image asked for: the key of its randomness.
        epoch: (B,) int64.
        unreadable: images that could not be decoded, (place, reason); others stand in for them.
        shown: (B,) int64, the place of each image that is in the crops, a stand-in's where there is one: the key of its
            label.
    """

    crops: list[Tensor]
    indices: Tensor
    epoch: Tensor
    unreadable: list[tuple[int, str]]
    shown: Tensor
