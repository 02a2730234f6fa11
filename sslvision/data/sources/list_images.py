"""Which files are images, by their names, and what to say of the others."""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from sslvision.data.image_plugins import BY_SUFFIX, EXTRA_FORMATS, HEAD, described_by_content, unread_format
from sslvision.errors import DataError

EXTENSIONS = (
    *(
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".apng",
        ".webp",
        ".tif",
        ".tiff",
        ".bmp",
        ".gif",
        ".ppm",
        ".pgm",
        ".pbm",
    ),
    *(".npy", ".npz"),
    *(suffix for one in EXTRA_FORMATS if one.pil is not None for suffix in one.suffixes),
)
SAMPLES = 20  # files that are not named as images, of which the content is looked at
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xml", ".parquet", ".xlsx", ".mat")

RUN = {"config.yaml", "environment.json"}  # in the folder of every run

# Why paths are left out, by kind.
LEFT_OUT = {
    "outside": "links that lead outside the folder, as data.follow_symlinks=false asks",
    "lost": "links that lead nowhere or in a circle, and special files",
    "hidden": "hidden images and folders, whose names begin with a dot",
    "closed": "folders that cannot be read",
    "runs": "folders of sslvision's own runs, with their figures",
}


@dataclass
class Found:
    """The images in a folder, and what else was found. Paths are relative, with "/" on every system."""

    images: list[str] = field(default_factory=list)  # unordered
    folders: set[str] = field(default_factory=set)  # of the first three levels, to report empty classes
    unread: Counter[str] = field(default_factory=Counter)  # images in formats that are not read, by extension
    other: Counter[str] = field(default_factory=Counter)  # files that are not images, by extension
    samples: list[str] = field(default_factory=list)  # paths of a few of those
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # by the keys of LEFT_OUT

    def remarks(self) -> list[str]:
        """Return in sentences what was found besides images: how many files, which share of all, and what to do."""
        unread = sum(self.unread.values())
        remarks = [
            f"Left out: {share(sum(counts.values()), len(self.images) + unread, 'images')}, {_listed(counts)}. {reason}."
            for reason, counts in self._unread_by_reason().items()
        ]
        if others := sum(self.other.values()):
            total = len(self.images) + unread + others
            hint = " Unpack the archives to use what is in them." if set(self.other) & {*ARCHIVES} else ""
            what = (
                f"Left out: {share(others, total, 'files')}, not being images that can be read: {_listed(self.other)}."
            )
            remarks.append(what + hint)
            remarks += _by_content(self.samples)
        for kind, words in LEFT_OUT.items():
            if paths := sorted(self.left_out[kind]):
                remarks.append(f"Left out: {words} ({len(paths):,}): {some(paths)}.")
        return remarks

    def remark_on_labels(self) -> list[str]:
        """Return in a sentence that files are not read that may be lists of labels, or annotations of each image."""
        files = {ending: self.other[ending] for ending in TABLES if ending in self.other}
        if self.other[".txt"] > max(2, 0.1 * len(self.images)):
            files[".txt"] = self.other[".txt"]
        if not files:
            return []
        return [
            f"Labels are read from the names of folders only, not from files ({_listed(Counter(files))}): if those hold "
            "labels, put each image into the folder of its class, or write a data source (docs/extending.md)."
        ]

    def _unread_by_reason(self) -> dict[str, Counter[str]]:
        reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for extension, count in self.unread.items():
            reasons[BY_SUFFIX[extension].reason][extension] += count
        return reasons


def share(part: int, whole: int, what: str) -> str:
    """Return a count with its share: "16 of 20 images (80 %)"."""
    return f"{part:,} of {whole:,} {what} ({100 * part / whole:.3g} %)"


def some(names: Sequence[str], most: int = 8) -> str:
    """Return the first names of a list, and how many there are besides."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _listed(counts: Counter[str], most: int = 8) -> str:
    return some([f"{count:,} {extension}" for extension, count in counts.most_common()], most)


def _extension(name: str) -> str:
    extension = os.path.splitext(name)[1].lower()
    return ".nii.gz" if extension == ".gz" and name.lower().endswith(".nii.gz") else extension


def _by_content(files: Sequence[str]) -> list[str]:
    """Return in sentences which of a few files that are not named as images are images by their content."""
    found = Counter[str]()
    for file in files:
        with suppress(OSError), open(file, "rb") as opened:
            if (words := described_by_content(opened.read(HEAD))) is not None:
                found[words] += 1
    return [
        f"By their content, {share(count, len(files), 'of them looked at')} are {words}."
        for words, count in found.items()
    ]


def no_images(root: str, found: Found, setting: str) -> DataError:
    """Return the error that there are no images, and what there is."""
    return DataError(
        f"No images in {root}. {' '.join(found.remarks()) or 'Nothing is there.'} Expected files ending in "
        f"{', '.join(EXTENSIONS)}, at any depth. Check {setting}."
    )


def kind_of_file(path: str) -> str:
    """Return the kind of a file in an archive by its path: image, unread, other, hidden, or of the system."""
    parts = path.split("/")
    if any(part.startswith("._") or part == "__MACOSX" for part in parts):
        return "of the system"
    if any(part.startswith(".") and part not in (".", "..") for part in parts):
        return "hidden" if path.lower().endswith(EXTENSIONS) else "of the system"
    return kind_by_extension(path)


def kind_by_extension(path: str) -> str:
    """Return the kind of a file by the ending of its name: image, unread, or other."""
    extension = _extension(path)
    if extension in BY_SUFFIX and unread_format(extension) is not None:
        return "unread"
    return "image" if extension in EXTENSIONS else "other"


def extension_of(path: str) -> str:
    """Return the ending of a path in lower case, in words if it has none."""
    return _extension(path) or "without an extension"
