"""The contract between a method and a backbone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sslvision.errors import UsageError
from sslvision.nn.activation_checkpointing import count_batches_once
from sslvision.nn.image_size import height_and_width, indivisible, written


class Backbone(nn.Module, ABC):
    """A timm model without its head, as an encoder of tokens.

    Attributes:
        model: The timm model; its parameters keep timm's names, so its state dict loads in timm.
        image_size: Height and width of the images in pixels.
        channels: Number of image channels.
        embed_dim: D, channels of an output token.
        stride: Side of an output token in pixels (ViT-B/16: 16).
        grid: Rows and columns of output tokens for images of `image_size`.
        num_prefix: Number of class and register tokens, which come first in the output of `encode`.
        supports_masking: Whether `encode` accepts `keep`.
        crop_pct: Central share of an image that is evaluated, see `augment.crops.center_crop`; None: not decided.
        activation_checkpointing: Whether `enable_activation_checkpointing` was called.
        arguments: Arguments with which timm.create_model builds the model.
    """

    model: Any  # an nn.Module; timm has no types
    image_size: tuple[int, int]
    channels: int
    embed_dim: int
    stride: int
    grid: tuple[int, int]
    num_prefix: int
    supports_masking: bool = False
    crop_pct: float | None = None
    activation_checkpointing: bool = False
    arguments: Mapping[str, Any] = MappingProxyType({})
    block_functions: tuple[str, ...] = ()  # attributes: functions of a block that do not call its forward

    @abstractmethod
    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return tokens (B, num_prefix + L, D) of images (B, C, H, W).

        With `keep` (B, K), indices on the output grid, only these tokens are computed, and the result is
        (B, num_prefix + K, D) in the order of `keep`. Hidden pixels are never read.
        """

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Return one feature per image (B, D) from the tokens of `encode`."""

    def init_weights(self) -> None:
        """Initialize as in the MAE paper (appendix A.1). Only if `supports_masking`."""
        raise NotImplementedError

    def enable_activation_checkpointing(self) -> None:
        """Keep only the inputs of blocks and recompute other activations in the backward pass: the same numbers, slower.

        Raises:
            UsageError: timm does not support it for this model.
        """
        try:
            self.model.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError) as error:
            raise UsageError(
                f"activation_checkpointing=true: timm cannot compute the activations of a {type(self.model).__name__} a second "
                "time. Leave it out, and use fewer images at a time: trainer.accumulate_grad_batches=2 halves them, and "
                "batch_size stays."
            ) from error
        count_batches_once(self.model)
        self.activation_checkpointing = True

    def blocks(self) -> list[nn.Module]:
        """Return the repeated blocks, whose weights are gathered one block at a time where they are in shards."""
        return []

    @abstractmethod
    def compile_blocks(self) -> None:
        """Compile repeated blocks on their first call, see nn/compilation.py. Parameter names do not change."""

    def supports_image_size(self, size: tuple[int, int]) -> bool:
        """Return whether images of this height and width can be encoded, such as DINO's local crops."""
        return not indivisible(size, self.stride)

    def check_image_size(self, size: int | Sequence[int], key: str) -> tuple[int, int]:
        """Return height and width of a size that a user gives under `key`. Raises UsageError if it cannot be encoded."""
        shape = height_and_width(size, key)
        if not self.supports_image_size(shape):
            raise UsageError(
                f"{key}={size} is not a size that this backbone reads: give {key}={written(self.image_size)}, or for ViT and "
                f"Swin any multiple of {self.stride}{indivisible(shape, self.stride)}."
            )
        return shape

    def forward(self, *images: Tensor) -> Tensor:
        """Return features (B, D) of normalized images (B, C, H, W), given as one tensor for each size."""
        return torch.cat([self.pool(self.encode(one)) for one in images])
