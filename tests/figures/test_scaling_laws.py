"""The figure of scaling laws: what is drawn, where, and what it says."""

import numpy as np
import pytest
from drawings import assert_texts_stand_apart, drawn

from sslvision.figures.curves import ORANGE
from sslvision.figures.scaling_laws import Panel, scaling_figure

SIZES = 1000 * 2.0 ** np.arange(6)


def panel(axis="images", *, irreducible=(15.0, 12.0, 17.0), exponent=(0.4, 0.3, 0.5), believed=True, wide=1.0):
    x = np.geomspace(SIZES[0], 10 * SIZES[-1], 60)
    law = 15 + 10 * (x / SIZES[-1]) ** -0.4
    curve = list(zip(x, law, law - wide, law + wide, strict=True))
    y = 15 + 10 * (SIZES / SIZES[-1]) ** -0.4
    return Panel(axis, SIZES.tolist(), y.tolist(), [0.5] * 6, curve, irreducible, exponent, believed)


def lines(axes, style):
    return [line for line in axes.lines if line.get_linestyle() == style and line.get_color() != ORANGE]


def test_the_law_is_solid_where_it_was_measured_and_dashed_to_ten_times_the_largest():
    (axes,) = scaling_figure([panel()], score="error", title="").axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    solid = next(line for line in lines(axes, "-") if len(line.get_xdata()) > 6)
    (dashed,) = lines(axes, "--")
    assert max(solid.get_xdata()) <= SIZES[-1] < min(dashed.get_xdata())
    assert max(dashed.get_xdata()) == pytest.approx(10 * SIZES[-1])


def test_scores_have_intervals_and_the_irreducible_term_is_a_line_only_where_it_is_determined():
    figure = scaling_figure([panel(), panel("updates", irreducible=None)], score="error", title="")
    for axes in figure.axes:
        _, _, (bars,) = axes.containers[0]
        low, high = bars.get_segments()[0][:, 1]
        assert high - low == pytest.approx(2 * 1.96 * 0.5)
    found = [[line.get_ydata()[0] for line in axes.lines if line.get_color() == ORANGE] for axes in figure.axes]
    assert found == [[15.0], []]


def test_titles_say_what_to_think_of_each_law():
    panels = [panel(), panel(believed=False), panel(irreducible=None, exponent=None, believed=False)]
    without = scaling_figure(panels[2:], score="error", title="").axes[0]
    assert [
        len(line.get_xdata()) for line in without.lines if line.get_marker() == "None" and len(line.get_xdata())
    ] == []
    assert len(without.texts) == 0
    titles = [axes.get_title("left") for axes in scaling_figure(panels, score="error", title="").axes]
    assert titles[0] == "exponent 0.40 (0.30 to 0.50)\npassed its tests"
    assert titles[1].endswith("not to be believed")
    assert titles[2] == "no fall is told from noise:\nthere is no law"


@pytest.mark.parametrize("wide", [1.0, 40.0])
def test_texts_stand_apart_and_scores_lie_inside_whatever_the_band(wide):
    figure = scaling_figure(
        [panel(axis, wide=wide) for axis in ("parameters", "images", "updates")], score="error", title="A"
    )
    assert_texts_stand_apart(figure)
    low, high = figure.axes[0].get_ylim()
    assert 5 < low < 18 < 55 < high < 100
    assert drawn(figure).std() > 5
