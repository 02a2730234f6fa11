"""The contract of a data source: images in a fixed order. A source of your own needs nothing else from this package.

A source is any object with the attributes and methods of `Source`; it need not inherit from it. It is sent to the loader's
worker processes, so it must be picklable, and should not hold open files. A minimal one reads files:

    class Photos:
        name, channels, classes, labels, images = "my photos", 3, None, None, None

        def __init__(self, paths): self.paths = paths
        def __len__(self): return len(self.paths)
        def read(self, index): return read_image(self.paths[index], 3)  # of data/decode.py
        def describe(self, index): return self.paths[index]
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from torch import Tensor

from sslvision.errors import DataError


class UnreadableImage(Exception):
    """An image that cannot be decoded. The message is the reason; the loader counts it, reports it and uses another image."""


class SourceGone(DataError):
    """No image can be read any more, as when a disk is unmounted. Ends the run."""

    def __init__(self, message: str):
        # A loader's worker passes its whole traceback on as the message, with ours at the end.
        super().__init__(message.rpartition(f"{SourceGone.__name__}: ")[2].strip())


class Source(Protocol):
    """N images in a fixed order.

    The order must be the same in every process and every run: an index identifies an image, its random crops and its label.

    Attributes:
        name: Name of the data set in tables and messages.
        channels: C, number of channels of all images.
        classes: Names of the labels 0, 1, ...; None if there are no labels.
        labels: (N,) int64, each in 0..len(classes)-1; None if there are no labels. Pretraining never uses them.
        images: (N, C, H, W) uint8 if all images have one size and fit into memory: whole batches are then indexed at once
            and cropped on the training device. None otherwise: worker processes call `read` for each image.
    """

    name: str
    channels: int
    classes: tuple[str, ...] | None
    labels: Tensor | None
    images: Tensor | None

    def __len__(self) -> int:
        """Return N."""
        ...

    def read(self, index: int) -> Tensor:
        """Return an image, decoded and upright.

        Args:
            index: Index of the image, 0..N-1.

        Returns:
            (C, H, W) uint8 in 0..255. H and W may differ between images. The tensor is only read, so it may be a view.

        Raises:
            UnreadableImage: This image cannot be decoded; the message is the reason in words. Any other exception ends the
                run.
            SourceGone: No image can be read any more.
        """
        ...

    def describe(self, index: int) -> str:
        """Return how messages and tables name an image: its path, or its index in the data set."""
        ...


class Splits(NamedTuple):
    """The sources of a data set.

    Attributes:
        train: Images to train on.
        test: Images that scores are measured on; None if there are none.
        validation: Images that choices during training are based on; None if there are none.
        remarks: What was left out or guessed, in sentences with counts: printed before training, and kept in results.json.
    """

    train: Source
    test: Source | None
    validation: Source | None = None
    remarks: tuple[str, ...] = ()


@contextmanager
def remarks_in_errors(remarks: Sequence[str]) -> Iterator[None]:
    """Add remarks on a data set to the message of a DataError: what was left out may be what is missing."""
    try:
        yield
    except DataError as error:
        if not remarks or isinstance(error, SourceGone):
            raise
        raise DataError(" ".join((str(error), *(remark for remark in remarks if remark not in str(error))))) from error
