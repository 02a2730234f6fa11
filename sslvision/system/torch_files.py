"""Torch files: written with plain containers and tensors, verified by their CRCs, read without executing anything.

torch.save writes a zip archive with a CRC-32 of every entry. torch.load does not compare them, so `verify` does: it finds
cut-off files and every flipped bit that torch.load would see. Files of earlier versions have a SHA-256 checksum as the
archive's comment; they are read like any other.
"""

import argparse
import os
import re
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from sslvision.errors import UsageError

CHUNK = 1 << 20  # bytes read at once
END_RECORD = 22  # bytes of a zip archive's last record, which only its comment follows
DIRECTORY = 0x10  # of an entry's attributes
OTHER_KINDS = {  # what files that are no weights begin with
    b"version https://git-lfs": "is a pointer of Git LFS and not the file itself: run git lfs pull",
    b"<": "is HTML or other text, such as the page of an error: download the weights again",
    b"{": "is JSON text: give the .safetensors or .pth file beside it",
    b"\x89HDF": "is an HDF5 file, as Keras writes them, which is not read",
    b"\x1f\x8b": "is compressed: unpack it first",
}
OTHER_SUFFIXES = {
    ".onnx": "is an ONNX model, which is not read",
    ".npz": "holds arrays of NumPy, which are not read",
    ".zip": "is an archive: unpack it first",
    ".tar": "is an archive: unpack it first",
}


def save(content: dict[str, Any], file: BinaryIO) -> None:
    """Write a torch file. Raises OSError if the file cannot be written: torch itself raises RuntimeError."""
    try:
        torch.save(content, file)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, OSError):
                raise cause from error
            cause = cause.__cause__ or cause.__context__
        raise


def load_verified(file: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Return the content of a torch file after verifying it.

    Args:
        file: Path of the file.
        mmap: Leave the tensors on the disk until they are used. The file must not change meanwhile.

    Raises:
        UsageError: The file is damaged, or is not a torch file, or contains more than tensors and plain containers.
    """
    verify(file)
    return load_plain(file, mmap=mmap)


def verify(file: Path) -> None:
    """Compare the CRC of each entry of a torch file.

    Raises:
        UsageError: The file is empty, cut off or damaged, or is not a torch file, or the disk fails to read.
    """
    if file.stat().st_size == 0:
        raise UsageError(f"{file} is empty.")
    try:
        archive = zipfile.ZipFile(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # the index at the end of the file is damaged, or there is none
        raise UsageError(
            f"{file} has no valid archive index: it was cut off while it was written or copied, was damaged, or is not a "
            "torch file."
        ) from error
    with archive, open(file, "rb") as raw:
        end = END_RECORD + len(archive.comment)
        raw.seek(-end, os.SEEK_END)
        record = raw.read(END_RECORD)
        if record[:4] != b"PK\x05\x06" or int.from_bytes(record[-2:], "little") != len(archive.comment):
            raise UsageError(f"{file} is damaged: it does not end where its archive does.")
        for entry in archive.infolist():
            if entry.external_attr & DIRECTORY:  # torch would read nothing and return uninitialized memory
                raise UsageError(f"{file} is damaged: {entry.filename} is marked as a folder.")
            try:
                with archive.open(entry) as opened:
                    while opened.read(CHUNK):
                        pass  # the CRC is compared at the end of the entry
            except OSError as error:
                raise UsageError(f"{file} cannot be read: {error.strerror or error}.") from error
            except Exception as error:  # damaged headers raise many kinds of errors
                raise UsageError(
                    f"{file} is damaged: {entry.filename} is not what was written ({str(error) or type(error).__name__})."
                ) from error


def refuse_other_kinds(file: Path) -> None:
    """Raise UsageError if a file is empty, or of a kind that is often given instead of weights."""
    with open(file, "rb") as opened:
        head = opened.read(32).lstrip()
    found = (
        "is empty: download or copy it again" if not file.stat().st_size else OTHER_SUFFIXES.get(file.suffix.lower())
    )
    if file.suffix == ".tar" and is_archive(file):  # PyTorch's examples name their checkpoints .pth.tar
        found = None
    found = found or next((words for begin, words in OTHER_KINDS.items() if head.startswith(begin)), None)
    if found is not None and (file.suffix != ".safetensors" or head.startswith((b"version https://git-lfs", b"<"))):
        raise UsageError(
            f"{file} {found}. Weights are a .pth file of tensors in plain containers, or a .safetensors file."
        )


def is_archive(file: Path) -> bool:
    """Return whether a file begins as torch files do. The format before torch 1.6 has no CRCs."""
    with open(file, "rb") as opened:
        return opened.read(4) == b"PK\x03\x04"


def load_plain(file: Path, *, mmap: bool = False) -> dict[str, Any]:
    """Return the content of a torch file of tensors, plain containers and argparse.Namespace, without verifying it.

    Raises:
        UsageError: The file contains anything else, which is not executed, or cannot be read.
    """
    try:
        # Checkpoints of others contain their parsed command line beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return cast(dict[str, Any], torch.load(file, map_location="cpu", weights_only=True, mmap=mmap))
    except FileNotFoundError:
        raise
    except Exception as error:  # a malicious file may raise anything
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise UsageError(
                f"{file} is refused: it asks to run {asked[1]}, where only tensors and plain containers are expected. "
                "Nothing in it was run. Do not use files whose origin you do not trust. If you trust it, save its weights "
                "alone: torch.save(torch.load(file, weights_only=False)[KEY], 'weights.pth'), with the key of its weights, or "
                "with .state_dict() in place of [KEY] if it is a whole model."
            ) from error
        if "TorchScript" in str(error):
            raise UsageError(
                f"{file} is a TorchScript archive, which holds code and is not run. If you trust it, save its weights alone: "
                f"torch.save(torch.jit.load({str(file)!r}).state_dict(), 'weights.pth')."
            ) from error
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if reason.startswith("Weights only load failed"):  # goes on with advice to run whatever the file asks for
            reason = "it is not a torch file, or is damaged."
        raise UsageError(f"{file} cannot be read as weights: {reason}") from error
