"""Pictures of filters and of receptive fields."""

import numpy as np
import pytest
import torch
from drawings import assert_texts_stand_apart, drawn

from sslvision.figures.fields import Panel, field_figure
from sslvision.figures.filters import CELL, filters_figure


@pytest.mark.parametrize(("count", "side"), [(1, 3), (64, 16)])
def test_texts_are_inside_the_picture_and_apart_however_few_filters_there_are(count, side):
    filters, run = torch.randn(count, 3, side, side), r"a run with $\a long name$, of 2026-11-27"
    groups = [(heading, filters) for heading in (f"before, init_from={run}", "trained", "trained longer")]
    assert_texts_stand_apart(filters_figure(groups, title=run, about="stem.conv: " + "words of " * 9))


def test_a_weight_is_a_whole_number_of_pixels_and_zero_is_gray():
    filters = torch.zeros(1, 3, 2, 2)
    filters[0, 0, 0, 0] = 5.0  # the largest: red is 1, the others are 0.5
    picture = drawn(filters_figure([("one", filters)], title="a", about="b"))
    red, side = (picture[..., 0] == 255) & (abs(picture[..., 1:].astype(int) - 127.5) < 1).all(axis=2), CELL // 2
    rows, columns = np.nonzero(red)
    assert len(rows) == side * side
    assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (side, side)


def test_the_squares_of_a_field_are_around_its_center():
    panel = Panel("a", torch.rand(20, 30), (9.5, 14.5), 4, 10, (16, 18), whole=False)
    (axes,) = field_figure([panel]).axes
    found = [(patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches]
    assert found == [((13.0, 8.0), 4, 4), ((10.0, 5.0), 10, 10), ((6.0, 2.0), 18, 16)]
    assert "theory: 16x18" in axes.get_xlabel()
