"""From a timm name to a Backbone."""

import difflib
from typing import Any, Literal

import timm
from timm.models.vision_transformer import VisionTransformer

from sslvision.backbones.base import Backbone
from sslvision.backbones.vit import ViT
from sslvision.errors import UsageError

VIT_MODULES = ("timm.models.vision_transformer", "timm.models.deit")


def build_backbone(
    name: str,
    *,
    image_size: int,
    channels: int = 3,
    pool: Literal["token", "avg"] = "token",
    **timm_options: Any,
) -> Backbone:
    """Build a timm model without a head and wrap it.

    Args:
        name: a timm model name, such as "vit_base_patch16_224".
        image_size: side of the square images in pixels.
        channels: image channels.
        pool: what stands for the image: the class token, or the mean of the patch tokens (both after the final norm).
        timm_options: any further keyword of the timm model: patch_size, embed_dim, depth, num_heads, drop_path_rate, ...

    Raises:
        UsageError: the name or an option is unknown to timm, or the model cannot skip hidden patches.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UsageError(
            f"backbone.name={name} is not a timm model." + (f" Near it: {', '.join(near)}." if near else "")
        )
    if pool not in ("token", "avg"):
        raise UsageError(f"backbone.pool={pool} is unknown: it is token (class token) or avg (mean of patch tokens).")
    if timm.model_entrypoint(name).__module__ not in VIT_MODULES:
        raise UsageError(
            f"backbone.name={name} is not a plain vision transformer, and backbones so far are: choose a timm ViT such as "
            "vit_small_patch16_224, vit_base_patch16_224, deit3_small_patch16_224, vit_small_patch14_reg4_dinov2."
        )
    options = {"img_size": image_size, "in_chans": channels, "num_classes": 0, "global_pool": pool, "fc_norm": False}
    try:
        model = timm.create_model(name, **options, **timm_options)
    except (TypeError, AssertionError) as error:  # what timm says of an unknown keyword or an impossible value
        raise UsageError(f"timm cannot build backbone.name={name} with {timm_options or options}: {error}") from error
    if type(model) is not VisionTransformer:
        raise UsageError(f"backbone.name={name} is a {type(model).__name__}; choose a plain VisionTransformer of timm.")
    return ViT(model)
