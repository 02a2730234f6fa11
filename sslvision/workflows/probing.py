"""Probing: k-NN and a linear probe on frozen features of labeled images, by a protocol that the result names.

Features are computed once for each network and data set, and cached in files; a second protocol on them takes seconds. To
use several devices, start it with torchrun: each process computes its share of the features, and the first does the rest.
"""

import atexit
import dataclasses
import datetime
import os
import time
from collections.abc import Sequence, Sized
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
from sslvision.data.sources.list_images import share
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.central_crop import choose_crop_pct, describe_crop
from sslvision.evaluation.confidence import Scores, as_json, score
from sslvision.evaluation.evaluate import evaluate_pixels, has_labels, size_of_pixels, why_not_evaluated
from sslvision.evaluation.feature_cache import cached_features, cached_views
from sslvision.evaluation.features import POOLED, Extraction, FeatureKind, dino_features, sample_indices
from sslvision.evaluation.knn import SIMILARITIES_AT_ONCE, knn_rankings
from sslvision.evaluation.placement import place_for
from sslvision.evaluation.probe_protocols import PROTOCOLS, run_protocol
from sslvision.evaluation.rankme import rankme
from sslvision.figures.confusion import save_confusion
from sslvision.nn.normalize import Normalize
from sslvision.runs import run_files
from sslvision.settings import Probe
from sslvision.training.trainer import configure_torch, select_device
from sslvision.workflows.console import print_classifiers, print_configuration, print_findings
from sslvision.workflows.embedding_settings import Embed
from sslvision.workflows.labeled_data import statistics_of, untrained_backbone
from sslvision.workflows.pretraining import decided_from, open_splits, read_as_in_training
from sslvision.workflows.reporting import reports

KNN, LINEAR = "k-NN, k = {}", "linear probe ({})"  # names in the table
PIXELS_OF = 10_000  # images at most, whose pixels are compared
RANKME_OF = 50_000  # images at most, a random sample: they are sorted by class

CONTENTS = """\
# {name}

Made by `{command}`. The same command overwrites it.

| file | what it is |
| --- | --- |
| report.html | all of it to look at: scores, curves, pictures, settings; opens in a browser without a network |
| results.json | top-1 with its 95 % interval, top-5 and per-class accuracy; the protocol and how it differs from the paper's |
| confusion.png | confusion matrix of the linear probe |
| config.yaml, environment.json | all settings; versions, git commit and hardware |
"""


@dataclasses.dataclass(frozen=True)
class Process:
    """The rank of this process among those that torchrun started, and its device."""

    rank: int
    world_size: int
    device: torch.device


@dataclasses.dataclass(frozen=True)
class LabeledFeatures:
    """Features of labeled images.

    Attributes:
        pooled: (N, D), the backbone's own feature, for k-NN.
        linear: (N, F), the feature of the linear probe's protocol.
        views: The same for random crops, if the protocol uses any.
        labels: (N,).
    """

    pooled: Tensor
    linear: Tensor
    views: list[Tensor]
    labels: Tensor


@reports
def probe(settings: Probe, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate frozen features, and write the results.

    Args:
        settings: All settings.
        folder: Where results go.
        words: The command line, for the record.

    Returns:
        The content of results.json; empty in all processes but the first.

    Raises:
        UsageError, DataError: There are no such weights or images, or the images have no labels.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    protocol = PROTOCOLS[settings.protocol]
    if settings.views > 1 and protocol.optimizer == "lbfgs":
        raise UsageError(
            f"views={settings.views}: protocol fast uses whole images once; views are for protocol=mae and dino."
        )
    process = join_processes(settings)
    configure_torch(process.device.type)
    loaded = open_backbone(settings)
    splits = open_labeled_splits(settings, channels=loaded.backbone.channels)
    mean, std = statistics_of(loaded, splits.train, settings.data)
    loaded = loaded._replace(mean=mean, std=std)
    if loaded.backbone.crop_pct is None:
        loaded.backbone.crop_pct = choose_crop_pct([splits.train, splits.test], loaded.backbone.image_size)
    if process.rank == 0:
        print_configuration(
            console, effective_configuration(settings, loaded, splits, process.device), title=folder.name
        )
        print_findings(console, splits.remarks)
    assert splits.train.labels is not None
    assert splits.test is not None
    indices = sample_indices(splits.train, settings.train_images or len(splits.train), seed=settings.seed)
    train = labeled_features(settings, loaded, splits.train, indices, settings.views, process, console)
    test = labeled_features(settings, loaded, splits.test, range(len(splits.test)), 1, process, console)
    if process.rank:
        return {}
    classes = splits.train.classes or tuple(map(str, range(int(splits.train.labels.max()) + 1)))
    scores, facts = score_features(settings, train, test, classes=len(classes), device=process.device)
    print_classifiers(console, scores, title=f"Frozen features, accuracy on {len(test.labels):,} test images")
    pixels = {}
    if settings.pixels:
        size = loaded.backbone.image_size
        crop_pct = loaded.backbone.crop_pct
        pixels = score_pixels(settings, splits, size, crop_pct, len(indices), process.device, console)
    linear = scores[LINEAR.format(settings.protocol)]
    unreadable = unreadable_among(training=(indices, train), test=(splits.test, test))
    findings = [*splits.remarks, *unreadable]
    sampled = sample_indices(train.pooled, RANKME_OF, seed=settings.seed)
    results = {
        "linear": facts | as_json(linear, classes),
        "knn": {str(k): as_json(scores[KNN.format(k)], classes) for k in settings.k},
        "rankme": round(rankme(train.pooled[sampled]), 2),
        "pixels": {name: round(value, 2) for name, value in pixels.items()},
        "weights": loaded.weights,
        "crop_pct": loaded.backbone.crop_pct,
        "train_images": len(train.labels),
        "test_images": len(test.labels),
        "findings": findings,
        "seconds": round(time.perf_counter() - started, 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    run_files.describe(folder, dataclasses.asdict(settings), words, command="probe", contents=CONTENTS)
    run_files.write_json(folder / "results.json", results)
    title = f"Confusion matrix of the linear probe, protocol {protocol.name}"
    told = save_confusion(linear.confusion, classes, folder / "confusion.png", title=title)
    print_findings(console, [*unreadable, *([told] if told else [])])
    for deviation in facts.get("deviations", []):
        console.print(f"[dim]Deviation from the paper: {deviation}.[/]")
    console.print(
        f"Finished in {results['seconds']:.0f} s. Results are in {folder}, features in {settings.features_dir}."
    )
    return results


def open_labeled_splits(settings: Probe, *, channels: int) -> Splits:
    """Open the images, and note in the settings what was decided of them. Raises DataError if they have no labels."""
    data = read_as_in_training(settings.data, settings.run or "")
    splits = open_splits({**data, "channels": channels})
    settings.data |= decided_from(splits)
    if not has_labels(splits):
        raise DataError(
            f"{why_not_evaluated(splits)}, so there is nothing to measure by: a folder needs a sub-folder for each class, and "
            f"val/ or data.holdout above 0.{''.join(f' {remark}' for remark in splits.remarks)}"
        )
    return splits


def join_processes(settings: Probe | Embed, *, timeout: datetime.timedelta | None = None) -> Process:
    """Join the processes that torchrun started, if it did.

    Args:
        settings: All settings.
        timeout: How long a process waits for the others; by default torch's half an hour.
    """
    device, world_size = select_device(settings.device), int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        return Process(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)  # features are exchanged through main memory
        atexit.register(dist.destroy_process_group)
    return Process(dist.get_rank(), world_size, device)


def open_backbone(settings: Probe | Embed) -> Loaded:
    """Return the backbone of `run`, pretrained or as it was before pretraining."""
    run, options = settings.run or "", settings.backbone
    loaded = load_backbone(run, head=False, **{"pretrained": settings.pretrained, "seed": settings.seed, **options})
    untrained = None if settings.pretrained else untrained_backbone(run, seed=settings.seed, **options)
    if untrained is None:
        return loaded
    untrained.crop_pct = loaded.backbone.crop_pct
    return loaded._replace(backbone=untrained, weights=f"random, as {settings.run} was before pretraining")


def effective_configuration(settings: Probe, loaded: Loaded, splits: Splits, device: torch.device) -> dict[str, str]:
    """Return the configuration in effect, for the user to check."""
    backbone, protocol = loaded.backbone, PROTOCOLS[settings.protocol]
    assert splits.test is not None
    used = min(settings.train_images or len(splits.train), len(splits.train))
    return {
        "weights": loaded.weights,
        "backbone": f"{type(backbone.model).__name__} on {backbone.channels}x{backbone.image_size[0]}x{backbone.image_size[1]}",
        "images": f"{splits.train.name}: {used:,} for training, {len(splits.test):,} for testing",
        "evaluation": describe_crop(backbone.crop_pct, backbone.image_size),
        "linear probe": f"{protocol.name}: {protocol.source}",
        "device": str(device),
    }


def labeled_features(
    settings: Probe,
    loaded: Loaded,
    source: Source,
    indices: Sequence[int],
    views: int,
    process: Process,
    console: Console,
) -> LabeledFeatures:
    """Compute the features of some images of a source, or read them from the cache."""
    backbone = loaded.backbone.to(process.device)
    assert loaded.mean is not None
    assert loaded.std is not None
    kind = dino_features(backbone) if settings.protocol == "dino" else POOLED
    if settings.last_blocks is not None:
        kind = FeatureKind(settings.last_blocks)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} images"),
    )
    hidden = process.rank > 0 or not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bars:
        bar = bars.add_task(f"features of {source.name}", total=len(indices))
        how = Extraction(
            batch_size=settings.batch_size,
            workers=workers_of(settings),
            rank=process.rank,
            world_size=process.world_size,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
        given = (backbone, Normalize(loaded.mean, loaded.std).to(process.device), source, indices)
        cache = Path(settings.features_dir)
        read, pooled = cached_features(*given, how=how, folder=cache)
        linear: Tensor = pooled
        crops: list[Tensor] = []
        if kind.last_blocks:
            _, linear = cached_features(*given, kind, how, folder=cache)
        if views > 1:
            crop = Crop(backbone.image_size, PROTOCOLS[settings.protocol].crop_scale, flip=True)
            _, crops = cached_views(*given, kind, how, folder=cache, crop=crop, views=views, seed=settings.seed)
    assert source.labels is not None
    return LabeledFeatures(pooled, linear, crops, source.labels[read])


def workers_of(settings: Probe) -> int:
    """Return the number of loader processes."""
    workers = settings.data.get("workers")
    return available_workers() if workers is None else int(workers)


def score_features(
    settings: Probe, train: LabeledFeatures, test: LabeledFeatures, *, classes: int, device: torch.device
) -> tuple[dict[str, Scores], dict[str, Any]]:
    """Return the scores of k-NN for every k and of the linear probe, and the facts of its protocol."""
    where = place_for(device, 3 * train.pooled.nbytes + 8 * SIMILARITIES_AT_ONCE)
    rankings = knn_rankings(train.pooled.to(where), train.labels, test.pooled, ks=settings.k, num_classes=classes)
    scores = {KNN.format(k): score(ranking, test.labels, classes=classes) for k, ranking in rankings.items()}
    ranking, facts = run_protocol(
        PROTOCOLS[settings.protocol],
        train.views or train.linear,
        train.labels,
        test.linear,
        num_classes=classes,
        seed=settings.seed,
        device=device,
    )
    return scores | {LINEAR.format(settings.protocol): score(ranking, test.labels, classes=classes)}, facts


def score_pixels(
    settings: Probe,
    splits: Splits,
    size: tuple[int, int],
    crop_pct: float | None,
    images: int,
    device: torch.device,
    console: Console,
) -> dict[str, float]:
    """Return and print the scores of raw pixels, for comparison with a backbone of this image size and crop."""
    pixels = evaluate_pixels(
        splits,
        size,
        crop_pct=crop_pct,
        at_most=min(images, PIXELS_OF),
        test_at_most=PIXELS_OF,
        seed=settings.seed,
        workers=workers_of(settings),
        device=device,
    )
    del pixels["unreadable_share"]  # told of the features
    height, width = size_of_pixels(size)
    console.print(
        f"Raw pixels at {height}x{width}, for comparison: k-NN (k = 20) {pixels['knn_top1']:.1f} %, logistic regression "
        f"{pixels['linear_top1']:.1f} % of {pixels['held_out']:,.0f} test images."
    )
    return pixels


def unreadable_among(**read: tuple[Sized, LabeledFeatures]) -> list[str]:
    """Return in sentences how many images could not be read. A keyword is their name, and has them and their features."""
    return [
        f"{share(missing, len(images), f'{name} images')} cannot be read, and were left out."
        for name, (images, features) in read.items()
        if (missing := len(images) - len(features.labels))
    ]
