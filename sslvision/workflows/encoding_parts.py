"""Encoding images into part files: on one device, those of some parts, a part in main memory at a time."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.load import Loaded
from sslvision.data.datamodule import available_workers
from sslvision.data.joined_sources import JoinedSources
from sslvision.data.source import UnreadableImage
from sslvision.embeddings.parts import Rows, as_text, part_file, write_part
from sslvision.evaluation.features import Extraction, feature_batches
from sslvision.nn.normalize import Normalize
from sslvision.workflows.embedding_settings import Embed
from sslvision.workflows.probing import Process


class Images(NamedTuple):
    """The images to embed, with what is known of them.

    Attributes:
        source: All of them, in the order of the rows.
        root: Folder that paths are relative to; empty if the images are not files in one folder.
        remarks: What was left out of the data, in sentences.
    """

    source: JoinedSources
    root: str
    remarks: tuple[str, ...]


class Encoded(NamedTuple):
    """Some images, encoded: indices (n,), features (n, D), and of a classifier classes (n,) and probabilities (n,)."""

    where: Tensor
    features: Tensor
    classes: Tensor | None
    probabilities: Tensor | None

    def of(self, chosen: slice) -> "Encoded":
        """Return a part."""
        return Encoded(*(None if one is None else one[chosen] for one in self))  # type: ignore[arg-type]


def encode_parts(
    settings: Embed,
    folder: Path,
    about: Mapping[str, Any],
    numbers: Sequence[int],
    loaded: Loaded,
    images: Images,
    process: Process,
) -> int:
    """Make and write these parts; return how many images were encoded."""
    if not numbers:
        return 0
    per_part, count = about["images_per_part"], about["images"]
    indices = [
        index for part in numbers for index in range(part * per_part, min((part + 1) * per_part, count))
    ]  # ascending
    columns = (TextColumn("embedding"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"))
    console = Console(soft_wrap=True, highlight=False)
    hidden = process.rank > 0 or not console.is_terminal
    waiting, made = [*numbers], 0
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bars:
        bar = bars.add_task("embedding", total=len(indices))
        batches = encoded(
            settings, loaded, images, indices, process.device, lambda done, _: bars.update(bar, completed=done)
        )
        pending: list[Encoded] = []
        for batch in batches:
            while len(batch.where) and batch.where[-1] >= (end := (waiting[0] + 1) * per_part):
                inside = int((batch.where < end).sum())
                pending.append(batch.of(slice(inside)))
                made += write(folder, about, waiting.pop(0), pending, loaded, images)
                pending, batch = [], batch.of(slice(inside, None))
            pending.append(batch)
    for number in waiting:  # the last one with images, and any after it whose images cannot be read
        made += write(folder, about, number, pending, loaded, images)
        pending = []
    return made


def encoded(
    settings: Embed,
    loaded: Loaded,
    images: Images,
    indices: Sequence[int],
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Iterator[Encoded]:
    """Yield images encoded, a batch at a time."""
    assert loaded.mean is not None
    assert loaded.std is not None
    backbone = loaded.backbone.to(device)
    workers = settings.data.get("workers")
    in_memory = all(source.images is not None for source in images.source.sources)
    how = Extraction(
        batch_size=settings.batch_size,
        workers=0 if in_memory else available_workers() if workers is None else int(workers),
        precision=getattr(torch, settings.precision),
        progress=progress,
    )
    normalize = Normalize(loaded.mean, loaded.std).to(device)
    for where, features in feature_batches(backbone, normalize, images.source, indices, how=how):
        yield Encoded(where, features, *most_likely(backbone, features, device, classes=loaded.classes))


@torch.no_grad()
def most_likely(
    backbone: Backbone, features: Tensor, device: torch.device, *, classes: Sequence[str] | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the most likely class (n,) of features (n, D) and its probability (n,); None without a classifier."""
    if not classes:
        return None, None
    head = backbone.model.get_classifier()
    training = head.training
    best = head.eval()(features.to(device)).float().softmax(dim=1).max(dim=1)
    head.train(training)
    return best.indices.cpu(), best.values.cpu()


def write(
    folder: Path, about: Mapping[str, Any], number: int, encoded: Sequence[Encoded], loaded: Loaded, images: Images
) -> int:
    """Write a part of what was encoded of its images; return how many images it has, unreadable ones included."""
    start = number * about["images_per_part"]
    end = min(start + about["images_per_part"], about["images"])
    where = torch.cat([one.where for one in encoded]).tolist() if encoded else []
    features = torch.cat([one.features for one in encoded]).numpy() if where else np.empty((0, about["dim"]))
    names, splits, labels = zip(*(row_of(images, index) for index in where), strict=True) if where else ((), (), ())
    predictions = probabilities = None
    if loaded.classes:
        best = [index for one in encoded if one.classes is not None for index in one.classes.tolist()]
        predictions = [as_text(loaded.classes[index]) for index in best]
        chances = [one.probabilities for one in encoded if one.probabilities is not None]
        probabilities = (torch.cat(chances) if chances else torch.empty(0)).numpy().astype(np.float32)
    rows = Rows(
        names,
        splits,
        labels if about["labeled"] else None,
        predictions,
        probabilities,
        features.astype(about["dtype"]),
        [unreadable(images, index) for index in sorted({*range(start, end)} - {*where})],
    )
    write_part(part_file(folder, number, about["format"]), rows)
    return end - start


def row_of(images: Images, index: int) -> tuple[str, str, str]:
    """Return path, split and label of an image."""
    split, source, place = images.source.place(index)
    label = ""
    if source.labels is not None:
        number = int(source.labels[place])
        label = as_text(source.classes[number]) if source.classes else str(number)
    return path_of(images, index), split, label


def path_of(images: Images, index: int) -> str:
    """Return an image's path relative to the folder of the data, with "/", or its name in its source."""
    described, root = images.source.describe(index), os.path.join(images.root, "")
    if images.root and described.startswith(root):
        described = described[len(root) :].replace(os.sep, "/")
    return as_text(described)


def unreadable(images: Images, index: int) -> tuple[str, str]:
    """Return the path of an image that could not be read, and why."""
    try:
        images.source.read(index)
    except UnreadableImage as error:
        return path_of(images, index), str(error)
    return path_of(images, index), "it could not be read at first, and can be now"
