"""The bytes of images as files: those of a source, or of an image that is shrunk or has no file of its own."""

import io
import os
import time
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from sslvision.data.cache_build import shrunk
from sslvision.data.decode import PASSING, WAITS, read_header, reasons_in_words
from sslvision.data.encoded import EncodedSource
from sslvision.data.image_plugins import EXTRA_FORMATS, HEAD
from sslvision.data.source import Source, SourceGone, UnreadableImage
from sslvision.data.sources.list_images import EXTENSIONS

BEGINNINGS = {  # of files whose names do not tell what they are, as in a table
    b"\xff\xd8": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"II+\0": "tif",
    b"MM\0+": "tif",
    b"BM": "bmp",
    b"\x93NUMPY": "npy",
    b"PK\x03\x04": "npz",
    **{f"P{digit}".encode(): "ppm" for digit in range(1, 7)},
}


class ImageFile(NamedTuple):
    """An image as a file: its bytes, and the ending of its name without a dot."""

    content: bytes
    ending: str


def image_file(source: Source, index: int, *, side: int | None, encoding: str, quality: int) -> ImageFile:
    """Return an image of a source as a file.

    Args:
        source: The source.
        index: Index of the image.
        side: Images with a longer short side are shrunk to it; None: none are.
        encoding: Format of images that are shrunk, "jpeg" or "png"; .npy if they have other channels than gray or color.
        quality: Quality of a JPEG.

    Raises:
        UnreadableImage: It cannot be read, or, where it may have to be shrunk, not be decoded.
        SourceGone: No image can be read any more.
    """
    if not isinstance(source, EncodedSource):
        pixels = source.read(index)
        small = side is None or min(pixels.shape[1:]) <= side
        return encoded(pixels, "png") if side is None or small else encoded(shrunk(pixels, side), encoding, quality)
    if side is not None:
        header = read_header(source.file(index), source.channels, max_pixels=source.max_pixels)
        if min(header.height, header.width) > side:
            return encoded(shrunk(source.read(index), side), encoding, quality)
        if header.wide:  # to 8 bits by the range of the whole set, as those that are shrunk
            return encoded(source.read(index), "png")
    content = content_of(source, index)
    return ImageFile(content, ending_of(source.describe(index), content))


def content_of(source: EncodedSource, index: int) -> bytes:
    """Return the bytes of an image; after a transient error of the disk or the network, they are read again."""
    for wait in (*WAITS, None):
        try:
            with reasons_in_words():
                file = source.file(index)
                with file() if callable(file) else open(file, "rb") as opened:
                    return opened.read()
        except UnreadableImage as error:
            number = error.__cause__.errno if isinstance(error.__cause__, OSError) else None
            if number and (words := source.gone()):
                raise SourceGone(f"{words} (while reading {source.describe(index)}). Is the disk mounted?") from error
            if wait is None or number not in PASSING:
                raise
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def encoded(pixels: Tensor, encoding: str, quality: int = 95) -> ImageFile:
    """Return pixels (C, H, W) uint8 as a file: a JPEG or PNG if they are gray or color, else an array (H, W, C)."""
    array, file = pixels.permute(1, 2, 0).contiguous().numpy(), io.BytesIO()
    if array.shape[2] not in (1, 3):
        np.save(file, array)
        return ImageFile(file.getvalue(), "npy")
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    if encoding == "jpeg":
        image.save(file, "JPEG", quality=quality)
        return ImageFile(file.getvalue(), "jpg")
    image.save(file, "PNG")
    return ImageFile(file.getvalue(), "png")


def ending_of(name: str, content: bytes) -> str:
    """Return the ending of the name of an image's file: its own, or the one that the bytes tell.

    Raises:
        UnreadableImage: Neither is known.
    """
    if not content:
        raise UnreadableImage("the file is empty")
    ending = os.path.splitext(name)[1].lower()
    if ending in EXTENSIONS:
        return ending[1:]
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    for beginning, told in BEGINNINGS.items():
        if content.startswith(beginning):
            return told
    for one in EXTRA_FORMATS:
        if one.pil is not None and one.begin(content[:HEAD]):
            return one.suffixes[0][1:]
    raise UnreadableImage("the content is not an image in a known format")
