"""Images that a file lists: CSV, TSV, JSON lines, Parquet, or plain text with a path in each line.

- Paths are relative to the folder of the file, or to `root`. The column of paths is the one whose values end as images do.
- Labels are the column named label, class, target or category; splits the one named split, subset or set. Others are named.
- Order: that of the file. A path that is listed twice counts once.
- Where no column tells splits, `test_file` and `validation_file` list further images, or a fraction is held out, as for a
  folder.
- What is left out or guessed is said in the splits' `remarks`.
"""

import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from sslvision.data.decode import MAX_PIXELS
from sslvision.data.eight_bits import value_range_from
from sslvision.data.encoded import EncodedSource, PathTable
from sslvision.data.source import Splits
from sslvision.data.sources.columns import (
    PathColumns,
    batches_of,
    changed_paths,
    check_filled,
    has_columns,
    numbers_of,
)
from sslvision.data.sources.folder import FileSource, check_holdout
from sslvision.data.sources.list_images import share, some
from sslvision.data.sources.remembered import Decided, Part, decided_of_files
from sslvision.data.sources.rows import NONE, SPLITS, Codes, check_single, parts_of, refuse_several, split_code
from sslvision.data.sources.tables import Table, is_image_path, open_table
from sslvision.data.value_range import look_at
from sslvision.errors import DataError, UsageError
from sslvision.system.files import cache_folder

PATHS = (
    *("path", "image_path", "img_path", "file_path", "filepath", "filename", "file_name", "file", "image", "img"),
    *("image_file", "image_name", "image_filename", "image_id", "id"),
)
LABELS = ("label", "class", "target", "category", "label_name", "class_name", "labels")
SPLIT_NAMES = ("split", "subset", "set", "partition")
LOOK_AT = 100  # paths whose files are looked for


class Listed(NamedTuple):
    """The images of one or more lists: paths, labels (N,) as indices of names or NONE, and splits (N,)."""

    paths: PathTable
    labels: np.ndarray
    names: list[str]
    splits: np.ndarray


def open_list(
    file: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    column: str | None = None,
    label: str | None = None,
    split: str | None = None,
    suffix: str = "",
    test_file: str | None = None,
    validation_file: str | None = None,
    channels: int = 3,
    holdout: float = 0.05,
    at_least: int | None = None,
    max_pixels: int = MAX_PIXELS,
    value_range: str | Sequence[float] | Mapping[str, Sequence[float]] = "auto",
    index_dir: str | None = None,
) -> Splits:
    """Return the images that a file lists, as described at the top of this module.

    Args:
        file: List of the images: .csv, .tsv, .jsonl, .json, .parquet, .txt, or compressed as .csv.gz.
        root: Folder that paths are relative to (default: the folder of the file).
        column: Column of the paths (default: found by its values).
        label: Column of the labels (default: found by its name; `none`: labels are not read).
        split: Column that says train, val or test (default: found by its name; `none`: not read).
        suffix: Appended to every path, such as `.jpg` where a list has names without it.
        test_file, validation_file: Further lists, with the same columns.
        channels: Channels of an image: 1, 3, or as many as the files have.
        index_dir: Folder where what is read of large lists is kept for later starts (default: sslvision/folders in
            $XDG_CACHE_HOME or ~/.cache).

    Raises:
        UsageError: Unknown columns, or settings out of range.
        DataError: No such file, no images, several labels for an image, or held-out classes that training has not.
    """
    check_options(channels, holdout, max_pixels)
    given = value_range_from(value_range)
    file = os.path.abspath(os.path.expanduser(file))
    files = [(file, "file", 0)]
    files += [(os.path.abspath(os.path.expanduser(one)), f"{SPLITS[number]}_file", number)
              for one, number in ((validation_file, 1), (test_file, 2)) if one]  # fmt: skip
    if split not in (None, "none") and len(files) > 1:
        raise UsageError(
            f"data.split={split} tells splits within data.file: leave it out, or data.test_file and the like."
        )
    where = os.path.abspath(os.path.expanduser(root)) if root is not None else os.path.dirname(file)

    def decide() -> Decided:
        return _decide(files, column, label, split, suffix, holdout)

    decided = decided_of_files(
        [one for one, _, _ in files],
        decide,
        options=[files, column, label, split, suffix, holdout],
        folder=cache_folder(index_dir, "folders"),
    )
    remarks, parts = [*decided.remarks], decided.parts
    _check_files([part.paths for part in parts], where, remarks, given_root=root is not None)
    name = f"{os.path.basename(file)} ({' + '.join(f'{len(part.paths):,}' for part in parts)})"
    sources = []
    for part in parts:
        labels = None if part.labels is None else torch.from_numpy(part.labels)
        about = (channels, part.classes, labels, at_least, max_pixels)
        sources.append(FileSource(name, *about, root=where, paths=part.paths))
    return with_values(sources, given, remarks)


def _decide(
    files: Sequence[tuple[str, str, int]],
    column: str | None,
    label: str | None,
    split: str | None,
    suffix: str,
    holdout: float,
) -> Decided:
    """Return the splits and classes of some lists, and what to say of them."""
    remarks = list[str]()
    listed = _without_repeats(_read(files, column, label, split, suffix, remarks), remarks)
    parts, classes = parts_of(
        *(listed.paths.__getitem__, listed.labels, listed.names, listed.splits),
        title=os.path.basename(files[0][0]),
        holdout=holdout,
        remarks=remarks,
    )
    tables = (listed.paths.take(part.rows) for part in parts)
    labels = (None if part.labels is None else part.labels.numpy() for part in parts)
    return Decided(
        "", [Part("", *one) for one in zip(tables, [classes] * len(parts), labels, strict=True)], remarks, []
    )


def check_options(channels: int, holdout: float, max_pixels: int) -> None:
    """Raise UsageError for settings of a source out of range."""
    check_holdout(holdout)
    if channels < 1:
        raise UsageError(f"data.channels must be at least 1, not {channels}.")
    if max_pixels < 1:
        raise UsageError(
            f"data.max_pixels={max_pixels} must be 1 or more: it is the most pixels that an image may have."
        )


def with_values(sources: Sequence[EncodedSource], given: Any, remarks: Sequence[str]) -> Splits:
    """Return splits of sources of training, validation and test images, with their range of values decided."""
    first, *held = sources
    decided, of_values = look_at(first, given)
    for one in sources:
        one.value_range = decided
    test, validation = (*reversed(held), None, None)[:2]  # a single one is the test split
    return Splits(first, test, validation, (*remarks, *of_values))


def _read(
    files: Sequence[tuple[str, str, int]],
    column: str | None,
    label: str | None,
    split: str | None,
    suffix: str,
    remarks: list[str],
) -> Listed:
    labels, splits, of_label, of_split = array("q"), array("b"), Codes(), dict[Any, int]()
    tables = []
    for file, setting, number in files:
        table = open_table(file, f"data.{setting}")
        path = _path_column(table, column, suffix, remarks)
        tables.append((table, path, _named(table, label, LABELS, "label", remarks), number))
    split_column = _named(tables[0][0], split, SPLIT_NAMES, "split", remarks) if len(files) == 1 else None
    if all(has_columns(table, path, [one for one in (of, split_column) if one]) for table, path, of, _ in tables):
        return _read_columns(tables, split_column, suffix, remarks)

    def paths() -> Iterator[str]:
        for table, path, label_column, number in tables:
            wanted = [path, *([label_column] if label_column else []), *([split_column] if split_column else [])]
            begun = len(labels)
            backslashes = _has_backslashes(table, path, remarks)
            for row, values in enumerate(table.rows(wanted), 1):
                one = values[0]
                if one is None or one == "":
                    raise DataError(f"{table.file}, row {row:,} has no path (column {path}).")
                labels.append(of_label(values[1]) if label_column else NONE)
                if split_column:
                    value = values[-1]
                    if value not in of_split:
                        of_split[value] = split_code(value)
                    number = of_split[value]
                splits.append(number)
                text = f"{one}{suffix}"
                yield text.replace("\\", "/") if backslashes else text
            if len(labels) == begun:
                raise DataError(f"{table.file} lists no images: it has a line of names and nothing else.")

    listed = PathTable.of(paths())
    names = list(of_label.names)
    check_single(names)
    return Listed(listed, np.array(labels, np.int64), names, np.array(splits, np.int8))


def _read_columns(
    tables: Sequence[tuple[Table, str, str | None, int]], split_column: str | None, suffix: str, remarks: list[str]
) -> Listed:
    """Return the same as `_read`, from Parquet files."""
    paths, labels, splits, of_label = PathColumns(), list[np.ndarray](), list[np.ndarray](), Codes()
    for table, path, label_column, number in tables:
        change, rows = changed_paths(suffix, _has_backslashes(table, path, remarks)), 0
        for batch in batches_of(table, [one for one in (path, label_column, split_column) if one]):
            count = len(batch[path])
            check_filled(batch[path], table, path, rows)
            paths.add(batch[path], change)
            labels.append(
                numbers_of(batch[label_column], of_label, NONE) if label_column else np.full(count, NONE, np.int32)
            )
            if split_column and batch[split_column].null_count:
                split_code(None)
            of_split = numbers_of(batch[split_column], split_code, NONE) if split_column else np.full(count, number)
            splits.append(of_split.astype(np.int8))
            rows += count
        if not rows:
            raise DataError(f"{table.file} lists no images: it has a line of names and nothing else.")
    names = list(of_label.names)
    check_single(names)
    return Listed(paths.table(), np.concatenate(labels, dtype=np.int64), names, np.concatenate(splits))


def _path_column(table: Table, column: str | None, suffix: str, remarks: list[str]) -> str:
    """Return the column of paths: the one that is named, or the only one with paths of images, or with a usual name."""
    if column is not None:
        return table.check(str(column), "data.column")
    head = table.first()
    found = [
        name
        for place, name in enumerate(table.columns)
        if sum(is_image_path(row[place]) for row in head) * 2 > len(head)
    ]
    usual = [name for name in table.columns if name.lower() in PATHS]
    if not found and len(usual) == 1 and suffix:
        found = usual
    if len(found) > 1 and len(chosen := [name for name in found if name in usual]) == 1:
        remarks.append(f"{table.file} has several columns of paths ({some(found)}): {chosen[0]} is used (data.column).")
        found = chosen
    if len(found) == 1:
        _refuse_addresses(table, head, found[0])
        return found[0]
    if found:
        raise UsageError(f"{table.file} has several columns of paths: say data.column=..., one of {', '.join(found)}.")
    shown = (
        ", ".join(f"{name}={str(value)[:40]!r}" for name, value in zip(table.columns, head[0], strict=True))
        if head
        else "none"
    )
    if head and any(isinstance(value, dict | bytes) for value in head[0]):
        raise UsageError(f"{table.file} holds images and not their paths: data=hf data.path={table.file} reads it.")
    raise DataError(
        f"No column of {table.file} has paths of images; the first row: {shown}. Name the column, data.column=..., and give "
        "data.suffix=.jpg if its values lack the ending."
    )


def _refuse_addresses(table: Table, head: Sequence[Sequence[Any]], column: str) -> None:
    value = str(head[0][table.columns.index(column)])
    if "://" in value:
        raise DataError(
            f"{table.file} lists addresses ({value[:80]}), and not files. Download the images first, or pack them into shards "
            "and use data=webdataset."
        )


def _named(table: Table, given: str | None, usual: Sequence[str], setting: str, remarks: list[str]) -> str | None:
    """Return the column that a setting names, or that has a usual name; None if there is none."""
    if given is not None:
        return None if str(given) == "none" else table.check(str(given), f"data.{setting}")
    by_name = {name.lower(): name for name in table.columns}
    found = next((by_name[name] for name in usual if name in by_name), None)
    if found is None and not table.header and setting == "label" and len(table.columns) == 2:
        found = next((name for place, name in enumerate(table.columns)
                      if not any(is_image_path(row[place]) for row in table.first(most=1))), None)  # fmt: skip
    if found is not None:
        remarks.append(
            f"{os.path.basename(table.file)}: column {found} is taken for the {setting}s (data.{setting}={found}; "
            f"data.{setting}=none reads none)."
        )
    return found


def _has_backslashes(table: Table, path: str, remarks: list[str]) -> bool:
    head = [str(value) for (value,) in table.first([path])]
    windows = os.sep == "/" and any("\\" in value for value in head) and not any("/" in value for value in head)
    if windows:
        remarks.append(f"{os.path.basename(table.file)}: backslashes in paths, such as {head[0]}, are read as slashes.")
    return windows


def _without_repeats(listed: Listed, remarks: list[str]) -> Listed:
    """Return the images without rows that repeat one of the same split.

    Raises:
        DataError: An image is listed with two labels.
    """
    paths = listed.paths
    hashes = paths.hashes()
    ordered = np.sort(hashes)
    if not (ordered[1:] == ordered[:-1]).any():
        return listed
    del ordered
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(paths)))
    earlier = first[inverse[again]]
    differ = listed.labels[again] != listed.labels[earlier]
    if differ.any():
        row, before = int(again[differ][0]), int(earlier[differ][0])
        one, other = (
            listed.names[listed.labels[place]] if listed.labels[place] != NONE else "none" for place in (before, row)
        )
        refuse_several(f"{paths[row]} in rows {before + 1:,} and {row + 1:,} ({one}, {other})")
    held = listed.splits[again] != listed.splits[earlier]
    if held.any():
        remarks.append(
            f"{share(int(held.sum()), len(paths), 'rows')} list an image that is also in another split, such as "
            f"{paths[int(again[held][0])]}: scores on such images are too good."
        )
    pairs = inverse * len(SPLITS) + listed.splits  # of image and split
    _, first, inverse = np.unique(pairs, return_index=True, return_inverse=True)
    drop = np.flatnonzero(first[inverse] != np.arange(len(paths)))
    if not len(drop):
        return listed
    remarks.append(
        f"{share(len(drop), len(paths), 'rows')} repeat an image, such as {paths[int(drop[0])]}: each counts once."
    )
    kept = np.delete(np.arange(len(paths)), drop)
    return Listed(paths.take(kept), listed.labels[kept], listed.names, listed.splits[kept])


def _check_files(tables: Sequence[PathTable], root: str, remarks: list[str], *, given_root: bool) -> None:
    """Look whether some of the files exist.

    Raises:
        DataError: None of them does.
    """
    begins = np.cumsum([0, *map(len, tables)])
    rows = np.unique(np.linspace(0, begins[-1] - 1, LOOK_AT).astype(np.int64))
    of_table = np.searchsorted(begins, rows, side="right") - 1
    looked_at = [tables[table][int(row - begins[table])] for table, row in zip(of_table, rows, strict=True)]
    missing = [path for path in looked_at if not os.path.exists(os.path.join(root, path))]
    if len(missing) == len(rows):
        here = os.path.exists(missing[0])
        hint = f" They exist relative to the current folder: data.root={os.getcwd()}." if here else ""
        relative = "data.root" if given_root else "the folder of the list; data.root=... names another"
        raise DataError(
            f"None of the {len(rows):,} files looked at exists, such as {os.path.join(root, missing[0])}. Paths are "
            f"relative to {relative}.{hint}"
        )
    if missing:
        remarks.append(
            f"{share(len(missing), len(rows), 'files looked at')} do not exist, such as {os.path.join(root, missing[0])}. "
            "Others take their place in training (data.max_unreadable)."
        )
