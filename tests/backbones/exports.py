"""Small backbones, and how the tests export and compare them."""

from pathlib import Path

import torch

from sslvision.backbones.build import build_backbone
from sslvision.runs.weights import export_backbone

GOLDEN = Path(__file__).parents[1] / "golden"
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2]}
KINDS = {
    "ViT": ("vit_tiny_patch16_224", 32, VIT),
    "ViT, mean pooled": ("vit_tiny_patch16_224", 32, {**VIT, "pool": "avg"}),
    "Swin": ("swin_tiny_patch4_window7_224", 32, SWIN),
    "ResNet": ("test_resnet", 32, {}),
    "ConvNeXt": ("test_convnext", 64, {}),
}


def build(kind="ViT", *, channels=1, **options):
    torch.manual_seed(0)
    name, size, own = KINDS[kind]
    backbone = build_backbone(name, image_size=size, channels=channels, **own, **options).eval()
    for parameter in backbone.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)  # norms and biases of their own, too
    return backbone


def exported(folder, kind="ViT", *, channels=1, classes=None, **options):
    backbone = build(kind, channels=channels, **options)
    if classes:
        backbone.model.reset_classifier(len(classes))
    mean, std = [0.25] * channels, [0.3] * channels
    export_backbone(backbone, folder, mean=mean, std=std, classes=classes)
    return backbone


def images_for(backbone, size=None):
    return torch.rand(3, backbone.channels, *([size] * 2 if size else backbone.image_size))


def equal(one, other, images=None):
    images = images_for(one) if images is None else images
    with torch.no_grad():
        return torch.equal(one.eval()(images), other.eval()(images))
