"""The confusion matrix of a classifier. Returns a matplotlib `Figure` built without pyplot."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sslvision.figures.curves import BLUE, INK, MUTED, ORANGE, RULE, WIDTH, style
from sslvision.figures.fonts import drawable, escaped, families_for

CORRECT = LinearSegmentedColormap.from_list("correct", ["#e3ecf5", BLUE])
MISTAKEN = LinearSegmentedColormap.from_list("mistaken", ["#ffffff", ORANGE])
EMPTY = "#eeeeee"  # rows of classes without test images
LONGEST_NAME = 24  # letters; half as many of Chinese, Japanese and Korean, which are twice as wide
NUMBERED, NAMED = 20, 40  # up to so many classes have percentages in their cells, and names on the axes


def save_confusion(confusion: Tensor, class_names: Sequence[str], file: Path, *, title: str) -> str:
    """Save the figure, and return what the user should know about it: usually nothing.

    Where no installed font has the letters of a name, the figure has its number instead, and a text file beside it has the
    names by number.
    """
    confusion_figure(confusion, class_names, title=title).savefig(file)
    legend, undrawable = file.with_suffix(".txt"), undrawable_names(class_names)
    if not undrawable:
        legend.unlink(missing_ok=True)  # of an earlier figure
        return ""
    lines = [f"#{number} {escaped(name)}\n" for number, name in enumerate(class_names)]
    legend.write_text("".join(lines), encoding="utf-8")
    letters = " ".join(sorted(set().union(*undrawable.values()))[:10])
    return (
        f"No installed font can draw {len(undrawable)} of {len(class_names)} class names ({letters}), so {file.name} has "
        f"numbers for them; {legend.name} has the names. With a font for them, such as Noto Sans, the figure has the names."
    )


def undrawable_names(class_names: Sequence[str]) -> dict[int, set[str]]:
    """Return the numbers of the classes whose names no installed font can draw, and the letters in question."""
    if len(class_names) > NAMED:
        return {}
    _, missing = families_for(escaped(name) for name in class_names)
    return {number: letters for number, name in enumerate(class_names) if (letters := missing & set(escaped(name)))}


def confusion_figure(confusion: Tensor, class_names: Sequence[str], *, title: str) -> Figure:
    """Return the percentage of each true class's images (row) that was predicted as each class (column).

    The diagonal, correct predictions, is blue. Mistakes are orange, on a scale of their own, so that few of them remain
    visible. Up to 20 classes the cells contain percentages; with more, bars show the accuracy of each class. With more than
    40, the classes are numbered instead of named. Rows without test images are gray.

    Args:
        confusion: Counts, (C, C).
        class_names: C names. Long ones are shortened in the middle; "#3" stands for one that no installed font can draw.
        title: Title of the figure.
    """
    C = len(confusion)
    counts = confusion.double().cpu().numpy()
    images = counts.sum(1, keepdims=True)
    percent = np.divide(100 * counts, images, out=np.full_like(counts, np.nan), where=images > 0)
    undrawable = undrawable_names(class_names)
    names = [f"#{at}" if at in undrawable else _shortened(escaped(name)) for at, name in enumerate(class_names)]

    height = 2.6 + 0.4 * min(C, 10)  # inches
    # At least two pixels per cell, so that no mistake is lost.
    figure = Figure(figsize=(WIDTH, height), dpi=max(150, C / 1.8), layout="constrained", facecolor="white")
    title, families = drawable(title)
    figure.suptitle(title, x=0.02, ha="left", size=10, color=INK, weight="bold", parse_math=False, family=families)
    with_bars = C > NUMBERED
    axes, *bars = figure.subplots(
        1, 1 + with_bars, sharey=True, squeeze=False, width_ratios=[6, 1] if with_bars else None
    )[0]
    axes.set_facecolor(EMPTY)
    norm = _paint(axes, percent)
    subtitle = "% of the true class: blue correct, orange mistaken"
    axes.set_title(subtitle, loc="left", size=8, color=MUTED)
    if C <= NAMED:
        _name_classes(axes, names)
    else:
        axes.tick_params(colors=MUTED, labelsize=8, length=0)
        axes.set_xlabel("predicted class, by number", size=9, color=INK)
        axes.set_ylabel("true class, by number", size=9, color=INK)
    if not with_bars:
        _write_percentages(axes, percent, norm)
        return figure
    _draw_accuracies(bars[0], percent.diagonal(), with_numbers=C <= NAMED)
    scale = figure.colorbar(ScalarMappable(norm, MISTAKEN), ax=bars, shrink=0.4, aspect=12, ticks=MaxNLocator(4))
    scale.ax.tick_params(colors=MUTED, labelsize=8, length=0)
    scale.set_label("mistaken (%)", size=8, color=INK)
    scale.outline.set_edgecolor(RULE)
    return figure


def _shortened(name: str) -> str:
    longest = LONGEST_NAME // 2 if _columns(name) > len(name) else LONGEST_NAME
    if len(name) <= longest:
        return name
    return f"{name[: longest // 2 + 1].rstrip()}…{name[-(longest // 2 - 2) :].lstrip()}"


def _columns(name: str) -> int:
    """Return the width of a name in Latin letters."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in name)


def _paint(axes: Axes, percent: np.ndarray) -> PowerNorm:
    """Color the cells; return the scale of the mistakes: a square root, so that small ones are visible."""
    diagonal = np.eye(len(percent), dtype=bool)
    mistakes = np.where(diagonal, np.nan, percent)
    # At least 20 %: the mistakes of a good classifier must not look like those of a bad one.
    norm = PowerNorm(0.5, vmin=0, vmax=np.nanmax(mistakes, initial=20))
    axes.imshow(mistakes, cmap=MISTAKEN, norm=norm, interpolation="nearest", aspect="auto")
    correct = np.where(diagonal, percent, np.nan)
    axes.imshow(correct, cmap=CORRECT, vmin=0, vmax=100, interpolation="nearest", aspect="auto")
    for spine in axes.spines.values():
        spine.set_color(RULE)
    return norm


def _name_classes(axes: Axes, names: Sequence[str]) -> None:
    C = len(names)
    axes.set_xticks(range(C), names)
    axes.set_yticks(range(C), names)
    axes.tick_params(colors=INK, labelsize=8 if C <= NUMBERED else 6.5, length=0)
    families, _ = families_for(names)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
        label.set_fontfamily(families)
    if C * max(map(_columns, names)) > 60:  # characters that fit into a line
        angle = 45 if C <= NUMBERED else 90
        for label in axes.get_xticklabels():
            label.set(rotation=angle, ha="right", va="top" if angle < 90 else "center", rotation_mode="anchor")
    axes.set_xticks(np.arange(1, C) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, C) - 0.5, minor=True)
    axes.grid(which="minor", color=RULE, lw=0.5)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("predicted class", size=9, color=INK)
    axes.set_ylabel("true class", size=9, color=INK)


def _write_percentages(axes: Axes, percent: np.ndarray, norm: PowerNorm) -> None:
    """Write the percentages into the cells, except those that round to zero."""
    digits, size = (1, 8) if len(percent) <= 10 else (0, 7)
    for (row, column), value in np.ndenumerate(percent):
        text = "" if np.isnan(value) else f"{value:.{digits}f}"
        if np.isnan(value) and row == column:
            text = "–"
        if not text or (row != column and float(text) == 0):
            continue
        color = CORRECT(value / 100) if row == column else MISTAKEN(norm(value))
        luminance = np.array(color[:3]) ** 2.2 @ (0.2126, 0.7152, 0.0722)
        color = "white" if luminance < 0.3 else INK  # a contrast of at least 3 to 1
        weight = "bold" if row == column else "normal"
        axes.text(column, row, text, size=size, color=color, weight=weight, ha="center", va="center")


def _draw_accuracies(axes: Axes, percent: np.ndarray, *, with_numbers: bool) -> None:
    """Draw a bar for each class, with its value at its end if there is space."""
    C = len(percent)
    axes.stairs(percent, np.arange(C + 1) - 0.5, orientation="horizontal", fill=True, color=BLUE)
    for row, value in enumerate(percent if with_numbers else []):
        text = "–" if np.isnan(value) else f"{value:.0f}"
        axes.text(np.nan_to_num(value) + 4, row, text, size=6.5, color=INK, va="center")
    style(axes)
    axes.grid(visible=False, which="both")
    axes.tick_params(which="both", length=0)
    axes.set(xlim=(0, 150 if with_numbers else 100), xticks=(0, 100) if with_numbers else (0, 50, 100))
    axes.tick_params(labelleft=False)
    axes.set_xlabel("correct (%)", size=9)
