"""The report of a run: what it says is what the folder has, in one file that needs nothing else."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image
from rich.console import Console

from sslvision.cli.words import as_settings
from sslvision.errors import UsageError
from sslvision.runs.run_record import STOPPED, read_run
from sslvision.workflows.report_settings import Report
from sslvision.workflows.report_words import against
from sslvision.workflows.reporting import REPORT, report, reported

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
    assert against(40, None, 44, (39, 49), "pixels") == "-4.0 points against pixels"


def test_every_curve_is_drawn_and_carries_its_values(run_folder):
    page = page_of(run_folder())
    charts = [json.loads(attrs["data-chart"]) for attrs in page.all("figure") if "data-chart" in attrs]
    loss = charts[0]["lines"][0]
    assert loss["x"] == [step / 4 for step in range(1, 13)]
    assert loss["y"] == pytest.approx([2 / step for step in range(1, 13)], rel=1e-4)
    assert [line["name"] for chart in charts for line in chart["lines"]] == [
        "training loss",
        "k-NN top-1 (%)",
        "grad_norm",
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
    with pytest.raises(KeyboardInterrupt), reported(folder, Console()):
        raise KeyboardInterrupt("SIGINT: saved at step 12")
    page = Page((folder / REPORT).read_text())
    assert "SIGINT: saved at step 12" in page.text
    assert "stopped at update 12" in page.text
    assert f"python -m sslvision.pretrain resume=auto output_dir={folder}" in page.text
    with reported(folder, Console()):
        (folder / "results.json").write_text(json.dumps(RESULTS))
    assert not (folder / STOPPED).exists()
    assert "stopped" not in (folder / REPORT).read_text().split("<main>")[0].split("</style>")[1]


def test_a_failure_to_write_the_report_costs_nothing_and_is_told(run_folder, capsys):
    folder = run_folder()
    (folder / "config.yaml").write_text("not: [a run")
    with reported(folder, Console(soft_wrap=True)):
        pass
    assert "The report could not be written" in capsys.readouterr().out
    assert not (folder / REPORT).exists()


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


def test_a_run_writes_its_report_at_its_end(tiny_run):
    page = Page((tiny_run / REPORT).read_text(encoding="utf-8"))
    assert page.all("figure", **{"class": "chart tall"})
    assert read_run(tiny_run, own=True).status == "finished"
    results = json.loads((tiny_run / "results.json").read_text())
    assert f"{results['knn_top1']:.2f}" in page.cells
