"""Shards of a bucket on the disk: fetched whole when they are first needed, up to a bound, the least recently used removed.

Processes share the folder. A lock for each shard keeps two of them from fetching the same one; a shard appears when it is
whole. Fetching ahead is done by threads in each process.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

from sslvision.data.remote_files import download, shown
from sslvision.data.shard_index import ShardFile
from sslvision.errors import StorageError
from sslvision.system.files import free_bytes, locked

GB = 10**9
TOUCHED = 20.0  # seconds after which a process says again that it uses a shard
LEFT_BEHIND = 3600.0  # seconds after which what a killed process was fetching is removed
STREAMS = 2  # shards that a process fetches ahead at the same time


class ShardCache:
    """A folder of shards.

    Args:
        folder: The folder.
        gigabytes: Its bound; what is about to be fetched counts.
    """

    def __init__(self, folder: Path, gigabytes: float):
        self.folder, self.bound = folder, int(gigabytes * GB)
        self.touched: dict[Path, float] = {}

    def path(self, shard: ShardFile) -> Path:
        """Return where a shard is, or will be."""
        key = blake2b(f"{shown(shard.url)}\0{shard.stamp}".encode("utf-8", "surrogateescape"), digest_size=16)
        return self.folder / f"{key.hexdigest()}.tar"

    def has(self, shard: ShardFile) -> bool:
        """Return whether a shard is here, and note that it is used."""
        path, now = self.path(shard), time.monotonic()
        if now - self.touched.get(path, -TOUCHED) < TOUCHED:
            return True  # perhaps no more: who opens it will see
        try:
            if os.path.getsize(path) != shard.size:
                return False
            os.utime(path)
        except OSError:
            return False
        self.touched[path] = now
        return True

    def forget(self, shard: ShardFile) -> None:
        """Note that a shard turned out to be gone."""
        self.touched.pop(self.path(shard), None)

    def fetch(self, shard: ShardFile, *, wait: bool = True) -> Path | None:
        """Return the path of a shard, after fetching it if it is not here.

        Args:
            shard: The shard.
            wait: Whether to wait for another process that fetches it; otherwise the result is None.

        Raises:
            RemoteError, StorageError: It cannot be read, or not be written.
        """
        path = self.path(shard)
        if self.has(shard):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder / f"{path.stem}.lock", wait=wait) as mine:
                if not mine:
                    return None
                if not self.has(shard):
                    self._make_room(shard.size)
                    download(shard.url, path, size=shard.size, sha256=shard.packed.sha256 if shard.packed else None)
        except OSError as error:
            raise StorageError(
                f"{self.folder}, where shards of a bucket are kept, cannot be written: {error.strerror or error}. Make room, "
                "set a smaller data.cache_gb, or another folder, data.shard_dir."
            ) from error
        return path

    def _make_room(self, needed: int) -> None:
        """Remove the least recently used shards until another one fits."""
        with locked(self.folder / "room.lock"):
            files = sorted(self._files())
            total = sum(size for _, size, _ in files)
            for used, size, path in files:
                old = path.suffix == ".tmp" and time.time() - used > LEFT_BEHIND
                tight = total + needed > self.bound or free_bytes(self.folder) < needed
                if old or (tight and path.suffix == ".tar"):
                    path.unlink(missing_ok=True)
                    total -= size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        for entry in os.scandir(self.folder):
            if entry.name.endswith((".tar", ".tmp")):
                with suppress(OSError):  # another process has just removed it
                    status = entry.stat()
                    yield status.st_mtime, status.st_size, Path(entry.path)


class Ahead:
    """Threads that fetch shards before they are needed. What fails is met again, and told, by who reads it."""

    def __init__(self, cache: ShardCache):
        self.cache, self.asked = cache, list[ShardFile]()
        self.waiting: deque[ShardFile] = deque()
        self.changed = threading.Condition()
        for _ in range(STREAMS):
            threading.Thread(target=self._work, daemon=True).start()

    def ask(self, shards: Sequence[ShardFile]) -> None:
        """Fetch these shards, in this order, instead of those asked for before."""
        with self.changed:
            if self.asked != shards:
                self.asked, self.waiting = list(shards), deque(shards)
                self.changed.notify_all()

    def _work(self) -> None:
        while True:
            with self.changed:
                while not self.waiting:
                    self.changed.wait()
                shard = self.waiting.popleft()
            with suppress(Exception):
                self.cache.fetch(shard, wait=False)


_ahead: dict[tuple[int, Any], Ahead] = {}  # of this process, by its number: threads do not survive a fork


def fetch_ahead(cache: ShardCache, shards: Sequence[ShardFile]) -> None:
    """Fetch shards in the background."""
    key = os.getpid(), (str(cache.folder), cache.bound)
    if key not in _ahead:
        _ahead[key] = Ahead(cache)
    _ahead[key].ask(shards)
