"""The transform that an export describes gives the scores that were printed, in timm and in transformers."""

import json

import numpy as np
import pytest
import timm
import torch
from backbones.exports import exported
from PIL import Image

from sslvision.augment.crops import center_crop
from sslvision.backbones.load import load_backbone
from sslvision.data.sources.digits import open_digits
from sslvision.data.sources.folder import open_folder
from sslvision.errors import UsageError
from sslvision.evaluation.central_crop import choose_crop_pct
from sslvision.evaluation.knn import knn_top
from sslvision.nn.normalize import Normalize
from sslvision.workflows.finetuning import finetune
from sslvision.workflows.predicting import open_images, predict
from sslvision.workflows.probing import probe

SIDE = 32  # of the backbone
SIZES = {  # width and height of an image by its number
    "exact": lambda number: (32, 32),
    "small": lambda number: (15 + number % 9, 17 + number % 7),
    "large": lambda number: (61 + number % 37, 53 + number % 50),
    "mixed": lambda number: (32, 32) if number % 2 else (33 + number % 5, 47),
    "thin": lambda number: (200 + number, 19),
}
CROPS = {kind: 1.0 if kind == "exact" else 0.875 for kind in SIZES}


def labeled_images(root, kind, *, train=24, test=20):
    """Write images of three classes, which differ in one border each, under noise."""
    generator = np.random.default_rng(0)
    for split, images in (("train", train), ("val", test)):
        for label, name in enumerate(("left", "top", "none")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(images):
                width, height = SIZES[kind](number)
                pixels = generator.normal(110, 45, (height, width, 3))
                pixels[:, : width // 5] += 60 * (label == 0)
                pixels[: height // 5] += 60 * (label == 1)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return root


def timm_transform(export):
    model = timm.create_model(f"local-dir:{export}", pretrained=True).eval()
    return model, timm.data.create_transform(**timm.data.resolve_model_data_config(model))


def transformers_transform(export):
    processor = pytest.importorskip("transformers").AutoImageProcessor.from_pretrained(export)
    return lambda image: processor(image)["pixel_values"][0]


def opened(source):
    return [Image.open(source.describe(index)).convert("RGB") for index in range(len(source))]


@torch.no_grad()
def outputs(model, transform, source):
    return model(torch.stack([transform(image) for image in opened(source)]))


@pytest.mark.parametrize(
    "kind", ["exact", "mixed", "thin", *(pytest.param(kind, marks=pytest.mark.e2e) for kind in ("small", "large"))]
)
def test_timm_and_transformers_give_the_printed_accuracy_of_a_fine_tuned_network(kind, settings_of, tmp_path):
    root, start, run = labeled_images(tmp_path / "photos", kind), tmp_path / "start", tmp_path / "run"
    exported(start, channels=3)
    words = [f"run={start}", "data=folder", f"data.root={root}", "data.workers=0", "scratch=false", "epochs=0"]
    words += ["min_updates=2", "evaluations=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    results = finetune(settings_of("finetune", *words), run)
    test, (model, transform) = open_folder(root).test, timm_transform(run / "export")
    logits = outputs(model, transform, test)
    top1 = 100 * (logits.argmax(1) == test.labels).float().mean().item()
    assert round(top1, 2) == pytest.approx(results["fine_tuned"]["top1"], abs=0.01)
    assert torch.equal(outputs(model, transformers_transform(run / "export"), test), logits)
    loaded = load_backbone(run)
    assert loaded.backbone.crop_pct == model.pretrained_cfg["crop_pct"] == CROPS[kind]
    normalize, images = Normalize(loaded.mean, loaded.std), open_images(root / "val", channels=3)
    rows = predict(loaded.backbone, normalize, loaded.classes, images)
    assert [row.labels[0] for row in rows] == [loaded.classes[place] for place in logits.argmax(1)]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["exact", "large"])
def test_timm_gives_the_printed_k_nn_accuracy_of_a_pretrained_and_of_a_probed_network(
    kind, run_tiny, settings_of, tmp_path
):
    root, run = labeled_images(tmp_path / "photos", kind), tmp_path / "run"
    words = (
        "data=folder",
        f"data.root={root}",
        "data.workers=0",
        "backbone.image_size=32",
        "batch_size=32",
        "epochs=1",
        "evaluate_images=100",
    )
    results = run_tiny(run, *words, "warmup_epochs=0")
    model, transform = timm_transform(run / "export")
    assert model.pretrained_cfg["crop_pct"] == CROPS[kind]
    train, test = open_folder(root)[:2]
    features = [outputs(model, transform, source) for source in (train, test)]
    top1 = knn_top(features[0], train.labels, features[1], test.labels)[0]
    assert top1 == pytest.approx(results["knn_top1"], abs=0.01)
    words = (f"run={run}", f"features_dir={tmp_path / 'features'}", "pixels=false", "device=cpu", "k=[20]")
    probed = probe(settings_of("probe", *words), tmp_path / "probe")
    assert top1 == pytest.approx(probed["knn"]["20"]["top1"], abs=0.01)
    assert probed["crop_pct"] == CROPS[kind]


@pytest.mark.parametrize("size", [32, 37, 96, 224])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.875])
def test_sizes_and_offsets_are_timms_and_hardly_a_pixel_differs_by_more_than_rounding(size, crop_pct):
    transform = timm.data.create_transform((3, size, size), interpolation="bicubic", crop_pct=crop_pct, normalize=False)
    for height, width in [(size, size), (97, 41), (40, 333), (500, 375), (size + 1, size), (3, 5)]:
        pixels = np.random.default_rng(height).normal(128, 20, (height, width, 3)).clip(0, 255).astype(np.uint8)
        theirs = transform(Image.fromarray(pixels)).int()
        ours = center_crop(torch.from_numpy(pixels).permute(2, 0, 1), (size, size), crop_pct).int()
        assert (ours - theirs).abs().max() <= 2, (height, width)


@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.875, None])
def test_of_a_thin_image_only_the_square_is_resized_and_it_is_timms(crop_pct):
    for size, height, width in [(32, 40, 333), (37, 300, 19), (96, 7, 200), (224, 50, 1001)]:
        transform = timm.data.create_transform(
            (3, size, size), interpolation="bicubic", crop_pct=crop_pct or 0.875, normalize=False
        )
        pixels = np.random.default_rng(height).normal(128, 20, (height, width, 3)).clip(0, 255).astype(np.uint8)
        cut = center_crop(torch.from_numpy(pixels).permute(2, 0, 1), (size, size), crop_pct)
        assert (cut.int() - transform(Image.fromarray(pixels)).int()).abs().max() <= 2
    assert center_crop(torch.full((1, 1, 30_000), 7, dtype=torch.uint8), (224, 224), crop_pct).unique().tolist() == [7]


def test_one_image_of_another_size_among_the_first_of_a_set_decides_for_all_of_it(tmp_path):
    source = open_folder(labeled_images(tmp_path / "photos", "exact")).train
    assert choose_crop_pct([source, None], (SIDE, SIDE)) == 1.0
    assert choose_crop_pct([source], (SIDE, SIDE + 1)) == 0.875
    Image.new("RGB", (32, 33)).save(source.describe(0))
    assert choose_crop_pct([None, source], (SIDE, SIDE)) == 0.875
    (tmp_path / "photos" / "train" / "left" / "000.png").write_bytes(b"no image")
    assert choose_crop_pct([source], (SIDE, SIDE)) == 1.0  # nobody can say what its size is
    assert choose_crop_pct([], (SIDE, SIDE)) == 0.875


def test_images_in_memory_decide_by_the_size_that_all_of_them_have():
    assert choose_crop_pct(open_digits(size=32)[:2], (32, 32)) == 1.0
    assert choose_crop_pct(open_digits(size=16)[:2], (32, 32)) == 0.875


def test_exports_of_earlier_versions_are_evaluated_as_they_were_then(tmp_path):
    exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"]["crop_mode"] == "center"
    del config["pretrained_cfg"]["crop_mode"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_backbone(tmp_path).backbone.crop_pct is None
    config["pretrained_cfg"] |= {"tag": "theirs", "crop_pct": 0.9}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_backbone(tmp_path).backbone.crop_pct == 0.9


def test_an_export_whose_crop_is_no_share_is_refused(tmp_path):
    exported(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["crop_pct"] = 87.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"crop_pct=87\.5 is not a share"):
        load_backbone(tmp_path)
