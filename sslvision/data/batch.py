"""What travels from the loader to a method."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One process's share of a batch of B images.

    Attributes:
        crops: uint8 crops (B, C, S, S), one tensor for each of the method's crops.
        places: (B,) int64, each image's place in the data set.
        epoch: (B,) int64.
        unreadable: images that could not be decoded, (place, reason); others stand in for them.
    """

    crops: list[Tensor]
    places: Tensor
    epoch: Tensor
    unreadable: list[tuple[int, str]]
