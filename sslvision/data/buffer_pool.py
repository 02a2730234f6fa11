"""Shared memory for the crops of a batch, which a loader's process uses again once the batch has been let go.

Every fresh piece of shared memory has to be found, cleared and mapped page by page, in the process that writes and in the
one that reads: for DINO's ten crops of 64 images that is a tenth of the time of making them.
"""

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

LENT = 64  # bytes before the crops; the first is 1 while anybody has the batch
MOST = 8  # pieces kept, more than a loader makes ahead; whoever keeps all batches gets fresh ones

Shape = tuple[int, int, int, int]  # (B, C, S, S); in memory (B, S, S, C), as crops are cut


class BufferPool:
    """A loader's process's memory for batches."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def take(self, shapes: list[Shape]) -> list[Tensor]:
        """Return room for crops of these shapes, uint8; in a loader's process, shared with the one it hands them to."""
        needed = LENT + sum(map(math.prod, shapes))
        if get_worker_info() is None:
            return _crops_in(torch.empty(needed, dtype=torch.uint8), shapes)
        memory = next((kept for kept in self._kept if not kept[0] and len(kept) >= needed), None)
        if memory is None:
            memory = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(needed))
            self._kept = [kept for kept in self._kept if kept[0] or len(kept) >= needed]
            if len(self._kept) < MOST:
                self._kept.append(memory)
        memory[0] = 1
        return SharedCrops(memory, shapes)


class SharedCrops(list[Tensor]):
    """Crops in shared memory, which travel to another process as one piece."""

    def __init__(self, memory: Tensor, shapes: list[Shape]):
        super().__init__(_crops_in(memory, shapes))
        self._memory, self._shapes = memory, shapes

    def __reduce__(self) -> tuple[Any, ...]:
        """Say how the other process finds them."""
        return _received, (self._memory, self._shapes)


def _received(memory: Tensor, shapes: list[Shape]) -> list[Tensor]:
    """Return the crops, in the process they went to. When the last of them is gone, the memory is free."""
    lease = memory.numpy().data  # held by each of the crops
    weakref.finalize(lease, memory.numpy()[:1].fill, 0).atexit = False
    return _crops_in(torch.frombuffer(lease, dtype=torch.uint8), shapes)


def _crops_in(memory: Tensor, shapes: list[Shape]) -> list[Tensor]:
    crops, start = [], LENT
    for B, C, S, _ in shapes:
        end = start + B * C * S * S
        crops.append(memory[start:end].view(B, S, S, C).permute(0, 3, 1, 2))  # (B, C, S, S)
        start = end
    return crops
