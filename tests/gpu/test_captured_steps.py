"""Steps as CUDA graphs: what they compute is what the same step computes kernel by kernel."""

import copy

import pytest
import torch

from sslvision.backbones.build import build_backbone
from sslvision.data.batch import Batch
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.nn.cuda_graphs import CapturedStep

pytestmark = pytest.mark.gpu

VIT = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "image_size": 32}
WARM_UP = {"warmup_teacher_temp": 0.04, "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 10}


def method_of(kind, drop=0.0):
    torch.manual_seed(0)
    backbone = build_backbone(**VIT, drop_path_rate=drop)
    if kind == "mae":
        return MAE(backbone, decoder_embed_dim=64, decoder_depth=3, decoder_num_heads=2).cuda().train()
    return (
        DINO(backbone, prototypes=64, hidden=32, bottleneck=16, local_crops=2, local_size=16, **WARM_UP).cuda().train()
    )


def inputs_of(method, number):
    """Return a batch's tensors, as `Method.training_step` hands them over."""
    generator = torch.Generator().manual_seed(number)
    size = (16, 3)
    crops = [torch.randint(256, (*size, c.size, c.size), dtype=torch.uint8, generator=generator) for c in method.crops]
    indices = torch.arange(16) + 16 * number
    return [tensor.cuda() for tensor in (*crops, indices, torch.zeros_like(indices), indices)]


def as_it_stands(method):
    def step(*inputs):
        *crops, indices, epoch, shown = inputs
        return method._step(Batch(crops, indices, epoch, [], shown), None)

    return step


def autocast():
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False)


def train(method, step, steps=4, accumulate=1):
    """Return the losses of some updates by AdamW."""
    optimizer, losses = method.configure_optimizers(), []
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for update in range(steps):
        clock = Clock(update, steps, 1)
        for micro in range(accumulate):
            torch.cuda.manual_seed(100 * update + micro)
            method.set_clock(clock)
            if micro and isinstance(step, CapturedStep):
                step.keep_gradients()  # as Method.training_step does
            with autocast():
                loss = step(*inputs_of(method, accumulate * update + micro))["loss"]
            losses.append(loss.item())
            (loss / accumulate).backward()
        method.prepare_update(optimizer, clock)
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(clock)
    return losses


def weights(method):
    return torch.cat([value.float().flatten() for value in method.state_dict().values()])


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["mae", "dino"])
def test_training_by_graphs_ends_with_the_same_weights(cuda, kind, accumulate):
    plain = method_of(kind, drop=0.3)
    method = copy.deepcopy(plain)
    with autocast():
        captured = CapturedStep(as_it_stands(method), method, inputs_of(method, 0))
    assert all(torch.equal(a, b) for a, b in zip(method.buffers(), plain.buffers(), strict=True)), (
        "as before the capture"
    )
    right = train(plain, as_it_stands(plain), accumulate=accumulate)
    found = train(method, captured, accumulate=accumulate)
    assert found == pytest.approx(right, rel=1e-3)
    start = weights(method_of(kind, drop=0.3))
    apart, moved = (weights(method) - weights(plain)).norm(), (weights(plain) - start).norm()
    assert moved > 0
    assert apart < 0.1 * moved, (
        "but for sums whose order CUDA does not fix; AdamW makes much of gradients that are all rounding"
    )


def test_drop_path_follows_the_seed_in_a_graph(cuda):
    method = method_of("mae", drop=0.5)
    inputs = inputs_of(method, 0)
    with autocast():
        captured = CapturedStep(as_it_stands(method), method, inputs)
    losses = []
    for seed in (1, 2, 1):
        torch.cuda.manual_seed(seed)
        losses.append(captured(*inputs)["loss"].item())
    assert losses[0] == losses[2] != losses[1]


def test_other_shapes_do_not_fit(cuda):
    method = method_of("mae")
    inputs = inputs_of(method, 0)
    with autocast():
        captured = CapturedStep(as_it_stands(method), method, inputs)
    assert captured.fits(inputs)
    assert not captured.fits([one[:8] for one in inputs])
    assert not captured.fits(inputs[1:])
