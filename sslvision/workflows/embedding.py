"""Embedding: the features of every image in files, with its path, label and predicted class, a part file at a time.

Main memory holds one part. What is written is kept when the command is interrupted, and the same command goes on. To use
several devices, start it with torchrun: each process makes the parts of its share, and nothing is exchanged but the plan.
"""

import csv
import dataclasses
import datetime
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from rich.console import Console

from sslvision.backbones.load import Loaded, load_backbone
from sslvision.data.joined_sources import JoinedSources
from sslvision.data.source import Source, Splits, remarks_in_errors
from sslvision.data.sources.list_images import share
from sslvision.embeddings import parts as part_files
from sslvision.embeddings.parts import ABOUT, has_pyarrow, part_file
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.central_crop import choose_crop_pct, describe_crop
from sslvision.evaluation.feature_cache import data_digest, labels_digest, weights_digest
from sslvision.runs import run_files
from sslvision.runs.redaction import redact
from sslvision.system.files import require_free, written_whole
from sslvision.training.trainer import configure_torch
from sslvision.workflows.console import print_configuration, print_findings
from sslvision.workflows.embedding_settings import Embed
from sslvision.workflows.encoding_parts import Images, encode_parts
from sslvision.workflows.labeled_data import statistics_of
from sslvision.workflows.pretraining import decided_from, open_splits, read_as_in_training
from sslvision.workflows.probing import Process, join_processes, open_backbone

FORMAT = 2  # of the files; part of the key
PATIENCE = datetime.timedelta(days=30)  # for the other processes, which may have more to do

CONTENTS = """\
# {name}

Made by `{command}`. The same command goes on where it stopped.

| file | what it is |
| --- | --- |
| embeddings/ | a row for each image: path, split, label, prediction, probability, embedding. `pandas.read_parquet(folder)` |
| embeddings.json | the weights, the preprocessing, the images and the classes |
| unreadable.csv | images that could not be read, if there were any |
| config.yaml, environment.json | all settings; versions, git commit and hardware |
| vectors*.npy | made by search, duplicates, outliers, select and cluster; may be deleted at any time |
"""


def embed(settings: Embed, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Write the embeddings of images.

    Args:
        settings: All settings.
        folder: Where they go.
        words: The command line, for the record.

    Returns:
        The content of results.json; empty in all processes but the first.

    Raises:
        UsageError, DataError: There are no such weights or images; the folder holds something else; pyarrow is missing.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    form = file_format(settings)
    process = join_processes(settings, timeout=PATIENCE)
    configure_torch(process.device.type)
    loaded, images = open_model_and_images(settings)
    plan: list[Any] = [None]
    if process.rank == 0:
        plan = [begin(settings, folder, words, loaded, images, form, console, process)]
    if process.world_size > 1:
        dist.broadcast_object_list(plan)
    about, missing = plan[0]
    made = encode_parts(settings, folder, about, missing[process.rank :: process.world_size], loaded, images, process)
    if process.world_size > 1:
        dist.barrier()
    if process.rank:
        return {}
    results = finish(folder, about, images, seconds=time.perf_counter() - started, made=made * process.world_size)
    print_end(console, folder, results)
    return results


def file_format(settings: Embed) -> str:
    """Return the format of the files. Raises UsageError if it is Parquet and pyarrow is not installed."""
    if settings.format == "parquet":
        part_files.pyarrow_parquet(why="format=parquet")
    return settings.format or ("parquet" if has_pyarrow() else "npz")


def open_model_and_images(settings: Embed) -> tuple[Loaded, Images]:
    """Load the backbone and open the images as it reads them."""
    run = settings.run or ""
    loaded = load_backbone(run, **settings.backbone) if settings.pretrained else open_backbone(settings)
    data = read_as_in_training(settings.data, run)
    splits = open_splits({**data, "channels": loaded.backbone.channels})
    settings.data |= decided_from(splits)
    images = chosen_images(settings, splits)
    mean, std = statistics_of(loaded, splits.train, settings.data)
    if loaded.backbone.crop_pct is None:
        loaded.backbone.crop_pct = choose_crop_pct(images.source.sources, loaded.backbone.image_size)
    return loaded._replace(mean=mean, std=std), images


def chosen_images(settings: Embed, splits: Splits) -> Images:
    """Return the images of all splits, or of one. Raises DataError if there are none."""
    sources: dict[str, Source] = {
        name: source
        for name in ("train", "validation", "test")
        if (source := getattr(splits, name)) is not None and len(source) and settings.split in ("all", name)
    }
    if not sources:
        with remarks_in_errors(splits.remarks):
            raise DataError(f"split={settings.split}: the data have no such images. split=all takes all of them.")
    root = settings.data.get("root")
    return Images(JoinedSources(sources), os.path.abspath(os.path.expanduser(root)) if root else "", splits.remarks)


def begin(
    settings: Embed,
    folder: Path,
    words: Sequence[str],
    loaded: Loaded,
    images: Images,
    form: str,
    console: Console,
    process: Process,
) -> tuple[dict[str, Any], list[int]]:
    """Claim the folder and describe what will be in it; return the description and the numbers of the parts to make.

    Raises:
        UsageError: The folder holds other embeddings, or something else.
    """
    about = describe(settings, words, loaded, images, form, process)
    before = None
    if (folder / ABOUT).is_file() and not settings.overwrite:
        before = part_files.read_about(folder)
        refuse_others(folder, before, about if settings.format else {**about, "format": before.get("format")})
        about |= {key: before[key] for key in ("images_per_part", "format")}
    print_configuration(console, effective_configuration(settings, loaded, about, process), title=folder.name)
    print_findings(console, images.remarks)
    missing = [
        number
        for number in range(part_files.number_of_parts(about))
        if before is None or not part_files.is_whole(part_file(folder, number, about["format"]))
    ]
    needed = len(missing) * about["images_per_part"] * about["dim"] * np.dtype(about["dtype"]).itemsize
    require_free(folder, needed, "The embeddings", advice="set dtype=float16, or give another output_dir")
    run_files.claim(folder, overwrite=settings.overwrite, resume=before is not None, figures=False)
    with written_whole(folder / ABOUT, "w", encoding="utf-8", errors="backslashreplace") as opened:
        opened.write(json.dumps(about, indent=2, ensure_ascii=False) + "\n")
    run_files.describe(folder, dataclasses.asdict(settings), words, command="embed", contents=CONTENTS)
    if before is not None:
        total = part_files.number_of_parts(about)
        console.print(f"{total - len(missing):,} of {total:,} files are there already; {len(missing):,} are made now.")
    return about, missing


def describe(
    settings: Embed, words: Sequence[str], loaded: Loaded, images: Images, form: str, process: Process
) -> dict[str, Any]:
    """Return what embeddings.json says; its `key` is a hash of all that determines the embeddings."""
    backbone, source = loaded.backbone, images.source
    identity = {
        "version": FORMAT,
        "weights": weights_digest(backbone),
        "image_size": list(backbone.image_size),
        "crop_pct": backbone.crop_pct,
        "mean": loaded.mean,
        "std": loaded.std,
        "precision": settings.precision,
        "dtype": settings.dtype,
        "splits": {
            name: [len(one), data_digest(one, range(len(one)))[0]]
            for name, one in zip(source.names, source.sources, strict=True)
        },
        "labels": {name: labels_digest(one) for name, one in zip(source.names, source.sources, strict=True)},
    }
    classes = next((one.classes for one in source.sources if one.classes), None)
    return {
        **identity,
        "key": sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32],
        "format": form,
        "images": len(source),
        "images_per_part": min(settings.images_per_part, -(-len(source) // process.world_size)),
        "dim": backbone.embed_dim,
        "channels": backbone.channels,
        "labeled": any(one.labels is not None for one in source.sources),
        "classes": classes and list(classes),
        "predicted_classes": loaded.classes and list(loaded.classes),
        "root": images.root,
        "run": os.path.abspath(settings.run or "") if os.path.exists(settings.run or "") else settings.run,
        "pretrained": settings.pretrained,
        "seed": settings.seed,
        "backbone": settings.backbone,
        "data": redact(settings.data),
        "source": loaded.weights,
        "command": shlex.join(["python", "-m", "sslvision.embed", *redact(list(words))]),
    }


def refuse_others(folder: Path, before: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raise UsageError if the embeddings in a folder are others than those to be made, with what differs."""
    if all(before.get(key) == about[key] for key in ("key", "format")):
        return
    names = {"weights": "the weights", "splits": "the images", "labels": "the labels"}
    keys = ["weights", "splits", "image_size", "crop_pct", "mean", "std", "precision", "dtype", "format"]
    keys += ["labels"] if "labels" in before else []  # not in files of version 1
    differing = [names.get(key, key) for key in keys if before.get(key) != about[key]] or ["the version of the files"]
    raise UsageError(
        f"{folder} holds other embeddings: {', '.join(differing)} differ. Replace them with overwrite=true, or give another "
        "name=."
    )


def effective_configuration(
    settings: Embed, loaded: Loaded, about: Mapping[str, Any], process: Process
) -> dict[str, str]:
    """Return the configuration in effect, for the user to check."""
    backbone, counts = loaded.backbone, {name: count for name, (count, _) in about["splits"].items()}
    parts = part_files.number_of_parts(about)
    size = about["images"] * about["dim"] * np.dtype(about["dtype"]).itemsize
    several = f" x {process.world_size}" if process.world_size > 1 else ""
    return {
        "weights": loaded.weights,
        "backbone": f"{type(backbone.model).__name__} on {backbone.channels}x{backbone.image_size[0]}x{backbone.image_size[1]}"
        + (f", classifier of {len(loaded.classes):,} classes" if loaded.classes else ""),
        "images": f"{about['images']:,}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}",
        "evaluation": describe_crop(backbone.crop_pct, backbone.image_size),
        "files": f"{parts:,} x {about['format']}, {size / 1e6:,.1f} MB of {about['dtype']}, {about['dim']:,} for each image",
        "device": f"{process.device}{several}, precision {settings.precision}",
    }


def finish(folder: Path, about: Mapping[str, Any], images: Images, *, seconds: float, made: int) -> dict[str, Any]:
    """Write what was found in all parts, and return the results.

    Raises:
        DataError: None of the images could be read.
    """
    count, lost = 0, list[tuple[str, str]]()
    for number in range(part_files.number_of_parts(about)):
        rows = part_files.read_part(part_file(folder, number, about["format"]))
        count += len(rows.paths)
        lost += rows.unreadable
    if lost:
        with written_whole(folder / "unreadable.csv", "w", newline="", encoding="utf-8") as opened:
            csv.writer(opened).writerows([("path", "problem"), *lost])
    if not count:
        raise DataError(f"None of {len(lost):,} images can be read; the first: {lost[0][0]} ({lost[0][1]}).")
    findings = list(images.remarks)
    if lost:
        told = f"{share(len(lost), about['images'], 'images')} cannot be read, and were left out: unreadable.csv."
        findings.append(f"{told} The first: {lost[0][0]} ({lost[0][1]}).")
    results = {
        "images": count,
        "unreadable": len(lost),
        "dim": about["dim"],
        "dtype": about["dtype"],
        "format": about["format"],
        "files": part_files.number_of_parts(about),
        "weights": about["source"],
        "crop_pct": about["crop_pct"],
        "findings": findings,
        "seconds": round(seconds, 1),
        "images_per_second": round(min(made, about["images"]) / seconds, 1),
    }
    run_files.write_json(folder / "results.json", results)
    return results


def print_end(console: Console, folder: Path, results: Mapping[str, Any]) -> None:
    """Print what was written, and what can be done with it."""
    if results["unreadable"]:
        print_findings(console, results["findings"][-1:])
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    console.print(
        f"{results['images']:,} embeddings of {results['dim']:,} numbers in {results['seconds']:.0f} s: "
        f"{folder / part_files.PARTS}"
    )
    given = shlex.quote(f"embeddings={shown}")
    for verb, rest in (
        ("search", " image=..."),
        ("duplicates", ""),
        ("outliers", ""),
        ("select", " n=100"),
        ("cluster", ""),
    ):
        console.print(f"  sslvision {verb} {given}{rest}", markup=False)
