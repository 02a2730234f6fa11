"""Any folder of images as a data set: flat or nested, with or without classes, with or without train/ and val/.

- Splits: train/ with test/ or val/ next to it, or folders of similar names (see layout.py). Scores are measured on test/, or
  on val/ if there is no test/; with both, val/ is for choices during training. Without either, a fraction of the files is
  held out, chosen by a hash of their relative paths: the same files on every machine, and nearly the same ones when files
  are added. Where train/ has classes, held-out folders without any are not used.
- Classes: if images are in two or more subfolders, those of the first level are the classes; a few images outside of them
  are left out. With many outside, or fewer folders, the images have no labels.
- Order: sorted by relative path.
- Folders that belong to images, such as masks/ beside images/, are left out (see companions.py).
- A zip file, or a tar file that is not compressed, is read as the folder that it holds, without unpacking it.
- What is left out or guessed is said in the splits' `remarks`.
- What was found among many images is remembered, and only folders that have changed are listed again (see remembered.py).
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch

from sslvision.data.decode import MAX_PIXELS
from sslvision.data.eight_bits import value_range_from
from sslvision.data.encoded import EncodedSource, PathTable, file_stamp, is_gone
from sslvision.data.source import Splits
from sslvision.data.sources.archive_folder import is_archive, open_archive
from sslvision.data.sources.companions import holds_images, without_companions
from sslvision.data.sources.layout import check_classes, images_and_classes, split_folders, unwrapped
from sslvision.data.sources.list_images import Found, share, some
from sslvision.data.sources.overlaps import Image, chosen, same_files, tell_joined_names, tell_overlaps
from sslvision.data.sources.remembered import Decided, Part, decided_in
from sslvision.data.value_range import look_at
from sslvision.errors import UsageError
from sslvision.system.files import cache_folder

MOST_HELD_OUT = 5000

Split = tuple[str, list[str], tuple[str, ...] | None]  # a folder, its images relative to it, its classes


@dataclass(eq=False, kw_only=True)
class FileSource(EncodedSource):
    """A source of image files.

    Attributes:
        root: Folder of the images.
        paths: Their paths, relative to `root` or absolute.
    """

    root: str
    paths: PathTable

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> str:
        return self.describe(index)

    def stamp(self, index: int) -> str:
        return file_stamp(self.describe(index))

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def gone(self) -> str | None:
        return f"The folder of the images is gone or empty: {self.root}" if is_gone(self.root) else None


def open_folder(
    root: str | os.PathLike[str],
    *,
    channels: int = 3,
    holdout: float = 0.05,
    follow_symlinks: bool = True,
    at_least: int | None = None,
    max_pixels: int = MAX_PIXELS,
    value_range: str | Sequence[float] | Mapping[str, Sequence[float]] = "auto",
    index_dir: str | None = None,
    rescan: bool = False,
) -> Splits:
    """Return the images in `root`, as described at the top of this module.

    Files count as images by their endings, in either case: scan.EXTENSIONS. Hidden files and folders (leading dot, __MACOSX)
    are skipped. Symbolic links are followed, those to files outside `root` only with `follow_symlinks`. Whatever is skipped,
    except for hidden files of the system, is named in `remarks`.

    `holdout`: Fraction of the images to hold out if there is no split: at least one image, at most 5,000; 0 holds out
    none (test is None). `at_least` and `max_pixels` are passed to `read_image`.

    `value_range`: For images of more than 8 bits, the values that become black and white in all of them, [low, high];
    "auto": from a sample of the training images (data/value_range.py).

    `index_dir`: Folder where the listings of more than 10,000 images are kept (default: sslvision/folders in $XDG_CACHE_HOME or
    ~/.cache), so that later only folders that have changed are listed; `rescan`: list all of them again.

    Raises UsageError for settings out of range, DataError if there are no images, or if the classes of val/ or test/ differ
    from those of train/.
    """
    check_holdout(holdout)
    if channels < 1:
        raise UsageError(f"data.channels must be at least 1, not {channels}.")
    if not os.fspath(root):
        raise UsageError("data.root is empty: set it to the folder of the images.")
    if max_pixels < 1:
        raise UsageError(
            f"data.max_pixels={max_pixels} must be 1 or more: it is the most pixels that an image may have."
        )
    given = value_range_from(value_range)
    whole = os.path.abspath(os.path.expanduser(root))
    archive = open_archive(whole) if is_archive(whole) else None
    title = os.path.basename(whole) or whole

    def decide(found: Found) -> Decided:
        return _decide(found, whole, title, holdout)

    if archive is not None:
        decided = decide(archive.scan())
    else:
        index = cache_folder(index_dir, "folders")
        decided = decided_in(
            whole, decide, follow_symlinks=follow_symlinks, options=[holdout], folder=index, rescan=rescan
        )
    root = os.path.join(whole, decided.top) if decided.top else whole
    remarks, parts = [*decided.remarks], decided.parts
    labeled = sum(len(part.labels) for part in parts if part.labels is not None)
    tell_overlaps(root, decided.looked_at, labeled, remarks, same_files if archive is None else archive.same_files)
    name = f"{title} ({' + '.join(f'{len(part.paths):,}' for part in parts)})"

    def source(part: Part) -> EncodedSource:
        labels = None if part.labels is None else torch.from_numpy(part.labels)
        where = os.path.join(root, part.folder) if part.folder else root
        if archive is not None:
            return archive.source(where, part.paths, name, (channels, part.classes, labels, at_least, max_pixels))
        return FileSource(name, channels, part.classes, labels, at_least, max_pixels, root=where, paths=part.paths)

    first, *held_sources = map(source, parts)
    in_effect, of_values = look_at(first, given)
    for one in (first, *held_sources):
        one.value_range = in_effect
    test, validation = (*reversed(held_sources), None, None)[:2]  # a single one is the test split
    return Splits(first, test, validation, (*remarks, *of_values))


def _decide(found: Found, root: str, title: str, holdout: float) -> Decided:
    """Return the splits and classes of what was found in a folder, and what to say of it."""
    remarks = found.remarks() + found.remark_on_labels()
    found = without_companions(found, remarks)
    top, found = unwrapped(found, remarks)
    splits = _splits(os.path.join(root, top) if top else root, found, remarks, title=title, holdout=holdout)
    parts = [
        Part(folder, PathTable.of(images), classes, _labels(images, classes) if classes else None)
        for folder, images, classes in splits
    ]
    labels = {name for part in parts for name in part.classes or ()}
    tell_joined_names(sorted(labels), remarks)
    labeled = sum(len(part.paths) for part in parts if part.classes)
    return Decided(top, parts, remarks, chosen(_labeled(splits), labeled))


def _splits(root: str, found: Found, remarks: list[str], *, title: str, holdout: float) -> list[Split]:
    """Return the training images, and then those of validation and test, as far as there are any."""
    folder, held_folders = split_folders(root, found, remarks)
    train, classes = images_and_classes(found, folder, remarks, name=f"{folder}/" if folder else title)
    splits: list[Split] = [(folder, train, classes)]
    unlabeled = []
    for held_folder in held_folders:
        held, names = images_and_classes(found, held_folder, remarks, name=f"{held_folder}/", at_least_classes=1)
        if classes and names:
            check_classes(root, (folder, classes), (held_folder, names))
        if classes and not names:
            unlabeled.append(f"{share(len(held), len(found.images), 'images')} in {held_folder}/")
            continue
        if names and not classes and not all(map(holds_images, names)):
            remarks.append(
                f"{folder}/ has no two class folders: the labels of {held_folder}/ ({some(names)}) are not used."
            )
        splits.append((held_folder, held, names and classes))
    where = f"on {splits[-1][0]}/"
    if len(splits) == 1:
        held_out = hold_out(train, holdout)
        sides = ([path for path, held in zip(train, held_out, strict=True) if held == side] for side in (False, True))
        splits = [(folder, images, classes) for images in sides if images]
        where = (
            f"on {share(int(held_out.sum()), len(train), 'images')} of {folder}/, held out from training (data.holdout)"
        )
    if unlabeled:
        scored = f"Scores are measured {where}" if len(splits) > 1 else "No image is held out, so nothing is scored"
        why = "have no labels, for want of class folders, and are not used"
        remarks.append(f"{' and '.join(unlabeled)} {why}. {scored}.")
    return splits


def _labeled(splits: Sequence[Split]) -> Iterator[Image]:
    """Yield the labeled images of all splits; all but the first are held out."""
    for number, (folder, images, classes) in enumerate(splits):
        for path in images if classes else ():
            yield Image(f"{folder}/{path}" if folder else path, path.partition("/")[0], number > 0)


def check_holdout(holdout: float) -> None:
    """Raise UsageError if `holdout` is not a fraction that leaves images to train on."""
    if not 0 <= holdout <= 0.9:
        raise UsageError(f"data.holdout is the fraction of images to hold out, from 0 to 0.9, not {holdout}.")


def hold_out(keys: Iterable[str], fraction: float, count: int | None = None) -> np.ndarray:
    """Return (N,) bool, True for the images to hold out: those whose keys have the lowest hashes.

    Exactly `fraction` of them, rounded, but at least 1, at most 5,000, and never all. `count`: N, for keys without a length.
    """
    count = len(keys) if isinstance(keys, Sized) else count
    assert count is not None
    held_out = np.zeros(count, dtype=bool)
    most = min(max(1, round(fraction * count)), MOST_HELD_OUT, count - 1) if fraction else 0
    if most > 0:
        digests = (int.from_bytes(blake2b(os.fsencode(key), digest_size=8).digest(), "big") for key in keys)
        hashes = np.fromiter(digests, np.uint64, count)
        lowest = np.flatnonzero(hashes <= np.partition(hashes, most - 1)[most - 1])
        held_out[lowest[np.argsort(hashes[lowest], kind="stable")[:most]]] = True
    return held_out


def _labels(images: Sequence[str], classes: tuple[str, ...]) -> np.ndarray:
    indices = {name: place for place, name in enumerate(classes)}
    return np.fromiter((indices[path.partition("/")[0]] for path in images), np.int64, len(images))
