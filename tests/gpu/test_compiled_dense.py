"""A compiled step of any other timm model computes what the CPU does."""

from contextlib import nullcontext

import pytest
from small_methods import distance, exact, gradients, on, reference

# What inductor warns of is not ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("compiling")]

BOUNDS = {False: 1e-4}  # fp32 without TF32: see test_eager_agrees.py about bf16


@pytest.mark.parametrize(("kind", "bf16"), [("dino", False)])
def test_losses_and_gradients_are_those_of_the_cpu(cuda, kind, bf16):
    method, views, right = reference(kind, "dense")
    method.to(cuda).compile_blocks()
    with nullcontext() if bf16 else exact():
        loss, all_gradients = distance(right, gradients(method, on(cuda, views), bf16=bf16))
    print(kind, loss, all_gradients)
    assert loss < BOUNDS[bf16]
    assert all_gradients < BOUNDS[bf16]
