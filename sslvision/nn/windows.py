"""Attention in (shifted) windows among some tokens of a map, or all of them (Swin: Liu et al. 2021, section 3.2).

Swin rolls the map before it cuts it into windows, so that parts from opposite edges share a window, and then masks them
from one another. That is to say: the map is cut every w tokens, in a shifted block w // 2 tokens later, and two tokens see
each other if no cut lies between them. Cut like this, a map needs no rolling and no padding, whatever its size, and hidden
tokens are simply not there: attention among the visible ones equals dense attention with the hidden keys removed.

    tokens and their coordinates -> Windows: who meets whom, and the biases' places in Swin's table -> window_attention

Encoding visible tokens alone in hierarchical transformers is known from GreenMIM (Huang et al. 2022, arXiv:2205.13515).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# B images, N tokens of each (K units of n tokens), R windows, S slots of a window, C width, d width of a head


@dataclass(frozen=True)
class Windows:
    """Where tokens meet: R rows of S slots. Index tables are of one image if all images have the same tokens (b = 1), else b = B.

    Attributes:
        slots: S.
        rows: R, of all b images.
        place: (b * N,) each token's slot among R * S; None where tokens lie in their slots already.
        bias: (S, S), or (b, S, S) where slots have no fixed coordinates: places in the table of relative-position biases.
        unseen: 0 or -inf, (R, 1, 1 or S, S): what is added to a key that must not be seen; None where every key is seen.
    """

    slots: int
    rows: int
    place: Tensor | None
    bias: Tensor
    unseen: Tensor | None


def nested_order(levels: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return rows and columns (n,) of the n = 4**levels tokens of a unit, in the order in which patch merging is a reshape.

    At each level the four quarters follow one another down the columns, as timm's PatchMerging concatenates them.
    """
    y = x = torch.zeros(1, dtype=torch.long, device=device)
    down, right = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]], device=device)[:, :, None]
    for level in range(levels):
        y, x = (y + 2**level * down).flatten(), (x + 2**level * right).flatten()
    return y, x


def cut_windows(
    y: Tensor,
    x: Tensor,
    *,
    unit: int,
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    table: tuple[int, int],
) -> Windows:
    """Lay visible tokens out for attention, in the cheapest of three ways; see the module's docstring for who sees whom.

    Units are windows: they lie as they must. Few tokens: every image attends to all of its tokens, others' windows masked.
    Else: tokens are put in windows at their true places, and windows without tokens are left out.

    Args:
        y, x: (b, N), coordinates on the map, units of unit * unit tokens one after another, each in `nested_order`.
        unit: side of a unit.
        size: rows and columns of the map.
        window, shift: of the block, no larger than the map.
        table: side lengths of the window for which the table of biases was made, no smaller than `window`.
    """
    b, N = y.shape
    (h, w), (start_y, start_x) = window, [-by % side for by, side in zip(shift, window, strict=True)]
    columns = (size[1] - 1 + start_x) // w + 1
    group = (y + start_y) // h * columns + (x + start_x) // w  # (b, N), which window
    if window == (unit, unit) and shift == (0, 0):
        inside = bias_places(y[:1, : unit**2], x[:1, : unit**2], table)[0]
        return Windows(slots=unit**2, rows=b * N // unit**2, place=None, bias=inside, unseen=None)
    total = ((size[0] - 1 + start_y) // h + 1) * columns
    rows = min(total, N // unit**2 * touched(size[0], unit, h, start_y) * touched(size[1], unit, w, start_x))
    if (1 if b == 1 else 2) * N**2 <= rows * (h * w) ** 2:  # biases of each image's own cost about as much as attention
        same = group[:, :, None] == group[:, None, :]  # (b, N, N)
        unseen = None if total == 1 else minus_infinity(~same)[:, None]
        return Windows(slots=N, rows=b, place=None, bias=bias_places(y, x, table) * same, unseen=unseen)
    present = torch.zeros(b, total, dtype=torch.bool, device=y.device).scatter_(1, group, True)
    # Counting windows makes a GPU wait: there, as many as there may be are computed.
    R = int(present.sum()) if y.device.type == "cpu" else b * rows
    row = (present.flatten().cumsum(0) - 1).view(b, total).gather(1, group)  # (b, N)
    place = (row * (h * w) + (y + start_y) % h * w + (x + start_x) % w).flatten()
    filled = torch.zeros(R * h * w, dtype=torch.bool, device=y.device).index_fill_(0, place, True).view(R, h * w)
    # In rows without any token, all slots see one another, for softmax must not divide by zero.
    unseen = None if b * N == filled.numel() else minus_infinity(filled.any(1, keepdim=True) & ~filled)[:, None, None]
    slot = torch.arange(h * w, device=y.device)[None]
    return Windows(
        slots=h * w, rows=R, place=place, bias=bias_places(slot // w, slot % w, table)[0], unseen=unseen
    )


def touched(side: int, unit: int, window: int, start: int) -> int:
    """Return how many windows a unit touches at most, along an axis."""
    return max((at + unit - 1 + start) // window - (at + start) // window + 1 for at in range(0, side, unit))


def bias_places(y: Tensor, x: Tensor, table: tuple[int, int]) -> Tensor:
    """Return the places (b, N, N) in Swin's table of relative-position biases of all pairs of tokens at (b, N)."""
    down = y[:, :, None] - y[:, None, :] + table[0] - 1
    right = x[:, :, None] - x[:, None, :] + table[1] - 1
    return down * (2 * table[1] - 1) + right


def minus_infinity(where: Tensor) -> Tensor:
    """Return -inf where True, else 0."""
    return torch.zeros(where.shape, device=where.device).masked_fill_(where, -torch.inf)


def window_attention(attention: Any, tokens: Tensor, windows: Windows) -> Tensor:
    """Run a timm Swin `WindowAttention`, with its own weights, on tokens (B, N, C) that meet in `windows`.

    Returns:
        (B, N, C).
    """
    B, N, _ = tokens.shape
    S, R, heads = windows.slots, windows.rows, attention.num_heads
    joint = attention.qkv(tokens).flatten(0, 1)  # (B * N, 3 * heads * d)
    place = windows.place
    if place is not None:
        repeats = B * N // len(place)
        if repeats > 1:
            place = (place + R * S * torch.arange(repeats, device=place.device)[:, None]).flatten()  # (B * N,)
        joint = joint.new_zeros(repeats * R * S, joint.shape[1]).index_copy_(0, place, joint)
    query, key, value = joint.view(-1, S, 3, heads, joint.shape[1] // (3 * heads)).permute(2, 0, 3, 1, 4)
    bias = attention.relative_position_bias_table.index_select(0, windows.bias.flatten())
    bias = bias.view(*windows.bias.shape, heads).movedim(-1, -3)  # (heads, S, S) or (b, heads, S, S)
    attended = attend(attention, query, key, value, bias, windows.unseen)  # (rows, heads, S, d)
    attended = attended.transpose(1, 2).flatten(0, 1).flatten(1)  # (rows * S, heads * d)
    if place is not None:
        attended = TakeRows.apply(attended, place)
    return attention.proj_drop(attention.proj(attended.view(B, N, -1)))


def attend(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, unseen: Tensor | None
) -> Tensor:
    """Attention (rows, heads, S, d) among the S slots of each row, by the fused kernel where timm would use it."""
    rows, heads, S, _ = query.shape
    if attention.fused_attn:
        mask = bias if unseen is None else bias + unseen
        if mask.ndim == 4 and len(mask) < rows:
            mask = mask.repeat(rows // len(mask), 1, 1, 1)
        dropped = attention.attn_drop.p if attention.training else 0.0
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype), dropout_p=dropped)
    logits = (query * attention.scale) @ key.transpose(2, 3)  # (rows, heads, S, S)
    for term in (bias, unseen):
        if term is not None:
            logits.view(-1, *((1,) * (4 - term.ndim)), *term.shape[:-3], heads, S, S).add_(term)
    return attention.attn_drop(attention.softmax(logits)) @ value


class TakeRows(torch.autograd.Function):
    """Rows `index` (m,) of a matrix, each at most once: the gradient is copied back, where index_select would add."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, index: Tensor) -> Tensor:
        """Return the rows (m, C) of a matrix (M, C)."""
        ctx.save_for_backward(index)
        ctx.rows = len(matrix)
        return matrix.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return the gradient (M, C) of the matrix."""
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, gradient.shape[1]).index_copy_(0, index, gradient), None
