"""The contract between a method and a backbone."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sslvision.errors import UsageError
from sslvision.nn.activation_checkpointing import count_batches_once


class Backbone(nn.Module, ABC):
    """A timm model with its head off, seen as an encoder of tokens.

    Attributes:
        model: the timm model; its parameters keep timm's names, so its state dict loads in stock timm.
        embed_dim: D, channels of an output token.
        stride: pixels per side of an output token (ViT-B/16: 16).
        grid: rows and columns of output tokens for images of `image_size`.
        num_prefix: class and register tokens, which come first in the output of `encode`.
        supports_masking: whether `encode` takes `keep`.
        activation_checkpointing: whether `enable_activation_checkpointing` was called.
        arguments: with which timm.create_model builds the model.
    """

    model: Any  # an nn.Module; timm has no types
    image_size: tuple[int, int]
    channels: int
    embed_dim: int
    stride: int
    grid: tuple[int, int]
    num_prefix: int
    supports_masking: bool = False
    activation_checkpointing: bool = False
    arguments: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return tokens (B, num_prefix + L, D) of images (B, C, H, W).

        With `keep` (B, K), indices on the output grid, only those units are embedded and attended, and the result is
        (B, num_prefix + K, D) in the order of `keep`. Hidden pixels are never read.
        """

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """Return one feature per image (B, D) from the tokens of `encode`."""

    def init_weights(self) -> None:
        """Initialize as the MAE paper does (appendix A.1); where `supports_masking`."""
        raise NotImplementedError

    def enable_activation_checkpointing(self) -> None:
        """Keep only the inputs of blocks for the backward pass, and compute the rest again there: the same numbers, slower.

        Raises:
            UsageError: timm cannot do so with this model.
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

    @abstractmethod
    def compile_blocks(self) -> None:
        """Have what repeats compiled when it first runs, see nn/compilation.py. Names of parameters stay as they are."""

    def supports_image_size(self, size: int) -> bool:
        """Return whether square images of this side can be encoded, too, such as DINO's local crops."""
        return size > 0 and size % self.stride == 0

    def forward(self, *images: Tensor) -> Tensor:
        """Return features (B, D) of images (B, C, H, W), normalized as in pretraining; of several sizes one after the other."""
        return torch.cat([self.pool(self.encode(one)) for one in images])
