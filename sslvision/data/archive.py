"""Images inside of zip and tar files, read where they are: an archive is indexed once, and then any image costs one read.

Files are opened for each read, so that a source can be sent to any process and holds nothing open.
"""

import io
import os
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from typing import IO, NamedTuple

import numpy as np

from sslvision.data.encoded import EncodedSource, PathTable, file_stamp
from sslvision.data.shard_order import Groups
from sslvision.data.source import UnreadableImage
from sslvision.errors import DataError

STORED, DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
BLOCK = 512  # bytes of a header of a tar file
LOCAL_HEADER = 30  # bytes of a zip file's header before each member, without its name


class Members(NamedTuple):
    """The files in an archive, in their order.

    Attributes:
        names: Their names.
        offsets: (N,) int64, where their bytes begin; of a zip file, where their header begins.
        sizes: (N,) int64, bytes as they are stored.
        methods: (N,) uint8, STORED or DEFLATED.
        checksums: (N,) int64, CRC-32 of the bytes; -1 in a tar file, which has none.
    """

    names: PathTable
    offsets: np.ndarray
    sizes: np.ndarray
    methods: np.ndarray
    checksums: np.ndarray

    def take(self, indices: np.ndarray) -> "Members":
        """Return some of the members."""
        return Members(self.names.take(indices), *(values[indices] for values in self[1:]))


def members_of(file: str) -> Members:
    """Return the files in a zip or tar file.

    Raises:
        DataError: It is damaged, compressed as a whole, or encrypted.
    """
    try:
        with open(file, "rb") as opened:
            is_zip = opened.read(2) == b"PK"
        return _of_zip(file) if is_zip else _of_tar(file)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        if not os.path.exists(file):
            raise DataError(f"{file} does not exist.") from error
        with open(file, "rb") as opened:
            head = opened.read(6)
        if head[:2] in (b"\x1f\x8b", b"BZ") or head[:4] in (b"\x28\xb5\x2f\xfd", b"\xfd7zX"):
            raise DataError(
                f"{file} is compressed as a whole, so that its images cannot be read one by one: gunzip it (or bunzip2, "
                "unxz) to a .tar, or unpack it."
            ) from error
        raise DataError(f"{file} cannot be read as a zip or tar file, and may be damaged: {error}.") from error


def _of_zip(file: str) -> Members:
    with zipfile.ZipFile(file) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
    if encrypted := [info.filename for info in infos if info.flag_bits & 1]:
        raise DataError(f"{file} is encrypted ({encrypted[0]}): unpack it, and give the folder.")
    if others := [info for info in infos if info.compress_type not in (STORED, DEFLATED)]:
        raise DataError(
            f"{file} is compressed by method {others[0].compress_type} of zip, such as {others[0].filename}: pack it again "
            "with usual compression (deflate) or without any, or unpack it."
        )
    return Members(
        PathTable.of(info.filename.encode("utf-8", "surrogateescape") for info in infos),
        np.array([info.header_offset for info in infos], np.int64),
        np.array([info.compress_size for info in infos], np.int64),
        np.array([info.compress_type for info in infos], np.uint8),
        np.array([info.CRC for info in infos], np.int64),
    )


def _of_tar(file: str) -> Members:
    names, places, links = [], [], dict[int, str]()
    with tarfile.open(file, "r:", encoding="utf-8", errors="surrogateescape") as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # which would keep every header
            if member.isreg():
                names.append(member.name.removeprefix("./"))
                places.append((member.offset_data, member.size))
            elif member.islnk():  # a second name of a file, whose bytes stand below the first
                links[len(names)] = member.linkname.removeprefix("./")
                names.append(member.name.removeprefix("./"))
                places.append((0, 0))
        end = archive.offset  # where no header is: of a whole archive, a block of zeros
    with open(file, "rb") as opened:
        opened.seek(end)
        if opened.read(BLOCK) != bytes(BLOCK):
            after = f" after {names[-1]}" if names else ""
            raise DataError(f"{file} is cut off or damaged{after}: the mark of its end is missing. Copy it again.")
    of = dict(zip(names, places, strict=True)) if links else {}
    for place, name in links.items():
        places[place] = of.get(name, (0, 0))
    offsets, sizes = np.array(places, np.int64).reshape(-1, 2).T
    methods, checksums = np.full(len(names), STORED, np.uint8), np.full(len(names), -1, np.int64)
    return Members(PathTable.of(names), offsets, sizes, methods, checksums)


@dataclass(eq=False, kw_only=True)
class ArchiveSource(EncodedSource):
    """A source of images in archives.

    Attributes:
        archives: Paths of the archives.
        archive: (N,) int32, which of them an image is in.
        members: Where in it.
        groups: How the images lie in the archives, if these are to be read a few at a time.
    """

    archives: tuple[str, ...]
    archive: np.ndarray
    members: Members
    groups: Groups | None = None

    def __len__(self) -> int:
        return len(self.archive)

    def file(self, index: int) -> "partial[IO[bytes]]":
        return partial(self._open, index)

    def stamp(self, index: int) -> str:
        sizes = f"{self.members.offsets[index]} {self.members.sizes[index]} {self.members.checksums[index]}"
        return f"\0{sizes}{self.version if len(self.archives) == 1 else file_stamp(self._path(index))}"

    def describe(self, index: int) -> str:
        return os.path.join(self._path(index), self.members.names[index])

    @property
    def root(self) -> str:
        """Return what names in messages begin with: the archive, or the folder of several."""
        return self.archives[0] if len(self.archives) == 1 else os.path.commonpath(self.archives)

    def gone(self) -> str | None:
        missing = [path for path in self.archives if not os.path.exists(path)]
        return f"The archive of the images is gone: {missing[0]}" if missing else None

    def _path(self, index: int) -> str:
        return self.archives[self.archive[index]]

    def _open(self, index: int) -> IO[bytes]:
        """Return the bytes of an image as a file in memory."""
        offset, size = int(self.members.offsets[index]), int(self.members.sizes[index])
        checksum = int(self.members.checksums[index])
        with open(self._path(index), "rb", buffering=0) as file:
            if checksum >= 0:  # a zip file: the length of its header is in the header
                file.seek(offset)
                header = file.read(LOCAL_HEADER)
                if header[:4] != b"PK\3\4":
                    raise UnreadableImage("the archive has changed or is damaged here")
                offset += LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise UnreadableImage("the archive ends before the image does")
        if self.members.methods[index] == DEFLATED:
            content = zlib.decompress(content, -zlib.MAX_WBITS)
        if checksum >= 0 and zlib.crc32(content) != checksum:
            raise UnreadableImage("its checksum is not that of the archive, which is damaged here")
        return io.BytesIO(content)
