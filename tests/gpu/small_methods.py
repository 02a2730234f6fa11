"""Methods so small that they are compiled in half a minute, a step of them, and how far apart two steps are."""

import copy
from contextlib import contextmanager

import torch

from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.build import build_backbone
from sslvision.data.batch import Batch
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE

VIT = {"name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "image_size": 32}
SWIN = {"name": "swin_tiny_patch4_window7_224", "patch_size": 2, "embed_dim": 32, "depths": [2, 2], "num_heads": [1, 2]}
BACKBONES = {
    "vit": VIT,
    "swin": SWIN | {"image_size": 64, "window_size": 4},
    "dense": {"name": "resnet10t", "image_size": 64},
}
# Every method on every kind of backbone it takes.
PAIRS = [("mae", "vit"), ("dino", "vit"), ("mae", "swin"), ("dino", "swin"), ("dino", "dense")]
CLOCK = Clock(step=30, steps=100, steps_per_epoch=10)


def small(kind, backbone, drop_path=0.0):
    """Return a method in training mode, on the CPU: the same weights each time."""
    torch.manual_seed(0)
    built = build_backbone(**BACKBONES[backbone], drop_path_rate=drop_path)  # timm's Swin has 0.1 of its own
    if kind == "mae":
        return MAE(built, decoder_embed_dim=64, decoder_depth=3, decoder_num_heads=2).train()
    local = 16 if backbone == "vit" else 32
    return DINO(built, prototypes=128, hidden=64, bottleneck=32, local_crops=3, local_size=local).train()


def batch_for(method, device="cpu", images=64):
    """Return random crops."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(images, 3, crop.size, crop.size) for crop in method.crops]
    crops = [torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device) for shape in shapes]
    indices = torch.arange(images, device=device)
    return Batch(crops, indices, torch.zeros_like(indices), [], indices)


def views_of(method, batch):
    """Return what a step sees of a batch."""
    with torch.no_grad():
        return [view.clone() for view in method.views(batch, ImageRandom(0, batch.epoch, batch.indices))]


def on(device, views):
    """Return the views on a device."""
    return [view.to(device) for view in views]


@contextmanager
def exact():
    """Compute fp32 in fp32, without TF32."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32


def gradients(method, views, *, bf16=False):
    """Return the loss and all gradients, as float64 on the CPU."""
    with torch.autocast(views[0].device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        loss = method.losses(views, CLOCK)["loss"]
    loss.backward()
    found = {name: p.grad.double().cpu() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad(set_to_none=True)
    return loss.item(), found


def distance(one, other):
    """Return the relative differences of the losses, and of all gradients taken as one vector."""
    (right_loss, right), (found_loss, found) = one, other
    assert right.keys() == found.keys()
    square = sum(float((right[name] - found[name]).square().sum()) for name in right)
    size = sum(float(gradient.square().sum()) for gradient in right.values())
    return abs(found_loss / right_loss - 1), (square / size) ** 0.5


def reference(kind, backbone):
    """Return a method, what it sees, and loss and gradients of it in fp32 on the CPU."""
    method = small(kind, backbone)
    views = views_of(method, batch_for(method))
    with exact():
        return method, views, gradients(copy.deepcopy(method), views)
