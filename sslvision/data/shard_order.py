"""The order of images in shards: a few shards at a time, so that each is read once in an epoch.

An epoch is a permutation of the shards, a function of (seed, epoch). It is cut into windows of some shards, and the images of a
window are permuted. So the order is a function of (seed, epoch), for any number of processes, and can be begun anywhere.
"""

import functools
from typing import NamedTuple

import numpy as np

from sslvision.augment.randomness import derive_seed, permutation

SHARDS = 0x5A  # tells the order of the shards from that of the images of a window


class Groups(NamedTuple):
    """How the images of a source lie in shards.

    Attributes:
        bounds: (S + 1,) int64; shard s has the images from bounds[s] up to bounds[s + 1].
        window: Shards whose images are mixed.
    """

    bounds: np.ndarray
    window: int

    def take(self, indices: np.ndarray) -> "Groups | None":
        """Return how some of the images lie, by ascending indices (M,); None if they are not ascending."""
        if len(indices) > 1 and not (np.diff(indices) > 0).all():
            return None
        return Groups(np.searchsorted(indices, self.bounds).astype(np.int64), self.window)


class ShardOrder:
    """The order of the images of an epoch.

    Args:
        groups: How they lie in shards.
        seed: Seed of the run.
        epoch: The epoch.
    """

    def __init__(self, groups: Groups, *, seed: int, epoch: int):
        self.groups, self.seed, self.epoch = groups, seed, epoch
        sizes = np.diff(groups.bounds)
        shards = permutation(len(sizes), seed=_seed(seed), epoch=epoch).numpy()
        self.shards = shards[sizes[shards] > 0]  # in the order in which they are read
        ends = np.cumsum(sizes[self.shards])
        last = [*range(groups.window - 1, len(ends) - 1, groups.window), len(ends) - 1] if len(ends) else []
        self.ends = ends[last]  # of the windows, as positions in the order
        self._window = functools.lru_cache(maxsize=2)(self._images_of)

    def __len__(self) -> int:
        return int(self.groups.bounds[-1])

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return the images at some positions, (M,) int64."""
        chosen = range(len(self))[positions]
        if not len(chosen):
            return np.empty(0, np.int64)
        first, last = (int(np.searchsorted(self.ends, place, side="right")) for place in (chosen[0], chosen[-1]))
        start = int(self.ends[first - 1]) if first else 0
        images = np.concatenate([self._window(number) for number in range(first, last + 1)])
        return images[chosen[0] - start : chosen[-1] - start + 1 : chosen.step]

    def shards_of(self, window: int) -> np.ndarray:
        """Return the shards of a window."""
        return self.shards[window * self.groups.window : (window + 1) * self.groups.window]

    def window_of(self, image: int) -> int:
        """Return the window that an image is in."""
        shard = int(np.searchsorted(self.groups.bounds, image, side="right")) - 1
        return int(np.flatnonzero(self.shards == shard)[0]) // self.groups.window

    def _images_of(self, window: int) -> np.ndarray:
        bounds = self.groups.bounds
        images = np.concatenate([np.arange(bounds[shard], bounds[shard + 1]) for shard in self.shards_of(window)])
        return images[permutation(len(images), seed=_seed(self.seed, window), epoch=self.epoch).numpy()]


def _seed(seed: int, *window: int) -> int:
    """Return a seed for `permutation`, which takes those below 2^62."""
    return derive_seed(seed, SHARDS, *window) >> 2


def shards_ahead(groups: Groups, image: int, *, seed: int, epoch: int) -> list[int]:
    """Return the shards to have at hand when an image of an epoch is read: those of its window, then those of the next one."""
    order = _order(groups.bounds.tobytes(), groups.window, seed, epoch)
    window = order.window_of(image)
    if window + 1 < len(order.ends):
        following = order.shards_of(window + 1)
    else:
        following = _order(groups.bounds.tobytes(), groups.window, seed, epoch + 1).shards_of(0)
    found = dict.fromkeys([*order.shards_of(window).tolist(), *following.tolist()])
    return list(found)


@functools.lru_cache(maxsize=4)
def _order(bounds: bytes, window: int, seed: int, epoch: int) -> ShardOrder:
    return ShardOrder(Groups(np.frombuffer(bounds, np.int64), window), seed=seed, epoch=epoch)
