"""Decoded images, kept as bytes: decoding a JPEG takes several times as long as cutting a crop from its pixels.

data.cache=disk keeps them in a folder and finds them there in every later run; data.cache=ram keeps them in shared memory
for as long as a process uses them. Either way all processes of a machine map the same bytes.

A cache is a folder, `pixels` and `index.npz`, whose name is a hash of what the pixels depend on: the files' paths, sizes
and times of change, and the settings. A changed file makes another cache, and the old one may be deleted like any other.
It is built beside its place and moved there when it is whole.

Images whose short side is above data.cache_size are resized to it, so a crop of them is resampled twice, and holds no more
detail than that: a fifth of a photograph of 500 x 375 is 194 pixels to a side, and 165 in a cache of 320. Scores and the
images looked at come from the cache as well.
"""

import atexit
import logging
import os
import random
import shutil
import time
import warnings
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from sslvision.data.cache_build import build, shrunk
from sslvision.data.source import Source, Splits, UnreadableImage
from sslvision.data.sources.folder import FileSource
from sslvision.errors import DataError, StorageError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Part of the name: raise it when the same files and settings come to mean other pixels, here or in decode.py.
VERSION = 1
SHARED_MEMORY = Path("/dev/shm")
INDEX, PIXELS = "index.npz", "pixels"

log = logging.getLogger(__name__)
_in_use: list[BinaryIO] = []  # the locks of caches in shared memory


@dataclass(eq=False)
class CachedSource:
    """A source of image files that were decoded before. What `read` returns lies in the cache: it must not be written to."""

    name: str
    channels: int
    classes: tuple[str, ...] | None
    labels: Tensor | None
    source: FileSource
    side: int  # short side of the largest images
    folder: Path
    starts: np.ndarray  # (N,) int64, indices in the file of pixels
    sizes: np.ndarray  # (N, 2) int32, height and width; 0 where an image is not in the cache
    reasons: dict[int, str]  # why it is not; those without a reason are read from their files
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

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pixels": None}  # a worker that is not forked maps the file itself


def cached(
    splits: Splits, kind: str | None, *, side: int = 320, folder: str | None = None, workers: int | None = None
) -> Splits:
    """Return splits whose image files are read from a cache, which is built where there is none.

    Args:
        splits: those whose images lie in memory stay as they are.
        kind: "disk", "ram", or "none" (None): the splits themselves.
        side: images with a longer short side are resized to it.
        folder: of caches on the disk; None: sslvision/ in $XDG_CACHE_HOME or ~/.cache.
        workers: processes that build it; None: as many as there are cores.

    Raises:
        UsageError: settings out of range, or a data set that has no files.
        StorageError: there is not the room.
    """
    if kind in (None, "none"):
        return splits
    if kind not in ("disk", "ram"):
        raise UsageError(f"data.cache={kind} is unknown: it is none, disk or ram.")
    if side < 1:
        raise UsageError(f"data.cache_size={side} is the short side of cached images in pixels: at least 1.")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    root = _shared_memory() if kind == "ram" else Path(folder or _default_folder()).expanduser().absolute()
    train, *held = (source if source is None else _cached(source, kind, side, root, workers) for source in splits)
    assert train is not None
    return Splits(train, *held)


def _cached(source: Source, kind: str, side: int, root: Path, workers: int) -> Source:
    if source.images is not None:
        return source
    if not isinstance(source, FileSource):
        raise UsageError(f"data.cache={kind} is for image files, and {source.name} has none: set data.cache=none.")
    where = root / f"{_prefix(kind)}{_key(source, side)}"
    with ExitStack() as until_done:
        lock = until_done.enter_context(_lock(where))
        _share(lock)
        while not (where / INDEX).is_file():
            if not _take(lock, without_locks=True):
                time.sleep(random.uniform(0.05, 0.2))  # who else looks for it now may take the lock
            elif not (where / INDEX).is_file():
                if kind == "ram":
                    _sweep(root, but=where)
                build(source, where, side=side, workers=workers, kind=kind)
            _share(lock)
        found = _open(source, where, side)
        if kind == "ram":
            _in_use.append(lock)
            until_done.pop_all()  # the lock is held until the process ends
            atexit.register(_leave, lock, where, os.getpid())
    return found


def _open(source: FileSource, where: Path, side: int) -> CachedSource:
    with np.load(where / INDEX, allow_pickle=False) as index:
        starts, sizes = index["starts"], index["sizes"]
        reasons = dict(zip(index["unreadable"].tolist(), index["reasons"].tolist(), strict=True))
        wanted = int(index["bytes"])
    if (there := (where / PIXELS).stat().st_size) != wanted:
        raise DataError(
            f"The cache of images {where} is damaged: {there:,} bytes instead of {wanted:,}. Delete that folder, and the next "
            "run builds it again."
        )
    about = (source.name, source.channels, source.classes, source.labels)
    pixels = _mapped(where / PIXELS)
    return CachedSource(*about, source, side, where, starts, sizes, reasons, pixels=pixels)


def _mapped(file: Path) -> Tensor:
    """Return a file's bytes as they are read, without main memory of one's own."""
    try:
        mapped = np.memmap(file, mode="r")
    except FileNotFoundError as error:
        raise DataError(f"The cache of images {file.parent} is gone. Start again: it is built anew.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the tensor must not be written to
        return torch.from_numpy(mapped)


def _key(source: FileSource, side: int) -> str:
    """Return a hash of all that the pixels depend on, short of the files' contents."""
    settings = (VERSION, source.channels, side, source.at_least, source.max_pixels)
    digest = blake2b(repr(settings).encode(), digest_size=12)
    for index in range(len(source)):
        path = source.describe(index)
        try:
            status = os.stat(path)
            stamp = f"\0{status.st_size} {status.st_mtime_ns}\0"
        except OSError:
            stamp = "\0gone\0"
        digest.update(os.fsencode(path + stamp))
    return digest.hexdigest()


def _prefix(kind: str) -> str:
    """Return what tells our caches, and one person's, in the shared memory of a machine."""
    return f"sslvision-{os.getuid()}-" if kind == "ram" else ""


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sslvision"


def _shared_memory() -> Path:
    if not SHARED_MEMORY.is_dir() or fcntl is None:
        raise UsageError(f"data.cache=ram needs {SHARED_MEMORY}, which Linux has; set data.cache=disk.")
    return SHARED_MEMORY


# Locks: one process builds, the others wait; what is in shared memory stays while anybody uses it.


def _lock(where: Path) -> BinaryIO:
    """Open the lock of a cache. Its file stays, empty: two processes must not lock two files of one name."""
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        return open(f"{where}.lock", "ab")
    except OSError as error:
        raise StorageError(
            f"A cache of images cannot be written to {where.parent}: {error.strerror}. Give data.cache_dir a folder that "
            "can be written to, or set data.cache=none."
        ) from error


def _take(lock: BinaryIO, *, without_locks: bool) -> bool:
    """Return whether the lock is ours alone now; if not, we have none. Never waits: whoever shares it may do so for days.

    Args:
        lock: of a cache.
        without_locks: the answer where a file system has none. Two that build cost time, but do no harm; nothing must be
            deleted that may be in use.
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
    """Wait until no process builds, and keep others from deleting."""
    if fcntl is None:
        return
    with suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning(
                "Another process builds the cache of these images, or frees it: waiting for it (%s).", lock.name
            )
            fcntl.flock(lock, fcntl.LOCK_SH)


def _leave(lock: BinaryIO, where: Path, process: int) -> None:
    """Free the shared memory, if no other process uses it."""
    if os.getpid() == process and _take(lock, without_locks=False):
        shutil.rmtree(where, ignore_errors=True)


def _sweep(root: Path, *, but: Path) -> None:
    """Free what processes have left that were killed."""
    for folder in root.glob(f"{_prefix('ram')}*/"):
        if folder != but:
            with _lock(folder.with_suffix("")) as lock:
                if _take(lock, without_locks=False):
                    shutil.rmtree(folder, ignore_errors=True)
