"""A teacher that follows its student."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every parameter of the teacher to `momentum` x itself + (1 - momentum) x the student's; copy persistent buffers.

    But not a batch norm's: its running statistics are of the teacher's own activations, see `batch_statistics`.
    Buffers that are not persistent are constants.
    Source: DINO, section 3.1, "Teacher network".
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    for own, others in zip(teacher.modules(), student.modules(), strict=True):
        if not isinstance(own, _BatchNorm):
            for (name, buffer), other in zip(own._buffers.items(), others._buffers.values(), strict=True):
                if buffer is not None and other is not None and name not in own._non_persistent_buffers_set:
                    buffer.copy_(other)


@contextmanager
def batch_statistics(teacher: nn.Module) -> Iterator[None]:
    """Let a network in eval mode normalize by its batch where it has batch norms, and keep running statistics of it.

    The authors' teacher does so, being in train mode. The student's statistics would be those of other weights and, with
    multi-crop, of other crops.
    """
    norms = [module for module in teacher.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        for norm in norms:
            norm.eval()
