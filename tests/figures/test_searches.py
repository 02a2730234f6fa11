"""The picture of a search: a panel for each setting, crosses for what diverged."""

from sslvision.figures.searches import Varied, search_figure


def test_a_search_has_a_panel_for_each_setting_and_importance_in_order():
    varied = [
        Varied("base_lr", [1e-3, 1e-2, 1e-1], True, 0.2),
        Varied("optimizer", ["muon", "adamw", "muon"], False, None),
    ]
    figure = search_figure(varied, [80.0, 82.0, 0.0], failed=[False, False, True], objective="k-NN", title="a $x$")
    bars, rate, optimizer = figure.axes
    assert [label.get_text() for label in bars.get_yticklabels()] == ["optimizer", "base_lr"]
    assert rate.get_xscale() == "log"
    assert rate.get_ylim()[0] > 70  # a diverged trial does not flatten the others
    assert [label.get_text() for label in optimizer.get_xticklabels()] == ["adamw", "muon"]
    assert {text.get_text() for legend in figure.legends for text in legend.get_texts()} == {
        "trial",
        "best",
        "diverged",
    }
