"""How a cache of decoded images is built: sizes by the files' headers first, so that it is known what room is needed."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sslvision.augment.crops import resize
from sslvision.data.decode import image_size
from sslvision.data.source import UnreadableImage
from sslvision.data.sources.folder import FileSource
from sslvision.data.workers import begin_worker
from sslvision.errors import StorageError

KEPT_FREE = 0.1  # of the room that is free
Cached = tuple[int, int, str | None]  # height, width, and why an image has none; "": ask the file again


def build(source: FileSource, where: Path, *, side: int, workers: int, kind: str) -> None:
    """Decode all images of a source into the folder `where`, which appears when it is whole.

    Raises StorageError, before anything is decoded, if there is not the room.
    """
    for left in where.parent.glob(f"{where.name}.part*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    console = Console(soft_wrap=True, highlight=False)
    headers = list(_each(_Headers(source), workers, "Sizes of the images"))
    sizes = shrunk_size(np.array(headers, dtype=np.int64), side)  # (N, 2)
    slots = sizes.prod(axis=1) * source.channels  # (N,) bytes
    starts = np.cumsum(slots) - slots
    needed = int(slots.sum())
    _check_room(where, needed, len(source), side, kind)
    console.print(
        f"Decoding {len(source):,} images once into {where}: {needed:,} bytes, short side {side} pixels at most."
    )
    part = where.with_name(f"{where.name}.part{os.getpid()}")
    try:
        part.mkdir()
        _reserve(part / "pixels", max(1, needed))
        builder = _Images(source, part / "pixels", sizes, starts)
        found = list(_each(builder, workers, "Decoding"))
        sizes = np.array([(height, width) for height, width, _ in found], dtype=np.int32)  # (N, 2)
        reasons = {index: reason for index, (_, _, reason) in enumerate(found) if reason}
        with open(part / "index.npz", "wb") as file:
            np.savez(
                file,
                starts=starts,
                sizes=sizes,
                unreadable=np.array(list(reasons), dtype=np.int64),
                reasons=np.array(list(reasons.values()), dtype=np.str_),
                bytes=max(1, needed),
            )
            file.flush()
            os.fsync(file.fileno())
        os.rename(part, where)
    except OSError:  # or another process was quicker, where there are no locks
        if not (where / "index.npz").is_file():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def shrunk_size(size: np.ndarray, side: int) -> np.ndarray:
    """Return heights and widths (..., 2) with a short side of `side` pixels at most."""
    factor = np.minimum(1, side / np.maximum(1, size.min(-1, keepdims=True)))
    return np.rint(size * factor).astype(np.int64)


def shrunk(image: Tensor, side: int) -> Tensor:
    """Resize an image (C, H, W) uint8 to a short side of `side` pixels, if it is larger."""
    height, width = shrunk_size(np.array(image.shape[1:]), side).tolist()
    return resize(image, (height, width))


class _Headers(Dataset[tuple[int, int]]):
    """Height and width of each image by its file's header; 0 for those that have none."""

    def __init__(self, source: FileSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, int]:
        try:
            return image_size(self.source.describe(index), max_pixels=self.source.max_pixels)
        except UnreadableImage:
            return 0, 0


class _Images(Dataset[Cached]):
    """Writes each image to its place in the file."""

    def __init__(self, source: FileSource, file: Path, sizes: np.ndarray, starts: np.ndarray):
        self.source, self.file, self.sizes, self.starts = source, file, sizes, starts

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Cached:
        try:
            image = self.source.read(index)
        except UnreadableImage as error:
            at_fault = isinstance(error.__cause__, OSError) and error.__cause__.errno  # the disk, not the image
            return 0, 0, "" if at_fault else str(error)
        height, width = self.sizes[index].tolist()
        if height and image.shape[1] >= height and image.shape[2] >= width:
            image = resize(image, (height, width))
        if image.numel() > height * width * self.source.channels:
            return 0, 0, ""  # the file was changed a moment ago
        with open(self.file, "r+b", buffering=0) as file:
            file.seek(int(self.starts[index]))
            file.write(image.permute(1, 2, 0).contiguous().numpy().data)
        return image.shape[1], image.shape[2], None  # less than its place has room for if data.at_least spared decoding


def _each(images: Dataset[Any], workers: int, what: str) -> Iterator[Any]:
    """Yield what is found for each image, in their order, with a bar."""
    loader = DataLoader(
        images,
        batch_size=32,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=begin_worker,
    )
    for batch in track(loader, description=what, transient=True, disable=not Console().is_terminal):
        yield from batch


def _check_room(where: Path, needed: int, images: int, side: int, kind: str) -> None:
    free = shutil.disk_usage(where.parent).free
    if kind == "ram" and (available := _available_memory()) is not None:
        free = min(free, available)
    if needed > (1 - KEPT_FREE) * free:
        instead = "data.cache=disk, " if kind == "ram" else "data.cache_dir=... on another disk, "
        raise StorageError(
            f"A cache of {images:,} images with a short side of {side} pixels takes {needed:,} bytes, and there are {free:,} "
            f"free in {where.parent}, a tenth of which is left alone. Make room (old caches there may be deleted), or set "
            f"{instead}a smaller data.cache_size, or data.cache=none."
        )


def _available_memory() -> int | None:
    """Return the bytes of main memory that processes can still have, where Linux tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def _reserve(file: Path, size: int) -> None:
    """Make a file of `size` bytes, the room for which is taken at once."""
    with open(file, "wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            opened.truncate(size)
