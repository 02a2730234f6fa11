"""Labeling new images from the command line."""

import csv
import json
import os
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from sslvision.data.sources.digits import open_digits
from sslvision.errors import DataError
from sslvision.workflows.predicting import predict_to_csv
from sslvision.workflows.prediction_files import Prediction, with_true_classes, write_accuracy


@pytest.fixture(scope="module")
def finetuned(tiny_run, settings_of, tmp_path_factory):
    from sslvision.workflows.finetuning import finetune

    folder = tmp_path_factory.mktemp("runs") / "finetuned"
    words = (
        f"run={tiny_run}",
        "data=digits",
        "epochs=0",
        "min_updates=2",
        "scratch=false",
        "labels_per_class=20",
        "trainer.accelerator=cpu",
    )
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
    assert (
        "1 of them unreadable (see the column `problem`, the first: broken.jpg (the content is not an image"
        in done.stdout
    )
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


@pytest.mark.e2e
def test_linked_folders_and_images_are_labeled_and_what_is_left_out_is_said_first(finetuned, warm_command, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new").mkdir()
    picture = Image.fromarray(open_digits().test.images[0, 0].numpy())
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "new")
    (tmp_path / "new" / "linked").symlink_to("../elsewhere")
    (tmp_path / "new" / "c.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "new" / "d.png").symlink_to("nowhere.png")
    (tmp_path / "new" / "e.dcm").touch()
    (tmp_path / "new" / "f.txt").touch()
    done = warm_command(f"run={finetuned}", "images=new", "output=out/labels.csv", of="predict", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "out" / "labels.csv", newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == ["c.png", "linked/a.png", "linked/b.png"]
    said = [
        "Left out: 1 of 4 images (25 %), 1 .dcm. DICOM is not read",
        "Left out: 1 of 5 files (20 %), not being images that can be read: 1 .txt.",
        "Left out: links that lead nowhere or in a circle, and special files (2): d.png, linked/back.",
    ]
    assert all(done.stdout.index(one) < done.stdout.index("3 images in") for one in said)


@pytest.mark.parametrize(
    ("output", "code", "message"),
    [
        (
            "file/labels.csv",
            5,
            r"file/labels\.csv cannot be written: (Not a directory|File exists)\. Give the path of a CSV",
        ),
        ("new", 2, r"output=new is a folder: say output=new/predictions\.csv"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_image_is_read(
    output, code, message, finetuned, warm_command, tmp_path
):
    (tmp_path / "new").mkdir()
    (tmp_path / "file").touch()
    Image.new("L", (32, 32)).save(tmp_path / "new" / "a.png")
    done = warm_command(f"run={finetuned}", "images=new", f"output={output}", of="predict", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert re.search(message, done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert " images in " not in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["file", "new"]


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
    (tmp_path / "out-accuracy.json").write_text("of images that out.csv had before")
    words = (f"run={finetuned}", f"images={tmp_path}", f"output={tmp_path / 'out.csv'}", "overwrite=true")
    predict_to_csv(settings_of("predict", *words))
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
        (["run={finetuned}", "images=nowhere"], 3, r"nowhere does not exist\. Set images to the folder"),
        (["run={finetuned}", "images="], 2, "images is (empty|not given)"),
        (["run={finetuned}", "images=."], 3, r"No images in .*Nothing is there.*Check images\."),
        (["run={tiny_run}", "images=."], 2, "no head.*sslvision.finetune"),
        (["run={finetuned}", "images=.", "topp=3"], 2, "Did you mean top"),
    ],
)
def test_what_cannot_be_labeled_is_refused_in_words(words, code, message, warm_command, finetuned, tiny_run, tmp_path):
    words = [word.format(finetuned=finetuned, tiny_run=tiny_run) for word in words]
    done = warm_command(*words, of="predict", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert re.search(message, done.stderr)


def test_images_none_of_which_can_be_read_are_an_error_with_the_reason_and_its_rows(finetuned, settings_of, tmp_path):
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.zeros((8, 8, 7), np.uint8))
    settings = settings_of(
        "predict", f"run={finetuned}", f"images={tmp_path}", f"output={tmp_path / 'p.csv'}", "workers=0"
    )
    with pytest.raises(DataError, match=r"None of 3 images can be read; the first: 0\.npy \(the array has the shape"):
        predict_to_csv(settings)
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 4


def test_earlier_predictions_are_kept_unless_they_shall_be_replaced(finetuned, warm_command, tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "one.png")
    kept = finetuned / "predictions.csv"
    kept.write_text("earlier\n")

    def predicted(*words):
        return warm_command(f"run={finetuned}", "images=one.png", "workers=0", *words, of="predict", cwd=tmp_path)

    for number in (2, 3):
        done = predicted()
        assert done.returncode == 0, done.stderr
        assert "predictions.csv of an earlier call is kept; overwrite=true would replace it." in done.stdout
        assert str(finetuned / f"predictions-{number}.csv") in done.stdout
        assert (finetuned / f"predictions-{number}.csv").read_text().count("\n") == 2
    assert kept.read_text() == "earlier\n"
    assert predicted("overwrite=true").returncode == 0
    assert kept.read_text().startswith("image,")
    for file in finetuned.glob("predictions*.csv"):
        file.unlink()


@pytest.mark.thorough
def test_a_file_that_output_names_is_not_replaced_unasked(finetuned, warm_command, tmp_path):
    Image.new("L", (32, 32)).save(tmp_path / "one.png")
    (tmp_path / "mine.csv").write_text("mine\n")
    words = (f"run={finetuned}", "images=one.png", "workers=0", "output=mine.csv")
    done = warm_command(*words, of="predict", cwd=tmp_path)
    assert done.returncode == 2
    assert "output=mine.csv exists: replace it with overwrite=true, or give another path." in done.stderr
    assert (tmp_path / "mine.csv").read_text() == "mine\n"
    done = warm_command(*words, "overwrite=true", of="predict", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine.csv").read_text().startswith("image,")
