"""The networks to inspect by their timm names, with random weights."""

from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError


def named_networks(
    name: list[str],
    *,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    pool: Literal["token", "avg"] = "token",
    **timm_options: Any,
) -> list[Backbone]:
    """Return timm models on torch's meta device, which have shapes but no weights: all of them can be built.

    Args:
        name: Names of timm models, such as resnet50,vgg16.
        image_size: Side of the square images in pixels, or [height, width]; by default each model's own in timm.
        channels: Number of image channels (default: 3, or that of the weights of a run).
        pool: Feature of a plain ViT: the class token, or the mean of the patch tokens.
        timm_options: Further arguments of every timm model.

    Raises:
        UsageError: A name is unknown to timm, or a model does not support the image size or an option.
    """
    with torch.device("meta"):
        return [
            random_network(one, 0, image_size=image_size, channels=channels, pool=pool, **timm_options) for one in name
        ]


def random_network(
    name: str, seed: int, /, *, image_size: Any = None, channels: Any = None, **options: Any
) -> Backbone:
    """Return a timm model with random weights that are a function of the seed; the global random state does not change.

    Args:
        name: Name of the timm model.
        seed: Seed of the weights.
        image_size: Side of the images, or [height, width]; None for the model's own in timm.
        channels: Number of image channels; None for 3.
        options: Further arguments of `build_backbone`.

    Raises:
        UsageError: As `named_networks`.
    """
    if image_size is None:
        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        image_size = list(known.input_size[-2:]) if known and known.input_size else 224
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            return build_backbone(name, image_size=image_size, channels=channels or 3, **options).eval()
        except UsageError as error:  # which of several it is
            raise UsageError(str(error) if name in str(error) else f"backbone.name={name}: {error}") from error
