"""A cache of features on disk: features are computed once and read afterwards, until something that determines them changes.

A cache is two files in a folder. `<key>.npy` contains the features, float32, which are mapped into memory instead of read as
a whole. `<key>.json` describes them. The key is a hash of

- the backbone: every byte of its weights, and every number in its modules (heads, windows, pooling, epsilons);
- the normalization, the kind of feature, the precision, and the random crop, if any;
- the images: all pixels of a source in memory; for image files the paths, sizes and modification times instead of the
  contents, so a file that changes with the same size and time goes unnoticed; for other sources the name, the length and
  the labels. For all but sources in memory also the pixels of nine images.

Batch size, loader processes, number of processes and kind of device are not part of it: they change only rounding.
Files appear complete or not at all. A process that is killed leaves a `.tmp` file, which may be deleted.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sslvision.augment.crops import Crop
from sslvision.backbones.backbone import Backbone
from sslvision.data.source import Source, SourceGone, UnreadableImage
from sslvision.errors import UsageError
from sslvision.evaluation.features import (
    DEFAULT,
    POOLED,
    Extraction,
    FeatureKind,
    RandomCrops,
    feature_batches,
    feature_dim,
    has_class_token,
)
from sslvision.nn.normalize import Normalize
from sslvision.system.files import require_free, written_whole

TRIED = 16  # images that could not be read, which are tried again
FORMAT = 2  # part of the key: increase it when the same settings give other features


class Digests(NamedTuple):
    """Hashes of a backbone, of the requested indices and of their images, and what the last hash covers, in words."""

    weights: str
    indices: str
    images: str
    images_covered: str


def cached_features(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    indices: Sequence[int],
    kind: FeatureKind = POOLED,
    how: Extraction = DEFAULT,
    *,
    folder: Path,
    digests: Digests | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the result of `extract_features`, read from `folder` if it is cached there, and written to it otherwise.

    The features (N, F) are mapped from the file: writing to them does not change the file, and main memory holds one batch
    of them at a time. With several processes the first one writes, to a folder that all of them can read.

    Args:
        backbone, normalize, source, indices, kind, how: Arguments of `extract_features`.
        folder: Where features are cached.
        digests: Digests of this backbone and these images, if they are known.

    Raises:
        UsageError: As in `extract_features`.
        StorageError: The disk has too little free space.
    """
    indices = sorted(indices)
    width = feature_dim(backbone, kind)
    images = source.source if isinstance(source, RandomCrops) else source
    plan: list[Any] = [None, False]  # the description of the cache, and whether it exists
    if how.rank == 0:
        about = description(
            backbone, normalize, source, kind, how.precision, digests or digests_of(backbone, source, indices)
        )
        plan = [about, _read(folder, about, indices, retry=images) is not None]
    if how.world_size > 1:
        dist.broadcast_object_list(plan)
    about, exists = plan
    if not exists:
        advice = "give another folder, or use fewer images or views"
        require_free(folder, len(indices) * width * 4, "The features", advice=advice)
        batches = feature_batches(backbone, normalize, source, indices, kind, how)
        if how.rank == 0:
            _write(folder, about, batches, indices, width)
        else:
            for _ in batches:  # computes this process's share and sends it to the first one
                pass
        if how.world_size > 1:
            dist.barrier()
    cached = _read(folder, about, indices)
    if cached is None:
        raise UsageError(
            f"Process {how.rank} cannot read the features that the first process wrote to {folder}: use a folder on a disk "
            "that all processes share."
        )
    return cached


def cached_views(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    indices: Sequence[int],
    kind: FeatureKind = POOLED,
    how: Extraction = DEFAULT,
    *,
    folder: Path,
    crop: Crop,
    views: int,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor]]:
    """Return indices (N,) and `views` times the features (N, F), of the random crops of epochs 0, 1, ...

    Each view has a cache of its own, so that further views can be added.

    Args:
        backbone, normalize, source, indices, kind, how: Arguments of `extract_features`.
        folder: Where features are cached.
        crop: Distribution of the random crops.
        views: Number of views.
        seed: Seed for the crops.

    Raises:
        UsageError: As in `extract_features`, or an image can be read for one view and not for another.
        StorageError: The disk has too little free space.
    """
    digests = digests_of(backbone, source, indices)
    found = [
        cached_features(
            *(backbone, normalize, RandomCrops(source, crop, seed, epoch), indices, kind, how),
            folder=folder,
            digests=digests,
        )
        for epoch in range(views)
    ]
    where = found[0][0]
    if not all(torch.equal(where, others) for others, _ in found):
        raise UsageError(
            f"Some images of {source.name} could be read for one view and not for another, so their disk may be failing. "
            f"Delete {folder} and try again."
        )
    return where, [features for _, features in found]


def description(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    kind: FeatureKind,
    precision: torch.dtype,
    digests: Digests,
) -> dict[str, Any]:
    """Describe features, in words and hashes; the cache's `key` is a hash of all of it, so these words must not change."""
    crops = source if isinstance(source, RandomCrops) else None
    words = "the backbone's pooled feature"
    if kind.last_blocks and has_class_token(backbone):
        words = f"class tokens of the last {kind.last_blocks} blocks" + ", mean of the patch tokens" * kind.patch_mean
    about = {
        "format": FORMAT,
        "features": words,
        "seen": "a random crop" if crops else "the whole image, resized and cut centrally",
        "crop": crops and {**asdict(crops.crop), "seed": crops.seed, "epoch": crops.epoch},
        "precision": str(precision).removeprefix("torch."),
        "image_size": list(backbone.image_size),
        "mean": normalize.mean.tolist(),
        "std": normalize.std.tolist(),
        "backbone": type(backbone.model).__name__,
        "source": source.name,
        **digests._asdict(),
    }
    return {"key": sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32], **about}


def digests_of(backbone: Backbone, source: Source, indices: Sequence[int]) -> Digests:
    """Return hashes of the backbone and the images; random crops are described by the images they are cut from."""
    indices = sorted(indices)
    images = source.source if isinstance(source, RandomCrops) else source
    chosen = sha256(_bytes(torch.tensor(indices, dtype=torch.int64))).hexdigest()
    return Digests(weights_digest(backbone), chosen, *data_digest(images, indices))


def weights_digest(backbone: Backbone) -> str:
    """Return a hash of all parameters, buffers and numeric attributes of the modules.

    ViT-B (344 MB) takes 0.2 s on one core.
    """
    digest = sha256()
    for name, tensor in backbone.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    for name, module in backbone.named_modules():
        settings = {key: value for key, value in vars(module).items() if _is_setting(key, value)}
        digest.update(f"{name} {type(module).__name__} {sorted(settings.items())}\n".encode())
    return digest.hexdigest()


def data_digest(source: Source, indices: Sequence[int]) -> tuple[str, str]:
    """Return a hash of some images of a source, and what it covers, in words; see the module's docstring."""
    digest = sha256()
    if source.images is not None:
        digest.update(f"{tuple(source.images.shape)}\n".encode())
        digest.update(_bytes(source.images))
        return digest.hexdigest(), "all pixels"
    digest.update(f"{getattr(source, 'value_range', None)}\n".encode())
    for place in {indices[number * (len(indices) - 1) // 8]: None for number in range(9)} if len(indices) else ():
        try:  # the decoder of the source shows in the pixels
            image = source.read(place)
        except UnreadableImage as error:
            digest.update(str(error).encode())
        else:
            digest.update(f"{tuple(image.shape)}\n".encode())
            digest.update(_bytes(image))
    if len(indices) and os.path.isfile(source.describe(indices[0])):
        for place in indices:
            path = source.describe(place)
            try:
                status = os.stat(path)
                stamp = f" {status.st_size} {status.st_mtime_ns}\n"
            except OSError:
                stamp = " cannot be read\n"
            digest.update(os.fsencode(path + stamp))
        return digest.hexdigest(), "paths, sizes and times of change of the files, the pixels of nine"
    version = getattr(source, "version", "")
    digest.update(os.fsencode(f"{source.name} {len(source)}\n{version}"))
    if source.labels is not None:
        digest.update(_bytes(source.labels))
    told = "name, length and labels of the data set, the pixels of nine images"
    return digest.hexdigest(), f"{told}, sizes and times of change of its files" if version else told


def labels_digest(source: Source) -> str | None:
    """Return a hash of the labels of a source and the names of its classes; None without labels.

    `data_digest` does not cover labels of images in files, because features do not depend on them.
    """
    if source.labels is None:
        return None
    digest = sha256("\0".join(source.classes or ()).encode("utf-8", "surrogateescape"))
    digest.update(_bytes(source.labels))
    return digest.hexdigest()


def _read(
    folder: Path, about: dict[str, Any], indices: Sequence[int], *, retry: Source | None = None
) -> tuple[Tensor, Tensor] | None:
    """Return indices (N,) and features (N, F) if they are in the folder and complete.

    With `retry`, they are not complete if an image that could not be read can be read now, as with a new plugin.
    """
    try:
        unreadable = set(json.loads((folder / f"{about['key']}.json").read_text())["unreadable"])
        found = torch.tensor([place for place in indices if place not in unreadable], dtype=torch.int64)
        # "c": pages are read on access, and changes to them stay in memory.
        features = np.load(folder / f"{about['key']}.npy", mmap_mode="c" if len(found) else None, allow_pickle=False)
    except (OSError, ValueError, KeyError):  # missing or incomplete, as after a crash of the machine
        return None
    if retry is not None and _can_be_read(retry, sorted(unreadable)[:TRIED]):
        return None
    return (found, torch.from_numpy(features)) if len(features) == len(found) else None


def _can_be_read(source: Source, indices: Sequence[int]) -> bool:
    """Return whether one of these images can be read."""
    for index in indices:
        with suppress(UnreadableImage, SourceGone):
            source.read(index)
            return True
    return False


def _write(
    folder: Path, about: dict[str, Any], batches: Iterator[tuple[Tensor, Tensor]], indices: Sequence[int], width: int
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    found: set[int] = set()
    count, start = 0, time.monotonic()
    with written_whole(folder / f"{about['key']}.npy", concurrent=True) as file:
        _write_header(file, 0, width)
        for where, rows in batches:
            file.write(_bytes(rows))
            found.update(where.tolist())
            count += len(where)
        file.seek(0)
        _write_header(file, count, width)  # of the same length: numpy pads for a larger number of rows
    seconds = time.monotonic() - start
    unreadable = sorted(set(indices) - found)
    facts = {"shape": [count, width], "seconds": round(seconds, 1), "unreadable": unreadable}
    with written_whole(
        folder / f"{about['key']}.json", concurrent=True
    ) as file:  # last: its presence marks the features as complete
        file.write(json.dumps({**about, **facts}, indent=2).encode())


def _write_header(file: IO[bytes], rows: int, width: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _is_setting(name: str, value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_setting(name, item) for item in value)
    return not name.startswith("_") and name != "training" and isinstance(value, bool | int | float | str | None)
