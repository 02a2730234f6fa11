"""The method that settings describe."""

from collections.abc import Mapping
from typing import Any

import torch

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone
from sslvision.methods.base import Method
from sslvision.settings import Pretrain, locate


def method_from_settings(settings: Pretrain) -> Method:
    """Build the method that the settings describe."""
    return build_method(
        settings.method,
        settings.backbone,
        channels=int(settings.data.get("channels", 3)),
        lr=settings.peak_lr,
        seed=settings.seed,
        activation_checkpointing=settings.activation_checkpointing,
    )


def with_settings(method: Method, settings: Pretrain) -> Method:
    """Return a method that has other settings, with the weights, statistics and crop_pct of another."""
    built = method_from_settings(settings)
    built.load_state_dict(method.state_dict())
    for own, other in zip(built.modules(), method.modules(), strict=True):
        if isinstance(own, Backbone) and isinstance(other, Backbone):
            own.crop_pct = other.crop_pct
    return built


def build_method(
    method: Mapping[str, Any],
    backbone: Mapping[str, Any],
    *,
    channels: int,
    lr: float,
    seed: int,
    activation_checkpointing: bool = False,
) -> Method:
    """Build a method on its backbone, with random weights that are a function of the seed.

    Args:
        method: The method's `_target_` and its settings.
        backbone: Arguments of build_backbone.
        channels: Channels of an image.
        lr: Peak learning rate.
        seed: Seed for the weights, and for everything that the method draws.
        activation_checkpointing: Recompute activations in the backward pass.
    """
    options = {key: value for key, value in method.items() if key != "_target_"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        neutral = [0.5] * channels  # until the statistics of the pixels are known
        built = locate("method", method["_target_"])(
            build_backbone(**backbone, channels=channels), lr=lr, mean=neutral, std=neutral, seed=seed, **options
        )
    assert isinstance(built, Method)
    if activation_checkpointing:
        built.enable_activation_checkpointing()
    return built
