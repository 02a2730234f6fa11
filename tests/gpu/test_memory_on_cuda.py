"""activation_checkpointing=true computes on CUDA what a step computes without it, drop-path included."""

import copy

import pytest
import torch
from small_methods import PAIRS, batch_for, distance, gradients, small, views_of

# What inductor warns of is not ours.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("compiling")]


@pytest.mark.parametrize(("kind", "backbone", "compiled"), [*((*pair, False) for pair in PAIRS), ("mae", "vit", True)])
def test_losses_and_gradients_are_those_of_a_step_that_keeps_all(cuda, kind, backbone, compiled):
    method = small(kind, backbone, drop_path=0.3 if backbone != "dense" else 0.0).to(cuda)
    views, found = views_of(method, batch_for(method, cuda)), []
    for low in (False, True):
        one = copy.deepcopy(method)
        if low:
            one.enable_activation_checkpointing()
        if compiled:
            one.compile_blocks()
        torch.manual_seed(5)
        found.append(gradients(one, views, bf16=True))
    loss, all_gradients = distance(*found)
    print(kind, backbone, compiled, loss, all_gradients)
    assert loss < 1e-6
    assert all_gradients < 1e-3
