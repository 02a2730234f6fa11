"""Writing a shard of images, as a tar or a Parquet file.

In a tar file each image has its file, its label (.cls) and where it comes from (.json); in a Parquet file, a row: the image as
Hugging Face's `datasets` has it (bytes, and the path it comes from), and the label. The same images become the same bytes:
there are no times, owners or random names in a shard.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from torch.utils.data import Dataset

from sslvision.data.archive import members_of
from sslvision.data.image_bytes import ImageFile, image_file
from sslvision.data.packed_index import FOLDERS, PackedShard, members_file
from sslvision.data.shard_index import save_shard, with_texts
from sslvision.data.source import Source, UnreadableImage
from sslvision.system.files import written_whole

ROWS = 100  # of a Parquet file, in a group that is read at once


class ToWrite(NamedTuple):
    """A shard to write: its split and number there, the images from `start` to before `end` of the split's source, its kind."""

    split: str
    number: int
    start: int
    end: int
    kind: str = "tar"

    @property
    def file(self) -> str:
        """Return the path of the shard, relative to the folder of all."""
        folder = FOLDERS[self.split]
        return f"{folder}/{folder}-{self.number:06d}.{self.kind}"


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
        unreadable, path = list[tuple[str, str]](), self.folder / shard.file
        write = self._write_tar if shard.kind == "tar" else self._write_parquet
        with written_whole(path) as file:
            count = write(file, shard, unreadable)
            file.flush()
            size = os.path.getsize(file.name)
            with open(file.name, "rb") as whole:
                checksum = hashlib.file_digest(whole, "sha256").hexdigest()
            members_checksum = ""
            if shard.kind == "tar":
                members_checksum = self._list_members(file.name, Path(members_file(str(path))))
        packed = PackedShard(shard.file, shard.split, count, size, checksum, members_checksum)
        return Written(packed, unreadable)

    def _images(self, shard: ToWrite, unreadable: list[tuple[str, str]]) -> Iterator[tuple[int, ImageFile]]:
        """Yield the images of a shard with their indices; those that cannot be read are added to `unreadable`."""
        source = self.sources[shard.split]
        for index in range(shard.start, shard.end):
            try:
                yield index, image_file(source, index, side=self.side, encoding=self.encoding, quality=self.quality)
            except UnreadableImage as error:
                unreadable.append((self.name(shard.split, index), str(error)))

    def _write_tar(self, file: IO[bytes], shard: ToWrite, unreadable: list[tuple[str, str]]) -> int:
        """Write a tar file, and return its number of images."""
        count = 0
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for index, image in self._images(shard, unreadable):
                count += 1
                for ending, content in self._members(shard.split, index, image):
                    info = tarfile.TarInfo(f"{index:09d}.{ending}")
                    info.size, info.mode = len(content), 0o644
                    tar.addfile(info, io.BytesIO(content))
        return count

    def _members(self, split: str, index: int, image: ImageFile) -> list[tuple[str, bytes]]:
        """Return the files of an image: their endings and contents."""
        source, about, files = self.sources[split], {"path": self.name(split, index)}, [(image.ending, image.content)]
        if source.labels is not None:
            label = int(source.labels[index])
            files.append(("cls", str(label).encode()))
            about |= {"label": source.classes[label] if source.classes else str(label)}
        return [*files, ("json", json.dumps(about, ensure_ascii=False).encode("utf-8", "replace"))]

    def _write_parquet(self, file: IO[bytes], shard: ToWrite, unreadable: list[tuple[str, str]]) -> int:
        """Write a Parquet file, and return its number of images."""
        import pyarrow as pa
        from pyarrow import parquet

        source = self.sources[shard.split]
        labels, schema = source.labels, table_schema(source)
        count, rows = 0, list[dict[str, Any]]()
        with parquet.ParquetWriter(file, schema, compression="none") as writer:
            for index, image in self._images(shard, unreadable):
                count += 1
                row = {"image": {"bytes": image.content, "path": self.name(shard.split, index)}}
                rows.append(row if labels is None else {**row, "label": int(labels[index])})
                if len(rows) == ROWS:
                    writer.write_table(pa.Table.from_pylist(rows, schema))
                    rows.clear()
            if rows or not count:
                writer.write_table(pa.Table.from_pylist(rows, schema))
        return count

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


def table_schema(source: Source) -> Any:
    """Return the columns of a Parquet file with the images of a source, in words that `datasets` and the hub understand."""
    import pyarrow as pa

    columns = [pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if source.labels is not None:
        columns.append(pa.field("label", pa.int64()))
        named = {"names": list(source.classes), "_type": "ClassLabel"} if source.classes else None
        features["label"] = named or {"dtype": "int64", "_type": "Value"}
    return pa.schema(columns, metadata={"huggingface": json.dumps({"info": {"features": features}})})
