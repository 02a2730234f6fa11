"""The order of the images: a function of (seed, epoch), cut into batches that do not depend on the number of processes."""

from collections.abc import Callable, Iterator

from torch.utils.data import Sampler

from sslvision.data.order import AT_ONCE, Order
from sslvision.data.shard_order import Groups, ShardOrder
from sslvision.errors import DataError, UsageError

Key = tuple[int, int]  # (epoch, index), which all random numbers of an image depend on


class EpochBatches(Sampler[list[Key]]):
    """Yield the keys of one process's micro-batches from the trainer's position to the end of the epoch.

    An epoch is a permutation of the images, or one of shards and of the images in a few of them (`ShardOrder`), cut into global
    batches; an incomplete last one is dropped (and consists of other images in the next epoch). A global batch is cut into
    `accumulate` micro-batches, whose images are distributed over the processes in turn, so an update sees the same images for
    any number of processes. The start is derived from the trainer's number of updates, so a resumed run continues where it
    stopped.

    Args:
        images: Number of images.
        global_batch: Images per optimizer update, over all processes and micro-batches.
        seed: Seed of the order.
        rank, world: Index of this process, and number of processes.
        accumulate: Micro-batches per update.
        updates_done: Returns the trainer's number of optimizer updates.
        groups: How the images lie in shards that are to be read a few at a time.

    Raises:
        UsageError: The global batch cannot be divided evenly.
        DataError: There are fewer images than one global batch.
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
        groups: Groups | None = None,
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
        self.updates_done, self.groups = updates_done, groups
        self.steps_per_epoch = images // global_batch

    def __len__(self) -> int:
        """Return the number of micro-batches per epoch."""
        return self.steps_per_epoch * self.accumulate

    def of_update(self, update: int) -> list[Key]:
        """Return all keys of the global batch of an update, counting from 0."""
        epoch, place = divmod(update, self.steps_per_epoch)
        start = place * self.global_batch
        return [(epoch, index) for index in self._order(epoch)[start : start + self.global_batch].tolist()]

    def __iter__(self) -> Iterator[list[Key]]:
        """Yield lists of (epoch, index)."""
        epoch, first = divmod(self.updates_done(), self.steps_per_epoch)
        order = self._order(epoch)
        micro = self.global_batch // self.accumulate
        end, together = self.steps_per_epoch * self.global_batch, micro * max(1, AT_ONCE // micro)
        for start in range(first * self.global_batch, end, together):
            images = order[start : min(start + together, end)]
            for batch in range(0, len(images), micro):
                yield [(epoch, index) for index in images[batch + self.rank : batch + micro : self.world].tolist()]

    def _order(self, epoch: int) -> Order | ShardOrder:
        """Return the order of an epoch, of which slices are taken."""
        if self.groups is not None:
            return ShardOrder(self.groups, seed=self.seed, epoch=epoch)
        return Order(self.images, seed=self.seed, epoch=epoch)
