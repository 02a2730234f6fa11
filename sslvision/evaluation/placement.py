"""The device on which features are compared and probes are fitted: the GPU that computed them, if its memory suffices."""

import torch


def place_for(device: torch.device, needed: int) -> torch.device:
    """Return `device` if it is a CUDA device with `needed` bytes free, else the CPU (MPS has no float64)."""
    return device if device.type == "cuda" and free_bytes(device) >= needed else torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of a CUDA device, after emptying torch's cache."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
