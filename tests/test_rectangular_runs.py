"""Rectangular images from the command line to the scores: every method on ViT and Swin, and what follows a pretraining run."""

import csv
import json

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from sslvision.data.sources.folder import open_folder
from sslvision.evaluation.knn import knn_top

HEIGHT, WIDTH = 16, 32
SIZE = f"backbone.image_size=[{HEIGHT},{WIDTH}]"
VIT = ["backbone.embed_dim=32", "backbone.depth=1", "backbone.num_heads=2", "backbone.patch_size=4"]
SWIN = ["backbone.embed_dim=16", "backbone.depths=[1,1]", "backbone.num_heads=[1,1]", "backbone.patch_size=2"]
MAE = ["decoder_embed_dim=16", "decoder_num_heads=2"]
DINO = ["prototypes=32", "hidden=16", "bottleneck=8", "local_crops=1"]
RECIPES = {
    "mae": [*VIT, *MAE],
    "dino": [*VIT, *DINO, "local_size=8"],
    "mae_swin": [*SWIN, *MAE],
    "dino_swin": [*SWIN, *DINO, "local_size=[8,16]"],
}
QUICK = ["batch_size=16", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "data.workers=0"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Labeled images of many shapes: bright on the left, or at the top."""
    root, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, images in (("train", 12), ("val", 8)):
        for label, name in enumerate(("left", "top")):
            (root / split / name).mkdir(parents=True)
            for number in range(images):
                height, width = 20 + number % 5, 30 + 3 * number
                pixels = generator.normal(110, 30, (height, width, 3))
                pixels[: height // 3 if label else None, : None if label else width // 3] += 70
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def dry_run(photos, work, warm_command):
    """Return the folder and the output of a dry run of a recipe, made once."""
    made = {}

    def run(recipe):
        if recipe not in made:
            words = [f"recipe={recipe}", f"data={photos}", "data.channels=3", SIZE, *QUICK, *RECIPES[recipe]]
            made[recipe] = warm_command(*words, "dry_run=true", f"name={recipe}", cwd=work)
        done = made[recipe]
        assert done.returncode == 0, done.stdout + done.stderr
        return work / "outputs" / f"{recipe}-dry-run", done.stdout

    return run


@pytest.mark.parametrize(
    "recipe", [recipe if recipe == "mae" else pytest.param(recipe, marks=pytest.mark.thorough) for recipe in RECIPES]
)
def test_a_run_on_rectangles_leaves_a_backbone_whose_transform_in_timm_gives_the_printed_scores(
    recipe, dry_run, photos
):
    run, printed = dry_run(recipe)
    assert "the central 87.5 % rectangle of shape 1:2 (height:width) of every image" in printed
    assert yaml.safe_load((run / "config.yaml").read_text())["backbone"]["image_size"] == [HEIGHT, WIDTH]
    model = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True, num_classes=0).eval()
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, HEIGHT, WIDTH)
    transform, features = timm.data.create_transform(**data), []
    train, test = open_folder(photos)[:2]
    for source in (train, test):
        images = [transform(Image.open(source.describe(index)).convert("RGB")) for index in range(len(source))]
        with torch.no_grad():
            features.append(model(torch.stack(images)))
    results = json.loads((run / "results.json").read_text())
    top1 = knn_top(features[0], train.labels, features[1], test.labels)[0]
    assert top1 == pytest.approx(results["knn_top1"], abs=0.01)
    figures = {file.stem for file in (run / "figures").glob("*.png")}
    wanted = {"patch_features"} | ({"reconstructions"} if "mae" in recipe else set())
    assert wanted | ({"attention"} if recipe == "dino" else set()) <= figures


@pytest.mark.thorough
def test_a_rectangular_run_is_probed_fine_tuned_and_labels_images(dry_run, photos, work, warm_command):
    run, _ = dry_run("mae")
    probed = warm_command(
        f"run={run}", "name=probed", "data.workers=0", "device=cpu", "views=2", "protocol=mae", of="probe", cwd=work
    )
    assert probed.returncode == 0, probed.stdout + probed.stderr
    assert "Raw pixels at 23x45" in probed.stdout
    assert f"on 3x{HEIGHT}x{WIDTH}" in probed.stdout
    tuned = warm_command(f"run={run}", "name=tuned", "dry_run=true", "scratch=true", *QUICK, of="finetune", cwd=work)
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    predicted = warm_command(
        "run=outputs/tuned-dry-run", f"images={photos / 'val'}", "workers=0", "device=cpu", of="predict", cwd=work
    )
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    rows = list(csv.DictReader((work / "outputs" / "tuned-dry-run" / "predictions.csv").read_text().splitlines()))
    model = timm.create_model(f"local-dir:{work / 'outputs' / 'tuned-dry-run' / 'export'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = [transform(Image.open(photos / "val" / row["image"]).convert("RGB")) for row in rows]
    with torch.no_grad():
        best = model(torch.stack(images)).softmax(dim=1).max(dim=1)
    assert [row["label"] for row in rows] == [("left", "top")[place] for place in best.indices]
    # Pillow and torch resample to levels that may differ by one.
    assert [float(row["probability"]) for row in rows] == pytest.approx(best.values.tolist(), abs=0.005)


@pytest.mark.thorough
def test_a_rectangular_run_is_compared_at_several_numbers_of_labels(dry_run, work, warm_command):
    run, _ = dry_run("mae")
    words = ["recipe=compare", "labels_per_class=[1,3]", "seeds=1", "lr_ratios=[1.0]", "epochs=0", "min_updates=2"]
    quick = [word for word in QUICK if not word.startswith("batch_size")]
    done = warm_command(f"run={run}", *words, "evaluations=1", "name=compared", *quick, of="finetune", cwd=work)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(work / "outputs" / "compared" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["test_images"] for row in rows} == {"16"}
    assert (work / "outputs" / "compared" / "comparison.png").is_file()


def test_a_run_on_squares_is_resumed_with_both_sides_given(train_tiny, tmp_path):
    run = tmp_path / "run"
    train_tiny(run, "epochs=2", "backbone.image_size=32")
    before = (run / "metrics.csv").read_bytes()
    train_tiny(run, "epochs=2", "backbone.image_size=[32,32]", "resume=auto")
    train_tiny(tmp_path / "both", "epochs=2", "backbone.image_size=[32,32]")
    assert (run / "metrics.csv").read_bytes() == (tmp_path / "both" / "metrics.csv").read_bytes() == before
    assert yaml.safe_load((tmp_path / "both" / "config.yaml").read_text())["backbone"]["image_size"] == 32


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["backbone.image_size=[-32,64]"], "its height is -32"),
        (["backbone.image_size=[32,62]"], "the width 62 (nearest: 60 or 64)"),
        (["recipe=dino", "local_size=[16,20]"], "the width 20 (nearest: 16 or 24)"),
        (["backbone.image_size=[32,64,3]"], "two of them, [height,width]"),
    ],
)
def test_an_impossible_side_is_one_message_of_exit_code_2(words, message, warm_command, tmp_path):
    recipe = [] if any(word.startswith("recipe=") for word in words) else ["recipe=mae"]
    done = warm_command(*recipe, *words, "dry_run=true", cwd=tmp_path)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "outputs").exists()
