"""Faster versions of linear layers and attention for CPUs."""

from typing import Any

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MIN_PRODUCT = 400_000_000  # multiplications; measured: packing the weights of smaller products does not pay
Sizes = tuple[tuple[int, int], ...]  # (B, N) of the images of each size

# R rows (images x tokens), I channels in, O channels out
# B images, N tokens of each, T tokens of all, d width of a head


def use_cpu_kernels(network: nn.Module) -> None:
    """Replace the classes of linear layers and attention by those below. Parameters and their names stay the same."""
    for module in network.modules():
        if type(module) is nn.Linear and torch.backends.mkldnn.is_available():
            module.__class__ = PackedLinear
        elif type(module) is Attention:
            module.__class__ = CPUAttention


class PackedLinear(nn.Linear):
    """A linear layer whose weights are packed into oneDNN's blocked layout once per product.

    torch multiplies by oneDNN, which reads weights in blocks and otherwise repacks each block every time it is used. With many
    rows, packing once is cheaper. The results are the same: bit for bit where oneDNN has one kernel for both layouts
    (AVX-512), elsewhere up to the order of summation.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., O) of (..., I)."""
        widens = self.out_features >= 2 * self.in_features  # other layers gain little
        if (
            x.device.type != "cpu"
            or not widens
            or x.numel() * self.out_features < MIN_PRODUCT
            or torch.compiler.is_compiling()
        ):
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not _multiplied_by_onednn(dtype) or self.weight.dtype not in (dtype, torch.float32):
            return super().forward(x)
        product: Tensor = _Product.apply(x, self.weight, self.bias, dtype)
        return product


def _multiplied_by_onednn(dtype: torch.dtype) -> bool:
    """Return whether torch uses oneDNN for products of this dtype; for fp32 that is a setting."""
    if dtype == torch.float32:
        return torch.get_float32_matmul_precision() != "highest"
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Product(torch.autograd.Function):
    """x @ weight.T + bias in a given dtype, with the gradients of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.types = x.dtype, weight.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])
        bias = None if bias is None else bias.to(dtype)
        # The operator that torch.compile uses for linear layers, with no pointwise operation fused.
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
        return product

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        type_of_x, type_of_weight = ctx.types
        of_x = of_weight = of_bias = None
        rows = gradient.flatten(0, -2)  # (R, O)
        if ctx.needs_input_grad[0]:
            of_x = (rows @ weight).view(x.shape).to(type_of_x)  # (..., I)
        if ctx.needs_input_grad[1]:
            of_weight = (rows.T @ x.flatten(0, -2)).to(type_of_weight)  # (O, I)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0).to(type_of_weight)  # (O,)
        return of_x, of_weight, of_bias, None


class CPUAttention(Attention):
    """timm's attention, by `UnfusedAttention` where that applies."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return (B, N, D) of (B, N, D)."""
        if attn_mask is not None or is_causal or self.gate is not None or not uses_unfused_attention(self):
            return super().forward(x, attn_mask, is_causal)
        B, N, _ = x.shape
        attended = UnfusedAttention.apply(self.qkv(x).flatten(0, 1), ((B, N),), self.num_heads, self.scale)
        return self.proj_drop(self.proj(self.norm(attended.view(B, N, -1))))


def uses_unfused_attention(attention: Attention) -> bool:
    """Return whether `UnfusedAttention` computes what this layer does, and should be used."""
    dropped = attention.attn_drop.p if attention.training else 0.0
    normed = not isinstance(attention.q_norm, nn.Identity) or not isinstance(attention.k_norm, nn.Identity)
    return not (attention.fused_attn or dropped or normed or torch.compiler.is_compiling())


class UnfusedAttention(torch.autograd.Function):
    """softmax(scale x q @ k.T) @ v of each image and head, without fused kernels, which are slower on a CPU.

    The same matrix products as autograd's, with fewer copies: gradients are written where they are needed.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, sizes: Sizes, heads: int, scale: float) -> Tensor:
        """Return attention (T, heads * d) of queries, keys and values (T, 3 * heads * d)."""
        T, d = len(qkv), qkv.shape[1] // (3 * heads)
        attended, kept, start = qkv.new_empty(T, heads * d), [], 0
        for B, N in sizes:
            rows = slice(start, start := start + B * N)
            by_head = qkv[rows].view(B, N, 3, heads, d).permute(2, 0, 3, 1, 4).contiguous()  # (3, B, heads, N, d)
            q, k, v = by_head.flatten(1, 2).unbind()  # (B * heads, N, d)
            p = torch.baddbmm(q.new_empty(1, 1, 1), q, k.mT, beta=0, alpha=scale).softmax(dim=-1)  # (B * heads, N, N)
            attended[rows].view(B, N, heads, d).copy_((p @ v).view(B, heads, N, d).transpose(1, 2))
            kept += [q, k, v, p]
        ctx.save_for_backward(*kept)
        ctx.sizes, ctx.heads, ctx.scale = sizes, heads, scale
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient of queries, keys and values (T, 3 * heads * d)."""
        T, d = len(gradient), gradient.shape[1] // ctx.heads
        grad_qkv, kept, start = gradient.new_empty(T, 3 * ctx.heads * d), iter(ctx.saved_tensors), 0
        for B, N in ctx.sizes:
            q, k, v, p = next(kept), next(kept), next(kept), next(kept)
            rows = slice(start, start := start + B * N)
            of_out = gradient[rows].view(B, N, ctx.heads, d).transpose(1, 2).flatten(0, 1)  # (B * heads, N, d)
            of_logits = torch._softmax_backward_data(of_out @ v.mT, p, -1, p.dtype)  # (B * heads, N, N)
            by_head, none = q.new_empty(3, *q.shape), q.new_empty(1, 1, 1)
            torch.baddbmm(none, of_logits, k, beta=0, alpha=ctx.scale, out=by_head[0])
            torch.baddbmm(none, of_logits.mT, q, beta=0, alpha=ctx.scale, out=by_head[1])
            torch.bmm(p.mT, of_out, out=by_head[2])
            by_image = by_head.view(3, B, ctx.heads, N, d).permute(1, 3, 0, 2, 4)  # (B, N, 3, heads, d)
            grad_qkv[rows].view(by_image.shape).copy_(by_image)
        return grad_qkv, None, None, None
