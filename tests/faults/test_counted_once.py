"""Five images on two processes: each counted once (row 23). The probe's own test is in tests/workflows/test_probing.py."""

import numpy as np
import pytest
from PIL import Image

from sslvision.runs.metrics import read_metrics
from sslvision.workflows.finetuning import finetune

pytestmark = [pytest.mark.faults, pytest.mark.e2e]  # two processes take their time to start

TWO = ("trainer.devices=2", "trainer.strategy=ddp", "name=two")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes: 12 images to learn from, 5 to validate on and 5 to score by."""
    root = tmp_path_factory.mktemp("five") / "photos"
    for split, count in (("train", 12), ("val", 5), ("test", 5)):
        for place in range(count):
            file = root / split / ("light", "dark")[place % 2] / f"{place}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(place).integers(0, 256 - 120 * (place % 2), (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
    return root


def values(folder, column):
    return [value for value in read_metrics(folder / "metrics.csv")[column] if value is not None]


def test_two_processes_validate_a_classifier_on_each_of_five_images_once(
    photos, tiny_run, tmp_path, settings_of, command
):
    words = (
        *(f"run={tiny_run}", "data=folder", f"data.root={photos}", "data.workers=0", "scratch=false", "batch_size=4"),
        *("epochs=0", "min_updates=2", "evaluations=1", "trainer.accelerator=cpu", "trainer.precision=32-true"),
        "trainer.enable_progress_bar=false",
    )
    ended = command(*words, *TWO, cwd=tmp_path, of="finetune")
    assert ended.returncode == 0, ended.stderr
    finetune(settings_of("finetune", *words), tmp_path / "one")
    # The head is fitted and the weights are the same before the first update: so are the scores, over each image once.
    one, two = (tmp_path / "one", tmp_path / "outputs" / "two")
    assert values(two, "val_loss")[0] == pytest.approx(values(one, "val_loss")[0], rel=1e-4)
    assert values(two, "val_top1")[0] == values(one, "val_top1")[0]
    assert {value % 20 for value in values(two, "val_top1")} == {0}, "fifths: the first image is not counted twice"


def test_two_processes_compare_features_of_each_of_five_images_once(photos, tiny_settings, tmp_path, command):
    kept = [word for word in tiny_settings("mae") if not word.startswith(("data=", "batch_size", "knn"))]
    words = (
        "recipe=mae",
        "knn_every_epochs=1",
        *kept,
        "data=folder",
        f"data.root={photos}",
        "data.channels=1",
        "batch_size=4",
        "data.workers=0",
    )
    ended = command(*words, *TWO, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = values(tmp_path / "outputs" / "two", "knn_top1")
    assert len(found) == 2
    assert {value % 20 for value in found} == {0}


def test_unreadable_images_that_only_all_processes_together_find_too_many_stop_all_of_them(
    tiny_settings, tmp_path, command
):
    """36 of 240 cannot be read, and 24 may: of 18 in each process neither would stop, before the second epoch."""
    for place in range(240):
        file = tmp_path / "photos" / f"{place:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(place).integers(0, 256, (32, 32), dtype=np.uint8)).save(file)
        if place % 20 < 3:
            file.write_bytes(b"no image")
    kept = [word for word in tiny_settings("mae") if not word.startswith(("data=", "batch_size", "knn", "epochs"))]
    words = ("data=folder", "data.root=photos", "data.channels=1", "data.holdout=0", "data.workers=0", "batch_size=2")
    ended = command("recipe=mae", *kept, *words, "epochs=9", "knn_every_epochs=0", *TWO, cwd=tmp_path)
    assert ended.returncode == 3, ended.stderr
    assert "240 images cannot be read" in ended.stderr
    assert "data.max_unreadable=0.1 of them" in ended.stderr
    run = tmp_path / "outputs" / "two"
    assert read_metrics(run / "metrics.csv")["step"][-1] <= 100, "told every 50 batches, of 120 in the first epoch"
    assert 24 < len((run / "unreadable.csv").read_text().splitlines()) - 1 <= 36
