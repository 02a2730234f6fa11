"""A compiled step computes what the CPU does. Half a minute each, most of it compiling."""

from contextlib import nullcontext

import pytest
from small_methods import distance, exact, gradients, on, reference

# What inductor warns of is not ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("compiling")]

FP32, BF16 = 1e-5, 2e-2  # without TF32; on an H100 4e-7 and 5e-3


@pytest.mark.parametrize(
    ("kind", "backbone", "bound"),
    [
        ("mae", "vit", BF16),
        ("dino", "vit", FP32),
        ("mae", "swin", FP32),
        ("dino", "swin", BF16),
        ("dino", "dense", 10 * FP32),  # see test_eager_agrees.py
    ],
)
def test_losses_and_gradients_are_those_of_the_cpu(cuda, kind, backbone, bound):
    method, views, right = reference(kind, backbone)
    method.to(cuda).compile_blocks()
    with nullcontext() if bound == BF16 else exact():
        loss, all_gradients = distance(right, gradients(method, on(cuda, views), bf16=bound == BF16))
    print(kind, backbone, loss, all_gradients)
    assert loss < bound
    assert all_gradients < bound
