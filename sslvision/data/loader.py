"""Data sets that a DataLoader reads: random crops for training, whole views for evaluation.

Sources whose images lie in memory at one size are indexed a whole batch at a time, and their crops are cut on the
training device. All others are decoded and cropped one by one in the loader's workers; only bytes travel. Where crops
are augmented one by one as well, the workers do all of it.
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
from sslvision.data.source import Source, UnreadableImage
from sslvision.data.workers import begin_worker

STAND_INS = 100  # images tried in place of an unreadable one
TOGETHER = 16  # decoded images held at once: enough for drawing their boxes together to cost nothing

# Changes one uint8 crop (C, S, S) into another of that shape; all it draws is a function of the image's randomness (B = 1).
Augment = Callable[[Tensor, ImageRandom], Tensor]


class TrainingImages(Dataset[Batch]):
    """Batches of crops, or, for sources in memory, of whole images that `cut_crops` crops on the device.

    With `augment` all batches are of crops, each changed by it; all crops of an image share their randomness.
    """

    def __init__(self, source: Source, crops: tuple[Crop, ...], seed: int, augment: Augment | None = None):
        self.source, self.crops, self.seed, self.augment = source, crops, seed, augment
        self.rooms = BufferPool()

    def __getitems__(self, keys: list[Key]) -> Batch:
        """Return the batch of `keys`; an unreadable image is replaced by the next readable one of the source."""
        epoch, index = torch.tensor(keys).T.contiguous()  # (B,), (B,)
        if self.source.images is not None:
            whole = Batch([self.source.images[index]], index, epoch, [], shown=index)
            return whole if self.augment is None else self._augmented(cut_crops(whole, self.crops, self.seed))
        rng = ImageRandom(self.seed, epoch, index)
        noise = crop_noise(rng, range(len(self.crops)))  # (V, B, ...)
        crops = self._take_rooms(len(keys))
        unreadable: list[tuple[int, str]] = []
        shown = index.clone()
        for start in range(0, len(keys), TOGETHER):
            images, part = [], slice(start, start + TOGETHER)
            for position, (_, number) in enumerate(keys[part], start):
                found = self._read(number, unreadable)
                if (
                    found is None
                ):  # nothing readable far and wide: the training process stops with what is in `unreadable`
                    return Batch([], index, epoch, unreadable, shown)
                image, shown[position] = found
                images.append(image)
            rooms = [room for of_view in crops for room in of_view[part]]
            for room, cut in zip(rooms, crop_each(images, noise[:, part], self.crops), strict=True):
                room.copy_(cut)
        return self._augmented(Batch(crops, index, epoch, unreadable, shown))

    def _read(self, number: int, unreadable: list[tuple[int, str]]) -> tuple[Tensor, int] | None:
        """Return the image and its place, both of the next readable one."""
        for offset in range(STAND_INS):
            place = (number + offset) % len(self.source)
            try:
                return self.source.read(place), place
            except UnreadableImage as error:
                unreadable.append((place, str(error)))
        return None

    def _augmented(self, batch: Batch) -> Batch:
        if self.augment is None:
            return batch
        images = zip(batch.epoch.split(1), batch.indices.split(1), strict=True)
        rngs = [ImageRandom(self.seed, epoch, place) for epoch, place in images]
        rooms = batch.crops if self.source.images is None else self._take_rooms(len(rngs))
        for view, room in zip(batch.crops, rooms, strict=True):
            for crop, place, rng in zip(view, room, rngs, strict=True):
                place.copy_(self.augment(crop.contiguous(), rng))
        return batch._replace(crops=rooms)

    def _take_rooms(self, images: int) -> list[Tensor]:
        return self.rooms.take([(images, self.source.channels, crop.size, crop.size) for crop in self.crops])


def cut_crops(batch: Batch, crops: tuple[Crop, ...], seed: int) -> Batch:
    """Cut the crops of whole images (B, C, H, W) on the device they are on."""
    noise = crop_noise(ImageRandom(seed, batch.epoch, batch.indices), range(len(crops)))  # (V, B, ...)
    return batch._replace(crops=crop_batch(batch.crops[0], noise, crops))


class EvaluationImages(Dataset[tuple[int, Tensor | None, str]]):
    """Some images of a source, resized and centrally cropped to one size: (place, image or None, reason)."""

    def __init__(self, source: Source, size: int, indices: list[int]):
        self.source, self.size, self.indices = source, size, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor | None, str]:
        """Return one image (C, size, size) uint8, or None and why it cannot be read."""
        place = self.indices[position]
        try:
            return place, center_crop(self.source.read(place), self.size), ""
        except UnreadableImage as error:
            return place, None, str(error)


def evaluation_loader(
    source: Source, size: int, indices: list[int], *, batch_size: int = 256, workers: int = 0
) -> DataLoader[Any]:
    """Return a loader of (indices (B,), images (B, C, size, size) uint8); unreadable images are left out."""
    return DataLoader(
        EvaluationImages(source, size, indices),
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
    """Return a loader of Batch; sources in memory need no workers, unless their crops are augmented there."""
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
    readable = [(place, image) for place, image, _ in items if image is not None]
    if not readable:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8)
    indices, images = zip(*readable, strict=True)
    return torch.tensor(indices), torch.stack(images)


def _as_is(batch: Any) -> Any:
    return batch
