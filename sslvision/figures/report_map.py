"""A map of images in the report: dots colored by class, and the image beside the pointer."""

from collections.abc import Mapping, Sequence
from html import escape

from sslvision.figures.report_charts import SIDE, as_attribute

COLORS = 10  # that have names in report.css; more classes get hues of their own
MOST_NAMED = 40  # classes in the legend
MARGIN = 30  # units of the drawing
Points = Sequence[tuple[float, float]]


def map_figure(
    layouts: Mapping[str, Points],
    *,
    names: Sequence[str],
    labels: Sequence[int],
    classes: Sequence[str],
    sheet: str,
    columns: int,
    caption: str,
) -> str:
    """Return the figure of a map, the first layout shown.

    Args:
        layouts: Points of the images by the name of the layout.
        names: Names of the images.
        labels: Numbers of their classes; empty if they have none.
        classes: Names of the classes.
        sheet: Data URI of a sheet of square thumbnails, row by row.
        columns: Thumbnails in a row of it.
        caption: What the figure tells.
    """
    placed = {name: _placed(points) for name, points in layouts.items()}
    present = sorted(set(labels)) or [-1]
    groups = []
    for number, points in enumerate(placed.values()):
        paths = "".join(
            f'<path {_color(label, len(classes))} data-label="{label}" d="{_dots(points, labels, label)}"/>'
            for label in present
        )
        groups.append(f"<g{' hidden' if number else ''}>{paths}</g>")
    choices = "".join(
        f'<button type="button" aria-pressed="{"true" if number == 0 else "false"}">{escape(name)}</button>'
        for number, name in enumerate(placed)
    )
    legend = "".join(
        f'<li><button type="button" aria-pressed="false" data-label="{label}"><i {_color(label, len(classes))}></i>'
        f"{escape(classes[label])}</button></li>"
        for label in present[:MOST_NAMED]
        if label >= 0
    )
    more = f"<li>and {len(present) - MOST_NAMED} more classes</li>" if len(present) > MOST_NAMED else ""
    data = {
        "layouts": list(placed.values()),
        "labels": [*labels] or None,
        "classes": [*classes],
        "names": [*names],
        "columns": columns,
        "rows": -(-len(names) // columns),
    }
    return (
        f'<figure class="map" data-map="{as_attribute(data)}"><div class="controls">{choices}</div><div class="space">'
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="Map of {len(names)} images">{"".join(groups)}</svg>'
        '<div class="ring"></div><div class="tip" role="status">'
        f'<div class="thumb" style="background-image:url({sheet})"></div>'
        f'<div class="told"></div></div></div><ul class="legend">{legend}{more}</ul>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _placed(points: Points) -> list[tuple[float, float]]:
    """Return points in the square of the drawing, both axes at the same scale."""
    xs, ys = zip(*points, strict=True)
    reach = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0
    center = (max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2
    scale = (SIDE - 2 * MARGIN) / reach
    return [
        (round(SIDE / 2 + scale * (x - center[0]), 1), round(SIDE / 2 - scale * (y - center[1]), 1)) for x, y in points
    ]


def _dots(points: Points, labels: Sequence[int], label: int) -> str:
    kept = points if label < 0 else [point for point, own in zip(points, labels, strict=True) if own == label]
    return "".join(f"M{x:g} {y:g}h.01" for x, y in kept)


def _color(label: int, classes: int) -> str:
    if classes <= COLORS:
        return f'class="c{max(label, 0)}"'
    return f'style="--c:hsl({360 * label / classes:.0f} 60% 55%)"'
