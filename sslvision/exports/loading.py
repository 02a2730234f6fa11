"""How an export is loaded without this package, as code for its model card: from an image file to features or a class."""

from collections.abc import Mapping
from typing import Any

from sslvision.augment.crops import CROP_PCT
from sslvision.backbones.load import Loaded

MODES = {1: "L", 3: "RGB"}  # of Pillow, by channels
_TIMM = """\
import timm
import torch
from PIL import Image

folder = "."  # this folder; from the hub: "hf-hub:user/name", without local-dir:
model = timm.create_model(f"local-dir:{{folder}}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
pixels = transform(Image.open("image.jpg").convert("{mode}"))[None]
with torch.no_grad():
    features = model.forward_head(model.forward_features(pixels), pre_logits=True)  # (1, {width})
"""
_TIMM_CLASS = """\
    logits = model(pixels)  # (1, {classes})
label = model.pretrained_cfg["label_names"][int(logits.argmax())]
"""
_TRANSFORMERS = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto}

folder = "."  # this folder; from the hub: "user/name"
processor = AutoImageProcessor.from_pretrained(folder)
model = {auto}.from_pretrained(folder).eval()
pixels = processor(Image.open("image.jpg").convert("{mode}"), return_tensors="pt")
with torch.no_grad():
{read}
"""
_PIXELS = """\
import numpy as np
{imports}
from PIL import Image

image = Image.open("image.jpg").convert("{mode}")
{resize}
left, top = round((image.width - {columns}) / 2), round((image.height - {rows}) / 2)
image = image.crop((left, top, left + {columns}, top + {rows}))
pixels = np.asarray(image).reshape({rows}, {columns}, {channels}).transpose(2, 0, 1)[None]  # uint8
{values}
"""
_ONNX = """\
session = onnxruntime.InferenceSession("model.onnx")
names = [output.name for output in session.get_outputs()]  # {outputs}
found = dict(zip(names, session.run(None, {{"images": pixels}})))
"""
_PROGRAM = """\
program = torch.export.load("model.pt2").module()
with torch.no_grad():
    found = program(torch.from_numpy(pixels.copy()))  # {outputs}
"""


def loading_code(loaded: Loaded, format: str, facts: Mapping[str, Any]) -> str:
    """Return a block of Python that loads an export and reads image.jpg, and what it needs.

    Args:
        loaded: The network.
        format: Format of the export.
        facts: "class" of transformers; "interface" of a graph: normalize, input and outputs, as in preprocessing.json.
    """
    backbone, classes = loaded.backbone, loaded.classes or ()
    if backbone.channels not in MODES:
        return (
            f"Its images have {backbone.channels} channels, and are no files that Pillow reads: pass normalized arrays "
            "(batch, channels, height, width)."
        )
    mode = MODES[backbone.channels]
    if format == "timm":
        code = _TIMM.format(mode=mode, width=backbone.embed_dim) + (
            _TIMM_CLASS.format(classes=len(classes)) * bool(classes)
        )
        return _block(code, "timm")
    if format == "transformers":
        kind = str(facts.get("class", ""))
        auto = "AutoModelForImageClassification" if classes else "AutoModel"
        read = f"    features = model(**pixels).pooler_output  # (1, {backbone.embed_dim})"
        if classes:
            read = "    logits = model(**pixels).logits\nlabel = model.config.id2label[int(logits.argmax())]"
        needs = "transformers torchvision" + " timm" * kind.startswith("TimmWrapper")
        return _block(_TRANSFORMERS.format(auto=auto, mode=mode, read=read), needs)
    tail = (_ONNX if format == "onnx" else _PROGRAM).format(outputs=", ".join(facts["outputs"]))
    if "logits" in facts["outputs"]:
        names = 'json.loads(Path("preprocessing.json").read_text(encoding="utf-8"))["class_names"]'
        tail += f'classes = {names}\nlabel = classes[int(found["logits"].argmax())]\n'
    imports = "import onnxruntime" if format == "onnx" else "import torch"
    standard = "import json\nfrom pathlib import Path\n\n" if "json.loads" in tail else ""
    return _block(
        standard + _preparing(loaded, facts, imports, mode) + tail,
        "onnxruntime numpy" if format == "onnx" else "torch numpy",
    )


def _preparing(loaded: Loaded, facts: Mapping[str, Any], imports: str, mode: str) -> str:
    """Return code that reads image.jpg as evaluation does, by Pillow."""
    (rows, columns), crop_pct = loaded.backbone.image_size, loaded.backbone.crop_pct or CROP_PCT
    covered = [int(side / crop_pct) for side in (rows, columns)]
    if rows == columns:
        size = f"[{covered[0]} * side // min(image.size) for side in image.size]"
        resize = f"image = image.resize({size}, Image.Resampling.BICUBIC)"
    else:
        resize = (
            f"factor = min(image.height / {covered[0]}, image.width / {covered[1]})\n"
            "image = image.resize([round(side / factor) for side in image.size], Image.Resampling.BICUBIC)"
        )
    values = {
        "uint8 of 0 to 255": "",
        "float of 0 to 1": "pixels = pixels.astype(np.float32) / 255",
    }.get(str(facts["input"]), _normalizing(loaded))
    return _PIXELS.format(
        imports=imports,
        mode=mode,
        resize=resize,
        rows=rows,
        columns=columns,
        channels=loaded.backbone.channels,
        values=values,
    ).replace("\n\n\n", "\n\n")


def _normalizing(loaded: Loaded) -> str:
    mean, std = ([round(value, 8) for value in values or ()] for values in (loaded.mean, loaded.std))
    return (
        f"mean, std = (np.array(values, np.float32).reshape(-1, 1, 1) for values in ({mean}, {std}))\n"
        "pixels = (pixels.astype(np.float32) / 255 - mean) / std"
    )


def _block(code: str, needs: str) -> str:
    return f"`pip install {needs} pillow`, and in this folder:\n\n```python\n{code.strip()}\n```"
