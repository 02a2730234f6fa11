"""Linear layers with weights laid out beforehand: the same numbers, and only where they are meant to be."""

import copy

import pytest
import torch
from torch import nn

from sslvision.nn.packed import FEWEST_ROWS, PackedLinear, _Product, pack_linears


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
    pack_linears(packed)
    return stock, packed[0]


def run(layer, x, autocast):
    """The answer, and the gradients of images and parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answer = layer(x)
    torch.manual_seed(1)
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return [answer, *torch.autograd.grad(answer, wanted, torch.randn_like(answer))]


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(384, 1536), (1536, 384), (33, 17)])
def test_answers_and_gradients_are_those_of_torchs_layer_to_the_bit(sizes, bias, autocast):
    stock, packed = both(*sizes, bias=bias)
    x = torch.randn(8, 200, sizes[0])
    assert x.shape[:2].numel() >= FEWEST_ROWS
    for own, other in zip(run(packed, x, autocast), run(stock, x, autocast), strict=True):
        assert own.dtype == other.dtype
        assert own.shape == other.shape
        assert torch.equal(own, other)


def test_a_frozen_layer_hands_gradients_on_and_gets_none():
    stock, packed = both(48, 96)
    for layer in (stock, packed):
        layer.requires_grad_(False)
    x = torch.randn(FEWEST_ROWS, 48)
    assert all(torch.equal(*pair) for pair in zip(run(packed, x, False), run(stock, x, False), strict=True))


@pytest.mark.parametrize(
    ("rows", "dtype", "used"),
    [(FEWEST_ROWS, torch.float32, True), (FEWEST_ROWS - 1, torch.float32, False), (FEWEST_ROWS, torch.float64, False)],
)
def test_few_rows_and_other_types_are_left_to_torch(rows, dtype, used, monkeypatch):
    calls, apply = [], _Product.apply
    monkeypatch.setattr(_Product, "apply", lambda *inputs: calls.append(1) or apply(*inputs))
    stock, packed = (layer.to(dtype) for layer in both(8, 8))
    x = torch.randn(rows, 8, dtype=dtype)
    assert torch.equal(packed(x), stock(x))
    assert bool(calls) == used


def test_packing_leaves_names_weights_and_other_layers_as_they_are():
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Bilinear(4, 4, 2))
    before = copy.deepcopy(network.state_dict())
    pack_linears(network)
    assert [type(module) for module in network] == [PackedLinear, nn.LayerNorm, nn.Bilinear]
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
