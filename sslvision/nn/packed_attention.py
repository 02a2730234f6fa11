"""Attention of short sequences on a GPU, from queries, keys and values packed in one tensor.

All keys of an image fit into the registers and shared memory of a multiprocessor, so rows of the softmax are never split: the
backward pass reads them once, writes every gradient once and in place, and needs no atomic additions, so it is deterministic.
General kernels (FlashAttention, Dao 2023, arXiv:2307.08691; cuDNN's) split long rows, need statistics and a pass before the
backward pass, and return the gradients of queries, keys and values separately.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from sslvision.nn.cpu import Sizes

MAX_TOKENS = 256  # longest sequence, in tokens
HAS_TRITON = importlib.util.find_spec("triton") is not None
HEAD_DIMS = (32, 64)  # supported channels of a head
DTYPES = (torch.bfloat16, torch.float16)

# B images, N tokens of each, T tokens of all, d width of a head


def blocks_of(N: int, d: int, *, backward: bool) -> dict[str, int]:
    """Return block sizes, warps and stages of a kernel, as measured on an H100."""
    keys = max(16, 1 << (N - 1).bit_length())
    if keys <= 64:  # one block holds all queries, so the backward pass can recompute the sums
        return {"SUMS": False, "BLOCK_Q": keys, "BLOCK_K": keys, "num_warps": 4, "num_stages": 1}
    if not backward:
        return {"SUMS": True, "BLOCK_Q": 128 if d == 32 else 64, "BLOCK_K": keys, "num_warps": 4, "num_stages": 1}
    return {"SUMS": True, "BLOCK_Q": 64, "BLOCK_K": keys, "num_warps": 8, "num_stages": 1 if d == 32 else 2}


Wrap = Callable[[Any], Any]


def run_forward(qkv: Tensor, sizes: list[int], heads: int, scale: float, wrap: Wrap) -> tuple[Tensor, Tensor]:
    """Return what `packed_attention_and_sums` does; `wrap` makes the kernel visible to torch.compile."""
    from sslvision.nn.packed_attention_kernels import (
        attend_kernel,  # imported here because importing Triton is slow
    )

    d, first = qkv.shape[1] // (3 * heads), 0
    out = qkv.new_empty(len(qkv), heads * d)
    log_sums = qkv.new_empty(len(qkv), heads, dtype=torch.float32)
    for B, N in zip(sizes[::2], sizes[1::2], strict=True):
        blocks = blocks_of(N, d, backward=False)
        grid = (B * heads, -(-N // blocks["BLOCK_Q"]))
        wrap(attend_kernel)[grid](qkv, out, log_sums, first, SCALE=scale, N=N, H=heads, D=d, **blocks)
        first += B * N
    return out, log_sums


def run_backward(
    qkv: Tensor,
    out: Tensor,
    log_sums: Tensor,
    of_out: Tensor,
    sizes: list[int],
    heads: int,
    scale: float,
    wrap: Wrap,
) -> Tensor:
    """Return the gradient of `qkv`."""
    from sslvision.nn.packed_attention_kernels import gradient_kernel

    d, first = qkv.shape[1] // (3 * heads), 0
    grad_qkv = torch.empty_like(qkv)
    for B, N in zip(sizes[::2], sizes[1::2], strict=True):
        blocks, grid = blocks_of(N, d, backward=True), (B * heads,)
        wrap(gradient_kernel)[grid](
            qkv, out, log_sums, of_out, grad_qkv, first, SCALE=scale, N=N, H=heads, D=d, **blocks
        )
        first += B * N
    return grad_qkv


@torch.library.triton_op("sslvision::packed_attention", mutates_args={})
def packed_attention_and_sums(qkv: Tensor, sizes: list[int], heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the result of `packed_attention` (T, heads * d), and log2 of the softmax denominators (T, heads)."""
    return run_forward(qkv, sizes, heads, scale, torch.library.wrap_triton)


@torch.library.triton_op("sslvision::packed_attention_backward", mutates_args={})
def packed_attention_backward(
    qkv: Tensor, out: Tensor, log_sums: Tensor, of_out: Tensor, sizes: list[int], heads: int, scale: float
) -> Tensor:
    """Return the gradient of qkv (T, 3 * heads * d) from the contiguous gradient of the output (T, heads * d)."""
    return run_backward(qkv, out, log_sums, of_out, sizes, heads, scale, torch.library.wrap_triton)


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    qkv, ctx.sizes, ctx.heads, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)


def _backward(ctx: Any, of_out: Tensor, of_log_sums: Any) -> tuple[Tensor, None, None, None]:
    grad_qkv: Tensor = packed_attention_backward(
        *ctx.saved_tensors, of_out.contiguous(), ctx.sizes, ctx.heads, ctx.scale
    )
    return grad_qkv, None, None, None


packed_attention_and_sums.register_autograd(_backward, setup_context=_keep)


def packed_attention(qkv: Tensor, sizes: list[int], heads: int, scale: float) -> Tensor:
    """Return softmax(scale x q @ k.T) @ v of each image and head.

    Args:
        qkv: (T, 3 * heads * d) contiguous; tokens of the images of the first size, then those of the second, and so on.
        sizes: B, N of the first size, B, N of the second, ...; T is the sum of B x N.
        heads: Number of attention heads.
        scale: Scale of the logits.

    Returns:
        (T, heads * d).
    """
    attended: Tensor = packed_attention_and_sums(qkv, sizes, heads, scale)[0]
    return attended


def can_pack(attention: Attention, qkv: Tensor, sizes: Sizes) -> bool:
    """Return whether `packed_attention` supports this layer and its queries, keys and values (T, 3 * heads * d)."""
    dropped = attention.attn_drop.p if attention.training else 0.0
    normed = not isinstance(attention.q_norm, nn.Identity) or not isinstance(attention.k_norm, nn.Identity)
    return (
        HAS_TRITON
        and qkv.device.type == "cuda"
        and not (dropped or normed)
        and qkv.dtype in DTYPES
        and attention.head_dim in HEAD_DIMS
        and all(N <= MAX_TOKENS for _, N in sizes)
    )


def use_packed_attention(network: nn.Module) -> None:
    """Replace the class of attention layers by PackedAttention. Parameters and their names stay the same."""
    for module in network.modules():
        if type(module) is Attention:
            module.__class__ = PackedAttention


class PackedAttention(Attention):
    """timm's attention, by `packed_attention` where it is supported."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (B, N, D) of (B, N, D)."""
        if attn_mask is not None or is_causal or self.gate is not None:
            return super().forward(x, attn_mask, is_causal)
        B, N, _ = x.shape
        qkv = self.qkv(x).flatten(0, 1)  # (B * N, 3 * heads * d)
        if not can_pack(self, qkv, ((B, N),)):
            return super().forward(x)
        attended = packed_attention(qkv, [B, N], self.num_heads, self.scale)
        return self.proj_drop(self.proj(self.norm(attended.view(B, N, -1))))
