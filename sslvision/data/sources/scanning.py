"""Listing a folder of images: each folder in it by itself, and not again where it has not changed.

A folder's times of change (and its number on the disk) tell whether files in it came, went or were renamed. They do not where a
link leads elsewhere, a folder could not be read, or it changed as it was listed: such folders are listed every time.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn

from sslvision.data.sources.list_images import (
    EXTENSIONS,
    LEFT_OUT,
    RUN,
    SAMPLES,
    Found,
    extension_of,
    kind_by_extension,
    no_images,
)
from sslvision.errors import DataError

AT_ONCE = 8  # folders; a disk over the network takes long to answer, and more than one question at a time
SETTLED = (
    2_000_000_000  # ns after its last change until a folder's times tell of another one: those of some disks are coarse
)

Changed = tuple[int, int, int]  # times of change of a folder's content and of itself in ns, and its number on the disk


@dataclass
class Listing:
    """What is directly in a folder.

    Attributes:
        left: Real folders that links on its path have left.
        changed: When it was changed; None if that cannot be told, so that it is listed every time.
        images: Names of the images, sorted.
        folders: The folders in it, and what links on their paths have left.
        unread, other, left_out: See `Found`.
        samples: Names of a few of `other`.
    """

    left: tuple[str, ...] = ()
    changed: Changed | None = None
    images: list[str] = field(default_factory=list)
    folders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    other: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)


def scan(root: str, *, follow_symlinks: bool = True, setting: str = "data.root") -> Found:
    """Return what is in `root`.

    Links within `root` are always followed: an image with two paths counts twice.

    Args:
        root: A folder.
        follow_symlinks: Follow links that lead out of it.
        setting: Setting that names the folder, for messages.

    Raises:
        DataError: It is not a folder, or has no images.
    """
    check_folder(root, setting)
    return found_in(root, list_all(root, follow_symlinks=follow_symlinks), setting)


def check_folder(root: str, setting: str = "data.root") -> None:
    """Raise DataError if there is no such folder."""
    if not os.path.isdir(root):
        what = "is a file, not a folder: unpack it if it is an archive" if os.path.exists(root) else "does not exist"
        raise DataError(f"{root} {what}. Set {setting} to the folder of the images.")


def list_all(
    root: str,
    *,
    follow_symlinks: bool = True,
    known: Mapping[str, Listing] | None = None,
    most: int | None = None,
) -> dict[str, Listing]:
    """Return the listings of a folder and of all in it, by their paths relative to it ("" and "a/b/").

    Args:
        root: The folder.
        follow_symlinks: Follow links that lead out of it.
        known: Earlier listings, which are returned themselves where the folder has not changed.
        most: Stop when there are more images than this.
    """
    real_root, known = os.path.realpath(root), known or {}
    listings, images = dict[str, Listing](), 0
    waiting: dict[str, tuple[str, ...]] = {"": ()}

    def one(of: tuple[str, tuple[str, ...]]) -> Listing:
        folder, left = of
        path = os.path.join(root, folder)
        before = known.get(folder)
        if (
            before is not None
            and before.changed is not None
            and before.left == left
            and before.changed == changed(path)
        ):
            return before
        return _list(path, left, real_root, follow_symlinks)

    with _progress() as progress, ThreadPoolExecutor(AT_ONCE) as pool:
        shown = progress.add_task("")
        while waiting:
            found, left_to_list = dict[str, tuple[str, ...]](), iter(waiting.items())
            while some_of := [*islice(left_to_list, 64 * AT_ONCE)]:
                for (folder, _), listing in zip(some_of, pool.map(one, some_of), strict=True):
                    listings[folder] = listing
                    images += len(listing.images)
                    found |= {f"{folder}{name}/": left for name, left in listing.folders.items()}
                progress.update(shown, description=f"{images:,} images in {len(listings):,} folders of {root}")
            waiting = found if most is None or images <= most else {}
    return listings


def found_in(root: str, listings: Mapping[str, Listing], setting: str = "data.root") -> Found:
    """Return what is in a folder by its listings.

    Raises:
        DataError: There are no images.
    """
    found = Found()
    for folder, listing in listings.items():
        found.images += [folder + name for name in listing.images] if folder else listing.images
        if folder.count("/") < 3:
            found.folders |= {folder + name for name in listing.folders}
        found.unread += listing.unread
        found.other += listing.other
        if len(found.samples) < SAMPLES:
            found.samples += [os.path.join(root, folder + name) for name in listing.samples]
        for kind, names in listing.left_out.items():
            inside = folder or root if kind in ("closed", "runs") else folder
            found.left_out[kind] += [inside + name for name in names]
    del found.samples[SAMPLES:]
    if not found.images:
        raise no_images(root, found, setting)
    return found


def changed(folder: str) -> Changed | None:
    """Return when a folder was changed; None if that cannot be told, as on some mounted buckets."""
    try:
        status = os.stat(folder)
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_ctime_ns, status.st_ino) if status.st_mtime_ns > 0 else None


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False))
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _list(path: str, left: tuple[str, ...], real_root: str, follow_symlinks: bool) -> Listing:
    before, now = changed(path), time.time_ns()
    listing, links = Listing(left), False
    try:
        with os.scandir(path) as opened:
            entries = list(opened)
    except OSError as error:
        listing.left_out["closed"] = [f" ({error.strerror})"]
        return listing
    if {entry.name for entry in entries} >= RUN:
        listing.left_out["runs"] = [""]
        entries = []
    for entry, kind, of_entry in _kinds(entries, left, real_root, follow_symlinks):
        name = entry.name
        links = links or entry.is_symlink()
        if kind == "folder":
            listing.folders[name] = of_entry
        elif kind == "image":
            listing.images.append(name)
        elif kind in ("unread", "other"):
            if kind == "other" and len(listing.samples) < SAMPLES:
                listing.samples.append(name)
            (listing.unread if kind == "unread" else listing.other)[extension_of(name)] += 1
        elif kind in LEFT_OUT:
            listing.left_out.setdefault(kind, []).append(name)
    listing.images.sort()
    if before is not None and not links and max(before[:2]) < now - SETTLED and changed(path) == before:
        listing.changed = before
    return listing


def _kinds(
    entries: list[os.DirEntry[str]], left: tuple[str, ...], real_root: str, follow_symlinks: bool
) -> Iterator[tuple[os.DirEntry[str], str, tuple[str, ...]]]:
    for entry in entries:
        kind, links = "lost", left
        with suppress(OSError):  # a link into a folder without access permission
            kind, links = _kind(entry, left, real_root, follow_symlinks)
        yield entry, kind, links


def _kind(
    entry: os.DirEntry[str], left: tuple[str, ...], real_root: str, follow_symlinks: bool
) -> tuple[str, tuple[str, ...]]:
    """Return the kind of an entry, and for a folder the real folders that links on its path have left."""
    name = entry.name
    if name[0] in "._":
        if name.startswith("._") or name == "__MACOSX":  # what macOS adds to archives and disks
            return "of the system", left
        if name[0] == ".":
            return ("hidden" if entry.is_dir() or name.lower().endswith(EXTENSIONS) else "of the system"), left
    is_folder = entry.is_dir()
    if entry.is_symlink() and (is_folder or not follow_symlinks):
        target = os.path.realpath(entry.path)
        if not follow_symlinks and not _is_inside(target, real_root):
            return "outside", left
        left = (*left, os.path.realpath(os.path.dirname(entry.path)))
        if is_folder and any(_is_inside(folder, target) for folder in left):
            return "lost", left  # a cycle: the target is one of its parents
    if is_folder:
        return "folder", left
    if not entry.is_file():
        return "lost", left
    return kind_by_extension(name), left


def _is_inside(path: str, folder: str) -> bool:
    return os.path.join(path, "").startswith(os.path.join(folder, ""))
