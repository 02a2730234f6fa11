"""When a step becomes CUDA graphs. What graphs compute is tested in tests/gpu."""

import pytest
import torch

from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.methods.supervised import Supervised
from sslvision.nn.packed import PackedAttention
from sslvision.training.trainer import choose_layers

CUDA = torch.device("cuda")
VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 1}
RESNET = {"name": "resnet10t", "image_size": 64}


def method_of(kind, backbone=VIT):
    built = build_backbone(**backbone)
    if kind == "mae":
        return MAE(built, decoder_width=32, decoder_depth=2, decoder_heads=1)
    if kind == "dino":
        return DINO(built, prototypes=16, hidden=16, bottleneck=8, local_size=built.image_size[0])
    return Supervised(built, classes=["a", "b"], labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_steps_of_a_vit_on_one_cuda_device_are_captured_unless_the_setting_says_otherwise(kind):
    for setting, captures in ((None, True), (True, True), (False, False)):
        method = method_of(kind)
        choose_layers(method, CUDA, compiled=False, captured=setting)
        assert method.captures == captures
        assert any(type(module) is PackedAttention for module in method.modules())


def test_a_backbone_nobody_has_tried_and_accumulated_batches_are_captured_only_if_asked_for():
    for method, how in ((method_of("dino", RESNET), {}), (method_of("mae"), {"accumulated": 2})):
        choose_layers(method, CUDA, compiled=False, **how)
        assert not method.captures
        choose_layers(method, CUDA, compiled=False, captured=True, **how)
        assert method.captures


@pytest.mark.parametrize(
    ("kind", "how", "reason"),
    [
        ("mae", {"device": torch.device("cpu")}, "there are none on cpu"),
        ("mae", {"processes": 2}, "2 processes exchange gradients"),
        ("supervised", {}, "Supervised is not made for them"),
        ("sparing", {}, "memory=low computes activations a second time"),
    ],
)
def test_where_there_can_be_no_graph_there_is_none_and_asking_for_one_is_refused(kind, how, reason):
    method = method_of("mae" if kind == "sparing" else kind)
    if kind == "sparing":
        method.spare_memory()
    where = {"device": CUDA, "compiled": False} | how
    choose_layers(method, **where)
    assert not method.captures
    with pytest.raises(UsageError, match=f"cuda_graphs=true cannot be: {reason}"):
        choose_layers(method, **where, captured=True)


def test_a_run_on_a_cpu_that_asks_for_graphs_ends_before_the_first_step(run_tiny, tmp_path):
    with pytest.raises(UsageError, match="cuda_graphs=true cannot be: there are none on cpu"):
        run_tiny(tmp_path / "run", "cuda_graphs=true", recipe="mae")
    assert not (tmp_path / "run").exists()
