"""A map of images in the report: dots colored by class, and the image beside the pointer."""

from collections.abc import Mapping, Sequence
from html import escape

from sslvision.figures.report_charts import SIDE, as_attribute

COLORS = 10  # that have names in report.css; more classes get hues of their own
MOST_NAMED = 40  # classes in the legend
MARGIN, FLATTEST = 30, 300  # units of the drawing
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
    placed, height = _placed(layouts)
    dot = max(8, min(18, round(300 / len(names) ** 0.5)))
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
        "height": height,
        "columns": columns,
        "rows": -(-len(names) // columns),
    }
    return (
        f'<figure class="map" data-map="{as_attribute(data)}"><div class="controls">{choices}</div><div class="space">'
        f'<svg viewBox="0 0 {SIDE} {height}" style="--dot:{dot}" role="img" aria-label="Map of {len(names)} images">'
        f"{''.join(groups)}</svg>"
        '<div class="ring"></div><div class="tip" role="status">'
        f'<div class="thumb" style="background-image:url({sheet})"></div>'
        f'<div class="told"></div></div></div><ul class="legend">{legend}{more}</ul>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _placed(layouts: Mapping[str, Points]) -> tuple[dict[str, Points], int]:
    """Return the points in units of the drawing, both axes at the same scale, and its height, the least that holds them all."""
    scaled = {}
    for name, points in layouts.items():
        xs, ys = zip(*points, strict=True)
        reach = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0
        center, scale = ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2), (SIDE - 2 * MARGIN) / reach
        scaled[name] = [(scale * (x - center[0]), scale * (center[1] - y)) for x, y in points]
    height = max(FLATTEST, *(round(2 * max(y for _, y in points)) + 2 * MARGIN for points in scaled.values()))
    return {
        name: [(round(SIDE / 2 + x, 1), round(height / 2 + y, 1)) for x, y in points] for name, points in scaled.items()
    }, height


def _dots(points: Points, labels: Sequence[int], label: int) -> str:
    kept = points if label < 0 else [point for point, own in zip(points, labels, strict=True) if own == label]
    return "".join(f"M{x:g} {y:g}h.01" for x, y in kept)


def _color(label: int, classes: int) -> str:
    if classes <= COLORS:
        return f'class="c{max(label, 0)}"'
    return f'style="--c:hsl({360 * label / classes:.0f} 60% 55%)"'
