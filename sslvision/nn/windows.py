"""Attention in (shifted) windows among some tokens of a map, or all of them (Swin: Liu et al. 2021, section 3.2).

Swin rolls the map before it cuts it into windows, so that parts from opposite edges share one, and masks these from one
another. That is to say: the map is cut every w tokens, in a shifted block w // 2 tokens later, and two tokens see each other
if no cut lies between them. So cut, a map of any size needs neither rolling nor padding, and hidden tokens are simply not
there: attention among visible tokens equals the dense model's with the hidden keys removed.

    visible units -> Windows: who meets whom, and the pairs' indices in Swin's table of biases -> window_attention

That Swin can encode visible tokens alone is known from GreenMIM (Huang et al. 2022, arXiv:2205.13515), which packs windows
into groups of equal size; here a window without tokens is left out.
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

MOST_ROWS = 65_535  # of fused attention: it puts one into each block of threads along an axis that has no more in CUDA

# B images, N tokens of each, in units of n; attention in R rows of S slots; d width of a head


@dataclass(frozen=True)
class Cut:
    """How a block cuts a map.

    Attributes:
        size: rows and columns of the map.
        window: of a window.
        shift: of the cuts, up and left.
        table: of the window for which the table of relative-position biases was made, no smaller than `window`.
    """

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]
    table: tuple[int, int]

    @property
    def start(self) -> tuple[int, int]:
        """Return the place of the map's first token in its window."""
        return -self.shift[0] % self.window[0], -self.shift[1] % self.window[1]

    @property
    def counts(self) -> tuple[int, int]:
        """Return rows and columns of windows."""
        rows, columns = (
            (side - 1 + at) // w + 1 for side, at, w in zip(self.size, self.start, self.window, strict=True)
        )
        return rows, columns

    def touched(self, unit: int) -> int:
        """Return how many windows a square unit of the map touches at most."""
        rows, columns = (
            max((at + start + unit - 1) // w - (at + start) // w + 1 for at in range(0, side, unit))
            for side, start, w in zip(self.size, self.start, self.window, strict=True)
        )
        return rows * columns

    def code(self, y: Tensor, x: Tensor) -> Tensor:
        """Return a number for each token at y, x: see `pair_indices`."""
        return y * (2 * self.table[1] - 1) + x

    def pair_indices(self, code: Tensor) -> Tensor:
        """Return the indices (b, N, N) in Swin's table of biases of all pairs of tokens (b, N), those of one window."""
        middle = (self.table[0] - 1) * (2 * self.table[1] - 1) + self.table[1] - 1  # a token to itself
        return (code + middle)[:, :, None] - code[:, None, :]


@dataclass(frozen=True)
class Windows:
    """Where tokens meet: R rows of S slots.

    Attributes:
        rows, slots: R, of all images, and S.
        place: (B * N,) the slot of each token among R * S; None where tokens already lie in their slots.
        bias: (1, S, S), or (b, S, S) where slots have no fixed coordinates: indices in the table of biases. b is 1 where all
            images have the same tokens.
        unseen: (R, 1 or S, S), 0 or -inf, which is added to keys that may not be seen; None where all may.
    """

    rows: int
    slots: int
    place: Tensor | None
    bias: Tensor
    unseen: Tensor | None


class Geometry(NamedTuple):
    """What of a cut depends on no mask; L units, row by row, their n tokens in `nested_order`.

    Attributes:
        code: (L, n) a number for each token, by which those of two tell their place in the table of biases: `pair_indices`.
        window: (L, n) the window each token is in.
        slot: (L, n) its slot among those of all windows.
        bias_of_unit, bias_of_window: (1, n, n) and (1, area, area) indices in the table of biases.
        ahead: (windows,) how many windows there are up to each.
    """

    code: Tensor
    window: Tensor
    slot: Tensor
    bias_of_unit: Tensor
    bias_of_window: Tensor
    ahead: Tensor


@functools.cache
@torch.inference_mode(False)  # so that what validation computed can be trained with
def geometry_of(cut: Cut, unit: int, device: torch.device) -> Geometry:
    """Return what is known before any mask is, for square units of a side."""
    rows, columns = cut.size[0] // unit, cut.size[1] // unit
    inside_y, inside_x = nested_order(unit.bit_length() - 1, device)
    number = torch.arange(rows * columns, device=device)[:, None]
    y, x = number // columns * unit + inside_y, number % columns * unit + inside_x  # (L, n)
    down, right, area = y + cut.start[0], x + cut.start[1], cut.window[0] * cut.window[1]
    window = down // cut.window[0] * cut.counts[1] + right // cut.window[1]
    slot = window * area + down % cut.window[0] * cut.window[1] + right % cut.window[1]
    in_window = torch.arange(area, device=device)[None]
    return Geometry(
        code := cut.code(y, x),
        window,
        slot,
        bias_of_unit=cut.pair_indices(code[:1]),
        bias_of_window=cut.pair_indices(cut.code(in_window // cut.window[1], in_window % cut.window[1])),
        ahead=torch.arange(1, cut.counts[0] * cut.counts[1] + 1, device=device),
    )


@functools.cache
def nested_order(levels: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return rows and columns (n,) of the n = 4**levels tokens of a unit, in the order in which patch merging is a reshape.

    At each level the four quarters follow one another as timm's PatchMerging concatenates them: columns, then rows.
    """
    y = x = torch.zeros(1, dtype=torch.long, device=device)
    quarters = torch.arange(4, device=device)[:, None]
    for level in range(levels):
        y, x = (y + 2**level * (quarters % 2)).flatten(), (x + 2**level * (quarters // 2)).flatten()
    return y, x


def cut_windows(keep: Tensor, unit: int, cut: Cut, alike: int = 1, *, count: bool) -> Windows:
    """Lay visible tokens out for attention within windows, in the cheapest of three ways.

    Where units are windows, tokens stay as they lie. Few tokens: all of an image's make one row, and those of other windows
    are masked. Else every window is a row, tokens at their indices in it, and windows without any are left out.

    Args:
        keep: (b, K) visible units of each image; their tokens are laid out one unit after the other, in `nested_order`.
        unit: side of a unit.
        cut: of a map that units divide.
        alike: batches of b images with the same visible units; B = alike * b.
        count: count the windows with tokens, for which a GPU has to wait; otherwise there are as many rows as may be needed.
    """
    geometry = geometry_of(cut, unit, keep.device)
    (b, K), n, area, total = keep.shape, unit**2, cut.window[0] * cut.window[1], cut.counts[0] * cut.counts[1]
    if cut.window == (unit, unit) and cut.shift == (0, 0):
        return Windows(alike * b * K, n, place=None, bias=geometry.bias_of_unit, unseen=None)
    rows = min(total, K * cut.touched(unit))
    window = geometry.window[keep].flatten(1)  # (b, N)
    # Biases of each image's own, or a mask on every pair, cost about as much as the attention itself.
    if (K * n) ** 2 * (1 if b == total == 1 else 2) <= rows * area**2:
        bias = cut.pair_indices(geometry.code[keep].flatten(1))  # (b, N, N)
        if total == 1:
            return Windows(alike * b, K * n, place=None, bias=bias, unseen=None)
        same = window[:, :, None] == window[:, None, :]  # (b, N, N)
        return Windows(alike * b, K * n, None, bias * same, unseen=_repeated(_minus_infinity(same), alike))
    present = torch.zeros(b, total, dtype=torch.bool, device=keep.device).scatter_(1, window, True)
    rows = int(present.sum()) if count else b * rows
    # Rows of windows that are left out are taken by those after them.
    taken = present.flatten().cumsum(0).view(b, total) - geometry.ahead
    place = (geometry.slot[keep].flatten(1) + area * taken.gather(1, window)).flatten()  # (b * N,)
    unseen = None if b * K * n == rows * area else _repeated(_unfilled(place, rows, area), alike)
    if alike > 1:
        place = (place + rows * area * torch.arange(alike, device=keep.device)[:, None]).flatten()  # (B * N,)
    return Windows(alike * rows, area, place, geometry.bias_of_window, unseen)


@functools.cache
@torch.inference_mode(False)
def all_windows(images: int, unit: int, cut: Cut, device: torch.device) -> Windows:
    """Return `cut_windows` of images all of whose units are visible, in the order of the map."""
    L = cut.size[0] // unit * (cut.size[1] // unit)
    return cut_windows(torch.arange(L, device=device)[None], unit, cut, images, count=False)


def _unfilled(place: Tensor, rows: int, slots: int) -> Tensor:
    """Return -inf for slots without a token, else 0 (R, 1, S); 0 in rows without any, for softmax needs something to see."""
    filled = torch.zeros(rows * slots, dtype=torch.bool, device=place.device).index_fill_(0, place, True)
    filled = filled.view(rows, 1, slots)
    return _minus_infinity(filled | ~filled.any(dim=2, keepdim=True))


def _minus_infinity(seen: Tensor) -> Tensor:
    """Return 0 where True, else -inf: their logarithm."""
    return seen.float().log_()


def _repeated(mask: Tensor, alike: int) -> Tensor:
    return mask if alike == 1 else mask.repeat(alike, 1, 1)


def window_attention(attention: Any, tokens: Tensor, windows: Windows) -> Tensor:
    """Run a timm Swin `WindowAttention`, with its own weights, on tokens (B, N, C) that meet in `windows`.

    Returns:
        (B, N, C).
    """
    B, N, _ = tokens.shape
    S, heads, place = windows.slots, attention.num_heads, windows.place
    joint = attention.qkv(tokens).view(B * N, 3, heads, -1).permute(1, 2, 0, 3)  # (3, heads, B * N, d)
    if place is not None:
        joint = joint.new_zeros(3, heads, windows.rows * S, joint.shape[3]).index_copy_(2, place, joint)
    query, key, value = joint.unflatten(2, (-1, S))  # (heads, rows, S, d)
    # An embedding's gradient is added up in a fixed order on a GPU too.
    bias = F.embedding(windows.bias, attention.relative_position_bias_table).movedim(3, 0)  # (heads, 1 or b, S, S)
    attended = attend(attention, query, key, value, bias, windows.unseen).flatten(1, 2)  # (heads, rows * S, d)
    if place is not None:
        attended = TakeOnce.apply(attended, place)
    attended = attended.transpose(0, 1).reshape(B, N, -1)  # (B, N, heads * d)
    return attention.proj_drop(attention.proj(attended))


def attend(attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, unseen: Tensor | None) -> Tensor:
    """Attention (heads, rows, S, d) of the slots of each row, by the fused kernel where timm would use it."""
    if attention.fused_attn:
        mask = bias if unseen is None else bias + unseen
        parts = math.ceil(query.shape[1] / MOST_ROWS)
        masks = [mask] * parts if mask.shape[1] == 1 else mask.chunk(parts, dim=1)
        dropped = attention.attn_drop.p if attention.training else 0.0
        with sound_backward(trained=query.requires_grad, bias=mask):
            attended = [
                F.scaled_dot_product_attention(q, k, v, m.to(q.dtype), dropped, scale=attention.scale)
                for q, k, v, m in zip(*(x.chunk(parts, dim=1) for x in (query, key, value)), masks, strict=True)
            ]
        return attended[0] if parts == 1 else torch.cat(attended, dim=1)
    logits = (query * attention.scale) @ key.transpose(2, 3)  # (heads, rows, S, S)
    logits = logits.to(bias.dtype).add_(bias)  # in place, unless autocast halved precision: then in full, as timm does
    if unseen is not None:
        logits.add_(unseen)
    return attention.attn_drop(attention.softmax(logits)) @ value


def sound_backward(*, trained: bool, bias: Tensor) -> AbstractContextManager[Any]:
    """Return a context without cuDNN's attention where its gradients may be NaN, else an empty one.

    They may be on an H100 where queries are `trained`, their bias is not, and windows have 64 tokens (pytorch#196678).
    Biases that are trained cuDNN does not take.
    """
    if not torch.is_grad_enabled() or not trained or bias.requires_grad:
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class SoundAttention(WindowAttention):
    """timm's attention, of any number of windows, and with gradients that are numbers where biases are frozen."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (rows, S, C) of rows of windows (rows, S, C), with a mask (windows, S, S) for each of an image's."""
        if not self.fused_attn:
            return super().forward(x, mask)
        windows = 1 if mask is None else len(mask)
        parts = x.split(MOST_ROWS // windows * windows)  # whole images
        trained = x.requires_grad or self.qkv.weight.requires_grad
        with sound_backward(trained=trained, bias=self.relative_position_bias_table):
            attended = [WindowAttention.forward(self, part, mask) for part in parts]
        return attended[0] if len(parts) == 1 else torch.cat(attended)


class TakeOnce(torch.autograd.Function):
    """Rows of matrices, each at most once: gradients are copied back, where index_select would add them up."""

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, index: Tensor) -> Tensor:
        """Return rows `index` (m,) of matrices (heads, M, d)."""
        ctx.save_for_backward(index)
        ctx.shape = matrices.shape
        return matrices.index_select(1, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of the matrices."""
        (index,) = ctx.saved_tensors
        return gradients[0].new_zeros(ctx.shape).index_copy_(1, index, gradients[0]), None
