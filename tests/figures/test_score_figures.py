import math
import time
from io import BytesIO
from itertools import combinations, pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox
from PIL import Image
from torch import Tensor

from sslvision.evaluation.scores import Cell
from sslvision.figures.curves import BLUE, GREEN, MUTED, ORANGE
from sslvision.figures.score_figures import confusion_figure, label_efficiency_figure, spread

CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
ARMS = ("from scratch", "frozen features", "partial", "full")


def drawn(figure: Figure) -> np.ndarray:
    """Draw a figure, which settles its layout too."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def confusion(classes: int, images: int = 200) -> Tensor:
    """Counts of a classifier that is mostly right."""
    rng = np.random.default_rng(0)
    wrong = rng.dirichlet(np.full(classes, 0.2), size=classes)
    share = 0.2 * wrong + 0.8 * np.eye(classes)
    return torch.from_numpy(np.stack([rng.multinomial(images, row / row.sum()) for row in share]))


def cells(values: dict[str, list[float]], labels: list[int], *, every: float | None = None) -> list[Cell]:
    """The cells of ten classes; `every` adds "all" at so many labels per class, with one seed."""
    found: list[Cell] = []
    for arm, means in values.items():
        for per_class, mean in zip(labels, means, strict=False):
            found.append(
                Cell(arm=arm, labels_per_class=per_class, images=10 * per_class, mean=mean, deviation=2.0, seeds=3)
            )
        if every and len(means) > len(labels):
            images = round(10 * every)
            found.append(
                Cell(arm=arm, labels_per_class="all", images=images, mean=means[-1], deviation=math.nan, seeds=1)
            )
    return found


def close(every: float = 6000) -> list[Cell]:
    """Four arms that end within a percent of one another."""
    rise = [40.0, 50, 60, 70, 80, 95]
    return cells(
        {arm: [y + 0.2 * n for y in rise] for n, arm in enumerate(reversed(ARMS))}, [1, 2, 5, 10, 50], every=every
    )


def texts(figure: Figure) -> list[Text]:
    """Every text that is seen and stands straight."""
    found = list(figure.texts)
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


def written(axes: Axes) -> dict[tuple[int, int], str]:
    """(row, column) -> what is written in the cell."""
    return {(round(y), round(x)): text.get_text() for text in axes.texts for x, y in [text.get_position()]}


def test_cells_hold_the_percent_of_their_row() -> None:
    counts = torch.tensor([[6, 2, 0], [0, 5, 0], [1, 0, 2]])
    axes = confusion_figure(counts, ["ant", "bee", "cat"], title="").axes[0]
    assert written(axes) == {(0, 0): "75.0", (0, 1): "25.0", (1, 1): "100.0", (2, 0): "33.3", (2, 2): "66.7"}
    mistakes, hits = (image.get_array() for image in axes.images)
    assert mistakes is not None
    assert hits is not None
    assert mistakes[0].tolist() == [None, 25, 0]  # the diagonal is masked, and drawn by itself
    assert hits[0].tolist() == [75, None, None]


def test_rows_are_true_classes_from_the_top_and_columns_predicted_ones() -> None:
    figure = confusion_figure(confusion(10), CLOTHES, title="fine-tuned")
    drawn(figure)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == CLOTHES
    assert [label.get_text() for label in axes.get_xticklabels()] == CLOTHES
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(above.y0 > below.y0 for above, below in pairwise(boxes))
    assert figure.texts[0].get_text() == "fine-tuned"


def test_more_than_ten_classes_are_written_without_digits_and_small_shares_are_left_out() -> None:
    counts = torch.eye(12, dtype=torch.int64) * 996
    counts[3, 4], counts[5, 6] = 4, 25
    cells_of = written(confusion_figure(counts, [str(i) for i in range(12)], title="").axes[0])
    assert cells_of[5, 6] == "2"
    assert (3, 4) not in cells_of
    assert cells_of[3, 3] == "100"


def test_a_small_mistake_is_seen_and_has_another_hue_than_what_is_right() -> None:
    counts = torch.eye(30, dtype=torch.int64) * 99
    counts[4, 20] = 1
    figure = confusion_figure(counts, [f"{i}" for i in range(30)], title="")
    picture = drawn(figure).astype(int)
    axes = figure.axes[0]

    def color(row: float, column: float) -> np.ndarray:
        x, y = axes.transData.transform((column, row))
        return picture[round(picture.shape[0] - y), round(x)]

    nothing, mistake, right = color(4, 19), color(4, 20), color(4, 4)
    assert nothing.tolist() == [255, 255, 255]
    assert 255 - mistake[2] > 30
    assert mistake[0] > mistake[2]  # orange: more red than blue
    assert right[2] > right[0]


def test_a_class_without_test_images_is_gray_and_marked() -> None:
    counts = torch.tensor([[3, 1], [0, 0]])
    figure = confusion_figure(counts, ["ant", "bee"], title="")
    assert written(figure.axes[0])[1, 1] == "–"
    picture, (x, y) = drawn(figure), figure.axes[0].transData.transform((0, 1))
    assert picture[round(picture.shape[0] - y), round(x)].tolist() == [0xEE] * 3


@pytest.mark.parametrize("classes", [30, 100])
def test_bars_hold_the_accuracy_of_each_class_when_cells_cannot(classes: int) -> None:
    counts = confusion(classes)
    counts[7] = 0
    figure = confusion_figure(counts, [f"class {i}" for i in range(classes)], title="")
    square, bars = figure.axes[:2]
    values, edges, _ = bars.patches[0].get_data()  # type: ignore[attr-defined]
    accuracies = (100 * counts.diag() / counts.sum(1)).numpy()
    np.testing.assert_allclose(values, accuracies, rtol=1e-6)
    assert list(edges) == [row - 0.5 for row in range(classes + 1)]
    assert bars.get_ylim() == square.get_ylim()  # in line with their rows
    numbers = [text.get_text() for text in bars.texts]
    assert numbers == ([f"{a:.0f}" if a == a else "–" for a in accuracies] if classes <= 40 else [])
    assert len(square.texts) == 0


def test_many_classes_are_numbered_and_not_named() -> None:
    figure = confusion_figure(confusion(60), [f"class {i}" for i in range(60)], title="")
    drawn(figure)
    assert "class" not in "".join(label.get_text() for label in figure.axes[0].get_yticklabels())
    assert figure.axes[0].get_ylabel() == "true class, by number"


def test_a_thousand_classes_are_drawn_fast_and_each_cell_has_a_pixel() -> None:
    counts = torch.eye(1000, dtype=torch.int64) * 50
    begun = time.perf_counter()
    figure = confusion_figure(counts, [""] * 1000, title="")
    picture = drawn(figure)
    assert time.perf_counter() - begun < 10
    assert picture.nbytes < 40e6
    assert figure.axes[0].get_window_extent().width >= 2000


@pytest.mark.parametrize(
    "names",
    [CLOTHES, ["cat", "dog", "horse"], ["$a$ very long name of a class", "b", "c"], [f"n{i}" for i in range(20)]],
)
@pytest.mark.parametrize("title", ["x", "partial fine-tuning of a ViT-Ti/4 on three animals"])
def test_texts_of_a_confusion_stand_apart(names: list[str], title: str) -> None:
    assert_texts_stand_apart(confusion_figure(confusion(len(names)), names, title=title))


@pytest.mark.parametrize("classes", [21, 40, 41, 100])
def test_texts_beside_the_bars_stand_apart(classes: int) -> None:
    names = [f"{'quite a long name for a ' * (i % 2)}class {i}" for i in range(classes)]
    assert_texts_stand_apart(confusion_figure(confusion(classes), names, title="DINO on flowers"))


def test_long_names_keep_their_ends_which_tell_them_apart() -> None:
    names = ["American shorthaired black cat", "American shorthaired white cat", "dog"]
    figure = confusion_figure(confusion(3), names, title="")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [
        "American shor…black cat",
        "American shor…white cat",
        "dog",
    ]


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
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10", "all\n(144)"]
    assert list(axes.get_xticks()) == [1, 10, 143.7]


def test_error_bars_are_one_deviation_long_and_absent_for_one_seed() -> None:
    figure = label_efficiency_figure(cells({"full": [50.0, 60.0, 90.0]}, [1, 10], every=100), title="", classes=10)
    _, _, (bars,) = figure.axes[0].containers[0]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[48, 52], [58, 62], [90, 90]]
    assert figure.texts[1].get_text() == "mean and standard deviation of 1 to 3 seeds"


def test_points_of_arms_stand_beside_each_other_not_on_one_another() -> None:
    figure = label_efficiency_figure(cells({arm: [50.0, 60.0] for arm in ARMS}, [1, 10]), title="", classes=10)
    drawn(figure)
    lines = [container[0] for container in figure.axes[0].containers]
    at = sorted(line.get_transform().transform((10, 60))[0] for line in lines)
    assert np.diff(at) == pytest.approx([3 / 72 * 150] * 3)  # three points
    assert np.mean(at) == pytest.approx(figure.axes[0].transData.transform((10, 60))[0])


def test_a_line_ends_in_its_name_and_value_and_a_shorter_one_in_its_name() -> None:
    values = {"from scratch": [30.0, 40.0], "full": [70.0]}
    axes = label_efficiency_figure(cells(values, [1, 10]), title="", classes=10).axes[0]
    assert [text.get_text() for text in axes.texts] == ["from scratch  40.0", "full"]
    ends = [text.xy for text in axes.texts if isinstance(text, Annotation)]
    assert ends == [(10, 40.0), (1, 70.0)]


@pytest.mark.parametrize("every", [6000, 500, 57, 50.1])
def test_texts_of_close_lines_stand_apart_and_in_the_order_of_the_lines(every: float) -> None:
    figure = label_efficiency_figure(close(every), title="What labels buy: MAE on Fashion-MNIST", classes=10)
    assert_texts_stand_apart(figure)
    names = sorted(figure.axes[0].texts, key=lambda text: box(text).y0)
    assert [name.get_text().split("  ")[0] for name in names] == list(reversed(ARMS))


def test_every_point_lies_inside_the_axes() -> None:
    figure = label_efficiency_figure(close(), title="", classes=10)
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
    assert shown == ["1", "8", "all\n(5,000)"]
    assert len(curves(figure)[BLUE][0]) == 6  # the points are all there


def test_one_cell_can_be_drawn_and_accuracies_end_at_100() -> None:
    figure = label_efficiency_figure(cells({"frozen features": [99.5]}, [5]), title="", classes=10)
    assert_texts_stand_apart(figure)
    assert "100.0" in [text.get_text() for text in texts(figure)]
    assert "100.5" not in [text.get_text() for text in texts(figure)]


def test_heights_that_fit_stay_and_others_move_as_little_as_they_can() -> None:
    assert spread([0.9, 0.1, 0.5], gap=0.2) == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5], gap=0.2) == pytest.approx([0.4, 0.6])
    assert spread([0.5, 0.55, 0.1], gap=0.2) == pytest.approx([0.425, 0.625, 0.1])
    assert spread([0.99, 1.0, 0.98], gap=0.1) == pytest.approx([0.9, 1.0, 0.8])
    assert spread([0.0, 0.0], gap=0.1) == pytest.approx([0.0, 0.1])


def test_spread_heights_are_the_nearest_of_all_that_are_apart() -> None:
    grid = np.linspace(0, 1, 41)
    for wanted in np.random.default_rng(0).uniform(size=(20, 3)):
        found = np.array(spread(list(wanted), gap=0.2))
        low, middle, high = np.sort(wanted)
        assert np.diff(np.sort(found)).min() >= 0.2 - 1e-9
        best = min(
            (a - low) ** 2 + (b - middle) ** 2 + (c - high) ** 2
            for a in grid for b in grid[grid >= a + 0.2] for c in grid[grid >= b + 0.2]
        )  # fmt: skip
        assert ((found - wanted) ** 2).sum() <= best + 1e-9


def test_pictures_leave_no_global_state() -> None:
    before = dict(matplotlib.rcParams)
    confusion_figure(confusion(3), ["a", "b", "c"], title="")
    label_efficiency_figure(close(), title="", classes=10)
    assert dict(matplotlib.rcParams) == before
