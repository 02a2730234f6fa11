"""Files that appear whole or not at all, and the free space that they need."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sslvision.errors import StorageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)
SHARED_MEMORY = Path("/dev/shm")  # a folder whose files lie in main memory; Linux only


@contextmanager
def written_whole(
    path: Path,
    mode: str = "wb",
    *,
    concurrent: bool = False,
    before_replace: Callable[[], None] | None = None,
    **options: Any,
) -> Iterator[IO[Any]]:
    """Open a temporary file in the same folder; it replaces `path` once it is complete and on the disk.

    If anything fails, `path` keeps its old content and the temporary file is deleted.

    Args:
        path: File to write. Its folder must exist.
        mode: Mode for `open`.
        concurrent: Several processes may write `path` at the same time, so each needs a temporary file of its own.
            Otherwise the name is fixed, so that what a killed process left behind is overwritten.
        before_replace: Called when the new file is on the disk and the old one is still in place.
        options: Further arguments for `open`.

    Raises:
        OSError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}{f'.{os.getpid()}' if concurrent else ''}.tmp")
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if before_replace is not None:
            before_replace()
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):  # the disk may have become read-only
            temporary.unlink(missing_ok=True)


@contextmanager
def locked(file: Path, waiting: str = "", *, wait: bool = True) -> Iterator[bool]:
    """Let one process or thread at a time do what follows; on file systems without locks, and where `file` cannot be made, all.

    Args:
        file: Lock file, which is never deleted: two processes must not lock different files of one name.
        waiting: What another process does meanwhile, for the message that this one waits; empty for none.
        wait: Whether to wait; otherwise the value is False where another one holds the lock.
    """
    with ExitStack() as until_done:
        mine = True
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = until_done.enter_context(open(file, "ab"))
            if fcntl is not None:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    mine = wait
                    if wait and waiting:
                        log.warning("Waiting: %s (%s).", waiting, file)
                    if wait:
                        fcntl.flock(lock, fcntl.LOCK_EX)
        yield mine


def cache_folder(given: str | None = None, name: str = "") -> Path:
    """Return a folder of caches: the given one, or that of this name in sslvision/ in $XDG_CACHE_HOME or ~/.cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sslvision" / name
    return Path(given or usual).expanduser().absolute()


def free_bytes(path: Path) -> int:
    """Return the free space in bytes for a file that may not exist yet; in shared memory, what main memory has left."""
    free = shutil.disk_usage(existing_folder(path)).free
    if path.absolute().is_relative_to(SHARED_MEMORY):
        free = min(free, _available_memory())
    return free


def require_free(path: Path, needed: int, what: str, *, advice: str, reserve: float = 0.0) -> None:
    """Raise StorageError if a file of `needed` bytes does not fit.

    Args:
        path: Where it will be written.
        needed: Bytes.
        what: What needs them, for the message: a plural noun phrase.
        advice: What the user can do besides making room, for the message.
        reserve: Fraction of the free space that must remain free.
    """
    free = free_bytes(path)
    if needed > (1 - reserve) * free:
        kept = f", {reserve:.0%} of which must remain free" if reserve else ""
        raise StorageError(
            f"{what} need {needed:,} bytes, but {path} has {free:,} bytes free{kept}. Make room, {advice}."
        )


def existing_folder(path: Path) -> Path:
    """Return the nearest existing folder among `path` and its parents."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def _available_memory() -> int:
    """Return the bytes of main memory that processes can still allocate."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def sync_folder(folder: Path) -> None:
    """Have the new name survive a power failure, where the file system can do so."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
