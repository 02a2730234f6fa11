"""Attention in (shifted) windows among some tokens of a map, or all of them (Swin: Liu et al. 2021, section 3.2).

Swin rolls the map before partitioning it into windows, so that parts from opposite edges share a window, and masks these
parts from one another. This is equivalent to window borders every w tokens, moved by w // 2 tokens in a shifted block, where
two tokens attend to each other if no border lies between them. A map of any size then needs neither rolling nor padding,
and hidden tokens can be left out: attention among visible tokens equals that of the dense model with the hidden keys removed.

    visible units -> Windows (which tokens share a window, indices into Swin's bias table) -> window_attention

GreenMIM (Huang et al. 2022, arXiv:2205.13515) showed that Swin can encode visible tokens alone; it packs windows into groups of
equal size, while here windows without tokens are left out.
"""

import functools
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models.swin_transformer import WindowAttention
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

MAX_ROWS = 65_535  # limit of fused attention in CUDA: one thread block per row, along an axis of at most this size

# B images, N tokens of each, in units of n tokens; attention in R rows of S slots; d width of a head


@dataclass(frozen=True)
class WindowPartition:
    """How a block partitions a map into windows.

    Attributes:
        size: Rows and columns of the map.
        window: Rows and columns of a window.
        shift: Shift of the window borders, up and left.
        table: Window size that the table of relative-position biases was made for, no smaller than `window`.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]
    table: tuple[int, int]

    @property
    def start(self) -> tuple[int, int]:
        """Return the position of the map's first token in its window."""
        return -self.shift[0] % self.window[0], -self.shift[1] % self.window[1]

    @property
    def counts(self) -> tuple[int, int]:
        """Return the number of rows and columns of windows."""
        rows, columns = (
            (side - 1 + at) // w + 1 for side, at, w in zip(self.size, self.start, self.window, strict=True)
        )
        return rows, columns

    def touched(self, unit: int) -> int:
        """Return the largest number of windows that a square unit of the map overlaps."""
        rows, columns = (
            max((at + start + unit - 1) // w - (at + start) // w + 1 for at in range(0, side, unit))
            for side, start, w in zip(self.size, self.start, self.window, strict=True)
        )
        return rows * columns

    def code(self, y: Tensor, x: Tensor) -> Tensor:
        """Return a code for each token at y, x, see `pair_indices`."""
        return y * (2 * self.table[1] - 1) + x

    def pair_indices(self, code: Tensor) -> Tensor:
        """Return the indices (b, N, N) into Swin's bias table of all pairs of tokens of a window, from their codes (b, N)."""
        middle = (self.table[0] - 1) * (2 * self.table[1] - 1) + self.table[1] - 1  # offset 0: a token and itself
        return (code + middle)[:, :, None] - code[:, None, :]


@dataclass(frozen=True)
class Windows:
    """Layout of tokens for attention: R rows of S slots; tokens attend within their row.

    Attributes:
        rows, slots: R, over all images, and S.
        slot_index: (B * N,) slot of each token among R * S; None if the tokens already are in their slots.
        bias: (1, S, S), or (b, S, S) if slots have no fixed coordinates: indices into the bias table. b is 1 if all images have
            the same tokens.
        key_mask: (R, 1 or S, S) 0, or -inf for keys that must not be attended to; None if there are none.
    """

    rows: int
    slots: int
    slot_index: Tensor | None
    bias: Tensor
    key_mask: Tensor | None


class Geometry(NamedTuple):
    """The part of a layout that does not depend on the mask, for L units in row-major order, tokens in `nested_order`.

    Attributes:
        code: (L, n) code of each token; the codes of two tokens give their index into the bias table, see `pair_indices`.
        window: (L, n) window of each token.
        slot: (L, n) slot of each token among those of all windows.
        bias_of_unit, bias_of_window: (1, n, n) and (1, area, area) indices into the bias table.
        ahead: (windows,) number of windows up to and including each.
    """

    code: Tensor
    window: Tensor
    slot: Tensor
    bias_of_unit: Tensor
    bias_of_window: Tensor
    ahead: Tensor


@functools.cache
@torch.inference_mode(False)  # cached tensors may first be computed in validation, and used in training later
def window_geometry(partition: WindowPartition, unit: int, device: torch.device) -> Geometry:
    """Return the mask-independent part of a layout, for square units with sides of `unit` tokens."""
    rows, columns = partition.size[0] // unit, partition.size[1] // unit
    inside_y, inside_x = nested_order(unit.bit_length() - 1, device)
    number = torch.arange(rows * columns, device=device)[:, None]
    y, x = number // columns * unit + inside_y, number % columns * unit + inside_x  # (L, n)
    down, right, area = y + partition.start[0], x + partition.start[1], partition.window[0] * partition.window[1]
    window = down // partition.window[0] * partition.counts[1] + right // partition.window[1]
    slot = window * area + down % partition.window[0] * partition.window[1] + right % partition.window[1]
    in_window = torch.arange(area, device=device)[None]
    return Geometry(
        code := partition.code(y, x),
        window,
        slot,
        bias_of_unit=partition.pair_indices(code[:1]),
        bias_of_window=partition.pair_indices(
            partition.code(in_window // partition.window[1], in_window % partition.window[1])
        ),
        ahead=torch.arange(1, partition.counts[0] * partition.counts[1] + 1, device=device),
    )


@functools.cache
def nested_order(levels: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return rows and columns (n,) of the n = 4**levels tokens of a unit, in the order in which patch merging is a reshape.

    At each level the four quarters are in the order in which timm's PatchMerging concatenates them: columns, then rows.
    """
    y = x = torch.zeros(1, dtype=torch.long, device=device)
    quarters = torch.arange(4, device=device)[:, None]
    for level in range(levels):
        y, x = (y + 2**level * (quarters % 2)).flatten(), (x + 2**level * (quarters // 2)).flatten()
    return y, x


def build_windows(keep: Tensor, unit: int, partition: WindowPartition, repeats: int = 1, *, count: bool) -> Windows:
    """Lay visible tokens out for attention within windows, in the cheapest of three ways.

    If units are windows, tokens stay where they are. If tokens are few, all tokens of an image form one row, and those of
    other windows are masked. Otherwise every window is a row, with tokens at their positions in it, without empty windows.

    Args:
        keep: (b, K) visible units of each image; their tokens come one unit after the other, in `nested_order`.
        unit: Side of a unit in tokens.
        partition: Partition of a map that units divide.
        repeats: Number of batches of b images with the same visible units; B = repeats * b.
        count: Count the non-empty windows, for which a GPU has to synchronize; False takes the largest possible number.
    """
    geometry = window_geometry(partition, unit, keep.device)
    (b, K), n, area, total = (
        keep.shape,
        unit**2,
        partition.window[0] * partition.window[1],
        partition.counts[0] * partition.counts[1],
    )
    if partition.window == (unit, unit) and partition.shift == (0, 0):
        return Windows(repeats * b * K, n, slot_index=None, bias=geometry.bias_of_unit, key_mask=None)
    rows = min(total, K * partition.touched(unit))
    window = geometry.window[keep].flatten(1)  # (b, N)
    # Biases that differ between images, or a mask on every pair, cost about as much as the attention itself.
    if (K * n) ** 2 * (1 if b == total == 1 else 2) <= rows * area**2:
        bias = partition.pair_indices(geometry.code[keep].flatten(1))  # (b, N, N)
        if total == 1:
            return Windows(repeats * b, K * n, slot_index=None, bias=bias, key_mask=None)
        same = window[:, :, None] == window[:, None, :]  # (b, N, N)
        return Windows(repeats * b, K * n, None, bias * same, key_mask=_repeated(_minus_infinity(same), repeats))
    present = torch.zeros(b, total, dtype=torch.bool, device=keep.device).scatter_(1, window, True)
    rows = int(present.sum()) if count else b * rows
    # Rows of empty windows are taken by the windows after them.
    taken = present.flatten().cumsum(0).view(b, total) - geometry.ahead
    slot_index = (geometry.slot[keep].flatten(1) + area * taken.gather(1, window)).flatten()  # (b * N,)
    key_mask = None if b * K * n == rows * area else _repeated(_unfilled(slot_index, rows, area), repeats)
    if repeats > 1:
        slot_index = (
            slot_index + rows * area * torch.arange(repeats, device=keep.device)[:, None]
        ).flatten()  # (B * N,)
    return Windows(repeats * rows, area, slot_index, geometry.bias_of_window, key_mask)


@functools.cache
@torch.inference_mode(False)
def all_windows(images: int, unit: int, partition: WindowPartition, device: torch.device) -> Windows:
    """Return `build_windows` of images all of whose units are visible, in the order of the map."""
    L = partition.size[0] // unit * (partition.size[1] // unit)
    return build_windows(torch.arange(L, device=device)[None], unit, partition, images, count=False)


def _unfilled(slot_index: Tensor, rows: int, slots: int) -> Tensor:
    """Return (R, 1, S) -inf for empty slots, else 0; all 0 in rows without tokens, because softmax needs a finite key."""
    filled = torch.zeros(rows * slots, dtype=torch.bool, device=slot_index.device).index_fill_(0, slot_index, True)
    filled = filled.view(rows, 1, slots)
    return _minus_infinity(filled | ~filled.any(dim=2, keepdim=True))


def _minus_infinity(seen: Tensor) -> Tensor:
    """Return 0 where True, else -inf: the logarithm."""
    return seen.float().log_()


def _repeated(mask: Tensor, repeats: int) -> Tensor:
    return mask if repeats == 1 else mask.repeat(repeats, 1, 1)


def window_attention(attention: Any, tokens: Tensor, windows: Windows) -> Tensor:
    """Return the output (B, N, C) of a timm Swin `WindowAttention` for tokens (B, N, C) that are laid out by `windows`."""
    B, N, _ = tokens.shape
    S, heads, slot_index = windows.slots, attention.num_heads, windows.slot_index
    joint = attention.qkv(tokens).view(B * N, 3, heads, -1).permute(1, 2, 0, 3)  # (3, heads, B * N, d)
    if slot_index is not None:
        joint = joint.new_zeros(3, heads, windows.rows * S, joint.shape[3]).index_copy_(2, slot_index, joint)
    query, key, value = joint.unflatten(2, (-1, S))  # (heads, rows, S, d)
    # F.embedding: its gradient is summed in a fixed order on a GPU, too.
    bias = F.embedding(windows.bias, attention.relative_position_bias_table).movedim(3, 0)  # (heads, 1 or b, S, S)
    attended = attend(attention, query, key, value, bias, windows.key_mask).flatten(1, 2)  # (heads, rows * S, d)
    if slot_index is not None:
        attended = GatherRows.apply(attended, slot_index)
    attended = attended.transpose(0, 1).reshape(B, N, -1)  # (B, N, heads * d)
    return attention.proj_drop(attention.proj(attended))


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return attention (heads, rows, S, d) within each row, by the fused kernel where timm would use it."""
    if attention.fused_attn:
        mask = bias if key_mask is None else bias + key_mask
        parts = math.ceil(query.shape[1] / MAX_ROWS)
        masks = [mask] * parts if mask.shape[1] == 1 else mask.chunk(parts, dim=1)
        dropped = attention.attn_drop.p if attention.training else 0.0
        with without_cudnn(trained=query.requires_grad, bias=mask):
            attended = [
                F.scaled_dot_product_attention(q, k, v, m.to(q.dtype), dropped, scale=attention.scale)
                for q, k, v, m in zip(*(x.chunk(parts, dim=1) for x in (query, key, value)), masks, strict=True)
            ]
        return attended[0] if parts == 1 else torch.cat(attended, dim=1)
    logits = (query * attention.scale) @ key.transpose(2, 3)  # (heads, rows, S, S)
    logits = logits.to(bias.dtype).add_(bias)  # under autocast this converts to fp32, as timm does; else in place
    if key_mask is not None:
        logits.add_(key_mask)
    return attention.attn_drop(attention.softmax(logits)) @ value


def without_cudnn(*, trained: bool, bias: Tensor) -> AbstractContextManager[Any]:
    """Return a context that excludes cuDNN's attention where its gradients can be NaN, else an empty one.

    That happens on an H100 if queries are `trained`, their bias is not, and windows have 64 tokens (pytorch#196678). cuDNN does
    not support trained biases.
    """
    if not torch.is_grad_enabled() or not trained or bias.requires_grad:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class SafeWindowAttention(WindowAttention):
    """timm's window attention for any number of windows, and without NaN gradients where biases are frozen."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (rows, S, C) of windows (rows, S, C), with a mask (windows, S, S) for the windows of an image."""
        if not self.fused_attn:
            return super().forward(x, mask)
        windows = 1 if mask is None else len(mask)
        parts = x.split(MAX_ROWS // windows * windows)  # whole images
        trained = x.requires_grad or self.qkv.weight.requires_grad
        with without_cudnn(trained=trained, bias=self.relative_position_bias_table):
            attended = [WindowAttention.forward(self, part, mask) for part in parts]
        return attended[0] if len(parts) == 1 else torch.cat(attended)


class GatherRows(torch.autograd.Function):
    """index_select of rows that are selected at most once: gradients are copied back instead of being accumulated."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, index: Tensor) -> Tensor:
        """Return rows `index` (m,) of matrices (heads, M, d)."""
        ctx.save_for_backward(index)
        ctx.shape = matrices.shape
        return matrices.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient with respect to the matrices."""
        (index,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape).index_copy_(1, index, gradients[0]), None
