"""Sources of encoded images, wherever the bytes are: in files, in archives, in tables.

A source says where the bytes of image `index` are (`file`), what would tell that they have changed (`stamp`) and how messages
name it (`describe`). Decoding, value ranges and caches are the same for all of them.
"""

import os
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sslvision.data.decode import MAX_PIXELS, File, read_image
from sslvision.data.eight_bits import ValueRange
from sslvision.data.source import SourceGone, UnreadableImage

HASHED = 1 << 18  # paths hashed at a time
FACTOR = np.uint64(0xD6E8FEB86659FD93)


class PathTable:
    """Paths, or names, as one array of bytes with offsets: millions cost no Python objects, and nothing per worker.

    Args:
        blob: Bytes of all paths, (B,) uint8; it may be a file mapped into memory.
        starts, ends: (N,) int64, where each path begins and ends. Several tables may share a blob.
    """

    def __init__(self, blob: np.ndarray, starts: np.ndarray, ends: np.ndarray):
        self.blob, self.starts, self.ends = blob, starts, ends

    @classmethod
    def of(cls, paths: Iterable[str | bytes]) -> "PathTable":
        """Return the table of some paths, which are read once."""
        blob, offsets = bytearray(), array("q", [0])
        for path in paths:
            blob += path if isinstance(path, bytes) else os.fsencode(path)
            offsets.append(len(blob))
        return cls.joined(np.frombuffer(blob, np.uint8), np.frombuffer(offsets, np.int64))

    @classmethod
    def joined(cls, blob: np.ndarray, offsets: np.ndarray) -> "PathTable":
        """Return the table of paths that follow one another, path n from offsets[n] to offsets[n + 1]: (N + 1,) int64."""
        return cls(blob, offsets[:-1], offsets[1:])

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.blob[self.starts[index] : self.ends[index]].tobytes())

    def take(self, indices: np.ndarray) -> "PathTable":
        """Return the table of some of the paths, with the same bytes."""
        return PathTable(self.blob, self.starts[indices], self.ends[indices])

    def hashes(self) -> np.ndarray:
        """Return a hash of each path, (N,) uint64, of all its bytes, eight at a time."""
        padded = len(self.blob) < 8
        blob = np.append(self.blob, np.zeros(8, np.uint8)) if padded else self.blob
        last = len(blob) - 8
        words = np.ndarray((last + 1,), "<u8", blob, strides=(1,))  # the eight bytes from each byte on
        hashes = np.empty(len(self), np.uint64)
        for start in range(0, len(self), HASHED):
            part = slice(start, start + HASHED)
            begins, lengths = self.starts[part], self.ends[part] - self.starts[part]
            mixed = lengths.astype(np.uint64)
            for within in range(0, int(lengths.max()), 8):
                live = np.flatnonzero(lengths > within)
                place = np.minimum(begins[live] + within, last)
                skipped = (begins[live] + within - place).astype(np.uint64)  # bytes, at the end of the blob
                unused = (8 - np.minimum(8, lengths[live] - within)).astype(np.uint64)  # bytes of what follows
                word = words[place] >> (skipped * np.uint64(8))
                word &= np.uint64(0xFFFFFFFFFFFFFFFF) >> (unused * np.uint64(8))
                word = (mixed[live] ^ word) * FACTOR
                mixed[live] = word ^ (word >> np.uint64(29))
            mixed *= FACTOR
            hashes[part] = mixed ^ (mixed >> np.uint64(32))
        return hashes

    def __getstate__(self) -> dict[str, Any]:
        """Return where arrays lie that are mapped from files: a process that is not forked maps them itself."""
        return {name: _in_file(array) or array for name, array in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= {name: one() if isinstance(one, InFile) else one for name, one in state.items()}


class InFile(NamedTuple):
    """Where an array lies in a file."""

    file: str
    dtype: str
    offset: int
    length: int

    def __call__(self) -> np.ndarray:
        """Return the array, mapped into memory; what is written to it stays in this process."""
        if not self.length:
            return np.zeros(0, self.dtype)
        return np.asarray(np.memmap(self.file, self.dtype, "c", self.offset, (self.length,)))


def _in_file(array: np.ndarray) -> InFile | None:
    """Return where an array lies in a file; None if it lies elsewhere, or not in one piece."""
    mapped: Any = array
    while mapped is not None and not isinstance(mapped, np.memmap):
        mapped = getattr(mapped, "base", None)
    if mapped is None or not isinstance(mapped.filename, str | os.PathLike) or not array.flags.c_contiguous:
        return None
    within = array.ctypes.data - mapped.ctypes.data
    return InFile(os.fspath(mapped.filename), array.dtype.str, mapped.offset + within, len(array))


@dataclass(eq=False)
class EncodedSource:
    """A source of encoded images; what it is a class of says where their bytes are.

    Attributes:
        name, channels, classes, labels: See `Source`.
        at_least, max_pixels, value_range: See `read_image`.
        version: Sizes and times of change of the files that hold the images, as text, where those are not files each.
    """

    name: str
    channels: int
    classes: tuple[str, ...] | None
    labels: Tensor | None
    at_least: int | None = None
    max_pixels: int = MAX_PIXELS
    images: Tensor | None = None
    value_range: ValueRange | None = None
    version: str = ""

    def __len__(self) -> int:
        raise NotImplementedError

    def file(self, index: int) -> File:
        """Return the path of the file with the bytes of an image, or a function that opens them."""
        raise NotImplementedError

    def stamp(self, index: int) -> str:
        """Return what changes when the bytes of an image do, such as size and time of its file."""
        raise NotImplementedError

    def describe(self, index: int) -> str:
        """Return how messages name an image."""
        raise NotImplementedError

    def gone(self) -> str | None:
        """Return in words that no image can be read any more, such as when a disk is unmounted; None if they can be."""
        return None

    def read(self, index: int) -> Tensor:
        """Return an image as (C, H, W) uint8; raises UnreadableImage, or SourceGone."""
        try:
            return read_image(
                self.file(index),
                self.channels,
                at_least=self.at_least,
                max_pixels=self.max_pixels,
                value_range=self.value_range,
            )
        except UnreadableImage as error:
            failed = isinstance(error.__cause__, OSError) and error.__cause__.errno
            if failed and (words := self.gone()):
                raise SourceGone(
                    f"{words} (while reading {self.describe(index)}). Is the disk still mounted? When it is, repeat the "
                    "command with resume=auto."
                ) from error
            raise


def file_stamp(path: str) -> str:
    """Return size and time of change of a file, as text; "gone" if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return "\0gone\0"
    return f"\0{status.st_size} {status.st_mtime_ns}\0"


def is_gone(folder: str) -> bool:
    """Return whether a folder cannot be listed or is empty, as the mount point of an unmounted disk is."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True
