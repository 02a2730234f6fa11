"""Images with masks: for each image a file of the same name whose values are the classes of its pixels.

Masks lie in folders whose names say so, beside folders of images: images/ and masks/, JPEGImages/ and SegmentationClass/,
images/training/ and annotations/training/, train/images/ and train/masks/. Splits are told by names of folders as in
layout.py; without any, a part is held out by a hash of the names.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslvision.augment.crops import resize
from sslvision.data.decode import read_image
from sslvision.data.source import UnreadableImage
from sslvision.data.sources.companions import IMAGES, is_companion
from sslvision.data.sources.layout import split_of
from sslvision.errors import DataError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm"}
NAMES = "classes.txt"  # names of classes, one a line, from class 0 on
SHAPES_DIFFER = 0.02  # of the ratio of height and width: a mask may be smaller than its image, and rounded
INDEXED = ("L", "P", "1", "I", "I;16")  # modes of PIL whose values are numbers of classes
LAYOUT = (
    "Expected are images and masks of the same names in folders beside each other, such as images/train/a.jpg and "
    "masks/train/a.png, or train/images/a.jpg and train/masks/a.png"
)


@dataclass(frozen=True)
class Masked:
    """An image as it is encoded, and its mask in full.

    Attributes:
        index: Its index.
        pixels: (C, H, W) uint8, resized as a whole.
        mask: (h, w) int64, as large as its file; -1 where the class is to be ignored.
    """

    index: int
    pixels: Tensor
    mask: Tensor


@dataclass(frozen=True)
class MaskedImages(torch.utils.data.Dataset[Masked | str]):
    """Pairs of an image and a mask, as a data set for torch's DataLoader.

    Attributes:
        pairs: Paths of images and masks.
        channels: Channels of the images.
        size: Height and width to which images are resized.
        ignore: Values of masks that are no class.
    """

    pairs: Sequence[tuple[Path, Path]]
    channels: int
    size: tuple[int, int]
    ignore: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Masked | str:
        """Return an image with its mask; for one that cannot be read, why not."""
        image, mask = self.pairs[index]
        try:
            pixels, classes = read_image(image, self.channels), read_mask(mask)
        except UnreadableImage as error:
            return f"{image}: {error}"
        (H, W), (h, w) = pixels.shape[1:], classes.shape
        if abs(H * w - W * h) > SHAPES_DIFFER * H * w:
            return f"{mask}: {h}x{w} pixels have another shape than the {H}x{W} of its image"
        for value in self.ignore:
            classes = torch.where(classes == value, -1, classes)
        return Masked(index, resize(pixels, self.size), classes)


@dataclass(frozen=True)
class MaskedFolder:
    """What a folder of images with masks holds.

    Attributes:
        root: The folder.
        train, test: Paths of images and their masks.
        names: Names of classes from its classes.txt; None without one.
        remarks: What was left out or chosen, in sentences.
    """

    root: Path
    train: list[tuple[Path, Path]]
    test: list[tuple[Path, Path]]
    names: tuple[str, ...] | None
    remarks: list[str] = field(default_factory=list)


def open_masked_folder(root: str | os.PathLike[str], *, holdout: float = 0.2) -> MaskedFolder:
    """Find the images of a folder and their masks.

    Args:
        root: The folder.
        holdout: Share of the images that is held out for testing if there is only one split.

    Raises:
        DataError: There is no such folder, there are no pairs in it, or an image has two masks.
    """
    where = Path(root)
    if not where.is_dir():
        raise DataError(f"There is no folder {where} of images with masks.")
    images, masks = dict[tuple[str | None, str], Path](), defaultdict[tuple[str | None, str], list[Path]](list)
    for file in _files(where):
        split, name, is_mask = _place(file.relative_to(where))
        if is_mask:
            masks[split, name].append(file)
        else:
            if (other := images.setdefault((split, name), file)) != file:
                raise DataError(
                    f"{other} and {file} have the same name, so that a mask could be of either: rename one."
                )
    if several := [found for found in masks.values() if len(found) > 1]:
        raise DataError(
            f"{len(several):,} images have more than one mask, such as {', '.join(map(str, several[0]))}: keep one folder of "
            "masks."
        )
    pairs = {key: (images[key], masks[key][0]) for key in sorted(images.keys() & masks.keys(), key=str)}
    if not pairs:
        found = f"{len(images):,} images and {sum(map(len, masks.values())):,} masks"
        raise DataError(f"No image in {where} has a mask: {found} were found. {LAYOUT}.")
    remarks = []
    for kind, others, missing in (("images", images, "a mask"), ("masks", masks, "an image")):
        if left := len(others) - len(pairs):
            remarks.append(
                f"{left:,} of {len(others):,} {kind} have no file of the same name as {missing}, and were left out."
            )
    train, test = _split(pairs, where, holdout, remarks)
    file = where / NAMES
    names = tuple(file.read_text(encoding="utf-8").split("\n")) if file.is_file() else ()
    return MaskedFolder(where, train, test, tuple(name.strip() for name in names if name.strip()) or None, remarks)


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(folder, name)


def _place(path: Path) -> tuple[str | None, str, bool]:
    """Return the split of a file, its name without what tells images from masks, and whether it is a mask."""
    split: str | None = None
    kept, is_mask = list[str](), False
    for part in path.parts[:-1]:
        told, rest = split_of(part)
        if is_companion(part):
            is_mask = True
        elif told and not rest:
            split = told
        elif part.lower() not in IMAGES:
            kept.append(part)
    return split, "/".join([*kept, path.stem]), is_mask


def _split(
    pairs: dict[tuple[str | None, str], tuple[Path, Path]], root: Path, holdout: float, remarks: list[str]
) -> tuple[list[tuple[Path, Path]], list[tuple[Path, Path]]]:
    """Return pairs for training and for testing."""
    of = {split: [pair for key, pair in pairs.items() if key[0] == split] for split in {key[0] for key in pairs}}
    test = of.get("test") or of.get("validation")
    train = of.get("train") or of.get(None)
    if train and test:
        return train, test
    everything = list(pairs.values())
    ranked = sorted(everything, key=lambda pair: blake2b(pair[0].relative_to(root).as_posix().encode()).digest())
    held = set(ranked[: round(holdout * len(everything))])
    if not held or len(held) == len(everything):
        raise DataError(
            f"{root} has {len(everything):,} images with masks and no split: {holdout:g} of them for testing leaves nothing "
            "to train or to test on."
        )
    remarks.append(
        f"There is no split into train/ and val/: {len(held):,} of {len(everything):,} images are for testing."
    )
    return [pair for pair in everything if pair not in held], [pair for pair in everything if pair in held]


def read_mask(path: Path) -> Tensor:
    """Return a mask (h, w) int64.

    Raises:
        UnreadableImage: It cannot be read, or has colors, which are no numbers of classes.
    """
    try:
        with Image.open(path) as image:
            if image.mode not in INDEXED:
                raise UnreadableImage(
                    f"a mask must have a number for each pixel (gray or palette), not colors (mode {image.mode})"
                )
            return torch.from_numpy(np.array(image).astype(np.int64))
    except (OSError, ValueError, SyntaxError) as error:
        raise UnreadableImage(f"the mask cannot be read: {error}") from error
