"""Each gradient scaled by its own factor, at once where all are pieces of one tensor."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslvision.optim.scaling import scale_each

SHAPES = [(3, 4), (5,), (2, 2, 2)]


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.products = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mul" in func.overloadpacket.__name__:
            self.products.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def gradients_of(whole):
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [piece.view(shape) for piece, shape in zip(whole.split(sizes), SHAPES, strict=True)]


def test_pieces_of_one_tensor_are_scaled_by_one_product_to_the_same_numbers():
    torch.manual_seed(0)
    factors, whole = torch.tensor([0.5, 2.0, 1.0]), torch.randn(25)
    apart, together = [g.clone() for g in gradients_of(whole)], gradients_of(whole)
    right = [g * factor for g, factor in zip(apart, factors, strict=True)]
    with Count() as count:
        scale_each(together, factors)
    assert count.products == ["mul_"]
    scale_each(apart, factors)
    for one, other, expected in zip(apart, together, right, strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)


def test_pieces_may_come_in_any_order_and_those_left_out_stay_as_they_are():
    factors, whole = torch.tensor([0.5, 2.0, 3.0]), torch.ones(25)
    first, second, third = gradients_of(whole)
    with Count() as count:
        scale_each([third, first, second], factors)
        assert len(count.products) == 1
        assert [float(g.mean()) for g in (first, second, third)] == [2.0, 3.0, 0.5]
        scale_each([first, third], factors[:2])
    assert [float(g.mean()) for g in (first, second, third)] == [1.0, 3.0, 1.0]
    scale_each([first, second], factors[:2])
    assert [float(g.mean()) for g in (first, second, third)] == [0.5, 6.0, 1.0]
