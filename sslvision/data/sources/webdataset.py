"""Images in tar shards as WebDataset writes them: the files of a sample have one name, and its image is one of them.

Shards are indexed once (data/shard_index.py), and then every image is read where it is. So an image has an index as in a
folder, and order, crops and masks are functions of (seed, epoch, index): nothing depends on a shuffle buffer, on the number of
processes or on where a run was stopped. Shards in a bucket are fetched whole, a window of them at a time (data/shard_order.py,
data/shard_cache.py).

- Labels: the file .cls of a sample, or a key of its .json. With `classes.txt` beside the shards, one name in each line, or with
  the index of `sslvision pack`, numbers get these names.
- Splits: those of the index; or shards of their own settings, or shards whose names or folders say so (train-000000.tar,
  val-000000.tar).
- Order: that of the shards, and of the files in each.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sslvision.data.archive import ArchiveSource, Members
from sslvision.data.decode import MAX_PIXELS
from sslvision.data.eight_bits import value_range_from
from sslvision.data.encoded import PathTable
from sslvision.data.packed_index import NAME
from sslvision.data.remote_files import RemoteError, is_remote, read_whole, shown
from sslvision.data.remote_shards import RemoteShards
from sslvision.data.shard_cache import ShardCache
from sslvision.data.shard_index import Shard, ShardFile, key_and_ending, open_shards
from sslvision.data.shard_order import Groups
from sslvision.data.source import Splits
from sslvision.data.sources.layout import split_of
from sslvision.data.sources.list_file import LABELS, check_options, with_values
from sslvision.data.sources.list_images import EXTENSIONS, share, some
from sslvision.data.sources.rows import NONE, Codes, check_single, parts_of
from sslvision.data.sources.shard_files import find_shards
from sslvision.errors import DataError, UsageError
from sslvision.system.files import cache_folder

CLASSES = "classes.txt"
WINDOW = 16  # shards that are mixed, where they are elsewhere


class Samples(NamedTuple):
    """The images of shards: which shard (N,), which member, labels (N,) and what was left out."""

    shard: np.ndarray
    members: Members
    labels: np.ndarray
    names: list[str]


def open_webdataset(
    urls: str | Sequence[str],
    *,
    test_urls: str | Sequence[str] | None = None,
    validation_urls: str | Sequence[str] | None = None,
    column: str | None = None,
    label: str | None = None,
    index_dir: str | None = None,
    verify: bool = False,
    window: int | None = None,
    cache_gb: float = 50.0,
    shard_dir: str | None = None,
    channels: int = 3,
    holdout: float = 0.05,
    at_least: int | None = None,
    max_pixels: int = MAX_PIXELS,
    value_range: str | Sequence[float] | Mapping[str, Sequence[float]] = "auto",
) -> Splits:
    """Return the images in tar shards, as described at the top of this module.

    Args:
        urls: Shards: a folder, a pattern (`shards/*.tar`), a range (`train-{000000..000146}.tar`), or a list of these;
            on disks, or at `s3://`, `gs://` or `https://`.
        test_urls, validation_urls: Shards that are held out.
        column: Ending of the images where samples have several, such as `jpg`.
        label: Ending of the labels (`cls`), or a key in the `.json` of a sample (default: found; `none`: not read).
        index_dir: Folder where the indices of shards are kept (default: sslvision/shards in $XDG_CACHE_HOME or ~/.cache).
        verify: Compare the checksums of packed shards with those of their index first, which reads all of them.
        window: Shards whose images are mixed: an epoch goes through so many at a time, in random order (default: 16 of
            shards that are elsewhere; of others all, which 0 asks for, too).
        cache_gb: Bound of the folder in which shards that are elsewhere are kept while they are used, in GB.
        shard_dir: That folder (default: sslvision/remote in $XDG_CACHE_HOME or ~/.cache).
        channels: Channels of an image: 1, 3, or as many as the files have.

    Raises:
        RemoteError: A bucket cannot be read.
        UsageError: Settings out of range.
        DataError: No such shards, other ones than their index tells, no images in them, several labels for an image, or
            held-out classes that training has not.
    """
    check_options(channels, holdout, max_pixels)
    given, remarks = value_range_from(value_range), list[str]()
    files, splits, classes_told = find_shards(urls, validation_urls, test_urls, remarks, verified=verify)
    paths = [file.url for file in files]
    remote = any(is_remote(path) for path in paths)
    window = _checked_window(window, cache_gb, files, remote=remote)
    cache = ShardCache(cache_folder(shard_dir, "remote"), cache_gb)
    shards = open_shards(files, cache_folder(index_dir, "shards"), cache.fetch)
    title = _title(paths[0])
    samples = _samples(files, shards, column, label, remarks)
    labels, names, in_order = _named(paths, samples, classes_told)
    parts, classes = parts_of(
        *(samples.members.names.__getitem__, labels, names, np.array(splits, np.int8)[samples.shard]),
        title=title,
        holdout=holdout,
        remarks=remarks,
        in_order=in_order,
    )
    name = f"{title} ({' + '.join(f'{len(part.rows):,}' for part in parts)})"
    more: dict[str, Any] = {"files": tuple(files), "cache": cache} if remote else {}
    sources = [
        (RemoteShards if remote else ArchiveSource)(
            *(name, channels, classes, part.labels, at_least, max_pixels),
            archives=tuple(map(shown, paths)),
            archive=samples.shard[part.rows],
            members=samples.members.take(part.rows),
            groups=_groups(samples.shard[part.rows], len(files), window),
            version="".join(file.stamp for file in files),
            **more,
        )
        for part in parts
    ]
    return with_values(sources, given, remarks)


def _checked_window(window: int | None, cache_gb: float, files: Sequence[ShardFile], *, remote: bool) -> int:
    """Return how many shards are mixed; 0: all.

    Raises:
        UsageError: Two windows of shards that are elsewhere, the one being read and the next, are larger than their folder.
    """
    if window is not None and window < 0:
        raise UsageError(f"data.window={window} must be a number of shards: 1 or more, or 0 for all.")
    if not remote:
        return window or 0
    window = min(WINDOW if window is None else window or len(files), len(files))
    largest = sorted((file.size for file in files), reverse=True)[: 2 * window]
    if sum(largest) > cache_gb * 1e9:
        needed = sum(largest) / 1e9
        raise UsageError(
            f"data.window={window} needs {needed:.3g} GB on the disk, for the shards whose images are mixed and as many that "
            f"are fetched ahead, and data.cache_gb={cache_gb:g}: set data.cache_gb={needed * 1.01:.3g} or more, or a smaller "
            "data.window."
        )
    return window


def _groups(shard: np.ndarray, shards: int, window: int) -> Groups | None:
    """Return how images lie in shards, by the shard (N,) of each; None if all are mixed."""
    return Groups(np.searchsorted(shard, np.arange(shards + 1)).astype(np.int64), window) if window else None


def _title(path: str) -> str:
    """Return the name of the folder of a shard, or of the one above that of a split."""
    folders = os.path.dirname(path).split("/")
    return next((folder for folder in reversed(folders) if folder and split_of(folder)[0] is None), "shards")


def _samples(
    files: Sequence[ShardFile], shards: Sequence[Shard], column: str | None, label: str | None, remarks: list[str]
) -> Samples:
    """Return the images of all shards with their labels."""
    places, codes, labels = list[tuple[int, int]](), Codes(), list[int]()
    wanted, without, parsed = (column.lower().lstrip(".") if column else None), 0, _Labels(label)
    for number, shard in enumerate(shards):
        begun = len(places)
        texts = dict(zip(shard.with_text.tolist(), range(len(shard.with_text)), strict=True))
        for key, rows in _grouped(shard.members.names):
            found = [
                row
                for ending, row in rows.items()
                if ending == wanted or (wanted is None and f".{ending}" in EXTENSIONS)
            ]
            if len(found) > 1:
                raise UsageError(
                    f"{shown(files[number].url)}: sample {key} has several images ({some(list(rows))}): say "
                    "which, data.column=..."
                )
            if not found:
                without += 1
                continue
            places.append((number, found[0]))
            of_sample = {ending: shard.texts[texts[row]] for ending, row in rows.items() if row in texts}
            labels.append(codes(parsed(of_sample)))
        packed = files[number].packed
        if packed is not None and wanted is None and len(places) - begun != packed.images:
            raise DataError(
                f"{shown(files[number].url)} has {len(places) - begun:,} images, and its {NAME} tells of {packed.images:,}: "
                "copy or pack it again."
            )
    if not places:
        raise DataError(
            f"No images in {len(files):,} shards, such as {shown(files[0].url)}: expected samples with a file ending in one of "
            f"{', '.join(EXTENSIONS[:8])}, ...; data.column=... names another ending."
        )
    if without:
        remarks.append(
            f"{share(without, without + len(places), 'samples')} in the shards have no image, and are left out."
        )
    if parsed.asked and not codes.names:
        raise UsageError(f"data.label={label}: no sample has such a file, nor such a key in its .json.")
    of_shard, rows_of = (np.array(values, np.int64) for values in zip(*places, strict=True))
    every = [shard.members for shard in shards]
    members = _joined([one.take(rows_of[of_shard == number]) for number, one in enumerate(every)])
    return Samples(of_shard.astype(np.int32), members, np.array(labels, np.int64), list(codes.names))


def _grouped(names: PathTable) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield samples: their key, and the row of each of their files by its ending."""
    before, rows = None, dict[str, int]()
    for row in range(len(names)):
        key, ending = key_and_ending(names[row])
        if key != before or ending in rows:
            if before is not None:
                yield before, rows
            before, rows = key, {}
        rows[ending] = row
    if before is not None:
        yield before, rows


def _joined(parts: Sequence[Members]) -> Members:
    """Return the members of all parts; their names share one blob."""
    begins = np.cumsum([0, *(len(part.names.blob) for part in parts)])
    names = PathTable(
        np.concatenate([part.names.blob for part in parts]),
        np.concatenate([part.names.starts + begin for part, begin in zip(parts, begins, strict=False)]),
        np.concatenate([part.names.ends + begin for part, begin in zip(parts, begins, strict=False)]),
    )
    return Members(names, *(np.concatenate([part[place] for part in parts]) for place in range(1, 5)))


class _Labels:
    """Finds the label among the texts of a sample."""

    def __init__(self, label: str | None):
        self.label, self.asked = label, label not in (None, "none")
        self.key: str | None = None

    def __call__(self, texts: Mapping[str, str]) -> Any:
        if self.label == "none":
            return None
        ending = (self.label or "cls").lower().lstrip(".")
        if ending in texts and ending != "json":
            return texts[ending].strip()
        if "json" not in texts:
            return None
        try:
            values = json.loads(texts["json"])
        except ValueError:
            return None
        if not isinstance(values, dict):
            return values if ending == "json" else None
        if self.label is None and self.key is None:
            self.key = next((name for name in LABELS if name in values), None)
        return values.get(self.label or self.key or "")


def _named(
    paths: Sequence[str], samples: Samples, told: Sequence[str] | None
) -> tuple[np.ndarray, Sequence[str], bool]:
    """Return labels (N,), the names of the classes, and whether these have an order of their own."""
    names = _class_names(paths, samples.names, told)
    check_single(samples.names)
    if names is None:
        return samples.labels, samples.names, False
    numbers = np.array([*(int(name) for name in samples.names), NONE], np.int64)
    return numbers[samples.labels], names, True


def _class_names(paths: Sequence[str], labels: Sequence[str], told: Sequence[str] | None) -> list[str] | None:
    """Return the classes of an index, or the lines of classes.txt beside the first shard, if labels are numbers of them."""
    names = told
    if names is None:
        file = os.path.join(os.path.dirname(paths[0]), CLASSES)
        try:
            content = read_whole(file) if is_remote(file) else Path(file).read_bytes()
        except OSError:
            return None
        except RemoteError as error:
            if error.missing or error.refused:
                return None
            raise
        names = content.decode("utf-8-sig", "replace").rstrip().splitlines()
    fits = labels and all(label.isdecimal() and int(label) < len(names) for label in labels)
    return list(names) if fits and len({*names}) == len(names) else None
