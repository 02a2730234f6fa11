"""Files in buckets and on web servers, through fsspec: their sizes, lists of them, parts of them, and whole ones onto the disk.

Credentials are those that the libraries find (environment variables, files of the cloud's tools); none is read or written here.
Messages name addresses without user names, passwords and queries.
"""

import hashlib
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from sslvision.errors import DataError, StorageError, UsageError
from sslvision.system.files import written_whole

Result = TypeVar("Result")
WAITS = [0.5, 1, 2, 4, 8, 16, 30]  # seconds before a file is asked for again, after a dropped connection and the like
CHUNK = 1 << 24  # bytes of a request
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
CREDENTIALS = {
    "s3fs": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or ~/.aws; AWS_ENDPOINT_URL for other stores than "
    "Amazon's; FSSPEC_S3='{\"anon\": true}' for public buckets",
    "gcsfs": 'GOOGLE_APPLICATION_CREDENTIALS or gcloud auth; FSSPEC_GS=\'{"token": "anon"}\' for public buckets',
    "aiohttp": "none but those in the address",
}
NO_CREDENTIALS = (
    "NoCredentialsError",
    "PartialCredentialsError",
    "TokenRetrievalError",
    "RefreshError",
    "HttpError401",
)


class RemoteError(DataError):
    """A file that cannot be read over the network.

    Args:
        message: What was wrong, and what to do.
        missing: Whether there is no such file.
        refused: Whether it may not be read.
    """

    def __init__(self, message: str, *, missing: bool = False, refused: bool = False):
        super().__init__(message)
        self.missing, self.refused = missing, refused


class Found(NamedTuple):
    """Size of a remote file, and what changes when its content does, as far as the server tells."""

    size: int
    version: str


def is_remote(url: str) -> bool:
    """Return whether a path is the address of a file elsewhere than on this machine's disks."""
    return "://" in url and not url.startswith("file://")


def shown(url: str) -> str:
    """Return an address as messages and files may have it: without user name, password and query."""
    if not is_remote(url):
        return url
    scheme, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    if scheme in ("http", "https"):
        path = path.partition("?")[0]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def stat(url: str) -> Found:
    """Return the size of a file; raises RemoteError."""

    def ask() -> dict[str, Any]:
        system, path = _system(url)
        return dict(system.info(path))

    info = _patiently(ask, url)
    if info.get("type") == "directory" or info.get("size") is None:
        raise RemoteError(f"{shown(url)} is no file whose size the server tells.", missing=True)
    version = next(
        (str(info[key]) for key in ("ETag", "etag", "md5Hash", "LastModified", "mtime") if info.get(key)), ""
    )
    return Found(int(info["size"]), version)


def find(url: str) -> list[str]:
    """Return the addresses that a pattern names, or those of all .tar files in a folder, sorted; raises RemoteError."""

    def ask() -> list[str]:
        system, path = _system(url)
        if set(url) & {*"*["}:
            return [system.unstrip_protocol(one) for one in system.glob(path)]
        return [system.unstrip_protocol(one) for one in system.find(path) if one.endswith(".tar")]

    return sorted(_patiently(ask, url))


def read_whole(url: str) -> bytes:
    """Return the content of a small file; raises RemoteError."""

    def ask() -> bytes:
        system, path = _system(url)
        return bytes(system.cat_file(path))

    return _patiently(ask, url)


def read_range(url: str, start: int, end: int) -> bytes | None:
    """Return bytes of a file; None if the server gives no parts of files. Raises RemoteError."""

    def ask() -> bytes | None:
        system, path = _system(url)
        try:
            content = bytes(system.cat_file(path, start=start, end=end))
        except NotImplementedError:
            return None
        return content if len(content) == end - start else None

    return _patiently(ask, url)


def download(url: str, file: Path, *, size: int, sha256: str | None = None) -> None:
    """Copy a file onto the disk. After a dropped connection it goes on where it was.

    Args:
        url: Address of the file.
        file: Where to; it appears when it is whole.
        size: Its size.
        sha256: Its checksum, if it is known.

    Raises:
        RemoteError: It cannot be read, or is another one than it should be.
        StorageError: The disk is full.
    """
    with written_whole(file, concurrent=True) as opened:

        def go_on(block: int = CHUNK) -> None:
            system, path = _system(url)
            with system.open(path, "rb", block_size=block, cache_type="none") as remote:
                if block and opened.tell():
                    remote.seek(opened.tell())
                while chunk := remote.read(CHUNK):
                    _write(opened, chunk, file)

        def go_on_or_begin_anew() -> None:
            try:
                go_on()
            except ValueError:  # a web server that gives no parts of files
                opened.seek(0)
                opened.truncate()
                go_on(block=0)

        _patiently(go_on_or_begin_anew, url, progress=opened.tell)
        if (found := opened.tell()) != size:
            raise RemoteError(f"{shown(url)} has {found:,} bytes instead of {size:,}: it was cut off or changed.")
        opened.flush()
        if sha256 is not None:
            with open(opened.name, "rb") as whole:
                if hashlib.file_digest(whole, "sha256").hexdigest() != sha256:
                    raise RemoteError(
                        f"{shown(url)} does not have the checksum of its index: damaged, or changed since. Copy it again."
                    )


def _write(opened: Any, chunk: bytes, file: Path) -> None:
    try:
        opened.write(chunk)
    except OSError as error:  # of the disk, and not of the network
        raise StorageError(
            f"{file.parent}, where shards of a bucket are kept, cannot be written: {error.strerror}. Make room, set a smaller "
            "data.cache_gb, or another data.shard_dir."
        ) from error


def _system(url: str) -> tuple[Any, str]:
    """Return the file system of an address, and the path there. It is made anew in a forked process."""
    scheme = url.partition("://")[0]
    package = PACKAGES.get(scheme)
    advice = f'pip install "sslvision[remote]"{" gcsfs" if package == "gcsfs" else ""}'
    try:
        fsspec = importlib.import_module("fsspec")
    except ImportError as error:
        raise UsageError(f"Files at {scheme}:// are read by fsspec, which is not installed: {advice}") from error
    try:
        system, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UsageError(f"Files at {scheme}:// are read by {package or error}: {advice}") from error
    except ValueError as error:
        raise UsageError(
            f"{shown(url)}: fsspec knows no {scheme}://. Known are s3://, gs://, http(s)://, ..."
        ) from error
    return system, path


def _patiently(ask: Callable[[], Result], url: str, *, progress: Callable[[], int] = lambda: 0) -> Result:
    """Return the result of a request, which is repeated after a transient error; raises RemoteError with the reason.

    Args:
        ask: The request.
        url: What it asks for.
        progress: Returns how far it has come; after any progress, the waiting begins anew.
    """
    tries, before = 0, progress()
    while True:
        try:
            return ask()
        except (UsageError, RemoteError, StorageError):
            raise
        except Exception as error:  # of many kinds, from many libraries
            if progress() > before:
                tries, before = 0, progress()
            if (final := _final_error(error, url)) is not None:
                raise final from error
            if tries == len(WAITS):
                raise RemoteError(_given_up(error, url)) from error
        time.sleep(WAITS[tries])
        tries += 1


def _final_error(error: Exception, url: str) -> RemoteError | None:
    """Return in an error why a request need not be repeated; None if it may succeed the next time."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and url.startswith("http") else None
    if cause is not None and not isinstance(cause, FileNotFoundError):  # so says fsspec of servers that are down, too
        return _final_error(cast(Exception, cause), url)
    status = getattr(error, "status", None)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return RemoteError(f"{shown(url)} does not exist. Check data.urls, its bucket and its server.", missing=True)
    refused = isinstance(error, PermissionError) or status in (401, 403) or type(error).__name__ in NO_CREDENTIALS
    if refused:
        told = " ".join(str(error).split())[:120]
        where = CREDENTIALS.get(PACKAGES.get(url.partition("://")[0], ""), "those of its fsspec library")
        reason = f"{shown(url)} may not be read ({told or type(error).__name__}). Credentials are taken from: {where}."
        return RemoteError(reason, refused=True)
    if isinstance(error, IsADirectoryError | NotImplementedError):
        return RemoteError(f"{shown(url)} cannot be read: {type(error).__name__}.")
    return None


def _given_up(error: Exception, url: str) -> str:
    told = " ".join(str(error).split())[:200]
    told = told.replace(url, shown(url))  # libraries name addresses in full
    return (
        f"{shown(url)} cannot be read, tried {len(WAITS) + 1} times in {sum(WAITS):.0f} s: {type(error).__name__}"
        f"{f' ({told})' if told else ''}. Is the network up, and the address of the server right?"
    )
