import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslvision.augment.crops import center_crop
from sslvision.backbones.build import build_backbone
from sslvision.data.decode import read_image
from sslvision.errors import DataError, StorageError, UsageError
from sslvision.nn.normalize import Normalize
from sslvision.workflows import prediction_files
from sslvision.workflows.predicting import open_images, predict
from sslvision.workflows.prediction_files import Prediction, check_output, write_csv

CLASSES = ("ant", "bee", "cat", "dog")
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
NORMALIZE = Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.2])


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny_patch16_224", image_size=16, drop_path_rate=0.5, **VIT)
    backbone.model.reset_classifier(len(CLASSES))
    torch.nn.init.normal_(backbone.model.head.weight)
    return backbone


def picture(path, mode="RGB", size=(24, 20), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(mode)
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], bands), dtype=np.uint8)
    Image.fromarray(values[:, :, 0] if bands == 1 else values).save(path)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of images of all kinds, two of them unreadable."""
    root = tmp_path / "photos"
    picture(root / "z.png", seed=1)
    picture(root / "train" / "ant" / "1.jpg", seed=2)
    picture(root / "val" / "1.png", "RGBA", seed=3)
    picture(root / "deep" / "er" / "still" / "gray.png", "L", seed=4)
    picture(root / "wide.webp", size=(60, 17), seed=5)
    picture(root / ".hidden" / "1.png")
    picture(root / ".2.png")
    (root / "broken.png").write_bytes((root / "z.png").read_bytes()[:60])
    (root / "empty.jpg").write_bytes(b"")
    (root / "notes.txt").write_text("not an image")
    return root


ORDER = [
    "broken.png",
    "deep/er/still/gray.png",
    "empty.jpg",
    "train/ant/1.jpg",
    "val/1.png",
    "wide.webp",
    "z.png",
]


def probabilities(classifier, path):
    """Return what stock timm says of one image, as its own forward computes it."""
    image = NORMALIZE(center_crop(read_image(path, 3), (16, 16))[None])
    with torch.no_grad():
        return classifier.model.eval()(image).softmax(dim=1)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_image_has_its_row_in_order_with_the_probabilities_of_the_model_itself(classifier, folder, batch_size):
    source = open_images(folder, channels=3)
    rows = list(predict(classifier, NORMALIZE, CLASSES, source, batch_size=batch_size, top=4))
    assert [row.image for row in rows] == ORDER
    for row in rows:
        if row.image in ("broken.png", "empty.jpg"):
            assert row.labels == row.probabilities == ()
            assert row.problem
            continue
        direct = probabilities(classifier, folder / row.image)
        assert row.labels == tuple(CLASSES[place] for place in direct.argsort(descending=True))
        assert row.probabilities == pytest.approx(sorted(direct.tolist(), reverse=True), abs=1e-6)
        assert row.problem == ""
    assert rows[2].problem == "the file is empty"


def test_workers_change_nothing_and_the_global_random_numbers_stay(classifier, folder):
    source = open_images(folder, channels=3)
    alone = list(predict(classifier, NORMALIZE, CLASSES, source, batch_size=2))
    before = torch.get_rng_state()
    assert list(predict(classifier, NORMALIZE, CLASSES, source, batch_size=2, workers=2)) == alone
    assert torch.equal(torch.get_rng_state(), before)


def test_reasons_advise_no_channels_because_the_run_determines_them(classifier, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((20, 24, 7), np.uint8))
    (row,) = predict(classifier, NORMALIZE, CLASSES, open_images(tmp_path, channels=3))
    assert row.problem.startswith("the array has the shape (20, 24, 7), and channels=3 needs ")
    assert "reads it" not in row.problem


def test_the_largest_image_that_is_read_is_a_setting_and_named_as_it_is_written(classifier, tmp_path):
    picture(tmp_path / "a.png", size=(24, 20))
    (row,) = predict(classifier, NORMALIZE, CLASSES, open_images(tmp_path, channels=3, max_pixels=479))
    assert row.problem == "24 x 20 pixels, more than the limit max_pixels=479"
    (row,) = predict(classifier, NORMALIZE, CLASSES, open_images(tmp_path, channels=3, max_pixels=480))
    assert not row.problem


def test_a_single_file_is_predicted_and_a_relative_path_is_fine(classifier, folder, monkeypatch):
    monkeypatch.chdir(folder / "train")
    (row,) = predict(classifier, NORMALIZE, CLASSES, open_images("ant/1.jpg", channels=3), top=1)
    assert row.image == "1.jpg"
    assert row.probabilities == pytest.approx([float(probabilities(classifier, folder / "train/ant/1.jpg").max())])


def test_the_classifier_is_in_eval_mode_for_the_time_only_even_if_one_stops_early(classifier, folder):
    classifier.train()
    rows = predict(classifier, NORMALIZE, CLASSES, open_images(folder, channels=3), batch_size=1)
    next(rows)
    assert not classifier.training
    rows.close()
    assert classifier.training


def test_a_folder_without_images_and_one_that_is_not_there_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"No images in .*1 \.txt.*Check images\."):
        open_images(tmp_path, channels=3)
    with pytest.raises(DataError, match=r"does not exist\. (Give images|Set images to) the folder"):
        open_images(tmp_path / "missing", channels=3)


def test_a_network_without_this_many_classes_is_refused_before_anything_is_read(classifier, folder):
    source = open_images(folder, channels=3)
    bare = build_backbone("vit_tiny_patch16_224", image_size=16, **VIT)
    with pytest.raises(UsageError, match="has 0 classes, not 4: only a fine-tuned one"):
        predict(bare, NORMALIZE, CLASSES, source)
    with pytest.raises(UsageError, match="has 4 classes, not 2"):
        predict(classifier, NORMALIZE, CLASSES[:2], source)
    with pytest.raises(UsageError, match="top=0"):
        predict(classifier, NORMALIZE, CLASSES, source, top=0)


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        ("file/deep/labels.csv", StorageError, r"labels\.csv cannot be written: Not a directory\. Give the path"),
        ("/proc/labels.csv", StorageError, "cannot be written: No such file or directory"),
        (f"{'x' * 300}/labels.csv", StorageError, "cannot be written: File name too long"),
        (".", UsageError, r"output=\. is a folder: say output=predictions\.csv"),
        ("/dev/null", UsageError, "output=/dev/null is a device: give the path of a file"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(output, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(error, match=message):
        check_output(Path(output))
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_without_permission_is_named_with_what_to_do(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prediction_files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StorageError, match=r"cannot be written: Permission denied\. Give .*output="):
        check_output(tmp_path / "labels.csv")


def test_an_output_in_a_new_folder_or_over_an_old_file_is_fine(tmp_path):
    check_output(tmp_path / "new" / "labels.csv")
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "old.csv").write_text("old")
    check_output(tmp_path / "old.csv")
    assert (tmp_path / "old.csv").read_text() == "old"


ROWS = [
    Prediction("a.png", ("ant", "bee, or wasp"), (0.75, 0.25), ""),
    Prediction('b "2".png', (), (), "the file is empty"),
    Prediction("=1+1.png", ("bee, or wasp", "ant"), (0.5000004, 0.4999996), ""),
]


def test_the_csv_has_a_line_for_every_image_and_reads_back(tmp_path):
    file = tmp_path / "new" / "predictions.csv"
    assert write_csv(iter(ROWS), file, top=2) == (3, 1)
    with open(file, newline="", encoding="utf-8") as opened:
        lines = list(csv.reader(opened))
    assert lines == [
        ["image", "label", "probability", "label_2", "probability_2", "problem"],
        ["a.png", "ant", "0.750000", "bee, or wasp", "0.250000", ""],
        ['b "2".png', "", "", "", "", "the file is empty"],
        ["./=1+1.png", "bee, or wasp", "0.500000", "ant", "0.500000", ""],  # no formula, and the same file
    ]
    assert os.listdir(file.parent) == ["predictions.csv"]


def test_rows_are_written_as_they_come_and_a_failure_leaves_the_old_file_whole(tmp_path):
    file = tmp_path / "predictions.csv"
    file.write_text("old")
    seen = []

    def rows():
        for number in range(20_000):
            yield Prediction(f"{number:06}.png", ("ant", "bee"), (0.9, 0.1), "")
            if number == 15_000:
                seen.append((tmp_path / ".predictions.csv.tmp").stat().st_size)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_csv(rows(), file, top=2)
    assert seen[0] > 300_000  # most of it was on the disk already
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["predictions.csv"]


def test_names_of_files_that_are_no_text_come_out_as_the_bytes_they_are(classifier, tmp_path):
    root = tmp_path / "photos"
    picture(root / "plain.png")
    os.rename(root / "plain.png", os.fsencode(root) + b"/caf\xe9.png")
    source = open_images(root, channels=3)
    write_csv(predict(classifier, NORMALIZE, CLASSES, source, top=1), tmp_path / "out.csv", top=1)
    assert b"\ncaf\xe9.png," in (tmp_path / "out.csv").read_bytes()
