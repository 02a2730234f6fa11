"""Image formats that need more than the usual installation, and formats that are not read: what to do about each.

PIL reads HEIC, AVIF, JPEG XL and JPEG 2000 with a plugin, which is imported when a file is found to need it, in every process
that meets one. DICOM files and camera raw files are named, with the way to convert them.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import IO, Any

from PIL import features

from sslvision.data.source import UnreadableImage

HEAD = 132  # bytes of a file that tell its format
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass(frozen=True)
class ExtraFormat:
    """A format of images.

    Attributes:
        name: Its name in messages.
        suffixes: Endings of file names, in lower case.
        pil: PIL's name of the format; None if it is not read.
        begin: Whether a file that begins with the given bytes has the format.
        advice: Rest of the sentence that says what to do where it is not read.
        available: Whether PIL can read it in this process; imports what it needs.
    """

    name: str
    suffixes: tuple[str, ...]
    pil: str | None
    begin: Callable[[bytes], bool]
    advice: str
    available: Callable[[], bool] = lambda: False

    @property
    def reason(self) -> str:
        """Return why such a file is not read, and what to do."""
        return f"{self.name} {self.advice}"


def _by_suffix_alone(head: bytes) -> bool:
    return False


def _imported(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


@cache
def _registers_heif() -> bool:
    if (plugin := _imported("pillow_heif")) is None:
        return False
    plugin.register_heif_opener()
    return True


@cache
def _registers_jxl() -> bool:
    return _imported("pillow_jxl") is not None  # registers itself


EXTRA_FORMATS = (
    ExtraFormat(
        *("HEIC", (".heic", ".heif", ".hif"), "HEIF"),
        lambda head: head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS,
        'is read by a plugin (pillow-heif): pip install "sslvision[heic]"',
        _registers_heif,
    ),
    ExtraFormat(
        *("AVIF", (".avif",), "AVIF"),
        lambda head: head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis"),
        'is read by newer versions of Pillow: pip install "pillow>=11.3"',
        lambda: "avif" in features.modules and bool(features.check("avif")),
    ),
    ExtraFormat(
        *("JPEG XL", (".jxl",), "JXL"),
        lambda head: head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")),
        'is read by a plugin (pillow-jxl-plugin): pip install "sslvision[jxl]"',
        _registers_jxl,
    ),
    ExtraFormat(
        *("JPEG 2000", (".jp2", ".j2k", ".jpx", ".jpf"), "JPEG2000"),
        lambda head: head.startswith((b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  ")),
        "is read by a Pillow that was built with OpenJPEG, as that of pip is: pip install --force-reinstall pillow",
        lambda: bool(features.check("jpg_2000")),
    ),
    ExtraFormat(
        *("DICOM", (".dcm", ".dicom"), None),
        lambda head: head[128:132] == b"DICM",
        "is not read: convert the files to TIFF or .npy, for example with pydicom, dcmread(file).pixel_array",
    ),
    ExtraFormat(
        "Camera raw",
        (".dng", ".cr2", ".cr3", ".nef", ".nrw", ".arw", ".srw", ".raf", ".rw2", ".orf", ".pef"),
        None,
        lambda head: head.startswith((b"FUJIFILMCCD-RAW", b"IIRO", b"IIU\0")) or head[4:12] == b"ftypcrx ",
        "is not read: convert the files to TIFF or JPEG, for example with rawpy, imread(file).postprocess()",
    ),
    ExtraFormat(
        *("NIfTI", (".nii", ".nii.gz"), None),
        _by_suffix_alone,
        "is not read: save its slices as TIFF or .npy, for example with nibabel, load(file).get_fdata()",
    ),
    ExtraFormat(
        *("Whole-slide format", (".svs", ".ndpi", ".mrxs", ".scn", ".bif"), None),
        _by_suffix_alone,
        "is not read: save tiles as PNG or TIFF, for example with openslide, OpenSlide(file).read_region(...)",
    ),
    ExtraFormat(
        *("Microscope format", (".czi", ".lif", ".nd2", ".oib", ".oif", ".vsi", ".lsm", ".ims"), None),
        _by_suffix_alone,
        "is not read: save the images as TIFF, for example with Fiji",
    ),
    ExtraFormat(
        *("FITS", (".fits", ".fts"), None),
        _by_suffix_alone,
        "is not read: save the images as .npy, for example with astropy, numpy.save(file, fits.getdata(file))",
    ),
    ExtraFormat(
        *("OpenEXR", (".exr",), None),
        _by_suffix_alone,
        "is not read: save the images as TIFF or .npy",
    ),
)
BY_SUFFIX = {suffix: one for one in EXTRA_FORMATS for suffix in one.suffixes}


def plugin_formats(file: IO[bytes]) -> tuple[str, ...]:
    """Return PIL's name of the format that an open file needs a plugin for, which is then imported; () for all others.

    The content decides: a photo of a phone may be called .jpg and be HEIC.

    Raises UnreadableImage, with the way out, if the file has a format of this module that cannot be read.
    """
    head = file.read(HEAD)
    file.seek(0)
    found = next((one for one in EXTRA_FORMATS if one.begin(head)), None)
    if found is None:
        return ()
    if found.pil is None or not found.available():
        raise UnreadableImage(found.reason)
    return (found.pil,)


def described_by_content(head: bytes) -> str | None:
    """Return the format of a file that is not named as an image, given its first HEAD bytes, and what to do; or None."""
    if (found := next((one for one in EXTRA_FORMATS if one.begin(head)), None)) is not None:
        unread = found.pil is None or not found.available()
        return (
            f"{found.name}, which {found.advice}"
            if unread
            else f"{found.name}: let their names end in {found.suffixes[0]}"
        )
    plain = {b"\xff\xd8\xff": "JPEG: let their names end in .jpg", b"\x89PNG\r\n": "PNG: let their names end in .png"}
    plain |= dict.fromkeys((b"II*\0", b"MM\0*"), "TIFF: let their names end in .tif")
    return next((words for begin, words in plain.items() if head.startswith(begin)), None)


def unread_format(suffix: str) -> ExtraFormat | None:
    """Return the format that the ending of a file's name tells, in lower case, if it is one of this module and not read."""
    found = BY_SUFFIX.get(suffix)
    return None if found is None or (found.pil is not None and found.available()) else found
