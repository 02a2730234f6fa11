"""What is in tar shards: the names and places of their files, and the texts of labels, found once and remembered.

The index of a shard is a file in the folder of caches, named by a hash of the shard's path, size and time of change.
"""

import logging
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track

from sslvision.data.archive import Members, members_of
from sslvision.data.encoded import PathTable, file_stamp
from sslvision.system.files import written_whole

VERSION = 1
log = logging.getLogger(__name__)
AT_ONCE = 16  # shards that are read at the same time
LARGEST = 1 << 16  # bytes of a text that is kept
TEXTS = (".cls", ".json", ".txt", ".index", ".label")  # endings of files that may be labels
_PARTS = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)$", re.DOTALL)


class Shard(NamedTuple):
    """A shard's files, and the contents of those that are texts: of member `with_text[n]`, text n."""

    members: Members
    with_text: np.ndarray
    texts: PathTable


def key_and_ending(name: str) -> tuple[str, str]:
    """Return the sample that a file belongs to, and what it is of it: all after the first dot of its name."""
    found = _PARTS.match(name)
    return (found[1], found[2].lower()) if found else (name, "")


def open_shards(files: Sequence[str], folder: Path) -> list[Shard]:
    """Return what is in some shards, from `folder` where it is known there.

    Raises:
        DataError: A shard does not exist, is damaged, or compressed as a whole.
    """
    with ThreadPoolExecutor(AT_ONCE) as pool:
        shards = pool.map(lambda file: _open(file, folder), files)
        console = Console(stderr=True)
        return list(
            track(
                shards, "Indexing shards", len(files), console=console, transient=True, disable=not console.is_terminal
            )
        )


def _open(file: str, folder: Path) -> Shard:
    key = blake2b(os.fsencode(f"{VERSION}\0{file}{file_stamp(file)}"), digest_size=16).hexdigest()
    known = folder / f"{key}.npz"
    with suppress(OSError, ValueError, KeyError):
        return _load(known)
    members = members_of(file)
    shard = _with_texts(file, members)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(known, concurrent=True) as opened:
            _save(opened, shard)
    except OSError as error:  # the next start indexes them again
        log.warning("The index of %s cannot be kept in %s: %s.", file, folder, error.strerror)
    return shard


def _with_texts(file: str, members: Members) -> Shard:
    rows, texts = [], []
    with open(file, "rb") as opened:
        for row in range(len(members.names)):
            if members.names[row].lower().endswith(TEXTS) and members.sizes[row] <= LARGEST:
                opened.seek(int(members.offsets[row]))
                rows.append(row)
                texts.append(opened.read(int(members.sizes[row])))
    return Shard(members, np.array(rows, np.int64), PathTable.of(texts))


def _save(opened: object, shard: Shard) -> None:
    members = shard.members
    arrays = {f"{name}_{part}": getattr(table, part)
              for name, table in (("names", members.names), ("texts", shard.texts))
              for part in ("blob", "starts", "ends")}  # fmt: skip
    np.savez(opened, offsets=members.offsets, sizes=members.sizes, with_text=shard.with_text, **arrays)  # type: ignore[arg-type]


def _load(file: Path) -> Shard:
    with np.load(file, allow_pickle=False) as arrays:
        names, texts = (
            PathTable(*(arrays[f"{name}_{part}"] for part in ("blob", "starts", "ends"))) for name in ("names", "texts")
        )
        count = len(arrays["offsets"])
        stored, unknown = np.zeros(count, np.uint8), np.full(count, -1, np.int64)
        return Shard(Members(names, arrays["offsets"], arrays["sizes"], stored, unknown), arrays["with_text"], texts)
