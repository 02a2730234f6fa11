"""Small methods of both kinds on both kinds of backbone, one batch for them, and how far two steps differ."""

import torch

from benchmarks.on_gpu.findings import DRY
from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.build import build_backbone
from sslvision.data.batch import Batch
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE

CLOCK = Clock(step=30, steps=100, steps_per_epoch=10)
PAIRS = [(method, backbone) for backbone in ("vit", "swin") for method in ("mae", "dino")]
DEPTHS = {"depth": 1 if DRY else 3, "depths": [1, 1] if DRY else [2, 2]}
BACKBONES = {
    "vit": {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "patch_size": 8,
        "embed_dim": 64,
        "depth": DEPTHS["depth"],
        "num_heads": 2,
    },
    "swin": {
        "name": "swin_tiny_patch4_window7_224",
        "image_size": 32 if DRY else 64,
        "patch_size": 2,
        "window_size": 4,
        "embed_dim": 32,
        "depths": DEPTHS["depths"],
        "num_heads": [1, 2],
    },
}


def small_method(method, backbone, drop_path=0.0):
    """Return a small method in training mode on the CPU, the same weights every time."""
    torch.manual_seed(0)
    built = build_backbone(**BACKBONES[backbone], drop_path_rate=drop_path)
    if method == "mae":
        return MAE(built, decoder_embed_dim=64, decoder_depth=2 if DRY else 3, decoder_num_heads=2).train()
    local_size = BACKBONES["swin"]["image_size"] // 2 if backbone == "swin" else 16
    return DINO(built, prototypes=128, hidden=64, bottleneck=32, local_crops=3, local_size=local_size).train()


def random_batch(method, place="cpu", size=4 if DRY else 64):
    """Return random bytes as the loader would send them, the same every time."""
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randint(256, (size, 3, crop.size, crop.size), dtype=torch.uint8, generator=generator).to(place)
        for crop in method.crops
    ]
    indices = torch.arange(size, device=place)
    return Batch(crops, indices, torch.zeros_like(indices), [], indices)


def views_of(method, batch):
    return method.views(batch, ImageRandom(0, batch.epoch, batch.indices))


def gradients(method, views, *, bf16=False):
    """Return the loss, and every parameter's gradient in double precision on the CPU."""
    with torch.autocast(views[0].device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
        loss = method.losses(views, CLOCK)["loss"]
    loss.backward()
    found = {name: p.grad.detach().double().cpu() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad(set_to_none=True)
    return loss.item(), found


def distance(reference, other):
    """Return the relative differences of two results of `gradients`: of the losses, and of all gradients as one vector."""
    (loss, right), (other_loss, found) = reference, other
    square = sum(float((right[name] - found[name]).square().sum()) for name in right)
    size = sum(float(value.square().sum()) for value in right.values())
    return {
        "loss": abs(other_loss / loss - 1),
        "gradients": (square / size) ** 0.5,
        "same_names": right.keys() == found.keys(),
    }
