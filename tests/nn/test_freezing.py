"""Layers from the input to the head, and the lowest of them held still."""

import pytest
import timm
import torch

from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError
from sslvision.nn.freezing import eval_frozen, freeze_lowest, layers

TINY = {"patch_size": 8, "embed_dim": 16, "num_heads": 2}
SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": [2, 1, 2], "num_heads": [1, 2, 4]}


def model_of(name, **options):
    backbone = build_backbone(name, image_size=32, **options)
    backbone.model.reset_classifier(5)
    return backbone.model


def blocks_of(names):
    """Return what the names of a layer have in common: their first words, as far as they lead to a block."""
    return {".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0] for name in names}


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_layers_of_a_vit_are_its_embedding_its_blocks_and_the_head_with_the_final_norm(pool):
    stem, *blocks, head = layers(model_of("vit_tiny_patch16_224", depth=3, pool=pool, reg_tokens=2, **TINY))
    assert blocks_of(stem) == {"cls_token", "reg_token", "pos_embed", "patch_embed"}
    assert [blocks_of(block) for block in blocks] == [{"blocks.0"}, {"blocks.1"}, {"blocks.2"}]
    assert sorted(head) == ["head.bias", "head.weight", "norm.bias", "norm.weight"]


def test_a_swins_merging_belongs_to_the_block_after_it():
    stem, *blocks, head = layers(model_of("swin_tiny_patch4_window7_224", **SWIN))
    assert blocks_of(stem) == {"patch_embed"}
    own = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.2.blocks.0", "layers.2.blocks.1"]
    for names, name in zip(blocks, own, strict=True):
        merging = {"layers.1.blocks.0": "layers.1.downsample", "layers.2.blocks.0": "layers.2.downsample"}.get(name)
        assert {
            ".".join(one.split(".")[: len(name.split("."))]) for one in names if not one.startswith(f"{merging}.")
        } == {name}
        assert any(one.startswith(f"{merging}.") for one in names) == (merging is not None)
    assert sorted(head) == ["head.fc.bias", "head.fc.weight", "norm.bias", "norm.weight"]


def test_stages_of_a_resnet_and_of_a_swin_are_whole():
    stem, *stages, head = layers(model_of("resnet18"), stages=True)
    assert (blocks_of(stem), blocks_of(head)) == ({"conv1", "bn1"}, {"fc"})
    assert [blocks_of(stage) for stage in stages] == [{"layer1"}, {"layer2"}, {"layer3"}, {"layer4"}]
    stem, *stages, head = layers(model_of("swin_tiny_patch4_window7_224", **SWIN), stages=True)
    assert [{name[:8] for name in stage} for stage in stages] == [{"layers.0"}, {"layers.1"}, {"layers.2"}]
    assert "norm.weight" in head


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "convnext_atto",
        "hrnet_w18_small",
        "efficientnet_b0",
        "coat_lite_tiny",
        "vit_tiny_patch16_224",
        "cait_xxs24_224",
    ],
)
def test_every_parameter_is_in_one_layer_the_classifiers_in_the_last(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    found = layers(model)
    assert sorted(name for names in found for name in names) == sorted(name for name, _ in model.named_parameters())
    head = {id(parameter) for parameter in model.get_classifier().parameters()}
    assert head <= {id(model.get_parameter(name)) for name in found[-1]}


def test_what_lies_between_stages_is_not_taken_for_the_head():
    with torch.device("meta"):
        model = timm.create_model("hrnet_w18_small", num_classes=5)
    assert not [name for name in layers(model)[-1] if name.startswith("transition")]


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ({}, []),
        ({"blocks": 1}, ["blocks.0"]),
        ({"blocks": 0.5}, ["blocks.0", "blocks.1"]),
        ({"blocks": 0.01}, ["blocks.0"]),
        ({"blocks": 4}, ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        ({"stages": 3}, ["blocks.0", "blocks.1", "blocks.2"]),
    ],
)
def test_the_lowest_blocks_and_the_stem_stop_training_and_nothing_else(asked, held):
    model = model_of("vit_tiny_patch16_224", depth=4, **TINY)
    named = freeze_lowest(model, **asked)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    stem = {"cls_token", "pos_embed", "patch_embed"} if held else set()
    assert set(named) == frozen
    assert blocks_of(frozen) == stem | set(held)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"blocks": 5}, "freeze=5 .* has 4 blocks"),
        ({"blocks": -1}, "freeze=-1 .* from 0 to 4"),
        ({"blocks": 2.5}, "freeze=2.5 .* whole number"),
        ({"stages": 9}, "freeze_stages=9 .* has 4 stages"),
        ({"blocks": 1, "stages": 1}, "leave one of them 0"),
    ],
)
def test_what_cannot_be_frozen_is_refused_with_how_much_there_is(asked, words):
    with pytest.raises(UsageError, match=words):
        freeze_lowest(model_of("vit_tiny_patch16_224", depth=4, **TINY), **asked)


def test_a_model_whose_layers_timm_does_not_know_is_refused_unless_nothing_is_frozen():
    with torch.device("meta"):
        model = timm.create_model("pit_ti_224", num_classes=5)
    assert freeze_lowest(model) == []
    with pytest.raises(UsageError, match="timm does not list the blocks of a PoolingVisionTransformer"):
        freeze_lowest(model, blocks=1)


def test_frozen_batch_norms_keep_their_statistics_and_the_others_learn_theirs():
    model = model_of("resnet18")
    freeze_lowest(model, stages=2)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()
    eval_frozen(model)
    model(torch.randn(4, 3, 32, 32))
    changed = {name.split(".")[0] for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"layer3", "layer4"}
    assert model.training
    assert model.layer3.training
    assert not model.layer2[1].bn2.training


def test_the_drop_path_of_frozen_blocks_is_off_and_of_the_others_on():
    model = model_of("vit_tiny_patch16_224", depth=4, drop_path_rate=0.5, **TINY)
    freeze_lowest(model, blocks=0.75)
    model.train()
    eval_frozen(model)
    tokens = torch.randn(8, 16, 16)
    with torch.no_grad():
        low = [model.blocks[:3](tokens) for _ in range(2)]
        high = [model.blocks[3](tokens) for _ in range(2)]
    assert torch.equal(*low)
    assert not torch.equal(*high)
