"""Decoding image files to 8-bit tensors with PIL: each kind of file has one defined conversion, each failure a reason.

PIL is used because torchvision's decoder crashes the process on a damaged PNG. An upright color JPEG, the most common file,
is decoded by torchvision, to the same bytes in three quarters of the time, and by PIL if that fails. The conversions:

- Transparency (RGBA, LA, palettes and color keys) is composited on white.
- CMYK, YCbCr, palette and 1-bit images become RGB; gray is repeated; color becomes gray by its luma (ITU-R 601).
- 16-bit gray, 32-bit integers within 0..65535: value / 257, rounded, whatever the image's own range, so that images
  stay comparable. Floats within 0..1: value * 255; floats beyond 1 but within 0..65535: as 16-bit. Values outside
  0..65535 have no standard range: such an image is scaled from its minimum and maximum. NaN and infinity are rejected.
  PIL returns the high bytes of 16-bit color.
- The EXIF orientation is applied; ICC profiles are not. Damaged or oversized metadata are ignored. Of several pages or
  frames the first is read, except below.
- `channels` other than 1: a TIFF with exactly that many pages of one band and one size is a stack of channels.
- `channels` other than 1 and 3: a file with exactly that many bands (their values as they are: alpha is a band like
  any other), or pages as above, in any format. PIL opens no file of more than four bands.
"""

import errno
import io
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torchvision.io import decode_jpeg

from sslvision.data.metadata import without_metadata
from sslvision.data.source import UnreadableImage

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM")  # by content; PIL's EPS reader would start Ghostscript
MAX_PIXELS = 100_000_000

Result = TypeVar("Result")

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

Transpose = Image.Transpose
UPRIGHT = {  # EXIF orientation -> the operation that undoes it
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
IMAGE_WIDTH, IMAGE_LENGTH = 256, 257  # TIFF tags
SIDEWAYS = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)


def read_image(
    path: str | os.PathLike[str], channels: int, *, at_least: int | None = None, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """Return the image in a file as (C, H, W) uint8, decoded as described at the top of this module.

    The tensor is a view of (H, W, C) memory, in which decoding and resizing is fastest.

    `at_least` is the short side the caller needs, in pixels: a JPEG that is at least twice as large is decoded at
    1/2, 1/4 or 1/8 of its size, with a short side of no less than `at_least`. This saves most of the decoding time, and
    results in a slightly different (box-filtered) image. Other formats are always decoded in full.

    `max_pixels` rejects decompression bombs by their header; PIL's own limit does not apply.

    After a transient error of the disk or the network, the file is read again, twice within a second.

    Raises UnreadableImage with the reason in words if the file cannot be read.
    """
    for wait in WAITS:
        try:
            return _read(path, channels, at_least, max_pixels)
        except UnreadableImage as error:
            if getattr(error.__cause__, "errno", None) not in PASSING:
                raise
        time.sleep(wait)
    return _read(path, channels, at_least, max_pixels)


def image_size(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return height and width of the upright image from the header of its file. Raises UnreadableImage, as `read_image`."""

    def size(image: ImageFile.ImageFile, _: IO[bytes]) -> tuple[int, int]:
        _refuse_bomb(image, max_pixels)
        turned = _turn(image) in SIDEWAYS
        # Versions of PIL differ in whether the size of a TIFF that lies on its side is that of the upright image.
        tags = getattr(image, "tag_v2", None)
        width, height = (tags[IMAGE_WIDTH], tags[IMAGE_LENGTH]) if image.format == "TIFF" and tags else image.size
        return (width, height) if turned else (height, width)

    return _with_image(path, size)


def _read(path: str | os.PathLike[str], channels: int, at_least: int | None, max_pixels: int) -> Tensor:
    def pixels(image: ImageFile.ImageFile, file: IO[bytes]) -> Tensor:
        _refuse_bomb(image, max_pixels)
        full = image.size
        if at_least is not None:
            image.draft(image.mode, (at_least, at_least))
        if (image.format, image.mode, image.size, channels) == ("JPEG", "RGB", full, 3) and _turn(image) is None:
            file.seek(0)
            with suppress(
                RuntimeError
            ):  # PIL reads some damaged files that torchvision does not, or reports the reason
                return decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8))
        return from_pil(image, channels, max_pixels=max_pixels)

    return _with_image(path, pixels)


def _with_image(path: str | os.PathLike[str], use: Callable[[ImageFile.ImageFile, IO[bytes]], Result]) -> Result:
    """Return `use` of the opened image and its file. Metadata that PIL rejects is left out: it says nothing of the pixels."""

    def opened(file: IO[bytes]) -> Result:
        with Image.open(file, formats=FORMATS) as image:
            return use(image, file)

    with reasons_in_words(), _pils_limit_lifted(), open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise UnreadableImage("the file is empty")
        try:
            return opened(file)
        except UnreadableImage:
            raise
        except Exception:
            file.seek(0)
            if (plain := without_metadata(file.read())) is None:
                raise
            return opened(io.BytesIO(plain))


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


def from_pil(image: Image.Image, channels: int, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Return a PIL image as (C, H, W) uint8, converted as described at the top of this module.

    Raises UnreadableImage if the image does not have the required bands, and PIL's own errors: see `reasons_in_words`.
    """
    bands, pages = len(image.getbands()), getattr(image, "n_frames", 1)
    if channels in (1, 3) and not (channels == pages == 3 and _is_gray_stack(image)):
        return _tensor(_gray_or_color(_upright(image), channels))
    if bands == channels and pages == 1:
        return _tensor(np.array(_upright(image)))
    if bands == 1 and pages == channels:
        _refuse_bomb(image, max_pixels, pages)
        return _tensor(_stack(image, pages))
    raise UnreadableImage(
        f"{channels} channels were asked for, and the file has {pages} page(s) of {bands} band(s) ({image.mode})"
    )


@contextmanager
def reasons_in_words() -> Iterator[None]:
    """Convert every error to UnreadableImage with a short reason; suppress PIL's warnings about metadata."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UnreadableImage:
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


def _refuse_bomb(image: Image.Image, max_pixels: int, pages: int = 1) -> None:
    width, height = image.size
    if width * height * pages > max_pixels:
        each = f" on each of {pages} pages" if pages > 1 else ""
        raise UnreadableImage(f"{width} x {height} pixels{each}, more than the limit data.max_pixels={max_pixels}")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what puts an image upright; None where it is."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return None


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    turn = _turn(image)
    return image if turn is None else image.transpose(turn)


def _gray_or_color(image: Image.Image, channels: int) -> np.ndarray:
    """Return (H, W) uint8 for one channel, (H, W, 3) for three."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_eight_bits(np.asarray(image)))
    if image.mode == "La":  # premultiplied: PIL converts it to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return np.array(image.convert("L" if channels == 1 else "RGB"))


def _is_gray_stack(image: Image.Image) -> bool:
    """Return whether all pages of a TIFF are gray and of one size. Frames of an animation are no channels, nor are previews."""
    if image.format != "TIFF":
        return False
    pages = set[tuple[bool, tuple[int, int]]]()
    for page in range(getattr(image, "n_frames", 1)):
        image.seek(page)
        pages.add((len(image.getbands()) == 1 and image.mode != "P", image.size))
    image.seek(0)
    return len(pages) == 1 and pages.pop()[0]


def _stack(image: Image.Image, pages: int) -> np.ndarray:
    """Return the one-band pages of an image as (H, W, N) uint8."""
    stack = []
    for page in range(pages):
        image.seek(page)
        if len(image.getbands()) != 1:
            raise UnreadableImage(f"page {page + 1} of {pages} has {len(image.getbands())} bands, not one")
        stack.append(_gray_or_color(_upright(image), 1))
        if stack[-1].shape != stack[0].shape:
            raise UnreadableImage(f"pages of different sizes: page {page + 1} of {pages} is unlike the first")
    return np.stack(stack, axis=-1)


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Return (H, W) numbers of any type as uint8, by the ranges of this module's docstring."""
    is_float, values = values.dtype.kind == "f", values.astype(np.float64)
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UnreadableImage("its pixels include NaN or infinity")
    if low < 0 or high > 65535:
        scaled = (values - low) * (255 / max(high - low, np.finfo(np.float32).tiny))
    elif is_float and high <= 1:
        scaled = values * 255.0
    else:
        scaled = values / 257
    return np.rint(scaled).astype(np.uint8)


def _tensor(pixels: np.ndarray) -> Tensor:
    """Return (H, W) or (H, W, C) as (C, H, W)."""
    image = torch.from_numpy(pixels)
    return image[None] if image.ndim == 2 else image.permute(2, 0, 1)
