"""Measure the backbones of docs/backbones.md, and write that page with its table and picture.

taskset -c 0 python scripts/make_backbones_page.py                                # some minutes on one core
python scripts/make_backbones_page.py outputs/backbones                           # only write, from that folder
"""

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from sslvision.workflows.inspection_tables import cells, headings

DOCS = Path(__file__).parents[1] / "docs"
FAMILIES = {  # timm's name -> the network that people look for, and how near it is
    "vgg11": ("AlexNet", "not in timm; nearest: plain convolutions and three linear layers too, all of 3x3"),
    "vgg16": ("VGG", ""),
    "inception_v3": ("GoogLeNet", "not in timm; nearest: its third version"),
    "resnet50": ("ResNet", ""),
    "densenet121": ("DenseNet", ""),
    "convnext_tiny": ("ConvNeXt", ""),
    "coatnet_0_rw_224": ("CoAtNet", ""),
    "convit_small": ("ConViT", ""),
    "mvitv2_tiny": ("CvT", "not in timm; nearest: queries, keys and values by depthwise convolutions too"),
    "pvt_v2_b2": ("LocalViT", "not in timm; nearest: a depthwise convolution inside each MLP too"),
    "vit_small_patch16_224": ("ViT", ""),
    "swin_tiny_patch4_window7_224": ("Swin", ""),
}
SETTINGS = {"backbone.image_size": 224, "batch_size": 4}
WORDS = [f"backbone.name={','.join(FAMILIES)}", *(f"{key}={value}" for key, value in SETTINGS.items())]
PAGE = """\
# Backbones

<!-- Made by scripts/make_backbones_page.py: change the text there. -->

What networks cost and what they see, before any training, at {size} pixels. All are built by timm with random weights and
without a classifier, and measured by one command, on one core of an {processor} (fp32, torch {torch}; a machine that others use
too, so rates are rough):

```bash
sslvision inspect \\
  {words}
```

{table}

The picture and this page with it are made by `python scripts/make_backbones_page.py`. {absent}

- **params**: millions, without the classifier. The hidden layers of VGG's head remain, 119.5 of 134.3 million.
- **GFLOPs**: a forward pass of one image, by `torch.utils.flop_counter`: matrix products, convolutions and attention, where a
  multiplication and an addition are two operations. Papers often count them as one.
- **saved**: activations that a forward pass keeps for the backward pass, per image, without parameters. On a CPU attention
  is two products, which keep the attention weights; the fused kernels on a GPU do not.
- **peak**: most bytes of tensors alive at once in a forward and backward pass of a batch: parameters, gradients, activations
  and temporary results, without an optimizer's state and without what kernels allocate inside. On CUDA it is the
  allocator's peak. It is of the network as a whole: at its peak tensors of many layers are alive; layers have *saved*.
- **field, theory**: side in pixels of the receptive field of a position of the last map, by W1 = (W2 - 1) S + F from layer
  to layer ([Araujo et al. 2019](https://distill.pub/2019/computing-receptive-fields/)); it may exceed the image. *whole*: the
  position reads the whole image, by attention or squeeze-and-excitation.
- **field, 95 %**: side of the square around the position that holds 95 % of the gradient with respect to the pixels, averaged
  over {field_images} images of noise ([Luo et al. 2016](https://arxiv.org/abs/1701.04128)). Scales of residual branches
  that begin at 0 are set to 1, as those of ResNet and ConvNeXt, or only the shortcut would be seen.
- **img/s**: median of {repeats} passes with {batch} images: forward in evaluation mode, and forward and backward in training
  mode.

![Effective receptive fields of the twelve networks](backbones.png)

Gradient on a logarithmic scale over three decades. Plain convolutions see a Gaussian well inside the theoretical field. At the
start a transformer reads mostly its own patch, and a little of everything; what it attends to is learned.

## Inspect your own

```bash
sslvision inspect backbone.name=resnet50                    # one network, by layer
sslvision inspect backbone.name=resnet50,vgg16 batch_size=4 # several in one table
sslvision inspect run=outputs/a                             # a run: its filters before and after pretraining
sslvision inspect run=outputs/a backbone.name=resnet18      # a run beside another network
sslvision inspect run=outputs/a measure=field,filters       # only what is named: cost, memory, field, speed, filters
```

The folder `outputs/inspect-.../` then holds `inspect.json` with every figure and its definition, the table as CSV and
Markdown, a CSV file of the layers of each network, and pictures: receptive fields, and the filters of the first convolution
or patch embedding. `run` takes what it takes for [probe](guide/probe.md): runs, exports, published checkpoints, timm names
with their weights. For runs the picture of filters has two parts: before training (the weights of the run's seed, or those
it was started from) and after.

In Python: `sslvision.inspect(["resnet50", "vgg16"], batch_size=4)` returns the content of `inspect.json`.
"""


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/backbones.md."""
    on = results["measured_on"]
    names = ["family", *(heading.replace("\n", " ") for heading in headings(results))]
    rows = [
        [FAMILIES[record["name"]][0] + (" (nearest)" if FAMILIES[record["name"]][1] else ""), *row(record, on)]
        for record in results["networks"]
    ]
    lines = [names, ["---", "---", *["---:"] * (len(names) - 2)], *rows]
    absent = "; ".join(f"`{name}` for {family} ({told})" for name, (family, told) in FAMILIES.items() if told)
    return PAGE.format(
        size=SETTINGS["backbone.image_size"],
        words=" ".join(WORDS),
        table="\n".join(f"| {' | '.join(line)} |" for line in lines),
        absent=f"Four stand in for another: {absent}.",
        processor=on["name"],
        torch=on["torch"].partition("+")[0],
        repeats=on["repeats"],
        batch=on["batch_size"],
        field_images=results["field_images"],
    )


def row(record: dict[str, Any], on: dict[str, Any]) -> list[str]:
    """Return the cells of a network."""
    name, *others = cells(record, on["batch_size"])
    return [f"`{name}`", *others]


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/backbones")
    if len(sys.argv) == 1:
        import sslvision

        sslvision.inspect([*FAMILIES], output_dir=folder, device="cpu", **SETTINGS)
    written = page(json.loads((folder / "inspect.json").read_text()))
    (DOCS / "backbones.md").write_text(written, encoding="utf-8")
    with Image.open(folder / "receptive_fields.png") as picture:  # of 256 colors it is a third as large
        picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(DOCS / "backbones.png", optimize=True)
