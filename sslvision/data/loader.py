"""Data sets for a DataLoader: random crops for training, whole views for evaluation.

Sources with all images in memory are indexed a whole batch at a time, and cropped on the training device. Images of all
others are decoded and cropped one by one in the loader's workers, which send uint8. If crops are also augmented one by one,
the workers do that too.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslvision.augment.crops import Crop, center_crop, crop_batch, crop_each, crop_noise
from sslvision.augment.randomness import ImageRandom
from sslvision.data.batch import Batch
from sslvision.data.buffer_pool import BufferPool
from sslvision.data.sampler import EpochBatches, Key
from sslvision.data.shard_order import shards_ahead
from sslvision.data.source import Source, UnreadableImage
from sslvision.data.workers import begin_worker

STAND_INS = 100  # images tried instead of an unreadable one
CHUNK = 16  # decoded images in memory at once

# Maps a uint8 crop (C, H, W) to another of that shape. All its random numbers come from the given ImageRandom (B = 1).
Augment = Callable[[Tensor, ImageRandom], Tensor]


class TrainingImages(Dataset[Batch]):
    """Batches of crops or, for sources in memory, of whole images, which `cut_crops` crops on the device.

    With `augment` all batches consist of crops, each changed by it; all crops of an image share their random numbers.
    """

    def __init__(self, source: Source, crops: tuple[Crop, ...], seed: int, augment: Augment | None = None):
        self.source, self.crops, self.seed, self.augment = source, crops, seed, augment
        self.buffers = BufferPool()

    def __getitems__(self, keys: list[Key]) -> Batch:
        """Return the batch of `keys`; an unreadable image is replaced by the next readable one of the source."""
        epoch, index = torch.tensor(keys).T.contiguous()  # (B,), (B,)
        if self.source.images is not None:
            whole = Batch([self.source.images[index]], index, epoch, [], shown=index)
            return whole if self.augment is None else self._augmented(cut_crops(whole, self.crops, self.seed))
        self._prefetch(keys)
        rng = ImageRandom(self.seed, epoch, index)
        noise = crop_noise(rng, range(len(self.crops)))  # (V, B, ...)
        crops = self._take_buffers(len(keys))
        unreadable: list[tuple[int, str]] = []
        shown = index.clone()
        for start in range(0, len(keys), CHUNK):
            images, part = [], slice(start, start + CHUNK)
            for position, (_, number) in enumerate(keys[part], start):
                found = self._read(number, unreadable)
                if found is None:  # the training process stops and reports what is in `unreadable`
                    return Batch([], index, epoch, unreadable, shown)
                image, shown[position] = found
                images.append(image)
            targets = [target for of_view in crops for target in of_view[part]]
            for target, cut in zip(targets, crop_each(images, noise[:, part], self.crops), strict=True):
                target.copy_(cut)
        return self._augmented(Batch(crops, index, epoch, unreadable, shown))

    def _prefetch(self, keys: list[Key]) -> None:
        """Let a source of shards that are elsewhere know which ones are needed soon."""
        groups, prefetch = (getattr(self.source, name, None) for name in ("groups", "prefetch"))
        if groups is not None and prefetch is not None:
            epoch, image = keys[-1]
            prefetch(shards_ahead(groups, image, seed=self.seed, epoch=epoch))

    def _read(self, number: int, unreadable: list[tuple[int, str]]) -> tuple[Tensor, int] | None:
        """Return the next readable image from `number` on, and its index."""
        for offset in range(STAND_INS):
            index = (number + offset) % len(self.source)
            try:
                return self.source.read(index), index
            except UnreadableImage as error:
                unreadable.append((index, str(error)))
        return None

    def _augmented(self, batch: Batch) -> Batch:
        if self.augment is None:
            return batch
        keys = zip(batch.epoch.split(1), batch.indices.split(1), strict=True)
        rngs = [ImageRandom(self.seed, epoch, index) for epoch, index in keys]
        augmented = batch.crops if self.source.images is None else self._take_buffers(len(rngs))
        for crops, targets in zip(batch.crops, augmented, strict=True):
            for crop, target, rng in zip(crops, targets, rngs, strict=True):
                target.copy_(self.augment(crop.contiguous(), rng))
        return batch._replace(crops=augmented)

    def _take_buffers(self, images: int) -> list[Tensor]:
        return self.buffers.take([(images, self.source.channels, *crop.shape) for crop in self.crops])


def cut_crops(batch: Batch, crops: tuple[Crop, ...], seed: int) -> Batch:
    """Crop whole images (B, C, H, W) on their device."""
    noise = crop_noise(ImageRandom(seed, batch.epoch, batch.indices), range(len(crops)))  # (V, B, ...)
    return batch._replace(crops=crop_batch(batch.crops[0], noise, crops))


class EvaluationImages(Dataset[tuple[int, Tensor | None, str]]):
    """Images of a source, resized and center-cropped to one size: (index, image or None, reason)."""

    def __init__(self, source: Source, size: tuple[int, int], indices: list[int], crop_pct: float | None = None):
        self.source, self.size, self.indices, self.crop_pct = source, size, indices, crop_pct

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor | None, str]:
        """Return one image (C, *size) uint8, or None and why it cannot be read."""
        index = self.indices[position]
        try:
            return index, center_crop(self.source.read(index), self.size, self.crop_pct), ""
        except UnreadableImage as error:
            return index, None, str(error)


def evaluation_loader(
    source: Source,
    size: tuple[int, int],
    indices: list[int],
    *,
    batch_size: int = 256,
    workers: int = 0,
    crop_pct: float | None = None,
) -> DataLoader[Any]:
    """Return a loader of (indices (B,), images (B, C, *size) uint8); unreadable images are skipped.

    `size` and `crop_pct`: see center_crop.
    """
    return DataLoader(
        EvaluationImages(source, size, indices, crop_pct),
        batch_size=batch_size,
        num_workers=0 if source.images is not None else workers,
        collate_fn=_collate_readable,
        worker_init_fn=begin_worker,
    )


def training_loader(
    source: Source,
    crops: tuple[Crop, ...],
    batches: EpochBatches,
    *,
    workers: int,
    pin_memory: bool,
    augment: Augment | None = None,
) -> DataLoader[Any]:
    """Return a loader of Batch. Sources in memory need no workers unless crops are augmented."""
    workers = 0 if source.images is not None and augment is None else workers
    return DataLoader(
        TrainingImages(source, crops, batches.seed, augment),
        batch_sampler=batches,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=begin_worker,
    )


def _collate_readable(items: list[tuple[int, Tensor | None, str]]) -> tuple[Tensor, Tensor]:
    readable = [(index, image) for index, image, _ in items if image is not None]
    if not readable:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
    indices, images = zip(*readable, strict=True)
    return torch.tensor(indices), torch.stack(images)


def _as_is(batch: Any) -> Any:
    return batch
