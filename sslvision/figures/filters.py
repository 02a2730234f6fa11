"""Filters of a first layer as pictures, side by side.

Built without pyplot, so that drawing needs no display and leaves no global state. Save with `figure.savefig(path)`: every
weight becomes a whole number of pixels in the file.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sslvision.figures.curves import INK, MUTED
from sslvision.figures.fonts import drawable

CELL = 44  # pixels of a filter's side, at least
DPI = 150
GAP = (0.62, 0.74, 0.90)  # between filters: no gray, as these may be


def filters_figure(groups: Sequence[tuple[str, Tensor]], *, title: str, about: str) -> Figure:
    """Return the filters of each group as a block of tiles, the blocks side by side.

    Args:
        groups: (heading, filters) with filters (N, C, h, w) of the same N, h and w. Each filter is scaled by its largest
            absolute weight, so that zero is gray. Of more than three channels the first three are drawn, of two the first.
        title: Title of the picture.
        about: What is drawn, below the title.
    """
    blocks = [_block(_drawable(filters)) for _, filters in groups]
    gutter, edge, top, head = round(0.2 * DPI), round(0.1 * DPI), round(0.5 * DPI), round(0.22 * DPI)
    widths = [max(block.shape[1], _width(heading, 8)) for (heading, _), block in zip(groups, blocks, strict=True)]
    height, width = blocks[0].shape[0], sum(widths) + gutter * (len(blocks) - 1)
    canvas_width = max(width, _width(title, 10), _width(about, 7.5), 4 * DPI) + 2 * edge
    canvas_height = height + top + head + edge
    figure = Figure(figsize=(canvas_width / DPI, canvas_height / DPI), dpi=DPI, facecolor="white")
    left = edge
    for (heading, _), block, width in zip(groups, blocks, widths, strict=True):
        figure.figimage(block, xo=left, yo=edge, origin="upper")  # never resampled
        heading, families = drawable(heading)  # with the name of a run
        figure.text(left / canvas_width, (edge + height + 0.05 * DPI) / canvas_height, heading, size=8, color=MUTED,
                    va="bottom", parse_math=False, family=families)  # fmt: skip
        left += width + gutter
    title, families = drawable(title)
    at = edge / canvas_width
    figure.text(at, 1 - 0.08 * DPI / canvas_height, title, size=10, color=INK, weight="bold", va="top", parse_math=False,
                family=families)  # fmt: skip
    figure.text(at, 1 - 0.29 * DPI / canvas_height, about, size=7.5, color=MUTED, va="top")
    return figure


def _width(text: str, size: float) -> int:
    """Return the pixels that a line of text takes, at most: its letters are 0.6 of its size in points wide on average."""
    return math.ceil(len(text) * 0.6 * size / 72 * DPI)


def _drawable(filters: Tensor) -> np.ndarray:
    """Return filters (N, C, h, w) as colors (N, h, w, 3) in 0..1, zero as gray."""
    filters = filters[:, :3] if filters.shape[1] >= 3 else filters[:, :1].expand(-1, 3, -1, -1)
    largest = filters.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    return torch.nan_to_num(0.5 + filters / (2 * largest), nan=0.5).permute(0, 2, 3, 1).numpy()


def _block(tiles: np.ndarray) -> np.ndarray:
    """Arrange tiles (N, h, w, 3) in rows, enlarged by a whole factor."""
    N, h, w, _ = tiles.shape
    factor = max(1, math.ceil(CELL / max(h, w)))
    tiles = tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    h, w, gap = h * factor, w * factor, 4
    columns = math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, 3), GAP, dtype=np.float32)
    for number, tile in enumerate(tiles):
        y, x = number // columns * (h + gap), number % columns * (w + gap)
        canvas[y : y + h, x : x + w] = tile
    return canvas
