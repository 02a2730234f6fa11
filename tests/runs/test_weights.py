import json
import os
import stat

import pytest
import timm
import torch

from sslvision.backbones.build import build_backbone
from sslvision.runs.weights import export_backbone

COAT = {"serial_depths": [1] * 4, "parallel_depth": 1, "embed_dims": [16] * 4, "num_heads": 8}


@pytest.mark.parametrize(
    ("name", "image_size", "options"),
    [
        ("test_resnet", 32, {}),
        ("coat_tiny", 32, COAT),  # its modules share tensors
        (
            "swin_tiny_patch4_window7_224",
            32,
            {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        ),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_plain_timm_loads_the_export_of_any_backbone(name, image_size, options, channels, tmp_path):
    torch.manual_seed(0)
    backbone = build_backbone(name, image_size=image_size, channels=channels, **options).eval()
    export_backbone(backbone, tmp_path, mean=[0.5] * channels, std=[0.5] * channels)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    images = torch.rand(2, channels, image_size, image_size)
    assert torch.allclose(loaded(images), backbone(images), atol=1e-5)
    assert loaded.pretrained_cfg["mean"] == pytest.approx([0.5] * channels)
    with_head = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5)
    assert with_head(images).shape == (2, 5)


VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
CLASSIFIERS = {
    "ViT, class token": ("vit_tiny_patch16_224", 32, VIT),
    "ViT, mean of patches": ("vit_tiny_patch16_224", 32, {**VIT, "pool": "avg"}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        32,
        {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    ),
    "ResNet": ("resnet18", 32, {}),
    "ConvNeXt": ("test_convnext", 64, {}),
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", CLASSIFIERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_plain_timm_loads_an_exported_classifier_with_its_head_and_names_or_without(kind, channels, tmp_path):
    torch.manual_seed(0)
    name, size, options = CLASSIFIERS[kind]
    backbone = build_backbone(name, image_size=size, channels=channels, **options).eval()
    classes = ["ant", "bee", "cat", "dog", "emu"]
    backbone.model.reset_classifier(len(classes))
    export_backbone(backbone, tmp_path, mean=[0.5] * channels, std=[0.5] * channels, classes=classes)
    images = torch.rand(2, channels, size, size)
    features = backbone(images)
    logits = backbone.model.get_classifier()(features)
    whole = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.allclose(whole(images), logits, atol=1e-5)
    assert tuple(whole.pretrained_cfg["label_names"]) == tuple(classes)
    bare = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    assert torch.allclose(bare(images), features, atol=1e-5)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=2).eval()
    assert other(images).shape == (2, 2)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_classes"], config["label_names"]) == (5, classes)
    assert "num_classes" not in config["model_args"]


def test_an_export_without_a_head_names_no_classes(tmp_path):
    export_backbone(build_backbone("test_resnet", image_size=32), tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 0
    assert "label_names" not in config


def test_a_classifier_is_not_exported_without_the_names_of_its_classes(tmp_path):
    backbone = build_backbone("test_resnet", image_size=32)
    backbone.model.reset_classifier(3)
    with pytest.raises(AssertionError, match="its class names"):
        export_backbone(backbone, tmp_path, mean=[0.5] * 3, std=[0.5] * 3, classes=["ant", "bee"])


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_others_may_read_an_export_as_the_umask_has_it(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        for _ in range(2):  # also where a file is replaced
            export_backbone(build_backbone("test_resnet", image_size=32), tmp_path / "e", mean=[0.5] * 3, std=[0.5] * 3)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "e").iterdir()} == {mode}
