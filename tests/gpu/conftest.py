"""Tests that need a CUDA device: `pytest -m gpu`. Any other run of the tests hides GPUs: see pytest_configure."""

import pytest
import torch

from sslvision.training.trainer import configure_torch


@pytest.fixture(autouse=True)
def cuda():
    """Choose kernels as a run on a GPU does, and leave the settings as they were. Return the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and is run by: pytest -m gpu")
    fused, precision, convolutions = fused_attention(), torch.get_float32_matmul_precision(), torch.backends.cudnn
    tf32 = convolutions.allow_tf32
    configure_torch("gpu")
    yield torch.device("cuda")
    fused_attention(fused)
    torch.set_float32_matmul_precision(precision)
    convolutions.allow_tf32 = tf32


def fused_attention(wanted=None):
    from timm.layers import set_fused_attn, use_fused_attn

    if wanted is not None:
        set_fused_attn(wanted)
    return use_fused_attn()


@pytest.fixture
def compiling():
    """Leave nothing of what was compiled before, or for later tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
