"""Shared memory for the crops of batches, which a worker process of the loader reuses once a batch has been released.

Fresh shared memory has to be allocated, zeroed and mapped page by page, both in the process that writes and in the one that
reads. One loader process reading from a cache (benchmarks/loader.py) takes 1.2 times as long per DINO batch (10 crops)
without reuse, and 1.1 times per MAE batch.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

HEADER = 64  # bytes before the crops; the first is 1 while the batch is in use
MAX_BUFFERS = 8  # buffers kept, more than a loader prefetches; further batches get fresh memory

Shape = tuple[int, int, int, int]  # (B, C, H, W); in memory (B, H, W, C), as images are cropped


class BufferPool:
    """The buffers of one worker process."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, shapes: list[Shape]) -> list[Tensor]:
        """Return uint8 tensors of these shapes, to be filled with crops; in a worker process they are in shared memory."""
        needed = HEADER + sum(map(math.prod, shapes))
        if get_worker_info() is None:
            return _crops_in(torch.empty(needed, dtype=torch.uint8), shapes)
        memory = next((kept for kept in self._kept if not kept[0] and len(kept) >= needed), None)
        if memory is None:
            memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(needed))
            self._kept = [kept for kept in self._kept if kept[0] or len(kept) >= needed]
            if len(self._kept) < MAX_BUFFERS:
                self._kept.append(memory)
        memory[0] = 1
        return SharedCrops(memory, shapes)


class SharedCrops(list[Tensor]):
    """Crops in shared memory, which are sent to another process as one buffer."""

    def __init__(self, memory: Tensor, shapes: list[Shape]):
        super().__init__(_crops_in(memory, shapes))
        self._memory, self._shapes = memory, shapes

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how the other process rebuilds them."""
        return _received, (self._memory, self._shapes)


def _received(memory: Tensor, shapes: list[Shape]) -> list[Tensor]:
    """Return the crops in the receiving process. When the last of them is deleted, the buffer is marked as free."""
    lease = memory.numpy().data  # referenced by each of the crops
    weakref.finalize(lease, memory.numpy()[:1].fill, 0).atexit = False
    return _crops_in(torch.frombuffer(lease, dtype=torch.uint8), shapes)


def _crops_in(memory: Tensor, shapes: list[Shape]) -> list[Tensor]:
    crops, start = [], HEADER
    for B, C, H, W in shapes:
        end = start + B * C * H * W
        crops.append(memory[start:end].view(B, H, W, C).permute(0, 3, 1, 2))  # (B, C, H, W)
        start = end
    return crops
