"""Reading checkpoints in the formats of MAE's and DINO's authors."""

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
    """Return the content of a checkpoint, given as a file (loaded with weights_only=True) or as its content.

    Raises:
        UsageError: The file does not exist or does not contain weights.
    """
    if not isinstance(checkpoint, (str, Path)):
        return dict(checkpoint)
    try:
        if Path(checkpoint).suffix == ".safetensors":
            return dict(load_file(checkpoint))
        # These checkpoints contain the parsed command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(checkpoint, map_location="cpu", weights_only=True))
    except Exception as error:  # other and damaged files raise many types of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{checkpoint} cannot be read as weights: {reason} Give a .pth file of tensors in plain containers, or a "
            ".safetensors file."
        ) from error


def released_vit(file: str | Path, *, heads: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the ViT in a released MAE or DINO checkpoint: its weights under timm's names, and timm's arguments for it.

    For MAE this is the encoder, pretrained or fine-tuned; for DINO the teacher, or the backbone if the checkpoint has no other
    weights. Heads and decoder are ignored.

    Args:
        file: A .pth or .safetensors file.
        heads: Number of attention heads, which weights do not tell; by default one per 64 channels (80 for ViT-H).

    Raises:
        UsageError: The file cannot be read, or contains no such ViT.
    """
    content = read_released(file)
    if "pytorch-lightning_version" in content:
        raise UsageError(
            f"{file} is the checkpoint of a run: give the run's folder, whose export/ contains the backbone."
        )
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
    if "fc_norm.weight" in state:  # fine-tuned MAE has its final norm after pooling
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
    """Return the weights of "student" and "teacher" of a DINO checkpoint, and the center if there is one.

    Names are those of DINO here: "backbone.model..." and "head...". A checkpoint of a backbone alone is used for both.

    Raises:
        UsageError: It is not a DINO checkpoint of a ViT.
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
    """Return the entries of a state dict whose names start with `prefix`, without the prefix."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def vit_like(state: Mapping[str, Tensor], *, heads: int | None) -> Backbone:
    """Build a ViT with random weights, of the size that a state dict with timm's names has.

    Args:
        state: Weights with a class token and position embeddings of a square grid.
        heads: Number of attention heads, which weights do not tell; by default one per 64 channels (80 for ViT-H).
    """
    return build_backbone("vit_base_patch16_224", **vit_sizes(state, heads=heads))


def vit_sizes(state: Mapping[str, Tensor], *, heads: int | None) -> dict[str, Any]:
    """Return the arguments of `build_backbone` for a ViT with these weights. See vit_like.

    Raises:
        UsageError: `heads` is not given and cannot be inferred from this width.
    """
    width, channels, patch = state["patch_embed.proj.weight"].shape[:3]
    usual = 80 if width == 1280 else 64
    if heads is None and width % usual:
        raise UsageError(
            f"The width {width} of this ViT is not a multiple of the usual {usual} channels per head, and weights do not tell "
            "the number of its attention heads: set num_heads."
        )
    return {
        "image_size": round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        "channels": channels,
        "patch_size": patch,
        "embed_dim": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "num_heads": heads or width // usual,
    }
