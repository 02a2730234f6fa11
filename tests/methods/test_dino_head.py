"""Prototypes: a weight-normalized layer, written out forwards and backwards."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from sslvision.methods.dino_head import NormalizedRows, Prototypes


def test_prototypes_and_their_gradients_are_those_of_torchs_weight_norm():
    torch.manual_seed(0)
    ours, stock = Prototypes(6, 9, unit=False), weight_norm(nn.Linear(6, 9, bias=False))
    with torch.no_grad():
        ours.weight_g.uniform_(0.5, 2)
        stock.parametrizations.weight.original0.copy_(ours.weight_g)
        stock.parametrizations.weight.original1.copy_(ours.weight_v)
    features, weights = torch.randn(4, 6), torch.randn(4, 9)
    for layer in (ours, stock):
        (layer(features) * weights).sum().backward()
    assert torch.allclose(ours(features), stock(features), atol=1e-6)
    for own, other in (("weight_g", "original0"), ("weight_v", "original1")):
        theirs = getattr(stock.parametrizations.weight, other).grad
        assert torch.allclose(getattr(ours, own).grad, theirs, atol=1e-6)


def test_all_three_gradients_are_the_slopes_of_the_product():
    torch.manual_seed(0)
    inputs = [torch.rand(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4), (5, 4), (5, 1))]
    assert torch.autograd.gradcheck(NormalizedRows.apply, inputs)


@pytest.mark.parametrize("autocast", [True, False])
def test_under_autocast_only_the_product_is_of_low_precision(autocast):
    torch.manual_seed(0)
    layer, features = Prototypes(64, 32), nn.functional.normalize(torch.randn(8, 64), dim=1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        answers = layer(features)
    exact = features.double() @ nn.functional.normalize(layer.weight_v.double(), dim=1).T
    error = (answers - exact).abs().max()
    assert answers.dtype == torch.float32  # or a scaled answer would be rounded a second time
    assert error < (1e-2 if autocast else 1e-6)
    assert error > 1e-5 or not autocast
    answers.sum().backward()
    assert layer.weight_v.grad.dtype == torch.float32
    assert layer.weight_g.grad is None
