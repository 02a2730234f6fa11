"""A teacher that follows its student."""

import torch
from torch import nn


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move every parameter of the teacher to `momentum` x itself + (1 - momentum) x the student's; copy buffers.

    Source: DINO, section 3.1, "Teacher network".
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
    for own, others in zip(teacher.buffers(), student.buffers(), strict=True):
        own.copy_(others)
