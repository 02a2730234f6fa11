"""How good are frozen features: k-NN and a linear probe, on labeled images, by a protocol that the result names.

Features are computed once for each network and data set, and kept in files; a second protocol on them takes seconds. On
several devices run it by torchrun: each process computes its share of the features, and the first does the rest.
"""

import atexit
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from sslvision.augment.crops import Crop
from sslvision.backbones.load import Loaded, load_backbone
from sslvision.data.datamodule import available_workers
from sslvision.data.source import Source, Splits
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.evaluate import evaluate_pixels, has_labels
from sslvision.evaluation.feature_cache import cached_features, cached_views
from sslvision.evaluation.features import chosen_indices, dino_features
from sslvision.evaluation.knn import SIMILARITIES_AT_ONCE, knn_rankings
from sslvision.evaluation.placement import place_for
from sslvision.evaluation.protocols import PROTOCOLS, run_protocol
from sslvision.evaluation.rankme import rankme
from sslvision.evaluation.scores import Scores, as_json, score
from sslvision.figures.confusion import confusion_figure
from sslvision.nn.normalize import Normalize
from sslvision.runs import run_folder
from sslvision.settings import Probe
from sslvision.training.trainer import configure_torch, select_device
from sslvision.workflows.console import print_classifiers, print_configuration
from sslvision.workflows.labeled_data import statistics_of, untrained_backbone
from sslvision.workflows.pretraining import open_splits

KNN, LINEAR = "k-NN, k = {}", "linear probe ({})"  # what the table calls them
PIXELS_OF = 10_000  # images at most, whose pixels are compared

CONTENTS = """\
# {name}

Made by `{command}`. The same command overwrites it.

| file | what it is |
| --- | --- |
| results.json | top-1 with its 95 % interval, top-5 and per-class accuracy; the protocol and how it differs from the paper's |
| confusion.png | confusion matrix of the linear probe |
| config.yaml, environment.json | every setting; versions, git commit and hardware |
"""


def probe(config: Probe, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Measure, print and write down what the features are worth.

    Returns:
        What results.json holds; in all processes but the first, nothing.

    Raises:
        UsageError, DataError: no such weights or images, or images without labels.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    protocol = PROTOCOLS[config.protocol]
    if config.views > 1 and protocol.optimizer == "lbfgs":
        raise UsageError(
            f"views={config.views}: protocol fast sees whole images once; views are for protocol=mae and dino."
        )
    rank, world, device = join(config)
    configure_torch(device.type)
    loaded = open_backbone(config)
    splits = open_splits({**config.data, "channels": loaded.backbone.channels})
    if not has_labels(splits):
        raise DataError(
            f"{splits.train.name} has no labels to measure by: a folder needs a sub-folder for each class, and val/ or "
            "data.holdout above 0."
        )
    classes = splits.train.classes or tuple(map(str, range(int(splits.train.labels.max()) + 1)))  # type: ignore[union-attr]
    mean, std = statistics_of(loaded, splits.train, config.data)
    loaded = loaded._replace(mean=mean, std=std)
    if rank == 0:
        print_configuration(console, configuration(config, loaded, splits, device), title=folder.name)
    assert splits.test is not None
    indices = chosen_indices(splits.train, config.train_images or len(splits.train), seed=config.seed)
    spread: dict[str, Any] = {"device": device, "rank": rank, "world": world, "console": console}
    train = features(config, loaded, splits.train, indices, views=config.views, **spread)
    test = features(config, loaded, splits.test, range(len(splits.test)), views=1, **spread)
    if rank:
        return {}
    scores, told = classify(config, train, test, classes=len(classes), device=device)
    print_classifiers(console, scores, title=f"How good are the features, on {len(test.labels):,} test images?")
    pixels: dict[str, float] = {}
    if config.pixels:
        at_most = min(len(indices), PIXELS_OF)
        pixels = evaluate_pixels(splits, at_most=at_most, seed=config.seed, workers=workers_of(config), device=device)
        console.print(
            f"Raw pixels at 32x32, for comparison: k-NN (k = 20) {pixels['knn_top1']:.1f} %, logistic regression "
            f"{pixels['linear_top1']:.1f} %."
        )
    results = {
        "linear": told | as_json(scores[LINEAR.format(config.protocol)], classes),
        "knn": {str(k): as_json(scores[KNN.format(k)], classes) for k in config.k},
        "rankme": round(rankme(train.pooled[:50_000]), 2),
        "pixels": {name: round(value, 2) for name, value in pixels.items()},
        "weights": loaded.weights,
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.describe(folder, dataclasses.asdict(config), words, command="probe", contents=CONTENTS)
    run_folder.write_json(folder / "results.json", results)
    title = f"Linear probe, protocol {protocol.name}: confusion matrix"
    confusion = scores[LINEAR.format(config.protocol)].confusion
    confusion_figure(confusion, classes, title=title).savefig(folder / "confusion.png")
    for what, found, asked in (("training", train, indices), ("test", test, splits.test)):
        if len(found.labels) < len(asked):
            console.print(
                f"[yellow]{len(asked) - len(found.labels):,} {what} images cannot be read, and were left out.[/]"
            )
    for deviation in told.get("deviations", []):
        console.print(f"[dim]Not as in the paper: {deviation}.[/]")
    console.print(f"{results['seconds']:.0f} s in all. Results are in {folder}, features in {config.features_dir}.")
    return results


def open_backbone(config: Probe) -> Loaded:
    """Return the backbone that `run` means, pretrained or as it was before."""
    loaded = load_backbone(config.run or "", head=False, **{"pretrained": config.pretrained, **config.backbone})
    before = None if config.pretrained else untrained_backbone(config.run or "", seed=config.seed, **config.backbone)
    if before is None:
        return loaded
    return loaded._replace(backbone=before, weights=f"random, as {config.run} was before pretraining")


@dataclasses.dataclass(frozen=True)
class Labeled:
    """Features of labeled images.

    Attributes:
        pooled: (N, D), the backbone's own, for k-NN.
        linear: (N, F), those of the linear probe's protocol.
        views: the same of random crops, if the protocol asks for any.
        labels: (N,).
    """

    pooled: Tensor
    linear: Tensor
    views: list[Tensor]
    labels: Tensor


def features(
    config: Probe,
    loaded: Loaded,
    source: Source,
    indices: Sequence[int],
    *,
    views: int,
    device: torch.device,
    rank: int,
    world: int,
    console: Console,
) -> Labeled:
    """Compute the features of some images of a source, or read them where they are kept."""
    backbone = loaded.backbone.to(device)
    assert loaded.mean is not None
    assert loaded.std is not None
    last_blocks, patch_mean = dino_features(backbone) if config.protocol == "dino" else (0, False)
    if config.last_blocks is not None:
        last_blocks, patch_mean = config.last_blocks, False
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
    )
    hidden = rank > 0 or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bars:
        bar = bars.add_task(f"features of {source.name}", total=len(indices))
        options: dict[str, Any] = {
            "folder": Path(config.features_dir),
            "batch_size": config.batch_size,
            "workers": workers_of(config),
            "rank": rank,
            "world": world,
            "progress": lambda done, total: bars.update(bar, completed=done, total=total),
        }
        which = (backbone, Normalize(loaded.mean, loaded.std).to(device), source, indices)
        found, pooled = cached_features(*which, **options)
        linear: Tensor = pooled
        crops: list[Tensor] = []
        if last_blocks:
            options |= {"last_blocks": last_blocks, "patch_mean": patch_mean}
            _, linear = cached_features(*which, **options)
        if views > 1:
            crop = Crop(backbone.image_size[0], PROTOCOLS[config.protocol].crop_scale, flip=True)
            _, crops = cached_views(*which, **options, crop=crop, views=views, seed=config.seed)
    assert source.labels is not None
    return Labeled(pooled, linear, crops, source.labels[found])


def classify(
    config: Probe, train: Labeled, test: Labeled, *, classes: int, device: torch.device
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Return the scores of k-NN for every k and of the linear probe, and what its protocol has to tell."""
    where = place_for(device, 3 * train.pooled.nbytes + 8 * SIMILARITIES_AT_ONCE)
    rankings = knn_rankings(train.pooled.to(where), train.labels, test.pooled, ks=config.k, num_classes=classes)
    scores = {KNN.format(k): score(ranking, test.labels, classes=classes) for k, ranking in rankings.items()}
    ranking, told = run_protocol(
        PROTOCOLS[config.protocol],
        train.views or train.linear,
        train.labels,
        test.linear,
        num_classes=classes,
        seed=config.seed,
        device=device,
    )
    return scores | {LINEAR.format(config.protocol): score(ranking, test.labels, classes=classes)}, told


def workers_of(config: Probe) -> int:
    """Return the loader processes to use."""
    workers = config.data.get("workers")
    return available_workers() if workers is None else int(workers)


def join(config: Probe) -> tuple[int, int, torch.device]:
    """Join the processes that torchrun started, if it did: return this one's number, how many there are, and its device."""
    device, world = select_device(config.device), int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("gloo")  # features travel through main memory
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), world, device


def configuration(config: Probe, loaded: Loaded, splits: Splits, device: torch.device) -> dict[str, str]:
    """Return what will happen, in the terms a person checks."""
    backbone, protocol = loaded.backbone, PROTOCOLS[config.protocol]
    assert splits.test is not None
    used = min(config.train_images or len(splits.train), len(splits.train))
    return {
        "weights": loaded.weights,
        "backbone": f"{type(backbone.model).__name__} on {backbone.channels}x{backbone.image_size[0]}x{backbone.image_size[1]}",
        "images": f"{splits.train.name}: {used:,} to learn from, {len(splits.test):,} to score by",
        "linear probe": f"{protocol.name}: {protocol.source}",
        "device": str(device),
    }
