"""Labeling new images from the command line."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from sslvision.data.sources.digits import open_digits
from sslvision.workflows.predicting import Prediction, predict_to_csv, with_true_classes, write_accuracy


@pytest.fixture(scope="module")
def finetuned(tiny_run, settings_of, tmp_path_factory):
    from sslvision.workflows.finetuning import finetune

    folder = tmp_path_factory.mktemp("runs") / "finetuned"
    words = (f"run={tiny_run}", "data=digits", "epochs=0", "min_updates=2", "scratch=false", "trainer.accelerator=cpu")
    finetune(settings_of("finetune", *words, "trainer.enable_progress_bar=false"), folder, words)
    return folder


def test_a_folder_of_images_is_labeled_as_the_classifier_would_and_broken_ones_are_named(
    finetuned, warm_command, tmp_path
):
    test = open_digits().test
    (tmp_path / "new" / "deep").mkdir(parents=True)
    for number in range(12):
        Image.fromarray(test.images[number, 0].numpy()).save(tmp_path / "new" / "deep" / f"{number:02d}.png")
    (tmp_path / "new" / "broken.jpg").write_bytes(b"no image")
    done = warm_command(f"run={finetuned}", f"images={tmp_path / 'new'}", "top=2", of="predict", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "13 images" in done.stdout
    assert "1 of them unreadable" in done.stdout
    with open(finetuned / "predictions.csv", newline="") as file:
        broken, *rows = csv.DictReader(file)
    assert (broken["image"], broken["label"]) == ("broken.jpg", "")
    assert broken["problem"]
    model = timm.create_model(f"local-dir:{finetuned / 'export'}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        shares = model((test.images[:12] / 255 - mean) / std).softmax(1)
    best = shares.topk(2)
    for number, row in enumerate(rows):
        assert row["image"] == f"deep/{number:02d}.png"
        assert [int(row["label"]), int(row["label_2"])] == best.indices[number].tolist()
        given = [float(row["probability"]), float(row["probability_2"])]
        np.testing.assert_allclose(given, best.values[number].numpy(), atol=1e-4)


def test_images_in_class_folders_are_scored_as_fine_tuning_scored_them(finetuned, settings_of, tmp_path, capsys):
    test, results = open_digits().test, json.loads((finetuned / "results.json").read_text())
    for number in range(len(test)):
        folder = tmp_path / "digits" / ("val" if number % 2 else "test") / str(int(test.labels[number]))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(test.images[number, 0].numpy()).save(folder / f"{number:04d}.png")
    (tmp_path / "digits" / "val" / "7" / "broken.png").write_bytes(b"no image")
    Image.new("L", (32, 32)).save(tmp_path / "digits" / "stray.png")
    words = (f"run={finetuned}", f"images={tmp_path / 'digits'}", f"output={tmp_path / 'out.csv'}", "device=cpu")
    predict_to_csv(settings_of("predict", *words))
    told = " ".join(capsys.readouterr().out.split())
    written = json.loads((tmp_path / "out-accuracy.json").read_text())
    for key in ("top1", "top5", "per_class", "top1_interval"):
        assert written[key] == results["fine_tuned"][key], key
    assert (written["images"], written["images_without_a_class"]) == (599, 1)
    assert f"{written['top1']:.1f} % of 599 images in folders named as a class" in told
    assert "1 images lie in no such folder" in told


def test_images_in_no_class_folder_have_no_accuracy(finetuned, settings_of, tmp_path, capsys):
    Image.new("L", (32, 32)).save(tmp_path / "a.png")
    predict_to_csv(settings_of("predict", f"run={finetuned}", f"images={tmp_path}", f"output={tmp_path / 'out.csv'}"))
    assert "folders named as a class" not in capsys.readouterr().out
    assert not (tmp_path / "out-accuracy.json").exists()


def test_a_nearer_class_folder_decides_and_fewer_classes_have_no_top5(tmp_path):
    rows = [
        Prediction("ant/bee/1.png", ("bee", "ant"), (0.6, 0.4), ""),
        Prediction("ant/new/2.png", ("bee", "ant"), (0.6, 0.4), ""),
        Prediction("ant.png", ("ant", "bee"), (0.6, 0.4), ""),
        Prediction("bee/3.png", (), (), "the file is empty"),
    ]
    known = []
    assert list(with_true_classes(rows, ("ant", "bee", "cat"), known)) == rows
    assert known == [("bee", ("bee", "ant")), ("ant", ("bee", "ant"))]
    words = write_accuracy(known, ("ant", "bee", "cat"), tmp_path / "p.csv", unknown=1)
    assert words.startswith("50.0 % of 2 images")
    written = json.loads((tmp_path / "p-accuracy.json").read_text())
    assert "top5" not in written
    assert written["per_class"] == {"ant": 0, "bee": 100, "cat": None}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["images=."], 2, "run is not given"),
        (["run={finetuned}"], 2, "images is not given"),
        (["run={finetuned}", "images=nowhere"], 3, "nowhere"),
        (["run={tiny_run}", "images=."], 2, "no head.*sslvision.finetune"),
        (["run={finetuned}", "images=.", "topp=3"], 2, "Did you mean top"),
    ],
)
def test_what_cannot_be_labeled_is_refused_in_words(words, code, message, warm_command, finetuned, tiny_run, tmp_path):
    words = [word.format(finetuned=finetuned, tiny_run=tiny_run) for word in words]
    done = warm_command(*words, of="predict", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    import re

    assert re.search(message, done.stderr)
