"""Grids of images: what a model makes of them.

Built without pyplot, so that drawing needs no display and leaves no global state. Save with `figure.savefig(path)`: every
pixel of an image becomes a whole number of pixels in the file.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from sslvision.figures.curves import INK, MUTED, WIDTH

CELL = 160  # pixels: small images are enlarged by an integer factor to at least this


def picture_figure(columns: Sequence[tuple[str, Tensor]], *, title: str) -> Figure:
    """Return a grid of images with a row for each and a column for each output, in two groups side by side.

    `columns` are (heading, images) with images (N, C, H, W) in 0..1 of the same N, H and W; N = 16 fills a page. Other values
    are clipped, and NaN is drawn in gray. Of more than three channels the first three are drawn, of two the first.
    """
    rows = np.stack([_drawable(images) for _, images in columns], axis=1)  # (N, columns, H, W, 3)
    groups = min(2, len(rows))
    canvas, column_centers = _canvas(rows, groups)
    px_height, px_width = canvas.shape[:2]

    dpi = px_width / (WIDTH * groups / 2)
    top, edge = round(0.5 * dpi), round(0.06 * dpi)  # pixels: title and headings above, a margin elsewhere
    width, height = px_width + 2 * edge, px_height + top + edge
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")
    figure.figimage(canvas, xo=edge, yo=edge, origin="upper")  # never resampled
    figure.text(
        edge / width, 1 - 0.07 * dpi / height, title, size=10, color=INK, weight="bold", va="top", parse_math=False
    )
    for i, center in enumerate(column_centers):
        x, y = (edge + center) / width, (edge + px_height + 0.05 * dpi) / height
        figure.text(x, y, columns[i % len(columns)][0], size=8, color=MUTED, ha="center", va="bottom")
    return figure


def _drawable(images: Tensor) -> np.ndarray:
    """Return images (N, C, H, W) with any number of channels as (N, H, W, 3) in 0..1."""
    images = images.detach().float().cpu()
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    return torch.nan_to_num(images, nan=0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _canvas(rows: np.ndarray, groups: int) -> tuple[np.ndarray, list[float]]:
    """Arrange (N, columns, H, W, 3) on white; return the canvas, and the horizontal center of each column in pixels."""
    N, columns, H, W, _ = rows.shape
    factor = max(1, math.ceil(CELL / W))
    rows = rows.repeat(factor, axis=2).repeat(factor, axis=3)
    H, W = H * factor, W * factor
    gap, gutter = max(2, W // 28), max(8, W // 6)
    lefts = [column * (W + gap) + (column // columns) * (gutter - gap) for column in range(columns * groups)]
    lines = math.ceil(N / groups)
    canvas = np.ones((lines * (H + gap) - gap, lefts[-1] + W, 3), dtype=np.float32)
    for n, row in enumerate(rows):
        y = n // groups * (H + gap)
        for image, x in zip(row, lefts[n % groups * columns :], strict=False):
            canvas[y : y + H, x : x + W] = image
    return canvas, [left + W / 2 for left in lefts]
