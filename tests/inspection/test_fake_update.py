"""Steps on fake tensors need the memory of real ones, and the arithmetic of distributed training is that of its definition."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from sslvision.backbones.build import build_backbone
from sslvision.backbones.swin import Swin
from sslvision.inspection.device_memory import memory_of, shards
from sslvision.inspection.fake_backward import run_backward
from sslvision.inspection.fake_update import (
    CLOCK,
    OptimizerBytes,
    StepBytes,
    fused_attention,
    inputs_of,
    measure_optimizer,
    measure_step,
)
from sslvision.inspection.peak_memory import LiveTensors
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE

VIT = {"name": "vit_tiny_patch16_224", "embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8}
SWIN = {
    "name": "swin_tiny_patch4_window7_224",
    "window_size": 2,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [1, 2],
}
SMALL = {
    MAE: {"decoder_embed_dim": 32, "decoder_depth": 2, "decoder_num_heads": 2},
    DINO: {"prototypes": 256, "hidden": 64, "bottleneck": 16, "local_crops": 2, "local_size": 32},
}


def build(kind, backbone, device, *, recomputed=False, fused=False):
    with torch.device(device), fused_attention(fused):
        method = kind(build_backbone(**backbone, image_size=64), **SMALL[kind]).train()
    for part in method.modules():
        if isinstance(part, Swin):
            part.counts_windows = False
    if recomputed:
        method.enable_activation_checkpointing()
    return method


def peaks_of_real_tensors(method, images):
    """Return the peaks of the forward and the backward pass of a real step."""
    views = [torch.zeros(shape) for shape in shapes_of(method, images)]
    with LiveTensors([*method.parameters(), *method.buffers(), *views]) as live:
        loss = method.losses(views, CLOCK)["loss"]
        forward, live.peak = live.peak, live.bytes
        loss = loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        del views
        loss.backward()
    return forward, live.peak


def shapes_of(method, images):
    channels, grid = 3, getattr(method, "backbone", method.pretrained()).grid
    shapes = [(images, channels, *crop.shape) for crop in method.crops]
    return [*shapes, (images, grid[0] * grid[1])] if isinstance(method, MAE) else shapes


@pytest.mark.parametrize(
    ("kind", "backbone", "recomputed"),
    [
        (MAE, VIT, False),
        (MAE, VIT, True),
        pytest.param(DINO, VIT, True, marks=pytest.mark.thorough),
        pytest.param(MAE, SWIN, True, marks=pytest.mark.thorough),
        pytest.param(DINO, SWIN, False, marks=pytest.mark.thorough),
    ],
)
def test_a_step_on_fake_tensors_needs_the_memory_of_a_real_one(kind, backbone, recomputed):
    forward, backward = peaks_of_real_tensors(build(kind, backbone, "cpu", recomputed=recomputed), 6)
    method = build(kind, backbone, "meta", recomputed=recomputed)
    step = measure_step(method, inputs_of(method), 6, device="cpu", autocast=None)
    views = sum(4 * torch.Size(shape).numel() for shape in shapes_of(method, 6))
    crops = sum(6 * 3 * crop.shape[0] * crop.shape[1] for crop in method.crops)
    assert step.inputs == views + crops
    assert step.forward - step.inputs == pytest.approx(forward, rel=0.02)
    assert step.backward - crops == pytest.approx(backward, rel=0.02)  # views are free by then
    assert all(one.device.type == "meta" and one.grad is None for one in method.parameters())


def test_bytes_are_linear_in_the_batch_and_autocast_halves_most_of_them():
    method = build(MAE, VIT, "meta", fused=True)
    inputs = inputs_of(method)
    low = {n: measure_step(method, inputs, n, device="cuda", autocast=torch.bfloat16) for n in (8, 16, 64)}
    full = measure_step(method, inputs, 64, device="cuda", autocast=None)
    for name in ("inputs", "forward", "activations"):
        a, b, c = (getattr(low[n], name) for n in (8, 16, 64))
        assert c == pytest.approx(b + 6 * (b - a), rel=0.01), name
    assert 0.5 < (low[64].forward - low[64].inputs) / (full.forward - full.inputs) < 0.8


@pytest.mark.thorough
@pytest.mark.parametrize("recomputed", [False, pytest.param(True, marks=pytest.mark.e2e)])
def test_blocks_of_a_vit_need_equally_much(recomputed):
    """benchmarks/plan_table.py relies on it."""
    found = []
    for depth in (2, 4, 7):
        method = build(MAE, {**VIT, "depth": depth}, "meta", recomputed=recomputed, fused=True)
        found.append(measure_step(method, inputs_of(method), 32, device="cuda", autocast=torch.bfloat16))
    for name in ("forward", "backward", "activations"):
        a, b, c = (getattr(one, name) for one in found)
        assert c == pytest.approx(a + 2.5 * (b - a), rel=0.01), name


def test_the_gradients_of_our_backward_pass_are_those_of_torch():
    method = build(DINO, VIT, "cpu")
    views = [torch.rand(shape) for shape in shapes_of(method, 3)]
    losses = [method.losses(views, CLOCK)["loss"] for _ in range(2)]
    losses[0].backward()
    expected = {name: one.grad.clone() for name, one in method.named_parameters() if one.grad is not None}
    method.zero_grad()
    followed = []
    run_backward(losses[1:], followed.append)
    assert len(expected) > 40
    assert len(followed) == len(expected)
    for name, one in method.named_parameters():
        if name in expected:
            assert torch.allclose(one.grad, expected[name], atol=1e-7), name


@pytest.mark.parametrize(("optimizer", "times"), [("adamw", 2), ("sgd", 1), ("muon", 1.5)])
def test_the_state_of_an_optimizer_is_that_which_it_makes(optimizer, times):
    with torch.device("meta"):
        options = {"momentum": 0.9} if optimizer == "sgd" else {}
        method = MAE(build_backbone(**VIT, image_size=64), **SMALL[MAE], optimizer=optimizer, optimizer_options=options)
    found = measure_optimizer(method, device="cuda")
    trained = {name: one.nbytes for name, one in method.named_parameters() if one.requires_grad}
    assert found.state.keys() == trained.keys()
    assert found.unknown == ""
    like = sum(like for like, _ in found.state.values())
    if optimizer == "muon":  # momentum alone for matrices, two averages for others
        assert sum(trained.values()) < like < times * sum(trained.values())
        assert found.temporary > 0
    else:
        assert like == times * sum(trained.values())


def test_shards_are_rows_rounded_up():
    assert shards([torch.empty(10, 3), torch.empty(1, 8)], 4) == 4 * (3 * 3 + 8)
    assert shards([torch.empty(10, 3)], 1) == 120


def memory(strategy, devices, steps, accumulate=1, low=False):
    method = build(DINO, VIT, "meta")
    state = {name: (2 * one.nbytes, 0) for name, one in method.named_parameters() if one.requires_grad}
    of = {"accumulate": accumulate, "steps": steps, "optimizer": OptimizerBytes(state, 0), "low": low}
    return method, memory_of(method, strategy, devices, **of)


def test_ddp_holds_everything_and_sends_nearly_twice_the_gradients():
    steps = StepBytes(1, 10, 1000, 500, 400), StepBytes(3, 30, 3000, 1500, 1200)
    method, of = memory("ddp", 8, steps)
    trained = sum(one.nbytes for one in method.student.parameters() if one.requires_grad)
    everything = sum(one.nbytes for one in [*method.parameters(), *method.buffers()])
    assert of.sent["all-reduce of gradients"] == round(2 * 7 / 8 * trained)
    assert of.peak(5) == everything + (2 + 1 + 1) * trained + 5000  # state, buckets, gradients
    assert sum(of.rows(5).values()) == of.peak(5)
    assert of.largest_batch(of.peak(17)) == 17
    assert of.largest_batch(of.peak(17) - 1) == 16
    assert of.largest_batch(of.peak(1) - 1) == 0


def test_shards_of_fsdp2_are_an_nth_and_its_traffic_three_times_the_weights():
    steps = StepBytes(1, 10, 1000, 500, 400), StepBytes(3, 30, 3000, 1500, 1200)
    method, of = memory("fsdp2", 4, steps)
    _, ddp = memory("ddp", 4, steps)
    whole = ddp.held["state of the optimizer"]
    assert whole / 4 <= of.held["state of the optimizer"] < whole / 3  # a single row is not divided
    blocks = {id(one) for block in method.sharded_modules() for one in block.parameters()}

    def gathered(*, trained, in_blocks):  # whole tensors, those with fewer rows than devices padded
        chosen = [p for p in method.parameters() if p.requires_grad == trained and (id(p) in blocks) == in_blocks]
        return sum(one.nbytes * max(1, 4 // one.shape[0]) for one in chosen)

    root = gathered(trained=True, in_blocks=False) + gathered(trained=False, in_blocks=False)
    weights = 2 * gathered(trained=True, in_blocks=True) + gathered(trained=False, in_blocks=True) + root
    assert of.sent["all-gather of weights"] == pytest.approx(3 / 4 * weights, rel=0.01)  # of the head, norms are frozen
    _, low = memory("fsdp2", 4, steps, low=True)
    assert low.sent["all-gather of weights"] < of.sent["all-gather of weights"]
    _, twice = memory("fsdp2", 4, steps, accumulate=2)
    assert twice.sent["reduce-scatter of gradients"] == pytest.approx(2 * of.sent["reduce-scatter of gradients"], abs=2)


def test_nothing_fake_is_left_behind():
    method = build(MAE, SWIN, "meta")
    measure_step(method, inputs_of(method), 4, device="cpu", autocast=None)
    real = build(MAE, SWIN, "cpu")
    loss = real.losses([torch.zeros(shape) for shape in shapes_of(real, 2)], CLOCK)["loss"]
    assert not isinstance(loss, FakeTensor)
    assert loss.item() > 0
