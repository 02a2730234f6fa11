"""Where features are compared and probes are solved: on the GPU that computed them, if it has room."""

import torch


def place_for(device: torch.device, needed: int) -> torch.device:
    """Return a CUDA device on which `needed` bytes are free, and the CPU for any other: MPS has no float64."""
    return device if device.type == "cuda" and free_bytes(device) >= needed else torch.device("cpu")


def free_bytes(device: torch.device) -> int:
    """Return what a CUDA device has left, after torch has given back what it holds there and does not use."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
