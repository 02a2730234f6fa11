"""Files that know whether they are whole: what torch.save writes, with a SHA-256 of it as the archive's comment.

A torch file is a zip archive, and its comment is outside all that torch.load looks at. So other programs read these files
as any other, and `read_sealed` finds a cut-off end and a single flipped bit.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from sslvision.errors import UsageError

_SEAL = b"sslvision sha256 "
_TAIL = 2 + len(_SEAL) + 64  # bytes after torch's: the comment's length, and the comment


def write_sealed(content: dict[str, Any], file: Path) -> None:
    """Write a torch file with its checksum, through to the disk. Raises OSError, whatever torch makes of it."""
    with open(file, "wb") as opened:
        hashing = _Hashing(opened)
        try:
            torch.save(content, cast(IO[bytes], hashing))
        except Exception as error:
            if hashing.error is not None:
                raise hashing.error from error
            raise
        opened.seek(-2, os.SEEK_END)  # the archive's last field: how long its comment is, 0
        opened.write(_length_and_seal() + hashing.sha.hexdigest().encode())
        opened.flush()
        os.fsync(opened.fileno())


def read_sealed(file: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Return what a file of ours holds.

    Args:
        file: its path.
        mmap: leave its tensors on the disk until they are used; then the file must stay as it is.

    Raises:
        UsageError: it is not what was once written, or not one of ours, or holds more than tensors and plain containers;
            nothing of it is executed.
    """
    if file.stat().st_size == 0:
        raise UsageError(f"{file} is empty.")
    if not is_sealed_and_whole(file):
        raise UsageError(
            f"{file} ends without a checksum: it was cut off while it was written or copied, or another program wrote it."
        )
    return load_plain(file, mmap=mmap)


def is_sealed_and_whole(file: Path) -> bool:
    """Return whether a file ends with our checksum; False for one that other programs wrote, or that was cut off.

    Raises:
        UsageError: there is a checksum and it is another one, or the disk fails to read.
    """
    size = file.stat().st_size
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, size - _TAIL))
            tail = opened.read(_TAIL)
            if not tail.startswith(_length_and_seal()):
                return False
            opened.seek(0)
            sha = _sha256_of(opened, size - _TAIL)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    if _length_and_seal() + sha.encode() != tail:
        raise UsageError(f"{file} is damaged: its content is not what was written (the SHA-256 checksum differs).")
    return True


def load_plain(file: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Return the content of a torch file that holds nothing but tensors and plain containers.

    Raises:
        UsageError: it holds more, which is not executed, or cannot be read.
    """
    try:
        return cast(dict[str, Any], torch.load(file, map_location="cpu", weights_only=True, mmap=mmap))
    except FileNotFoundError:
        raise
    except Exception as error:  # a file made to do harm may raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise UsageError(
                f"{file} is refused: it asks to run {asked[1]}, where tensors and plain containers are expected. Nothing of "
                "it was run. Do not use files whose origin you do not trust."
            ) from error
        raise UsageError(
            f"{file} cannot be read: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
        ) from error


class _Hashing:
    """A file that hashes what is written, and remembers why it could not be: torch's archive writer does not tell."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write and hash."""
        try:
            written = self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha.update(data)
        return written

    def flush(self) -> None:
        """Flush."""
        self.file.flush()


def _length_and_seal() -> bytes:
    return (len(_SEAL) + 64).to_bytes(2, "little") + _SEAL


def _sha256_of(file: BinaryIO, length: int) -> str:
    """Hash the first `length` bytes, and an archive's empty comment after them, as when it was written."""
    sha, chunk = hashlib.sha256(), memoryview(bytearray(1 << 20))
    while length > 0:
        read = file.readinto(chunk[: min(len(chunk), length)])  # type: ignore[attr-defined]
        if not read:
            break
        sha.update(chunk[:read])
        length -= read
    sha.update(b"\0\0")
    return sha.hexdigest()
