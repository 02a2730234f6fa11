"""Accuracy against the number of labels. Returns a matplotlib `Figure` built without pyplot."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation

from sslvision.figures.curves import BLUE, GREEN, INK, MUTED, ORANGE, WIDTH, style
from sslvision.figures.fonts import drawable

ARMS = {"from scratch": MUTED, "frozen features": GREEN, "partial": ORANGE, "full": BLUE}
TICK_DISTANCE = 0.07  # of the axis, that labels of ticks need


class Cell(TypedDict):
    """Top-1 accuracy in percent of one way of transfer (an arm) with one number of labels, over the seeds."""

    arm: str
    labels_per_class: int | Literal["all"]
    images: int  # labeled images of all classes together
    mean: float
    deviation: float  # standard deviation; ignored if there is one seed
    seeds: int
    test_images: int
    low: float  # 95 % interval of the mean over test sets of this size, in percent
    high: float


class Point(NamedTuple):
    """A cell as it is drawn."""

    x: float  # labeled images per class
    mean: float
    deviation: float  # 0 if there is one seed


def label_efficiency_figure(cells: Sequence[Cell], *, title: str, classes: int) -> Figure:
    """Return top-1 accuracy against labeled images per class, one line for each arm, on a logarithmic axis.

    Error bars are one standard deviation over the seeds up and down. Arms are shifted a little, so that their error bars do
    not hide one another. An arm has the same color in every figure.

    Args:
        cells: What to draw.
        title: Title of the figure.
        classes: Number of classes; "all" labels are drawn at images / classes.
    """
    lines: dict[str, list[Point]] = {arm: [] for arm in ARMS}
    for cell in cells:
        lines.setdefault(cell["arm"], []).append(_point(cell, classes))
    lines = {arm: sorted(line) for arm, line in lines.items() if line}
    figure = Figure(figsize=(WIDTH, 4.4), dpi=150, layout="constrained", facecolor="white")
    title, families = drawable(title)
    figure.suptitle(title, x=0.02, ha="left", size=10, color=INK, weight="bold", parse_math=False, family=families)
    axes = figure.subplots()
    most = max(line[-1].x for line in lines.values())
    axes.set_title(f"{about_seeds(cells)}\n{about_test_images(cells)}", loc="left", size=8, color=MUTED)
    style(axes)
    for number, (arm, line) in enumerate(lines.items()):
        shift = (number - (len(lines) - 1) / 2) * 3 / 72  # inches
        x, means, deviations = np.array(line).T
        axes.errorbar(
            x, means, deviations,
            label=f"{arm}  {line[-1].mean:.1f}" if line[-1].x == most else arm,
            color=ARMS.get(arm, INK), lw=1.6, marker="o", ms=4, elinewidth=1, capsize=2,
            transform=axes.transData + ScaledTranslation(shift, 0, figure.dpi_scale_trans),
        )  # fmt: skip
    points = [point for line in lines.values() for point in line]
    low = min(point.mean - point.deviation for point in points)
    high = max(point.mean + point.deviation for point in points)
    margin = max(0.5, 0.06 * (high - low))
    axes.set_ylim(max(0.0, low - margin), min(high + margin, 100 + margin / 2))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.set_ylabel("top-1 (%)")
    axes.set_xlabel("labeled images per class")
    _place_ticks(axes, cells, classes)
    _place_legend(figure, axes, lines)
    return figure


def about_seeds(cells: Sequence[Cell]) -> str:
    """Return in words how many trainings a value is the mean of."""
    fewest, most = min(cell["seeds"] for cell in cells), max(cell["seeds"] for cell in cells)
    if most == 1:
        return "one seed"
    return f"mean and standard deviation of {most if fewest == most else f'{fewest} to {most}'} seeds"


def about_test_images(cells: Sequence[Cell]) -> str:
    """Return in words what so many test images tell, by the interval of the best value."""
    best = max(cells, key=lambda cell: cell["mean"])
    return (
        f"{best['test_images']:,} test images: {best['mean']:.1f} % has the 95 % interval {best['low']:.1f} to "
        f"{best['high']:.1f} %"
    )


def _point(cell: Cell, classes: int) -> Point:
    per_class = cell["labels_per_class"]
    x = cell["images"] / classes if per_class == "all" else float(per_class)
    return Point(x, cell["mean"], cell["deviation"] if cell["seeds"] > 1 else 0.0)


def _place_ticks(axes: Axes, cells: Sequence[Cell], classes: int) -> None:
    """Make x logarithmic, with a tick at each number of labels; of those too close together, at the greater one."""
    names = {_point(cell, classes).x: str(cell["labels_per_class"]) for cell in cells}
    margin = max(max(names) / min(names), 2) ** 0.03
    low, high = min(names) / margin, max(names) * margin
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks: dict[float, str] = {}
    for x in sorted(names, reverse=True):
        if not ticks or np.log(min(ticks) / x) > TICK_DISTANCE * np.log(high / low):
            ticks[x] = f"all\n({x:,.0f})" if names[x] == "all" else names[x]
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()


def _place_legend(figure: Figure, axes: Axes, lines: dict[str, list[Point]]) -> None:
    """Name the arms to the right of the axes, from the best to the worst, with the value at the greatest number of labels."""
    entries = zip(*axes.get_legend_handles_labels(), lines.values(), strict=True)
    handles, labels, _ = zip(*sorted(entries, key=lambda entry: -entry[2][-1].mean), strict=True)
    legend = figure.legend(
        handles, labels, title="top-1 with the most labels", title_fontsize=8,
        loc="outside right upper", frameon=False, fontsize=9, labelcolor="linecolor",
    )  # fmt: skip
    legend.get_title().set_color(MUTED)
