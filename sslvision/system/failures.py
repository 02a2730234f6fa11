"""Explanations of errors of the machine: full disks, killed worker processes, lost training processes."""

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from sslvision.errors import SSLVisionError, StorageError
from sslvision.system.files import existing_folder, free_bytes
from sslvision.system.resuming import command_to_resume

# Errors of writing a file; the last two can also be errors of reading one, see _concerns_writing.
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.EACCES, errno.EPERM}
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|Read-only file system|File too large")
_WORKER_LOST = re.compile(r"DataLoader worker \(pid|DataLoader worker.*(shared memory|No space left)", re.DOTALL)
PROCESS_KILLED = (
    "error: Process {rank} of this run was killed by signal {signal}. Signal 9 without anybody's doing means most likely that "
    "memory ran out. All processes of the run end now; the last checkpoint is intact, and resume=auto goes on from it."
)
_NEVER_CAME = re.compile(r"[Tt]imed out.*waiting for clients\.? *(\d+)/(\d+) clients joined", re.DOTALL)
_TIMED_OUT = re.compile(r"gloo.*Timed out|[Cc]ollective operation timeout", re.DOTALL)
_PROCESS_LOST = re.compile(
    r"Connection (closed|reset) by peer|gloo.*Broken pipe|NCCL.*(remote process exited|unhandled system error)",
    re.DOTALL,
)


def explained(error: BaseException, folder: str | None) -> SSLVisionError | None:
    """Return an explained error for an exception caused by the machine; None for any other.

    Args:
        error: The exception.
        folder: Folder of the run, which is named if the exception names no file.
    """
    if isinstance(error, SSLVisionError):
        return error
    for one in _chain(error):
        text = str(one)
        if _WORKER_LOST.search(text):
            return SSLVisionError(
                "A worker process of the data loader has ended, most likely because memory ran out and the system killed it. "
                "Use fewer workers, data.workers=2, or 0 to load in the training process. In a container, allow more shared "
                "memory (docker run --shm-size=8g). The last checkpoint is intact: resume with "
                f"{command_to_resume(folder)}. ({_first_line(text)})"
            )
        if isinstance(one, OSError) and one.errno in _STORAGE and _concerns_writing(one):
            return _storage(str(one.strerror), one.filename or folder, folder)
        if found := _DISK_FULL.search(text):
            return _storage(found[0], folder, folder)
        if found := _NEVER_CAME.search(text):
            return SSLVisionError(
                f"{found[1]} of {found[2]} processes have come, and the others not within timeout= seconds. Look into the "
                "logs of the other nodes: the command may have failed there, or they cannot reach the first node "
                f"(MASTER_ADDR, MASTER_PORT, firewall). ({_first_line(text)})"
            )
        if _TIMED_OUT.search(text):
            return SSLVisionError(
                "Another process of this run has not answered within timeout= seconds: it hangs, its machine is gone, or it "
                "has ended; the reason may be in its log. If it was only slow, as in writing a large checkpoint, set a larger "
                f"timeout=. The last checkpoint is intact: resume with {command_to_resume(folder)}. ({_first_line(text)})"
            )
        if _PROCESS_LOST.search(text):
            return SSLVisionError(
                "Another process of this run has ended, and this one cannot continue alone. The reason is above or in "
                "the log of that process; if there is none it was killed, most likely because memory ran out. The last "
                f"checkpoint is intact: resume with {command_to_resume(folder)}. ({_first_line(text)})"
            )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _concerns_writing(error: OSError) -> bool:
    """Return whether the error is about writing a file; a file that may not be read is another matter."""
    if error.errno not in (errno.EACCES, errno.EPERM):
        return True
    if error.filename is None:
        return False
    path = Path(os.fsdecode(error.filename))
    if path.exists():
        return os.access(path, os.R_OK) and not os.access(path, os.W_OK)
    return not os.access(existing_folder(path), os.W_OK)


def _storage(reason: str, where: str | bytes | None, folder: str | None) -> StorageError:
    advice = "set output_dir=... to a folder on another disk, and start again"
    if folder is not None and any(Path(folder).glob("checkpoints/*.ckpt")):
        advice = (
            f"copy {folder} to another disk and give its path there as output_dir=...; then resume from the last checkpoint, "
            f"which is intact: {command_to_resume(folder)}"
        )
    path = Path(os.fsdecode(where)) if where else Path.cwd()
    return StorageError(
        f"{path} cannot be written: {reason}. There are {free_bytes(path):,} bytes free there. Make room, or {advice}."
    )
