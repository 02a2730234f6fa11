"""What cannot be loaded is refused in words."""

import json
import re

import pytest
import timm
import torch
from exports import exported
from safetensors.torch import load_file, save_file

from sslvision.backbones.build import build_backbone
from sslvision.backbones.load import load_backbone
from sslvision.backbones.released import INSTEAD_OF_TRANSFORMERS
from sslvision.errors import UsageError
from sslvision.runs.weights import export_backbone


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("resnet19", "no run folder .* Near it in timm: .*resnet18"),
        ("outputs/mea", "no export folder"),
        ("vit_small_patch8_224.nonsense", r"no weights with this tag; it has vit_small_patch8_224\.dino"),
        ("vit_base_patch16_18x2_224", "publishes no weights"),
    ],
)
def test_names_that_mean_nothing_are_refused_with_what_is_possible(where, words):
    with pytest.raises(UsageError, match=words):
        load_backbone(where)


def test_a_run_that_has_not_ended_is_told_from_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UsageError, match="has no export/: it has not ended"):
        load_backbone(tmp_path)


def test_images_of_other_channels_than_the_exports_are_refused_with_the_setting(tmp_path):
    exported(tmp_path)
    with pytest.raises(UsageError, match=r"read 1 channel\(s\), and the images have 3: set data.channels=1"):
        load_backbone(tmp_path, channels=3)


def test_weights_of_other_names_and_shapes_are_refused_with_some_of_them(tmp_path):
    exported(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["stray"] = state.pop("blocks.1.attn.qkv.bias")
    state["norm.weight"] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError) as info:
        load_backbone(tmp_path)
    for words in ("qkv.bias is missing", "stray is not in this model", r"norm.weight is (3,) there and (24,) here"):
        assert words in str(info.value)
    with pytest.raises(UsageError, match=r"qkv\.bias is missing"):
        load_backbone(tmp_path, image_size=48)


def spoil(file, how):
    match how:
        case "no json":
            (file / "config.json").write_text("{")
        case "no architecture":
            (file / "config.json").write_text('{"pretrained_cfg": {}}')
        case "unknown architecture":
            config = json.loads((file / "config.json").read_text()) | {"architecture": "resnet19"}
            (file / "config.json").write_text(json.dumps(config))
        case "no weights":
            (file / "model.safetensors").unlink()
        case "half the weights":
            content = (file / "model.safetensors").read_bytes()
            (file / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no json", "not in timm's format"),
        ("no architecture", "not in timm's format .*architecture"),
        ("unknown architecture", "resnet19, which this version of timm"),
        ("no weights", "model.safetensors is missing"),
        ("half the weights", "cannot be read as weights"),
    ],
)
def test_a_damaged_export_is_refused_in_words(how, words, tmp_path):
    exported(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(UsageError, match=words):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not weights at all", "cannot be read as weights"),
        ({"model": {"conv1.weight": torch.rand(2, 2)}}, "no checkpoint of a ViT .* cls_token"),
        ({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "checkpoint of a run: give the run's folder"),
        (torch.rand(3), "cannot be read as weights"),
        ({"teacher": 3}, "no checkpoint of a ViT"),
        ([1, 2], "it holds a list, and not weights by name"),
        (b"", "weights.pth is empty: download"),
        (b"<!DOCTYPE html><html>404", "is HTML or other text"),
        (b"version https://git-lfs.github.com/spec/v1", "run git lfs pull"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        (
            {"vit.encoder.layer.0.attention.attention.query.weight": torch.rand(2, 2)},
            r"as transformers does. Give the timm model with the same weights, such as vit_base_patch16_224\.mae",
        ),
    ],
)
def test_files_that_are_no_released_checkpoint_are_refused_in_words(content, words, tmp_path):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UsageError, match=words):
        load_backbone(file)


def test_the_number_of_heads_is_asked_for_where_weights_leave_it_open(released, tmp_path):
    torch.save({"model": released}, tmp_path / "mae.pth")
    with pytest.raises(UsageError, match="number of its attention heads: set num_heads"):
        load_backbone(tmp_path / "mae.pth")


@pytest.mark.parametrize(
    ("classes", "options", "words"),
    [
        (None, {"pool": "max"}, "pool=max is unknown"),
        (["cat", "dog"], {"pool": "avg"}, "trained with pool=token"),
        (None, {"nonsense": 1}, "timm cannot build .*nonsense"),
        (None, {"image_size": 33}, "33x33"),
        (None, {"patch_size": 4}, r"patch_embed\.proj\.weight is"),
        (None, {"checkpoint_path": "other.pth"}, r"Instead of backbone.checkpoint_path use .*in Python: load_backbone"),
        (None, {"pretrained_cfg": {"file": "x"}}, r"Instead of backbone.pretrained_cfg use"),
        (None, {"features_only": True}, "Instead of backbone.features_only use nothing"),
        (None, {"img_size": 48}, "Instead of backbone.img_size use backbone.image_size"),
        (None, {"image_size": 0}, "backbone.image_size=0 must be a whole number of pixels"),
        (None, {"depth": 0}, "backbone.depth=0 must be a whole number from 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_words(classes, options, words, tmp_path):
    exported(tmp_path, classes=classes)
    with pytest.raises(UsageError, match=words):
        load_backbone(tmp_path, **options)


def test_a_size_that_timm_cannot_resample_weights_to_is_refused_in_words(tmp_path):
    torch.manual_seed(0)
    export_backbone(build_backbone("levit_128s", image_size=64), tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(UsageError, match="timm cannot adapt the weights to these settings"):
        load_backbone(tmp_path, image_size=96)


@pytest.mark.parametrize("suffix", [".onnx", ".npz", ".zip"])
def test_other_formats_are_named(suffix, tmp_path):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(UsageError, match=r"Weights are a \.pth file of tensors"):
        load_backbone(file)


@pytest.mark.filterwarnings("ignore")  # that TorchScript is deprecated
def test_the_advice_on_a_torchscript_archive_works(tmp_path):
    class Network(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    file = tmp_path / "weights.pt"
    torch.jit.script(Network()).save(file)
    with pytest.raises(UsageError, match="is a TorchScript archive") as told:
        load_backbone(file)
    advised = re.search(r"torch\.jit\.load\((.+)\)\.state_dict", str(told.value))[1]
    assert advised == repr(str(file))
    assert torch.jit.load(str(file)).state_dict() == {}


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("https://example.org/mae/mae_base.pth", "is a URL: download the file, and give its path, run=mae_base.pth"),
        ("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k", "name of them is run=vit_tiny_patch16_224.augreg_in21k"),
        ("folder/missing.pth", "there is no such file in .*folder"),
        ("vit_tiny", "Near it in timm: vit_tiny_patch16_224, "),
    ],
)
def test_names_that_lead_nowhere_lead_to_those_that_do(where, words):
    with pytest.raises(UsageError, match=words):
        load_backbone(where)


def test_the_models_that_messages_name_have_weights():
    for name in re.findall(r"vit_\w+\.\w+", INSTEAD_OF_TRANSFORMERS):
        assert name in timm.list_pretrained()


def test_a_model_of_transformers_is_told_apart(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit_mae", "hidden_size": 768}')
    with pytest.raises(UsageError, match=r"holds a model of transformers\. Give the timm model"):
        load_backbone(tmp_path)
