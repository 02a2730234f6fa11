import math
from typing import Literal

import matplotlib
import numpy as np
import pytest
from drawings import assert_texts_stand_apart, drawn, texts
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from sslvision.figures.curves import BLUE, GREEN, MUTED, ORANGE
from sslvision.figures.label_efficiency import Cell, label_efficiency_figure

ARMS = ("from scratch", "frozen features", "partial", "full")


def cell(
    arm: str, labels: int | Literal["all"], images: int, mean: float, *, deviation: float = 2.0, seeds: int = 3
) -> Cell:
    seen = {"images": images, "mean": mean, "deviation": deviation, "seeds": seeds}
    return Cell(arm=arm, labels_per_class=labels, **seen, test_images=40, low=mean - 9, high=mean + 7)


def cells(values: dict[str, list[float]], labels: list[int], *, every: float | None = None) -> list[Cell]:
    """The cells of ten classes; `every` adds "all" at so many labels per class, with one seed."""
    found: list[Cell] = []
    for arm, means in values.items():
        for per_class, mean in zip(labels, means, strict=False):
            found.append(cell(arm, per_class, 10 * per_class, mean))
        if every and len(means) > len(labels):
            found.append(cell(arm, "all", round(10 * every), means[-1], deviation=math.nan, seeds=1))
    return found


def close(every: float = 6000) -> list[Cell]:
    """Four arms that end within a percent of one another."""
    rise = [40.0, 50, 60, 70, 80, 95]
    return cells(
        {arm: [y + 0.2 * n for y in rise] for n, arm in enumerate(reversed(ARMS))}, [1, 2, 5, 10, 50], every=every
    )


def curves(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    """Color -> the x and y of the line with that color."""
    found = {}
    for container in figure.axes[0].containers:
        line = container[0]
        found[to_hex(line.get_color())] = (list(line.get_xdata()), list(line.get_ydata()))
    return found


def test_an_arm_is_a_line_of_its_color_through_its_means() -> None:
    values = {
        "full": [50.0, 60.0],
        "from scratch": [30.0, 40.0],
        "partial": [55.0, 61.0],
        "frozen features": [52.0, 58.0],
    }
    figure = label_efficiency_figure(cells(values, [1, 10]), title="", classes=10)
    assert curves(figure) == {
        MUTED: ([1, 10], [30, 40]),
        GREEN: ([1, 10], [52, 58]),
        ORANGE: ([1, 10], [55, 61]),
        BLUE: ([1, 10], [50, 60]),
    }


def test_an_arm_keeps_its_color_when_others_are_missing() -> None:
    assert list(curves(label_efficiency_figure(cells({"full": [50.0]}, [5]), title="", classes=10))) == [BLUE]


def test_all_stands_at_its_true_number_per_class_on_a_logarithmic_axis() -> None:
    figure = label_efficiency_figure(cells({"full": [50.0, 60.0, 90.0]}, [1, 10], every=143.7), title="", classes=10)
    axes = figure.axes[0]
    assert axes.get_xscale() == "log"
    assert curves(figure)[BLUE][0] == [1, 10, 143.7]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["all\n(144)", "10", "1"]
    assert list(axes.get_xticks()) == [143.7, 10, 1]


def test_error_bars_are_one_deviation_long_and_absent_for_one_seed() -> None:
    figure = label_efficiency_figure(cells({"full": [50.0, 60.0, 90.0]}, [1, 10], every=100), title="", classes=10)
    _, _, (bars,) = figure.axes[0].containers[0]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[48, 52], [58, 62], [90, 90]]
    assert figure.axes[0].get_title("left") == (
        "mean and standard deviation of 1 to 3 seeds\n40 test images: 90.0 % has the 95 % interval 81.0 to 97.0 %"
    )


def test_points_of_arms_stand_beside_each_other_not_on_one_another() -> None:
    figure = label_efficiency_figure(cells({arm: [50.0, 60.0] for arm in ARMS}, [1, 10]), title="", classes=10)
    drawn(figure)
    lines = [container[0] for container in figure.axes[0].containers]
    at = sorted(line.get_transform().transform((10, 60))[0] for line in lines)
    assert np.diff(at) == pytest.approx([3 / 72 * 150] * 3)  # three points
    assert np.mean(at) == pytest.approx(figure.axes[0].transData.transform((10, 60))[0])


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_legend_has_the_name_of_each_arm_and_its_accuracy_with_the_most_labels() -> None:
    values = {"from scratch": [30.0, 40.0], "full": [70.0]}
    assert legend(label_efficiency_figure(cells(values, [1, 10]), title="", classes=10)) == [
        "full",
        "from scratch  40.0",
    ]


@pytest.mark.parametrize("every", [6000, 500, 57, 50.1])
def test_texts_stand_apart_and_the_legend_goes_from_the_best_to_the_worst(every: float) -> None:
    figure = label_efficiency_figure(
        close(every), title="Accuracy by number of labels: MAE on Fashion-MNIST", classes=10
    )
    assert_texts_stand_apart(figure)
    assert [name.split("  ")[0] for name in legend(figure)] == list(ARMS)


def test_every_point_lies_inside_the_axes() -> None:
    figure = label_efficiency_figure(close(), title="", classes=10)
    drawn(figure)
    (axes,) = figure.axes
    assert axes._left_title.get_window_extent().x1 < figure.legends[0].get_window_extent().x0
    drawn(figure)
    frame = figure.axes[0].get_window_extent()
    for line in (container[0] for container in figure.axes[0].containers):
        at = line.get_transform().transform(np.column_stack([line.get_xdata(), line.get_ydata()]))
        assert (at > [frame.x0 + 2, frame.y0 + 2]).all()
        assert (at < [frame.x1 - 2, frame.y1 - 2]).all()


def test_crowded_numbers_of_labels_give_way() -> None:
    figure = label_efficiency_figure(
        cells({"full": [50.0 + i for i in range(6)]}, [1, 8, 9, 10, 11], every=5000), title="", classes=10
    )
    assert_texts_stand_apart(figure)
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == ["all\n(5,000)", "11", "1"]
    assert len(curves(figure)[BLUE][0]) == 6  # the points are all there


def test_one_cell_can_be_drawn_and_accuracies_end_at_100() -> None:
    figure = label_efficiency_figure(cells({"frozen features": [99.5]}, [5]), title="", classes=10)
    assert_texts_stand_apart(figure)
    assert "100.0" in [text.get_text() for text in texts(figure)]
    assert "100.5" not in [text.get_text() for text in texts(figure)]


def test_drawing_leaves_no_global_state() -> None:
    before = dict(matplotlib.rcParams)
    label_efficiency_figure(close(), title="", classes=10)
    assert dict(matplotlib.rcParams) == before
