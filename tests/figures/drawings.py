"""What the tests of figures share: drawing, and finding texts that overlap."""

from io import BytesIO
from itertools import combinations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image


def drawn(figure: Figure) -> np.ndarray:
    """Draw a figure, which settles its layout too."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def texts(figure: Figure) -> list[Text]:
    """Every text that is seen and stands straight."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in figure.axes:
        found += [*axes.texts, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=False)
            found += [label for at, label in shown if low <= at <= high]
    return [text for text in found if text.get_text() and text.get_visible() and text.get_rotation() in (0, 90)]


def box(text: Text) -> Bbox:
    """The box of the letters: without an annotation's arrow, and without empty lines above."""
    whole, lines = Text.get_window_extent(text), text.get_text().split("\n")
    empty = next(number for number, line in enumerate(lines) if line)
    return Bbox([[whole.x0, whole.y0], [whole.x1, whole.y1 - whole.height * empty / len(lines)]])


def assert_texts_stand_apart(figure: Figure) -> None:
    drawn(figure)
    boxes = [(text.get_text(), box(text)) for text in texts(figure)]
    assert len(boxes) >= 5
    for (name, one), (other_name, other) in combinations(boxes, 2):
        assert not one.overlaps(other), (name, other_name)
    for name, one in boxes:
        assert min(one.x0, one.y0) >= 0, name
        assert one.x1 <= figure.bbox.x1, name
        assert one.y1 <= figure.bbox.y1, name
