"""Any folder of images as a data set: flat or nested, with or without classes, with or without train/ and val/.

- Splits: train/ with test/ (or testing/) or val/ (or valid/, validation/) next to it. Scores are measured on test/, or on
  val/ if there is no test/; with both, val/ is for choices during training. Without either, a fraction of the files is
  held out, chosen by a hash of their relative paths: the same files on every machine, and nearly the same ones when files
  are added.
- Classes: if all images are in two or more subfolders, those of the first level are the classes. Otherwise the images
  have no labels.
- Order: sorted by relative path.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from sslvision.data.decode import MAX_PIXELS, read_image
from sslvision.data.eight_bits import ValueRange, value_range_from
from sslvision.data.source import SourceGone, Splits, UnreadableImage
from sslvision.data.sources.scan import Found, scan
from sslvision.data.value_range import look_at
from sslvision.errors import DataError, UsageError

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation")
TEST = ("test", "testing")
MOST_HELD_OUT = 5000

log = logging.getLogger(__name__)


@dataclass(eq=False)
class FileSource:
    """A source of image files. Paths are one bytes object and one array, so that millions are cheap to send to a worker."""

    name: str
    channels: int
    classes: tuple[str, ...] | None
    labels: Tensor | None
    root: str  # folder of the images
    paths: bytes  # relative to root, or absolute, each followed by a zero byte
    ends: np.ndarray  # (N,) int64, offsets of the zero bytes
    at_least: int | None = None  # see decode.read_image
    max_pixels: int = MAX_PIXELS
    images: Tensor | None = None
    value_range: ValueRange | None = None  # of images of more than 8 bits

    def __len__(self) -> int:
        return len(self.ends)

    def read(self, index: int) -> Tensor:
        path = self.describe(index)
        try:
            return read_image(
                path,
                self.channels,
                at_least=self.at_least,
                max_pixels=self.max_pixels,
                value_range=self.value_range,
            )
        except UnreadableImage as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno and _is_gone(self.root):
                raise SourceGone(
                    f"The folder of the images is gone or empty: {self.root} (while reading {path}). Is the disk still "
                    "mounted? When it is, resume with resume=auto."
                ) from error
            raise

    def describe(self, index: int) -> str:
        start = self.ends[index - 1] + 1 if index else 0
        return os.path.join(self.root, os.fsdecode(self.paths[start : self.ends[index]]))


def _is_gone(folder: str) -> bool:
    """Return whether a folder cannot be listed or is empty, as the mount point of an unmounted disk is."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True


def joined(paths: Sequence[str]) -> tuple[bytes, np.ndarray]:
    """Return FileSource's `paths` and `ends`."""
    together = os.fsencode("".join(f"{path}\0" for path in paths))
    return together, np.flatnonzero(np.frombuffer(together, np.uint8) == 0)


def open_folder(
    root: str | os.PathLike[str],
    *,
    channels: int = 3,
    holdout: float = 0.05,
    follow_symlinks: bool = False,
    at_least: int | None = None,
    max_pixels: int = MAX_PIXELS,
    value_range: str | Sequence[float] | Mapping[str, Sequence[float]] = "auto",
) -> Splits:
    """Return the images in `root`, as described at the top of this module.

    Files ending in .jpg, .jpeg, .png, .webp, .tif, .tiff, .bmp or .gif count as images, in either case. Hidden files
    and folders (leading dot, __MACOSX) are skipped, and so are symbolic links to files outside `root`, unless
    `follow_symlinks`. Everything else that is skipped is logged as a warning.

    `holdout`: Fraction of the images to hold out if there is no split: at least one image, at most 5,000; 0 holds out
    none (test is None). `at_least` and `max_pixels` are passed to `read_image`.

    `value_range`: For images of more than 8 bits, the values that become black and white in all of them, [low, high];
    "auto": from a sample of the training images (data/value_range.py).

    Raises UsageError for settings out of range, DataError if there are no images, or if the classes of val/ or test/ differ
    from those of train/.
    """
    check_holdout(holdout)
    if channels < 1:
        raise UsageError(f"data.channels must be at least 1, not {channels}.")
    given = value_range_from(value_range)
    root = os.path.abspath(os.path.expanduser(root))
    found = scan(root, follow_symlinks=follow_symlinks)
    train_folder, held_folders = _split_folders(root, found)
    train, classes = _images_and_classes(found, train_folder)
    splits = [(train_folder, train, classes)]  # folder, images, classes: train, then validation and test
    for folder in held_folders:
        held, names = _images_and_classes(found, folder, at_least_classes=1)
        _check_classes(root, (train_folder, classes), (folder, names))
        splits.append((folder, held, names and classes))
    if not held_folders:
        held_out = hold_out(train, holdout)
        sides = ([path for path, held in zip(train, held_out, strict=True) if held == side] for side in (False, True))
        splits = [(train_folder, images, classes) for images in sides if images]
    name = f"{os.path.basename(root) or root} ({' + '.join(f'{len(images):,}' for _, images, _ in splits)})"

    def source(folder: str, images: list[str], classes: tuple[str, ...] | None) -> FileSource:
        labels = _labels(images, classes) if classes else None
        where = os.path.join(root, folder) if folder else root
        return FileSource(name, channels, classes, labels, where, *joined(images), at_least, max_pixels)

    first, *held_sources = [source(*split) for split in splits]
    decided, remarks = look_at(first, given)
    for one in (first, *held_sources):
        one.value_range = decided
    test, validation = (*reversed(held_sources), None, None)[:2]  # a single one is the test split
    return Splits(first, test, validation, remarks)


def check_holdout(holdout: float) -> None:
    """Raise UsageError if `holdout` is not a fraction that leaves images to train on."""
    if not 0 <= holdout <= 0.9:
        raise UsageError(f"data.holdout is the fraction of images to hold out, from 0 to 0.9, not {holdout}.")


def hold_out(keys: Sequence[str], fraction: float) -> np.ndarray:
    """Return (N,) bool, True for the images to hold out: those whose keys have the lowest hashes.

    Exactly `fraction` of them, rounded, but at least 1, at most 5,000, and never all.
    """
    held_out = np.zeros(len(keys), dtype=bool)
    count = min(max(1, round(fraction * len(keys))), MOST_HELD_OUT, len(keys) - 1) if fraction else 0
    digests = b"".join(blake2b(os.fsencode(key), digest_size=8).digest() for key in keys)
    held_out[np.argsort(np.frombuffer(digests, ">u8"), kind="stable")[:count]] = True
    return held_out


def _split_folders(root: str, found: Found) -> tuple[str, list[str]]:
    """Return the folder of the training images, and the existing ones of validation and test images.

    They are relative to the root; "" is the root itself.
    """
    tops = {path.partition("/")[0] for path in found.images if "/" in path}
    flat = sum("/" not in path for path in found.images)
    train = _first_named(TRAIN, tops)
    held = [folder for names in (VALIDATION, TEST) if (folder := _first_named(names, tops))]
    empty = _first_named(TRAIN, found.folders - tops)
    if held and empty and not train:
        raise DataError(
            f"{os.path.join(root, empty)} holds no images, and {held[0]}/ beside it does. Put the training images there, "
            f"or give {os.path.join(root, held[0])} as data.root to train on those."
        )
    if train and (held or (tops == {train} and not flat)):
        used = tuple(f"{folder}/" for folder in (train, *held))
        if unused := sum(not path.startswith(used) for path in found.images):
            *others, last = used
            within = f"{', '.join(others)} and {last}" if others else last
            log.warning("%s: %s images outside %s are not used.", root, f"{unused:,}", within)
        return train, held
    return "", []


def _first_named(names: Sequence[str], folders: set[str]) -> str | None:
    return next((folder for name in names for folder in sorted(folders) if folder.lower() == name), None)


def _images_and_classes(
    found: Found, folder: str, at_least_classes: int = 2
) -> tuple[list[str], tuple[str, ...] | None]:
    """Return the sorted paths of a folder's images, relative to it, and its classes."""
    prefix = f"{folder}/" if folder else ""
    images = sorted(path.removeprefix(prefix) for path in found.images if path.startswith(prefix))
    classes = {path.partition("/")[0] for path in images}
    split_words = {name.lower() for name in classes} <= {*TRAIN, *VALIDATION, *TEST}  # these are not classes
    if any("/" not in path for path in images) or len(classes) < at_least_classes or split_words:
        return images, None
    folders = {path.removeprefix(prefix) for path in found.folders if path.startswith(prefix)}
    if empty := sorted(name for name in folders - classes if "/" not in name):
        log.warning("%s: class folders without images are ignored: %s.", folder or ".", _some(empty))
    return images, tuple(sorted(classes))


def _check_classes(
    root: str, train: tuple[str, tuple[str, ...] | None], test: tuple[str, tuple[str, ...] | None]
) -> None:
    (train_folder, train_names), (test_folder, test_names) = train, test
    if not train_names or not test_names:
        if train_names:
            log.warning("%s: %s/ has no class folders: its images have no labels.", root, test_folder)
        return
    if unknown := sorted(set(test_names) - set(train_names)):
        raise DataError(
            f"{os.path.join(root, test_folder)} has classes that {train_folder}/ has not: {_some(unknown)} "
            f"({train_folder}/ has {_some(train_names)}). Class folders must have the same names in both."
        )


def _labels(images: Sequence[str], classes: tuple[str, ...]) -> Tensor:
    indices = {name: place for place, name in enumerate(classes)}
    return torch.tensor([indices[path.partition("/")[0]] for path in images], dtype=torch.int64)


def _some(names: Sequence[str], most: int = 10) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
