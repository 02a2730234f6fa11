"""Building a cache of decoded images. Image sizes are read from the file headers first, to know the space needed."""

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
from sslvision.data.encoded import EncodedSource
from sslvision.data.source import UnreadableImage
from sslvision.data.workers import begin_worker
from sslvision.system.files import require_free

RESERVE = 0.1  # fraction of the free space that is left free
Cached = tuple[int, int, str | None]  # height, width, and why an image is missing; "": read its file again


def build(source: EncodedSource, where: Path, *, side: int, workers: int) -> None:
    """Decode all images of a source into the folder `where`, which appears when it is complete.

    Raises StorageError, before anything is decoded, if there is not enough free space.
    """
    for left in where.parent.glob(f"{where.name}.part*"):  # left by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    console = Console(soft_wrap=True, highlight=False)
    headers = list(_each(_Headers(source), workers, "Sizes of the images"))
    sizes = shrunk_size(np.array(headers, dtype=np.int64), side)  # (N, 2)
    slots = sizes.prod(axis=1) * source.channels  # (N,) bytes
    starts = np.cumsum(slots) - slots
    needed = int(slots.sum())
    require_free(
        where.parent,
        needed,
        f"{len(source):,} cached images with a short side of {side} pixels",
        advice="or set data.cache=disk and data.cache_dir on another disk, a smaller data.cache_size, or data.cache=none",
        reserve=RESERVE,
    )
    console.print(
        f"Decoding {len(source):,} images once into {where}: {needed:,} bytes, short side at most {side} pixels."
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
    except OSError:  # or, on a file system without locks, another process was faster
        if not (where / "index.npz").is_file():
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def shrunk_size(size: np.ndarray, side: int) -> np.ndarray:
    """Return heights and widths (..., 2) with a short side of at most `side` pixels."""
    factor = np.minimum(1, side / np.maximum(1, size.min(-1, keepdims=True)))
    return np.rint(size * factor).astype(np.int64)


def shrunk(image: Tensor, side: int) -> Tensor:
    """Resize an image (C, H, W) uint8 to a short side of `side` pixels, if it is larger."""
    height, width = shrunk_size(np.array(image.shape[1:]), side).tolist()
    return resize(image, (height, width))


class _Headers(Dataset[tuple[int, int]]):
    """Height and width of each image from the header of its file; 0 if it is unreadable."""

    def __init__(self, source: EncodedSource):
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[int, int]:
        try:
            return image_size(self.source.file(index), self.source.channels, max_pixels=self.source.max_pixels)
        except UnreadableImage:
            return 0, 0


class _Images(Dataset[Cached]):
    """Writes each image to its offset in the file."""

    def __init__(self, source: EncodedSource, file: Path, sizes: np.ndarray, starts: np.ndarray):
        self.source, self.file, self.sizes, self.starts = source, file, sizes, starts

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Cached:
        try:
            image = self.source.read(index)
        except UnreadableImage as error:
            at_fault = isinstance(error.__cause__, OSError) and error.__cause__.errno  # of the disk, not of the image
            return 0, 0, "" if at_fault else str(error)
        height, width = self.sizes[index].tolist()
        if height and image.shape[1] >= height and image.shape[2] >= width:
            image = resize(image, (height, width))
        if image.numel() > height * width * self.source.channels:
            return 0, 0, ""  # the file has just changed
        with open(self.file, "r+b", buffering=0) as file:
            file.seek(int(self.starts[index]))
            file.write(image.permute(1, 2, 0).contiguous().numpy().data)
        return image.shape[1], image.shape[2], None  # smaller than reserved if data.at_least reduced the decoded size


def _each(images: Dataset[Any], workers: int, what: str) -> Iterator[Any]:
    """Yield the result for each image, in order, with a progress bar."""
    loader = DataLoader(
        images,
        batch_size=32,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=begin_worker,
    )
    for batch in track(loader, description=what, transient=True, disable=not Console().is_terminal):
        yield from batch


def _reserve(file: Path, size: int) -> None:
    """Create a file of `size` bytes, with its space allocated."""
    with open(file, "wb") as opened:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), 0, size)
        else:
            opened.truncate(size)
