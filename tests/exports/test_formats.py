"""A person who has only timm, only onnxruntime or only torch loads an export, and gets our outputs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from backbones.exports import exported

from sslvision.backbones.load import load_backbone
from sslvision.exports.network import our_outputs

pytestmark = pytest.mark.thorough
NETWORKS = {  # name: kind of backbone, class names
    "vit": ("ViT", None),
    "swin": ("Swin", None),
    "resnet": ("ResNet", None),
    "convnext": ("ConvNeXt", None),
    "vit-classifier": ("ViT, mean pooled", ["ant", "bee", "Müsli"]),
    "swin-classifier": ("Swin", ["ant", "bee"]),
    "resnet-classifier": ("ResNet", ["ant", "bee"]),
    "convnext-classifier": ("ConvNeXt", ["ant", "bee", "cat"]),
}
FRESH = """
import json, sys
for name in {blocked}:
    sys.modules[name] = None  # as if it were not installed
import numpy as np

{load}
for folder in {folders}:
    images = np.load(f"{{folder}}/images.npy")
    np.savez(f"{{folder}}/theirs.npz", **load(folder, images))
"""
ONNX = """
import onnxruntime

def load(folder, images):
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images})))
"""
PROGRAM = """
import torch

def load(folder, images):
    with torch.no_grad():
        found = torch.export.load(f"{folder}/model.pt2").module()(torch.from_numpy(images))
    return {name: value.numpy() for name, value in found.items()}
"""
TIMM = """
import timm, torch

def load(folder, images):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        pixels = (torch.from_numpy(images) / 255 - mean) / std
        found = {"features": model.forward_head(model.forward_features(pixels), pre_logits=True)}
        if model.num_classes:
            found["logits"] = model(pixels)
    return {name: value.numpy() for name, value in found.items()}
"""
FORMATS = {
    "onnx": (ONNX, ("sslvision", "torch", "timm", "transformers")),
    "program": (PROGRAM, ("sslvision", "timm", "transformers")),
    "timm": (TIMM, ("sslvision", "transformers", "onnxruntime")),
}


FEWER = (
    "vit",
    "vit-classifier",
    "swin-classifier",
    "resnet-classifier",
    "convnext-classifier",
)  # tracing takes seconds


def export_all(settings_of, folder, format, networks):
    """Export every network, with images beside each; return the networks' folders and our outputs of the images."""
    from sslvision.workflows.exporting import export_network

    folders, ours = [], {}
    for name in networks:
        kind, classes = NETWORKS[name]
        source, target = folder / f"source-{name}", folder / name
        exported(source, kind, channels=3, classes=classes)
        export_network(settings_of("export", f"run={source}", f"format={format}"), target)
        loaded = load_backbone(source)
        loaded.backbone.eval()
        images = torch.randint(0, 256, (5, 3, *loaded.backbone.image_size), dtype=torch.uint8)
        np.save(target / "images.npy", images.numpy())
        with torch.no_grad():
            ours[name] = our_outputs(loaded, ("features", "logits") if classes else ("features",))(images)
        folders.append(str(target))
    return folders, ours


@pytest.mark.parametrize(
    ("format", "networks"),
    [
        ("timm", NETWORKS),
        ("onnx", FEWER),
        pytest.param("onnx", set(NETWORKS) - set(FEWER), marks=pytest.mark.e2e),
        pytest.param("program", NETWORKS, marks=pytest.mark.e2e),
    ],
)
def test_whoever_has_only_one_library_loads_an_export_and_gets_our_outputs(format, networks, settings_of, tmp_path):
    load, blocked = FORMATS[format]
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    folders, ours = export_all(settings_of, tmp_path, format, networks)
    script = FRESH.format(blocked=blocked, load=load, folders=folders)
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name, expected in ours.items():
        theirs = np.load(tmp_path / name / "theirs.npz")
        assert set(theirs) == set(expected), name
        for output, wanted in expected.items():
            scale = wanted.square().mean().sqrt().item()
            deviation = np.abs(theirs[output] - wanted.numpy()).max() / scale
            assert deviation < 1e-5, (name, output)
        record = json.loads((tmp_path / name / "export.json").read_text())
        assert record["format"] == format
        assert 0 <= max(record["deviation"]["relative"].values()) < 1e-5
        assert record["deviation"]["batch_sizes"] == [1, 2, 7]
    if format == "onnx" and "vit-classifier" in networks:
        model = pytest.importorskip("onnx").load(tmp_path / "vit-classifier" / "model.onnx")
        told = {entry.key: entry.value for entry in model.metadata_props}
        assert json.loads(told["class_names"]) == ["ant", "bee", "Müsli"]
        assert json.loads(told["mean"]) == pytest.approx([0.25] * 3)
        assert [entry.version for entry in model.opset_import if not entry.domain] == [record["opset"]]


@pytest.mark.parametrize("format", ["onnx", "program"])
def test_tokens_attention_and_normalization_by_the_caller(format, settings_of, tmp_path):
    from sslvision.exports.graphs import read_onnx, read_program
    from sslvision.workflows.exporting import export_network

    if format == "onnx":
        pytest.importorskip("onnxruntime")
    source = tmp_path / "source"
    backbone = exported(source, "ViT", channels=1)
    names = ("attention", "tokens", "features")
    words = (f"run={source}", f"format={format}", f"outputs={','.join(names)}", "normalize=beside", "batch_sizes=[3]")
    export_network(settings_of("export", *words), tmp_path / "out")
    graph = read_onnx(tmp_path / "out", names) if format == "onnx" else read_program(tmp_path / "out")
    images = torch.randn(4, 1, 32, 32)
    with torch.no_grad():
        found = graph(images)
        assert list(found) == [*names]
        torch.testing.assert_close(found["tokens"], backbone.encode(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["features"], backbone(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["attention"], backbone.attention_maps(images), atol=1e-6, rtol=1e-5)
    assert found["attention"].shape == (4, 2, 4, 4)
    assert json.loads((tmp_path / "out" / "preprocessing.json").read_text())["normalize"] == "beside"
