"""The export that transformers loads: AutoModel, AutoModelForImageClassification and AutoImageProcessor.

A ViT becomes ViTModel, one with LayerScale Dinov2Model, and a Swin SwinModel, where these compute the same; everything else
is timm's folder, which transformers loads by its TimmWrapper, and which needs timm.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sslvision.augment.crops import CROP_PCT
from sslvision.backbones.load import Loaded
from sslvision.errors import SSLVisionError
from sslvision.exports.transformers_names import Counterpart
from sslvision.nn.normalize import Normalize


def write_counterpart(loaded: Loaded, found: Counterpart, folder: Path) -> str:
    """Write a network of transformers' own classes, and return the name of its class."""
    config, state, classes = dict(found.config), dict(found.state), loaded.classes
    name = f"{found.kind}Model"
    if classes:
        name = f"{found.kind}ForImageClassification"
        state = {f"{found.prefix}{key}": value for key, value in state.items() if not key.startswith("pooler.")}
        head = loaded.backbone.model.get_classifier()
        weight, bias = head.weight, head.bias
        if found.kind == "Dinov2":  # its head reads the class token and the mean of the patches
            weight = torch.cat([weight, torch.zeros_like(weight)], dim=1)
        state |= {"classifier.weight": weight, "classifier.bias": bias}
        config |= {
            "id2label": dict(enumerate(classes)),
            "label2id": {one: number for number, one in enumerate(classes)},
        }
    config |= {"architectures": [name], "dtype": "float32"}
    (folder / "config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace"
    )
    tensors = {key: value.detach().float().contiguous().clone() for key, value in state.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o777 & (folder / "config.json").stat().st_mode)
    return name


def write_processor(loaded: Loaded, folder: Path) -> None:
    """Write the image processor of square images: resize the shorter side, crop the center, normalize."""
    size, crop_pct = loaded.backbone.image_size[0], loaded.backbone.crop_pct or CROP_PCT
    config = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": loaded.backbone.channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(size / crop_pct)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": loaded.mean,
        "image_std": loaded.std,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_transformers(folder: Path, loaded: Loaded, normalize: Normalize) -> Callable[[Tensor], Mapping[str, Tensor]]:
    """Return the outputs of transformers' network of a folder, as a function of uint8 images.

    Raises:
        SSLVisionError: Weights are missing or left over.
    """
    from transformers import AutoModel, AutoModelForImageClassification

    with quiet():
        without = {"add_pooling_layer": False} if loaded.classes and _class_of(folder).startswith("ViT") else {}
        model = _complete(AutoModel, folder, left_over="classifier" if loaded.classes else None, **without)
        classifier = _complete(AutoModelForImageClassification, folder) if loaded.classes else None

    def run(images: Tensor) -> dict[str, Tensor]:
        pixels = normalize(images)
        outputs = model(pixel_values=pixels)
        pooled = outputs.last_hidden_state[:, 0] if without else outputs.pooler_output
        found = {"features": pooled}
        if classifier is not None:
            found["logits"] = classifier(pixel_values=pixels).logits
        return found

    return run


def transformers_pixels(folder: Path, loaded: Loaded) -> Callable[[Image.Image], Tensor]:
    """Return the preprocessing of a folder's AutoImageProcessor, with the normalization undone: gray levels (C, H, W)."""
    from transformers import AutoImageProcessor

    with quiet():
        processor = AutoImageProcessor.from_pretrained(folder)
    mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    return lambda image: (processor(image, return_tensors="pt")["pixel_values"][0] * std + mean) * 255


def _class_of(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("architectures", [""])[0])


def _complete(kind: Any, folder: Path, *, left_over: str | None = None, **options: Any) -> Any:
    """Return a network in eval mode, all of whose weights are in the folder."""
    model, told = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)
    unexpected = [name for name in told["unexpected_keys"] if left_over is None or left_over not in name]
    wrong = [*told["missing_keys"], *unexpected, *map(str, told["mismatched_keys"])]
    if wrong and not type(model).__name__.startswith("TimmWrapper"):
        raise SSLVisionError(
            f"This version of transformers has other names for the weights of {type(model).__name__}: {wrong[0]} is missing or "
            "left over. Install transformers 5 or newer."
        )
    return model.eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide progress bars and reports of transformers."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
