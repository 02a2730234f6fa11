"""The index of packed shards, index.json: which shards there are, how many images each has, and their checksums.

Beside every tar shard, in .members.npz, is where its files begin, so that a shard is not read to know what is in it.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from sslvision.data.sources.list_images import some
from sslvision.errors import DataError

NAME, FORMAT, VERSION = "index.json", "sslvision shards", 1
MEMBERS = ".members.npz"  # instead of .tar
FOLDERS = {"train": "train", "validation": "val", "test": "test"}  # of the shards of a split


class PackedShard(NamedTuple):
    """A shard as the index has it.

    Attributes:
        file: Its path, relative to the folder of the index, with "/".
        split: train, validation or test.
        images: Number of images.
        bytes: Its size.
        sha256: Its checksum.
        members_sha256: That of its list of members; empty for a Parquet file.
    """

    file: str
    split: str
    images: int
    bytes: int
    sha256: str
    members_sha256: str


class PackedIndex(NamedTuple):
    """The content of index.json: the shards of all splits, in order, and the names of the classes, if there are any."""

    shards: tuple[PackedShard, ...]
    classes: tuple[str, ...] | None


def read_index(text: str | bytes, where: str) -> PackedIndex | None:
    """Return the index in a file's content; None if it is another program's.

    Raises:
        DataError: It is damaged, or of a newer version.
    """
    if FORMAT not in (text if isinstance(text, str) else text.decode("utf-8", "replace")):
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is damaged ({error}): pack or copy it again.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        raise DataError(
            f"{where} has version {content.get('version')}, and this sslvision reads version {VERSION}: update sslvision, or "
            "pack again."
        )
    try:
        shards = tuple(PackedShard(**shard) for shard in content["shards"])
        if any(os.path.isabs(one.file) or ".." in one.file.split("/") for one in shards):
            raise ValueError("paths that lead out of its folder")
        return PackedIndex(shards, None if content["classes"] is None else tuple(content["classes"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{where} is damaged ({error}): pack or copy it again.") from error


def index_text(index: PackedIndex, about: Mapping[str, Any]) -> str:
    """Return the content of index.json; `about` is what else it tells."""
    content = {"format": FORMAT, "version": VERSION, "images": sum(one.images for one in index.shards), **about}
    content |= {"classes": index.classes, "shards": [one._asdict() for one in index.shards]}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def members_file(shard: str) -> str:
    """Return the path of the list of a shard's members."""
    return shard.removesuffix(".tar") + MEMBERS


def sha256_of(path: str) -> str:
    """Return the checksum of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(paths: Sequence[str], packed: Sequence[PackedShard]) -> None:
    """Read shards wholly, and compare their checksums with those of the index.

    Raises:
        DataError: Some differ, which are named.
    """
    console = Console(stderr=True)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        sums = list(
            track(
                *(pool.map(sha256_of, paths), "Verifying shards", len(paths)),
                console=console,
                transient=True,
                disable=not console.is_terminal,
            )
        )
    damaged = [path for path, found, shard in zip(paths, sums, packed, strict=True) if found != shard.sha256]
    if damaged:
        raise DataError(
            f"{len(damaged):,} of {len(paths):,} shards do not have the checksums of {NAME}: {some(damaged)}. Damaged, or "
            "changed since: copy or pack them again."
        )
