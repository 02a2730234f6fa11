"""A source of images in shards that are elsewhere: whole shards are kept on the disk while they are used.

A shard is fetched whole once the order of training comes to it, or when several of its images have been read; a few images,
as those that are looked at before training, are read alone.
"""

import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from sslvision.data.archive import ArchiveSource
from sslvision.data.remote_files import RemoteError, read_range
from sslvision.data.shard_cache import ShardCache, fetch_ahead
from sslvision.data.shard_index import ShardFile
from sslvision.data.source import SourceGone, UnreadableImage
from sslvision.errors import StorageError

ALONE = 3  # images of a shard that a process reads alone before it fetches the shard


@dataclass(eq=False, kw_only=True)
class RemoteShards(ArchiveSource):
    """A source of images in shards of a bucket or a web server.

    Attributes:
        files: The shards.
        cache: Where whole ones are kept.
        read_alone: Images of each shard that this process has read alone.
    """

    files: tuple[ShardFile, ...]
    cache: ShardCache
    read_alone: Counter[int] = field(default_factory=Counter, repr=False)

    def prefetch(self, shards: Sequence[int]) -> None:
        """Have shards fetched that are needed soon, in this order."""
        for shard in shards:
            self.read_alone[shard] = ALONE
        fetch_ahead(self.cache, [self.files[shard] for shard in shards])

    def stamp(self, index: int) -> str:
        return f"\0{self.members.offsets[index]} {self.members.sizes[index]}{self.files[self.archive[index]].stamp}"

    def gone(self) -> str | None:
        return None  # a shard that cannot be had any more says so itself

    @property
    def root(self) -> str:
        """Return what names in messages begin with: the folder of the shards."""
        folders = [os.path.dirname(one).split("/") for one in self.archives]
        alike = [names[0] for names in zip(*folders, strict=False) if len({*names}) == 1]
        return "/".join(alike)

    def _open(self, index: int) -> IO[bytes]:
        number = int(self.archive[index])
        offset, size = int(self.members.offsets[index]), int(self.members.sizes[index])
        try:
            content = self._content(number, offset, size)
        except (RemoteError, StorageError) as error:
            told = f"{error} (while reading {self.describe(index)})."
            raise SourceGone(f"{told} When it can be read again, repeat the command with resume=auto.") from error
        if len(content) < size:
            raise UnreadableImage("the shard ends before the image does")
        return io.BytesIO(content)

    def _content(self, number: int, offset: int, size: int) -> bytes:
        shard = self.files[number]
        if self.read_alone[number] < ALONE and not self.cache.has(shard):
            self.read_alone[number] += 1
            if (content := read_range(shard.url, offset, offset + size)) is not None:
                return content
            self.read_alone[number] = ALONE
        while True:
            path = self.cache.fetch(shard)
            assert path is not None
            try:
                with open(path, "rb", buffering=0) as file:
                    file.seek(offset)
                    return file.read(size)
            except FileNotFoundError:  # another process has just made room
                self.cache.forget(shard)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"read_alone": Counter()}
