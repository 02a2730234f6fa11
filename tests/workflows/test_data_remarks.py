"""What is left out of a person's images or guessed: printed before training, and kept in results.json, by every command."""

import json

import numpy as np
import pytest
from PIL import Image

from sslvision.data.sources.folder import open_folder
from sslvision.workflows.pretraining import shrunk

NETWORK = ("run=test_vit", "pretrained=false", "backbone.image_size=32")


@pytest.fixture
def photos(tmp_path):
    """Classes in train/, one of them a link; a linked val/ without classes; files of two formats that are not read."""
    for place in range(80):
        folder = tmp_path / ("photos/train/light", "elsewhere/dark")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(place).integers(0, 256 - 120 * (place % 2), (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.png")
    for place in range(20):
        file = tmp_path / "elsewhere" / "val" / f"{place}.png"
        file.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 32), (place, 0, 0)).save(file)
        (tmp_path / "photos" / "train" / "light" / f"{place}.dng").touch()
    (tmp_path / "photos" / "train" / "dark").symlink_to("../../elsewhere/dark")
    (tmp_path / "photos" / "val").symlink_to(tmp_path / "elsewhere" / "val")
    (tmp_path / "photos" / "notes [1].txt").touch()
    (tmp_path / "photos" / "train" / "stray [old].png").write_bytes((tmp_path / "elsewhere/val/3.png").read_bytes())
    return tmp_path / "photos"


FINDINGS = [
    "Left out: 20 of 121 images (16.5 %), 20 .dng. Camera raw is not read: convert the files to TIFF or JPEG, for example with "
    "rawpy, imread(file).postprocess().",
    "Left out: 1 of 122 files (0.82 %), not being images that can be read: 1 .txt.",
    "train/: 1 of 81 images (1.23 %), stray [old].png, outside the class folders: left out.",
    "20 of 101 images (19.8 %) in val/ have no labels, for want of class folders, and are not used. Scores are measured on 16 "
    "of 80 images (20 %) of train/, held out from training (data.holdout).",
]


def test_pretraining_says_what_it_leaves_out_before_the_first_step_and_scores_by_the_labels(
    photos, tiny_settings, warm_command, tmp_path
):
    kept = [word for word in tiny_settings("mae") if not word.startswith(("data=", "batch_size", "epochs", "warmup"))]
    words = ("recipe=mae", *kept, "epochs=1", "warmup_epochs=0", "dry_run=true", "data=folder", f"data.root={photos}")
    done = warm_command(*words, "data.workers=0", "data.holdout=0.2", "batch_size=8", "name=told", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    start = done.stdout.index("Training is finished")
    assert all(finding in done.stdout[:start] for finding in FINDINGS)
    results = json.loads((tmp_path / "outputs" / "told-dry-run" / "results.json").read_text())
    assert results["findings"][:4] == FINDINGS
    assert 0 <= results["knn_top1"] <= 100


@pytest.mark.thorough
def test_the_probe_says_the_same(photos, warm_command, tmp_path):
    words = (*NETWORK, "data=folder", f"data.root={photos}", "data.workers=0", "data.holdout=0.2", "device=cpu")
    done = warm_command(*words, "name=probed", "pixels=false", of="probe", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    start = done.stdout.index("Frozen features, accuracy on 16 test images")
    assert all(finding in done.stdout[:start] for finding in FINDINGS)
    (file,) = (tmp_path / "outputs").rglob("results.json")
    assert json.loads(file.read_text())["findings"] == FINDINGS


def test_unreadable_images_stand_in_the_findings_of_the_probe(photos, settings_of, tmp_path):
    from sslvision.workflows.probing import probe

    (photos / "train" / "light" / "0.png").write_bytes(b"")
    words = (*NETWORK, "data=folder", f"data.root={photos}", "data.workers=0", "pixels=false", "device=cpu")
    settings = settings_of("probe", *words, f"features_dir={tmp_path / 'features'}", "data.holdout=0.2")
    assert probe(settings, tmp_path / "results", words)["findings"][-1] in (
        "1 of 64 training images (1.56 %) cannot be read, and were left out.",
        "1 of 16 test images (6.25 %) cannot be read, and were left out.",
    )


def test_too_few_images_are_explained_by_what_was_left_out(photos, tiny_settings, warm_command, tmp_path):
    for file in photos.rglob("*.png"):
        if "light" in str(file):
            file.unlink()
    tiny = [word for word in tiny_settings("mae") if not word.startswith("data=")]
    done = warm_command("recipe=mae", *tiny, f"data={photos}", cwd=tmp_path)
    assert done.returncode == 3
    (message,) = done.stderr.strip().splitlines()
    assert "images to train on, fewer than one batch of 296: set batch_size=" in message
    assert ".dng. Camera raw is not read: convert the files to TIFF or JPEG" in message


def test_photographs_that_a_recipe_for_small_images_shrinks_are_told_and_others_are_not(tmp_path):
    for place in range(12):
        Image.new("RGB", (150, 120)).save(tmp_path / f"{place}.png")
    source = open_folder(tmp_path, holdout=0).train
    (told,) = shrunk(source, (32, 32))
    assert told.startswith("Images of about 150x120 pixels are shrunk to 32 (backbone.image_size).")
    assert "recipe=mae_photos and recipe=dino_photos" in told
    assert shrunk(source, (64, 64)) == shrunk(source, (40, 41)) == []
