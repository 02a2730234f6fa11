"""A search: what each setting explains, and the objective against each. Returns a matplotlib `Figure` built without pyplot."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter

from sslvision.figures.curves import BLUE, INK, MUTED, ORANGE, style
from sslvision.figures.fonts import drawable

COLUMNS, PANEL = 4, 2.9  # panels in a row; inches


class Varied(NamedTuple):
    """A setting that was searched.

    Attributes:
        name: Its name.
        values: Its value in each trial; words for one that has no order.
        log: Whether its axis is logarithmic.
        importance: Share of the differences that it explains; None if that cannot be told.
    """

    name: str
    values: Sequence[Any]
    log: bool
    importance: float | None


def search_figure(
    varied: Sequence[Varied], scores: Sequence[float], *, failed: Sequence[bool], objective: str, title: str
) -> Figure:
    """Return a panel with the importance of each setting, and one for each setting with all trials.

    Args:
        varied: The settings.
        scores: The objective of each trial.
        failed: Whether the trial diverged: it is drawn as a cross at the lowest score.
        objective: Name of the objective, with its unit.
        title: Title of the figure.
    """
    panels = 1 + len(varied)
    columns = min(COLUMNS, panels)
    rows = -(-panels // columns)
    figure = Figure(
        figsize=(0.4 + PANEL * columns, 0.7 + PANEL * rows), dpi=150, layout="constrained", facecolor="white"
    )
    title, families = drawable(title)
    figure.suptitle(title, x=0.01, ha="left", size=10, color=INK, weight="bold", parse_math=False, family=families)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    draw_importance(grid[0], varied)
    good = [score for score, bad in zip(scores, failed, strict=True) if not bad] or [*scores]
    margin = 0.06 * (max(good) - min(good) or 1.0)
    for place, (axes, one) in enumerate(zip(grid[1:], varied, strict=False)):
        draw_trials(axes, one, scores, failed, floor=min(good) - margin)
        axes.set_ylim(min(good) - 2 * margin, max(good) + margin)
        if (place + 1) % columns == 0 or place == 0:
            axes.set_ylabel(objective, size=8, color=MUTED)
    for axes in grid[panels:]:
        axes.set_visible(False)
    legend = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower left", ncols=3, frameon=False, fontsize=8, labelcolor=MUTED
    )
    return figure


def draw_importance(axes: Axes, varied: Sequence[Varied]) -> None:
    """Draw bars, the most important on top; a setting whose importance is unknown has none."""
    order = sorted(varied, key=lambda one: one.importance or 0.0)
    style(axes)
    axes.grid(visible=False)
    shares = [one.importance or 0.0 for one in order]
    axes.barh(range(len(order)), shares, height=0.55, color=BLUE)
    for place, one in enumerate(order):
        told = "?" if one.importance is None else f"{100 * one.importance:.0f} %"
        axes.annotate(
            told, (shares[place], place), xytext=(3, 0), textcoords="offset points", va="center", size=8, color=INK
        )
    axes.set_yticks(range(len(order)), [one.name for one in order])
    axes.set_ylim(-0.6, max(len(order), 2) - 0.4)
    axes.set_xlim(0, max(0.2, 1.25 * max(shares)))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_title("differences that a setting explains", loc="left", size=8, color=MUTED)


def draw_trials(axes: Axes, one: Varied, scores: Sequence[float], failed: Sequence[bool], *, floor: float) -> None:
    """Draw the trials against a setting, the best one apart."""
    style(axes)
    words = [str(value) for value in one.values]
    listed = any(isinstance(value, str) for value in one.values)
    names = list(dict.fromkeys(sorted(words, key=_order)))
    x = np.array([names.index(word) for word in words] if listed else one.values, dtype=float)
    y, bad = np.array(scores, dtype=float), np.array(failed)
    best = int(np.argmax(np.where(bad, -np.inf, y)))
    others = ~bad & (np.arange(len(y)) != best)
    axes.scatter(x[others], y[others], s=16, color=BLUE, alpha=0.75, lw=0, label="trial")
    if not bad[best]:
        axes.scatter(x[best : best + 1], y[best : best + 1], s=42, color=ORANGE, lw=0, label="best", zorder=3)
    if bad.any():
        axes.scatter(
            x[bad], np.full(bad.sum(), floor), s=22, marker="x", color=MUTED, lw=1.2, label="diverged", clip_on=False
        )
    if listed:
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
    elif one.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(one.name, loc="left", size=8, color=INK, parse_math=False)


def _order(word: str) -> tuple[bool, float, str]:
    """Sort numbers by size, and words after them."""
    try:
        return False, float(word), ""
    except ValueError:
        return True, 0.0, word
