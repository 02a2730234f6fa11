"""The dtype of activations between layers under autocast."""

import torch
from torch import Tensor


def to_autocast_dtype(x: Tensor) -> Tensor:
    """Return x in the dtype of autocast on CUDA, where layers are limited by memory traffic; elsewhere as it is.

    Position embeddings in fp32 would otherwise make every residual sum, and its gradient, fp32. Norms compute in fp32 anyway.
    """
    if x.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
        return x.to(torch.get_autocast_dtype("cuda"))
    return x
