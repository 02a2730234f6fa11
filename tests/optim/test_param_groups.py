import json
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError
from sslvision.optim.param_groups import apply_schedule, check_groups, decay_groups, layer_groups

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "schedules.json").read_text())


def test_matrices_decay_and_vectors_and_frozen_parameters_do_not():
    model = timm.create_model("test_vit", num_classes=0)
    model.pos_embed.requires_grad_(False)
    decayed, plain = decay_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {"cls_token", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"} <= {
        names[id(p)] for p in decayed["params"]
    }
    assert {"norm.weight", "blocks.0.attn.qkv.bias"} <= {names[id(p)] for p in plain["params"]}
    assert "pos_embed" not in {names[id(p)] for p in decayed["params"] + plain["params"]}
    assert len(decayed["params"]) + len(plain["params"]) == len(names) - 1


def classifier(name, **options):
    """A classifier of ImageNet's classes that has shapes and no numbers."""
    with torch.device("meta"):
        model = build_backbone(name, image_size=224, **options).model
        model.reset_classifier(1000)
    return model


def by_name(model, **settings):
    """Return {parameter: (lr_scale, weight_decay, decayed)}, and check that none is in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = layer_groups(model, **settings)
    found = {names[id(p)]: (g["lr_scale"], g["weight_decay"], g["decayed"]) for g in groups for p in g["params"]}
    assert len(found) == sum(len(group["params"]) for group in groups)
    return found


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_layer_wise_decay_equals_the_authors_for_vit_base(pool):
    model = classifier("vit_base_patch16_224", pool=pool)
    ours = by_name(model, weight_decay=0.05, layer_decay=0.75)
    golden = GOLDEN["mae_layer_decay_vit_base_0.75"]
    assert sorted(ours) == sorted(name for group in golden for name in group["params"])
    for group in golden:
        for name in group["params"]:
            scale, decay, decayed = ours[name]
            assert abs(scale - group["lr_scale"]) <= 1e-9, name
            assert decay == group["weight_decay"], name
            assert decayed == (decay > 0)


# Where each part of Swin-T is, counted from the input by hand: stem 0, then twelve blocks, the head 13.
SWIN_TINY = {
    "patch_embed.proj.weight": 0,
    "patch_embed.norm.weight": 0,
    "layers.0.blocks.0.attn.qkv.weight": 1,
    "layers.0.blocks.1.mlp.fc2.bias": 2,
    "layers.1.downsample.norm.weight": 3,
    "layers.1.downsample.reduction.weight": 3,
    "layers.1.blocks.0.attn.relative_position_bias_table": 3,
    "layers.1.blocks.1.norm1.bias": 4,
    "layers.2.downsample.reduction.weight": 5,
    "layers.2.blocks.0.attn.proj.weight": 5,
    "layers.2.blocks.1.attn.proj.weight": 6,
    "layers.2.blocks.2.attn.proj.weight": 7,
    "layers.2.blocks.3.attn.proj.weight": 8,
    "layers.2.blocks.4.attn.proj.weight": 9,
    "layers.2.blocks.5.attn.proj.weight": 10,
    "layers.3.downsample.reduction.weight": 11,
    "layers.3.blocks.0.mlp.fc1.weight": 11,
    "layers.3.blocks.1.mlp.fc1.weight": 12,
    "norm.weight": 13,
    "norm.bias": 13,
    "head.fc.weight": 13,
    "head.fc.bias": 13,
}


def test_layer_wise_decay_of_swin_tiny_follows_its_blocks():
    ours = by_name(classifier("swin_tiny_patch4_window7_224"), weight_decay=0.05, layer_decay=0.8)
    for name, layer in SWIN_TINY.items():
        scale, decay, decayed = ours[name]
        assert scale == pytest.approx(0.8 ** (13 - layer), abs=1e-9), name
        vector = name.endswith(("bias", "norm.weight", "bias_table"))
        assert (decay, decayed) == ((0.0, False) if vector else (0.05, True)), name


def test_without_layer_decay_there_is_one_rate_even_where_timm_knows_no_layers():
    with torch.device("meta"):
        model = timm.create_model("pit_ti_224", num_classes=5)
    assert {scale for scale, _, _ in by_name(model, weight_decay=0.1, layer_decay=1.0).values()} == {1.0}
    with pytest.raises(UsageError, match="set freeze=0, freeze_stages=0 and layer_decay=1"):
        layer_groups(model, weight_decay=0.1, layer_decay=0.9)


def test_frozen_layers_are_left_out_and_the_others_keep_their_rates():
    model = timm.create_model("test_vit", num_classes=5)
    everything = by_name(model, weight_decay=0.05, layer_decay=0.5)
    model.blocks[:2].requires_grad_(False)
    rest = by_name(model, weight_decay=0.05, layer_decay=0.5)
    assert rest == {name: value for name, value in everything.items() if not name.startswith(("blocks.0", "blocks.1"))}


@pytest.mark.parametrize("layer_decay", [0.0, -1.0, 1.1])
def test_a_layer_decay_that_cannot_be_is_refused(layer_decay):
    with pytest.raises(UsageError, match="layer_decay="):
        layer_groups(timm.create_model("test_vit", num_classes=5), weight_decay=0.05, layer_decay=layer_decay)


def test_timms_own_layer_wise_decay_differs_in_the_final_norm_alone():
    model = classifier("vit_base_patch16_224", pool="token")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    theirs = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(
            model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75
        )
        for p in group["params"]
    }
    ours = by_name(model, weight_decay=0.05, layer_decay=0.75)
    assert {name for name in ours if abs(ours[name][0] - theirs[name]) > 1e-9} == {"norm.weight", "norm.bias"}


def test_a_schedule_reaches_the_groups_that_follow_it():
    layer = nn.Linear(2, 2)
    groups = decay_groups(layer, lr=0.5, constant_lr=True)
    groups += [{"params": [], "lr_scale": 0.1}, {"params": [], "decayed": False, "weight_decay": 0.3}]
    apply_schedule(groups, {"lr": 2.0, "weight_decay": 0.7})
    assert [group["lr"] for group in groups] == [0.5, 0.5, 0.2, 2.0]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.0, 0.7, 0.3]


def test_a_constant_learning_rate_of_zero_is_refused():
    optimizer = torch.optim.SGD(decay_groups(nn.Linear(2, 2), constant_lr=True), lr=0.0)
    with pytest.raises(UsageError, match=r"Parameter group 0 .* constant_lr=True and a learning rate of 0"):
        check_groups(optimizer)
