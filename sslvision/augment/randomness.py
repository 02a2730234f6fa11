"""Random numbers as a pure function of (seed, epoch, image, purpose).

All crops, masks and colors are drawn from here, so they depend neither on the composition of a batch, nor on loader
processes, the number of training processes, or a resume. The generator is counter-based: the splitmix64 finalizer (Steele, Lea,
Flood 2014) of a key made from the four, on any device.
"""

import functools
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GOLDEN_GAMMA = -7046029254386353131  # 2^64 / golden ratio, odd, as a signed 64-bit integer

# Shifts, masks that make them logical, and factors. Tensors, because torch would convert Python numbers every time.
S30, M30, F30 = torch.tensor([30, (1 << 34) - 1, -4658895280553007687])
S27, M27, F27 = torch.tensor([27, (1 << 37) - 1, -7723592293110705685])
S31, M31 = torch.tensor([31, (1 << 33) - 1])


def mix(x: Tensor) -> Tensor:
    """Return the splitmix64 finalizer of every int64 in `x`: wrapping products, logical shifts."""
    x = (x ^ ((x >> S30) & M30)) * F30
    x = (x ^ ((x >> S27) & M27)) * F27
    return x ^ ((x >> S31) & M31)


@dataclass(frozen=True)
class ImageRandom:
    """The source of random numbers for a batch of images.

    Attributes:
        seed: Seed of the run.
        epoch: (B,) int64 epoch that each image is drawn in.
        index: (B,) int64 index of each image in the data set.
    """

    seed: int
    epoch: Tensor
    index: Tensor

    @functools.cached_property
    def _images(self) -> Tensor:
        """Return (B,) keys of images and epochs."""
        return mix(mix(self.index + _scalar(self.seed)) + self.epoch)

    def uniform(self, purpose: str, n: int) -> Tensor:
        """Return (B, n) numbers in [0, 1), independent between images, epochs and purposes ("mask", "crop 0", ...)."""
        return self.uniforms([purpose], n)[0]

    def uniforms(self, purposes: Sequence[str], n: int) -> Tensor:
        """Return the numbers (V, B, n) of V purposes at once."""
        codes, counter = _codes(tuple(purposes), self.index.device), _counter(n, self.index.device)
        key = mix(self._images + codes)  # (V, B)
        bits = mix(key[:, :, None] + counter) >> 40  # (V, B, n), the 24 highest, sign extended
        return (bits & 0xFFFFFF).float() / (1 << 24)


def permutation(n: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order of `n` images in an epoch, (n,) int64."""
    keys = mix(mix(torch.arange(n) + _scalar(seed)) + epoch)
    return torch.argsort(keys, stable=True)


def derive_seed(seed: int, *index: int) -> int:
    """Return a seed from 0 to 2^63 - 1 for a generator, as a function of the run's seed and some indices."""
    digest = hashlib.blake2b(repr((seed, *index)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


# Constants are copied to the device once: a copy synchronizes.


@functools.cache
def _codes(purposes: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([[zlib.crc32(purpose.encode())] for purpose in purposes], device=device)  # (V, 1)


@functools.cache
def _counter(n: int, device: torch.device) -> Tensor:
    return torch.arange(1, n + 1, device=device) * GOLDEN_GAMMA  # (n,)


@functools.cache  # a run has one seed, which every draw needs
def _scalar(seed: int) -> int:
    """Return a seed spread over 64 bits, so that neighboring seeds do not share keys of images."""
    return int(mix(torch.tensor(seed * 2 + 1)))
