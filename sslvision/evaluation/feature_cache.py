"""Features on the disk: what was extracted once is read afterwards, as long as nothing that makes it has changed.

A cache is two files in a folder of the caller's choice. `<key>.npy` holds the features, float32, which are mapped into
memory and not read as a whole. `<key>.json` says in words what they are. The key is a hash of

- the backbone: every byte of its weights, and every number its modules are set to (heads, windows, pooling, epsilons);
- the normalization, the kind of feature, the precision, and the random crop, if any;
- the images: all pixels of a source in memory. Of image files the paths, sizes and times of change, not the contents,
  which would have to be read: a file that changes and keeps its size and time is taken for the same. Of other sources
  the name, the length and the labels. Of all but the first the first and the last image's pixels besides.

Batch size, loader processes, number of processes and kind of device are no part of it: they change roundings only.
Files appear whole or not at all. A process that is killed leaves a `.tmp` file, which may be deleted.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
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
from sslvision.data.source import Source, UnreadableImage
from sslvision.errors import UsageError
from sslvision.evaluation.features import Progress, RandomCrops, feature_batches, feature_dim, has_class_token
from sslvision.nn.normalize import Normalize
from sslvision.system.files import require_free, written_whole

FORMAT = 1  # part of the key: raise it when the same settings come to mean other features


class Digests(NamedTuple):
    """Hashes of a backbone, of the indices asked for and of their images, and what the last one covers, in words."""

    weights: str
    indices: str
    images: str
    images_covered: str


def cached_features(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    indices: Sequence[int],
    *,
    folder: Path,
    last_blocks: int = 0,
    patch_mean: bool = False,
    crop: Crop | None = None,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = 500,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
    digests: Digests | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `extract_features` does, from `folder` if it is there, and leave it there.

    The features (N, F) are mapped from the file: writing to them changes no file. Main memory holds one batch of them
    at a time. With several processes the first one writes, and `folder` must be one that all of them see. `digests` are
    those of this backbone, source and indices, where they are known already.

    Raises UsageError as `extract_features`, and StorageError if the disk has too little free space.
    """
    indices = sorted(indices)
    seen = source if crop is None else RandomCrops(source, crop, seed, epoch)
    width = feature_dim(backbone, last_blocks, patch_mean)
    plan: list[Any] = [None, False]  # what the cache is, and whether it is there
    if rank == 0:
        kind = "the backbone's pooled feature"
        if last_blocks and has_class_token(backbone):
            kind = f"class tokens of the last {last_blocks} blocks" + ", mean of the patch tokens" * patch_mean
        about = description(
            backbone, normalize, seen, kind, precision, digests or digests_of(backbone, source, indices)
        )
        plan = [about, _read(folder, about, indices) is not None]
    if world > 1:
        dist.broadcast_object_list(plan)
    about, there = plan
    if not there:
        advice = "give another folder, or use fewer images or views"
        require_free(folder, len(indices) * width * 4, "The features", advice=advice)
        batches = feature_batches(
            backbone,
            normalize,
            seen,
            indices,
            last_blocks=last_blocks,
            patch_mean=patch_mean,
            batch_size=batch_size,
            workers=workers,
            precision=precision,
            rank=rank,
            world=world,
            progress=progress,
        )
        if rank == 0:
            _write(folder, about, batches, indices, width)
        else:
            for _ in batches:  # its share is encoded on the way to the first process
                pass
        if world > 1:
            dist.barrier()
    cached = _read(folder, about, indices)
    if cached is None:
        raise UsageError(
            f"The features that the first process wrote to {folder} cannot be read on process {rank}: give a folder on a "
            "disk that all processes share."
        )
    return cached


def cached_views(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    indices: Sequence[int],
    *,
    crop: Crop,
    views: int,
    **options: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Return indices (N,) and `views` times the features (N, F), of the random crops of epochs 0, 1, ...

    Each view is a cache of its own, so that more views are added to those that are there. `options` are those of
    `cached_features`. Raises UsageError as it does, and where an image can be read for one view and not for another.
    """
    digests = digests_of(backbone, source, indices)
    found = [
        cached_features(backbone, normalize, source, indices, crop=crop, epoch=epoch, digests=digests, **options)
        for epoch in range(views)
    ]
    where = found[0][0]
    if not all(torch.equal(where, others) for others, _ in found):
        raise UsageError(
            f"Some images of {source.name} could be read for one view and not for another: is their disk at fault? Delete "
            f"{options['folder']} and try again."
        )
    return where, [features for _, features in found]


def description(
    backbone: Backbone, normalize: Normalize, source: Source, kind: str, precision: torch.dtype, digests: Digests
) -> dict[str, Any]:
    """Return what features are, in words and hashes; the cache's `key` is made of all of it."""
    crop = source if isinstance(source, RandomCrops) else None
    about = {
        "format": FORMAT,
        "features": kind,
        "seen": "a random crop" if crop else "the whole image, resized and cut centrally",
        "crop": crop and {**asdict(crop.crop), "seed": crop.seed, "epoch": crop.epoch},
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
    """Return what a cache's key says of the backbone and the images."""
    indices = sorted(indices)
    chosen = sha256(_bytes(torch.tensor(indices, dtype=torch.int64))).hexdigest()
    return Digests(weights_digest(backbone), chosen, *data_digest(source, indices))


def weights_digest(backbone: Backbone) -> str:
    """Return a hash of all parameters and buffers, and of what the modules are set to.

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
    """Return a hash of some images of a source, and what it covers in words; see the module's docstring."""
    digest = sha256()
    if source.images is not None:
        digest.update(f"{tuple(source.images.shape)}\n".encode())
        digest.update(_bytes(source.images))
        return digest.hexdigest(), "all pixels"
    for place in {indices[number * (len(indices) - 1) // 8]: None for number in range(9)} if len(indices) else ():
        try:  # how the source decodes shows in its pixels
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
    digest.update(f"{source.name} {len(source)}\n".encode())
    if source.labels is not None:
        digest.update(_bytes(source.labels))
    return digest.hexdigest(), "name, length and labels of the data set, the pixels of nine images"


def _read(folder: Path, about: dict[str, Any], indices: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """Return indices (N,) and features (N, F) if they are in the folder, and whole."""
    try:
        unreadable = set(json.loads((folder / f"{about['key']}.json").read_text())["unreadable"])
        found = torch.tensor([place for place in indices if place not in unreadable], dtype=torch.int64)
        # "c": pages are read when they are touched, and what is written to them stays in memory.
        features = np.load(folder / f"{about['key']}.npy", mmap_mode="c" if len(found) else None, allow_pickle=False)
    except (OSError, ValueError, KeyError):  # not there, or not whole, as after a crash of the machine
        return None
    return (found, torch.from_numpy(features)) if len(features) == len(found) else None


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
        _write_header(file, count, width)  # as long as the first: numpy leaves room for the number of rows to grow
    seconds = time.monotonic() - start
    unreadable = sorted(set(indices) - found)
    facts = {"shape": [count, width], "seconds": round(seconds, 1), "unreadable": unreadable}
    with written_whole(
        folder / f"{about['key']}.json", concurrent=True
    ) as file:  # last: it says that the features are there
        file.write(json.dumps({**about, **facts}, indent=2).encode())


def _write_header(file: IO[bytes], rows: int, width: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _is_setting(name: str, value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_setting(name, item) for item in value)
    return not name.startswith("_") and name != "training" and isinstance(value, bool | int | float | str | None)
