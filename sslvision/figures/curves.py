"""Curves of a run: loss, accuracy, learning rate and everything else that was logged.

All return a matplotlib `Figure` built without pyplot, so that drawing needs no display and leaves no global state.
"""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sslvision.figures.fonts import drawable

INK, MUTED, RULE = "#222222", "#6b6b6b", "#d9d9d9"
BLUE, ORANGE, GREEN = "#2c6fab", "#c8641b", "#3d8256"
WIDTH = 7.0  # inches: the text width of a page


def learning_curve_figure(
    metrics: dict[str, list[float | None]],
    *,
    title: str,
    steps_per_epoch: int | None = None,
    untrained_knn: float | None = None,
    untrained_loss: float | None = None,
) -> Figure:
    """Return the loss, the accuracies during training (if any) and the learning rate against the epoch, in panels.

    `metrics` is what `read_metrics` returns, of which `step`, `epoch`, `loss`, `knn_top1` and `val_top1` (percent) and `lr`
    are used; panels without values are omitted. With `steps_per_epoch` the epoch is step / steps_per_epoch, a fraction.
    Untrained values are dashed reference lines.
    """
    wanted = {"loss": 3.0, "knn_top1": 1.9, "val_top1": 1.9, "lr": 1.0}  # relative heights
    curves = {name: _curve(metrics, name, steps_per_epoch) for name in wanted}
    heights = {name: height for name, height in wanted.items() if name == "loss" or len(curves[name][0])}
    figure = Figure(
        figsize=(WIDTH, 0.9 + 0.8 * sum(heights.values())), dpi=150, layout="constrained", facecolor="white"
    )
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=list(heights.values()))[:, 0]
    panel = dict(zip(heights, panels, strict=True))
    for axes in panels:
        style(axes)

    _plot_loss(panel["loss"], *curves["loss"])
    _reference(panel["loss"], untrained_loss, "untrained {:.4g}", curves["loss"][1])
    for name, label in (("knn_top1", "k-NN top-1 (%)"), ("val_top1", "validation\ntop-1 (%)")):
        if name in panel:
            x, y = curves[name]
            panel[name].plot(x, y, color=GREEN, lw=1.6, marker="o", ms=3.5 if len(x) < 60 else 0)
            panel[name].set_ylabel(label)
            _annotate_last(panel[name], y, "{:.1f}", GREEN)
    if "knn_top1" in panel:
        _reference(panel["knn_top1"], untrained_knn, "untrained {:.1f}", curves["knn_top1"][1])
    if "lr" in panel:
        _plot_learning_rate(panel["lr"], *curves["lr"])
    title, families = drawable(title)
    panels[0].set_title(title, loc="left", size=10, color=INK, weight="bold", pad=8, parse_math=False, family=families)
    panels[-1].set_xlabel("epoch")
    figure.align_ylabels(panels)
    return figure


def health_figure(metrics: dict[str, list[float | None]], *, title: str) -> Figure | None:
    """Return all other metrics of training (entropies, RankMe, ...) against the epoch, or None if there are none."""
    elsewhere = {"step", "epoch", "loss", "lr", "weight_decay"}
    curves = {
        name: _curve(metrics, name, None)
        for name in metrics
        if name not in elsewhere
        and not name.endswith(("_top1", "_top5"))
        and not name.startswith(("untrained", "pixels"))
    }
    curves = {name: (x, y) for name, (x, y) in curves.items() if len(x)}
    if not curves:
        return None
    figure = Figure(figsize=(WIDTH, 0.9 + 1.1 * len(curves)), dpi=150, layout="constrained", facecolor="white")
    panels = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, (x, y)) in zip(panels, curves.items(), strict=True):
        style(axes)
        axes.plot(x, y, color=BLUE, lw=1.4, marker="o" if len(x) < 20 else None, ms=3.5)
        axes.set_ylabel(name.replace("_", " ").replace(" ", "\n", 1))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        _annotate_last(axes, y, "{:.3g}", BLUE)
    title, families = drawable(title)
    panels[0].set_title(title, loc="left", size=10, color=INK, weight="bold", pad=8, parse_math=False, family=families)
    panels[-1].set_xlabel("epoch")
    figure.align_ylabels(panels)
    return figure


def _curve(
    metrics: dict[str, list[float | None]], name: str, steps_per_epoch: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the epochs at which `name` was logged, and its values."""
    at: Sequence[float | None] = metrics.get("epoch", [])
    if steps_per_epoch:
        at = [None if step is None else step / steps_per_epoch for step in metrics.get("step", [])]
    pairs = [(x, y) for x, y in zip(at, metrics.get(name, []), strict=False) if x is not None and y is not None]
    return np.array([x for x, _ in pairs]), np.array([y for _, y in pairs])


def _plot_loss(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    smooth = _smoothed(y)
    if smooth is not y:
        axes.plot(x, y, color=BLUE, lw=0.7, alpha=0.35)
    axes.plot(x, smooth, color=BLUE, lw=1.8)
    axes.set_ylabel("training loss")
    _annotate_last(axes, smooth, "{:.4g}", BLUE)


def _plot_learning_rate(axes: Axes, x: np.ndarray, y: np.ndarray) -> None:
    exponent = math.floor(math.log10(max(y.max(), 1e-30)))
    axes.plot(x, y / 10.0**exponent, color=ORANGE, lw=1.4)
    axes.set_ylabel(f"learning rate\n($10^{{{exponent}}}$)")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(3))


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Return a Gaussian running mean over about 1/40 of the run, renormalized at the ends and where values are not finite."""
    sigma = len(y) / 80
    if sigma < 0.5:
        return y
    reach = math.ceil(3 * sigma)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    finite = np.isfinite(y)
    total = np.convolve(np.where(finite, y, 0), kernel, mode="full")[reach:-reach]
    weight = np.convolve(finite.astype(float), kernel, mode="full")[reach:-reach]
    return np.where(finite, total / np.maximum(weight, 1e-12), np.nan)


def style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.grid(axis="y", color=RULE, lw=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=8, length=0)
    axes.xaxis.label.set(color=INK, size=9)
    axes.yaxis.label.set(color=INK, size=9)
    axes.margins(x=0.01)


def _reference(axes: Axes, value: float | None, text: str, curve: np.ndarray) -> None:
    """Draw a dashed line, with its label at the end where the curve is farther away."""
    if value is None:
        return
    axes.axhline(value, color=MUTED, lw=1, ls=(0, (4, 3)))
    left = len(curve) > 0 and abs(curve[0] - value) > abs(curve[-1] - value)
    below = value > sum(axes.get_ylim()) / 2
    axes.annotate(
        text.format(value), (0 if left else 1, value), xycoords=("axes fraction", "data"), textcoords="offset points",
        xytext=(4 if left else -4, -3 if below else 3), ha="left" if left else "right", va="top" if below else "bottom",
        size=8, color=MUTED,
    )  # fmt: skip


def _annotate_last(axes: Axes, y: np.ndarray, text: str, color: str) -> None:
    """Write the last value to the right of the axes, at its height."""
    if len(y) and np.isfinite(y[-1]):
        axes.annotate(
            text.format(y[-1]), (1, y[-1]), xycoords=("axes fraction", "data"), xytext=(4, 0),
            textcoords="offset points", size=8.5, color=color, va="center", weight="bold", annotation_clip=False,
        )  # fmt: skip
