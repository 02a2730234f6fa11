"""Run the code of an export's model card on images, as a person types it who does not have sslvision.

python benchmarks/card_code.py EXPORT...

Needs numpy and what the card says one must install; benchmarks/exports_apart.py starts it in new environments. Beside each
export lies cases.npz with the networks' inputs as sslvision makes them, and images/0.jpg, 1.jpg, ... What the code computes of
the files, and of our inputs by its lines after those that make `pixels`, goes to theirs.npz.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np

PACKAGES = (
    "sslvision",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "onnxruntime",
    "numpy",
    "pillow",
    "safetensors",
)


def main():
    for folder in map(Path, sys.argv[1:]):
        os.chdir(folder)
        about, given = json.loads(Path("export.json").read_text(encoding="utf-8")), np.load("cases.npz")
        preparing, computing = halves(block_of(Path("README.md").read_text(encoding="utf-8")))
        found = {}
        for number in range(len(given["bytes"])):
            shutil.copyfile(f"images/{number}.jpg", "image.jpg")
            names = {}
            exec(preparing, names)
            theirs, ours = names["pixels"], pixels_for(about["format"], given, number)
            for key, pixels in (("file", theirs), ("ours", ours)):
                exec(computing, names | {"pixels": pixels}, own := {})
                outputs = dict(own.get("found") or {key: own[key] for key in ("features", "logits") if key in own})
                for name, value in outputs.items():
                    found.setdefault(f"{key} {name}", []).append(np.asarray(value)[0])
                if "label" in own:
                    found.setdefault(f"{key} label", []).append(own["label"])
            found.setdefault("pixels", []).append(values_of(theirs)[0])
        os.remove("image.jpg")
        np.savez("theirs.npz", **found)
    print(json.dumps({name: version for name in PACKAGES if (version := version_of(name))}))


def block_of(card):
    """Return the block of Python that loads the export."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL).group(1)


def halves(code):
    """Return the code that ends with the input of the network, `pixels`, and the code after it."""
    lines = ast.parse(code).body
    last = max(place for place, line in enumerate(lines) if "pixels" in targets(line))
    return tuple(compile(ast.Module(part, []), "the card", "exec") for part in (lines[: last + 1], lines[last + 1 :]))


def targets(line):
    return {target.id for target in getattr(line, "targets", []) if isinstance(target, ast.Name)}


def pixels_for(format, given, number):
    """Return the input of an image as sslvision makes it, as the code expects it."""
    if format in ("onnx", "program"):
        return given["bytes"][number : number + 1]
    import torch

    normalized = torch.from_numpy(given["normalized"][number : number + 1])
    return {"pixel_values": normalized} if format == "transformers" else normalized


def values_of(pixels):
    return np.asarray(pixels["pixel_values"] if hasattr(pixels, "keys") else pixels)


def version_of(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
