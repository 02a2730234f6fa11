"""Do people who have only timm, only transformers, only onnxruntime or only torch get our features and logits?

python benchmarks/exports_apart.py --images ~/imagenette/val

Networks of random weights are exported, with and without a head. For each format, a new virtual environment gets what the
model cards of the exports say one must install, and nothing else; there the code of each card is run on JPEG files. Its
outputs are compared with ours: largest absolute difference, divided by the root mean square of the output. "alone" is the
network on our pixels; "file" is the whole code, from files of images that need no resizing, and "resized" of images that do.

The environments take up to 6 GB each, and minutes. They are kept in --environments, and used again.
"""

import argparse
import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import sslvision
from sslvision.augment.crops import center_crop
from sslvision.backbones.build import build_backbone
from sslvision.backbones.load import load_backbone
from sslvision.data.decode import read_image
from sslvision.exports.network import our_outputs
from sslvision.nn.normalize import Normalize
from sslvision.runs.weights import export_backbone

CARD_CODE = Path(__file__).with_name("card_code.py")
SIZE = 112  # pixels
NETWORKS = {  # timm name, and what makes it small, for exporting takes time by the layer
    "ViT": ("vit_tiny_patch16_224", {"depth": 4}),
    "Swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 48, "depths": [2, 2], "num_heads": [2, 4]}),
    "ResNet": ("resnet18", {}),
    "ConvNeXt": ("convnext_atto", {"depths": [1, 1, 2, 1]}),
}
FORMATS = ("timm", "transformers", "onnx", "program")
CLASSES = ["ant", "bee", "Müsli"]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
# Width and height of the images of each case: 128 pixels need no resizing, of which the middle 112 are taken; 502 by 375 become
# 171 by 128, of which 59 columns are cut off, an odd number that transformers' own processors round in another way than we.
CASES = {"as they are": (128, 128), "resized": (500, 375), "upright": (333, 480), "half a pixel": (503, 375)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files, or of folders of them")
    parser.add_argument("--folder", type=Path, default=Path("outputs/exports-apart"), help="where exports are written")
    parser.add_argument("--environments", type=Path, help="default: environments in --folder")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--count", type=int, default=3, help="images of each case")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    environments = (arguments.environments or folder / "environments").resolve()
    files = sorted(
        file for file in arguments.images.expanduser().rglob("*") if file.suffix.lower() in (".jpg", ".jpeg")
    )
    torch.set_grad_enabled(False)
    sources = {(name, head): source_of(name, head, folder) for name in arguments.networks for head in (False, True)}
    for format in arguments.formats:
        exports = {}
        for (name, head), source in sources.items():
            exports[name, head] = folder / format / source.name
            sslvision.export(source, format=format, output_dir=str(exports[name, head]), overwrite=True)
            write_cases(source, exports[name, head], files, arguments.count)
        versions = read_apart(exports.values(), environments / format)
        print_table(format, exports, sources, arguments.count, versions)


def source_of(name, head, folder):
    """Write weights that are random everywhere, so that every norm and bias counts, and return their folder."""
    torch.manual_seed(0)
    timm_name, options = NETWORKS[name]
    backbone = build_backbone(timm_name, image_size=SIZE, channels=3, **options)
    backbone.crop_pct = 0.875
    if head:
        backbone.model.reset_classifier(len(CLASSES))
    for parameter in backbone.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    for key, buffer in backbone.named_buffers():
        if key.endswith(("running_mean", "running_var")):
            buffer.add_(torch.rand_like(buffer) * 0.2)
    source = folder / "sources" / (name.lower() + "-classifier" * head)
    export_backbone(backbone.eval(), source, mean=MEAN, std=STD, classes=CLASSES if head else None)
    return source


def write_cases(source, export, files, count):
    """Write the images of all cases beside an export, and what we make of them: inputs and outputs."""
    loaded = load_backbone(source)
    loaded.backbone.eval()
    (export / "images").mkdir()
    pixels = []
    for size in CASES.values():
        for file in files[:: max(1, len(files) // count)][:count]:
            written = export / "images" / f"{len(pixels)}.jpg"
            Image.open(file).convert("RGB").resize(size, Image.Resampling.LANCZOS).save(written, quality=92)
            pixels.append(center_crop(read_image(written, 3), loaded.backbone.image_size, loaded.backbone.crop_pct))
    pixels = torch.stack(pixels)
    ours = our_outputs(loaded, ("features", "logits") if loaded.classes else ("features",))(pixels)
    np.savez(
        export / "cases.npz",
        bytes=pixels.numpy(),
        normalized=Normalize(loaded.mean, loaded.std)(pixels).numpy(),
        **{name: value.numpy() for name, value in ours.items()},
    )


def read_apart(exports, environment):
    """Run the cards' code in an environment that has what the cards name, the fewest packages first; return versions."""
    python, versions = environment / "bin" / "python", {}
    if not python.exists():
        venv.create(environment, with_pip=True)
    needs = {
        export: re.search(r"`pip install ([^`]+)`", (export / "README.md").read_text()).group(1) for export in exports
    }
    for packages in sorted(set(needs.values()), key=len):
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages.split()], check=True)
        folders = [export for export, needed in needs.items() if needed == packages]
        done = subprocess.run([python, "-I", str(CARD_CODE), *folders], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"The code of the cards of {', '.join(map(str, folders))} failed, in {environment}.")
        versions[packages] = json.loads(done.stdout.splitlines()[-1])
        if "sslvision" in versions[packages]:
            sys.exit(f"{environment} has sslvision: it is to have only what the cards name.")
    return versions


def print_table(format, exports, sources, count, versions):
    print(f"\n## format={format}\n")
    for packages, found in versions.items():
        print(f"`pip install {packages}`: {', '.join(f'{name} {version}' for name, version in found.items())}.\n")
    columns = ["alone", *CASES]
    print(f"| network | output | {' | '.join(columns)} | gray levels, of {', '.join(CASES)} |")
    print(f"| --- | --- | {' | '.join('---' for _ in columns)} | --- |")
    for (name, head), export in exports.items():
        ours, theirs = np.load(export / "cases.npz"), np.load(export / "theirs.npz")
        levels = gray_levels(theirs["pixels"], ours)
        label = (
            json.loads((export / "export.json").read_text()).get("class", name) if format == "transformers" else name
        )
        for output in ("features", "logits"):
            if f"ours {output}" in theirs:
                cells = [deviation(theirs[f"ours {output}"], ours[output], slice(None))]
                for place in range(len(CASES)):
                    some = slice(place * count, (place + 1) * count)
                    cells.append(deviation(theirs[f"file {output}"], ours[output], some))
                shown = " | ".join(f"{cell:.1e}" for cell in cells)
                grays = ", ".join(
                    f"{levels[place * count : (place + 1) * count].max():.2g}" for place in range(len(CASES))
                )
                print(f"| {label} | {output} | {shown} | {grays} |", flush=True)
        if head:
            wanted = [CLASSES[index] for index in ours["logits"].argmax(1)]
            same = int((theirs["ours label"] == wanted).sum()), int((theirs["file label"] == wanted).sum())
            if same != (len(wanted), len(wanted)):
                print(f"\n{name}: {same[0]} of our pixels and {same[1]} files of {len(wanted)} have our class.\n")


def deviation(theirs, ours, some):
    """Return the largest difference of some images, divided by the root mean square of our output of all."""
    return np.abs(theirs[some] - ours[some]).max() / np.sqrt(np.square(ours).mean())


def gray_levels(pixels, ours):
    """Return for each image by how many of 255 gray levels pixels differ from ours at most."""
    if pixels.dtype != np.uint8:
        pixels = (pixels * np.array(STD).reshape(-1, 1, 1) + np.array(MEAN).reshape(-1, 1, 1)) * 255
    return np.abs(pixels.astype(np.float64) - ours["bytes"]).max(axis=(1, 2, 3))


if __name__ == "__main__":
    main()
