"""The order of the images: a function of (seed, epoch) alone, cut into batches that do not depend on the processes."""

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler

from sslvision.augment.randomness import permutation
from sslvision.errors import DataError, UsageError

Key = tuple[int, int]  # (epoch, index): all a worker needs to draw an image's randomness


class EpochBatches(Sampler[list[Key]]):
    """Yield the keys of one process's micro-batches from the trainer's position to the end of the epoch.

    An epoch is a permutation of the images cut into global batches; what remains after the last whole one is left out
    (and is another remainder in the next epoch). A global batch is cut into `accumulate` micro-batches, and these are
    dealt to the processes in turn, so the images of an update are the same for any number of processes. Where to begin
    is read from the trainer's count of updates, so a resumed run goes on where it stopped.

    Args:
        images: how many there are.
        global_batch: images per optimizer update, over all processes and micro-batches.
        seed: of the order.
        rank, world: this process, and how many there are.
        accumulate: micro-batches per update.
        updates_done: tells the trainer's position.

    Raises:
        UsageError: the global batch cannot be dealt out evenly.
        DataError: there are fewer images than one global batch.
    """

    def __init__(
        self,
        images: int,
        *,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        updates_done: Callable[[], int] = lambda: 0,
    ):
        if global_batch % (world * accumulate):
            raise UsageError(
                f"batch_size={global_batch} counts the images of one optimizer update over all devices; it cannot be "
                f"shared evenly by {world} device(s) x {accumulate} accumulated batches: make it a multiple of "
                f"{world * accumulate}."
            )
        if images < global_batch:
            raise DataError(
                f"There are {images} images to train on, fewer than one batch of {global_batch}: set batch_size={images} "
                "or less, or add images."
            )
        self.images, self.global_batch, self.seed = images, global_batch, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.updates_done = updates_done
        self.steps_per_epoch = images // global_batch

    def __len__(self) -> int:
        """Return micro-batches per epoch."""
        return self.steps_per_epoch * self.accumulate

    def of_update(self, update: int) -> list[Key]:
        """Return all keys of the global batch of an update, counted from 0."""
        epoch, place = divmod(update, self.steps_per_epoch)
        order = permutation(self.images, seed=self.seed, epoch=epoch)
        return [(epoch, int(index)) for index in order[place * self.global_batch :][: self.global_batch]]

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield lists of (epoch, index)."""
        epoch, first = divmod(self.updates_done(), self.steps_per_epoch)
        order = permutation(self.images, seed=self.seed, epoch=epoch).tolist()
        micro = self.global_batch // self.accumulate
        for start in range(first * self.global_batch, self.steps_per_epoch * self.global_batch, micro):
            yield [(epoch, index) for index in order[start + self.rank : start + micro : self.world]]
