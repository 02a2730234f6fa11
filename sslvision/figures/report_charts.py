"""Charts of the report: inline SVG that needs no script, and carries its values for the script that shows them on hover.

The drawing is stretched to the space there is, and its texts are HTML beside it, so that they stay readable on a phone.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Literal, NamedTuple

from sslvision.figures.report_axes import Axis, axis_around, axis_of_x, log_axis

MOST_POINTS = 500  # of a line; of more, means and the range between lowest and highest are drawn
SIDE = 1000  # units of the drawing along each axis
SMOOTHED_FROM = 60  # points


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        name: Name in legend and hover.
        x, y: The points; those that are not finite are left out.
        color: Number of its color.
        low, high: Ends of error bars, if there are any.
        smooth: Draw a running mean over the values, if there are many.
        style: "line" through the points, "dashed", or "dots" alone.
        band: Draw low and high as a band, not as error bars.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    low: Sequence[float] = field(default=())
    high: Sequence[float] = field(default=())
    smooth: bool = False
    style: Literal["line", "dashed", "dots"] = "line"
    band: bool = False


class Bar(NamedTuple):
    """A value with the ends of its interval, if it has one."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    color: int = 0


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    caption: str = "",
    references: Sequence[tuple[str, float]] = (),
    marks: Sequence[tuple[str, float]] = (),
    x_label: str = "epoch",
    x_ticks: Sequence[tuple[float, str]] = (),
    log_x: bool = False,
    log_y: bool = False,
    tall: bool = False,
) -> str:
    """Return a chart of lines as HTML; nothing if there is nothing to draw.

    Args:
        lines: What to draw.
        label: Name of the vertical axis, with its unit.
        caption: What the figure tells.
        references: Names and values of dashed horizontal lines.
        marks: Names and places of dashed vertical lines.
        x_label: Name of the horizontal axis.
        x_ticks: Its ticks, by default round numbers.
        log_x, log_y: Whether an axis is logarithmic; what is not above 0 has no place on it, and is left out.
        tall: Whether the figure is a main one.
    """
    drawn = [line for line in (_drawable(line, log_x=log_x, log_y=log_y) for line in lines) if len(line.x)]
    if not drawn:
        return ""
    heights = [v for line in drawn for v in (*line.y, *(() if line.band else (*line.low, *line.high)))]
    heights += [v for _, v in references]
    y_axis = log_axis([v for v in heights if v > 0], ticks=6) if log_y else axis_around(heights)
    widths = [x for line in drawn for x in line.x] + [place for _, place in marks]
    x_axis = axis_of_x(widths, x_ticks, log=log_x, from_zero=any(line.style != "dots" for line in drawn))
    shapes = [_grid(y_axis)]
    shapes += [_path("reference", f"M0 {_y(value, y_axis)}H{SIDE}") for _, value in references]
    shapes += [_path("reference", f"M{SIDE * x_axis.at(place):.1f} 0V{SIDE}") for _, place in marks]
    shown = []
    for line in drawn:
        thin = _thinned(line)
        shapes += _shapes(thin, x_axis, y_axis)
        shown.append(thin.line)
    told = f"{label}: " + "; ".join(f"{line.name} ends at {_short(line.y[-1])}" for line in drawn)
    data = {
        "x": [x_axis.low, x_axis.high],
        "y": [y_axis.low, y_axis.high],
        "log": log_x,
        "label": x_label,
        "ticks": [*x_ticks],
        "lines": [
            {"name": line.name, "color": line.color, "x": _rounded(line.x), "y": _rounded(line.y)} for line in shown
        ],
    }
    return (
        f'<figure class="chart{" tall" if tall else ""}" data-chart="{escape(json.dumps(data))}">'
        f'<div class="axis-name">{escape(label)}</div><div class="plot">'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" role="img" aria-label="{escape(told)}">'
        f"{''.join(shapes)}</svg>{_names_on(x_axis, y_axis, references, marks)}"
        f'<div class="cursor"></div><div class="tip" role="status"></div></div><div class="x-name">{escape(x_label)}</div>'
        f"{_legend(drawn)}{_caption(caption)}</figure>"
    )


def _names_on(
    x_axis: Axis, y_axis: Axis, references: Sequence[tuple[str, float]], marks: Sequence[tuple[str, float]]
) -> str:
    """Return what is written on a drawing: ticks, and the names of dashed lines."""
    written = [
        f'<span class="y-tick" style="top:{100 - 100 * y_axis.at(v):.2f}%">{text}</span>' for v, text in y_axis.ticks
    ]
    written += [
        f'<span class="x-tick" style="left:{100 * x_axis.at(v):.2f}%">{escape(t)}</span>' for v, t in x_axis.ticks
    ]
    for name, value in references:
        above = " above" if y_axis.at(value) < 0.12 else ""
        top = 100 - 100 * y_axis.at(value)
        text = f"{escape(name)} {_short(value)}"
        written.append(f'<span class="reference-name{above}" style="top:{top:.2f}%">{text}</span>')
    written += [
        f'<span class="mark-name{" left" if x_axis.at(place) > 0.5 else ""}" style="left:{100 * x_axis.at(place):.2f}%">'
        f"{escape(name)}</span>"
        for name, place in marks
    ]
    return "".join(written)


def interval_chart(bars: Sequence[Bar], *, label: str, caption: str = "", from_zero: bool = False) -> str:
    """Return values with their intervals, a row for each, on one axis; nothing if there are none."""
    if not bars:
        return ""
    ends = [end for bar in bars for end in (bar.value, *(bar.interval or ()))] + [0.0] * from_zero
    axis = axis_around(ends)
    rows = []
    for bar in bars:
        x = SIDE * axis.at(bar.value)
        shapes = _path("grid", "".join(f"M{SIDE * axis.at(v):.1f} 0V{SIDE}" for v, _ in axis.ticks))
        if from_zero:
            shapes += _path(f"thick c{bar.color}", f"M0 500H{x:.1f}")
        elif bar.interval:
            low, high = (SIDE * axis.at(end) for end in bar.interval)
            shapes += _path(f"whisker c{bar.color}", f"M{low:.1f} 500H{high:.1f}")
        if not from_zero:
            shapes += _path(f"big-dot c{bar.color}", f"M{x:.1f} 500h.01")
        interval = f" <small>{bar.interval[0]:.1f} to {bar.interval[1]:.1f}</small>" if bar.interval else ""
        rows.append(
            f'<div class="row"><span class="row-name">{escape(bar.name)}</span><div class="track">'
            f'<svg viewBox="0 0 {SIDE} {SIDE}" preserveAspectRatio="none" aria-hidden="true">{shapes}</svg></div>'
            f'<span class="row-value">{bar.value:.1f}{interval}</span></div>'
        )
    ticks = "".join(
        f'<span class="x-tick" style="left:{100 * axis.at(v):.2f}%">{text}</span>' for v, text in axis.ticks
    )
    return (
        f'<figure class="intervals"><div class="axis-name">{escape(label)}</div>{"".join(rows)}'
        f'<div class="row"><span class="row-name"></span><div class="track ticks">{ticks}</div>'
        f'<span class="row-value"></span></div>{_caption(caption)}</figure>'
    )


class _Thinned(NamedTuple):
    """A line of few enough points, and the lowest and highest values around each."""

    line: Line
    low: Sequence[float]
    high: Sequence[float]


def _thinned(line: Line) -> _Thinned:
    if len(line.x) <= MOST_POINTS:
        return _Thinned(line, (), ())
    size = math.ceil(len(line.x) / MOST_POINTS)
    parts = [range(start, min(start + size, len(line.x))) for start in range(0, len(line.x), size)]
    y = [math.fsum(line.y[i] for i in part) / len(part) for part in parts]
    x = [math.fsum(line.x[i] for i in part) / len(part) for part in parts]
    low, high = ([f(line.y[i] for i in part) for part in parts] for f in (min, max))
    return _Thinned(replace(line, x=x, y=y, low=(), high=()), low, high)


def _shapes(thinned: _Thinned, x_axis: Axis, y_axis: Axis) -> list[str]:
    """Return the drawing of a line: the range of its values or the values themselves, a running mean, dots if there are few."""
    line, color = thinned.line, f"c{thinned.line.color}"
    at = [f"{SIDE * x_axis.at(x):.1f}" for x in line.x]

    def path(values: Iterable[float]) -> str:
        return "M" + "L".join(f"{x} {_y(value, y_axis)}" for x, value in zip(at, values, strict=True))

    shapes = []
    low, high = (line.low, line.high) if line.band else (thinned.low, thinned.high)
    if low:
        back = "L".join(f"{x} {_y(v, y_axis)}" for x, v in zip(reversed(at), reversed(low), strict=True))
        shapes.append(_path(f"band {color}", f"{path(high)}L{back}Z"))
    smooth = line.smooth and len(line.x) >= SMOOTHED_FROM
    if smooth and not thinned.low:
        shapes.append(_path(f"raw {color}", path(line.y)))
    if len(line.x) > 1 and line.style != "dots":  # a single value is a dot, below
        kind = "line dashed" if line.style == "dashed" else "line"
        shapes.append(_path(f"{kind} {color}", path(_smoothed(line.y) if smooth else line.y)))
    if line.low and not line.band:
        ends = zip(at, line.low, line.high, strict=True)
        shapes.append(_path(f"error {color}", "".join(f"M{x} {_y(a, y_axis)}V{_y(b, y_axis)}" for x, a, b in ends)))
    if line.style == "dots" or (len(line.x) < SMOOTHED_FROM and not line.band):
        shapes.append(
            _path(f"dots {color}", "".join(f"M{x} {_y(v, y_axis)}h.01" for x, v in zip(at, line.y, strict=True)))
        )
    return shapes


def _smoothed(y: Sequence[float]) -> list[float]:
    """Return a Gaussian running mean over about 1/40 of the points, renormalized at the ends."""
    sigma = len(y) / 80
    reach = math.ceil(3 * sigma)
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
    found = []
    for center in range(len(y)):
        pairs = [
            (weights[i - center + reach], y[i]) for i in range(max(0, center - reach), min(len(y), center + reach + 1))
        ]
        found.append(math.fsum(w * v for w, v in pairs) / math.fsum(w for w, _ in pairs))
    return found


def _drawable(line: Line, *, log_x: bool, log_y: bool) -> Line:
    """Return a line without the points that are not finite, or have no place on a logarithmic axis."""

    def placed(value: float, log: bool) -> bool:
        return math.isfinite(value) and (value > 0 or not log)

    pairs = enumerate(zip(line.x, line.y, strict=True))
    kept = [i for i, (x, y) in pairs if placed(x, log_x) and placed(y, log_y)]
    x, y, low, high = ([values[i] for i in kept] if values else () for values in (line.x, line.y, line.low, line.high))
    return replace(line, x=x, y=y, low=low, high=high)


def _short(value: float) -> str:
    return f"{value:.4g}"


def _rounded(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _y(value: float, axis: Axis) -> str:
    """Return the height of a value; of ends of bands and bars beyond the axis, that of its end."""
    return f"{SIDE * (1 - axis.at(min(max(value, axis.low), axis.high))):.1f}"


def _grid(y_axis: Axis) -> str:
    return _path("grid", "".join(f"M0 {_y(value, y_axis)}H{SIDE}" for value, _ in y_axis.ticks) or f"M0 {SIDE}H{SIDE}")


def _path(kind: str, d: str) -> str:
    return f'<path class="{kind}" d="{d}"/>'


def _legend(lines: Sequence[Line]) -> str:
    if len(lines) < 2:
        return ""
    entries = "".join(f'<li><i class="c{line.color}"></i>{escape(line.name)}</li>' for line in lines)
    return f'<ul class="legend">{entries}</ul>'


def _caption(text: str) -> str:
    return f"<figcaption>{escape(text)}</figcaption>" if text else ""


def as_attribute(data: Any) -> str:
    """Return data as JSON in an HTML attribute."""
    return escape(json.dumps(data, separators=(",", ":"), ensure_ascii=False))
