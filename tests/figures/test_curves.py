import math
from typing import cast

import matplotlib
import numpy as np
import pytest
import torch
from drawings import drawn as pixels
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from sslvision.figures.curves import learning_curve_figure

Metrics = dict[str, list[float | None]]


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
    assert dict(matplotlib.rcParams) == before
