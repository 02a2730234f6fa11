"""The packed attention kernels, run by Triton's interpreter where there is no GPU."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from sslvision.backbones.build import build_backbone
from sslvision.nn.packed_attention import PackedAttention, can_pack, use_packed_attention

SCRIPT = """
import torch
from torch.nn import functional as F
from sslvision.nn.packed_attention import run_backward, run_forward

torch.manual_seed(0)
for sizes, heads, d in (([2, 5, 3, 37], 2, 32), ([1, 50], 3, 64), ([1, 197], 1, 64), ([1, 70], 2, 32)):
    images = list(zip(sizes[::2], sizes[1::2]))
    qkv = torch.randn(sum(B * N for B, N in images), 3 * heads * d)
    exact, parts, start = qkv.double().requires_grad_(), [], 0
    for B, N in images:
        q, k, v = exact[start : start + B * N].view(B, N, 3, heads, d).permute(2, 0, 3, 1, 4).unbind()
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
        start += B * N
    right = torch.cat(parts)
    gradient = torch.randn(right.shape)
    right.backward(gradient.double())
    found, log_sums = run_forward(qkv, sizes, heads, d**-0.5, lambda kernel: kernel)
    grad_qkv = run_backward(qkv, found, log_sums, gradient, sizes, heads, d**-0.5, lambda kernel: kernel)
    torch.testing.assert_close(found.double(), right.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad_qkv.double(), exact.grad, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.e2e
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which comes with torch for CUDA")
def test_the_kernels_compute_attention_of_every_image_and_its_gradients():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_attention_suited_to_cuda_computes_the_same_on_a_cpu_and_keeps_its_names():
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, depth=2).eval()
    images, names = torch.randn(2, 3, 32, 32), [*backbone.state_dict()]
    right = backbone(images)
    use_packed_attention(backbone)
    assert all(type(block.attn) is PackedAttention for block in backbone.model.blocks)
    assert torch.equal(backbone(images), right)
    assert [*backbone.state_dict()] == names
    attention = backbone.model.blocks[0].attn
    assert not can_pack(attention, torch.zeros(34, 576), ((2, 17),)), "not on a CPU"
