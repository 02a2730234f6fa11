"""Images in files that PIL does not read in full: NumPy's .npy and .npz, TIFF with many bands or more than 8 bits per band, and
PNG of 16 bits per color.

TIFF needs tifffile and PNG imagecodecs, optional packages. A file is recognized by its content.
"""

import importlib
import logging
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from sslvision.data.source import UnreadableImage

NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
WIDTH, LENGTH, BITS, COMPRESSION, ORIENTATION, SAMPLES, PLANAR, EXTRA, FORMAT = (
    256,
    257,
    258,
    259,
    274,
    277,
    284,
    338,
    339,
)
NUMBERS = {1: "unsigned integers", 2: "signed integers", 3: "floats"}
ALPHA = (1, 2)  # values of the tag EXTRA


@dataclass(frozen=True)
class ArrayImage:
    """An image of which only the header has been read.

    Attributes:
        height, width, bands: Its shape, as it is stored.
        pages: Pages, or arrays of one band, that are read together as bands.
        dtype: Type of its values.
        read: Reads (height, width, bands).
        orientation: As EXIF has it, 1 to 8.
        alpha: Whether the last band is the opacity.
        unused: Pages that are not read.
    """

    height: int
    width: int
    bands: int
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]
    pages: int = 1
    orientation: int = 1
    alpha: bool = False
    unused: int = 0


def setting_for(channels: int) -> str:
    """Return the settings that read files of so many channels, as they are typed: statistics of ImageNet are of three."""
    return f"data.channels={channels}" + ("" if channels in (1, 3) else " data.normalize=computed")


def open_numpy(file: IO[bytes], channels: int) -> ArrayImage | None:
    """Return the image in an .npy or .npz file; None for files of other kinds.

    An array is (H, W), (H, W, C) or (C, H, W), with C = `channels`, or with 1 or 3 if `channels` is the other of them.

    Raises UnreadableImage for other shapes, several arrays in one file, and arrays of Python objects.
    """
    head = file.read(len(NPY))
    file.seek(0)
    if head == NPY:
        shape, dtype = _numpy_header(file)
        file.seek(0)
        return _array_image(shape, dtype, channels, lambda: np.load(file, allow_pickle=False))
    if not head.startswith(ZIP):
        return None
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        if len(names) != 1:
            listed = ", ".join(name.removesuffix(".npy") for name in names[:8]) or "none"
            raise UnreadableImage(f"an .npz file must hold one array, and this has {len(names)}: {listed}")
        with archive.open(names[0]) as member:
            shape, dtype = _numpy_header(member)

    def read() -> np.ndarray:
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return arrays[names[0].removesuffix(".npy")]

    return _array_image(shape, dtype, channels, read)


def _numpy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise UnreadableImage("the array holds Python objects (a pickle), which are not read: save an array of numbers")
    return shape, dtype


def _array_image(
    shape: tuple[int, ...], dtype: np.dtype[Any], channels: int, read: Callable[[], np.ndarray]
) -> ArrayImage:
    if dtype.kind not in "biuf":
        raise UnreadableImage(f"the array is of type {dtype}, not of numbers")
    if 0 in shape:
        raise UnreadableImage(f"the array is empty: its shape is {shape}")
    if len(shape) == 2 and channels in (1, 3):
        return ArrayImage(*shape, 1, dtype, lambda: read()[..., None])
    if len(shape) == 3:
        for accepted in ((channels,), (1, 3) if channels in (1, 3) else ()):
            first, last = shape[0] in accepted, shape[2] in accepted
            if first and last and shape[0] != shape[1] != shape[2]:
                raise UnreadableImage(
                    f"the array of shape {shape} may be (C, H, W) or (H, W, C): save it with another C"
                )
            if last:
                return ArrayImage(*shape, dtype, read)
            if first:
                return ArrayImage(*shape[1:], shape[0], dtype, lambda: np.moveaxis(read(), 0, -1))
    wanted = (
        f"(H, W), (H, W, {channels}) or ({channels}, H, W)"
        if channels in (1, 3)
        else f"(H, W, {channels}) or " + (f"({channels}, H, W)")
    )
    bands = min(shape[0], shape[2]) if len(shape) == 3 else 0
    advice = f": {setting_for(bands)} reads it" if 0 < bands < 32 else ""
    raise UnreadableImage(f"the array has the shape {shape}, and data.channels={channels} needs {wanted}{advice}")


def open_tiff(file: IO[bytes], channels: int, *, pil_reads: bool = True) -> ArrayImage | None:
    """Return the image in a TIFF that PIL does not read in full; None for other files.

    Args:
        file: The file.
        channels: Channels that are asked for.
        pil_reads: False where PIL has refused the file.

    Raises:
        UnreadableImage: tifffile is needed and is not installed, or the file has another number of bands and pages.
    """
    head = file.read(4)
    file.seek(0)
    if head not in TIFF:
        return None
    tags = _tags(file)
    file.seek(0)
    if pil_reads and (tags is None or _pil_reads_all(tags, channels)):
        return None
    if tags is None:
        raise UnreadableImage("damaged TIFF: its directory cannot be read")
    if (tifffile := _imported()) is None:
        if pil_reads and _pil_reads_high_bytes(tags):
            return None
        raise UnreadableImage(f'TIFF of {_described(tags)} is read by tifffile: pip install "sslvision[tiff]"')
    return _from_tifffile(tifffile, file, tags, channels)


def open_png(file: IO[bytes], image: Image.Image, channels: int) -> ArrayImage | None:
    """Return the color image of 16 bits in a PNG that PIL has opened; None for other files, and without imagecodecs."""
    file.seek(24)  # bit depth and type of color in the header
    bands = {b"\x10\2": 3, b"\x10\4": 2, b"\x10\6": 4}.get(file.read(2), 0)
    if not bands or "transparency" in image.info or getattr(image, "n_frames", 1) > 1:
        return None
    if (channels not in (1, 3) and bands != channels) or (codecs := _imagecodecs()) is None:
        return None
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        orientation = 1

    def read() -> np.ndarray:
        file.seek(0)
        return codecs.png_decode(file.read()).reshape(image.height, image.width, bands)

    alpha = bands in (2, 4) and bands != channels
    return ArrayImage(image.height, image.width, bands, np.dtype(np.uint16), read, orientation=orientation, alpha=alpha)


def reads_deep_color() -> bool:
    """Return whether all 16 bits of color are read, of TIFF and PNG."""
    return _imported() is not None and _imagecodecs() is not None


def _imagecodecs() -> Any:
    try:
        imagecodecs = importlib.import_module("imagecodecs")
    except ImportError:
        return None
    return imagecodecs if imagecodecs.PNG.available else None


def _imported() -> Any:
    try:
        tifffile = importlib.import_module("tifffile")
    except ImportError:
        return None
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it logs what is odd in a file
    return tifffile


def _tags(file: IO[bytes]) -> dict[int, Any] | None:
    """Return the tags of the first page that describe its pixels; None if they cannot be read."""
    try:
        head = file.read(8)
        head += file.read(8) if b"+" in head[:4] else b""  # BigTIFF
        directory = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(directory.next)
        directory.load(file)
        known = (WIDTH, LENGTH, BITS, COMPRESSION, ORIENTATION, PLANAR, SAMPLES, EXTRA, FORMAT)
        tags = {tag: directory[tag] for tag in known if tag in directory}
        return tags if WIDTH in tags and LENGTH in tags else None
    except Exception:  # PIL raises many kinds of errors on damaged files
        return None


def _kind_of(tags: dict[int, Any]) -> tuple[int, int | None, int | None]:
    """Return the number of bands, bits per band and the sample format; None where bands differ."""
    bits, formats = set(_tuple(tags.get(BITS, 1))), set(_tuple(tags.get(FORMAT, 1)))
    return tags.get(SAMPLES, 1), *(one.pop() if len(one) == 1 else None for one in (bits, formats))


def _tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _pil_reads_all(tags: dict[int, Any], channels: int) -> bool:
    bands, bits, number = _kind_of(tags)
    if tags.get(COMPRESSION, 1) not in TiffImagePlugin.COMPRESSION_INFO:
        return False
    if bands == 1:
        return (number == 1 and bits != 64) or (number == 2 and bits in (8, 16, 32)) or (number, bits) == (3, 32)
    drops_a_band = bands == 2 and channels == 2 and not _has_alpha(tags)
    return number == 1 and bits is not None and bits <= 8 and bands <= 4 and not drops_a_band


def _pil_reads_high_bytes(tags: dict[int, Any]) -> bool:
    """Return whether PIL reads the high bytes of 16-bit color, one pixel after the other."""
    bands, bits, number = _kind_of(tags)
    return bands in (3, 4) and (bits, number) == (16, 1) and tags.get(PLANAR, 1) == 1


def _has_alpha(tags: dict[int, Any]) -> bool:
    return bool(set(_tuple(tags.get(EXTRA, ()))) & {*ALPHA})


def _described(tags: dict[int, Any]) -> str:
    bands, bits, number = _kind_of(tags)
    return f"{bands} band(s) of {'mixed' if bits is None else f'{bits}-bit'} {NUMBERS.get(number or 0, 'numbers')}"


def _from_tifffile(tifffile: Any, file: IO[bytes], tags: dict[int, Any], channels: int) -> ArrayImage:
    tif = tifffile.TiffFile(file)
    page, pages, bands = tif.pages[0], len(tif.pages), tif.pages[0].samplesperpixel
    end = file.seek(0, 2)
    if any(start + count > end for start, count in zip(page.dataoffsets, page.databytecounts, strict=False)):
        raise UnreadableImage("damaged TIFF: the file is cut short")
    if page.imagedepth > 1 or page.dtype is None:
        raise UnreadableImage(f"TIFF of {_described(tags)} and depth {page.imagedepth}, which is not supported")
    shape, alpha = (page.imagelength, page.imagewidth), _has_alpha(tags)
    about = {"orientation": tags.get(ORIENTATION, 1), "alpha": alpha and channels != bands}

    def first() -> np.ndarray:
        pixels = page.asarray()
        pixels = np.moveaxis(pixels, 0, -1) if page.axes.startswith("S") else pixels
        return pixels.reshape(*shape, bands)

    def stack() -> np.ndarray:
        planes = [one.asarray() for one in tif.pages]
        if any(one.shape != planes[0].shape for one in planes):
            raise UnreadableImage("pages of different sizes")
        return np.stack(planes, axis=-1)

    alike = pages == channels and bands == 1 and all(one.shape == page.shape for one in tif.pages)
    if alike and channels > 1:
        return ArrayImage(*shape, channels, page.dtype, stack, pages=pages, **about)
    if bands == channels or (channels in (1, 3) and bands - alpha in (1, 3)):
        return ArrayImage(*shape, bands, page.dtype, first, unused=pages - 1, **about)
    advice = (
        f": {setting_for(bands)} reads them" if bands > 1 else f": {setting_for(pages)} reads them" if pages > 1 else ""
    )
    raise UnreadableImage(
        f"{channels} channels were asked for, and the file has {pages} page(s) of {bands} band(s) of {page.dtype}{advice}"
    )
