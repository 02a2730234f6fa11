"""Writing a tar shard of images: of each its file, its label (.cls) and where it comes from (.json).

The same images become the same bytes: there are no times, owners or random names in a shard.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch.utils.data import Dataset

from sslvision.data.archive import members_of
from sslvision.data.image_bytes import image_file
from sslvision.data.packed_index import FOLDERS, PackedShard, members_file
from sslvision.data.shard_index import save_shard, with_texts
from sslvision.data.source import Source, UnreadableImage
from sslvision.system.files import written_whole


class ToWrite(NamedTuple):
    """A shard to write: its split and number there, and the images from `start` up to `end` of the split's source."""

    split: str
    number: int
    start: int
    end: int

    @property
    def file(self) -> str:
        """Return the path of the shard, relative to the folder of all."""
        folder = FOLDERS[self.split]
        return f"{folder}/{folder}-{self.number:06d}.tar"


class Written(NamedTuple):
    """A shard that is written, and what was left out of it: names of images, and why they cannot be read."""

    shard: PackedShard
    unreadable: list[tuple[str, str]]


class ShardWriter(Dataset["Written | Exception"]):
    """Writes shards into a folder, each whole or not at all. Errors are returned, for the main process to raise.

    Args:
        folder: The folder; it has a folder for each split.
        shards: The shards to write.
        sources: Their sources, by split.
        root: Folder that the images' paths are relative to; empty if they are in none.
        side, encoding, quality: See image_file.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[ToWrite],
        sources: dict[str, Source],
        *,
        root: str,
        side: int | None,
        encoding: str,
        quality: int,
    ):
        self.folder, self.shards, self.sources, self.root = folder, shards, sources, root
        self.side, self.encoding, self.quality = side, encoding, quality

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: int) -> "Written | Exception":
        try:
            return self._write(self.shards[number])
        except Exception as error:
            return error

    def _write(self, shard: ToWrite) -> Written:
        unreadable, count, path = list[tuple[str, str]](), 0, self.folder / shard.file
        with written_whole(path) as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for index in range(shard.start, shard.end):
                    try:
                        members = self._members(shard.split, index)
                    except UnreadableImage as error:
                        unreadable.append((self.name(shard.split, index), str(error)))
                        continue
                    count += 1
                    for ending, content in members:
                        info = tarfile.TarInfo(f"{index:09d}.{ending}")
                        info.size, info.mode = len(content), 0o644
                        tar.addfile(info, io.BytesIO(content))
            file.flush()
            size = os.path.getsize(file.name)
            with open(file.name, "rb") as whole:
                checksum = hashlib.file_digest(whole, "sha256").hexdigest()
            members_checksum = self._list_members(file.name, Path(members_file(str(path))))
        packed = PackedShard(shard.file, shard.split, count, size, checksum, members_checksum)
        return Written(packed, unreadable)

    def _members(self, split: str, index: int) -> list[tuple[str, bytes]]:
        """Return the files of an image: their endings and contents."""
        source = self.sources[split]
        image = image_file(source, index, side=self.side, encoding=self.encoding, quality=self.quality)
        about, files = {"path": self.name(split, index)}, [(image.ending, image.content)]
        if source.labels is not None:
            label = int(source.labels[index])
            files.append(("cls", str(label).encode()))
            about |= {"label": source.classes[label] if source.classes else str(label)}
        return [*files, ("json", json.dumps(about, ensure_ascii=False).encode("utf-8", "replace"))]

    def name(self, split: str, index: int) -> str:
        """Return an image's path relative to the folder of the data, with "/", or its name in its source."""
        described, root = self.sources[split].describe(index), os.path.join(self.root, "")
        if self.root and described.startswith(root):
            described = described[len(root) :].replace(os.sep, "/")
        return os.fsencode(described).decode("utf-8", "replace")

    @staticmethod
    def _list_members(tar: str, file: Path) -> str:
        """Write where the files of a shard begin, and return the checksum of that."""
        content = io.BytesIO()
        save_shard(content, with_texts(tar, members_of(tar)), compressed=True)
        with written_whole(file) as opened:
            opened.write(content.getvalue())
        return hashlib.sha256(content.getvalue()).hexdigest()
