"""The type in which pixels and tokens wait for the next layer."""

import torch
from torch import Tensor


def in_compute_type(x: Tensor) -> Tensor:
    """Return x in the type of the autocast on CUDA, where bytes are what layers wait for; elsewhere as it is.

    Positions in fp32 would have every residual sum, and its gradient, read and written in fp32. Norms compute in fp32 anyway.
    """
    return (
        x.to(torch.get_autocast_dtype("cuda")) if x.device.type == "cuda" and torch.is_autocast_enabled("cuda") else x
    )
