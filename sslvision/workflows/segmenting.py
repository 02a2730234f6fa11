"""Segmenting: what the features of patches know of the pixels' classes, by k-NN and a linear classifier on images with masks.

Each image is resized as a whole to the backbone's image size and encoded once by every network that is compared.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from sslvision.augment.randomness import permutation
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.load import Loaded, load_backbone
from sslvision.data.datamodule import available_workers
from sslvision.data.masks import Masked, MaskedFolder, MaskedImages, open_masked_folder
from sslvision.errors import DataError
from sslvision.evaluation.linear_probe import fit_probe
from sslvision.evaluation.segmentation import (
    Bank,
    Encoder,
    Overlaps,
    full_size,
    patch_classes,
    patch_colors,
    patch_features,
)
from sslvision.figures.images import picture_figure
from sslvision.figures.maps import class_colors
from sslvision.nn.normalize import Normalize
from sslvision.runs import run_files
from sslvision.training.trainer import configure_torch, select_device
from sslvision.workflows.console import print_configuration, print_findings
from sslvision.workflows.labeled_data import untrained_backbone
from sslvision.workflows.segmenting_settings import Segment

PRETRAINED, UNTRAINED, COLORS = "pretrained", "untrained", "colors of patches"
KNN, LINEAR = "knn", "linear"
HELD_OUT = 0.1  # of the training images: they choose the strength of the linear classifier's L2
MOST_CLASSES = 1000
DRAWN = 8  # test images in the picture
ASSUMED = "those of ImageNet are taken, and of images that are not of three channels 0.5 and 0.5"
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # for weights that come without statistics

CONTENTS = """\
# {name}

Made by `{command}`. The same command overwrites it.

| file | what it is |
| --- | --- |
| results.json | mean intersection over union with its 95 % interval, that of each class, and the share of right pixels |
| segmentation.png | test images, their masks, and what k-NN and the linear classifier make of the patches |
| config.yaml, environment.json | all settings; versions, git commit and hardware |
"""


def segment(settings: Segment, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Measure the features of patches on images with masks, and write the results.

    Args:
        settings: All settings.
        folder: Where results go.
        words: The command line, for the record.

    Returns:
        The content of results.json.

    Raises:
        UsageError, DataError: There are no such weights or masks, or masks with too many or too few classes.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    assert settings.run is not None
    assert settings.masks is not None
    device = select_device(settings.device)
    configure_torch(device.type)
    options: dict[str, Any] = {"head": False, "seed": settings.seed, **settings.backbone}
    loaded = load_backbone(settings.run, pretrained=settings.pretrained, **options)
    found = open_masked_folder(settings.masks, holdout=settings.holdout)
    train, test = (
        MaskedImages(pairs, loaded.backbone.channels, loaded.backbone.image_size, settings.ignore)
        for pairs in (found.train, found.test)
    )
    drawn = permutation(len(train), seed=settings.seed, epoch=0)[: settings.train_images or len(train)].sort().values
    encoding = Encoding(
        encoders_of(settings, loaded.backbone, device),
        normalization_of(loaded).to(device),
        batch_size=settings.batch_size,
        workers=available_workers() if settings.workers is None else settings.workers,
        console=console,
    )
    print_configuration(console, configuration(settings, loaded, found, len(drawn), device), title=folder.name)
    remarks = [
        *found.remarks,
        *([] if loaded.mean is not None else [f"{loaded.weights} have no statistics of pixels: {ASSUMED}."]),
    ]
    print_findings(console, remarks)
    banks, values = learn(encoding, Subset(train, drawn.tolist()), settings)
    overlaps, shown = compare(encoding, test, banks, values)
    names = [found.names[value] if found.names and value < len(found.names) else str(value) for value in values]
    findings = [*encoding.told(), *unseen(overlaps)]
    scores = {name: {way: as_json(one, names) for way, one in ways.items()} for name, ways in overlaps.items()}
    results = {
        "scores": scores,
        "weights": loaded.weights,
        "image_size": list(loaded.backbone.image_size),
        "grid": list(loaded.backbone.grid),
        "train_images": len(drawn),
        "train_patches": len(next(iter(banks.values())).features),
        "test_images": len(test),
        "unreadable": encoding.unreadable,
        "findings": [*remarks, *findings],
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    run_files.describe(folder, dataclasses.asdict(settings), words, command="segment", contents=CONTENTS)
    run_files.write_json(folder / "results.json", results)
    title = f"Segmentation by frozen features of {loaded.backbone.grid[0]}x{loaded.backbone.grid[1]} patches"
    picture_figure(shown, title=title).savefig(folder / "segmentation.png")
    print_findings(console, findings)
    title = f"Frozen features of patches, {len(test):,} test images with {len(values)} classes"
    print_table(console, scores, title=title)
    console.print(f"Finished in {results['seconds']:.0f} s. Results are in {folder}.")
    return results


def encoders_of(settings: Segment, backbone: Backbone, device: torch.device) -> dict[str, Encoder]:
    """Return what is measured, by name: the network, and what it is compared with."""
    encoders = {PRETRAINED if settings.pretrained else UNTRAINED: patch_features(backbone.to(device).eval())}
    if settings.untrained and settings.pretrained:
        assert settings.run is not None
        other = untrained_backbone(settings.run, seed=settings.seed, **settings.backbone)
        if other is None:
            options: dict[str, Any] = {"head": False, "seed": settings.seed, **settings.backbone}
            other = load_backbone(settings.run, pretrained=False, **options).backbone
        encoders[UNTRAINED] = patch_features(other.to(device).eval())
    if settings.untrained:
        encoders[COLORS] = patch_colors(backbone.grid)
    return encoders


def normalization_of(loaded: Loaded) -> Normalize:
    """Return the normalization of the weights; ImageNet's, or that to -1..1, for weights that come without."""
    if loaded.mean is not None and loaded.std is not None:
        return Normalize(loaded.mean, loaded.std)
    channels = loaded.backbone.channels
    return Normalize(*(IMAGENET if channels == 3 else ([0.5] * channels, [0.5] * channels)))


def configuration(
    settings: Segment, loaded: Loaded, found: MaskedFolder, images: int, device: torch.device
) -> dict[str, str]:
    """Return the configuration in effect, for the user to check."""
    (H, W), (rows, columns) = loaded.backbone.image_size, loaded.backbone.grid
    return {
        "weights": loaded.weights,
        "backbone": f"{type(loaded.backbone.model).__name__}, {rows}x{columns} patches of images resized to {H}x{W} pixels",
        "images": f"{found.root}: {images:,} for training, {len(found.test):,} for testing",
        "device": str(device),
    }


class Encoding:
    """Reading images with masks, and encoding them.

    Args:
        encoders: What encodes, by name.
        normalize: Of pixels.
        batch_size: Images per forward pass.
        workers: Processes that read.
        console: For the progress bar.
    """

    def __init__(
        self, encoders: Mapping[str, Encoder], normalize: Normalize, *, batch_size: int, workers: int, console: Console
    ):
        self.encoders, self.normalize, self.batch_size, self.workers = encoders, normalize, batch_size, workers
        self.console = console
        self.unreadable: list[str] = []

    @torch.no_grad()
    def __call__(
        self, images: Dataset[Masked | str], number: int, does: str
    ) -> Iterator[tuple[list[Masked], dict[str, Tensor]]]:
        """Yield the images of each batch that can be read, and their features by name, each (B, rows, columns, D)."""
        loader = DataLoader(images, batch_size=self.batch_size, collate_fn=list, num_workers=self.workers)
        total = math.ceil(number / self.batch_size)
        hidden = not self.console.is_terminal
        for batch in track(loader, does, total=total, console=self.console, transient=True, disable=hidden):
            read = [one for one in batch if isinstance(one, Masked)]
            self.unreadable += [one for one in batch if isinstance(one, str)]
            if not read:
                continue
            pixels = self.normalize(torch.stack([one.pixels for one in read]).to(self.normalize.mean.device))
            yield read, {name: encode(pixels).float() for name, encode in self.encoders.items()}

    def told(self) -> list[str]:
        """Return in words which images could not be used."""
        if not self.unreadable:
            return []
        return [f"{len(self.unreadable):,} images could not be used, and were left out, such as {self.unreadable[0]}."]


def learn(encoding: Encoding, train: Subset[Masked | str], settings: Segment) -> tuple[dict[str, Bank], list[int]]:
    """Return what each encoder's features of training patches teach, and the values that masks have for the classes.

    Raises:
        DataError: There are too many or too few classes.
    """
    each = math.ceil(settings.train_patches / len(train))
    classes, images = list[Tensor](), list[int]()
    features: dict[str, list[Tensor]] = {name: [] for name in encoding.encoders}
    for read, of in encoding(train, len(train), "training images"):
        rows, columns = next(iter(of.values())).shape[1:3]
        for place, one in enumerate(read):
            found = patch_classes(one.mask, (rows, columns)).flatten()  # (rows * columns,)
            known = (found >= 0).nonzero()[:, 0]
            known = known[permutation(len(known), seed=settings.seed, epoch=one.index)[:each]]
            classes.append(found[known])
            images += [one.index] * len(known)
            for name, parts in features.items():
                parts.append(of[name][place].flatten(0, 1)[known.to(of[name].device)])
    values, labels = torch.cat([*classes, torch.empty(0, dtype=torch.int64)]).unique(return_inverse=True)
    if not 2 <= len(values) <= MOST_CLASSES:
        ignored = f" besides ignore={settings.ignore}" if settings.ignore else ""
        raise DataError(
            f"The training masks have {len(values):,} classes{ignored}, and 2 to {MOST_CLASSES:,} are expected: a mask has the "
            "number of a class for each pixel. Masks of 0 and 255 need ignore=[]; numbers of instances are no classes."
        )
    held = torch.tensor(images) >= sorted(images)[int((1 - HELD_OUT) * len(images))]  # patches of the last images
    banks = {}
    for name, parts in features.items():
        x, y = torch.cat(parts), labels.to(parts[0].device)
        fitted_on, validation = (~held, (x[held], y[held])) if 0 < held.sum() < len(held) else (slice(None), None)
        fitted = fit_probe(
            x[fitted_on], y[fitted_on], num_classes=len(values), validation=validation, seed=settings.seed
        )
        banks[name] = Bank(x, y, fitted, len(values), settings.k)
    return banks, values.tolist()


def compare(
    encoding: Encoding, test: MaskedImages, banks: Mapping[str, Bank], values: Sequence[int]
) -> tuple[dict[str, dict[str, Overlaps]], list[tuple[str, Tensor]]]:
    """Return the overlaps of what is predicted of the test images with their masks, and columns of pictures of some."""
    parts: dict[str, dict[str, list[Overlaps]]] = {name: {KNN: [], LINEAR: []} for name in banks}
    pictures: dict[str, list[Tensor]] = {heading: [] for heading in ("image", "mask", "k-NN", "linear")}
    place_of = torch.full((max(values) + 1,), len(values))  # values that training does not have are one class more
    place_of[list(values)] = torch.arange(len(values))
    step = max(1, len(test) // DRAWN)
    for read, of in encoding(test, len(test), "test images"):
        scores = {
            name: {KNN: bank.knn_scores(of[name]).cpu(), LINEAR: bank.linear_scores(of[name]).cpu()}
            for name, bank in banks.items()
        }  # each (B, rows, columns, K)
        for place, one in enumerate(read):
            true = torch.where(one.mask >= 0, place_of[one.mask.clamp(0, max(values))], -1)
            true = torch.where(one.mask > max(values), len(values), true)
            size = true.shape[0], true.shape[1]
            predicted = {
                name: {way: full_size(found[place], size) for way, found in ways.items()}
                for name, ways in scores.items()
            }
            for name, ways in predicted.items():
                for way, classes in ways.items():
                    parts[name][way].append(Overlaps.of(classes, true, len(values) + 1))
            if one.index % step == 0 and len(pictures["image"]) < DRAWN:
                drawn = next(iter(predicted.values()))
                pictures["image"].append(one.pixels[:3].float() / 255)
                for heading, classes in (("mask", true), ("k-NN", drawn[KNN]), ("linear", drawn[LINEAR])):
                    shown = F.interpolate(classes[None, None].double(), one.pixels.shape[1:], mode="nearest-exact")
                    pictures[heading].append(class_colors(shown[0, 0].long(), len(values)))
    if not pictures["image"]:
        raise DataError(f"None of the {len(test):,} test images can be read, such as {encoding.unreadable[-1]}.")
    joined = {name: {way: Overlaps.joined(found) for way, found in ways.items()} for name, ways in parts.items()}
    return joined, [(heading, torch.stack(images)) for heading, images in pictures.items()]


def unseen(overlaps: Mapping[str, Mapping[str, Overlaps]]) -> list[str]:
    """Return in words how many pixels of the test masks have classes that no training mask has."""
    true = next(iter(overlaps.values()))[KNN].true.sum(0)
    if not true[-1]:
        return []
    return [
        f"{100 * true[-1] / true.sum():.2g} % of the pixels of test masks have classes of no training mask: all are wrong."
    ]


def as_json(overlaps: Overlaps, names: Sequence[str]) -> dict[str, Any]:
    """Return the scores of a way to classify, in percent."""
    low, high = overlaps.interval()
    per_class = overlaps.per_class().tolist()
    return {
        "miou": round(overlaps.miou, 2),
        "interval": [round(low, 2), round(high, 2)],
        "pixel_accuracy": round(overlaps.accuracy, 2),
        "per_class": {
            name: None if math.isnan(value) else round(value, 2)
            for name, value in zip(names, per_class[: len(names)], strict=True)
        },
    }


def print_table(console: Console, scores: Mapping[str, Mapping[str, Any]], *, title: str) -> None:
    """Print the scores of all encoders, as `as_json` returns them."""
    table = Table(title=title, title_style="bold")
    table.add_column("")
    for heading in ("k-NN mIoU %", "linear mIoU %", "right pixels %"):
        table.add_column(heading, justify="right")
    for name, ways in scores.items():
        cells = []
        for way in (KNN, LINEAR):
            low, high = ways[way]["interval"]
            cells.append(f"{ways[way]['miou']:.1f} ± {(high - low) / 2:.1f}")
        table.add_row(name, *cells, f"{ways[LINEAR]['pixel_accuracy']:.1f}")
    console.print(table)
