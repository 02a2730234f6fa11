"""Scaling laws in log-log: scores, law, band and extrapolation. Returns a matplotlib `Figure` built without pyplot."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from sslvision.figures.curves import BLUE, INK, MUTED, ORANGE, RULE, style
from sslvision.figures.fonts import drawable

PANEL = 3.5  # inches
MANTISSAS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
NARROW = 2.0  # ratio of the ends of an axis below which even steps make better ticks


class Panel(NamedTuple):
    """One axis of a ladder.

    Attributes:
        axis: Name of what is scaled.
        x, y, sigma: Scores and their standard errors.
        curve: Points (x, law, low, high), ascending; those beyond the largest x are extrapolated.
        irreducible: The irreducible term, with its interval; None where it is not determined.
        exponent: The exponent, with its interval; None where no fall is told from noise: only the scores are drawn.
        believed: Whether the law is to be believed.
    """

    axis: str
    x: Sequence[float]
    y: Sequence[float]
    sigma: Sequence[float]
    curve: Sequence[tuple[float, float, float, float]]
    irreducible: tuple[float, float, float] | None
    exponent: tuple[float, float, float] | None
    believed: bool


def scaling_figure(panels: Sequence[Panel], *, score: str, title: str) -> Figure:
    """Return a panel for each axis, with one vertical axis for all.

    Scores have intervals of 95 % over test sets. The band is the interval of 95 % of the law.

    Args:
        panels: What to draw.
        score: Name of the score, with its unit.
        title: Title of the figure.
    """
    figure = Figure(figsize=(0.6 + PANEL * len(panels), 4.2), dpi=150, layout="constrained", facecolor="white")
    title, families = drawable(title)
    figure.suptitle(title, x=0.01, ha="left", size=10, color=INK, weight="bold", parse_math=False, family=families)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        _draw(axes, panel)
    row[0].set_ylabel(score)
    _place_y_ticks(row[0], panels)
    legend = {label: handle for axes in row for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower left",
        ncols=5,
        frameon=False,
        fontsize=8,
        labelcolor=MUTED,
    )
    return figure


def _draw(axes: Axes, panel: Panel) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    style(axes)
    axes.grid(axis="x", color=RULE, lw=0.5)
    largest = max(panel.x)
    x, law, low, high = np.array(panel.curve).T
    if panel.exponent is not None:
        axes.fill_between(x, np.maximum(low, 1e-9), high, color=BLUE, alpha=0.15, lw=0, label="95 % of the law")
        measured = x <= largest
        axes.plot(x[measured], law[measured], color=BLUE, lw=1.6, label="law")
        axes.plot(x[~measured], law[~measured], color=BLUE, lw=1.6, ls=(0, (4, 2)), label="extrapolated to 10 times")
        axes.annotate(
            f"{law[-1]:.3g}", (x[-1], law[-1]), xytext=(-2, 12), textcoords="offset points", size=8, color=BLUE,
            weight="bold", ha="right", va="bottom",
        )  # fmt: skip
    if panel.irreducible is not None:
        axes.axhline(panel.irreducible[0], color=ORANGE, lw=1.2, label="irreducible term")
    axes.errorbar(
        panel.x, panel.y, 1.96 * np.array(panel.sigma),
        fmt="o", color=INK, ms=4, elinewidth=1, capsize=2, label="measured, 95 % over test sets", zorder=3,
    )  # fmt: skip
    axes.set_title(_verdict(panel), loc="left", size=8, color=MUTED)
    axes.set_xlabel(panel.axis)
    drawn_to = x[-1] if panel.exponent is not None else largest
    margin = (drawn_to / x[0]) ** 0.04
    # Not autoscaled: matplotlib 3.9 would include the beginning of a horizontal line.
    axes.set_xlim(x[0] / margin, drawn_to * margin)
    powers = range(math.floor(math.log10(x[0])), math.ceil(math.log10(drawn_to)) + 1)
    mantissas = (1, 3) if drawn_to > 30 * x[0] else (1, 2, 5)
    ticks = [mantissa * 10.0**power for power in powers for mantissa in mantissas]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if x[0] <= tick <= drawn_to] or [largest]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: _short(tick)))
    axes.xaxis.set_minor_locator(NullLocator())


def _verdict(panel: Panel) -> str:
    """Return what to think of a law, in two lines."""
    if panel.exponent is None:
        return "no fall is told from noise:\nthere is no law"
    value, least, most = panel.exponent
    return f"exponent {value:.2f} ({least:.2f} to {most:.2f})\n{'passed its tests' if panel.believed else 'not to be believed'}"


def _place_y_ticks(axes: Axes, panels: Sequence[Panel]) -> None:
    """Limit the axis to scores and laws, whatever the width of a band, with ticks that are round numbers."""
    seen: list[float] = []
    for panel in panels:
        for y, sigma in zip(panel.y, panel.sigma, strict=True):
            seen += [y, max(y - 1.96 * sigma, y / 2), min(y + 1.96 * sigma, 2 * y)]
        seen += [point[1] for point in panel.curve] if panel.exponent is not None else []
        seen += [panel.irreducible[0]] if panel.irreducible is not None else []
    low, high = min(one for one in seen if one > 0), max(seen)
    margin = max(1.02, (high / low) ** 0.06)
    low, high = low / margin, high * margin
    axes.set_ylim(low, high)
    if high / low < NARROW:
        ticks = list(MaxNLocator(8, steps=[1, 2, 5, 10]).tick_values(low, high))
    else:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [mantissa * 10.0**power for power in powers for mantissa in MANTISSAS]
    kept: list[float] = []
    for tick in ticks:
        if low <= tick <= high and (not kept or math.log(tick / kept[-1]) > 0.06 * math.log(high / low)):
            kept.append(tick)
    axes.yaxis.set_major_locator(FixedLocator(kept))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:.3g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _short(number: float) -> str:
    """Return a number as people write it on axes: 10 k, 3 M."""
    for unit, word in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:g}{word}"
    return f"{number:g}"
