"""Receptive fields as pictures.

Built without pyplot, so that drawing needs no display and leaves no global state. Save with `figure.savefig(path)`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from sslvision.figures.curves import INK, MUTED
from sslvision.figures.fonts import drawable

SIDE = 2.3  # inches of a panel
DECADES = 3  # of gradient that the colors span
HALF, MOST, THEORY = "#ffffff", "#7fd4ff", "#6ee06e"


class Panel(NamedTuple):
    """The effective receptive field of one network.

    Attributes:
        name: Name of the network.
        map: (H, W), share of the gradient of each pixel.
        center: Row and column of the pixel in its middle.
        half, most: Sides in pixels of the squares with 50 and 95 % of it.
        theory: Height and width of the theoretical receptive field in pixels; None if there is none.
        whole: Whether that is the whole image.
    """

    name: str
    map: Tensor
    center: tuple[float, float]
    half: int
    most: int
    theory: tuple[int, int] | None
    whole: bool


def field_figure(panels: Sequence[Panel]) -> Figure:
    """Return a picture with the effective receptive field of each network, its squares, and the theoretical field."""
    rows = math.ceil(len(panels) / 4)
    columns = math.ceil(len(panels) / rows)
    width = max(columns * SIDE, 4.4)
    tallest = max(panel.map.shape[0] / panel.map.shape[1] for panel in panels)
    height = rows * (width / columns * tallest + 0.36) + 0.7
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel)
    figure.suptitle("Effective receptive field of the central output position", size=10, color=INK, weight="bold")
    entries = (
        (HALF, "-", "50 % of the gradient"),
        (MOST, "-", "95 %"),
        (THEORY, "--", "theoretical field, where inside"),
    )
    handles = [Line2D([], [], color=color, ls=style, lw=1.4, label=label) for color, style, label in entries]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3 if columns > 1 else 1, fontsize=7.5, frameon=True,
        facecolor="#3a3a3a", edgecolor="none", labelcolor="white",
    )  # fmt: skip
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    H, W = panel.map.shape
    logarithm = (panel.map.double() / panel.map.max()).clamp(min=10.0**-DECADES).log10()
    axes.imshow(logarithm.numpy(), cmap="inferno", vmin=-DECADES, vmax=0, interpolation="nearest", extent=(0, W, H, 0))
    row, column = panel.center[0] + 0.5, panel.center[1] + 0.5  # a pixel is 1 wide
    for side, color in ((panel.half, HALF), (panel.most, MOST)):
        _square(axes, (row, column), (side, side), color, "-")
    if panel.theory is not None:
        _square(axes, (row, column), panel.theory, THEORY, "--")
    axes.set_xlim(0, W)
    axes.set_ylim(H, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    title, families = drawable(panel.name)
    axes.set_title(title, size=7.5, color=INK, parse_math=False, family=families, wrap=True, pad=4)
    theory = "whole image" if panel.whole else "no formula" if panel.theory is None else f"{_by(panel.theory)}"
    axes.set_xlabel(f"50 %: {panel.half}   95 %: {panel.most}   theory: {theory}", size=6.5, color=MUTED, labelpad=3)


def _square(axes: Axes, center: tuple[float, float], size: tuple[int, int], color: str, style: str) -> None:
    (row, column), (height, width) = center, size
    axes.add_patch(
        Rectangle((column - width / 2, row - height / 2), width, height, fill=False, edgecolor=color, ls=style, lw=1.1)
    )


def _by(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
