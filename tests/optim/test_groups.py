import json
from pathlib import Path

import timm
from timm.optim import param_groups_layer_decay

from sslvision.optim.groups import decay_groups

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


def test_timms_layer_wise_decay_equals_the_authors_for_vit_base():
    model = timm.create_model("vit_base_patch16_224", global_pool="avg", device="meta")
    groups = param_groups_layer_decay(
        model, weight_decay=0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.75
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ours = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    for group in GOLDEN["mae_layer_decay_vit_base_0.75"]:
        for name in group["params"]:
            # With mean pooling the final norm follows the pooling; timm calls it fc_norm.
            scale, decay = ours[name.replace("norm", "fc_norm") if name.startswith("norm") else name]
            assert abs(scale - group["lr_scale"]) <= 1e-9
            assert decay == group["weight_decay"]
