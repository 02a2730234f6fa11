"""Which shards there are: folders, patterns and ranges as a list of files, with their splits and what an index tells."""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

from sslvision.data.encoded import file_stamp
from sslvision.data.packed_index import NAME, PackedIndex, PackedShard, read_index, verify
from sslvision.data.remote_files import RemoteError, find, is_remote, read_whole, shown, stat
from sslvision.data.shard_index import AT_ONCE, ShardFile
from sslvision.data.sources.layout import split_of_file
from sslvision.data.sources.list_images import some
from sslvision.data.sources.rows import SPLITS
from sslvision.errors import DataError, UsageError

RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")


class ShardFiles(NamedTuple):
    """Shards of all splits, the split of each (an index of SPLITS), and the classes, if one index tells them."""

    files: list[ShardFile]
    splits: list[int]
    classes: tuple[str, ...] | None


def find_shards(
    urls: str | Sequence[str],
    validation: str | Sequence[str] | None,
    test: str | Sequence[str] | None,
    remarks: list[str],
    *,
    verified: bool = False,
) -> ShardFiles:
    """Return all shards, and the split of each.

    Args:
        urls, validation, test: What the settings name.
        remarks: Receives what was guessed.
        verified: Whether to compare checksums with those of the index.

    Raises:
        DataError: Some do not exist, or are not as the index tells.
        UsageError: A shard is in two splits, or there is no index to verify by.
    """
    paths = _once(expanded(urls), remarks)
    held = {1: _once(expanded(validation, "data.validation_urls"), remarks) if validation else [],
            2: _once(expanded(test, "data.test_urls"), remarks) if test else []}  # fmt: skip
    splits = [0] * len(paths)
    indices = _indices({*paths, *held[1], *held[2]})
    if not held[1] and not held[2]:
        names = [indices[path][1].split if path in indices else split_of_file(path) for path in paths]
        told = [None if name is None else SPLITS.index(name) for name in names]
        if len({*told}) > 1 and 0 in told and None not in told:
            splits = [split for split in told if split is not None]
            if not all(path in indices for path in paths):
                of = [f"{splits.count(number):,} {split}" for number, split in enumerate(SPLITS) if number in splits]
                remarks.append(f"By their names, shards are of several splits: {', '.join(of)}.")
        elif len({*told}) > 1 and {*told} & {1, 2}:
            of = [path for path, split in zip(paths, told, strict=True) if split in (1, 2)]
            remarks.append(
                f"All shards are for training, also {len(of):,} named as held out ({some([shown(path) for path in of])}), "
                "because the others are not all named as training: data.validation_urls and data.test_urls name them apart."
            )
    for number, more in held.items():
        if both := {*paths} & {*more}:
            raise UsageError(f"{shown(min(both))} is among the shards of two splits.")
        paths, splits = paths + more, splits + [number] * len(more)
    files = _described(paths, [indices[path][1] if path in indices else None for path in paths])
    _check_sizes(files)
    if verified and any(is_remote(path) for path in paths):
        remarks.append("data.verify: shards that are elsewhere are compared with their checksums when each is fetched.")
    elif verified:
        _verify(files)
    of_indices = {indices[path][0].classes if path in indices else None for path in paths}
    return ShardFiles(files, splits, of_indices.pop() if len(of_indices) == 1 else None)


def expanded(urls: str | Sequence[str], setting: str = "data.urls") -> list[str]:
    """Return the paths and addresses of shards that folders, patterns and ranges name.

    Raises:
        DataError: A folder or a pattern names none, or a file does not exist.
        RemoteError: A bucket cannot be read.
    """
    found = list[str]()
    for url in [urls] if isinstance(urls, str) else urls:
        if is_remote(url):
            found += _expanded_remote(url.rstrip("/"), setting)
            continue
        path = os.path.abspath(os.path.expanduser(url.removeprefix("file://")))
        if os.path.isdir(path):
            some_of = _of_folder(path)
        else:
            some_of = [
                one for name in _ranges(path) for one in (sorted(glob.glob(name)) if set(name) & {*"*?["} else [name])
            ]
        if not some_of:
            raise DataError(f"{setting}={url} names no shards (.tar) that exist.")
        found += some_of
    if tables := [path for path in found if path.endswith(".parquet")]:
        raise UsageError(
            f"{setting}: {shown(tables[0])} is a Parquet file, and no tar file: data=hf data.path=... reads it."
        )
    _refuse_missing([path for path in found if not is_remote(path) and not os.path.isfile(path)], found, setting)
    return found


def _once(paths: Sequence[str], remarks: list[str]) -> list[str]:
    """Return the shards without those that are named again."""
    found = list(dict.fromkeys(paths))
    if again := len(paths) - len(found):
        remarks.append(f"{again:,} shards are named more than once, and read once.")
    return found


def check_whole(folder: str, setting: str) -> None:
    """Compare the shards in a folder with its index, if it has one.

    Raises:
        DataError: Some are missing or have other sizes, which are named.
    """
    if (index := _index_of(folder)) is not None:
        paths = [os.path.join(folder, shard.file) for shard in index.shards]
        _refuse_missing([path for path in paths if not os.path.isfile(path)], paths, setting)
        _check_sizes(_described(paths, index.shards))


def _refuse_missing(missing: Sequence[str], of: Sequence[str], setting: str) -> None:
    if missing:
        names = some([shown(path) for path in missing])
        raise DataError(f"{len(missing):,} of {len(of):,} shards do not exist: {names}. Check {setting}.")


def _expanded_remote(url: str, setting: str) -> list[str]:
    """Return the addresses that an address names."""
    if url.partition("?")[0].endswith((".tar", "}")) or set(url) & {*"*["}:
        return [one for name in _ranges(url) for one in (find(name) if set(name) & {*"*["} else [name])]
    if (index := _index_of(url)) is not None:
        return [f"{url}/{shard.file}" for shard in index.shards]
    if found := find(url):
        return found
    raise DataError(
        f"{setting}={shown(url)} names no shards (.tar), and has no {NAME}. Web servers rarely list their files: give a range, "
        f"such as {shown(url)}/train-{{000000..000146}}.tar."
    )


def _described(paths: Sequence[str], packed: Sequence[PackedShard | None]) -> list[ShardFile]:
    """Return the shards with their sizes. Raises DataError if some do not exist."""

    def describe(path: str, shard: PackedShard | None) -> ShardFile | None:
        if not is_remote(path):
            return ShardFile(path, file_stamp(path), os.path.getsize(path), shard)
        try:
            size, version = stat(path)
        except RemoteError as error:
            if not error.missing:
                raise
            return None
        return ShardFile(path, f"\0{shard.sha256 if shard else f'{size} {version}'}\0", size, shard)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        files = list(pool.map(describe, paths, packed))
    _refuse_missing([path for path, file in zip(paths, files, strict=True) if file is None], paths, "data.urls")
    return [file for file in files if file is not None]


def _of_folder(path: str) -> list[str]:
    """Return the shards in a folder: those of its index, if it has one, in their order."""
    if (index := _index_of(path)) is not None:
        return [os.path.join(path, shard.file) for shard in index.shards]
    return sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.tar"), recursive=True))


def _ranges(path: str) -> Iterator[str]:
    """Yield the paths that braces name: {000..003} and {a,b}."""
    if (found := RANGE.search(path)) is None:
        yield path
        return
    if found[3] is not None:
        values = found[3].split(",")
    else:
        values = [str(number).zfill(len(found[1])) for number in range(int(found[1]), int(found[2]) + 1)]
    for value in values:
        yield from _ranges(path[: found.start()] + value + path[found.end() :])


def _index_of(folder: str) -> PackedIndex | None:
    """Return the index in a folder; None if there is none."""
    file = os.path.join(folder, NAME)
    try:
        if is_remote(folder):
            return read_index(read_whole(file), shown(file))
        with open(file, "rb") as opened:
            return read_index(opened.read(), file)
    except OSError:
        return None
    except RemoteError as error:
        if error.missing or error.refused:  # a folder above that of the shards need not be readable
            return None
        raise


def _indices(paths: set[str]) -> dict[str, tuple[PackedIndex, PackedShard]]:
    """Return the shards that an index in their folder, or in the one above it, tells of."""

    @cache
    def told_by(folder: str) -> dict[str, tuple[PackedIndex, PackedShard]]:
        index = _index_of(folder)
        return {os.path.join(folder, shard.file): (index, shard) for shard in index.shards} if index else {}

    found = {}
    for path in paths:
        folder = os.path.dirname(path)
        for above in (folder, os.path.dirname(folder)):
            if is_remote(path) and "://" not in above.rstrip("/"):  # s3://bucket has nothing above it
                break
            if (told := told_by(above).get(path)) is not None:
                found[path] = told
                break
    return found


def _check_sizes(files: Sequence[ShardFile]) -> None:
    """Raise DataError if shards have other sizes than an index tells."""
    packed = [(file, file.packed.bytes) for file in files if file.packed is not None]
    sizes = [(file, file.size, size) for file, size in packed]
    if others := [
        f"{shown(file.url)} ({found:,} bytes instead of {size:,})" for file, found, size in sizes if found != size
    ]:
        raise DataError(
            f"{len(others):,} of {len(files):,} shards do not have the sizes that {NAME} tells: {some(others)}. They are cut "
            "off, or were changed: copy or pack them again."
        )


def _verify(files: Sequence[ShardFile]) -> None:
    packed = [file.packed for file in files if file.packed is not None]
    if len(packed) < len(files):
        without = next(file.url for file in files if file.packed is None)
        raise UsageError(
            f"data.verify: {without} has no checksum, for want of an {NAME} that tells of it: sslvision pack writes one."
        )
    verify([file.url for file in files], packed)
