"""Decoded images in a cache: decoding a JPEG takes several times as long as cropping its pixels.

data.cache=disk keeps them in a folder, where every later run finds them. data.cache=ram is the same with a folder in shared
memory, deleted when the last process that uses it ends. In both cases all processes of a machine map the same bytes.

A cache is a folder with the files `pixels` and `index.npz`. Its name is a hash of what the pixels depend on: the paths,
sizes and modification times of the files, and the settings. A changed file results in another cache; the old one may be
deleted at any time. A cache is built in a temporary folder and renamed when it is complete. Of the files that could not be
read, one for each reason is tried again: where it can be read by now, another cache is built.

Images whose short side exceeds data.cache_size are resized to it, so a crop of them is resampled twice and has less detail:
a crop of a fifth of a 500 x 375 photograph has 194 pixels per side, and 165 from a cache of 320. Scores and pictures are
computed from the cached images as well.
"""

import atexit
import logging
import os
import random
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sslvision.data.arrays import reads_deep_color
from sslvision.data.cache_build import build, shrunk
from sslvision.data.eight_bits import ValueRange
from sslvision.data.encoded import EncodedSource
from sslvision.data.source import Source, SourceGone, Splits, UnreadableImage
from sslvision.errors import DataError, StorageError, UsageError
from sslvision.system.files import SHARED_MEMORY, cache_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Part of the key: increment it when the same files and settings result in other pixels, here or in decode.py.
VERSION = 2
INDEX, PIXELS = "index.npz", "pixels"
TRIED = 16  # unreadable files that are tried again

log = logging.getLogger(__name__)
_in_use: list[BinaryIO] = []  # the locks of caches in shared memory


@dataclass(eq=False)
class CachedSource:
    """A source of decoded image files. `read` returns views of the cache, which must not be modified."""

    name: str
    channels: int
    classes: tuple[str, ...] | None
    labels: Tensor | None
    source: EncodedSource
    side: int  # short side of the largest images
    folder: Path
    starts: np.ndarray  # (N,) int64, offsets in the file of pixels
    sizes: np.ndarray  # (N, 2) int32, height and width; 0 if an image is not in the cache
    reasons: dict[int, str]  # why images are not in the cache; those without a reason are read from their files
    images: Tensor | None = None
    pixels: Tensor | None = field(default=None, repr=False)  # the mapped file

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> Tensor:
        height, width = self.sizes[index].tolist()
        if not height:
            if index in self.reasons:
                raise UnreadableImage(self.reasons[index])
            return shrunk(self.source.read(index), self.side)
        if self.pixels is None:
            self.pixels = _mapped(self.folder / PIXELS)
        start = int(self.starts[index])
        flat = self.pixels[start : start + height * width * self.channels]
        return flat.view(height, width, self.channels).permute(2, 0, 1)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    @property
    def version(self) -> str:
        """Return what changes when the images do; see EncodedSource."""
        return self.source.version

    @property
    def value_range(self) -> ValueRange | None:
        """Return the value range of the files."""
        return self.source.value_range

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pixels": None}  # a worker process that is not forked maps the file itself


def cached(
    splits: Splits, kind: str | None, *, side: int = 320, folder: str | None = None, workers: int | None = None
) -> Splits:
    """Return splits whose image files are read from a cache, which is built if there is none.

    Args:
        splits: Splits; sources in memory are returned unchanged.
        kind: "disk", "ram", or "none" (None) for no cache.
        side: Images with a longer short side are resized to it.
        folder: Folder for caches on the disk; None: sslvision/ in $XDG_CACHE_HOME or ~/.cache.
        workers: Number of processes that build it; None: one per core.

    Raises:
        UsageError: A setting is out of range, or a source has no files.
        StorageError: There is not enough free space.
    """
    if kind in (None, "none"):
        return splits
    if kind not in ("disk", "ram"):
        raise UsageError(f"data.cache={kind} is unknown: it is none, disk or ram.")
    if side < 1:
        raise UsageError(f"data.cache_size={side} must be 1 or more: it is the short side of cached images in pixels.")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    root = _memory_folder() if kind == "ram" else cache_folder(folder)

    def open_cached(source: Source) -> Source:
        if source.images is not None:
            return source
        if not isinstance(source, EncodedSource):
            raise UsageError(f"data.cache={kind} is for image files, and {source.name} has none: set data.cache=none.")
        return _cached(source, root / _key(source, side), side, workers, temporary=kind == "ram")

    train = open_cached(splits.train)
    test, validation = (None if source is None else open_cached(source) for source in (splits.test, splits.validation))
    return Splits(train, test, validation, splits.remarks)


def _cached(source: EncodedSource, where: Path, side: int, workers: int, *, temporary: bool) -> CachedSource:
    """Return the cache `where`, after building it if need be; a temporary one is deleted when its last user ends."""
    with ExitStack() as until_done:
        lock = until_done.enter_context(_lock(where))
        _share(lock)
        while not (where / INDEX).is_file():
            if not _take(lock, without_locks=True):
                time.sleep(random.uniform(0.05, 0.2))  # another process that looks for it now may take the lock
            elif not (where / INDEX).is_file():
                if temporary:
                    _delete_unused(where.parent)
                build(source, where, side=side, workers=workers)
            _share(lock)
        found = _open(source, where, side)
        if readable := now_readable(source, found.reasons):
            _tell_of_new_readers(where, found.reasons, readable)
            return _cached(source, where.with_name(f"{where.name}n"), side, workers, temporary=temporary)
        if temporary:
            _in_use.append(lock)
            until_done.pop_all()  # the lock is held until the process ends
            atexit.register(_leave, lock, where, os.getpid())
    return found


def _open(source: EncodedSource, where: Path, side: int) -> CachedSource:
    with np.load(where / INDEX, allow_pickle=False) as index:
        starts, sizes = index["starts"], index["sizes"]
        reasons = dict(zip(index["unreadable"].tolist(), index["reasons"].tolist(), strict=True))
        wanted = int(index["bytes"])
    if (there := (where / PIXELS).stat().st_size) != wanted:
        raise DataError(
            f"The image cache {where} is damaged: {there:,} bytes instead of {wanted:,}. Delete that folder; the next run "
            "builds it again."
        )
    about = (source.name, source.channels, source.classes, source.labels)
    pixels = _mapped(where / PIXELS)
    return CachedSource(*about, source, side, where, starts, sizes, reasons, pixels=pixels)


def now_readable(source: Source, reasons: Mapping[int, str]) -> list[int]:
    """Return images that could not be read before and can be now, for want of a plugin then: one for each reason, of TRIED.

    Args:
        source: The files.
        reasons: Why images could not be read, by index.
    """
    readable = []
    for index in list({reason: index for index, reason in reasons.items()}.values())[:TRIED]:
        with suppress(UnreadableImage, SourceGone):
            source.read(index)
            readable.append(index)
    return readable


def _tell_of_new_readers(where: Path, reasons: Mapping[int, str], readable: Sequence[int]) -> None:
    again = {reasons[index] for index in readable}
    count = sum(reason in again for reason in reasons.values())
    log.warning(
        "The image cache %s lacks %s of %s unreadable images that can be read now, such as with a new plugin (%s). It is built "
        "again beside it; the old one may be deleted.",
        *(where, f"{count:,}", f"{len(reasons):,}", min(again)),
    )


def _mapped(file: Path) -> Tensor:
    """Return the bytes of a file, mapped into memory."""
    try:
        mapped = np.memmap(file, mode="r")
    except FileNotFoundError as error:
        raise DataError(f"The image cache {file.parent} is gone. Start again to rebuild it.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tensor is not writable
        return torch.from_numpy(mapped)


def _key(source: EncodedSource, side: int) -> str:
    """Return a hash of everything the pixels depend on, except the contents of the files."""
    settings: tuple[Any, ...] = (VERSION, source.channels, side, source.at_least, source.max_pixels, source.value_range)
    if source.value_range is not None and not reads_deep_color():
        settings += ("high bytes of color",)
    digest = blake2b(repr(settings).encode(), digest_size=12)
    for index in range(len(source)):
        digest.update(os.fsencode(source.describe(index) + source.stamp(index)))
    return digest.hexdigest()


def _memory_folder() -> Path:
    """Return the folder for the caches of this user in shared memory."""
    if not SHARED_MEMORY.is_dir() or fcntl is None:
        raise UsageError(f"data.cache=ram needs {SHARED_MEMORY}, which Linux has; set data.cache=disk.")
    return SHARED_MEMORY / f"sslvision-{os.getuid()}"


# Locks: one process builds while the others wait; a cache in shared memory is kept while any process uses it.


def _lock(where: Path) -> BinaryIO:
    """Open the lock file of a cache. It is never deleted: two processes must not lock different files of one name."""
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        return open(f"{where}.lock", "ab")
    except OSError as error:
        raise StorageError(
            f"An image cache cannot be written to {where.parent}: {error.strerror}. Set data.cache_dir to a writable folder, "
            "or set data.cache=none."
        ) from error


def _take(lock: BinaryIO, *, without_locks: bool) -> bool:
    """Return whether this process now holds the lock exclusively; otherwise it holds none. Never waits for the others.

    Args:
        lock: Lock of a cache.
        without_locks: Return value on file systems without locks. Two processes may build the same cache, which only costs
            time, but must not delete one that may be in use.
    """
    if fcntl is None:
        return without_locks
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_UN)
        return False
    except OSError:
        return without_locks
    return True


def _share(lock: BinaryIO) -> None:
    """Wait until no process builds the cache, and prevent others from deleting it."""
    if fcntl is None:
        return
    with suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("Another process builds or deletes the cache of these images; waiting for it (%s).", lock.name)
            fcntl.flock(lock, fcntl.LOCK_SH)


def _leave(lock: BinaryIO, where: Path, process: int) -> None:
    """Delete a cache in shared memory if no other process uses it."""
    if os.getpid() == process and _take(lock, without_locks=False):
        shutil.rmtree(where, ignore_errors=True)


def _delete_unused(root: Path) -> None:
    """Delete caches in shared memory whose processes were killed."""
    for folder in root.glob("*/"):
        with _lock(folder.with_suffix("")) as lock:  # without .part, of one that was being built
            if _take(lock, without_locks=False):
                shutil.rmtree(folder, ignore_errors=True)
