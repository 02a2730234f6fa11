"""Reading the checkpoints that the authors of MAE and DINO released."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvision.backbones.base import Backbone
from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError


def read_released(checkpoint: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint given by its file (loaded with weights_only=True), or the content itself."""
    if not isinstance(checkpoint, (str, Path)):
        return dict(checkpoint)
    # Their command line is stored beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(torch.load(checkpoint, map_location="cpu", weights_only=True))


def released_dino(checkpoint: str | Path | Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
    """Return the weights of "student" and "teacher", and the centre if there is one, of a DINO checkpoint.

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
    width, channels, patch = state["patch_embed.proj.weight"].shape[:3]
    return build_backbone(
        "vit_base_patch16_224",
        image_size=round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        channels=channels,
        patch_size=patch,
        embed_dim=width,
        depth=1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        num_heads=heads or width // (80 if width == 1280 else 64),
    )
