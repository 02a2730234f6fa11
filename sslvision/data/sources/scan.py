"""Listing the images in a folder, a million files in seconds."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from sslvision.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".npy", ".npz")

log = logging.getLogger(__name__)


LEFT_OUT = {
    "hidden": "hidden files and folders",
    "outside": "links that lead outside the folder (data.follow_symlinks=true follows them)",
    "lost": "links that lead nowhere or in a circle, and special files",
}


@dataclass
class Found:
    """The images in a folder, and what else was found. Paths are relative, with "/" on every system."""

    images: list[str] = field(default_factory=list)  # unordered
    folders: set[str] = field(default_factory=set)  # of the first two levels, to report empty classes
    other: Counter[str] = field(default_factory=Counter)  # files that are not images, by extension
    left_out: Counter[str] = field(default_factory=Counter)  # by the keys of LEFT_OUT
    closed: list[str] = field(default_factory=list)  # folders that could not be listed, with the reason

    def remarks(self, kinds: Iterable[str]) -> str:
        """Return in words what was found besides images, of the given kinds of LEFT_OUT."""
        others = ", ".join(f"{count:,} {extension}" for extension, count in self.other.most_common(8))
        remarks = [f"files that are not images: {others}"] if others else []
        remarks += [f"{LEFT_OUT[kind]}: {self.left_out[kind]:,}" for kind in kinds if self.left_out[kind]]
        remarks += [f"folders that cannot be read: {', '.join(self.closed[:8])}"] if self.closed else []
        return "; ".join(remarks)


def scan(root: str, *, follow_symlinks: bool) -> Found:
    """Return what is in `root`. Raises DataError if it is not a folder or has no images.

    Links within `root` are always followed: an image with two paths counts twice.
    """
    if not os.path.isdir(root):
        what = "is a file, not a folder: unpack it if it is an archive" if os.path.exists(root) else "does not exist"
        raise DataError(f"{root} {what}. Set data.root to the folder of the images.")
    found = Found()
    real_root = os.path.realpath(root)
    waiting: list[tuple[str, tuple[str, ...]]] = [("", ())]  # folders, with the real folders that links to them left
    while waiting:
        folder, left = waiting.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as listing:
                entries = list(listing)
        except OSError as error:
            found.closed.append(f"{folder or root} ({error.strerror})")
            continue
        for entry in entries:
            path = folder + entry.name
            try:
                kind, links = _kind(entry, left, real_root, follow_symlinks)
            except OSError:  # a link into a folder without access permission
                kind, links = "lost", left
            if kind == "folder":
                waiting.append((f"{path}/", links))
                if path.count("/") < 2:
                    found.folders.add(path)
            elif kind == "image":
                found.images.append(path)
            elif kind == "other":
                found.other[os.path.splitext(path)[1].lower() or "without an extension"] += 1
            else:
                found.left_out[kind] += 1
    if not found.images:
        raise DataError(
            f"No images in {root}. Found there: {found.remarks(LEFT_OUT) or 'nothing'}. Expected files ending in "
            f"{', '.join(EXTENSIONS)}, at any depth. Check data.root."
        )
    if remarks := found.remarks(("outside", "lost")):  # hidden files are common and deliberately skipped
        log.warning("%s: left out: %s.", root, remarks)
    return found


def _kind(
    entry: os.DirEntry[str], left: tuple[str, ...], real_root: str, follow_symlinks: bool
) -> tuple[str, tuple[str, ...]]:
    """Return the kind of an entry, and for a folder the real folders that links on its path have left."""
    if entry.name.startswith(".") or entry.name == "__MACOSX":
        return "hidden", left
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
    return ("image" if entry.name.lower().endswith(EXTENSIONS) else "other"), left


def _is_inside(path: str, folder: str) -> bool:
    return os.path.join(path, "").startswith(os.path.join(folder, ""))
