"""Images in a data set of Hugging Face's `datasets`: a folder of save_to_disk, Parquet or Arrow files, or a name on the hub.

The table is mapped into memory and read row by row, so any image is read in any order, and workers share its pages. Images are
decoded from the bytes of the table as files are, not by `datasets`.

- Images: the only column of images, or `column`. Labels: the only ClassLabel column, or one named label or class, or
  `label`.
- Splits: those of the data set that are named train, validation and test.
"""

import glob
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np

from sslvision.data.decode import MAX_PIXELS, File
from sslvision.data.eight_bits import value_range_from
from sslvision.data.encoded import EncodedSource, file_stamp
from sslvision.data.source import Splits, UnreadableImage
from sslvision.data.sources.layout import split_of, split_of_file
from sslvision.data.sources.list_file import LABELS, check_options, with_values
from sslvision.data.sources.list_images import some
from sslvision.data.sources.rows import NONE, SPLITS, Codes, check_single, parts_of, refuse_several
from sslvision.data.sources.shard_files import check_whole
from sslvision.errors import DataError, UsageError

FILES = {".parquet": "parquet", ".arrow": "arrow"}


@dataclass(eq=False, kw_only=True)
class TableSource(EncodedSource):
    """A source of images in the rows of tables.

    Attributes:
        tables: Data sets with a column of images that are not decoded: their bytes, or a path.
        splits: What messages call each.
        table, row: (N,) int64, where an image is.
        column: The column.
    """

    tables: tuple[Any, ...]
    splits: tuple[str, ...]
    table: np.ndarray
    row: np.ndarray
    column: str

    def __len__(self) -> int:
        return len(self.row)

    def file(self, index: int) -> File:
        return partial(self._open, index)

    def stamp(self, index: int) -> str:
        return f"\0{self.version}\0"

    def describe(self, index: int) -> str:
        return f"{self.splits[self.table[index]]}, row {self.row[index]}"

    def _open(self, index: int) -> IO[bytes]:
        cell = self.tables[self.table[index]][int(self.row[index])][self.column]
        if isinstance(cell, bytes):
            return io.BytesIO(cell)
        if cell is not None and cell.get("bytes") is not None:
            return io.BytesIO(cell["bytes"])
        if cell is not None and cell.get("path"):
            return open(cell["path"], "rb")
        raise UnreadableImage("the row has no image")


def open_hugging_face(
    path: str,
    *,
    config: str | None = None,
    column: str | None = None,
    label: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    validation_split: str | None = None,
    channels: int = 3,
    holdout: float = 0.05,
    at_least: int | None = None,
    max_pixels: int = MAX_PIXELS,
    value_range: str | Sequence[float] | Mapping[str, Sequence[float]] = "auto",
) -> Splits:
    """Return the images of a Hugging Face data set, as described at the top of this module.

    Args:
        path: Folder of save_to_disk, Parquet or Arrow files (a file, a folder, or a pattern), or a name on the hub.
        config: Configuration of a data set on the hub.
        column: Column of the images (default: the only one).
        label: Column of the labels (default: found; `none`: not read).
        train_split, test_split, validation_split: Names of its splits (default: found by their names).
        channels: Channels of an image: 1, 3, or as many as the images have.

    Raises:
        UsageError: `datasets` is not installed, unknown columns or splits, or settings out of range.
        DataError: It cannot be opened, or an image has several labels.
    """
    check_options(channels, holdout, max_pixels)
    given, remarks = value_range_from(value_range), list[str]()
    opened = _splits(_opened(path, config), path, (train_split, validation_split, test_split))
    features = opened[0].features
    column = _image_column(features, column, path)
    label = _label_column(features, label, path, remarks)
    tables = tuple(_undecoded(table, column, path) for table in opened.values())
    labels, names, in_order = _labels(opened, label)
    of_files = (one["filename"] for table in opened.values() for one in table.cache_files)
    version = "".join(f"{file}{file_stamp(file)}" for file in of_files)
    counts = [len(table) for table in tables]
    split_names = tuple(f"{path}, {SPLITS[number]}" for number in opened)
    table = np.repeat(np.arange(len(tables)), counts)
    row = np.concatenate([np.arange(count) for count in counts])
    parts, classes = parts_of(
        *((lambda index: str(row[index])), labels, names, np.repeat(list(opened), counts)),
        title=os.path.basename(path.rstrip("/")),
        holdout=holdout,
        remarks=remarks,
        in_order=in_order,
    )
    name = f"{os.path.basename(path.rstrip('/'))} ({' + '.join(f'{len(part.rows):,}' for part in parts)})"
    sources = [
        TableSource(
            *(name, channels, classes, part.labels, at_least, max_pixels),
            tables=tables,
            splits=split_names,
            table=table[part.rows],
            row=row[part.rows],
            column=column,
            version=version,
        )
        for part in parts
    ]
    return with_values(sources, given, remarks)


def _opened(path: str, config: str | None) -> Any:
    """Return a Dataset or a DatasetDict."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError('data=hf needs the package datasets: pip install "sslvision[hf]".') from error
    local = os.path.abspath(os.path.expanduser(path))
    try:
        if os.path.isfile(os.path.join(local, "dataset_dict.json")) or os.path.isfile(
            os.path.join(local, "state.json")
        ):
            return datasets.load_from_disk(local)
        files = [local] if os.path.isfile(local) else sorted(glob.glob(local))
        if os.path.isdir(local):
            check_whole(local, "data.path")
            files = sorted(glob.glob(os.path.join(glob.escape(local), "**", "*"), recursive=True))
        files = [file for file in files if os.path.splitext(file)[1] in FILES]
        if files:
            by_split = dict[str, list[str]]()
            for file in files:
                folders = file.count(os.sep) - local.count(os.sep) - 1 if os.path.isdir(local) else 0
                by_split.setdefault(split_of_file(file, folders=folders) or "train", []).append(file)
            return datasets.load_dataset(FILES[os.path.splitext(files[0])[1]], data_files=by_split)
        if os.path.exists(local):
            raise DataError(
                f"data.path={path} holds no data set of Hugging Face: expected a folder of save_to_disk, or files ending in "
                f"{', '.join(FILES)}. A folder of images is data=folder data.root=..."
            )
        return datasets.load_dataset(path, config)
    except DataError:
        raise
    except Exception as error:  # of many kinds, from many libraries
        words = " ".join(str(error).split())[:300]
        raise DataError(
            f"data.path={path} cannot be opened by datasets: {words or type(error).__name__}. Give a folder of save_to_disk, "
            "Parquet files, or a name on the hub; data.config=... names one of several configurations."
        ) from error


def _splits(opened: Any, path: str, asked: tuple[str, str | None, str | None]) -> dict[int, Any]:
    """Return the data set's splits, by their place in SPLITS; the first is that of training.

    Raises:
        UsageError: There is no such split.
    """
    if not isinstance(opened, dict):
        return {0: opened}
    found = dict[int, Any]()
    for number, (name, setting) in enumerate(zip(asked, SPLITS, strict=True)):
        told = [split for split in opened if split_of(split) == (setting, "")]
        if name in opened:
            found[number] = opened[name]
        elif name is not None and not (number == 0 and name == "train" and (told or len(opened) == 1)):
            raise UsageError(f"data.{setting}_split={name}: {path} has no such split. It has {some(list(opened))}.")
        elif told or (number == 0 and len(opened) == 1):
            found[number] = opened[told[0] if told else next(iter(opened))]
    return found


def _image_column(features: Any, column: str | None, path: str) -> str:
    if column is not None:
        return _checked(features, column, "data.column", path)
    found = [name for name, kind in features.items() if type(kind).__name__ == "Image"]
    if not found:  # a Parquet file written without `datasets`
        found = [name for name, kind in features.items() if _holds_bytes(kind)]
    if len(found) == 1:
        return found[0]
    columns = some([f"{name} ({type(kind).__name__})" for name, kind in features.items()])
    which = f"several columns of images ({some(found)})" if found else f"no column of images; it has {columns}"
    raise UsageError(f"{path} has {which}: say which holds them, data.column=...")


def _holds_bytes(kind: Any) -> bool:
    if isinstance(kind, dict):
        return getattr(kind.get("bytes"), "dtype", "") in ("binary", "large_binary")
    return getattr(kind, "dtype", "") in ("binary", "large_binary")


def _label_column(features: Any, label: str | None, path: str, remarks: list[str]) -> str | None:
    if label is not None:
        return None if label == "none" else _checked(features, label, "data.label", path)
    found = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    if len(found) != 1:
        found = [name for name in LABELS if name in features and (not found or name in found)]
    if not found:
        return None
    remarks.append(f"Column {found[0]} is taken for the labels (data.label={found[0]}; data.label=none reads none).")
    return found[0]


def _checked(features: Any, column: str, setting: str, path: str) -> str:
    if column not in features:
        raise UsageError(f"{setting}={column}: {path} has no such column. It has {some(list(features))}.")
    return column


def _undecoded(table: Any, column: str, path: str) -> Any:
    """Return a data set with the column alone, whose images are bytes or paths."""
    import datasets

    if column not in table.features:
        raise DataError(f"A split of {path} has no column {column}; it has {some(list(table.features))}.")
    table = table.select_columns([column]).with_format(None)
    kind = table.features[column]
    if type(kind).__name__ == "Image":
        return table.cast_column(column, datasets.Image(decode=False))
    if _holds_bytes(kind) or getattr(kind, "dtype", "") in ("string", "large_string"):
        return table if _holds_bytes(kind) else table.cast_column(column, datasets.Image(decode=False))
    raise DataError(f"Column {column} of {path} holds {kind}, and no images: data.column=... names another.")


def _labels(opened: Mapping[int, Any], label: str | None) -> tuple[np.ndarray, list[str], bool]:
    """Return labels (N,) of all rows, the names of the classes, and whether those have an order of their own."""
    total = sum(len(table) for table in opened.values())
    if label is None:
        return np.full(total, NONE, np.int64), [], False
    kind = opened[0].features[label]
    if type(kind).__name__ in ("Sequence", "List", "LargeList") or isinstance(kind, list):
        values = next(
            (one for one in opened[0].select_columns([label])[:100][label] if one is not None and len(one) > 1), None
        )
        if values is not None:
            refuse_several(f"{values} (column {label})")
    codes = Codes()
    names = list(kind.names) if type(kind).__name__ == "ClassLabel" else None
    labels = []
    for table in opened.values():
        if label not in table.features:
            labels += [NONE] * len(table)
            continue
        numbers = _numbers(table.features[label], names, label) if names else []
        for batch in table.select_columns([label]).with_format(None).iter(batch_size=1 << 16):
            values = batch[label]
            labels += (
                [NONE if one is None or one < 0 else numbers[int(one)] for one in values]
                if names
                else [codes(one) for one in values]
            )
    if names is not None:
        return np.array(labels, np.int64), names, True
    check_single(list(codes.names))
    return np.array(labels, np.int64), list(codes.names), False


def _numbers(kind: Any, names: Sequence[str], label: str) -> list[int]:
    """Return the numbers, among the classes of training, of the classes of a split, which may have another order.

    Raises:
        DataError: The split has others.
    """
    own = list(kind.names) if type(kind).__name__ == "ClassLabel" else None
    if own is None or (others := sorted({*own} - {*names})):
        have = some(others) if own is not None else str(kind)
        raise DataError(
            f"Column {label} has other classes in a held-out split than in training: {have}. Training has {some(names)}."
        )
    return [names.index(name) for name in own]
