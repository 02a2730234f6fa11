"""Pictures of scores: what is taken for what, and what labels buy.

Both return a matplotlib `Figure` built without pyplot, laid out in inches by measuring the texts that stand in it.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypedDict

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation, Transform
from torch import Tensor

from sslvision.figures.curves import BLUE, GREEN, INK, MUTED, ORANGE, RULE, WIDTH, _style

RIGHT = LinearSegmentedColormap.from_list("right", ["#e3ecf5", BLUE])
MISTAKEN = LinearSegmentedColormap.from_list("mistaken", ["#ffffff", ORANGE])
EMPTY = "#eeeeee"  # rows of classes without test images
NUMBERED, NAMED = 20, 40  # up to so many classes have numbers in the cells, and names beside them

ARMS = {"from scratch": MUTED, "frozen features": GREEN, "partial": ORANGE, "full": BLUE}


class Cell(TypedDict):
    """How well one way of transfer (an arm) does with so many labels: mean and standard deviation of top-1 in percent."""

    arm: str
    labels_per_class: int | Literal["all"]
    images: int  # labeled ones, of all classes together
    mean: float
    deviation: float  # over the seeds; without meaning where there is one
    seeds: int


class Point(NamedTuple):
    """A cell as it is drawn."""

    x: float  # labeled images per class
    mean: float
    deviation: float  # 0 where there is one seed


def confusion_figure(confusion: Tensor, class_names: Sequence[str], *, title: str) -> Figure:
    """Return the share of each true class's images (row) that was given each class (column), in percent.

    `confusion` is (C, C) counts. The diagonal, what is right, is blue; mistakes are orange, on a scale of their own, so
    that few show beside many right ones. Up to 20 classes the percents stand in the cells; above that there are bars of
    the accuracy of each class. Above 40 classes are numbered, not named. Rows without test images are gray.
    """
    C = len(confusion)
    counts = confusion.double().cpu().numpy()
    images = counts.sum(1, keepdims=True)
    percent = np.divide(100 * counts, images, out=np.full_like(counts, np.nan), where=images > 0)
    names = [name if len(name) <= 24 else f"{name[:13].rstrip()}…{name[-10:].lstrip()}" for name in class_names]

    size = 8.0 if C <= NUMBERED else 6.5
    side = min(5.2, max(1.8, 0.55 * C))  # inches
    longest = max(_inches(name, size) for name in names) if C <= NAMED else 0.2
    flat = longest < 0.9 * side / C
    left, top = 0.4 + longest, 0.65
    bottom = 0.55 if flat or C > NAMED else 0.5 + longest * (0.75 if C <= NUMBERED else 1)
    right = 0.15 if C <= NUMBERED else 2.0
    subtitle = "% of the true class's images: blue right, orange mistaken"
    width = max(left + side + right, 0.25 + _inches(title, 10, bold=True), 0.25 + _inches(subtitle, 8))
    height = bottom + side + top
    # Two pixels to a cell at least: no mistake falls between them.
    figure = Figure(figsize=(width, height), dpi=max(150, 2 * C / side), facecolor="white")
    _titles(figure, title, subtitle)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height), facecolor=EMPTY)
    norm = _paint(axes, percent)
    if C <= NAMED:
        _name_classes(axes, names, size=size, angle=0 if flat else 45 if C <= NUMBERED else 90)
    else:
        axes.tick_params(colors=MUTED, labelsize=8, length=0)
        axes.set_xlabel("predicted class, by number", size=9, color=INK)
        axes.set_ylabel("true class, by number", size=9, color=INK)
    if C <= NUMBERED:
        _write_percents(axes, percent, norm)
    else:
        x = left + side + 0.12
        bars = figure.add_axes((x / width, bottom / height, 0.8 / width, side / height), sharey=axes)
        _draw_accuracies(bars, percent.diagonal(), size=size if C <= NAMED else None)
        box = ((x + 1.35) / width, (bottom + 0.65 * side) / height, 0.1 / width, 0.35 * side / height)
        scale = figure.colorbar(ScalarMappable(norm, MISTAKEN), cax=figure.add_axes(box), ticks=MaxNLocator(4))
        scale.ax.tick_params(colors=MUTED, labelsize=8, length=0)
        scale.set_label("mistaken (%)", size=8, color=INK)
        scale.outline.set_edgecolor(RULE)
    return figure


def label_efficiency_figure(cells: Sequence[Cell], *, title: str, classes: int) -> Figure:
    """Return top-1 accuracy against labeled images per class, one line for each arm, on a logarithmic axis.

    "all" stands at its true number per class, images / `classes`. Bars are one deviation over the seeds up and down,
    where there is more than one; arms stand a little beside each other, so that theirs do not hide one another. Each
    line ends in its arm's name, and its value at the most labels. An arm has the same color whichever others there are.
    """
    lines: dict[str, list[Point]] = {arm: [] for arm in ARMS}
    for cell in cells:
        lines.setdefault(cell["arm"], []).append(_point(cell, classes))
    lines = {arm: sorted(line) for arm, line in lines.items() if line}
    most = max(line[-1].x for line in lines.values())
    texts = [f"{arm}  {line[-1].mean:.1f}" if line[-1].x == most else arm for arm, line in lines.items()]

    left, bottom, top, right = 0.65, 0.75, 0.65, 0.45 + max(_inches(text, 9, bold=True) for text in texts)
    height, panel = 4.4, (WIDTH - left - right, 4.4 - bottom - top)  # inches
    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    fewest, count = min(cell["seeds"] for cell in cells), max(cell["seeds"] for cell in cells)
    seeds = f"{count}" if fewest == count else f"{fewest} to {count}"
    _titles(figure, title, "one seed" if count == 1 else f"mean and standard deviation of {seeds} seeds")
    axes = figure.add_axes((left / WIDTH, bottom / height, panel[0] / WIDTH, panel[1] / height))
    _style(axes)
    beside = [
        axes.transData + ScaledTranslation((number - (len(lines) - 1) / 2) * 3 / 72, 0, figure.dpi_scale_trans)
        for number in range(len(lines))
    ]
    for place, (arm, line) in zip(beside, lines.items(), strict=True):
        x, means, deviations = np.array(line).T
        color = ARMS.get(arm, INK)
        axes.errorbar(
            x, means, deviations, color=color, lw=1.6, marker="o", ms=4, elinewidth=1, capsize=2, transform=place
        )
    points = [point for line in lines.values() for point in line]
    low = min(point.mean - point.deviation for point in points)
    high = max(point.mean + point.deviation for point in points)
    air = max(0.5, 0.06 * (high - low))
    axes.set_ylim(max(0.0, low - air), min(high + air, 100 + air / 2))
    axes.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.set_ylabel("top-1 (%)")
    axes.set_xlabel("labeled images per class")
    _place_labels(axes, cells, classes, inches=panel[0])
    _name_lines(axes, lines, texts, beside, points=72 * panel[1])
    return figure


def _inches(text: str, size: float, *, bold: bool = False) -> float:
    """How wide a text is drawn."""
    if not text.strip():
        return 0.0  # of which matplotlib makes no path
    font = FontProperties(weight="bold" if bold else "normal")
    return TextPath((0, 0), text.replace("$", "S"), size=size, prop=font).get_extents().width / 72


def _titles(figure: Figure, title: str, subtitle: str) -> None:
    width, height = figure.get_size_inches()
    x = 0.12 / width
    figure.text(x, 1 - 0.1 / height, title, size=10, color=INK, weight="bold", va="top", parse_math=False)
    figure.text(x, 1 - 0.32 / height, subtitle, size=8, color=MUTED, va="top")


def _paint(axes: Axes, percent: np.ndarray) -> PowerNorm:
    """Color the cells; return the scale of the mistakes, on which a square root shows the small ones."""
    right = np.eye(len(percent), dtype=bool)
    mistakes = np.where(right, np.nan, percent)
    norm = PowerNorm(
        0.5, vmin=0, vmax=np.nanmax(mistakes, initial=20)
    )  # a good classifier's do not look like a bad one's
    axes.imshow(mistakes, cmap=MISTAKEN, norm=norm, interpolation="nearest", aspect="auto")
    hits = np.where(right, percent, np.nan)
    axes.imshow(hits, cmap=RIGHT, vmin=0, vmax=100, interpolation="nearest", aspect="auto")
    for spine in axes.spines.values():
        spine.set_color(RULE)
    return norm


def _name_classes(axes: Axes, names: Sequence[str], *, size: float, angle: int) -> None:
    C = len(names)
    axes.set_xticks(range(C), names)
    axes.set_yticks(range(C), names)
    axes.tick_params(colors=INK, labelsize=size, length=0)
    for name in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        name.set_parse_math(False)
    for name in axes.get_xticklabels() if angle else []:
        name.set(rotation=angle, ha="right", va="top" if angle < 90 else "center", rotation_mode="anchor")
    axes.set_xticks(np.arange(1, C) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, C) - 0.5, minor=True)
    axes.grid(which="minor", color=RULE, lw=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("predicted class", size=9, color=INK)
    axes.set_ylabel("true class", size=9, color=INK)


def _write_percents(axes: Axes, percent: np.ndarray, norm: PowerNorm) -> None:
    """Write what does not round to zero into the cells."""
    digits, size = (1, 8) if len(percent) <= 10 else (0, 7)
    for (row, column), value in np.ndenumerate(percent):
        text = "" if np.isnan(value) else f"{value:.{digits}f}"
        if np.isnan(value) and row == column:
            text = "–"
        if not text or (row != column and float(text) == 0):
            continue
        color = RIGHT(value / 100) if row == column else MISTAKEN(norm(value))
        luminance = np.array(color[:3]) ** 2.2 @ (0.2126, 0.7152, 0.0722)
        color = "white" if luminance < 0.3 else INK  # at a contrast of 3 to 1 or more
        weight = "bold" if row == column else "normal"
        axes.text(column, row, text, size=size, color=color, weight=weight, ha="center", va="center")


def _draw_accuracies(axes: Axes, percent: np.ndarray, *, size: float | None) -> None:
    """Draw a bar for each class, with its number at its end if there is a `size` for it."""
    C = len(percent)
    axes.stairs(percent, np.arange(C + 1) - 0.5, orientation="horizontal", fill=True, color=BLUE)
    for row, value in enumerate(percent if size else []):
        text = "–" if np.isnan(value) else f"{value:.0f}"
        axes.text(np.nan_to_num(value) + 4, row, text, size=size, color=INK, va="center")
    _style(axes)
    axes.grid(visible=False, which="both")
    axes.tick_params(which="both", length=0)
    axes.set(xlim=(0, 100), xticks=(0, 50, 100))
    axes.tick_params(labelleft=False)
    axes.set_xlabel("right (%)", size=9)


def _point(cell: Cell, classes: int) -> Point:
    per_class = cell["labels_per_class"]
    x = cell["images"] / classes if per_class == "all" else float(per_class)
    return Point(x, cell["mean"], cell["deviation"] if cell["seeds"] > 1 else 0.0)


def _place_labels(axes: Axes, cells: Sequence[Cell], classes: int, *, inches: float) -> None:
    """Make x logarithmic and name the numbers of labels that were tried, those that have the room."""
    names = {_point(cell, classes).x: str(cell["labels_per_class"]) for cell in cells}
    air = max(max(names) / min(names), 2) ** (0.15 / inches)  # 0.15 inches, in which the arms stand beside each other
    low, high = min(names) / air, max(names) * air
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    shown: dict[float, str] = {}
    last = -np.inf
    for x in sorted(names):
        at = np.log(x / low) / np.log(high / low) * inches
        near = at - last < 0.33  # as wide as four digits
        if names[x] == "all":
            shown[x] = ("\n" if near else "") + f"all\n({x:,.0f})"
            last = at
        elif not near:
            shown[x] = names[x]
            last = at
    axes.set_xticks(list(shown), list(shown.values()))
    axes.minorticks_off()


def _name_lines(
    axes: Axes, lines: dict[str, list[Point]], texts: Sequence[str], indices: Sequence[Transform], *, points: float
) -> None:
    """Write each line's name to the right of the axes, near the height of its end, 12 points from the next."""
    bottom, top = axes.get_ylim()
    heights = spread([(line[-1].mean - bottom) / (top - bottom) for line in lines.values()], gap=12 / points)
    for (arm, line), text, place, height in zip(lines.items(), texts, indices, heights, strict=True):
        color = ARMS.get(arm, INK)
        axes.annotate(
            text, (line[-1].x, line[-1].mean), xycoords=place, xytext=(1.04, height), textcoords="axes fraction",
            size=9, color=color, weight="bold", va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "lw": 0.7, "alpha": 0.5, "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """Return the heights nearest to these (least squares) that are `gap` apart, in the same order, inside 0..1.

    z_i - i gap must not fall, so it is the isotonic regression of y_i - i gap, by the max-min formula (Barlow et al.
    1972), clipped to where all fit.
    """
    order = np.argsort(heights, kind="stable")
    n = len(order)
    y = np.asarray(heights, dtype=float)[order] - gap * np.arange(n)
    z = [max(min(y[j : k + 1].mean() for k in range(i, n)) for j in range(i + 1)) for i in range(n)]
    placed = np.empty(n)
    placed[order] = np.clip(z, 0, max(0.0, 1 - gap * (n - 1))) + gap * np.arange(n)
    return placed.tolist()
