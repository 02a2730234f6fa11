"""torchvision's labeled classification sets by name, as sources.

Sets that hold their images in memory (CIFAR, the MNIST family, SVHN, STL10, USPS, SEMEION) become tensors, sets that
list image files are read like folders, and the few others are read one image at a time. All images are converted as in
decode.py. If a set has no test split, a fraction is held out, as for a folder.
"""

import difflib
import inspect
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets

from sslvision.data.decode import from_pil, reasons_in_words
from sslvision.data.encoded import PathTable
from sslvision.data.source import Source, Splits
from sslvision.data.sources.embedded import MemorySource
from sslvision.data.sources.folder import FileSource, check_holdout, hold_out
from sslvision.errors import DataError, UsageError

Arguments = dict[str, Any]
FLAG: tuple[Arguments, Arguments] = ({"train": True}, {"train": False})


def _split(train: str, test: str) -> tuple[Arguments, Arguments]:
    return {"split": train}, {"split": test}


# Set -> arguments for its training and its test split; None if it has only one split. Test splits need labels, so CLEVR,
# ImageNet, Imagenette and Places365 are evaluated on their val split.
SPLITS: dict[str, tuple[Arguments, Arguments] | None] = {
    **dict.fromkeys(("CIFAR10", "CIFAR100", "FashionMNIST", "KMNIST", "MNIST", "QMNIST", "USPS"), FLAG),
    "EMNIST": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    **dict.fromkeys(("Country211", "DTD", "FER2013", "Flowers102", "Food101", "GTSRB"), _split("train", "test")),
    **dict.fromkeys(("PCAM", "RenderedSST2", "STL10", "StanfordCars", "SVHN"), _split("train", "test")),
    **dict.fromkeys(("CLEVRClassification", "ImageNet", "Imagenette"), _split("train", "val")),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), _split("trainval", "test")),
    "Places365": _split("train-standard", "val"),
    "INaturalist": ({"version": "2021_train"}, {"version": "2021_valid"}),
    **dict.fromkeys(("Caltech101", "Caltech256", "EuroSAT", "FakeData", "SEMEION", "SUN397"), None),
}


@dataclass(eq=False)
class DatasetSource:
    """A source that reads a torchvision data set one image at a time."""

    name: str
    channels: int
    classes: tuple[str, ...] | None
    labels: Tensor | None
    dataset: Any
    indices: np.ndarray  # (N,) indices of the images in the data set
    split: str
    images: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> Tensor:
        place = int(self.indices[index])
        with reasons_in_words():
            return from_pil(self.dataset[place][0], self.channels)

    def describe(self, index: int) -> str:
        return f"{self.name}, {self.split} image {self.indices[index]}"


def open_torchvision(
    name: str,
    root: str | os.PathLike[str],
    *,
    channels: int = 3,
    holdout: float = 0.05,
    download: bool = False,
) -> Splits:
    """Return a torchvision classification set, with its labels and class names (numbers if it has no names).

    `root` is the folder in which torchvision stores the set; `channels` 1 or 3; `holdout` as for a folder, for sets that have
    only one split (Caltech, EuroSAT, FakeData, SEMEION, SUN397).

    Raises UsageError for an unknown set or a setting out of range, DataError if the files do not exist.
    """
    check_holdout(holdout)
    if channels not in (1, 3):
        raise UsageError(f"data.channels must be 1 or 3 for a torchvision set, not {channels}.")
    if name not in SPLITS:
        raise UsageError(_unknown(name))
    root = os.path.abspath(os.path.expanduser(root))
    train_test = SPLITS[name]
    parts = [_Part(_open(name, root, arguments, download), root) for arguments in train_test or ({},)]
    classes = _class_names(parts)
    if train_test is None:
        held_out = hold_out(parts[0].keys(), holdout)
        indices = [np.flatnonzero(~held_out), np.flatnonzero(held_out)]
        parts = parts * 2 if held_out.any() else parts
    else:
        indices = [np.arange(len(part.dataset)) for part in parts]
    title = f"{name} ({' + '.join(f'{len(some):,}' for some in indices[: len(parts)])})"
    sources = [
        part.source(title, channels, classes, chosen, split)
        for part, chosen, split in zip(parts, indices, ("train", "test"), strict=False)
    ]
    return Splits(sources[0], sources[1] if len(sources) == 2 else None)


class _Part:
    """One split of a torchvision set, with its labels and paths."""

    def __init__(self, dataset: Any, root: str):
        self.dataset, self.root = dataset, root
        self.labels = _labels(dataset)
        self.paths = _paths(dataset)
        if self.paths is not None:  # SUN397 lists its files in the order of the file system
            order = sorted(range(len(self.paths)), key=self.paths.__getitem__)
            self.paths = [self.paths[place] for place in order]
            self.labels = None if self.labels is None else self.labels[order]

    def keys(self) -> list[str]:
        """Return the keys for `hold_out`: relative paths, or indices."""
        if self.paths is None:
            return [str(place) for place in range(len(self.dataset))]
        common = os.path.commonpath([os.path.dirname(path) for path in self.paths])
        return [os.path.relpath(path, common).replace(os.sep, "/") for path in self.paths]

    def source(
        self, title: str, channels: int, classes: tuple[str, ...] | None, indices: np.ndarray, split: str
    ) -> Source:
        labels = None if self.labels is None else self.labels[torch.from_numpy(indices)]
        names = None if labels is None else classes
        images = _images(self.dataset, channels)
        if images is not None:
            return MemorySource(title, channels, names, labels, images[torch.from_numpy(indices)], split)
        if self.paths is not None:
            paths = PathTable.of(self.paths[place] for place in indices)
            return FileSource(title, channels, names, labels, root=self.root, paths=paths)
        return DatasetSource(title, channels, names, labels, self.dataset, indices, split)


def _unknown(name: str) -> str:
    known = {one.lower(): one for one in SPLITS}
    near = [known[one] for one in difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.6)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(sorted(SPLITS))}."
    if hasattr(datasets, name):
        hint = f"Its images have several labels, boxes, masks or none. {hint}"
    return f"{name} is not one of torchvision's labeled classification sets. {hint}"


def _open(name: str, root: str, arguments: Arguments, download: bool) -> Any:
    kind = getattr(datasets, name)
    accepted = inspect.signature(kind).parameters
    can_download = "download" in accepted or issubclass(kind, datasets.MNIST)  # EMNIST, QMNIST: among its **kwargs
    settings = arguments | ({"root": root} if "root" in accepted else {})
    settings |= {"download": download} if can_download else {}
    try:
        with _safe_archives():
            dataset = kind(**settings)
    except Exception as error:  # each set reports missing files differently
        raise DataError(_cannot_open(name, root, error, download, can_download)) from error
    if hasattr(dataset, "h5py"):  # PCAM stores the module, which cannot be pickled
        dataset.h5py = SimpleNamespace(File=dataset.h5py.File)
    return dataset


@contextmanager
def _safe_archives() -> Iterator[None]:
    """Reject members of a tar file that would be extracted outside of its folder, in any version of torchvision."""
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def _cannot_open(name: str, root: str, error: Exception, download: bool, can_download: bool) -> str:
    for cause in (error, error.__context__):
        if isinstance(cause, ModuleNotFoundError):
            package = (cause.name or "").partition(".")[0]
            return f"{name} needs the Python package {package}: pip install {package}."
    words = re.sub(r"[. ]*(You can (use|set) download=True to download it)?[. ]*$", "", str(error))
    by_hand = f"put its files into {root} as torchvision's documentation of datasets.{name} says"
    advice = by_hand if download or not can_download else f"Pass data.download=true to fetch it, or {by_hand}"
    failed = "could not be downloaded to" if download and can_download else "could not be opened from"
    return f"{name} {failed} {root}: {words}. {advice[0].upper()}{advice[1:]}."


def _paths(dataset: Any) -> list[str] | None:
    """Return the image files of the set if it has one for each image."""
    if isinstance(dataset, datasets.Caltech101):
        folders = [os.path.join(dataset.root, "101_ObjectCategories", dataset.categories[y]) for y in dataset.y]
        return [f"{folder}/image_{n:04d}.jpg" for folder, n in zip(folders, dataset.index, strict=True)]
    if isinstance(dataset, datasets.Caltech256):
        folders = [os.path.join(dataset.root, "256_ObjectCategories", dataset.categories[y]) for y in dataset.y]
        names = [f"{y + 1:03d}_{n:04d}.jpg" for y, n in zip(dataset.y, dataset.index, strict=True)]
        return [f"{folder}/{name}" for folder, name in zip(folders, names, strict=True)]
    if isinstance(dataset, datasets.INaturalist):
        return [os.path.join(dataset.root, dataset.all_categories[c], name) for c, name in dataset.index]
    for attribute in ("samples", "_samples", "imgs"):
        pairs = getattr(dataset, attribute, None)
        if pairs and isinstance(pairs[0][0], str | os.PathLike):
            return [os.fspath(path) for path, _ in pairs]
    for attribute in ("_image_files", "_images"):
        if paths := getattr(dataset, attribute, None):
            return [os.fspath(path) for path in paths]
    return None


def _labels(dataset: Any) -> Tensor | None:
    """Return the labels of the set, (N,) int64, from its list of labels or from each image."""
    for attribute in ("targets", "_labels", "labels", "y"):
        if (labels := getattr(dataset, attribute, None)) is not None:
            break
    else:
        if pairs := getattr(dataset, "_samples", None):
            labels = [label for _, label in pairs]
        elif isinstance(dataset, datasets.INaturalist):
            labels = [category for category, _ in dataset.index]
        elif isinstance(dataset, datasets.PCAM):
            with dataset.h5py.File(dataset._base_folder / dataset._FILES[dataset._split]["targets"][0]) as file:
                labels = file["y"][:].reshape(-1)
        else:
            labels = [dataset[place][1] for place in range(len(dataset))]
    if isinstance(labels, Sequence) and None in labels:  # a test split with unpublished labels
        return None
    labels = torch.as_tensor(labels).long()
    return labels[:, 0] if labels.ndim == 2 else labels  # QMNIST: the class is the first of eight columns


def _class_names(parts: Sequence[_Part]) -> tuple[str, ...] | None:
    known = [part.labels for part in parts if part.labels is not None]
    if not known:
        return None
    for attribute in ("classes", "categories", "all_categories"):
        if names := getattr(parts[0].dataset, attribute, None):
            return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)  # ImageNet: synonyms
    return tuple(str(label) for label in range(int(max(labels.max() for labels in known)) + 1))


def _images(dataset: Any, channels: int) -> Tensor | None:
    """Return the images of the set, (N, C, H, W) uint8, if it has all of them in memory."""
    data = getattr(dataset, "data", None)
    if not isinstance(data, np.ndarray | Tensor):
        return None
    images = torch.as_tensor(data)
    assert images.dtype == torch.uint8
    if images.ndim == 3:  # (N, H, W)
        images = images[:, None]
    elif images.shape[-1] == 3:  # (N, H, W, 3): CIFAR
        images = images.permute(0, 3, 1, 2)
    if images.shape[1] == channels:
        return images.contiguous()
    return images.repeat(1, 3, 1, 1) if channels == 3 else _luma(images)


def _luma(images: Tensor) -> Tensor:
    """Return (N, 3, H, W) as (N, 1, H, W), rounded as PIL does (ITU-R 601 in 16-bit fixed point)."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32)[:, None, None]
    gray = [((some * weights).sum(1, keepdim=True) + 0x8000) >> 16 for some in images.split(1000)]
    return torch.cat(gray).to(torch.uint8)
