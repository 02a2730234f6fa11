import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from drawings import assert_texts_stand_apart, drawn
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.axes import Axes
from matplotlib.font_manager import fontManager
from torch import Tensor

from sslvision.figures import fonts
from sslvision.figures.confusion import confusion_figure, save_confusion
from sslvision.figures.curves import learning_curve_figure

CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


def confusion(classes: int, images: int = 200) -> Tensor:
    """Counts of a classifier that is mostly right."""
    rng = np.random.default_rng(0)
    wrong = rng.dirichlet(np.full(classes, 0.2), size=classes)
    share = 0.2 * wrong + 0.8 * np.eye(classes)
    return torch.from_numpy(np.stack([rng.multinomial(images, row / row.sum()) for row in share]))


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


@pytest.mark.thorough
def test_each_cell_of_a_thousand_classes_has_two_pixels() -> None:
    counts = torch.eye(1000, dtype=torch.int64) * 50
    figure = confusion_figure(counts, [""] * 1000, title="")
    picture = drawn(figure)
    assert picture.nbytes < 60e6
    assert figure.axes[0].get_window_extent().width >= 2000


@pytest.mark.parametrize(
    "names",
    [CLOTHES, ["cat", "dog", "horse"], ["$a$ very long name of a class", "b", "c"], [f"n{i}" for i in range(20)]],
)
@pytest.mark.parametrize("title", ["x", "partial fine-tuning of a ViT-Ti/4 on three animals"])
def test_texts_of_a_confusion_stand_apart(names: list[str], title: str) -> None:
    assert_texts_stand_apart(confusion_figure(confusion(len(names)), names, title=title))


@pytest.mark.thorough
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


def test_drawing_leaves_no_global_state() -> None:
    before = dict(matplotlib.rcParams)
    confusion_figure(confusion(3), ["a", "b", "c"], title="")
    assert dict(matplotlib.rcParams) == before


@pytest.fixture
def han_font(tmp_path: Path) -> Iterator[None]:
    """Install a font with one Chinese letter, as a black square."""
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 900), (900, 900), (900, 0)):
        pen.lineTo(corner)
    pen.closePath()
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Square Han", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "han.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "han.ttf")
    yield
    fontManager.ttflist[:] = before


def test_names_that_no_font_can_draw_are_numbers_in_the_figure_and_names_in_a_file_beside_it(tmp_path: Path) -> None:
    names = ["cat", "猫", "बिल्ली", "кошка", "chat é"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no font is missing a glyph
        told = save_confusion(confusion(5), names, tmp_path / "confusion.png", title="猫 as drawn by me")
    assert told.startswith("No installed font can draw 2 of 5 class names (")
    assert "confusion.txt has the names" in told
    lines = (tmp_path / "confusion.txt").read_text(encoding="utf-8").splitlines()
    assert lines == ["#0 cat", "#1 猫", "#2 बिल्ली", "#3 кошка", "#4 chat é"]
    axes = confusion_figure(confusion(5), names, title="").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "#1", "#2", "кошка", "chat é"]
    assert save_confusion(confusion(5), CLOTHES[:5], tmp_path / "confusion.png", title="") == ""
    assert not (tmp_path / "confusion.txt").exists()


@pytest.mark.usefixtures("han_font")
def test_an_installed_font_that_has_the_letters_draws_them(tmp_path: Path) -> None:
    names = ["cat", "猫", "猫 cat"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = save_confusion(confusion(3), names, tmp_path / "confusion.png", title="猫")
    assert told == ""
    figure = confusion_figure(confusion(3), names, title="猫")
    picture = drawn(figure)
    label = figure.axes[0].get_yticklabels()[1]
    assert label.get_text() == "猫"
    box = label.get_window_extent()
    inside = picture[picture.shape[0] - round(box.y1) : picture.shape[0] - round(box.y0), round(box.x0) : round(box.x1)]
    assert (inside.mean(2) < 100).mean() > 0.5  # a filled square, and not the outline of a missing letter


def test_names_with_control_characters_or_bytes_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    names = ["a\nb", "caf\udce9", "tab\there", "ok"]
    assert save_confusion(confusion(4), names, tmp_path / "confusion.png", title="a\nb") == ""
    labels = confusion_figure(confusion(4), names, title="").axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["a\\nb", "caf\\udce9", "tab\\there", "ok"]


def test_scripts_that_need_shaping_are_drawn_only_by_a_matplotlib_that_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    for shapes, drawn_as in ((True, ["قطة", "חתול", "cat"]), (False, ["#0", "#1", "cat"])):
        monkeypatch.setattr(fonts, "SHAPES_TEXT", shapes)
        labels = confusion_figure(confusion(3), ["قطة", "חתול", "cat"], title="").axes[0].get_yticklabels()
        assert [label.get_text() for label in labels] == drawn_as


def test_more_classes_than_are_named_need_no_font_and_long_wide_names_are_shortened(tmp_path: Path) -> None:
    assert save_confusion(confusion(60), ["猫"] * 60, tmp_path / "confusion.png", title="") == ""
    figure = confusion_figure(confusion(2), ["ж" * 30, "b"], title="")
    assert figure.axes[0].get_yticklabels()[0].get_text() == "ж" * 13 + "…" + "ж" * 10


def test_the_title_of_another_figure_has_escapes_for_what_no_font_can_draw() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = learning_curve_figure({"step": [1, 2], "loss": [2.0, 1.0]}, title="run 猫 é")
        drawn(figure)
    assert figure.axes[0].get_title(loc="left") == "run \\u732b é"
