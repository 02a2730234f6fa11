"""A sweep of rates: what short runs learned at each. Returns a matplotlib `Figure` built without pyplot."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from sslvision.figures.curves import BLUE, INK, MUTED, ORANGE, RULE, style
from sslvision.figures.fonts import drawable


def rate_figure(
    rates: Sequence[float],
    gains: Sequence[float],
    *,
    own: float,
    best: float | None,
    name: str,
    gained: str,
    title: str,
) -> Figure:
    """Return what was learned against the rate; runs that diverged or became worse are crosses at the bottom.

    Args:
        rates: The rates.
        gains: What each run learned; not finite where it diverged.
        own: The recipe's rate.
        best: The best rate.
        name: Name of the setting.
        gained: What is learned, with its unit.
        title: Title of the figure.
    """
    figure = Figure(figsize=(5.6, 3.4), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots()
    style(axes)
    title, families = drawable(title)
    axes.set_title(title, loc="left", size=10, color=INK, weight="bold", pad=16, parse_math=False, family=families)
    good = [(rate, gain) for rate, gain in zip(rates, gains, strict=True) if math.isfinite(gain) and gain >= 0]
    bad = [rate for rate, gain in zip(rates, gains, strict=True) if not (math.isfinite(gain) and gain >= 0)]
    top = max((gain for _, gain in good), default=1.0) or 1.0
    axes.set_xscale("log")
    axes.plot([rate for rate, _ in good], [gain for _, gain in good], color=BLUE, lw=1.6, marker="o", ms=4, zorder=3)
    if bad:
        axes.plot(bad, [0.0] * len(bad), ls="", marker="x", color=MUTED, ms=6, clip_on=False, zorder=4)
        axes.annotate(
            "diverged, or worse than before", (max(bad), 0), xytext=(0, 7), textcoords="offset points", ha="right", size=8,
            color=MUTED,
        )  # fmt: skip
    axes.axvline(own, color=RULE if own == best else INK, lw=1, ls=(0, (4, 3)))
    axes.annotate(
        f"recipe {own:.2g}",
        (own, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        size=8,
        color=INK,
    )
    if best is not None:
        value = dict(good)[best]
        axes.plot([best], [value], marker="o", ms=8, color=ORANGE, zorder=5)
        axes.annotate(
            f"{best:.2g}",
            (best, value),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            size=8,
            color=ORANGE,
            weight="bold",
        )
    axes.set_ylim(0, 1.2 * top)
    axes.set_xlabel(name)
    axes.set_ylabel(gained)
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(5))
    return figure
