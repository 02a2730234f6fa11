"""The type in which tokens go from block to block."""

import torch
from torch import Tensor


def residual_stream(tokens: Tensor) -> Tensor:
    """Return tokens in the type of the autocast on CUDA, where bytes are what blocks wait for; elsewhere as they are.

    Positions in fp32 would have every sum of a block, and its gradient, read and written in fp32. Norms compute in fp32 anyway.
    """
    if tokens.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return tokens.to(torch.get_autocast_dtype("cuda"))
    return tokens
