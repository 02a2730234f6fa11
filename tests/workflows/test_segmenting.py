"""`segment` on scenes that are made here: squares whose class is their brightness."""

import json

import pytest
import torch
from matplotlib.image import imread
from PIL import Image

from sslvision.cli.compose import compose_settings
from sslvision.cli.recipes import SEGMENT
from sslvision.errors import DataError, UsageError
from sslvision.workflows.segmenting import segment


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Images of 40 pixels with two squares, gray (1) and white (2), and the class of each pixel."""
    root, generator = tmp_path_factory.mktemp("scenes"), torch.Generator().manual_seed(0)
    for split, number in (("train", 24), ("val", 8)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for index in range(number):
            mask = torch.zeros(40, 40, dtype=torch.uint8)
            for label in (1, 2):
                y, x = torch.randint(0, 24, (2,), generator=generator).tolist()
                mask[y : y + 16, x : x + 16] = label
            Image.fromarray((mask * 120).numpy()).save(root / "images" / split / f"{index}.png")
            Image.fromarray(mask.numpy()).save(root / "masks" / split / f"{index}.png")
    (root / "classes.txt").write_text("ground\ngray\nwhite\n")
    return root


def run(folder, *words):
    words = [*words, "device=cpu", "workers=0"]
    return segment(compose_settings(words, SEGMENT), folder, words)


def test_settings_that_cannot_be_are_refused_before_anything_is_read(tmp_path):
    for words, told in (
        (["masks=scenes"], "run is not given"),
        (["run=a"], "masks is not given"),
        (["run=a", "masks=scenes", "holdout=1"], "holdout=1.0 must lie between 0 and 1"),
    ):
        with pytest.raises(UsageError, match=told):
            compose_settings(words, SEGMENT)


@pytest.mark.thorough
def test_brightness_is_found_again_and_all_of_it_is_written(scenes, tiny_run, tmp_path):
    results = run(tmp_path / "out", f"run={tiny_run}", f"masks={scenes}", "train_patches=1000")
    assert list(results["scores"]) == ["pretrained", "untrained", "colors of patches"]
    for ways in results["scores"].values():
        for scores in ways.values():
            assert list(scores["per_class"]) == ["ground", "gray", "white"]
            low, high = scores["interval"]
            assert low <= scores["miou"] <= high
            assert scores["miou"] > 45  # all of it ground: below 30
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    picture = imread(tmp_path / "out" / "segmentation.png")[..., :3]
    assert picture.std() > 0.05


@pytest.mark.thorough
def test_masks_that_are_no_classes_and_unknown_classes_are_told(scenes, tiny_run, tmp_path):
    with pytest.raises(DataError, match=r"have 1 classes besides ignore=\[1, 2\]"):
        run(tmp_path / "one", f"run={tiny_run}", f"masks={scenes}", "ignore=[1,2]", "untrained=false")
    (scenes / "masks" / "train" / "0.png").write_bytes(b"no image")
    Image.new("L", (40, 40), 9).save(scenes / "masks" / "val" / "0.png")
    results = run(tmp_path / "out", f"run={tiny_run}", f"masks={scenes}", "untrained=false", "train_patches=1000")
    told = " ".join(results["findings"])
    assert "1 images could not be used" in told
    assert "12 % of the pixels of test masks have classes of no training mask" in told
