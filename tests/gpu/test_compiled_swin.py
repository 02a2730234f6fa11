"""A compiled step of a Swin computes what the CPU does."""

from contextlib import nullcontext

import pytest
from small_methods import distance, exact, gradients, on, reference

# What inductor warns of is not ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("compiling")]

BOUNDS = {True: 2e-2, False: 1e-5}  # bf16, and fp32 without TF32


@pytest.mark.parametrize(("kind", "bf16"), [("mae", False), ("dino", True)])
def test_losses_and_gradients_are_those_of_the_cpu(cuda, kind, bf16):
    method, views, right = reference(kind, "swin")
    method.to(cuda).compile_blocks()
    with nullcontext() if bf16 else exact():
        loss, all_gradients = distance(right, gradients(method, on(cuda, views), bf16=bf16))
    print(kind, loss, all_gradients)
    assert loss < BOUNDS[bf16]
    assert all_gradients < BOUNDS[bf16]
