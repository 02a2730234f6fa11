"""Any other timm model, by name: convolutional networks, hybrids, hierarchies and transformers that no other file knows.

Images go through all of the network, so nothing can be hidden from it: these backbones serve DINO and transfer, not MAE.
A model is asked, not looked up: what it gives and which sizes it takes is found by running a copy of it that has shapes
but no numbers (torch's meta device), which costs no arithmetic and leaves the model's weights, statistics and mode alone.
"""

import copy
import inspect
import math
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sslvision.backbones.base import Backbone
from sslvision.errors import UsageError

# B images, L places of the output map, P class and register tokens, D channels of a token, W of a feature

SIZE_OPTIONS = ("img_size", "dynamic_img_size", "strict_img_size")


class Dense(Backbone):
    """A timm model that has `forward_features` and `forward_head`; its own head decides what an image's feature is.

    Args:
        model: built with num_classes=0 and, where they exist, the options of `options_for`.
        image_size: side of the square images in pixels.

    Attributes:
        width: W, of a feature. Tokens may have other channels (MobileNetV3: 960 and 1280), so D is not promised.
        stride: pixels to a side of the output map, rounded where they do not divide (InceptionV3: 299 / 8).

    Raises:
        UsageError: the model has no head, or cannot read images of this size.
    """

    def __init__(self, model: nn.Module, *, image_size: int):
        super().__init__()
        self.model = model
        self.image_size, self.channels = (image_size, image_size), model.in_chans
        # These keep what they computed from their weights until train() is called; a teacher's move without it.
        self._biased = [module for module in model.modules() if hasattr(module, "attention_bias_cache")]
        try:
            tokens, features, places = self._shapes(image_size)
        except Exception as error:  # timm's models refuse in many ways
            raise UsageError(self._refusal(image_size, error)) from error
        if len(features) != 2:
            raise UsageError(
                f"timm's {self.name} gives features of shape {features[1:]}, not one row for an image: leave its "
                "global_pool as it is."
            )
        self.width = features[1]
        self._layout, self.num_prefix, self.grid = self._arrange(tokens, places)
        self.stride = max(1, round(image_size / self.grid[0]))

    @property
    def name(self) -> str:
        """Return the model's name in timm, or its class."""
        return (getattr(self.model, "pretrained_cfg", None) or {}).get("architecture") or type(self.model).__name__

