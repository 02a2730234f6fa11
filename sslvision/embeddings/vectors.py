"""Embeddings as unit vectors, mapped from a file: what search, duplicates, outliers, select and cluster compare.

The first of these commands writes the vectors once, in one pass over the parts, in the number type of the embeddings. Main
memory holds one part at a time; pages of the file are read when they are needed. The files may be deleted at any time.

With `center`, the mean of all embeddings is subtracted first. Features of a network share a large part (those of a short
training nearly all of it), which makes every cosine similarity near 1; without it, similarities spread around 0.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sslvision.embeddings.parts import number_of_parts, part_file, read_about, read_embeddings, read_part
from sslvision.errors import DataError, UsageError
from sslvision.system.files import require_free, written_whole

CENTERED_FROM = 100  # images: the mean of a few is near each of them
EQUAL = 1e-6  # length, as a share of the embedding's, below which a centered embedding is the mean


@dataclass(frozen=True)
class Embeddings:
    """All rows of a folder of embeddings.

    Attributes:
        folder: The folder.
        about: Its description.
        paths, splits, labels, predictions: Columns; see Rows.
        vectors: (N, D) unit vectors in main memory, mapped from a file.
        mean: (D,) float32, what was subtracted before; zeros if nothing was.
    """

    folder: Path
    about: dict[str, Any]
    paths: Sequence[str]
    splits: Sequence[str]
    labels: Sequence[str] | None
    predictions: Sequence[str] | None
    vectors: Tensor
    mean: Tensor

    def __len__(self) -> int:
        return len(self.paths)

    def unit(self, embeddings: Tensor) -> Tensor:
        """Return other embeddings (n, D) of the same network as unit vectors, float32."""
        return torch.from_numpy(_unit(embeddings.float().numpy(), self.mean.numpy()))


def open_embeddings(folder: str | Path, *, center: bool | None = None) -> Embeddings:
    """Open a folder that `sslvision embed` wrote.

    Args:
        folder: The folder.
        center: Whether the mean of all embeddings is subtracted; None: from 100 images on.

    Raises:
        UsageError: There are no embeddings, or not all of them yet.
        DataError: A file is damaged, or no image could be read.
        StorageError: The disk has too little free space for the vectors.
    """
    folder = Path(folder).expanduser()
    about = read_about(folder)
    files = [part_file(folder, number, about["format"]) for number in range(number_of_parts(about))]
    if missing := [file for file in files if not file.is_file()]:
        raise UsageError(
            f"{len(missing):,} of {len(files):,} files of embeddings={folder} are missing, the first: {missing[0].name}. Let "
            f"the command end that writes them, or repeat it: {about.get('command', 'sslvision embed ...')}"
        )
    columns: dict[str, list[str]] = {"paths": [], "splits": [], "labels": [], "predictions": []}
    for file in files:
        rows = read_part(file)
        for name, values in columns.items():
            values += getattr(rows, name) or ()
    count = len(columns["paths"])
    if not count:
        raise DataError(f"embeddings={folder} has no rows: none of its {about['images']:,} images could be read.")
    center = count >= CENTERED_FROM if center is None else center
    vectors, mean = _vectors(folder, files, count, about, center=center)
    given = {name: values or None for name, values in columns.items()}
    return Embeddings(folder, about, vectors=vectors, mean=mean, **given)  # type: ignore[arg-type]


def _vectors(
    folder: Path, files: Sequence[Path], count: int, about: dict[str, Any], *, center: bool
) -> tuple[Tensor, Tensor]:
    """Return the unit vectors (N, D), mapped from a file that is written if necessary, and the mean that was subtracted."""
    where = folder / f"vectors{'-centered' if center else ''}.npy"
    facts = where.with_suffix(".json")
    identity = {"key": about["key"], "rows": count}
    width, dtype = about["dim"], np.dtype(about["dtype"])
    try:
        recorded = json.loads(facts.read_text())
        mean = np.array(recorded.pop("mean"), dtype=np.float32)
        if recorded == identity:
            return _mapped(where, (count, width)), torch.from_numpy(mean)
    except (OSError, ValueError, KeyError, AttributeError):  # not there, or not whole
        pass
    require_free(where, count * width * dtype.itemsize, "The vectors", advice="or embed with dtype=float16")
    mean = np.zeros(width, dtype=np.float32)
    if center:
        mean = (sum(part.sum(axis=0, dtype=np.float64) for part in _parts(files)) / count).astype(np.float32)
    with written_whole(where, concurrent=True) as opened:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(opened, header)
        for part in _parts(files):
            opened.write(_unit(part, mean).astype(dtype).data)
    with written_whole(facts, "w", concurrent=True) as opened:
        opened.write(json.dumps({**identity, "mean": mean.tolist()}))
    return _mapped(where, (count, width)), torch.from_numpy(mean)


def _parts(files: Sequence[Path]) -> Iterator[np.ndarray]:
    """Yield the embeddings (n, D) of each part."""
    for file in files:
        part = read_embeddings(file)
        if not np.isfinite(part.sum(dtype=np.float64)):
            raise DataError(f"{file} has values that are not finite: the weights are damaged, or float16 is too small.")
        yield part


def _unit(embeddings: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return embeddings (n, D) less the mean, float32, of length 1. One that is the mean keeps the direction of the mean."""
    given = embeddings.astype(np.float32)
    centered = given - mean
    whole, rest = (np.linalg.norm(rows, axis=1, keepdims=True) for rows in (given, centered))
    return np.where(rest > EQUAL * whole, centered / np.maximum(rest, 1e-30), given / np.maximum(whole, 1e-30))


def _mapped(file: Path, shape: tuple[int, int]) -> Tensor:
    # "c": pages are read on access, and changes to them stay in memory.
    array = np.load(file, mmap_mode="c", allow_pickle=False)
    if array.shape != shape:
        raise ValueError(f"{file} has the shape {array.shape}")
    return torch.from_numpy(array)
