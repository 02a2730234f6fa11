"""A zip or tar file as the folder that it holds."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np

from sslvision.data.archive import ArchiveSource, Members, members_of
from sslvision.data.encoded import file_stamp
from sslvision.data.sources.list_images import Found, extension_of, kind_of_file, no_images
from sslvision.data.sources.overlaps import Image

ENDINGS = (".zip", ".tar")


def is_archive(path: str) -> bool:
    """Return whether a path is that of a zip or tar file."""
    return path.lower().endswith(ENDINGS) and os.path.isfile(path)


def open_archive(path: str) -> "ArchiveFolder":
    """Return the index of an archive; raises DataError if it cannot be read."""
    return ArchiveFolder(path, members_of(path))


class ArchiveFolder:
    """The files of an archive by name.

    Args:
        path: Path of the archive.
        members: Its members.
    """

    def __init__(self, path: str, members: Members):
        self.path, self.members = path, members
        self.version = file_stamp(path)
        self.index = {
            members.names[row]: row for row in range(len(members.names))
        }  # the last of equal names, as unpacked

    def scan(self) -> Found:
        """Return what is in it, as `scan` does for a folder.

        Raises:
            DataError: There are no images.
        """
        found = Found()
        for name in self.index:
            kind = kind_of_file(name)
            if kind == "image":
                found.images.append(name)
                folders = name.split("/")[:-1]
                found.folders |= {"/".join(folders[:depth]) for depth in range(1, min(len(folders), 3) + 1)}
            elif kind in ("unread", "other"):
                (found.unread if kind == "unread" else found.other)[extension_of(name)] += 1
            elif kind == "hidden":
                found.left_out["hidden"].append(name)
        if not found.images:
            raise no_images(self.path, found, "data.root")
        return found

    def source(self, where: str, images: Iterable[str], name: str, about: Sequence[Any]) -> ArchiveSource:
        """Return the source of some images.

        Args:
            where: The archive, or a folder in it as a path.
            images: Names, relative to `where`.
            name: Name of the set.
            about: Channels, classes, labels, at_least and max_pixels of the source.
        """
        rows = np.array([self.index[path] for path in self._inside(where, images)], np.int64)
        channels, classes, labels, at_least, max_pixels = about
        return ArchiveSource(
            name,
            channels,
            classes,
            labels,
            at_least,
            max_pixels,
            archives=(self.path,),
            archive=np.zeros(len(rows), np.int32),
            members=self.members.take(rows),
            version=self.version,
        )

    def same_files(self, root: str, images: Iterable[Image]) -> Iterator[list[Image]]:
        """Yield groups of images with the same bytes: by size and checksum, or in a tar file by all bytes."""
        groups = defaultdict[Any, list[Image]](list)
        images = list(images)
        rows = [self.index[path] for path in self._inside(root, [image.path for image in images])]
        sizes = self.members.sizes[rows].tolist()
        alike = {size for size, count in Counter(sizes).items() if count > 1}
        for image, row, size in zip(images, rows, sizes, strict=True):
            checksum = int(self.members.checksums[row])
            if checksum < 0 and size in alike:
                groups[size, self._digest(row)].append(image)
            elif checksum >= 0:
                groups[size, checksum].append(image)
        return (group for (size, _), group in groups.items() if len(group) > 1 and size)

    def _digest(self, row: int) -> bytes:
        with open(self.path, "rb", buffering=0) as file:
            file.seek(int(self.members.offsets[row]))
            return blake2b(file.read(int(self.members.sizes[row]))).digest()

    def _inside(self, where: str, paths: Iterable[str]) -> list[str]:
        prefix = os.path.relpath(where, self.path).replace(os.sep, "/")
        return list(paths) if prefix == "." else [f"{prefix}/{path}" for path in paths]
