"""What a CPU computes another way: the same numbers, and only where it is meant to."""

import copy

import pytest
import pytorch_lightning as L
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import Attention
from torch import nn

from sslvision.nn.cpu import CPUAttention, PackedLinear, UnfusedAttention, _Product, use_cpu_kernels
from sslvision.workflows import pretraining

ONE_KERNEL = torch.cpu.get_capabilities()["avx512_f"]  # oneDNN's, of weights laid out before and during a product


@pytest.fixture(autouse=True)
def products_by_onednn():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def both(inside, outside, *, bias=True):
    torch.manual_seed(0)
    stock = nn.Linear(inside, outside, bias=bias)
    packed = nn.Sequential(copy.deepcopy(stock))
    use_cpu_kernels(packed)
    return stock, packed[0]


def run(layer, x, autocast):
    """The answer, and the gradients of images and parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answer = layer(x)
    torch.manual_seed(1)
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return [answer, *torch.autograd.grad(answer, wanted, torch.randn_like(answer))]


@pytest.fixture
def always(monkeypatch):
    """Lay weights out however small the product is."""
    monkeypatch.setattr("sslvision.nn.cpu.MIN_PRODUCT", 0)


@pytest.fixture
def laid_out(monkeypatch):
    """A list that grows whenever weights are laid out."""
    calls, apply = [], _Product.apply
    monkeypatch.setattr(_Product, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
    return calls


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("sizes", "rows"), [((384, 1536), 50), ((64, 192), 33), ((17, 37), 5)])
def test_answers_and_gradients_are_those_of_torchs_layer_to_the_bit(always, laid_out, sizes, rows, bias, autocast):
    stock, packed = both(*sizes, bias=bias)
    x = torch.randn(8, rows, sizes[0])
    pairs = list(zip(run(packed, x, autocast), run(stock, x, autocast), strict=True))
    for own, other in pairs:
        assert own.dtype == other.dtype
        assert own.shape == other.shape
    answer, its_own = pairs.pop(0)
    if ONE_KERNEL:
        assert torch.equal(answer, its_own)
    else:  # the order of sums may differ
        assert (answer - its_own).norm() < 1e-6 * its_own.norm()
    assert all(torch.equal(own, other) for own, other in pairs)
    assert bool(laid_out) == (not autocast or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def test_a_frozen_layer_hands_gradients_on_and_gets_none(always, laid_out):
    stock, packed = both(48, 96)
    for layer in (stock, packed):
        layer.requires_grad_(False)
    x = torch.randn(70, 48)
    assert all(torch.equal(*pair) for pair in zip(run(packed, x, False), run(stock, x, False), strict=True))
    assert laid_out


@pytest.mark.parametrize(
    ("rows", "outside", "dtype", "used"),
    [
        (64, 128, torch.float32, True),
        (63, 128, torch.float32, False),  # too little work
        (100, 127, torch.float32, False),  # does not widen
        (64, 128, torch.float64, False),  # not oneDNN's
    ],
)
def test_only_large_products_that_widen_are_not_left_to_torch(laid_out, monkeypatch, rows, outside, dtype, used):
    monkeypatch.setattr("sslvision.nn.cpu.MIN_PRODUCT", 64 * 64 * 128)
    stock, packed = (layer.to(dtype) for layer in both(64, outside))
    x = torch.randn(rows, 64, dtype=dtype)
    assert torch.equal(packed(x), stock(x))
    assert bool(laid_out) == used


def attention(**options):
    torch.manual_seed(0)
    stock = Attention(24, 3, qkv_bias=True, **options).double()
    stock.fused_attn = False
    other = copy.deepcopy(nn.Sequential(stock))
    use_cpu_kernels(other)
    assert type(other[0]) is CPUAttention
    return stock, other[0]


def test_attention_and_its_gradients_are_those_of_timm():
    stock, other = attention()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    assert all(
        torch.allclose(*pair, atol=1e-12) for pair in zip(run(other, x, False), run(stock, x, False), strict=True)
    )


@pytest.mark.parametrize(
    ("options", "fused", "used"),
    [
        ({}, False, True),
        ({}, True, False),
        ({"attn_drop": 0.5}, False, False),
        ({"qk_norm": True, "norm_layer": nn.LayerNorm}, False, False),
        ({"gated": True}, False, False),
    ],
    ids=str,
)
def test_attention_that_does_more_is_left_to_timm(options, fused, used, monkeypatch):
    calls, apply = [], UnfusedAttention.apply
    monkeypatch.setattr(UnfusedAttention, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
    stock, other = attention(**options)
    other.fused_attn = fused
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    answers = []
    for layer in (stock, other):
        torch.manual_seed(2)
        answers.append(layer(x))
    assert torch.allclose(*answers, atol=1e-12)
    assert bool(calls) == used


class Kinds(L.Callback):
    """What the layers of a method in training are."""

    found = frozenset()

    def on_train_start(self, trainer, method):
        self.found = {type(module) for module in method.modules()}


@pytest.mark.parametrize("recipe", ["mae", pytest.param("dino", marks=pytest.mark.e2e)])
def test_a_run_on_a_cpu_trains_with_them_and_exports_what_timm_knows(run_tiny, tmp_path, monkeypatch, recipe):
    kinds, watchers = Kinds(), pretraining.pretraining_callbacks
    monkeypatch.setattr(pretraining, "pretraining_callbacks", lambda *about: [kinds, *watchers(*about)])
    run_tiny(tmp_path / "run", "dry_run=true", recipe=recipe)
    assert {PackedLinear, CPUAttention} <= kinds.found
    assert not {nn.Linear, Attention} & kinds.found
    names = load_file(tmp_path / "run" / "export" / "model.safetensors")
    assert "blocks.0.attn.qkv.weight" in names


def test_packing_leaves_names_weights_and_other_layers_as_they_are():
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Bilinear(4, 4, 2))
    before = copy.deepcopy(network.state_dict())
    use_cpu_kernels(network)
    assert [type(module) for module in network] == [PackedLinear, nn.LayerNorm, nn.Bilinear]
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
