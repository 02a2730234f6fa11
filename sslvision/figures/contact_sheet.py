"""Contact sheets: rows of small images with a heading, and a caption below each.

Built without pyplot, so that drawing needs no display and leaves no global state. Save with `figure.savefig(path)`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from sslvision.figures.curves import INK, MUTED
from sslvision.figures.fonts import drawable

CELL, GAP, CAPTION, HEADING, TITLE, MARGIN = 120, 10, 18, 30, 44, 16  # pixels
COLUMNS = 10
LETTERS = 20  # of a caption that fit below an image
DPI = 100


@dataclass(frozen=True)
class SheetRow:
    """A heading, and images (C, H, W) uint8 with their captions; None for an image that cannot be read."""

    heading: str
    images: Sequence[Tensor | None]
    captions: Sequence[str]


def contact_sheet(rows: Sequence[SheetRow], *, title: str, columns: int = COLUMNS) -> Figure:
    """Return a page with the rows one below another; rows with more images than columns continue on the next line."""
    columns = max(4, min(columns, max((len(row.images) for row in rows), default=0)))
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    line = CELL + CAPTION + GAP
    height = TITLE + MARGIN + sum(HEADING + line * max(1, math.ceil(len(row.images) / columns)) for row in rows)
    canvas = np.ones((height, width, 3), dtype=np.float32)
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")

    def write(x: float, y: float, text: str, **style: Any) -> None:
        shown, families = drawable(text)
        figure.text(
            x / width, 1 - y / height, shown, va="top", parse_math=False, family=families, **{"color": INK, **style}
        )

    write(MARGIN, 12, title, size=11, weight="bold")
    y = TITLE
    for row in rows:
        write(MARGIN, y + 8, row.heading, size=8.5, weight="bold", color=INK)
        y += HEADING
        for number, (image, caption) in enumerate(zip(row.images, row.captions, strict=True)):
            x = MARGIN + number % columns * (CELL + GAP)
            top = y + number // columns * line
            _paste(canvas, image, x, top)
            write(x + CELL / 2, top + CELL + 3, shortened(caption), size=6.5, ha="center", color=MUTED)
        y += line * max(1, math.ceil(len(row.images) / columns))
    figure.figimage(canvas, xo=0, yo=0, origin="upper")  # never resampled
    return figure


def shortened(text: str, letters: int = LETTERS) -> str:
    """Return a text that is not longer; of a longer one, the end, which tells the names of files apart."""
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


def thumbnail(image: Tensor, size: int = CELL) -> np.ndarray:
    """Return an image (C, H, W) uint8 with any number of channels as (h, w, 3) in 0..1, its longer side `size` pixels.

    Images smaller than that are enlarged by a whole factor.
    """
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    longer = max(image.shape[1:])
    pixels = image[None].float() / 255
    if longer <= size:
        factor = size // longer
        pixels = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    else:
        sides = [max(1, round(side * size / longer)) for side in image.shape[1:]]
        pixels = F.interpolate(pixels, size=sides, mode="bilinear", antialias=True)
    return pixels[0].clamp(0, 1).permute(1, 2, 0).numpy()


def _paste(canvas: np.ndarray, image: Tensor | None, x: int, y: int) -> None:
    """Put an image in the middle of its cell; an image that cannot be read is a crossed-out square."""
    if image is None:
        canvas[y : y + CELL, x : x + CELL] = 0.93
        diagonal = torch.arange(CELL)
        canvas[y + diagonal, x + diagonal] = canvas[y + diagonal, x + CELL - 1 - diagonal] = 0.7
        return
    pixels = thumbnail(image)
    top, left = y + (CELL - pixels.shape[0]) // 2, x + (CELL - pixels.shape[1]) // 2
    canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
