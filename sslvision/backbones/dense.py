"""All other timm models: convolutional networks, hybrids, hierarchies, and transformers without a file of their own.

The whole image goes through the network, so no part can be hidden: these backbones work with DINO and transfer, not MAE.
Output shapes and supported image sizes are found by running a copy of the model on torch's meta device, which has shapes but
no data. That costs no arithmetic and changes no weights, running statistics, modes or random states.
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
from sslvision.nn.image_size import shortest, written

# B images, L indices of the output map, P class and register tokens, D channels of a token, F of a feature


class Dense(Backbone):
    """A timm model with `forward_features` and `forward_head`, whose own head pools the features.

    Args:
        model: Model built by timm with num_classes=0 and `options_for` its name.
        image_size: Height and width of the images in pixels.

    Attributes:
        embed_dim: F. Tokens have the same number of channels, except if timm's head does more than pooling (MobileNetV3's
            last convolution, VGG's hidden layers).
        stride: Height of the image divided by that of the output map, rounded (InceptionV3: 299 / 8).

    Raises:
        UsageError: The model does not support this image size, or its head does not return one feature per image.
    """

    def __init__(self, model: Any, *, image_size: tuple[int, int]):
        super().__init__()
        self.model = model
        self._compiled: Any = None
        self.image_size, self.channels = image_size, model.in_chans
        # LeViT, EfficientFormer and others cache tensors computed from their weights in eval mode: see _clear_caches.
        self._caching: list[Any] = [module for module in model.modules() if hasattr(module, "attention_bias_cache")]
        try:
            self._layout, self.num_prefix, self.grid, shape = self._survey(image_size)
        except Exception as error:  # timm raises many types of errors for sizes
            raise UsageError(self._explain(error)) from error
        if len(shape) != 2:
            raise UsageError(
                f"backbone.name={self.name} makes features of shape {shape[1:]} of an image, not one row: do not set timm's "
                "global_pool."
            )
        self.embed_dim = shape[1]
        self.stride = max(1, round(image_size[0] / self.grid[0]))

    @property
    def name(self) -> str:
        """Return the model's name in timm, or the name of its class if it has none."""
        config = getattr(self.model, "pretrained_cfg", None) or {}
        return config.get("architecture") or type(self.model).__name__

    def forward(self, *images: Tensor) -> Tensor:
        """Return features (B, F): the output of timm's head before the classifier."""
        return torch.cat([self._features(one) for one in images])

    def _features(self, images: Tensor) -> Tensor:
        self._clear_caches()
        images = self._channels_last(images)
        with without_cpu_autocast(images):
            features = self._compiled or self.model.forward_features
            return self.model.forward_head(features(images), pre_logits=True)

    def encode(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Return timm's features before its head as tokens (B, P+L, D), the map in row-major order.

        CoaT, CrossViT, EfficientViM and PiT pass several maps or none to their heads: for these it is the last map of timm's
        `forward_intermediates`, without class tokens.

        Raises:
            UsageError: `keep` was given.
        """
        if keep is not None:
            raise UsageError(
                f"backbone.name={self.name} cannot skip hidden patches, which MAE needs: choose a plain vision "
                "transformer such as vit_base_patch16_224, or a Swin such as swin_tiny_patch4_window7_224."
            )
        self._clear_caches()
        images = self._channels_last(images)
        with without_cpu_autocast(images):
            if self._layout == "apart":
                return _last_map(self.model, images).flatten(2).transpose(1, 2)  # (B, L, D)
            features = self.model.forward_features(images)
        if self._layout == "NLC":
            return features  # (B, P+L, D)
        if self._layout == "NHWC":
            return features.flatten(1, 2)  # (B, L, D)
        return features.flatten(2).transpose(1, 2)  # (B, L, D)

    def pool(self, tokens: Tensor) -> Tensor:
        """Return features (B, F) of tokens by timm's head, of images of `image_size` or square ones.

        `pool(encode(images))` is `forward(images)`.

        Raises:
            UsageError: The head needs more than the tokens (see `encode`): CoaT, CrossViT, EfficientViM and PiT.
        """
        if self._layout == "apart":
            raise UsageError(
                f"The head of backbone.name={self.name} pools more than the last map: take features from images."
            )
        if self._layout != "NLC":
            side = math.isqrt(tokens.shape[1])
            grid = self.grid if tokens.shape[1] == math.prod(self.grid) else (side, side)
            tokens = tokens.unflatten(1, grid)  # (B, rows, columns, D)
            if self._layout == "NCHW":
                tokens = tokens.permute(0, 3, 1, 2)  # (B, D, rows, columns)
        return self.model.forward_head(tokens, pre_logits=True)

    @property
    def pools_tokens(self) -> bool:
        """Return whether `pool` makes the features of the tokens of `encode`."""
        return self._layout != "apart"

    def supports_image_size(self, size: tuple[int, int]) -> bool:
        """Return whether the model supports images of this height and width in pixels, such as DINO's local crops."""
        try:
            *_, grid, _ = self._survey(size)
        except Exception:  # timm raises many types of errors for sizes
            return False
        return min(grid) > 0

    def compile_blocks(self) -> None:
        """Compile the whole network up to its head, unless activations are checkpointed. See Backbone.compile_blocks."""
        if not self.activation_checkpointing:  # in one graph batch norms would count recomputed batches twice
            self._compiled = compiled(self.model.forward_features)

    def _survey(self, size: tuple[int, int]) -> tuple[str, int, tuple[int, int], tuple[int, ...]]:
        """Return the layout of timm's features for images of a size, P, rows and columns, and the shape of the features."""
        self._clear_caches()
        with torch.no_grad(), torch.device("meta"):
            model, images = _on_meta(self.model).eval(), torch.empty(2, self.channels, *size)
            features = model.forward_features(images)
            shape = tuple(model.forward_head(features, pre_logits=True).shape)
            if isinstance(features, Tensor) and features.ndim == 4:
                layout = getattr(model, "output_fmt", "NCHW")
                rows, columns = features.shape[1:3] if layout == "NHWC" else features.shape[2:4]
                return layout, 0, (rows, columns), shape
            rows, columns = _last_map(model, images).shape[2:4]
        prefix = features.shape[1] - rows * columns if isinstance(features, Tensor) else -1
        return ("NLC", prefix, (rows, columns), shape) if prefix >= 0 else ("apart", 0, (rows, columns), shape)

    def _channels_last(self, images: Tensor) -> Tensor:
        """Return images in channels-last memory format for convolutions on a GPU; all feature maps inherit it.

        Weights keep their format, so that checkpoints and optimizer states fit any device. cuDNN converts them in every step,
        which costs little compared with the maps.
        """
        convolves = self._layout == "NCHW" and images.device.type == "cuda"
        return images.contiguous(memory_format=torch.channels_last) if convolves else images

    def _clear_caches(self) -> None:
        """Clear caches computed from the weights: the weights of DINO's teacher change while it is in eval mode."""
        for module in self._caching:
            module.attention_bias_cache = {}

    def _explain(self, error: Exception) -> str:
        """Return why the model cannot be a backbone, and what to do."""
        size, said = self.image_size, (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, NotImplementedError | AttributeError | TypeError):
            return f"backbone.name={self.name} has no head that makes features: {said} Choose another backbone.name."
        own = tuple((getattr(self.model, "pretrained_cfg", None) or {}).get("input_size", size)[-2:])
        advice = (
            "set another size, or" if own == size else f"set backbone.image_size={written(own)}, its size in timm, or"
        )
        return (
            f"backbone.name={self.name} cannot read images of {size[0]}x{size[1]} pixels ({said}): {advice} choose another "
            "backbone.name."
        )


def without_cpu_autocast(images: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast for images on a CPU.

    bf16 convolutions of oneDNN (torch 2.15) leave parts of a weight's gradient uninitialized if the kernel is larger than the
    map, as in the last stages of most networks with small images.
    """
    return torch.autocast("cpu", enabled=False) if images.device.type == "cpu" else nullcontext()


def options_for(name: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return timm's options to build a model for an image size, and flexible in image size if it can be.

    Those of `img_size`, `dynamic_img_size` (resamples position embeddings) and `strict_img_size` (pads windows) that the class
    of the model accepts: none for most convolutional networks.
    """
    with torch.device("meta"):
        kind = type(timm.create_model(name, num_classes=0))
    known = {option for part in kind.__mro__[:-1] for option in inspect.signature(part).parameters}
    options = {"img_size": shortest(image_size), "dynamic_img_size": True, "strict_img_size": False}
    return {option: value for option, value in options.items() if option in known}


def _last_map(model: Any, images: Tensor) -> Tensor:
    """Return timm's last feature map of images (B, D, rows, columns)."""
    return model.forward_intermediates(images, indices=1, intermediates_only=True)[-1]


def _on_meta(model: nn.Module) -> Any:
    """Return a copy with parameters and buffers on the meta device, without copying data."""
    parameters = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, {**parameters, **{id(buffer): buffer.to("meta") for buffer in model.buffers()}})
