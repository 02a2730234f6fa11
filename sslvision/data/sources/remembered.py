"""What was found in a folder of many images, or in a large list, kept in files: later starts and other processes read them.

- `KEY.npz` has the listings of the folders in it. A folder whose times have not changed is not listed again (scanning.py).
- `KEY-DIGEST/` has what was decided of these: paths, labels, splits and remarks, as arrays that are mapped into memory.

KEY is of the folder's path and of all that listing depends on, DIGEST of the listings and of what deciding depends on; for a
list they are of its path, and of its size, times of change and the settings. All may be deleted at any time, and is found again
then.
"""

import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from sslvision.data.encoded import InFile, PathTable
from sslvision.data.image_plugins import BY_SUFFIX, unread_format
from sslvision.data.sources import scanning
from sslvision.data.sources.list_images import EXTENSIONS, Found
from sslvision.data.sources.overlaps import Image
from sslvision.data.sources.scanning import Listing, check_folder, found_in, list_all
from sslvision.system.files import locked, written_whole

VERSION = 1  # increment it when the same folder is listed or decided in another way
MANY = 10_000  # images; fewer are listed in a fraction of a second, and nothing is kept of them
LARGE = 1 << 20  # bytes of lists; smaller ones are read in a fraction of a second
KEPT = 3  # decisions on one folder: those of its last changes
log = logging.getLogger(__name__)


class Part(NamedTuple):
    """The images of a split: their folder relative to the root, their paths in it, and their classes (N,), if they have any."""

    folder: str
    paths: PathTable
    classes: tuple[str, ...] | None
    labels: np.ndarray | None


class Decided(NamedTuple):
    """What was decided of a folder.

    Attributes:
        top: The folder in it that is the data set itself; "" for itself.
        parts: Images to train on, then those of validation and test, as far as there are any.
        remarks: What the user should know.
        looked_at: Labeled images to compare with one another, see overlaps.py.
    """

    top: str
    parts: list[Part]
    remarks: list[str]
    looked_at: list[Image]


def decided_in(
    root: str,
    decide: Callable[[Found], Decided],
    *,
    follow_symlinks: bool,
    options: Iterable[Any],
    folder: Path,
    rescan: bool = False,
) -> Decided:
    """Return what is decided of a folder of images, from `folder` where it is known there.

    Of several processes that ask at the same time, one lists and decides.

    Args:
        root: The folder of images.
        decide: Decides on what was found.
        follow_symlinks: Follow links that lead out of it.
        options: All else that `decide` depends on.
        folder: Where it is remembered.
        rescan: List all folders again, changed or not.

    Raises:
        DataError: There is no such folder, or no images.
    """
    check_folder(root)
    file = folder / f"{_digest(VERSION, os.path.realpath(root), root, follow_symlinks, EXTENSIONS, _unread())}.npz"
    there = _identity(file)
    started = dict[str, Listing]()
    if there is None:
        started = list_all(root, follow_symlinks=follow_symlinks, most=MANY)
        if sum(len(one.images) for one in started.values()) <= MANY:
            return decide(found_in(root, started))
    with locked(file.with_suffix(".lock"), "another process lists the images"):
        known = {} if rescan and _identity(file) == there else _listings_of(file)
        listings = list_all(root, follow_symlinks=follow_symlinks, known=known | started)
        of_listings = _digest_of(listings)
        decision = file.with_suffix("").with_name(f"{file.stem}-{_digest(of_listings, *options)}")
        if known != listings:
            _keep(file, lambda: _save_listings(file, listings))
        return _kept(decision, lambda: decide(found_in(root, listings)))


def decided_of_files(
    files: Sequence[str], decide: Callable[[], Decided], *, options: Iterable[Any], folder: Path
) -> Decided:
    """Return what is decided of lists of images, from `folder` where it is known there; of small lists nothing is kept.

    Args:
        files: The lists.
        decide: Reads them, and decides.
        options: All else that `decide` depends on.
        folder: Where it is remembered.
    """
    try:
        changes = [os.stat(file) for file in files]
    except OSError:  # `decide` says what is wrong
        return decide()
    if sum(one.st_size for one in changes) < LARGE:
        return decide()
    stamps = [(one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino) for one in changes]
    decision = folder / f"{_digest(VERSION, [*map(os.path.realpath, files)])}-{_digest(stamps, *options)}"
    if max(times for _, *both, _ in stamps for times in both) > time.time_ns() - scanning.SETTLED:
        return decide()  # it may be changed once more, in the same tick of the clock
    with locked(folder / f"{decision.name.partition('-')[0]}.lock", "another process reads the list"):
        return _kept(decision, decide)


def _kept(decision: Path, decide: Callable[[], Decided]) -> Decided:
    """Return a decision from its folder, after making it if need be."""
    with suppress(OSError, ValueError, KeyError):
        return _load(decision)
    found = decide()
    _keep(decision, lambda: _save(decision, found))
    with suppress(OSError, ValueError, KeyError):
        return _load(decision)  # mapped, so that processes share it
    return found


def _keep(what: Path, save: Callable[[], None]) -> None:
    try:
        what.parent.mkdir(parents=True, exist_ok=True)
        save()
    except OSError as error:  # the next start finds it again
        log.warning("What was found in the folder of images cannot be kept in %s: %s.", what.parent, error.strerror)


def _digest(*values: Any) -> str:
    return blake2b(os.fsencode(repr(values)), digest_size=12).hexdigest()


def _unread() -> list[str]:
    """Return the endings of formats that cannot be read here; a plugin changes them."""
    return sorted(suffix for suffix in BY_SUFFIX if unread_format(suffix) is not None)


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


# Listings


def _digest_of(listings: Mapping[str, Listing]) -> str:
    """Return a hash of what was found, whatever the order of folders."""
    digest = blake2b(digest_size=12)
    for folder in sorted(listings):
        one = listings[folder]
        digest.update(
            repr((folder, *(sorted(map(repr, part.items())) for part in _counts(one)))).encode("utf-8", "replace")
        )
        digest.update(_blob(one.images))
    return digest.hexdigest()


def _counts(listing: Listing) -> tuple[Mapping[str, Any], ...]:
    return listing.folders, listing.unread, listing.other, listing.left_out


def _blob(names: Iterable[str]) -> bytes:
    return os.fsencode("\0".join(names))


def _save_listings(file: Path, listings: Mapping[str, Listing]) -> None:
    heads, blobs = [], []
    for folder, one in listings.items():
        heads.append(vars(one) | {"folder": folder, "images": len(one.images)})
        blobs.append(_blob(one.images))
    ends = np.cumsum([len(blob) for blob in blobs], dtype=np.int64)
    head, names = np.frombuffer(json.dumps(heads).encode(), np.uint8), np.frombuffer(b"".join(blobs), np.uint8)
    with written_whole(file, concurrent=True) as opened:
        np.savez(opened, ends=ends, heads=head, names=names)


def _listings_of(file: Path) -> dict[str, Listing]:
    """Return the listings in a file; none if it does not exist, or is not whole."""
    listings = {}
    with (
        suppress(OSError, ValueError, KeyError, EOFError, BadZipFile),
        open(file, "rb") as opened,
        np.load(opened) as arrays,
    ):
        names, begin = arrays["names"].tobytes(), 0
        for head, end in zip(json.loads(arrays["heads"].tobytes()), arrays["ends"].tolist(), strict=True):
            images = os.fsdecode(names[begin:end]).split("\0") if head["images"] else []
            listings[head["folder"]] = Listing(
                left=tuple(head["left"]),
                changed=None if head["changed"] is None else tuple(head["changed"]),
                images=images,
                folders={name: tuple(left) for name, left in head["folders"].items()},
                unread=Counter(head["unread"]),
                other=Counter(head["other"]),
                samples=head["samples"],
                left_out=head["left_out"],
            )
            begin = end
    return listings


# Decisions


def _save(folder: Path, decided: Decided) -> None:
    part_of = folder.with_name(f"{folder.name}.part{os.getpid()}")
    shutil.rmtree(part_of, ignore_errors=True)
    part_of.mkdir()
    try:
        parts = []
        for number, part in enumerate(decided.parts):
            arrays = _arrays_of(part, before=decided.parts[0] if number else None)
            for name, array in arrays.items():
                array.tofile(part_of / f"{name}{number}")
            sizes = {name: len(array) for name, array in arrays.items()}
            parts.append({"folder": part.folder, "classes": part.classes, "sizes": sizes})
        about = {"top": decided.top, "remarks": decided.remarks, "looked_at": decided.looked_at, "parts": parts}
        (part_of / "about.json").write_text(json.dumps(about))
        shutil.rmtree(folder, ignore_errors=True)
        part_of.rename(folder)
    finally:
        shutil.rmtree(part_of, ignore_errors=True)
    earlier = sorted(folder.parent.glob(f"{folder.name.partition('-')[0]}-*/"), key=os.path.getmtime)
    for one in earlier[:-KEPT]:
        shutil.rmtree(one, ignore_errors=True)


def _arrays_of(part: Part, before: Part | None) -> dict[str, np.ndarray]:
    """Return the arrays of a part to write; without its paths where they are those of the first part."""
    paths, labels = part.paths, {} if part.labels is None else {"labels": part.labels}
    if before is not None and paths.blob is before.paths.blob:
        return {"starts": paths.starts, "ends": paths.ends, **labels}
    if np.array_equal(paths.starts[1:], paths.ends[:-1]):
        return {"blob": paths.blob, "offsets": np.append(paths.starts[:1], paths.ends), **labels}
    return {"blob": paths.blob, "starts": paths.starts, "ends": paths.ends, **labels}


def _load(folder: Path) -> Decided:
    about = json.loads((folder / "about.json").read_text())
    parts = list[Part]()
    for number, one in enumerate(about["parts"]):
        arrays = {
            name: InFile(str(folder / f"{name}{number}"), "|u1" if name == "blob" else "<i8", 0, size)()
            for name, size in one["sizes"].items()
        }
        blob = arrays["blob"] if "blob" in arrays else parts[0].paths.blob
        paths = (
            PathTable(blob, arrays["starts"], arrays["ends"])
            if "starts" in arrays
            else PathTable.joined(blob, arrays["offsets"])
        )
        classes = None if one["classes"] is None else tuple(one["classes"])
        parts.append(Part(one["folder"], paths, classes, arrays.get("labels")))
    return Decided(about["top"], parts, about["remarks"], [Image(*image) for image in about["looked_at"]])
