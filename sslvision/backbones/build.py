"""Backbones by their timm name."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import timm
from timm.layers import PatchEmbed
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.dense import Dense, options_for
from sslvision.backbones.swin import Swin
from sslvision.backbones.timm_options import check_options_of_timm
from sslvision.backbones.vit import ViT
from sslvision.errors import UsageError
from sslvision.nn.image_size import height_and_width, shortest

COUNTS = ("depth", "embed_dim", "num_heads", "patch_size", "window_size")  # of units: at least one
RATES = ("drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate")


def build_backbone(
    name: str,
    *,
    image_size: int | Sequence[int],
    channels: int = 3,
    pool: Literal["token", "avg"] = "token",
    **timm_options: Any,
) -> Backbone:
    """Build a timm model without a head and wrap it.

    Args:
        name: A timm model name, such as "vit_base_patch16_224".
        image_size: Side of the square images in pixels, or [height, width].
        channels: Number of image channels.
        pool: Feature of a plain ViT: the class token, or the mean of the patch tokens (both after the final norm). Other
            models have their own pooling.
        timm_options: Further arguments of the timm model: patch_size, embed_dim, depth, num_heads, drop_path_rate, ...

    Raises:
        UsageError: The name or an option is unknown to timm, an option is one of timm's factory (pretrained, ...), or the
            model does not support this image size.
    """
    check_options_of_timm(timm_options)
    check_dimensions(timm_options)
    if channels < 1:
        raise UsageError(f"data.channels={channels} must be a whole number from 1.")
    size = height_and_width(image_size, "backbone.image_size")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise UsageError(
            f"backbone.name={name} is not a timm model." + (f" Near it: {', '.join(near)}." if near else "")
        )
    if pool not in ("token", "avg"):
        raise UsageError(f"backbone.pool={pool} is unknown: it is token (class token) or avg (mean of patch tokens).")
    module = timm.model_entrypoint(name).__module__.removeprefix("timm.models.")
    options: dict[str, Any] = {"num_classes": 0, "in_chans": channels}
    if module == "vision_transformer" or (module == "deit" and "distilled" not in name):
        options |= {"img_size": shortest(size), "global_pool": pool, "fc_norm": False}
    elif module == "swin_transformer":
        options |= {"img_size": shortest(size)}
    else:
        options |= options_for(name, size)
    try:
        model = timm.create_model(name, **options, **timm_options)
    except Exception as error:  # timm raises many types of errors for unknown arguments and invalid values
        hint = " (backbone.embed_dim must be a multiple of backbone.num_heads)" if "num_heads" in str(error) else ""
        raise UsageError(
            f"timm cannot build backbone.name={name} with {timm_options or options}: {error}{hint}"
        ) from error
    backbone = wrap(model, size)
    backbone.arguments = {key: value for key, value in {**options, **timm_options}.items() if key != "num_classes"}
    return backbone


def check_dimensions(options: Mapping[str, Any]) -> None:
    """Check options of a timm model that timm would accept, or reject without naming them.

    Raises:
        UsageError: A count below 1, a rate outside 0..1, or heads that cannot share the channels evenly.
    """
    for key in COUNTS:
        given = options.get(key)
        numbers = given if isinstance(given, list | tuple) else [] if given is None else [given]
        if not all(type(one) is int and one >= 1 for one in numbers):
            raise UsageError(f"backbone.{key}={given} must be a whole number from 1, or a list of such numbers.")
    for key in RATES:
        rate = options.get(key) or 0
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise UsageError(f"backbone.{key}={rate} must be a number from 0 to below 1.")
    dim, heads = options.get("embed_dim"), options.get("num_heads")
    if type(dim) is int and type(heads) is int and dim % heads:
        raise UsageError(
            f"backbone.embed_dim={dim} cannot be divided among backbone.num_heads={heads}: {dim - dim % heads or heads} and "
            f"{dim - dim % heads + heads} can, for example."
        )


def wrap(model: Any, image_size: tuple[int, int]) -> Backbone:
    """Return the backbone for a timm model: ViT and Swin support masking, all others are Dense."""
    if type(model) is VisionTransformer and type(model.patch_embed) is PatchEmbed:
        return ViT(model)
    if type(model) is SwinTransformer:
        return Swin(model)
    return Dense(model, image_size=image_size)
