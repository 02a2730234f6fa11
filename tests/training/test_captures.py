"""When a step becomes CUDA graphs, and training by them. What graphs compute is tested in tests/gpu."""

from types import SimpleNamespace

import pytest
import torch

from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError
from sslvision.methods import lightning
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.methods.supervised import Supervised
from sslvision.nn.cuda_graphs import CapturedStep
from sslvision.nn.packed_attention import PackedAttention
from sslvision.training import trainer
from sslvision.training.trainer import configure_method
from sslvision.workflows import pretraining

CUDA = torch.device("cuda")
VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 1}
RESNET = {"name": "resnet10t", "image_size": 64}


def method_of(kind, backbone=VIT):
    built = build_backbone(**backbone)
    if kind == "mae":
        return MAE(built, decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=1)
    if kind == "dino":
        return DINO(built, prototypes=16, hidden=16, bottleneck=8, local_size=built.image_size[0])
    return Supervised(built, classes=["a", "b"], labels=torch.tensor([0, 1]))


@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_steps_of_a_vit_on_one_cuda_device_are_captured_unless_the_setting_says_otherwise(kind):
    for setting, captures in ((None, True), (True, True), (False, False)):
        method = method_of(kind)
        configure_method(method, CUDA, compile=False, cuda_graphs=setting)
        assert method.captures == captures
        assert any(type(module) is PackedAttention for module in method.modules())


def test_a_backbone_nobody_has_tried_and_accumulated_batches_are_captured_only_if_asked_for():
    for method, how in ((method_of("dino", RESNET), {}), (method_of("mae"), {"accumulate": 2})):
        configure_method(method, CUDA, compile=False, **how)
        assert not method.captures
        configure_method(method, CUDA, compile=False, cuda_graphs=True, **how)
        assert method.captures


@pytest.mark.parametrize(
    ("kind", "how", "reason"),
    [
        ("mae", {"device": torch.device("cpu")}, "cpu has none"),
        ("mae", {"world_size": 2}, "2 processes exchange gradients"),
        ("supervised", {}, "Supervised does not support them"),
        ("activation_checkpointing", {}, "activation_checkpointing=true recomputes activations"),
    ],
)
def test_where_there_can_be_no_graph_there_is_none_and_asking_for_one_is_refused(kind, how, reason):
    method = method_of("mae" if kind == "activation_checkpointing" else kind)
    if kind == "activation_checkpointing":
        method.enable_activation_checkpointing()
    where = {"device": CUDA, "compile": False} | how
    configure_method(method, **where)
    assert not method.captures
    with pytest.raises(UsageError, match=f"cuda_graphs=true is not possible: {reason}"):
        configure_method(method, **where, cuda_graphs=True)


def test_a_method_made_of_another_is_captured_if_it_says_so_itself():
    class Cautious(MAE):
        pass

    class Sure(MAE):
        capturable = True

    for kind, captures in ((Cautious, False), (Sure, True)):
        method = kind(build_backbone(**VIT), decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=1)
        configure_method(method, CUDA, compile=False)
        assert method.captures == captures


def test_a_run_on_a_cpu_that_asks_for_graphs_ends_before_the_first_step(run_tiny, tmp_path):
    with pytest.raises(UsageError, match="cuda_graphs=true is not possible: cpu has none"):
        run_tiny(tmp_path / "run", "cuda_graphs=true", recipe="mae")
    assert not (tmp_path / "run").exists()


class Replayed(CapturedStep):
    """Graphs for a CPU: a replay computes into the same tensors; the first spoils the gradients' memory, as CUDA's may."""

    made = 0

    def __init__(self, function, network, inputs):
        type(self).made += 1
        self.inputs = [one.clone() for one in inputs]
        before = [(buffer, buffer.clone()) for buffer in network.buffers()]
        self.outputs = {name: value.detach() for name, value in function(*inputs).items()}
        for buffer, value in before:
            buffer.copy_(value)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.gradients, self._scale = [torch.zeros_like(p) for p in self.parameters], torch.ones(())

        def forward():
            for own in self.gradients:
                own.fill_(torch.nan)
            with torch.autocast("cpu", enabled=False):
                results = function(*self.inputs)
            self.loss = results["loss"]
            for name, value in results.items():
                self.outputs[name].copy_(value.detach())

        def backward():
            for own, found in zip(self.gradients, self._gradients(self.loss, self._scale), strict=True):
                own.copy_(found)

        self._forward, self._backward = SimpleNamespace(replay=forward), SimpleNamespace(replay=backward)


@pytest.mark.parametrize(
    ("recipe", "accumulate"),
    [("dino", 1), ("mae", 3), *(pytest.param(*case, marks=pytest.mark.e2e) for case in (("dino", 3), ("mae", 1)))],
)
def test_training_by_replayed_steps_ends_with_the_same_weights(run_tiny, tmp_path, monkeypatch, recipe, accumulate):
    monkeypatch.setattr(pretraining, "export_and_evaluate", lambda *_: {})
    monkeypatch.setattr(trainer, "cuda_graph_obstacle", lambda *_: "")
    monkeypatch.setattr(lightning, "CapturedStep", Replayed)
    made, weights = Replayed.made, []
    words = ["backbone.drop_path_rate=0.2", "knn_every_epochs=0", "trainer.precision=32-true"]
    words += [f"trainer.accumulate_grad_batches={accumulate}", "batch_size=297"]
    words += ["method.warmup_teacher_temp_epochs=2", "method.teacher_temp=0.07"] if recipe == "dino" else []
    for captured in ("false", "true"):
        run_tiny(tmp_path / captured, *words, f"cuda_graphs={captured}", recipe=recipe)
        file = tmp_path / captured / "checkpoints" / "last.ckpt"
        weights.append(torch.load(file, weights_only=True)["state_dict"])
    assert Replayed.made == made + 1
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
