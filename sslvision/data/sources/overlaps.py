"""Images that are in the folders of two classes, or among training and held-out images: by link, by copy, by name of folder.

An image has one label here. One that lies in two class folders is trained on with both, and counts as a mistake with one of
them; one that is held out and trained on makes scores too good. Both are said, with counts, and left to the user.

Copies are files with the same bytes. Their sizes are compared first, then two pieces of 4 KiB, and then everything. Of more
than 10,000 images those are looked at whose names have the lowest hashes, so that copies of the same name stay together.
"""

import filecmp
import heapq
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, NamedTuple

from sslvision.data.sources.list_images import share, some

LOOK_AT = 10_000  # images at most
PIECE = 4096  # bytes in the middle and at the end of a file, which are compared first
JOINED = re.compile(r"\s*[,;+&|]\s*|[\s_-]+and[\s_-]+|[\s_-]+")  # between the names of classes in one name


class Image(NamedTuple):
    """An image: its path relative to the root, its class, and whether it is held out."""

    path: str
    label: str
    held_out: bool


def chosen(images: Iterable[Image], count: int) -> list[Image]:
    """Return those of `count` images to look at: all, or 10,000 with the lowest hashes of their names."""

    def key(image: Image) -> bytes:
        return blake2b(os.fsencode(image.path.rpartition("/")[2]), digest_size=8).digest()

    return list(images) if count <= LOOK_AT else heapq.nsmallest(LOOK_AT, images, key=key)


def tell_overlaps(
    root: str,
    looked_at: Sequence[Image],
    count: int,
    remarks: list[str],
    same: Callable[[str, Iterable[Image]], Iterable[list[Image]]],
) -> None:
    """Add to `remarks`, in sentences, which of some labeled images are in two classes, or held out and trained on.

    Args:
        root: Folder that the paths are relative to.
        looked_at: Labeled images of the set, from `chosen`.
        count: Number of all labeled images.
        remarks: Receives what the user should know.
        same: Returns groups of images with the same bytes, as `same_files` does.
    """
    if not looked_at:
        return
    of = f"of {len(looked_at):,} images" + (" looked at" if len(looked_at) < count else "")
    groups = [sorted(group) for group in same(root, looked_at)]
    if several := [group for group in groups if len({image.label for image in group}) > 1]:
        count = sum(map(len, several))
        remarks.append(
            f"{count:,} {of} ({100 * count / len(looked_at):.3g} %) are the same picture in folders of two or more classes, as "
            f"links or copies: {_shown(several)}. An image has one label here: these count with each of theirs in training and "
            "in scores, and at least one is wrong. Keep each in the folder of one class; where images have several labels, "
            "choose the one that matters most, or train a classifier for each question."
        )
    twice = [
        group
        for group in groups
        if {image.held_out for image in group} == {True, False} and len({image.label for image in group}) == 1
    ]
    if twice:
        held = sum(image.held_out for group in twice for image in group)
        all_held = sum(image.held_out for image in looked_at)
        remarks.append(
            f"{share(held, all_held, 'held-out images')} are also among the training images, as links or copies: "
            f"{_shown(twice)}. Scores on them are too good: delete the copies on one side."
        )


def same_files(root: str, images: Iterable[Image]) -> Iterator[list[Image]]:
    """Yield groups of two or more images whose files have the same bytes. Files that cannot be read are left out."""
    by_size = defaultdict[int, defaultdict[Any, list[Image]]](
        lambda: defaultdict(list)
    )  # and then by file: links to one
    for image in images:
        with suppress(OSError):
            status = os.stat(os.path.join(root, image.path))
            by_size[status.st_size][(status.st_dev, status.st_ino) if status.st_ino else image.path].append(image)
    for size, files in by_size.items():
        if not size:
            continue
        by_piece = defaultdict[bytes, list[list[Image]]](list)
        for links in files.values():
            with suppress(OSError):
                piece = _pieces(os.path.join(root, links[0].path), size) if len(files) > 1 else b""
                by_piece[piece].append(links)
        for alike in by_piece.values():
            yield from _equal(root, alike)


def _equal(root: str, alike: list[list[Image]]) -> Iterator[list[Image]]:
    """Yield those of some images that are equal to the last byte; links to one file are given together."""
    while alike:
        first, *others = alike
        same, different = [*first], list[list[Image]]()
        for other in others:
            equal = False
            with suppress(OSError):
                one, two = (os.path.join(root, links[0].path) for links in (first, other))
                equal = filecmp.cmp(one, two, shallow=False)
            if equal:
                same += other
            else:
                different.append(other)
        if len(same) > 1:
            yield same
        alike = different


def _pieces(file: str, size: int) -> bytes:
    with open(file, "rb", buffering=0) as opened:
        opened.seek(size // 2)
        middle = opened.read(PIECE)
        opened.seek(max(0, size - PIECE))
        return blake2b(middle + opened.read(PIECE), digest_size=16).digest()


def _shown(groups: Sequence[Sequence[Image]]) -> str:
    return some([" = ".join(image.path for image in group[:3]) for group in groups], most=3)


def tell_joined_names(classes: Sequence[str], remarks: list[str]) -> None:
    """Say that the names of some classes are those of others together: cat, dog and cat_dog."""
    names = set(classes)
    joined = [name for name in classes if len(parts := JOINED.split(name)) > 1 and names.issuperset(parts)]
    if joined:
        remarks.append(
            f"{some([f'{name}/' for name in joined])}: named like several classes together, and taken for one class of its "
            "own, as an image has one label here."
        )
