"""A person who has only transformers loads an export, prepares images, and gets our features and logits."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from backbones.exports import KINDS, VIT, exported
from PIL import Image

from sslvision.augment.crops import center_crop
from sslvision.backbones.build import build_backbone
from sslvision.backbones.classifier import classify
from sslvision.backbones.load import Loaded, load_backbone
from sslvision.exports.transformers_names import counterpart
from sslvision.nn.normalize import Normalize

DINOV2 = ("vit_tiny_patch16_224", 32, {**VIT, "init_values": 0.3})
NETWORKS = {  # name: kind of backbone, channels, class names, class in transformers
    "vit": ("ViT", 3, None, "ViTModel"),
    "gray": ("ViT", 1, None, "ViTModel"),
    "swin": ("Swin", 3, None, "SwinModel"),
    "dinov2": ("DINOv2", 3, None, "Dinov2Model"),
    "mean": ("ViT, mean pooled", 3, None, "TimmWrapperModel"),
    "resnet": ("ResNet", 3, None, "TimmWrapperModel"),
    "convnext": ("ConvNeXt", 3, None, "TimmWrapperModel"),
    "vit-classifier": ("ViT", 3, ["ant", "bee", "Müsli"], "ViTForImageClassification"),
    "swin-classifier": ("Swin", 3, ["ant", "bee"], "SwinForImageClassification"),
    "dinov2-classifier": ("DINOv2", 3, ["ant", "bee", "cat"], "Dinov2ForImageClassification"),
    "resnet-classifier": ("ResNet", 3, ["ant", "bee"], "TimmWrapperForImageClassification"),
    "convnext-classifier": ("ConvNeXt", 3, ["ant", "bee"], "TimmWrapperForImageClassification"),
}
FRESH = """
import json, sys, warnings
for name in ("sslvision", "onnxruntime", "pytorch_lightning"):
    sys.modules[name] = None  # as if it were not installed
networks = json.loads(sys.argv[1])
if not any(kind.startswith("TimmWrapper") for kind in networks.values()):
    sys.modules["timm"] = None
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

for folder, kind in networks.items():
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.open(f"{folder}/image.png"), return_tensors="pt")["pixel_values"]
    classifier = kind.endswith("Classification")
    model = (AutoModelForImageClassification if classifier else AutoModel).from_pretrained(folder).eval()
    assert type(model).__name__ == kind, type(model)
    with torch.no_grad():
        output = model(pixel_values=pixels)
    found = {"pixels": pixels.numpy()}
    found["logits" if classifier else "features"] = (output.logits if classifier else output.pooler_output).numpy()
    np.savez(f"{folder}/theirs.npz", **found)
    if classifier:
        json.dump([model.config.id2label[number] for number in range(model.config.num_labels)], open(f"{folder}/names", "w"))
"""


@pytest.fixture(autouse=True)
def _needs_transformers():
    pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def dinov2_kind(monkeypatch):
    monkeypatch.setitem(KINDS, "DINOv2", DINOV2)


def export_all(names, settings_of, folder):
    """Export networks, with an image beside each; return classes by folder, and by name networks and our pixels."""
    from sslvision.workflows.exporting import export_network

    classes_of, ours = {}, {}
    for name in names:
        kind, channels, classes, expected = NETWORKS[name]
        source, target = folder / f"source-{name}", folder / name
        exported(source, kind, channels=channels, classes=classes)
        record = export_network(settings_of("export", f"run={source}", "format=transformers"), target)
        assert record["class"] == expected
        assert record["deviation"]["relative"]["features"] < 1e-5
        assert (record["deviation"]["relative"]["logits"] < 1e-5) if classes else True
        # byte for byte, but for normalizing and back; the wrapper has the transform of timm, which resizes by Pillow
        assert record["preprocessing"]["pixels"] < (1.01 if expected.startswith("TimmWrapper") else 1e-3)
        loaded = load_backbone(source)
        loaded.backbone.eval()
        image = np.random.default_rng(1).integers(0, 256, (57, 83, 3), dtype=np.uint8)
        image = image if channels == 3 else image[..., 0]
        Image.fromarray(image).save(target / "image.png")
        pixels = torch.from_numpy(np.atleast_3d(image)).permute(2, 0, 1)
        pixels = center_crop(pixels, loaded.backbone.image_size, loaded.backbone.crop_pct)[None]
        ours[name] = loaded, pixels
        classes_of[str(target)] = expected
    return classes_of, ours


@pytest.mark.thorough
@pytest.mark.parametrize("timm", [False, pytest.param(True, marks=pytest.mark.e2e)], ids=["without timm", "with timm"])
def test_whoever_has_only_transformers_gets_our_features_of_an_image_file(timm, settings_of, tmp_path):
    names = [name for name, (*_, kind) in NETWORKS.items() if kind.startswith("TimmWrapper") is timm]
    classes_of, ours = export_all(names, settings_of, tmp_path)
    script = [sys.executable, "-I", "-c", FRESH, json.dumps(classes_of)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr + done.stdout
    for name, (loaded, pixels) in ours.items():
        theirs = dict(np.load(tmp_path / name / "theirs.npz"))
        read = torch.from_numpy(theirs.pop("pixels"))
        ours_read = Normalize(loaded.mean, loaded.std)(pixels)
        assert (read - ours_read).abs().max() * 255 * 0.3 < (1.01 if timm else 1e-3)
        with torch.no_grad():
            wanted = classify(loaded.backbone, read) if loaded.classes else loaded.backbone(read)
        ((output, values),) = theirs.items()
        assert output == ("logits" if loaded.classes else "features")
        assert np.abs(values - wanted.numpy()).max() / wanted.square().mean().sqrt().item() < 1e-5, name
        if NETWORKS[name][2]:
            assert json.loads((tmp_path / name / "names").read_text()) == NETWORKS[name][2]


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("vit_tiny_patch16_224", {"reg_tokens": 2}, "register tokens"),
        ("vit_tiny_patch16_224", {"qk_norm": True}, "more norms"),
        ("vit_tiny_patch16_224", {"qkv_bias": False}, "no biases"),
        ("vit_tiny_patch16_224", {"no_embed_class": True}, "class token has no position"),
        ("vit_tiny_patch16_224", {"pool": "avg"}, "mean of patches"),
        ("vit_tiny_patch16_224", {"act_layer": "gelu_tanh"}, "another activation"),
        ("vit_tiny_patch16_224", {"image_size": (32, 64)}, "not square"),
        ("swin_tiny_patch4_window7_224", {"image_size": 40}, "windows do not divide"),
        ("test_resnet", {}, "own classes of a ResNet"),
    ],
)
def test_a_network_that_transformers_computes_otherwise_has_no_counterpart(name, options, reason):
    small = {} if "resnet" in name else dict(KINDS["Swin" if "swin" in name else "ViT"][2])
    backbone = build_backbone(name, **{"image_size": 32, **small, **options})
    assert reason in counterpart(Loaded(backbone, [0.5] * 3, [0.5] * 3, None, ""))
