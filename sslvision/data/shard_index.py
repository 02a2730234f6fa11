"""What is in tar shards: the names and places of their files, and the texts of labels, found once and remembered.

The index of a shard is a file in the folder of caches, named by a hash of the shard's path, size and time of change.
"""

import hashlib
import io
import logging
import os
import re
import threading
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from sslvision.data.archive import Members, members_of
from sslvision.data.encoded import PathTable
from sslvision.data.packed_index import PackedShard, members_file
from sslvision.data.remote_files import RemoteError, is_remote, read_whole, shown
from sslvision.errors import DataError
from sslvision.system.files import written_whole

VERSION = 1
DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)  # of reading an index that is gone or damaged
log = logging.getLogger(__name__)
AT_ONCE = 16  # shards that are read at the same time
ONE_READS = threading.Lock()  # NumPy parses headers with `ast`, which fails now and then in threads of Python 3.11
TRIES = 5  # times that a shard is fetched again that others have removed
LARGEST = 1 << 16  # bytes of a text that is kept
TEXTS = (".cls", ".json", ".txt", ".index", ".label")  # endings of files that may be labels
_PARTS = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)$", re.DOTALL)


class ShardFile(NamedTuple):
    """A shard: its path or address, what changes when its content does, its size, and what an index tells of it."""

    url: str
    stamp: str
    size: int
    packed: PackedShard | None = None


class Shard(NamedTuple):
    """A shard's files, and the contents of those that are texts: of member `with_text[n]`, text n."""

    members: Members
    with_text: np.ndarray
    texts: PathTable


def key_and_ending(name: str) -> tuple[str, str]:
    """Return the sample that a file belongs to, and what it is of it: all after the first dot of its name."""
    found = _PARTS.match(name)
    return (found[1], found[2].lower()) if found else (name, "")


def open_shards(
    files: Sequence[ShardFile], folder: Path, fetch: Callable[[ShardFile], Path | None] | None = None
) -> list[Shard]:
    """Return what is in some shards, from `folder` where it is known there.

    Args:
        files: The shards.
        folder: Where what is in them is remembered.
        fetch: Returns the path of a shard that is elsewhere, once it is on the disk.

    Raises:
        DataError: A shard does not exist, is damaged, or compressed as a whole.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        shards = pool.map(lambda file: _open(file, folder, fetch), files)
        console = Console(stderr=True)
        return list(
            track(
                shards, "Indexing shards", len(files), console=console, transient=True, disable=not console.is_terminal
            )
        )


def _open(file: ShardFile, folder: Path, fetch: Callable[[ShardFile], Path | None] | None) -> Shard:
    key = blake2b(os.fsencode(f"{VERSION}\0{shown(file.url)}{file.stamp}"), digest_size=16).hexdigest()
    known = folder / f"{key}.npz"
    with suppress(*DAMAGED):
        return load_shard(known)
    shard = None if file.packed is None else _listed(file.url, file.packed)
    if shard is not None and not is_remote(file.url):
        return shard
    if shard is None:
        shard = _of_tar(file, fetch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(known, concurrent=True) as opened:
            save_shard(opened, shard)
    except OSError as error:  # the next start indexes them again
        log.warning("The index of %s cannot be kept in %s: %s.", shown(file.url), folder, error.strerror)
    return shard


def _of_tar(file: ShardFile, fetch: Callable[[ShardFile], Path | None] | None) -> Shard:
    """Return what is in a shard by reading all of it."""
    if fetch is None or not is_remote(file.url):
        return with_texts(file.url, members_of(file.url))
    for _ in range(TRIES):
        path = str(fetch(file))
        try:
            return with_texts(path, members_of(path))
        except (DataError, OSError) as error:
            if os.path.exists(path):
                raise DataError(str(error).replace(path, shown(file.url))) from error
    raise DataError(
        f"{shown(file.url)} was removed from the folder of shards before it was read, to make room for others: set a larger "
        "data.cache_gb."
    )


def _listed(path: str, packed: PackedShard) -> Shard | None:
    """Return what is in a packed shard by the list beside it; None if that is gone or damaged, and the shard tells itself."""
    with suppress(*DAMAGED, RemoteError):
        file = members_file(path)
        content = read_whole(file) if is_remote(file) else Path(file).read_bytes()
        if hashlib.sha256(content).hexdigest() == packed.members_sha256:
            return load_shard(io.BytesIO(content))
    return None


def with_texts(file: str, members: Members) -> Shard:
    """Return what is in a shard, with the texts that may be labels."""
    rows, texts = [], []
    with open(file, "rb") as opened:
        for row in range(len(members.names)):
            if members.names[row].lower().endswith(TEXTS) and members.sizes[row] <= LARGEST:
                opened.seek(int(members.offsets[row]))
                rows.append(row)
                texts.append(opened.read(int(members.sizes[row])))
    return Shard(members, np.array(rows, np.int64), PathTable.of(texts))


def save_shard(opened: object, shard: Shard, *, compressed: bool = False) -> None:
    """Write what is in a shard into a file, which `load_shard` reads."""
    members = shard.members
    arrays = {f"{name}_{part}": getattr(table, part)
              for name, table in (("names", members.names), ("texts", shard.texts))
              for part in ("blob", "starts", "ends")}  # fmt: skip
    save = np.savez_compressed if compressed else np.savez
    save(opened, offsets=members.offsets, sizes=members.sizes, with_text=shard.with_text, **arrays)  # type: ignore[arg-type]


def load_shard(file: Path | IO[bytes]) -> Shard:
    """Return what `save_shard` wrote; raises one of DAMAGED if it is gone or damaged."""
    with ONE_READS, np.load(file, allow_pickle=False) as arrays:
        names, texts = (
            PathTable(*(arrays[f"{name}_{part}"] for part in ("blob", "starts", "ends"))) for name in ("names", "texts")
        )
        count = len(arrays["offsets"])
        stored, unknown = np.zeros(count, np.uint8), np.full(count, -1, np.int64)
        return Shard(Members(names, arrays["offsets"], arrays["sizes"], stored, unknown), arrays["with_text"], texts)
