"""Any other timm model, by name: convolutional networks, hybrids, hierarchies, and transformers no other file knows.

An image goes through the whole network, so no part of it can be hidden: these backbones serve DINO and transfer, not MAE.
What a model gives, and which sizes of images it takes, is asked and not looked up: a copy of it that has shapes but no
numbers is run (torch's meta device). That costs no arithmetic, and leaves weights, running statistics, modes and random
numbers alone.
"""

import copy
import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sslvision.backbones.backbone import Backbone
from sslvision.errors import UsageError
from sslvision.nn.compilation import compiled

# B images, L indices of the output map, P class and register tokens, D channels of a token, F of a feature


class Dense(Backbone):
    """A timm model that has `forward_features` and `forward_head`; its own head makes the features of an image.

    Args:
        model: built by timm with num_classes=0 and `options_for` its name.
        image_size: side of the square images in pixels.

    Attributes:
        embed_dim: F. Tokens have as many channels but where timm's head has more in it than pooling (MobileNetV3's last
            convolution, VGG's hidden layers).
        stride: pixels to a side of the output map; rounded where it is no whole number (InceptionV3: 299 / 8).

    Raises:
        UsageError: the model cannot read images of this size, or has no head that makes one feature of an image.
    """

    def __init__(self, model: Any, *, image_size: int):
        super().__init__()
        self.model = model
        self._compiled: Any = None
        self.image_size, self.channels = (image_size, image_size), model.in_chans
        # LeViT, EfficientFormer and others keep in eval mode what they made of their weights: see _forget.
        self._keeping: list[Any] = [module for module in model.modules() if hasattr(module, "attention_bias_cache")]
        try:
            self._layout, self.num_prefix, self.grid, shape = self._survey(image_size)
        except Exception as error:  # timm refuses sizes by errors of many types
            raise UsageError(self._refusal(error)) from error
        if len(shape) != 2:
            raise UsageError(
                f"backbone.name={self.name} makes features of shape {shape[1:]} of an image, not one row: leave timm's "
                "global_pool alone."
            )
        self.embed_dim = shape[1]
        self.stride = max(1, round(image_size / self.grid[0]))

    @property
    def name(self) -> str:
        """Return the model's name in timm, or its class's if it has none."""
        config = getattr(self.model, "pretrained_cfg", None) or {}
        return config.get("architecture") or type(self.model).__name__

    def forward(self, *images: Tensor) -> Tensor:
        """Return features (B, F): what timm's head makes of timm's features before it would classify them."""
        return torch.cat([self._features(one) for one in images])

    def _features(self, images: Tensor) -> Tensor:
        self._forget()
        images = self._laid_out(images)
        with in_full_on_a_cpu(images):
            features = self._compiled or self.model.forward_features
            return self.model.forward_head(features(images), pre_logits=True)

    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return timm's features before its head as tokens (B, P+L, D), the map row by row.

        CoaT, CrossViT, EfficientViM and PiT hand several maps or none to their heads: theirs are the last map that timm's
        `forward_intermediates` gives, without class tokens.

        Raises:
            UsageError: `keep` is given.
        """
        if keep is not None:
            raise UsageError(
                f"backbone.name={self.name} cannot skip hidden patches, as MAE asks of it: choose a plain vision "
                "transformer such as vit_base_patch16_224, or a Swin such as swin_tiny_patch4_window7_224."
            )
        self._forget()
        images = self._laid_out(images)
        with in_full_on_a_cpu(images):
            if self._layout == "apart":
                return _last_map(self.model, images).flatten(2).transpose(1, 2)  # (B, L, D)
            features = self.model.forward_features(images)
        if self._layout == "NLC":
            return features  # (B, P+L, D)
        if self._layout == "NHWC":
            return features.flatten(1, 2)  # (B, L, D)
        return features.flatten(2).transpose(1, 2)  # (B, L, D)

    def pool(self, tokens: Tensor) -> Tensor:
        """Return features (B, F) of the tokens of a square image: timm's head, whatever is in it.

        `pool(encode(images))` is `forward(images)`, so this is more than a mean where timm's head is.

        Raises:
            UsageError: the head needs what tokens do not hold (see `encode`): CoaT, CrossViT, EfficientViM and PiT.
        """
        if self._layout == "apart":
            raise UsageError(
                f"The head of backbone.name={self.name} pools more than the last map: take features from images."
            )
        if self._layout != "NLC":
            side = math.isqrt(tokens.shape[1])
            tokens = tokens.unflatten(1, (side, side))  # (B, rows, columns, D)
            if self._layout == "NCHW":
                tokens = tokens.permute(0, 3, 1, 2)  # (B, D, rows, columns)
        return self.model.forward_head(tokens, pre_logits=True)

    def supports_image_size(self, size: int) -> bool:
        """Return whether the model reads square images of another side in pixels, as DINO's local crops are."""
        try:
            *_, grid, _ = self._survey(size)
        except Exception:  # timm refuses sizes by errors of many types
            return False
        return min(grid) > 0

    def compile_blocks(self) -> None:
        """See Backbone.compile_blocks: the network as a whole, up to its head, unless it is to spare memory."""
        if not self.activation_checkpointing:  # in one graph batch norms would count what is computed again
            self._compiled = compiled(self.model.forward_features)

    def _survey(self, size: int) -> tuple[str, int, tuple[int, int], tuple[int, ...]]:
        """Return how timm lays out features of images of a side, P, rows and columns, and the shape of head's output."""
        self._forget()
        with torch.no_grad(), torch.device("meta"):
            model, images = _without_numbers(self.model).eval(), torch.empty(2, self.channels, size, size)
            features = model.forward_features(images)
            shape = tuple(model.forward_head(features, pre_logits=True).shape)
            if isinstance(features, Tensor) and features.ndim == 4:
                layout = getattr(model, "output_fmt", "NCHW")
                rows, columns = features.shape[1:3] if layout == "NHWC" else features.shape[2:4]
                return layout, 0, (rows, columns), shape
            rows, columns = _last_map(model, images).shape[2:4]
        prefix = features.shape[1] - rows * columns if isinstance(features, Tensor) else -1
        return ("NLC", prefix, (rows, columns), shape) if prefix >= 0 else ("apart", 0, (rows, columns), shape)

    def _laid_out(self, images: Tensor) -> Tensor:
        """Return images with channels last in memory where a GPU is to convolve: so do all maps made of them then lie.

        Weights stay as they lie, so that checkpoints and what optimizers keep fit any device; cuDNN turns them in every step,
        which is little beside the maps.
        """
        convolves = self._layout == "NCHW" and images.device.type == "cuda"
        return images.contiguous(memory_format=torch.channels_last) if convolves else images

    def _forget(self) -> None:
        """Let nothing made of the weights outlive them: DINO's teacher moves, and never leaves eval mode."""
        for module in self._keeping:
            module.attention_bias_cache = {}

    def _refusal(self, error: Exception) -> str:
        """Say why the model cannot be a backbone, and what can be done."""
        size, said = self.image_size[0], (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, NotImplementedError | AttributeError | TypeError):
            return f"backbone.name={self.name} has no head that makes features: {said} Choose another backbone.name."
        own = (getattr(self.model, "pretrained_cfg", None) or {}).get("input_size", (size,))[-1]
        advice = f"set backbone.image_size={own}, its size in timm, or" if own != size else "set another size, or"
        return (
            f"backbone.name={self.name} cannot read images of {size}x{size} pixels ({said}): {advice} choose another "
            "backbone.name."
        )


def in_full_on_a_cpu(images: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast for images on a CPU.

    Its bf16 convolutions (oneDNN, torch 2.15) leave parts of a weight's gradient as they were in memory where the kernel is
    larger than the map: in the last stages of most networks at small images.
    """
    return torch.autocast("cpu", enabled=False) if images.device.type == "cpu" else nullcontext()


def options_for(name: str, image_size: int) -> dict[str, Any]:
    """Return the options by which timm builds a model for images of a size, and open to other sizes if it can be.

    They are those of `img_size`, `dynamic_img_size` (position embeddings resampled) and `strict_img_size` (windows
    padded) that the model's class knows: none for most convolutional networks.
    """
    with torch.device("meta"):
        kind = type(timm.create_model(name, num_classes=0))
    known = {option for part in kind.__mro__[:-1] for option in inspect.signature(part).parameters}
    options = {"img_size": image_size, "dynamic_img_size": True, "strict_img_size": False}
    return {option: value for option, value in options.items() if option in known}


def _last_map(model: Any, images: Tensor) -> Tensor:
    """Return timm's last map of images (B, D, rows, columns)."""
    return model.forward_intermediates(images, indices=1, intermediates_only=True)[-1]


def _without_numbers(model: nn.Module) -> Any:
    """Return a copy whose parameters and buffers are on the meta device. No number is copied on the way."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, {**parameters, **{id(buffer): buffer.to("meta") for buffer in model.buffers()}})
