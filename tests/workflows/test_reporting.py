"""The report of a run: what it says is what the folder has, in one file that needs nothing else."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from sslvision.cli.words import as_settings
from sslvision.errors import UsageError
from sslvision.runs.run_record import STOPPED, read_run
from sslvision.workflows.report_of_runs import names_of
from sslvision.workflows.report_settings import Report
from sslvision.workflows.report_words import against, verdict_of_comparison
from sslvision.workflows.reporting import REPORT, report, reports

OLD_RUNS = Path(__file__).parents[1] / "golden" / "old_runs"
HOSTILE = "<script>alert('1')</script> & \"quotes\" {x} ünïcode"
RESULTS = {
    "loss": 0.5,
    "knn_top1": 83.84,
    "linear_top1": 86.61,
    "rankme": 17.27,
    "untrained_knn_top1": 61.93,
    "untrained_linear_top1": 86.05,
    "untrained_rankme": 43.03,
    "pixels_knn_top1": 81.2,
    "held_out_images": 2000,
    "intervals": {
        "knn_top1": [82.16, 85.39],
        "untrained_knn_top1": [59.78, 64.04],
        "linear_top1": [85.05, 88.03],
        "untrained_linear_top1": [84.46, 87.5],
    },
    "findings": [f"Class {HOSTILE} has no images."],
    "waiting_for_data_percent": 42.2,
    "seconds": 278.3,
}


class Page(HTMLParser):
    """The parts of a page that tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.cells, self.text, self.unbalanced = [], [], [], "", []
        self.feed(text)
        self.text = self.text.replace("\u00a0", " ")

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "path", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
            if self.open[-1] in ("td", "th"):
                self.cells.append(data)

    def all(self, tag, **wanted):
        return [attrs for name, attrs in self.tags if name == tag and wanted.items() <= attrs.items()]


@pytest.fixture
def run_folder(tmp_path):
    """Make the folder of a finished run by hand: run_folder("a", results={...})."""

    def make(name="a", *, results=RESULTS, about="MAE on digits", **settings):
        folder = tmp_path / "outputs" / name
        (folder / "figures").mkdir(parents=True)
        config = {
            "method": {"_target_": "sslvision.methods.mae.MAE", "mask_ratio": 0.6},
            "backbone": {"name": "test_vit"},
            "data": {"_target_": "sslvision.data.sources.folder.open_folder", "root": HOSTILE},
            "batch_size": 64,
            "about": about,
            **settings,
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
        environment = {"command": f"python -m sslvision.pretrain name='{HOSTILE}'", "git_commit": "abc123", "cores": 2}
        (folder / "environment.json").write_text(json.dumps(environment | {"packages": {"torch": "2.14.1"}}))
        rows = [
            f"{step},{step / 4},{2 / step},{0.01 * step},{40 + step if step % 4 == 0 else ''}" for step in range(1, 13)
        ]
        (folder / "metrics.csv").write_text("step,epoch,loss,grad_norm,knn_top1\n" + "\n".join(rows) + "\n")
        Image.new("RGB", (64, 32), "red").save(folder / "figures" / "reconstructions.png")
        if results is not None:
            (folder / "results.json").write_text(json.dumps(results))
        return folder

    return make


def page_of(*folders, **settings):
    return Page(report(Report(run=[str(folder) for folder in folders], **settings)).read_text(encoding="utf-8"))


def is_self_contained(page):
    links = [
        attrs[key]
        for _, attrs in page.tags
        for key in ("src", "href", "xlink:href", "action", "data")
        if attrs.get(key)
    ]
    return all(link.startswith(("data:", "#")) for link in links) and not page.all("link")


def test_a_report_is_one_whole_page_that_needs_nothing_else(run_folder):
    page = page_of(run_folder())
    assert not page.unbalanced
    assert not page.open
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) >= 6
    assert {attrs["href"] for attrs in page.all("a")} == {f"#{name}" for name in ids}
    assert is_self_contained(page)
    assert page.all("img")[0]["src"].startswith("data:image/png;base64,")


def test_every_score_of_the_results_is_in_the_table_and_no_other_number(run_folder):
    page = page_of(run_folder())
    numbers = [cell for cell in page.cells if re.fullmatch(r"\d+\.\d\d", cell)]
    wanted = [f"{value:.2f}" for name, value in RESULTS.items() if name.endswith(("_top1", "rankme"))]
    assert sorted(numbers) == sorted(wanted)


def test_what_a_person_typed_is_text_and_never_a_tag(run_folder):
    page = page_of(run_folder("a <b> & c", about=HOSTILE))
    assert page.text.count(HOSTILE) >= 4  # about, command, data, finding
    assert len(page.all("script")) == 1
    assert "a <b> & c" in page.text


def test_the_report_says_first_what_the_scores_mean(run_folder):
    text = page_of(run_folder()).text
    assert (
        "k-NN on the frozen features is right for 83.8 % of 2,000 held-out images: 21.9 points above the same" in text
    )
    assert "not told apart from the same network untrained (86.0 %)" in text
    assert text.index("In short") < text.index("Class <script>") < text.rindex("What was done")


def test_a_difference_within_the_noise_of_the_test_images_is_called_that():
    assert against(50, (45, 55), 40, (35, 45), "pixels") == "10.0 points above pixels"
    assert against(50, (45, 55), 44, (39, 49), "pixels") == "not told apart from pixels (44.0 %)"
    assert against(40, None, 44, (39, 49), "pixels") == "4.0 points below pixels, with unknown noise"


def test_ways_of_transfer_that_the_seeds_do_not_tell_apart_are_called_that():
    arms = {"from scratch": (18.8, 1.8), "frozen features": (54.6, 4.0), "partial": (54.6, 4.0), "full": (49.0, 1.0)}
    cells = [
        {"arm": arm, "labels_per_class": 10, "mean": mean, "deviation": deviation, "seeds": 4}
        for arm, (mean, deviation) in arms.items()
    ]
    assert verdict_of_comparison({"cells": cells}) == [
        "With 10 labeled images per class, the best is “frozen features”: 54.6 %, 35.8 points above training from scratch. "
        "Not told apart from it, by the spread over seeds: partial."
    ]


def test_every_curve_is_drawn_and_carries_its_values(run_folder):
    page = page_of(run_folder())
    charts = [json.loads(attrs["data-chart"]) for attrs in page.all("figure") if "data-chart" in attrs]
    loss = charts[0]["lines"][0]
    assert loss["x"] == [step / 4 for step in range(1, 13)]
    assert loss["y"] == pytest.approx([2 / step for step in range(1, 13)], rel=1e-4)
    assert [line["name"] for chart in charts for line in chart["lines"]] == [
        "training loss",
        "k-NN top-1 (%)",
        "norm of the gradient",
    ]
    assert all(attrs["d"].startswith("M") for attrs in page.all("path"))
    assert "nan" not in "".join(attrs["d"] for attrs in page.all("path"))


def test_losses_that_are_not_finite_are_left_out_of_the_curve(run_folder):
    folder = run_folder()
    (folder / "metrics.csv").write_text("step,epoch,loss\n1,1,2.0\n2,2,nan\n3,3,inf\n4,4,1.0\n")
    page = page_of(folder)
    assert json.loads(page.all("figure", **{"class": "chart tall"})[0]["data-chart"])["lines"][0]["x"] == [1, 4]


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_a_run_of_an_earlier_version_gets_a_report(method, tmp_path):
    page = page_of(OLD_RUNS / method, output=str(tmp_path / "old.html"))
    assert "stopped at update" in page.text
    assert page.all("figure", **{"class": "chart tall"})
    assert not page.unbalanced


def test_a_run_that_stopped_says_where_why_and_how_it_goes_on(run_folder):
    folder = run_folder(results=None)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()

    @reports
    def stopped(settings, folder):
        (folder / "config.yaml").touch()
        raise KeyboardInterrupt("SIGINT: saved at step 12")

    with pytest.raises(KeyboardInterrupt):
        stopped(None, folder)
    page = Page((folder / REPORT).read_text())
    assert "SIGINT: saved at step 12" in page.text
    assert "stopped at update 12" in page.text
    assert f"python -m sslvision.pretrain resume=auto output_dir={folder}" in page.text

    @reports
    def resumed(settings, folder):
        (folder / "config.yaml").touch()
        (folder / "results.json").write_text(json.dumps(RESULTS))

    resumed(None, folder)
    assert not (folder / STOPPED).exists()
    assert "finished" in Page((folder / REPORT).read_text()).text


def test_a_failure_to_write_the_report_costs_nothing_and_is_told(run_folder, capsys):
    @reports
    def done(settings, folder):
        (folder / "config.yaml").write_text("not: [a run")
        return 7

    folder = run_folder()
    assert done(None, folder) == 7
    assert "report.html could not be written" in capsys.readouterr().out
    assert not (folder / REPORT).exists()


def test_the_folder_of_another_run_is_left_alone(run_folder):
    @reports
    def refused(settings, folder):
        raise UsageError("in use")

    folder = run_folder()
    with pytest.raises(UsageError):
        refused(None, folder)
    assert not (folder / REPORT).exists()
    assert not (folder / STOPPED).exists()


def test_damaged_files_are_named_in_the_report_of_the_others(run_folder):
    folder = run_folder()
    (folder / "figures" / "reconstructions.png").write_bytes(b"nothing")
    (folder / "environment.json").write_text("{")
    (folder / "metrics.csv").write_text("step,epoch,loss\n1,1,abc\n")
    text = page_of(folder).text
    for name in (
        "reconstructions.png cannot be shown",
        "environment.json cannot be read",
        "metrics.csv cannot be read",
    ):
        assert name in text
    assert "83.84" in text


def test_an_unlabeled_run_is_told_by_rankme(run_folder):
    text = page_of(run_folder(results={"rankme": 17.2, "untrained_rankme": 43.0})).text
    assert "RankMe, the effective number of dimensions of the features, is 17.2" in text
    assert "43.00" in text
    text = page_of(run_folder("b", results={"rankme": 17.2, "held_out_images": 2000})).text
    assert "On 2,000 held-out images. RankMe is the effective number of dimensions" in text
    assert "Bars are" not in text  # there are none


def test_pictures_that_are_large_are_reduced_and_the_report_stays_small(run_folder):
    folder = run_folder()
    for number in range(4):
        Image.effect_noise((1600, 1600), 90).convert("RGB").save(folder / "figures" / f"own_{number}.png")
    page_of(folder)
    assert (folder / REPORT).stat().st_size < 5_000_000
    assert "reduced here" in (folder / REPORT).read_text()


def test_what_is_no_run_folder_and_what_is_no_report_are_refused(run_folder, tmp_path):
    folder = run_folder()
    with pytest.raises(UsageError, match=r"it has no config.yaml. It contains runs: a\."):
        page_of(folder.parent)
    with pytest.raises(UsageError, match="there is no such folder"):
        page_of(tmp_path / "nothing")
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    with pytest.raises(UsageError, match="is not a report of sslvision, so it is not replaced"):
        page_of(folder, output=str(tmp_path / "mine.html"))
    with pytest.raises(UsageError, match="No run folder"):
        Report()


def test_words_without_an_equals_sign_are_run_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()
    words = as_settings(["outputs/a", "my runs/b,c", "lr=0.1", "follow=true", "--help"], "run")
    assert words == ['run=[outputs/a,"my runs/b,c",lr=0.1]', "follow=true", "--help"]
    assert as_settings(["a", "b=1"], None) == ["a", "b=1"]


def test_runs_beside_one_another_show_their_curves_their_intervals_and_what_differs(run_folder, tmp_path):
    better = RESULTS | {"knn_top1": 87.1, "intervals": {"knn_top1": [85.5, 88.5]}, "findings": []}
    page = page_of(run_folder("a"), run_folder("b", results=better, batch_size=128), output=str(tmp_path / "both.html"))
    assert "k-NN top-1 %: b is best, 87.1: 3.3 points above a." in page.text
    assert {"83.84 (82.2 to 85.4)", "87.10 (85.5 to 88.5)", "batch_size", "64", "128"} <= set(page.cells)
    assert "method.mask_ratio" not in page.cells
    loss = json.loads(page.all("figure", **{"class": "chart tall"})[0]["data-chart"])
    assert [line["name"] for line in loss["lines"]] == ["a", "b"]
    assert not page.unbalanced
    assert is_self_contained(page)


def test_scores_on_different_images_are_not_ranked(run_folder, tmp_path):
    others = {"_target_": "sslvision.data.sources.digits.open_digits"}
    page = page_of(run_folder("a"), run_folder("b", data=others), output=str(tmp_path / "both.html"))
    assert "The runs are of different images, so that their scores cannot be compared." in page.text
    assert "is best" not in page.text


def test_runs_of_the_same_name_are_told_apart_by_their_folders(run_folder):
    runs = [read_run(run_folder(name), own=True) for name in ("x/a", "y/a", "y/b")]
    assert names_of(runs) == ["x/a", "y/a", "y/b"]
    assert names_of(runs[1:]) == ["a", "b"]


def test_a_followed_report_is_written_until_the_run_ends_and_loads_itself_again(run_folder, monkeypatch, tmp_path):
    folder = run_folder(results=None)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import fcntl; f = open({str(folder / '.lock')!r}, 'w'); fcntl.lockf(f, 2); print(flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    holder.stdout.readline()
    seen = []

    def sleep(seconds):
        seen.append(((folder / REPORT).read_text(), seconds))
        (folder / "results.json").write_text(json.dumps(RESULTS))
        holder.communicate(b"\n")

    monkeypatch.setattr("sslvision.workflows.reporting.time.sleep", sleep)
    page = page_of(folder, follow=True, every=7)
    first = Page(seen[0][0])
    assert (len(seen), seen[0][1]) == (1, 7)
    assert first.all("meta", **{"http-equiv": "refresh"})[0]["content"] == "7"
    assert "running, update 12" in first.text
    assert not page.all("meta", **{"http-equiv": "refresh"})
    assert "83.84" in page.cells


def test_the_map_shows_every_image_its_class_and_its_thumbnail(run_folder):
    folder = run_folder()
    labels = np.arange(12) % 3
    np.savez(
        folder / "figures" / "map.npz",
        features=np.eye(12, dtype=np.float16),
        names=np.array([f"{HOSTILE}/{number}.jpg" for number in range(12)]),
        columns=np.array(4),
        layouts=np.array(["t-SNE", "PCA"]),
        points=np.random.default_rng(0).normal(size=(2, 12, 2)),
        kept=np.array([0.5, 0.25]),
        labels=labels,
        classes=np.array(["ant", HOSTILE, "bee"]),
    )
    Image.new("RGB", (128, 96), "red").save(folder / "figures" / "map.jpg")
    page = page_of(folder)
    [data] = [json.loads(attrs["data-map"]) for attrs in page.all("figure") if "data-map" in attrs]
    assert (data["labels"], data["columns"], data["rows"], len(data["names"])) == (labels.tolist(), 4, 3, 12)
    assert all(0 <= x <= 1000 and 0 <= y <= data["height"] for points in data["layouts"] for x, y in points)
    dots = [attrs for attrs in page.all("path") if "data-label" in attrs]
    assert sum(attrs["d"].count("M") for attrs in dots) == 24
    assert "50 % (t-SNE) and 25 % (PCA) are among the 10 nearest on the map" in page.text
    assert not page.unbalanced


def test_a_run_writes_its_report_at_its_end(tiny_run):
    page = Page((tiny_run / REPORT).read_text(encoding="utf-8"))
    assert page.all("figure", **{"class": "chart tall"})
    assert read_run(tiny_run, own=True).status == "finished"
    results = json.loads((tiny_run / "results.json").read_text())
    assert f"{results['knn_top1']:.2f}" in page.cells
    [data] = [json.loads(attrs["data-map"]) for attrs in page.all("figure") if "data-map" in attrs]
    assert len(data["names"]) == len(data["labels"]) == 50
    assert np.load(tiny_run / "figures" / "map.npz")["features"].shape == (50, 32)
    assert (Path(tiny_run) / "figures" / "map.jpg").is_file()
