import math
from io import BytesIO
from typing import cast

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from sslvision.figures.curves import learning_curve_figure, picture_figure

Metrics = dict[str, list[float | None]]


def pixels(figure: Figure) -> np.ndarray:
    file = BytesIO()
    figure.savefig(file, format="png")
    return np.asarray(Image.open(file).convert("RGB"))


def images(count: int, channels: int = 3, side: int = 32, height: int | None = None) -> Tensor:
    return torch.rand(count, channels, height or side, side, generator=torch.Generator().manual_seed(0))


def triples(a: Tensor, b: Tensor, c: Tensor) -> list[tuple[str, Tensor]]:
    return [("original", a), ("75.5 % hidden", b), ("reconstructed", c)]


def find(picture: np.ndarray, image: Tensor, factor: int) -> list[tuple[int, int]]:
    """Where the enlarged (C, H, W) image stands in the picture, pixel for pixel."""
    gray = image if len(image) == 3 else image.expand(3, -1, -1)
    wanted = np.rint(gray.permute(1, 2, 0).numpy() * 255).repeat(factor, 0).repeat(factor, 1)
    height, width = wanted.shape[:2]
    corners = np.argwhere(np.abs(picture.astype(np.int16) - wanted[0, 0].astype(np.int16)).max(axis=2) <= 1)
    return [
        (y, x)
        for y, x in corners.tolist()
        if picture[y : y + height, x : x + width].shape == wanted.shape
        and np.abs(picture[y : y + height, x : x + width] - wanted).max() <= 1
    ]


@pytest.mark.parametrize(("side", "factor"), [(28, 6), (32, 5), (96, 2), (224, 1)])
def test_every_pixel_of_an_image_is_a_whole_number_of_pixels_in_the_file(side: int, factor: int) -> None:
    a, b, c = images(9, side=side).split(3)
    picture = pixels(picture_figure(triples(a, b, c), title="run"))
    for n in range(3):
        indices = [find(picture, image, factor) for image in (a[n], b[n], c[n])]
        assert [len(place) for place in indices] == [1, 1, 1]
        (y0, x0), (y1, x1), (y2, x2) = (place[0] for place in indices)
        assert y0 == y1 == y2  # original, masked and reconstructed stand in a row, in this order
        assert x0 < x1 < x2


def test_the_images_are_laid_out_in_two_groups_of_triples() -> None:
    a, b, c = images(18).split(6)
    figure = picture_figure(triples(a, b, c), title="run")
    assert figure.get_size_inches()[0] == pytest.approx(7.1, abs=0.1)  # a page's width of text, and its edges
    picture = pixels(figure)
    corners = np.array([find(picture, image, 5)[0] for image in a])
    assert len(set(corners[:, 0])) == 3
    assert len(set(corners[:, 1])) == 2
    assert (corners[0::2, 0] == corners[1::2, 0]).all()


def test_hidden_pixels_are_mid_gray() -> None:
    original = torch.zeros(1, 1, 32, 32)
    masked = torch.full_like(original, math.nan)
    picture = pixels(picture_figure(triples(original, masked, original), title=""))
    assert len(find(picture, torch.full((3, 32, 32), 0.5), 5)) == 1


@pytest.mark.parametrize(("channels", "drawn"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (3, [0, 1, 2]), (7, [0, 1, 2])])
def test_gray_color_and_many_channels_are_drawn(channels: int, drawn: list[int]) -> None:
    stack = images(1, channels)
    picture = pixels(picture_figure(triples(stack, stack, stack), title=""))
    assert len(find(picture, stack[0, drawn], 5)) == 3


def test_values_outside_the_range_are_clipped() -> None:
    wild = images(1) * 4 - 2
    picture = pixels(picture_figure(triples(wild, wild, wild), title=""))
    assert len(find(picture, wild[0].clamp(0, 1), 5)) == 3


def test_images_need_not_be_square() -> None:
    tall = images(2, height=48)
    picture = pixels(picture_figure(triples(tall, tall, tall), title=""))
    assert len(find(picture, tall[1], 5)) == 3


def test_the_headings_stand_once_above_each_group() -> None:
    stack = images(6)
    figure = picture_figure(triples(stack, stack, stack), title="MAE, epoch 40")
    assert [text.get_text() for text in figure.texts] == [
        "MAE, epoch 40",
        *["original", "75.5 % hidden", "reconstructed"] * 2,
    ]


@pytest.mark.parametrize(("count", "side"), [(1, 28), (2, 28), (4, 224)])
def test_texts_of_the_grid_overlap_neither_each_other_nor_the_images(count: int, side: int) -> None:
    stack = images(count, side=side)
    figure = picture_figure(triples(stack, stack, stack), title="MAE ViT-Ti/4 on Fashion-MNIST, epoch 40")
    pixels(figure)  # draws it, which settles the layout
    boxes = [text.get_window_extent() for text in figure.texts] + [figure.axes[0].get_window_extent()]
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(len(boxes)) for j in range(i))
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)


def run(count: int = 400, every: int = 50) -> Metrics:
    """A loss that falls from 1 to about 0.37 with noise, one k-NN every forty rows."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.05
    return {
        "step": [float(every * i) for i in range(count)],
        "epoch": [float(every * i // 1000) for i in range(count)],
        "loss": [math.exp(-i / count) + float(noise[i]) for i in range(count)],
        "lr": [1e-3 * i / count for i in range(count)],
        "knn_top1": [60 + i / 40 if i % 40 == 39 else None for i in range(count)],
    }


def x_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xdata(), dtype=float)


def y_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), dtype=float)


def labels(figure: Figure) -> list[str]:
    return [axes.get_ylabel().split("\n")[0] for axes in figure.axes]


def test_there_is_a_panel_for_each_metric_the_run_has() -> None:
    assert labels(learning_curve_figure(run(), title="")) == ["training loss", "k-NN top-1 (%)", "learning rate"]
    without = {name: column for name, column in run().items() if name != "knn_top1"}
    assert labels(learning_curve_figure(without, title="")) == ["training loss", "learning rate"]
    assert labels(learning_curve_figure({**without, "lr": [None] * 400}, title="")) == ["training loss"]


def test_the_loss_is_a_light_raw_line_under_a_bold_smooth_one() -> None:
    metrics = run()
    raw, smooth = learning_curve_figure(metrics, title="").axes[0].lines
    assert y_of(raw).tolist() == metrics["loss"]
    truth = np.exp(-np.arange(400) / 400)
    error = np.abs(y_of(smooth) - truth)
    assert error.max() < 0.05
    assert error.mean() < 0.3 * np.abs(y_of(raw) - truth).mean()
    assert (raw.get_alpha() or 1) < 0.5
    assert smooth.get_linewidth() > raw.get_linewidth()


def test_a_short_run_is_not_smoothed() -> None:
    metrics = {name: column[:20] for name, column in run().items()}
    (line,) = learning_curve_figure(metrics, title="").axes[0].lines
    assert y_of(line).tolist() == metrics["loss"]


def test_smoothing_steps_over_what_is_not_finite() -> None:
    metrics = run()
    metrics["loss"][200:210] = [math.nan] * 10
    _, smooth = learning_curve_figure(metrics, title="").axes[0].lines
    assert np.flatnonzero(~np.isfinite(y_of(smooth))).tolist() == list(range(200, 210))
    assert np.nanmax(np.abs(y_of(smooth) - np.exp(-np.arange(400) / 400))) < 0.05  # and beside the gap nothing dips


def test_epochs_are_fractional_when_the_steps_per_epoch_are_known() -> None:
    x = x_of(learning_curve_figure(run(), title="", steps_per_epoch=1000).axes[0].lines[0])
    assert list(x[:3]) == [0.0, 0.05, 0.1]
    x = x_of(learning_curve_figure(run(), title="").axes[0].lines[0])
    assert list(x[18:22]) == [0, 0, 1, 1]


def test_knn_is_drawn_where_it_was_measured_with_the_untrained_value_dashed() -> None:
    figure = learning_curve_figure(run(), title="", steps_per_epoch=1000, untrained_knn=55.0, untrained_loss=1.2)
    curve, reference = figure.axes[1].lines
    assert x_of(curve)[0] == 39 * 50 / 1000
    assert y_of(curve)[0] == 60 + 39 / 40
    assert set(y_of(reference)) == {55.0}
    assert reference.is_dashed()
    assert [text.get_text() for text in figure.axes[1].texts] == ["70.0", "untrained 55.0"]
    assert figure.axes[0].texts[-1].get_text() == "untrained 1.2"


def test_the_learning_rate_is_in_units_of_its_power_of_ten() -> None:
    axes = learning_curve_figure(run(), title="").axes[-1]
    assert axes.get_ylabel() == "learning rate\n($10^{-4}$)"
    assert y_of(axes.lines[0])[-1] == pytest.approx(9.975)


@pytest.mark.parametrize("reference", [55.0, 69.0, 75.0])
def test_texts_of_the_curves_do_not_overlap(reference: float) -> None:
    figure = learning_curve_figure(run(), title="MAE on Fashion-MNIST", untrained_knn=reference, untrained_loss=1.1)
    pixels(figure)
    ours = [text for axes in figure.axes for text in (*axes.texts, axes.yaxis.label)]
    title = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_text() == "MAE on Fashion-MNIST")
    ours += [figure.axes[-1].xaxis.label, *cast(list[Text], title)]
    boxes = [text.get_window_extent() for text in ours]
    assert len(boxes) == 9  # the title, four labels of axes, two last values, two references
    assert not any(boxes[i].overlaps(boxes[j]) for i in range(len(boxes)) for j in range(i))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)


@pytest.mark.parametrize("metrics", [{}, {"step": [0.0], "epoch": [0.0], "loss": [None], "lr": [0.0]}])
def test_a_run_that_logged_next_to_nothing_can_be_drawn(metrics: Metrics) -> None:
    assert pixels(learning_curve_figure(metrics, title="empty", untrained_loss=1.0)).std() > 0


def test_pictures_leave_no_global_state() -> None:
    before = dict(matplotlib.rcParams)
    learning_curve_figure(run(), title="")
    picture_figure(triples(images(1), images(1), images(1)), title="")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_row_may_have_any_number_of_columns(count: int) -> None:
    stacks = images(4 * count).split(4)
    figure = picture_figure([(f"head {n}", stack) for n, stack in enumerate(stacks)], title="attention")
    picture = pixels(figure)
    assert all(len(find(picture, image, 5)) == 1 for stack in stacks for image in stack)
    assert [text.get_text() for text in figure.texts][1:] == [f"head {n}" for n in range(count)] * 2
