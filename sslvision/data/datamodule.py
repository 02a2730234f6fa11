"""The data module: a pair of sources, the loader's settings, and the statistics of the pixels."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sslvision.augment.crops import Crop
from sslvision.augment.randomness import permutation
from sslvision.data.batch import Batch
from sslvision.data.loader import Augment, cut_crops, evaluation_loader, training_loader
from sslvision.data.sampler import EpochBatches
from sslvision.data.source import Source, Splits, UnreadableImage
from sslvision.errors import DataError, UsageError
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD

CGROUP = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds of CPU time in each so many
MOST_WORKERS = 32  # each holds batches; more decode no faster than a device trains


class ImageData(L.LightningDataModule):
    """Images for a method.

    Args:
        splits: what to train on, and what validation is made on.
        crops: what the method wants cut from each image.
        batch_size: images per optimizer update, over all devices and accumulated batches.
        seed: of order and crops.
        workers: loader processes per device; None takes what `available_workers` says, by the trainer's processes once there
            is one.
        augment: what the workers make of each crop.
        evaluate_batch: images per validation batch and device.
    """

    def __init__(
        self,
        splits: Splits,
        crops: tuple[Crop, ...],
        *,
        batch_size: int,
        seed: int = 0,
        workers: int | None = None,
        augment: Augment | None = None,
        evaluate_batch: int = 256,
    ):
        super().__init__()
        self.splits, self.crops, self.batch_size, self.seed = splits, crops, batch_size, seed
        self.asked_workers = workers
        self.augment, self.evaluate_batch = augment, evaluate_batch
        # Lightning takes offense at methods that do not validate, and at data without validation images.
        for message in (
            "You passed in a `val_dataloader` but have no `validation_step`",
            "Total length of `list` across ranks is zero",
        ):
            warnings.filterwarnings("ignore", message=message)

    @property
    def workers(self) -> int:
        """Return the loader processes per device."""
        if self.asked_workers is not None:
            return self.asked_workers
        return available_workers(self.trainer.num_devices if self.trainer else 1)

    def batches(self, rank: int, world: int, accumulate: int) -> EpochBatches:
        """Return the sampler of one process."""
        return EpochBatches(
            len(self.splits.train),
            global_batch=self.batch_size,
            seed=self.seed,
            rank=rank,
            world=world,
            accumulate=accumulate,
            updates_done=lambda: self.trainer.global_step if self.trainer else 0,
        )

    def batches_of(self, trainer: L.Trainer) -> EpochBatches:
        """Return the sampler of this process of a trainer."""
        return self.batches(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this process, at the trainer's position."""
        trainer = self.trainer
        assert trainer is not None
        return training_loader(
            self.splits.train,
            self.crops,
            self.batches_of(trainer),
            workers=self.workers,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            augment=self.augment,
        )

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return this process's share of the validation images, (indices (B,), images (B, C, S, S) uint8); [] without any.

        S is the size of the method's first crop. Unreadable images are left out, so a batch may be empty.
        """
        trainer, source = self.trainer, self.splits.validation
        if source is None:
            return []
        assert trainer is not None
        indices = list(range(trainer.global_rank, len(source), trainer.world_size))
        return evaluation_loader(
            source, self.crops[0].size, indices, batch_size=self.evaluate_batch, workers=self.workers
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Cut the crops of images that came whole; put others, which come as (B, S, S, C), into the order of their shape."""
        if not isinstance(batch, Batch):
            return batch
        if self.splits.train.images is not None and self.augment is None:
            return cut_crops(batch, self.crops, self.seed)
        return batch._replace(crops=[crop.contiguous() for crop in batch.crops])


def available_workers(processes: int = 1) -> int:
    """Return a sensible number of loader processes: as many as cores but one, which trains; with two cores both.

    Args:
        processes: that train on this machine, if more than those torchrun started, and share the cores of each.
    """
    own = os.environ.get("SLURM_CPUS_PER_TASK") if int(os.environ.get("SLURM_NTASKS", "1")) > 1 else None
    if own is not None:  # SLURM started the processes, each with cores of its own
        share = min(int(own), available_cores())
    else:
        share = available_cores() // max(processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(share, max(2, share - 1), MOST_WORKERS))


def available_cores() -> int:
    """Return how many cores this process may use, of those of the machine and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP.read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def pixel_statistics(
    source: Source, normalize: str | Sequence[Sequence[float]], *, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Return mean and deviation of the pixels per channel, on the scale 0..1.

    Args:
        source: the training images.
        normalize: "imagenet"; "computed" (from all images in memory, or from 1,000 drawn ones of a folder); or the two
            lists themselves, [[means], [deviations]].
        seed: of the draw.

    Raises:
        UsageError: unknown word, or numbers that do not fit the channels.
        DataError: no image could be read.
    """
    if normalize == "computed":
        pixels = _pixels_per_channel(source, seed)  # a float64 tensor for each image or for all
        count = sum(p.shape[1] for p in pixels)
        mean = torch.stack([p.sum(1) for p in pixels]).sum(0) / count
        square = torch.stack([p.square().sum(1) for p in pixels]).sum(0) / count
        std = (square - mean**2).clamp(min=0).sqrt().clamp(min=1 / 255)  # constant channels must not divide by zero
        return mean.tolist(), std.tolist()
    if isinstance(normalize, str):
        if normalize != "imagenet":
            raise UsageError(
                f"data.normalize={normalize} is unknown: it is computed, imagenet, or two lists [[means], [deviations]]."
            )
        mean_std: Sequence[Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD)
        if source.channels == 1:  # gray images: the mean of the three
            mean_std = [[sum(values) / 3] for values in mean_std]
    else:
        mean_std = normalize
    if len(mean_std) != 2 or any(len(values) != source.channels for values in mean_std) or min(mean_std[1]) <= 0:
        raise UsageError(
            f"data.normalize={normalize} does not fit images of {source.channels} channel(s): give [[means], [deviations]] "
            f"with {source.channels} number(s) each, on the scale 0..1, deviations above 0."
        )
    return list(mean_std[0]), list(mean_std[1])


def _pixels_per_channel(source: Source, seed: int) -> list[Tensor]:
    """Return pixels as (C, n) tensors on the scale 0..1."""
    if source.images is not None:
        return [images.transpose(0, 1).flatten(1).double() / 255 for images in source.images.split(1000)]
    pixels = []
    for place in permutation(len(source), seed=seed, epoch=0)[:1000].tolist():
        try:
            pixels.append(source.read(place).flatten(1).double() / 255)
        except UnreadableImage:
            continue  # named when training meets it
    if not pixels:
        raise DataError(f"None of the images drawn from {source.name} can be read; is it the right folder?")
    return pixels
