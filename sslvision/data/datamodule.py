"""The data module: sources, settings of the loader, and pixel statistics."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from sslvision.augment.crops import Crop
from sslvision.data.batch import Batch
from sslvision.data.loader import Augment, cut_crops, evaluation_loader, training_loader
from sslvision.data.order import Order
from sslvision.data.sampler import EpochBatches
from sslvision.data.source import Source, Splits, UnreadableImage, remarks_in_errors
from sslvision.errors import DataError, UsageError
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD

CGROUP = Path("/sys/fs/cgroup/cpu.max")  # "200000 100000": microseconds of CPU time per period in microseconds
COUNTED = 1 << 22  # pixels counted at a time: torch turns them into integers of 8 bytes
MOST_WORKERS = 32  # each holds batches in memory; more are not needed to keep a device busy


class ImageData(L.LightningDataModule):
    """Images for a method.

    Args:
        splits: Images to train on and to validate on.
        crops: Crops of each image that the method needs.
        batch_size: Images per optimizer update, over all devices and accumulated batches.
        seed: Seed of the order and the crops.
        workers: Worker processes per device; None: `available_workers`.
        augment: Augmentation of each crop in the workers.
        evaluate_batch: Images per validation batch and device.
        crop_pct: Central share of validation images, see `center_crop`.
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
        crop_pct: float | None = None,
    ):
        super().__init__()
        self.splits, self.crops, self.batch_size, self.seed = splits, crops, batch_size, seed
        self.asked_workers = workers
        self.augment, self.evaluate_batch, self.crop_pct = augment, evaluate_batch, crop_pct
        # Lightning warns of methods that do not validate, and of data without validation images.
        for message in (
            "You passed in a `val_dataloader` but have no `validation_step`",
            "Total length of `list` across ranks is zero",
        ):
            warnings.filterwarnings("ignore", message=message)

    @property
    def workers(self) -> int:
        """Return the number of worker processes per device."""
        if self.asked_workers is not None:
            return self.asked_workers
        return available_workers(self.trainer.num_devices if self.trainer else 1)

    def batches(self, rank: int, world: int, accumulate: int) -> EpochBatches:
        """Return the sampler of one process."""
        with remarks_in_errors(self.splits.remarks):
            return EpochBatches(
                len(self.splits.train),
                global_batch=self.batch_size,
                seed=self.seed,
                rank=rank,
                world=world,
                accumulate=accumulate,
                updates_done=lambda: self.trainer.global_step if self.trainer else 0,
                groups=getattr(self.splits.train, "groups", None),
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
        """Return this process's share of the validation images, (indices (B,), images (B, C, H, W) uint8); [] without any.

        H and W are those of the method's first crop. Unreadable images are skipped, so a batch may be empty.
        """
        trainer, source = self.trainer, self.splits.validation
        if source is None:
            return []
        assert trainer is not None
        indices = list(range(trainer.global_rank, len(source), trainer.world_size))
        if not indices:  # fewer images than processes: this one takes part in the sums, with an empty batch
            nothing: Any = [(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.uint8))]
            return DataLoader(nothing, batch_size=None)
        return evaluation_loader(
            source,
            self.crops[0].shape,
            indices,
            batch_size=self.evaluate_batch,
            workers=self.workers,
            crop_pct=self.crop_pct,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Crop images that came whole; make the other crops, which have memory format (B, H, W, C), contiguous."""
        if not isinstance(batch, Batch):
            return batch
        if self.splits.train.images is not None and self.augment is None:
            return cut_crops(batch, self.crops, self.seed)
        return batch._replace(crops=[crop.contiguous() for crop in batch.crops])


def available_workers(processes: int = 1) -> int:
    """Return a sensible number of worker processes: one per core, except for one core that trains; both of two cores.

    Args:
        processes: Number of training processes on this machine, which share its cores.
    """
    own = os.environ.get("SLURM_CPUS_PER_TASK") if int(os.environ.get("SLURM_NTASKS", "1")) > 1 else None
    if own is not None:  # SLURM started the processes, each on cores of its own
        share = min(int(own), available_cores())
    else:
        share = available_cores() // max(processes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return max(1, min(share, max(2, share - 1), MOST_WORKERS))


def available_cores() -> int:
    """Return the number of cores this process may use, limited by its affinity and the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = CGROUP.read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def pixel_statistics(
    source: Source, normalize: str | Sequence[Sequence[float]], *, seed: int = 0
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of the pixels per channel, on the scale 0..1.

    Args:
        source: Training images.
        normalize: "imagenet"; "computed" (from all images in memory, or a random 1,000 of a folder); or the values
            themselves, [[means], [deviations]].
        seed: Seed of the random images.

    Raises:
        UsageError: Unknown word, or values that do not match the channels.
        DataError: No image could be read.
    """
    if normalize == "computed":
        return _computed_statistics(source, seed)
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
            f"data.normalize={normalize} does not fit images of {source.channels} channel(s): set data.normalize=computed, or "
            f"give [[means], [deviations]] with {source.channels} number(s) each, on the scale 0..1, deviations above 0."
        )
    return list(mean_std[0]), list(mean_std[1])


def _computed_statistics(source: Source, seed: int) -> tuple[list[float], list[float]]:
    """Return mean and deviation per channel, from counts of every value: no image stays in memory."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.zeros(source.channels, 256, dtype=torch.float64)  # of each value, per channel
    for pixels in _pixels_to_count(source, seed):  # (C, n) uint8
        for part in pixels.split(COUNTED, dim=1):
            counts += torch.stack([channel.bincount(minlength=256) for channel in part])
    if not counts.any():
        raise DataError(
            f"None of the images drawn from {source.name} to compute mean and deviation can be read{_first_reason(source)}. "
            "Is it the right folder, and do data.channels and data.root fit its files?"
        )
    shares = counts / counts.sum(1, keepdim=True)
    mean = shares @ levels  # (C,)
    std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt().clamp(min=1 / 255)  # no division by zero if constant
    return mean.tolist(), std.tolist()


def _first_reason(source: Source) -> str:
    """Return the first image and why it cannot be read, in words; nothing if it can be."""
    try:
        source.read(0)
    except UnreadableImage as error:
        return f"; the first: {source.describe(0)} ({error})"
    return ""


def _pixels_to_count(source: Source, seed: int) -> Iterator[Tensor]:
    """Yield pixels (C, n) uint8: of all images in memory, or of a random 1,000 of a folder."""
    if source.images is not None:
        yield from (images.transpose(0, 1).flatten(1) for images in source.images.split(1000))
        return
    for index in Order(len(source), seed=seed, epoch=0)[:1000].tolist():
        with suppress(UnreadableImage):  # reported when training reads it
            yield source.read(index).flatten(1)
