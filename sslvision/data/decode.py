"""Decoding image files to 8-bit tensors: each kind of file has one defined conversion, each failure a reason.

PIL is used because torchvision's decoder crashes the process on a damaged PNG. An upright color JPEG, the most common file,
is decoded by torchvision, to the same bytes in three quarters of the time, and by PIL if that fails. Arrays (.npy, .npz) are
read by NumPy; TIFF that PIL does not read in full, of many bands or of more than 8 bits of color, by tifffile, and PNG of 16
bits of color by imagecodecs. The conversions:

- Transparency (RGBA, LA, palettes and color keys) is composited on white.
- CMYK, YCbCr, palette and 1-bit images become RGB; gray is repeated; color becomes gray by its luma (ITU-R 601).
- Values of more than 8 bits are scaled by `value_range`, one range for all images of a set. Without it: 16-bit gray and
  32-bit integers within 0..65535 as value / 257, rounded, whatever the image's own range, so that images stay comparable.
  Floats within 0..1: value * 255; floats beyond 1 but within 0..65535: as 16-bit. An image with values outside 0..65535 is
  scaled from its minimum and maximum. NaN and infinity are rejected. Without these packages, the high bytes of 16-bit color
  are read.
- The EXIF orientation is applied; ICC profiles are not. Damaged or oversized metadata are ignored. Of several pages or
  frames the first is read, except below.
- `channels` other than 1: a TIFF with exactly that many pages of one band and one size is a stack of channels.
- `channels` other than 1 and 3: a file with exactly that many bands (their values as they are: alpha is a band like
  any other), or pages as above, in any format.
"""

import errno
import io
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg

from sslvision.data.arrays import ALPHA, BITS, EXTRA, LENGTH, WIDTH, ArrayImage, open_numpy, open_png, open_tiff
from sslvision.data.eight_bits import ValueRange, eight_bits
from sslvision.data.image_plugins import plugin_formats
from sslvision.data.metadata import without_metadata
from sslvision.data.pil_pixels import (
    MAX_PIXELS,
    SIDEWAYS,
    UPRIGHT,
    Scale,
    count_pages,
    from_array,
    from_pil,
    is_gray_stack,
    is_wide,
    refuse_bomb,
    turn,
)
from sslvision.data.source import SourceGone, UnreadableImage

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # by content; PIL's EPS reader would start Ghostscript
Result = TypeVar("Result")
File = str | os.PathLike[str] | Callable[[], IO[bytes]]  # a path, or a function that opens a file

# Transient errors of network file systems and failing disks: the file is read again after WAITS seconds.
PASSING = {
    getattr(errno, name)
    for name in (
        "EIO",
        "ESTALE",
        "ETIMEDOUT",
        "EAGAIN",
        "EBUSY",
        "ECONNRESET",
        "EHOSTDOWN",
        "EHOSTUNREACH",
        "EREMOTEIO",
    )
    if hasattr(errno, name)  # not all of them on every system
}
WAITS = (0.1, 0.5)

OTHERS = {  # what files of a wrong kind begin with
    b"\x89PNG": "a PNG with a damaged header",
    b"\xff\xd8": "a JPEG with a damaged header",
    b"GIF8": "a GIF with a damaged header",
    b"RIFF": "a WebP with a damaged header, or sound or video",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"<": "HTML, SVG or other text",
    b"{": "JSON text",
    b"PK\x03\x04": "a ZIP archive",
    b"\x1f\x8b": "compressed by gzip",
    b"\x89HDF": "an HDF5 file",
    b"SIMPLE": "a FITS file",
    b"8BPS": "a Photoshop file",
    b"version https://git-lfs": "a pointer of Git LFS: run git lfs pull",
}


class Header(NamedTuple):
    """What the header of a file says.

    Attributes:
        height, width: Size of the upright image.
        wide: Whether its values are more than 8-bit integers, and are scaled to these.
        unused_pages: Pages or frames that are not read.
        unused_bands: Bands that are not read and are no opacity.
        high_bytes: Whether only the high bytes of 16-bit color are read.
    """

    height: int
    width: int
    wide: bool = False
    unused_pages: int = 0
    unused_bands: int = 0
    high_bytes: bool = False


def read_image(
    path: File,
    channels: int,
    *,
    at_least: int | None = None,
    max_pixels: int = MAX_PIXELS,
    value_range: ValueRange | None = None,
) -> Tensor:
    """Return the image in a file as (C, H, W) uint8, decoded as described at the top of this module.

    The file is given by its path, or by a function that opens it, as for a member of an archive.

    The tensor is a view of (H, W, C) memory, in which decoding and resizing is fastest.

    `at_least` is the short side the caller needs, in pixels: a JPEG that is at least twice as large is decoded at
    1/2, 1/4 or 1/8 of its size, with a short side of no less than `at_least`. This saves most of the decoding time, and
    results in a slightly different (box-filtered) image. Other formats are always decoded in full.

    `max_pixels` rejects decompression bombs by their header; PIL's own limit does not apply. `value_range` has the values
    that become 0 and 255 in images of more than 8 bits.

    After a transient error of the disk or the network, the file is read again, twice within a second.

    Raises UnreadableImage with the reason in words if the file cannot be read.
    """
    scale = partial(eight_bits, value_range=value_range)
    for wait in WAITS:
        try:
            return _read(path, channels, at_least, max_pixels, scale)
        except UnreadableImage as error:
            if getattr(error.__cause__, "errno", None) not in PASSING:
                raise
        time.sleep(wait)
    return _read(path, channels, at_least, max_pixels, scale)


def image_size(path: File, channels: int = 3, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return height and width of the upright image from the header of its file. Raises UnreadableImage, as `read_image`."""
    header = read_header(path, channels, max_pixels=max_pixels)
    return header.height, header.width


def read_header(path: File, channels: int, *, max_pixels: int = MAX_PIXELS) -> Header:
    """Return what the header of a file says. Raises UnreadableImage, as `read_image`."""

    def of_image(image: ImageFile.ImageFile, file: IO[bytes]) -> Header:
        refuse_bomb(image.size, max_pixels)
        turned = turn(image) in SIDEWAYS
        # Versions of PIL differ in whether the size of a TIFF that lies on its side is that of the upright image.
        tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
        width, height = (tags[WIDTH], tags[LENGTH]) if tags else image.size
        pages, bands = count_pages(image, channels + 1), len(image.getbands())
        is_stack = pages == channels and (is_gray_stack(image) if channels == 3 else bands == 1)
        return Header(
            *((width, height) if turned else (height, width)),
            wide=is_wide(image),
            unused_pages=0 if is_stack or image.format == "MPO" else pages - 1,
            unused_bands=_dropped(tags, channels),
            high_bytes=_is_deep_color(image, file),
        )

    def of_array(image: ArrayImage) -> Header:
        refuse_bomb((image.width, image.height), max_pixels, image.pages)
        turned = UPRIGHT.get(image.orientation) in SIDEWAYS
        size = (image.width, image.height) if turned else (image.height, image.width)
        return Header(*size, wide=str(image.dtype) not in ("uint8", "bool"), unused_pages=image.unused)

    return _with_image(path, channels, of_image, of_array)


def _dropped(tags: Mapping[int, Any], channels: int) -> int:
    """Return the bands of a TIFF beyond gray or color that are no opacity, and that PIL does not read."""
    extra = tags.get(EXTRA, ())
    extra = extra if isinstance(extra, tuple) else (extra,)
    return sum(one not in ALPHA for one in extra) if channels in (1, 3) else 0


def _is_deep_color(image: ImageFile.ImageFile, file: IO[bytes]) -> bool:
    """Return whether an image is color of 16 bits, of which PIL reads the high bytes."""
    if len(image.getbands()) < 2:
        return False
    if image.format == "PNG":
        file.seek(24)  # bit depth in the header
        return file.read(1) == b"\x10"
    bits = getattr(image, "tag_v2", {}).get(BITS, 8) if image.format == "TIFF" else 8
    return max(bits if isinstance(bits, tuple) else (bits,)) > 8


def sampled_values(path: File, channels: int, *, max_pixels: int = MAX_PIXELS) -> list[np.ndarray]:
    """Return the values of an image before they are scaled to 8 bits: one array per page; none if they have 8 bits.

    Raises UnreadableImage, as `read_image`.
    """
    values: list[np.ndarray] = []

    def scale(found: np.ndarray) -> np.ndarray:
        values.append(found)
        return eight_bits(found)

    _read(path, channels, None, max_pixels, scale)
    return values


def _read(path: File, channels: int, at_least: int | None, max_pixels: int, scale: Scale) -> Tensor:
    def of_image(image: ImageFile.ImageFile, file: IO[bytes]) -> Tensor:
        refuse_bomb(image.size, max_pixels)
        full = image.size
        if at_least is not None:
            image.draft(image.mode, (at_least, at_least))
        if (image.format, image.mode, image.size, channels) == ("JPEG", "RGB", full, 3) and turn(image) is None:
            file.seek(0)
            # PIL reads some damaged files that torchvision does not, or reports the reason.
            with suppress(RuntimeError):
                return decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))
        return from_pil(image, channels, max_pixels=max_pixels, scale=scale)

    def of_array(image: ArrayImage) -> Tensor:
        return from_array(image, channels, max_pixels=max_pixels, scale=scale)

    return _with_image(path, channels, of_image, of_array)


def _with_image(
    path: File,
    channels: int,
    of_image: Callable[[ImageFile.ImageFile, IO[bytes]], Result],
    of_array: Callable[[ArrayImage], Result],
) -> Result:
    """Return the result of one of the functions: `of_image` for what PIL opens, `of_array` for what is read otherwise.

    Metadata that PIL rejects is left out: it says nothing of the pixels.
    """

    def opened(file: IO[bytes]) -> Result:
        with Image.open(file, formats=(*FORMATS, *plugin_formats(file))) as image:
            if image.format == "PNG" and (array := open_png(file, image, channels)) is not None:
                return of_array(array)
            return of_image(image, file)

    with reasons_in_words(), _pils_limit_lifted(), path() if callable(path) else open(path, "rb") as file:
        if not file.seek(0, io.SEEK_END):
            raise UnreadableImage("the file is empty")
        file.seek(0)
        if (array := open_numpy(file, channels) or open_tiff(file, channels)) is not None:
            return of_array(array)
        try:
            return opened(file)
        except (UnreadableImage, SourceGone):
            raise
        except Exception as error:
            file.seek(0)
            if (plain := without_metadata(file.read())) is not None:
                return opened(io.BytesIO(plain))
            file.seek(0)
            if not isinstance(error, UnidentifiedImageError):
                raise
            if (array := open_tiff(file, channels, pil_reads=False)) is not None:
                return of_array(array)
            raise UnreadableImage(_what_it_is(file)) from error


def _what_it_is(file: IO[bytes]) -> str:
    """Return in words what a file is that PIL does not recognize."""
    head = file.read(32).lstrip()
    found = next((words for begin, words in OTHERS.items() if head.startswith(begin)), None)
    known = f"not an image in a known format ({', '.join(FORMATS)}, NPY, NPZ)"
    return f"the content is {known}" if found is None else f"the content is {found}, {known}"


_lifted = threading.Lock()
_lifts: list[int | None] = []  # PIL's limit, once for each thread that has lifted it


@contextmanager
def _pils_limit_lifted() -> Iterator[None]:
    """Leave the limit of pixels to `max_pixels`: PIL's own, a global variable, is put back when the last thread is done."""
    with _lifted:
        _lifts.append(_lifts[0] if _lifts else Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        with _lifted:
            limit = _lifts.pop()
            if not _lifts:
                Image.MAX_IMAGE_PIXELS = limit


@contextmanager
def reasons_in_words() -> Iterator[None]:
    """Convert every error to UnreadableImage with a short reason; suppress PIL's warnings about metadata."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (UnreadableImage, SourceGone):
        raise
    except Exception as error:  # on damaged files PIL raises many kinds of errors
        raise UnreadableImage(_reason(error)) from error


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "the file is gone"
        case PermissionError():
            return "no permission to read the file"
        case UnidentifiedImageError():
            return f"the content is not an image in a known format ({', '.join(FORMATS)})"
        case Image.DecompressionBombError():  # only where others open the image, as torchvision's data sets do
            return f"too many pixels for PIL.Image.MAX_IMAGE_PIXELS: {error}"
        case MemoryError():
            return "not enough memory to decode it"
        case OSError(strerror=str(words)):
            return f"the file cannot be read: {words}"
    words = " ".join(str(error).split())[:200]
    return f"damaged or unsupported image data: {words or type(error).__name__}"
