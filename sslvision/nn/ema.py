"""Exponential moving average of weights: a teacher that follows its student."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslvision.nn.shards import local_shards


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Set every parameter of the teacher to momentum * teacher + (1 - momentum) * student, and copy persistent buffers.

    The running statistics of batch norms are not copied: the teacher has its own, see `batch_statistics`. Non-persistent
    buffers are constants. Parameters may be in shards, those of both networks in the same ones. Source: DINO, section 3.1,
    "Teacher network".
    """
    torch._foreach_lerp_(local_shards(teacher.parameters()), local_shards(student.parameters()), 1 - momentum)
    for own, others in zip(teacher.modules(), student.modules(), strict=True):
        if not isinstance(own, _BatchNorm):
            for (name, buffer), other in zip(own._buffers.items(), others._buffers.values(), strict=True):
                if buffer is not None and other is not None and name not in own._non_persistent_buffers_set:
                    buffer.copy_(other)


@contextmanager
def batch_statistics(teacher: nn.Module) -> Iterator[None]:
    """Let the batch norms of a teacher in eval mode use batch statistics and update their running statistics.

    The authors' teacher is in train mode and does so. The student's statistics belong to other weights and, with multi-crop,
    to other crops.
    """
    norms = [module for module in teacher.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()
