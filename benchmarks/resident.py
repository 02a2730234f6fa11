"""What is timed: a recipe's method at the size of a benchmark, and a batch that lies on the device."""

import torch

from sslvision.augment.randomness import ImageRandom
from sslvision.cli.compose import compose_settings
from sslvision.data.batch import Batch
from sslvision.methods.dino import DINO
from sslvision.workflows.method import method_from_settings

RECIPES = {
    "mae": "mae_vitb16_in1k",
    "dino": "dino_vits16_in1k",
    "mae swin": "mae_swint_in1k",
    "dino swin": "dino_swint_in1k",
}


def settings_of(arguments, folder, overrides):
    """Return the settings of our recipe for ImageNet, at the size of this benchmark. No drop-path: losses shall be equal."""
    recipe = RECIPES[arguments.method + (" swin" if arguments.arch.startswith("swin") else "")]
    words = [
        f"recipe={recipe}",
        f"backbone.name={arguments.arch}",
        f"batch_size={arguments.batch}",
        f"data.root={folder}",
    ]
    return compose_settings([*words, "backbone.drop_path_rate=0.0", "knn_every_epochs=0", *overrides])


def resident(settings, device):
    """Return our method, bytes as the loader would send them, and views made of them, all on the device."""
    method = method_from_settings(settings).to(device)
    batch = resident_batch(method, settings.batch_size, device)
    views = [view.clone() for view in method.views(batch, ImageRandom(0, batch.epoch, batch.indices))]
    if isinstance(method, DINO):  # a teacher that is not its student, a center that is not zero
        with torch.no_grad():
            for parameter in method.teacher.parameters():
                parameter.mul_(1.01)
            method.center.normal_(std=0.1)
    return method, batch, views


def resident_batch(method, batch_size, device):
    """Return random bytes as the loader would send them."""
    generator = torch.Generator().manual_seed(0)
    crops = [
        torch.randint(
            256,
            (batch_size, method.normalize.mean.numel(), crop.size, crop.size),
            dtype=torch.uint8,
            generator=generator,
        )
        for crop in method.crops
    ]
    indices = torch.arange(batch_size, device=device)
    return Batch([crop.to(device) for crop in crops], indices, torch.zeros_like(indices), [], indices)
