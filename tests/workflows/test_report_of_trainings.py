"""The reports of searches, of the seven steps and of scaling ladders: what they say is what the folder has."""

import json
import math

import pytest
import yaml
from workflows.test_reporting import HOSTILE, Page, is_self_contained, page_of

from sslvision.figures.report_axes import axis_of_x, log_axis
from sslvision.figures.report_charts import Line, line_chart
from sslvision.runs.run_record import read_run

SPACE = {"base_lr": "log(1e-4,1)", "method": {"mask_ratio": "uniform(0.5,0.9)"}, "weight_decay": "choice(0,0.05)"}
TRIALS = """\
trial,outcome,score,base_lr,method.mask_ratio,weight_decay,seconds,standard_error
0,trained,71.0,0.01,0.75,0,31.2,0.9
1,trained,74.5,0.03,0.6,0.05,30.1,0.9
2,diverged,0.0,0.9,0.8,0,12.0,0.9
3,pruned,60.0,0.0002,0.7,0.05,11.0,0.9
"""


def folder_of(path, config, files):
    path.mkdir(parents=True)
    (path / "figures").mkdir()
    common = {"method": {"_target_": "sslvision.methods.mae.MAE"}, "data": {"root": HOSTILE}, "about": HOSTILE}
    (path / "config.yaml").write_text(yaml.safe_dump(common | config))
    files = {"environment.json": {"command": "python -m sslvision.scale recipe=mae budget=1h"}} | files
    for name, content in files.items():
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def lines(entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def charts_of(page):
    return [json.loads(attrs["data-chart"]) for attrs in page.all("figure") if "data-chart" in attrs]


def searched(path, **results):
    found = {
        "objective": "k-NN top-1",
        "unit": " %",
        "best": {"trial": 1, "score": 74.5, "standard_error": 0.9, "base_lr": 0.03, "weight_decay": "0.05"},
        "evidence": [
            "Found by a search (random) over 4 trials, on k-NN top-1:",
            "  trial 1",
            "  x",
            "A trial had 2 epochs.",
        ],
        "importance": {"base_lr": 0.7, "method.mask_ratio": None, "weight_decay": 0.1},
        "findings": ["1 of 4 trials diverged."],
    }
    files = {"trials.csv": TRIALS, "results.json": found | results, "best.yaml": f"# {HOSTILE}\nbase_lr: 0.03\n"}
    return folder_of(path, {"search": "random", "trial_epochs": None, "ranges": SPACE}, files)


def test_the_report_of_a_search_has_the_best_trial_the_importances_and_every_trial(tmp_path):
    page = page_of(searched(tmp_path / "a"))
    assert "base_lr=0.03, weight_decay=0.05 gave k-NN top-1 74.5 % (95 % interval 72.7 to 76.3)." in page.text
    assert "A trial had 2 epochs." in page.text
    assert "1 of 4 trials diverged." in page.text
    assert {"0.0002", "74.5", "60.0", "diverged", "stopped early: worse than others"} <= set(page.cells)
    assert "70.0" in page.text  # percent that base_lr explains
    assert "recipe=" in page.text
    assert page.text.count(HOSTILE) >= 3  # about, data, best.yaml
    assert not page.unbalanced
    assert is_self_contained(page)


def test_trials_are_drawn_against_each_setting_and_those_that_diverged_are_named(tmp_path):
    page = page_of(searched(tmp_path / "a"))
    by_setting = {chart["label"]: chart for chart in charts_of(page)}
    assert set(by_setting) == {"base_lr", "mask_ratio", "weight_decay"}
    assert [(line["name"], line["x"], line["y"]) for line in by_setting["base_lr"]["lines"]] == [
        ("trial", [0.01], [71.0]),
        ("best", [0.03], [74.5]),
    ]
    assert by_setting["weight_decay"]["ticks"] == [[0.0, "0"], [1.0, "0.05"]]
    assert "Diverged, and not drawn: 0.9." in page.text
    assert "2 others are in the table alone" in page.text


def test_a_search_that_goes_on_shows_its_best_so_far(tmp_path):
    folder = searched(tmp_path / "a")
    (folder / "results.json").unlink()
    text = page_of(folder).text
    told = "The best of 4 trials so far is trial 1: base_lr=0.03, method.mask_ratio=0.6, weight_decay=0.05 gave a score 74.5 ("
    assert told in text
    assert text.count("74.5 (") == 1
    assert "The search ended before its end" in text
    (folder / "trials.csv").unlink()
    assert "No trial has been scored yet." in page_of(folder).text


STEPS = [
    {"verdict": {"step": "initial loss", "passed": True, "words": f"It is 1.3: {HOSTILE}", "numbers": {"loss": 1.3}}},
    {"verdict": {"step": "rate", "passed": False, "words": "At no rate.", "advice": "Look.", "numbers": {"tried": []}}},
    {
        "verdict": {
            "step": "rate",
            "passed": True,
            "words": "0.05 learns most.",
            "advice": "Take base_lr=0.05.",
            "numbers": {"own": 0.5, "best": 0.05, "tried": [[0.005, 0.2], [0.05, 0.6], [0.5, -7.0], [5.0, math.nan]]},
        }
    },
    {"length": "coarse grid", "share": 0.1},
    {"grid": "coarse grid", "rate": 0.05, "weight_decay": 0.0, "score": 61.0, "sigma": 1.0, "outcome": "trained"},
    {"grid": "coarse grid", "rate": 0.1, "weight_decay": 0.0, "score": 64.0, "sigma": 1.0, "outcome": "cut"},
    {"grid": "coarse grid", "rate": 0.1, "weight_decay": 0.0, "score": 66.0, "sigma": 1.0, "outcome": "trained"},
    {"grid": "coarse grid", "rate": 0.1, "weight_decay": 0.2, "score": None, "sigma": None, "outcome": "diverged"},
    {"verdict": {"step": "coarse grid", "passed": True, "words": "Best is 0.1.", "numbers": {"missing": 1}}},
]


def test_the_report_of_the_seven_steps_has_each_verdict_once_and_the_rates_and_cells(tmp_path):
    results = {"best": {"rate": 0.1, "weight_decay": 0.0, "score": 66.0}, "objective": "k-NN top-1", "unit": " %"}
    files = {"steps.jsonl": lines(STEPS), "results.json": results}
    page = page_of(folder_of(tmp_path / "s", {"search": None, "trial_epochs": None}, files))
    assert "The best of the grids is rate 0.1 with weight decay 0: k-NN top-1 66.0 %." in page.text
    assert "3 of 3 steps that were done have passed." in page.text
    assert "At no rate." not in page.text  # that verdict was of an earlier call
    assert HOSTILE in page.text
    rates, grid = charts_of(page)
    assert (rates["lines"][0]["x"], rates["lines"][0]["y"]) == ([0.005, 0.05], [0.2, 0.6])
    assert "they diverged or became worse than before: 0.5, 5." in page.text
    assert "recipe 0.5" in page.text
    assert [(line["name"], line["x"], line["y"]) for line in grid["lines"]] == [
        ("weight decay 0", [0.05, 0.1], [61.0, 66.0])
    ]
    assert "diverged" in page.cells
    assert not page.unbalanced


def test_a_step_that_failed_is_told_first(tmp_path):
    files = {"steps.jsonl": lines(STEPS[:2]), "results.json": {"stopped_by": "rate", "best": None}}
    text = page_of(folder_of(tmp_path / "s", {"search": None, "trial_epochs": None}, files)).text
    assert "The step “rate” failed: At no rate. Look." in text
    assert text.index("The step “rate” failed") < text.index("Is the loss before the first update")


def law(*, believed, falls=True):
    return {
        "believed": believed,
        "irreducible": {"value": 8.0, "low": 7.0, "high": 9.5},
        "irreducible_determined": True,
        "largest": 400.0,
        "observed": 14.0,
        "exponent": {"value": 0.5, "low": 0.4, "high": 0.6},
        "ten_times": {"value": 9.9, "low": 9.1, "high": 10.7},
        "checks": [{"name": "falls", "passed": falls, "words": "noise alone would not"}],
        "sentences": [f"Ten times would bring 9.9 %. {HOSTILE}"],
    }


def ladder(path, **files):
    rungs = [
        {
            "parameters": 1000,
            "images": images,
            "updates": updates,
            "seed": 0,
            "knn": score,
            "knn_error": 0.5,
            "seconds": 3.0,
        }
        for images, updates, score in ((100, 50, 20.0), (200, 50, 16.5), (400, 50, 14.0), (400, 25, 14.2))
    ]
    curve = "axis,x,law,low,high,extrapolated\nimages,100,20,19,21,0\nimages,400,14,13,15,0\nimages,4000,9.9,9,10,1\n"
    laws = {"images": law(believed=True), "updates": law(believed=False, falls=False)}
    results = {"score": "knn", "laws": laws, "seconds": 12.0}
    return folder_of(
        path, {"rungs": 4}, {"rungs.jsonl": lines(rungs), "laws.csv": curve, "results.json": results} | files
    )


def test_the_report_of_a_ladder_has_its_laws_with_intervals_and_whether_to_believe_them(tmp_path):
    page = page_of(ladder(tmp_path / "l"))
    assert {"9.1 to 10.7", "0.4 to 0.6", "7 to 9.5", "yes", "no", "16.5 ± 0.98"} <= set(page.cells)
    assert page.text.count("Ten times would bring 9.9 %.") == 2
    assert HOSTILE in page.text
    images, updates = charts_of(page)
    by_name = {line["name"]: line for line in images["lines"]}
    assert (by_name["law"]["x"], by_name["extrapolated"]["x"]) == ([100, 400], [400, 4000])
    assert (by_name["measured"]["x"], by_name["measured"]["y"]) == ([100, 200, 400], [20.0, 16.5, 14.0])
    assert [line["name"] for line in updates["lines"]] == ["measured"]  # no fall is told from noise: there is no law
    assert "python -m sslvision.scale recipe=mae budget=1h seeds=3" in page.text
    assert (
        "python -m sslvision.pretrain recipe=mae\n" in page.text + "\n" or "sslvision.pretrain recipe=mae" in page.text
    )
    assert not page.unbalanced


def test_a_ladder_that_stopped_shows_what_was_trained(tmp_path):
    folder = ladder(tmp_path / "l", **{"stopped.json": {"reason": "SIGTERM outside of training."}})
    (folder / "results.json").unlink()
    page = page_of(folder)
    assert "The ladder ended before its end: SIGTERM outside of training. The same command goes on." in page.text
    assert [line["name"] for chart in charts_of(page) for line in chart["lines"]] == ["measured"] * 3


def test_a_damaged_record_of_trainings_is_named(tmp_path):
    folder = ladder(tmp_path / "l", **{"rungs.jsonl": "{nothing}\n"})
    assert "rungs.jsonl cannot be read" in page_of(folder).text
    (folder / "rungs.jsonl").write_text('{"parameters": 1, "images": 2, "updates": 3, "seed": 0, "knn": 5.0}\n{"param')
    assert len(read_run(folder).trainings) == 1  # the last line was cut off by a kill


def test_bands_beyond_a_logarithmic_axis_end_at_its_edge_and_what_has_no_place_is_left_out():
    chart = Page(
        line_chart([Line("a", [0.0, 1.0, 10.0], [5.0, 4.0, 2.0], low=[1, 0.0, -3], high=[6, 5, 3], band=True)],
                   label="y", log_x=True, log_y=True)
    )  # fmt: skip
    [data] = charts_of(chart)
    assert data["lines"][0]["x"] == [1.0, 10.0]
    numbers = [float(word) for path in chart.all("path") for word in path["d"].replace("M", " ").replace("L", " ").split()
               if word.replace(".", "").isdigit()]  # fmt: skip
    assert numbers
    assert all(0 <= number <= 1000 for number in numbers)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0048, 0.48], ["0.01", "0.03", "0.1", "0.3"]),
        ([656_250, 210_000_000], ["1\u00a0M", "3\u00a0M", "10\u00a0M", "30\u00a0M", "100\u00a0M"]),
        ([1875, 60_000], ["2\u00a0k", "5\u00a0k", "10\u00a0k", "20\u00a0k", "50\u00a0k"]),
        ([13.5, 15.0], ["13.5", "14.0", "14.5", "15.0"]),
        ([250, 8000], ["500", "1,000", "2,000", "5,000"]),
    ],
)
def test_ticks_of_logarithmic_axes_are_few_round_numbers(values, texts):
    axis = log_axis(values, ticks=6)
    assert [text for _, text in axis.ticks] == texts
    assert all(axis.low <= place <= axis.high for place, _ in axis.ticks)


def test_an_axis_of_dots_need_not_begin_at_zero():
    assert axis_of_x([0.5, 0.9]).low == 0
    assert 0.4 < axis_of_x([0.5, 0.9], from_zero=False).low < 0.5
