"""The packed attention kernels against attention in fp32, on CUDA and as torch.compile runs them."""

import pytest
import torch
from torch.nn import functional as F

from sslvision.nn.packed_attention import packed_attention

# What inductor warns of is not ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("compiling")]

# B images, N tokens of each, H heads, d width of a head


def in_fp32(qkv, sizes, heads):
    """Return attention of queries, keys and values (T, 3 * H * d), each image by itself."""
    parts, start = [], 0
    for B, N in zip(sizes[::2], sizes[1::2], strict=True):
        q, k, v = qkv[start : start + B * N].float().view(B, N, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind()
        parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
        start += B * N
    return torch.cat(parts)


def distance(one, other):
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("sizes", "heads", "d"),
    [
        ([3, 5], 2, 32),
        ([4, 16, 3, 17], 3, 64),
        ([2, 197, 8, 37], 6, 64),
        ([4, 197], 16, 32),
        ([5, 50], 12, 64),
        ([2, 64, 2, 65, 1, 256], 2, 64),
        ([2, 128, 2, 256], 2, 32),
    ],
)
def test_outputs_and_gradients_are_those_of_fp32_but_for_rounding(cuda, sizes, heads, d, dtype):
    torch.manual_seed(0)
    rows = sum(B * N for B, N in zip(sizes[::2], sizes[1::2], strict=True))
    qkv = torch.randn(rows, 3 * heads * d, device=cuda, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, heads * d, device=cuda, dtype=dtype)
    right = in_fp32(exact := qkv.detach().requires_grad_(), sizes, heads)
    right.backward(gradient.float())
    most = 5e-3 if dtype == torch.bfloat16 else 1e-3
    for function in (packed_attention, torch.compile(packed_attention, dynamic=False)):
        qkv.grad = None
        found = function(qkv, sizes, heads, d**-0.5)
        found.backward(gradient)
        assert distance(found, right) < most
        assert distance(qkv.grad, exact.grad) < most
        once = qkv.grad.clone()
        qkv.grad = None
        function(qkv, sizes, heads, d**-0.5).backward(gradient)
        assert torch.equal(once, qkv.grad), "nothing is added in an order that may change"
