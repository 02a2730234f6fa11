"""The export that timm loads, see runs/weights.py; and how near timm comes to our features and pixels."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from PIL import Image
from torch import Tensor

from sslvision.backbones.load import Loaded
from sslvision.nn.normalize import Normalize
from sslvision.runs.weights import export_backbone, record_value_range


def write_timm(loaded: Loaded, folder: Path, *, mean: list[float], std: list[float], value_range: Any) -> None:
    """Write config.json and model.safetensors."""
    export_backbone(loaded.backbone, folder, mean=mean, std=std, classes=loaded.classes)
    record_value_range(folder, value_range)


def read_timm(folder: Path, normalize: Normalize) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return the outputs of timm's model of a folder, as a function of uint8 images."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def run(images: Tensor) -> dict[str, Tensor]:
        pixels = normalize(images)
        features = {"features": model.forward_head(model.forward_features(pixels), pre_logits=True)}
        return features | ({"logits": model(pixels)} if model.num_classes else {})

    return run


def timm_pixels(folder: Path) -> Callable[[Image.Image], Tensor]:
    """Return timm's preprocessing of a folder without normalization: an image becomes gray levels (C, H, W)."""
    model: Any = timm.create_model(f"local-dir:{folder}", pretrained=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), normalize=False)
    return lambda image: transform(image).float()
