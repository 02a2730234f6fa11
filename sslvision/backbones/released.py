"""Reading the checkpoints that the authors of MAE and DINO released."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError


def read_released(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint given by its file (loaded with weights_only=True), or the content itself.

    Raises:
        UsageError: no such file, or it is none of weights.
    """
    if not isinstance(checkpoint, (str, Path)):
        return dict(checkpoint)
    try:
        if Path(checkpoint).suffix == ".safetensors":
            return dict(load_file(checkpoint))
        # Their command line is stored beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    except Exception as error:  # other and damaged files raise errors of many types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{checkpoint} cannot be read as weights: {reason} Give a .pth file of tensors in plain containers, or a "
            ".safetensors file."
        ) from error


def released_vit(file: str | Path, *, heads: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of a ViT in a released MAE or DINO checkpoint, under timm's names, and timm's arguments for it.

    Of an MAE the encoder, pretrained or fine-tuned, with or without its decoder; of a DINO the teacher, or the plain
    backbone. Heads and decoder are left aside.

    Args:
        file: .pth or .safetensors.
        heads: attention heads, which weights do not tell; by default 64 channels each (80 for ViT-H).

    Raises:
        UsageError: it cannot be read, or holds no such ViT.
    """
    content = read_released(file)
    if "pytorch-lightning_version" in content:
        raise UsageError(f"{file} is the checkpoint of a run: give the run's folder, whose export/ has its backbone.")
    weights = content.get("model", content.get("teacher", content))
    state = {
        name.removeprefix("module.").removeprefix("backbone."): value
        for name, value in (weights.items() if isinstance(weights, Mapping) else ())
        if isinstance(value, Tensor)
    }
    state = {name: value for name, value in state.items() if not name.startswith(("decoder_", "mask_token", "head."))}
    expected = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")
    if missing := [name for name in expected if name not in state]:
        raise UsageError(
            f"{file} is no checkpoint of a ViT as the authors of MAE and DINO released them: it has no {', '.join(missing)}."
        )
    sizes = vit_sizes(state, heads=heads)
    arguments = {"in_chans": sizes.pop("channels"), "img_size": sizes.pop("image_size"), **sizes}
    if "fc_norm.weight" in state:  # MAE fine-tunes a norm after pooling, in place of the one before
        arguments |= {"global_pool": "avg", "fc_norm": True}
    return state, arguments


def released_mae(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights of an MAE with its decoder, under the names of the released checkpoints.

    Raises:
        UsageError: It is no MAE checkpoint, or has no decoder.
    """
    content = read_released(checkpoint)
    state: dict[str, Tensor] = dict(content.get("model", content))
    required = ("patch_embed.proj.weight", "decoder_pred.weight", "mask_token")
    if missing := [name for name in required if name not in state]:
        raise UsageError(
            f"This is no MAE checkpoint of the released format: it has no {', '.join(missing)}. Checkpoints without a "
            "decoder (such as mae_pretrain_vit_base.pth) load in timm itself: timm.create_model(..., checkpoint_path=...)."
        )
    return state


def released_dino(checkpoint: str | Path | Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
    """Return the weights of "student" and "teacher", and the center if there is one, of a DINO checkpoint.

    Names are those of our DINO: "backbone.model..." and "head...". A plain backbone serves as both.

    Raises:
        UsageError: it is no DINO checkpoint on a ViT.
    """
    content = read_released(checkpoint)
    states = {}
    for whose in ("student", "teacher"):
        state = {name.removeprefix("module."): value for name, value in content.get(whose, content).items()}
        states[whose] = {
            name if name.startswith("head.") else f"backbone.model.{name.removeprefix('backbone.')}": value
            for name, value in state.items()
        }
    if "backbone.model.patch_embed.proj.weight" not in states["teacher"]:
        raise UsageError("This is no DINO checkpoint on a ViT: it has no patch_embed.proj.weight.")
    return states, content["dino_loss"]["center"] if "dino_loss" in content else None


def part_of(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the entries of a state dict whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def vit_like(state: Mapping[str, Tensor], *, heads: int | None) -> Backbone:
    """Build a ViT, with weights of its own, of the sizes of `state`'s, which stand under timm's names.

    Args:
        state: has a class token and learned or fixed positions of a square grid.
        heads: attention heads, which weights do not tell; by default 64 channels each (80 for ViT-H).
    """
    return build_backbone("vit_base_patch16_224", **vit_sizes(state, heads=heads))


def vit_sizes(state: Mapping[str, Tensor], *, heads: int | None) -> dict[str, Any]:
    """Return `build_backbone`'s keywords for a ViT of the sizes of `state`'s. See vit_like.

    Raises:
        UsageError: `heads` is not given, and cannot be guessed of this width.
    """
    width, channels, patch = state["patch_embed.proj.weight"].shape[:3]
    usual = 80 if width == 1280 else 64
    if heads is None and width % usual:
        raise UsageError(
            f"A ViT of width {width} does not have the usual {usual} channels to a head, and weights do not tell the number "
            "of its attention heads: say it (num_heads)."
        )
    return {
        "image_size": round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        "channels": channels,
        "patch_size": patch,
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": heads or width // usual,
    }
