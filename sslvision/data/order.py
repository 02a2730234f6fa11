"""The order of the images of an epoch: a permutation that is computed where it is looked at, and nowhere held.

Few images are ordered by sorting a random number of each. Of many, the image at a position is computed from the position: a
Feistel network (Luby and Rackoff 1988) permutes the numbers of as many bits as the number of images needs, and a result beyond
the images is permuted again until it is one of them (cycle walking: Black and Rogaway 2002), which takes fewer than two turns
on average. So a billion images can be begun at any update, at once and without memory.

    position -> (left, right) bits -> left ^= F1(right), right ^= F2(left), left ^= F3(right), ... -> image
"""

import functools

import numpy as np

from sslvision.augment.randomness import GOLDEN_GAMMA, derive_seed, permutation

SORTED = 1 << 16  # images up to which they are sorted: a network of few bits would not reach all orders alike
VERSION = 2  # in checkpoints; before 2, any number of images was sorted
ROUNDS = 8
AT_ONCE = 1 << 14  # positions computed together, so that they stay in the cache of a core


class Order:
    """The order of `n` images, a function of (n, seed, epoch).

    Args:
        n: Number of images, up to 2^62.
        seed: Seed of the run.
        epoch: Epoch, or any number that tells one order from another.
    """

    def __init__(self, n: int, *, seed: int, epoch: int):
        self.n = n
        self.sorted = permutation(n, seed=seed, epoch=epoch).numpy() if n <= SORTED else None
        bits = max(2, (n - 1).bit_length())
        self.bits = (bits // 2, bits - bits // 2)  # of the left half, which is the higher one, and of the right half
        self.keys = _round_keys(seed, epoch)  # (ROUNDS,) uint64

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, positions: slice) -> np.ndarray:
        """Return the images at some positions, (M,) int64."""
        if self.sorted is not None:
            return self.sorted[positions]
        chosen = range(self.n)[positions]
        images = np.arange(chosen.start, chosen.stop, chosen.step, dtype=np.int64)
        for start in range(0, len(images), AT_ONCE):
            images[start : start + AT_ONCE] = self._walk(images[start : start + AT_ONCE].astype(np.uint64))
        return images

    def _walk(self, positions: np.ndarray) -> np.ndarray:
        """Permute positions (M,) uint64 until all are images."""
        images = self._permute(positions)
        beyond = np.flatnonzero(images >= self.n)
        while len(beyond):
            again = self._permute(images[beyond])
            images[beyond] = again
            beyond = beyond[again >= self.n]
        return images

    def _permute(self, numbers: np.ndarray) -> np.ndarray:
        """Return the Feistel network of numbers (M,) uint64 of as many bits as both halves have."""
        left_bits, right_bits = (np.uint64(bits) for bits in self.bits)
        left, right = numbers >> right_bits, numbers & ((np.uint64(1) << right_bits) - np.uint64(1))
        for one, other in zip(self.keys[::2], self.keys[1::2], strict=True):
            left ^= _top_bits(right, one, left_bits)
            right ^= _top_bits(left, other, right_bits)
        return (left << right_bits) | right


# The round function: two steps of the splitmix64 finalizer on a half and the key of the round.
FACTORS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=np.uint64)
SHIFT = np.uint64(32)


def _top_bits(half: np.ndarray, key: np.uint64, bits: np.uint64) -> np.ndarray:
    """Return that many random bits for each number of a half (M,)."""
    mixed = half ^ key
    mixed *= FACTORS[0]
    mixed ^= mixed >> SHIFT
    mixed *= FACTORS[1]
    mixed >>= np.uint64(64) - bits
    return mixed


@functools.lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> np.ndarray:
    base = derive_seed(seed, epoch)
    counters = np.arange(1, ROUNDS + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA % (1 << 64))
    mixed = np.uint64(base) ^ counters
    for shift, factor in zip((30, 27), FACTORS, strict=True):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * factor
    return mixed ^ (mixed >> np.uint64(31))
