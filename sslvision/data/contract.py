"""Checking a source of a user's own in the words of its contract (data/source.py): before training, and as images are read.

An image of another type would otherwise be copied into a batch of bytes without a word: floats from 0 to 1 become black.
"""

from typing import Any, NoReturn, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslvision.data.encoded import EncodedSource
from sslvision.data.source import Source, Splits, UnreadableImage
from sslvision.errors import SSLVisionError, UsageError

ATTRIBUTES = ("name", "channels", "classes", "labels", "images", "read", "describe", "__len__")
TRIED = 10  # images read until one is readable


class BrokenContract(UsageError):
    """A source that does not keep the contract."""

    def __init__(self, message: str):
        # A loader's worker passes its whole traceback on as the message, with ours at the end.
        super().__init__(message.rpartition(f"{BrokenContract.__name__}: ")[2].strip())


class CheckedSource:
    """A source whose images are checked as they are read.

    Args:
        source: The source, whose attributes have been checked.
        split: Its part of the data set, for messages.
    """

    def __init__(self, source: Source, split: str):
        self.source, self.split = source, split
        self.name, self.channels, self.classes = source.name, source.channels, source.classes
        self.labels, self.images = source.labels, source.images

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Tensor:
        """Return image `index` as (C, H, W) uint8; raises what the source raises, and BrokenContract."""
        image = self.source.read(index)
        _check_image(self.source, self.split, index, image)
        return image

    def describe(self, index: int) -> str:
        """Return the source's name of image `index`."""
        return self.source.describe(index)


def check_contract(splits: Any) -> Splits:
    """Check every source of `splits` that is not part of this package: its attributes, its labels and its first image.

    Returns:
        The splits, with sources that check every image as it is read.

    Raises:
        BrokenContract: With what was found, what the contract says, and how to get there.
    """
    if not isinstance(splits, tuple) or not hasattr(splits, "train"):
        raise BrokenContract(
            f"The data source returned {_kind(splits)}, not sslvision.Splits: return Splits(train, test), where test may be "
            "None (docs/extending.md)."
        )
    checked: Any = splits
    for name in ("train", "test", "validation"):
        source = getattr(splits, name, None)
        if source is not None and not type(source).__module__.startswith("sslvision."):
            _check_source(source, name)
            if source.images is None and not isinstance(source, EncodedSource):
                checked = checked._replace(**{name: CheckedSource(source, name)})
    return cast(Splits, checked)


def _check_source(source: Source, split: str) -> None:
    if missing := [name for name in ATTRIBUTES if not hasattr(source, name)]:
        _refuse(source, split, f"has no {', '.join(missing)}", "these belong to every source")
    if type(source.channels) is not int or source.channels < 1:
        _refuse(source, split, f"has channels={source.channels!r}", "it is the number of channels of every image")
    if not len(source):
        _refuse(source, split, "has no images", "its length is their number, at least 1")
    _check_labels(source, split)
    if source.images is None:
        _check_first_image(source, split)
    else:
        wanted = f"(N, C, H, W) uint8, here ({len(source)}, {source.channels}, H, W)"
        images: Any = source.images
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            _refuse(
                source, split, f"has images that are {_kind(images)}", f"{wanted}, or None if `read` is to be called"
            )
        if tuple(images.shape[:2]) != (len(source), source.channels):
            _refuse(source, split, f"has images of shape {tuple(images.shape)}", wanted)


def _check_labels(source: Source, split: str) -> None:
    labels, wanted = (
        source.labels,
        f"labels are a tensor (N,) of int64, one class for each image, here ({len(source)},), or None",
    )
    if labels is None:
        return
    if not isinstance(labels, Tensor):
        _refuse(source, split, f"has labels that are {_kind(labels)}", f"{wanted}: torch.tensor(labels)")
    if labels.dtype != torch.int64:
        _refuse(source, split, f"has labels of {labels.dtype}", f"{wanted}: labels.long()")
    if tuple(labels.shape) != (len(source),):
        _refuse(source, split, f"has labels of shape {tuple(labels.shape)}", wanted)
    low, high = int(labels.min()), int(labels.max())
    count = high + 1 if source.classes is None else len(source.classes)
    if low < 0 or high >= count:
        _refuse(source, split, f"has labels from {low} to {high}", f"with {count} classes they are 0 to {count - 1}")


def _check_first_image(source: Source, split: str) -> None:
    index = 0
    for index in range(min(TRIED, len(source))):
        try:
            image: Any = source.read(index)
            break
        except UnreadableImage:
            continue
        except SSLVisionError:
            raise
        except Exception as error:
            words = " ".join(str(error).split())[:200]
            raise BrokenContract(
                f"{_title(source, split)}: read({index}) raised {type(error).__name__}: {words}. A source raises "
                "UnreadableImage (sslvision.data.source) for an image that cannot be decoded; any other exception ends the "
                "run."
            ) from error
    else:
        return  # the loader counts and reports them
    _check_image(source, split, index, image)
    described: Any = source.describe(index)
    if not isinstance(described, str):
        _refuse(source, split, f"describe({index}) returned {_kind(described)}", "a str, such as the path of the image")


def _check_image(source: Source, split: str, index: int, image: Any) -> None:
    channels = source.channels
    is_bytes = isinstance(image, Tensor) and image.dtype == torch.uint8
    if is_bytes and image.ndim == 3 and image.shape[0] == channels and image.numel():
        return
    found = f"read({index}) returned {_kind(image)}"
    wanted = f"(C, H, W) uint8 in 0..255, here ({channels}, H, W)"
    if not isinstance(image, Tensor):
        how = (
            "sslvision.data.decode.from_pil(image, channels)" if isinstance(image, Image.Image) else "torch.from_numpy"
        )
        _refuse(source, split, found, f"a tensor {wanted}: {how} makes one")
    if image.dtype.is_floating_point:
        unit = image.numel() > 0 and float(image.min()) >= 0 and float(image.max()) <= 1
        how = (
            "(image * 255).round().byte()" if unit else "scale it to 0..255 with one range for all images, then .byte()"
        )
        _refuse(source, split, found, f"{wanted}: {how}")
    if image.dtype != torch.uint8:
        _refuse(source, split, found, f"{wanted}: scale it to 0..255 with one range for all images, then .byte()")
    how = ""
    if image.ndim == 3 and image.shape[2] == channels:
        how = ": image.permute(2, 0, 1)"
    elif image.ndim == 2 and channels == 1:
        how = ": image[None]"
    elif image.ndim == 3 and image.numel():
        how = f", as many as data.channels={channels}: give data.channels={min(image.shape)} if all images have so many"
    _refuse(source, split, found, f"{wanted}{how}")


def _kind(value: Any) -> str:
    """Return what a value is, in words: its type, with dtype, shape and range where it has them."""
    if not isinstance(value, Tensor | np.ndarray):
        return f"a {type(value).__module__}.{type(value).__name__}".replace(" builtins.", " ")
    kind = "a tensor" if isinstance(value, Tensor) else "a NumPy array"
    dtype = str(value.dtype).removeprefix("torch.")
    numbers = value.size if isinstance(value, np.ndarray) else value.numel()
    span = f" from {value.min().item():g} to {value.max().item():g}" if numbers and value.dtype != torch.bool else ""
    return f"{kind} of shape {tuple(value.shape)}, {dtype}{span}"


def _title(source: Any, split: str) -> str:
    return f"The data source {type(source).__name__} ({split})"


def _refuse(source: Any, split: str, found: str, expected: str) -> NoReturn:
    raise BrokenContract(
        f"{_title(source, split)}: {found}. Expected: {expected}. The contract is in sslvision/data/source.py and "
        "docs/extending.md."
    )
