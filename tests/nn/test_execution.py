"""How a step is carried out: with less memory (activation_checkpointing=true), or compiled. Neither changes what is computed.

Compiling is tested with aot_eager, which traces and differentiates as inductor does but generates no code: it needs no
compiler, and takes seconds.
"""

import copy

import pytest
import pytorch_lightning as L
import torch
from safetensors.torch import load_file
from timm.layers import DropPath as TimmDropPath
from torch import nn
from torch._dynamo.utils import counters

from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.methods.supervised import Supervised
from sslvision.nn import compilation
from sslvision.nn.activation_checkpointing import count_batches_once, run_checkpointed
from sslvision.nn.compilation import DropPath, force_eager, share_graphs, should_compile
from sslvision.workflows import finetuning, pretraining

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks, and hides the warning

VIT = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 32, "depth": 6, "num_heads": 2, "image_size": 32}
SWIN = {"name": "swin_tiny_patch4_window7_224", "image_size": 64, "window_size": 4, "embed_dim": 16, "patch_size": 2}
SWIN |= {"depths": [2, 4], "num_heads": [1, 2]}
RESNET = {"name": "resnet18", "image_size": 32}
HEAD = {"prototypes": 16, "hidden": 16, "bottleneck": 8, "local_crops": 2, "local_size": 32}


def method_on(kind, backbone):
    torch.manual_seed(0)
    if kind == "mae":
        return MAE(build_backbone(**backbone), decoder_embed_dim=32, decoder_depth=4, decoder_num_heads=2)
    if kind == "dino":
        return DINO(build_backbone(**backbone), **HEAD)
    return Supervised(build_backbone(**backbone), classes=["a", "b"], labels=torch.tensor([0, 1]), ema=0.9)


def views_for(method, batch=4):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(batch, 3, crop.size, crop.size, generator=generator) for crop in method.crops]
    if isinstance(method, MAE):
        rows, columns = method.backbone.grid
        return [*images, torch.rand(batch, rows * columns, generator=generator)]
    if isinstance(method, Supervised):
        return [*images, torch.rand(batch, 2, generator=generator).softmax(1)]
    return images


def step(method):
    """Loss, gradients and running statistics after a step; and bytes kept for the backward pass, each storage once."""
    kept, own = {}, {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    torch.manual_seed(1)
    views = views_for(method)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method.losses(views, Clock(0, 10, 5))["loss"]
    size = sum(nbytes for nbytes, _ in kept.values())
    loss.backward()
    numbers = {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | numbers | dict(method.named_buffers()), size


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "backbone", "share"),
    [
        ("mae", VIT | {"drop_path_rate": 0.3}, 0.5),
        ("mae", SWIN | {"drop_path_rate": 0.3}, 0.6),
        ("dino", VIT | {"drop_path_rate": 0.3, "proj_drop_rate": 0.1}, 0.25),
        ("dino", SWIN | {"drop_path_rate": 0.3}, 0.6),
        ("dino", RESNET, 0.6),
        ("supervised", VIT | {"pool": "avg"}, 0.4),
    ],
)
def test_losses_gradients_and_statistics_are_the_same_to_the_last_bit_and_less_is_kept(kind, backbone, share):
    method = method_on(kind, backbone)
    activation_checkpointing = copy.deepcopy(method)
    activation_checkpointing.enable_activation_checkpointing()
    usual, much = step(method)
    same, little = step(activation_checkpointing)
    assert usual.keys() == same.keys()
    for name, value in usual.items():
        assert value is None or torch.equal(value, same[name]), name
    assert little < share * much, f"{little / much:.2f}"


def test_every_block_of_a_vit_is_spared_the_one_for_the_class_token_too():
    deep = {}
    for depth in (2, 6):
        method = method_on("dino", VIT | {"depth": depth})
        method.enable_activation_checkpointing()
        deep[depth] = step(method)[1]
    tokens = 4 * (2 * 17 + 2 * 17) * 32 * 4  # bytes: of all crops, what goes into a block
    assert deep[6] - deep[2] == 4 * tokens


def test_what_is_not_trained_keeps_nothing_and_is_left_alone():
    method = method_on("dino", VIT)
    method.enable_activation_checkpointing()
    assert method.student["backbone"].model.grad_checkpointing
    assert not method.teacher["backbone"].model.grad_checkpointing


def test_nothing_is_computed_again_without_a_backward_pass():
    calls = []

    def function(x):
        calls.append(1)
        return x.exp()

    with torch.no_grad():
        assert run_checkpointed(function, torch.ones(1), enabled=True) > 2
    run_checkpointed(function, torch.ones(1, requires_grad=True), enabled=True).backward()
    assert len(calls) == 3


def test_batch_norms_count_a_batch_that_is_computed_again_once():
    torch.manual_seed(0)
    usual = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    again = copy.deepcopy(usual)
    count_batches_once(again)
    x = torch.randn(8, 3)
    for net, activation_checkpointing in ((usual, False), (again, True)):
        for _ in range(3):
            run_checkpointed(net, x, enabled=activation_checkpointing).square().sum().backward()
    for (name, right), found in zip(usual.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(right, found), name
    assert again[1].num_batches_tracked == 3


def test_a_model_that_timm_cannot_spare_is_refused_in_words():
    backbone = build_backbone("vgg11", image_size=32)
    with pytest.raises(UsageError, match=r"timm cannot .* VGG a second time.*accumulate_grad_batches=2"):
        backbone.enable_activation_checkpointing()


@pytest.mark.parametrize("recipe", ["mae", pytest.param("dino", marks=pytest.mark.e2e)])
def test_a_run_that_spares_memory_ends_with_the_same_weights_and_says_so(
    run_tiny, tmp_path, monkeypatch, capsys, recipe
):
    monkeypatch.setattr(pretraining, "export_and_evaluate", lambda *_: {})
    words = ["backbone.depth=3", "backbone.drop_path_rate=0.2", "knn_every_epochs=0", "dry_run=true"]
    for checkpointed in ("false", "true"):
        run_tiny(tmp_path / checkpointed, *words, f"activation_checkpointing={checkpointed}", recipe=recipe)
        assert ("recomputed" in capsys.readouterr().out) == (checkpointed == "true")
    assert_same(weights_of(tmp_path / "false"), weights_of(tmp_path / "true"))


@pytest.mark.thorough
def test_fine_tuning_that_spares_memory_ends_with_the_same_weights(settings_of, tiny_run, tmp_path):
    words = ["labels_per_class=20", "epochs=1", "min_updates=3", "evaluations=1", "head_first=false", "scratch=false"]
    for checkpointed in ("false", "true"):
        given = [f"run={tiny_run}", *words, f"activation_checkpointing={checkpointed}", "trainer.accelerator=cpu"]
        settings = settings_of("finetune", *given)
        finetuning.finetune(settings, tmp_path / checkpointed)
    assert_same(*(load_file(tmp_path / name / "export" / "model.safetensors") for name in ("false", "true")))


def weights_of(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, weights in one.items():
        assert torch.equal(weights, other[name]), name


# Compiled.


@pytest.fixture
def aot_eager(monkeypatch):
    """Compile by a backend that generates no code, and leave dynamo as it was found."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        yield
    torch._dynamo.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


CASES = [
    ("mae", VIT | {"drop_path_rate": 0.0}, 5),  # block and block_part of encoder and decoder, loss
    ("mae", SWIN | {"drop_path_rate": 0.0}, 8),
    ("dino", VIT | {"drop_path_rate": 0.0}, 9),  # teacher, global and local crops: block, block_part; 2 heads, loss
    ("dino", SWIN | {"drop_path_rate": 0.0}, 16),
    ("dino", RESNET, 6),
    ("supervised", VIT, 2),
]


@pytest.mark.parametrize(
    ("kind", "backbone", "most", "low"),
    [
        pytest.param(*case, False, marks=() if n == 0 else pytest.mark.thorough if n == 2 else pytest.mark.e2e)
        for n, case in enumerate(CASES)
    ]
    + [pytest.param(*CASES[n], True, marks=pytest.mark.thorough if n == 5 else pytest.mark.e2e) for n in (0, 1, 4, 5)],
)
def test_compiled_steps_compute_the_same_with_few_graphs_and_no_recompiling(aot_eager, kind, backbone, most, low):
    plain = method_on(kind, backbone)
    method = copy.deepcopy(plain)
    if low:
        method.enable_activation_checkpointing()
    method.compile_blocks()
    assert [*method.state_dict()] == [*plain.state_dict()]
    right, _ = step(plain)
    found, _ = step(method)
    assert 0 < graphs() <= most or (low and backbone is RESNET)
    assert not counters["graph_break"]
    right = {name: value.double() for name, value in right.items() if value is not None}
    size = max(float(value.norm()) for name, value in right.items() if name in dict(plain.named_parameters()))
    for name, value in right.items():
        assert (value - found[name]).norm() < 1e-4 * max(size, 1), name
    torch._dynamo.config.error_on_recompile = True
    before = graphs()
    step(method)
    assert graphs() == before


@pytest.mark.thorough
def test_blocks_with_different_drop_path_share_a_graph(aot_eager):
    backbone = build_backbone(**VIT | {"depth": 3}, drop_path_rate=0.3).train()
    backbone.compile_blocks()
    backbone(torch.randn(4, 3, 32, 32)).sum().backward()
    assert graphs() == 3  # the first block has none; the others; the last one for the class token


def test_drop_path_of_compiled_blocks_drops_as_often_and_keeps_the_mean():
    model = nn.Sequential(nn.Linear(1, 1), TimmDropPath(0.3), TimmDropPath(0.0))
    share_graphs(model)
    drop = model[1]
    assert isinstance(drop, DropPath)
    assert isinstance(model[2], TimmDropPath)
    assert not drop.state_dict()
    torch.manual_seed(0)
    x = drop(torch.ones(20_000, 2, 3))
    dropped = (x == 0).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1)), "a row is dropped as a whole"
    assert dropped.all(1).float().mean() == pytest.approx(0.3, abs=0.01)
    assert x.mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop.eval()(x), x)


def test_what_is_evaluated_is_not_compiled(aot_eager):
    method = method_on("dino", VIT)
    method.compile_blocks()
    with force_eager(), torch.no_grad():
        for batch in (2, 5):
            method.pretrained()(torch.randn(batch, 3, 32, 32))
    assert not graphs()


def test_it_is_compiled_on_a_gpu_unless_the_setting_says_otherwise():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not should_compile(None, cpu)
    assert should_compile(True, cpu)
    assert not should_compile(False, gpu)


class Strict(L.Callback):
    """After two updates nothing may be compiled any more."""

    def __init__(self):
        self.graphs = 0

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 2:
            torch._dynamo.config.error_on_recompile = True
            self.graphs = graphs()


@pytest.mark.parametrize(
    "recipe", [pytest.param("mae", marks=pytest.mark.thorough), pytest.param("dino", marks=pytest.mark.e2e)]
)
def test_a_compiled_run_compiles_nothing_after_its_first_updates(aot_eager, run_tiny, tmp_path, monkeypatch, recipe):
    strict, watchers = Strict(), pretraining.pretraining_callbacks
    monkeypatch.setattr(pretraining, "pretraining_callbacks", lambda *about: [strict, *watchers(*about)])
    monkeypatch.setattr(pretraining, "export_and_evaluate", lambda *_: {})
    words = ["backbone.depth=2", "compile=true", "batch_size=300", "knn_every_epochs=1"]
    run_tiny(tmp_path / "run", *words, recipe=recipe)
    assert strict.graphs > 2
    assert graphs() == strict.graphs, "neither training nor evaluation on the way, with its smaller last batch"
    assert "rankme" in (tmp_path / "run" / "metrics.csv").read_text(), "there was an evaluation on the way"


@pytest.mark.thorough
def test_compiled_fine_tuning_is_validated_and_exported_as_it_stands(aot_eager, settings_of, tiny_run, tmp_path):
    words = ["labels_per_class=25", "epochs=1", "min_updates=6", "evaluations=3", "holdout=0.2", "scratch=false"]
    settings = settings_of("finetune", f"run={tiny_run}", *words, "compile=true", "trainer.accelerator=cpu")
    finetuning.finetune(settings, tmp_path / "run")
    assert graphs() == 1  # the block; the class of an image is read off the mean of its patches
    names = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert not any("orig_mod" in name for name in names)


@pytest.mark.e2e
def test_a_compiled_run_goes_on_to_the_same_weights(aot_eager, run_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "export_and_evaluate", lambda *_: {})
    words = ["compile=true", "backbone.drop_path_rate=0.3", "backbone.depth=3", "knn_every_epochs=0"]
    run_tiny(tmp_path / "whole", *words, "keep_checkpoints=5")
    run_tiny(tmp_path / "again", *words, f"resume={tmp_path / 'whole' / 'checkpoints' / 'last-1.ckpt'}")
    assert_same(weights_of(tmp_path / "whole"), weights_of(tmp_path / "again"))
