"""The pixels of an image that PIL has opened, or that was read as an array, as 8-bit tensors (decode.py describes how)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from sslvision.data.arrays import BITS, FORMAT, ArrayImage, setting_for
from sslvision.data.eight_bits import ValueRange, eight_bits
from sslvision.data.source import UnreadableImage

MAX_PIXELS = 100_000_000
Scale = Callable[[np.ndarray], np.ndarray]  # numbers of any type and shape to uint8

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
SIDEWAYS = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
UPRIGHT_ARRAYS: dict[int, Scale] = {  # the same for arrays (H, W, B)
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}


def from_pil(image: Image.Image, channels: int, *, max_pixels: int = MAX_PIXELS, scale: Scale = eight_bits) -> Tensor:
    """Return a PIL image as (C, H, W) uint8, converted as decode.py describes; `scale` gets values of more than 8 bits.

    Raises UnreadableImage if the image does not have the required bands, and PIL's own errors: see `reasons_in_words`.
    """
    bands, pages = len(image.getbands()), 1 if channels == 1 else count_pages(image, channels + 1)
    if channels in (1, 3) and not (channels == pages == 3 and is_gray_stack(image)):
        return _tensor(_gray_or_color(_upright(image), channels, scale))
    if bands == channels and pages == 1:
        return _tensor(np.array(_upright(image)))
    if bands == 1 and pages == channels:
        refuse_bomb(image.size, max_pixels, pages)
        return _tensor(_stack(image, pages, scale))
    found = f"{pages} page(s)" if pages <= channels else f"more than {channels} pages"
    advice = f": {setting_for(bands)} reads them" if bands > 1 else ""
    raise UnreadableImage(
        f"{channels} channels were asked for, and the file has {found} of {bands} band(s) ({image.mode}){advice}"
    )


def from_array(image: ArrayImage, channels: int, *, max_pixels: int = MAX_PIXELS, scale: Scale = eight_bits) -> Tensor:
    """Return an image that is read as an array as (C, H, W) uint8. Raises UnreadableImage."""
    refuse_bomb((image.width, image.height), max_pixels, image.pages)
    values = image.read()  # (H, W, B)
    if image.alpha and values.dtype != np.uint8:  # opacity has a range of its own
        full = (0.0, 1.0) if values.dtype.kind == "f" else (0.0, float(np.iinfo(values.dtype).max))
        opacity = eight_bits(values[..., -1:], ValueRange(full, full))
        pixels = np.concatenate([scale(values[..., :-1]), opacity], axis=-1)
    else:
        pixels = scale(values)
    if image.orientation in UPRIGHT_ARRAYS:
        pixels = np.ascontiguousarray(UPRIGHT_ARRAYS[image.orientation](pixels))
    if image.bands == channels:
        return _tensor(pixels)
    return _tensor(_gray_or_color(Image.fromarray(pixels[..., 0] if image.bands == 1 else pixels), channels, scale))


def refuse_bomb(size: tuple[int, int], max_pixels: int, pages: int = 1) -> None:
    """Raise UnreadableImage if the pages of a width and height have more pixels than `max_pixels`."""
    width, height = size
    if width * height * pages > max_pixels:
        each = f" on each of {pages} pages" if pages > 1 else ""
        raise UnreadableImage(f"{width} x {height} pixels{each}, more than the limit data.max_pixels={max_pixels}")


def is_wide(image: Image.Image) -> bool:
    """Return whether the values of an image are scaled to 8 bits: it is gray, of more than 8 bits or with negative values."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16") or _number(image) == (8, 2)


def _number(image: Image.Image) -> tuple[Any, Any]:
    """Return bits and sample format of a TIFF of one band."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    bits, number = tags.get(BITS, 0), tags.get(FORMAT, 1)
    return bits[0] if isinstance(bits, tuple) else bits, number[0] if isinstance(number, tuple) else number


def _values(image: Image.Image) -> np.ndarray:
    """Return the numbers (H, W) of an image for which `is_wide` holds. PIL reads some types of TIFF as others."""
    values = np.asarray(image)
    return values.view({(8, 2): np.int8, (32, 1): np.uint32}.get(_number(image), values.dtype))


def turn(image: Image.Image) -> Image.Transpose | None:
    """Return what puts an image upright; None where it is."""
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF says nothing about the pixels
        return None


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    how = turn(image)
    return image if how is None else image.transpose(how)


def _gray_or_color(image: Image.Image, channels: int, scale: Scale) -> np.ndarray:
    """Return (H, W) uint8 for one channel, (H, W, 3) for three."""
    if is_wide(image):
        image = Image.fromarray(scale(_values(image)))
    if image.mode == "La":  # premultiplied: PIL converts it to LA alone
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return np.array(image.convert("L" if channels == 1 else "RGB"))


def count_pages(image: Image.Image, most: int) -> int:
    """Return the number of pages or frames; of a TIFF, up to `most`: PIL needs minutes to count ten thousands of pages."""
    if image.format != "TIFF":
        return getattr(image, "n_frames", 1)
    pages = 1
    try:
        while pages < most:
            image.seek(pages)
            pages += 1
    except Exception:  # no more pages, or a damaged one
        pass
    image.seek(0)
    return pages


def is_gray_stack(image: Image.Image) -> bool:
    """Return whether all pages of a TIFF are gray and of one size. Frames of an animation are no channels, nor are previews."""
    if image.format != "TIFF":
        return False
    pages = set[tuple[bool, tuple[int, int]]]()
    for page in range(count_pages(image, 4)):
        image.seek(page)
        pages.add((len(image.getbands()) == 1 and image.mode != "P", image.size))
    image.seek(0)
    return len(pages) == 1 and pages.pop()[0]


def _stack(image: Image.Image, pages: int, scale: Scale) -> np.ndarray:
    """Return the one-band pages of an image as (H, W, N) uint8."""
    stack = []
    for page in range(pages):
        image.seek(page)
        if len(image.getbands()) != 1:
            raise UnreadableImage(f"page {page + 1} of {pages} has {len(image.getbands())} bands, not one")
        stack.append(_gray_or_color(_upright(image), 1, scale))
        if stack[-1].shape != stack[0].shape:
            raise UnreadableImage(f"pages of different sizes: page {page + 1} of {pages} is unlike the first")
    return np.stack(stack, axis=-1)


def _tensor(pixels: np.ndarray) -> Tensor:
    """Return (H, W) or (H, W, C) as (C, H, W)."""
    image = torch.from_numpy(pixels)
    return image[None] if image.ndim == 2 else image.permute(2, 0, 1)
