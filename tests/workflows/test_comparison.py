"""The comparison from end to end: what it tries, what it writes down, and how it goes on."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sslvision.errors import UsageError
from sslvision.evaluation.confidence import wilson_interval
from sslvision.workflows import comparison

ARMS = ["from scratch", "frozen features", "partial", "full"]
SHORT = (
    "recipe=compare",
    "data=digits",
    "labels_per_class=[1,3]",
    "seeds=2",
    "lr_ratios=[0.1,1.0]",
    "epochs=0",
    "min_updates=4",
    "evaluations=2",
    "scratch_longer=2",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
)


@pytest.fixture(scope="session")
def compare(settings_of, tiny_run):
    """Compare on digits: compare(folder, "key=value", ...) -> cells."""

    def run(folder, *words):
        given = {word.split("=")[0] for word in words}
        kept = [word for word in (f"run={tiny_run}", *SHORT) if word.split("=")[0] not in given]
        return comparison.compare(settings_of("finetune", *kept, *words), folder, words)

    return run


@pytest.fixture(scope="module")
def finished(compare, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "finished"
    return folder, compare(folder)


def entries_of(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def test_every_arm_has_mean_and_deviation_of_its_seeds_at_the_rate_that_validated_best(finished):
    folder, cells = finished
    assert [(cell["labels_per_class"], cell["arm"]) for cell in cells] == [(n, arm) for n in (1, 3) for arm in ARMS]
    entries = entries_of(folder)
    for cell in cells:
        mine = [e for e in entries if (e["arm"], e["labels"]) == (cell["arm"], cell["labels_per_class"])]
        assert cell["images"] == 10 * cell["labels_per_class"]
        if cell["arm"] == "frozen features":
            kept = mine
        else:
            tried = [e for e in mine if e["seed"] == 0]
            assert [e["lr_ratio"] for e in tried] == [0.1, 1.0]
            best = max(tried, key=lambda e: (e["val_top1"], -e["val_loss"]))
            kept = [best, *(e for e in mine if e["seed"] == 1)]
            assert {e["lr_ratio"] for e in kept} == {best["lr_ratio"]}
            assert {e["updates"] for e in mine} == {8 if cell["arm"] == "from scratch" else 4}
        assert len(kept) == 2
        scores = [e["test_top1"] for e in kept]
        assert cell["mean"] == pytest.approx(np.mean(scores))
        assert cell["deviation"] == pytest.approx(np.std(scores, ddof=1))


def test_table_and_picture_say_what_the_cells_say(finished):
    folder, cells = finished
    with open(folder / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["mean"]) for row in rows] == pytest.approx([cell["mean"] for cell in cells], abs=0.005)
    with Image.open(folder / "comparison.png") as image:
        assert np.asarray(image.convert("L")).std() > 5


def test_table_file_and_results_have_the_interval_of_the_same_test_images(finished, compare, capsys):
    folder, cells = finished
    with open(folder / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["test_images"] for row in rows} == {str(entry["test_images"]) for entry in entries_of(folder)}
    for row, cell in zip(rows, json.loads((folder / "results.json").read_text())["cells"], strict=True):
        tested = int(row["test_images"])
        expected = wilson_interval(float(row["mean"]) / 100 * tested, tested)
        assert (float(row["low"]), float(row["high"])) == pytest.approx(expected, abs=0.02)
        assert (cell["low"], cell["high"]) == pytest.approx(expected, abs=0.02)
        assert cell["low"] < cell["high"]
    capsys.readouterr()
    compare(folder)  # nothing is left to train
    best = max(cells, key=lambda cell: cell["mean"])
    assert (
        f"Mean and standard deviation of 2 seeds; {best['test_images']:,} test images: {best['mean']:.1f} % has the 95 % "
        f"interval {best['low']:.1f} to {best['high']:.1f} %."
    ) in capsys.readouterr().out


def test_what_is_done_is_not_done_again_and_what_is_missing_is(finished, compare, tmp_path, monkeypatch):
    folder, cells = finished
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("settings.json", "config.yaml"):
        (begun / name).write_bytes((folder / name).read_bytes())
    lines = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
    (begun / "cells.jsonl").write_text("".join(lines[:-1]) + lines[-1][:20])  # a kill tore the last one
    trained, train = [], comparison.train_classifier

    def count(*arguments, **options):
        trained.append(arguments)
        return train(*arguments, **options)

    monkeypatch.setattr(comparison, "train_classifier", count)
    assert compare(begun) == cells
    assert len(trained) == 1
    again, *others = (
        sorted(entries_of(f), key=lambda e: [str(e[k]) for k in ("arm", "labels", "seed", "lr_ratio")])
        for f in (begun, folder)
    )
    assert [{**e, "seconds": 0} for e in again] == [{**e, "seconds": 0} for e in others[0]]


@pytest.mark.thorough
def test_more_labels_and_seeds_may_be_added_and_nothing_else_changed(finished, compare, tmp_path):
    folder, cells = finished
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("settings.json", "config.yaml", "cells.jsonl"):
        (copy / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(UsageError, match=r"min_updates=5 \(it was 4\).*overwrite=true"):
        compare(copy, "min_updates=5")
    more = compare(copy, "labels_per_class=[1,2,3]")
    assert [cell for cell in more if cell["labels_per_class"] != 2] == cells


@pytest.mark.thorough
def test_findings_are_kept_with_what_cannot_be_read_and_stay_when_it_goes_on(compare, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for place in range(48):
        file = tmp_path / "photos" / "ab"[place % 2] / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(file)
    (tmp_path / "photos" / "a" / "0.png").write_bytes(b"nothing")
    (tmp_path / "photos" / "notes.txt").touch()
    words = ("data=folder", f"data.root={tmp_path / 'photos'}", "data.holdout=0.3", "data.workers=0", "seeds=1")
    found = []
    for labels in ("[1]", "[1,2]"):
        compare(tmp_path / "run", *words, f"labels_per_class={labels}", "lr_ratios=[1.0]")
        found.append(json.loads((tmp_path / "run" / "results.json").read_text()))
    for results in found:
        assert results["findings"][0].startswith("Left out: 1 of 49 files (2.04 %)")
        assert sum("cannot be read, and are left out." in finding for finding in results["findings"]) == 1
    assert len(found[1]["cells"]) == 8
    assert "cannot be read, and are left out." in capsys.readouterr().out


def test_a_comparison_needs_images_to_choose_by_and_one_device(compare, tmp_path):
    with pytest.raises(UsageError, match="holdout"):
        compare(tmp_path / "a", "holdout=0")
    with pytest.raises(UsageError, match="one device"):
        compare(tmp_path / "b", "trainer.devices=2", "trainer.strategy=ddp")


@pytest.mark.thorough
def test_classes_with_fewer_images_give_all_of_theirs_which_is_told_first_and_the_time_left_is_estimated(
    compare, tmp_path, capsys
):
    cells = compare(tmp_path / "small", "labels_per_class=[1,110]", "seeds=1", "lr_ratios=[0.1]")
    told = capsys.readouterr().out
    assert told.index("classes have fewer than 110 images to draw from (") < told.index(
        "1/8  from scratch, 1 per class"
    )
    assert told.count(" left\n") == 7  # after all but the last
    assert 1000 < cells[-1]["images"] < 1100  # 110 of each class would be these


@pytest.mark.e2e
def test_the_same_command_goes_on_in_the_same_folder(command, tiny_run, tmp_path):
    words = [f"run={tiny_run}", *SHORT, "labels_per_class=[1]", "seeds=1"]
    given = dict(word.split("=", 1) for word in words)  # the later ones count
    words = [f"{key}={value}" for key, value in given.items()]
    for told in ("from scratch, 1 per class", ""):
        done = command(*words, of="finetune", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
    assert "seed 0, rate" not in done.stdout  # nothing was left to train
    assert [folder.name for folder in (tmp_path / "outputs").iterdir()] == ["compare-tiny-digits"]


@pytest.mark.e2e
@pytest.mark.parametrize("overwrite", [False, True])
def test_ctrl_c_keeps_what_has_ended_and_prints_the_command_that_goes_on(overwrite, tiny_run, tmp_path):
    words = [f"run={tiny_run}", *SHORT, "name=stopped", *(["overwrite=true"] if overwrite else [])]
    process = subprocess.Popen(
        [sys.executable, "-m", "sslvision.finetune", *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # a terminal sends the signal to all processes of its foreground group
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    for line in process.stdout:
        if line.startswith("3/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    folder = tmp_path / "outputs" / "stopped"
    ended = entries_of(folder)
    assert 3 <= len(ended) < 18
    assert len(error.strip().splitlines()) == 1
    told, _, line = error.strip().rpartition(": ")
    assert told.startswith(f"stopped: SIGINT. {len(ended)} trainings have ended and are kept in {folder}; ")
    assert ("without overwrite=true, which would delete them" in told) == overwrite
    done = subprocess.run(
        [sys.executable, *shlex.split(line)[1:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(ended)} of them done" in done.stdout
    assert entries_of(folder)[: len(ended)] == ended  # to the second: none was trained again
    with open(folder / "comparison.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * len(ARMS)
