"""The network as other programs get it: from pixels to named outputs, in one graph."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sslvision.augment.crops import CROP_PCT
from sslvision.backbones.classifier import classify, reads_features
from sslvision.backbones.dense import Dense
from sslvision.backbones.load import Loaded
from sslvision.backbones.vit import ViT
from sslvision.errors import UsageError
from sslvision.nn.normalize import Normalize

# B images, C channels, D channels of a feature, L output tokens, P class and register tokens, K classes


@dataclass(frozen=True)
class Interface:
    """What goes into an exported graph, and what comes out.

    Attributes:
        outputs: Names of the outputs, in their order.
        normalize: "inside" the graph, or "beside" it, by the caller.
        pixels: "uint8" of 0..255, or "float" of 0..1; normalized values are always float.
    """

    outputs: tuple[str, ...]
    normalize: str = "inside"
    pixels: str = "uint8"

    @property
    def reads_bytes(self) -> bool:
        """Return whether the input is uint8."""
        return self.normalize == "inside" and self.pixels == "uint8"

    def values(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
        """Return the input of the graph for uint8 images (B, C, H, W)."""
        if self.reads_bytes:
            return images
        if self.normalize == "inside":
            return images.float() / 255
        return (images.float() / 255 - column(mean)) / column(std)


def column(values: Sequence[float]) -> Tensor:
    """Return a value per channel (C, 1, 1)."""
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


class ExportedNetwork(nn.Module):
    """A backbone with its preprocessing and classifier.

    Args:
        loaded: Backbone with its pixel statistics, and class names if it has a head.
        interface: Input and outputs.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, loaded: Loaded, interface: Interface):
        super().__init__()
        assert loaded.mean is not None
        assert loaded.std is not None
        self.backbone, self.interface = loaded.backbone, interface
        full = 255 if interface.reads_bytes else 1
        self.register_buffer("shift", full * column(loaded.mean))
        self.register_buffer("scale", full * column(loaded.std))
        self._pools_tokens = not isinstance(self.backbone, Dense) or self.backbone.pools_tokens
        self._linear_head = bool(loaded.classes) and reads_features(self.backbone)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the outputs by name.

        "features" (B, D), "logits" (B, K), "tokens" (B, P + L, D), class and register tokens first, and "attention"
        (B, heads, rows, columns), of the class token in the last block.
        """
        backbone, wanted = self.backbone, self.interface.outputs
        if self.interface.normalize == "inside":
            images = (images.float() - self.shift) / self.scale
        found: dict[str, Tensor] = {}
        if "attention" in wanted and isinstance(backbone, ViT):
            found["tokens"], found["attention"] = backbone.encode_with_attention(images)
        else:
            found["tokens"] = backbone.encode(images)
        found["features"] = backbone.pool(found["tokens"]) if self._pools_tokens else backbone(images)
        if "logits" in wanted:
            head = backbone.model.get_classifier()
            found["logits"] = head(found["features"]) if self._linear_head else backbone.model(images)
        return {name: found[name] for name in wanted}


def our_outputs(loaded: Loaded, names: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Return the outputs of these names as this package computes them, as a function of uint8 images.

    They are what exports are to equal.
    """
    backbone = loaded.backbone
    normalize = Normalize(loaded.mean or (), loaded.std or ())
    head_reads_features = bool(loaded.classes) and reads_features(backbone)

    def compute(images: Tensor) -> dict[str, Tensor]:
        pixels, found = normalize(images), dict[str, Tensor]()
        if "features" in names:
            found["features"] = backbone(pixels)
        if "logits" in names:
            found["logits"] = classify(backbone, pixels) if head_reads_features else backbone.model(pixels)
        if "tokens" in names:
            found["tokens"] = backbone.encode(pixels)
        if "attention" in names and isinstance(backbone, ViT):
            found["attention"] = backbone.attention_maps(pixels)
        return found

    return compute


def outputs_of(loaded: Loaded, given: Sequence[str]) -> tuple[str, ...]:
    """Return the outputs of an export: those that are given, or else features, and logits of a classifier.

    Raises:
        UsageError: The network has no such output.
    """
    backbone = loaded.backbone
    if "logits" in given and not loaded.classes:
        raise UsageError("outputs=logits: this network has no classifier; fine-tune it first, or leave logits out.")
    if "attention" in given and not (isinstance(backbone, ViT) and backbone.has_attention_maps):
        raise UsageError(
            f"outputs=attention: {type(backbone.model).__name__} has no attention of a class token to patches that is its "
            "feature: this output is for plain ViTs with pool=token. tokens are there for all networks."
        )
    return tuple(given) or (("logits", "features") if loaded.classes else ("features",))


def statistics_of(loaded: Loaded, run: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the pixels of training.

    Raises:
        UsageError: They are not known, so that nobody could compute the same features.
    """
    if loaded.mean is None or loaded.std is None:
        raise UsageError(
            f"run={run} does not tell the mean and standard deviation of the pixels it was trained with, without which its "
            "features mean nothing: export a run, an export of one, or weights that timm publishes."
        )
    return loaded.mean, loaded.std


def preprocessing(loaded: Loaded, interface: Interface) -> dict[str, object]:
    """Return what a caller has to know of the input and the outputs, as it is stored beside a graph and in it."""
    size, crop_pct = loaded.backbone.image_size, loaded.backbone.crop_pct or CROP_PCT
    return {
        "image_size": [*size],
        "channels": loaded.backbone.channels,
        "resize": [math.floor(side / crop_pct) for side in size],
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": loaded.mean,
        "std": loaded.std,
        "normalize": interface.normalize,
        "input": "uint8 of 0 to 255"
        if interface.reads_bytes
        else "float of 0 to 1"
        if interface.normalize == "inside"
        else "float, (pixels / 255 - mean) / std",
        "outputs": [*interface.outputs],
        "class_names": [*(loaded.classes or ())],
    }
