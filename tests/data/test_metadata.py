"""Metadata never costs an image, and its orientation is what `image_size` and the decoded pixels agree on."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_files import RED, color, noise
from PIL import Image

from sslvision.data.decode import image_size, read_image
from sslvision.data.source import UnreadableImage

FORMATS = ["png", "jpg", "webp", "tif"]
BIG = np.random.default_rng(0).bytes(2_000_000)  # an ICC profile of a scanner or printer is as large


def png_with(*chunks, before=b"IDAT"):
    """A red PNG with chunks added before one of its own."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), RED).save(buffer, "PNG")
    content = buffer.getvalue()
    place = content.index(before) - 4
    added = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return content[:place] + added + content[place:]


def jpeg_with(*segments):
    """A red JPEG with APP segments added after its start."""
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), RED).save(buffer, "JPEG", quality=100, subsampling=0)
    content = buffer.getvalue()
    added = b"".join(bytes([0xFF, kind]) + struct.pack(">H", len(data) + 2) + data for kind, data in segments)
    return content[:2] + added + content[2:]


def is_red(path):
    assert image_size(path) == (4, 6)
    image = read_image(path, 3)
    assert image.shape == (3, 4, 6)
    return np.allclose(color(image), RED, atol=3)


@pytest.mark.parametrize("form", FORMATS)
def test_a_color_profile_of_two_megabytes_does_not_cost_the_image(saved, form):
    assert is_red(saved(Image.new("RGB", (6, 4), RED), f"a.{form}", icc_profile=bytes(2_000_000)))
    assert is_red(saved(Image.new("RGB", (6, 4), RED), f"b.{form}", icc_profile=BIG))


PNG_CHUNKS = {
    "compressed text beyond PIL's limit": [(b"zTXt", b"a\0\0" + zlib.compress(bytes(3_000_000)))],
    "international text beyond PIL's limit": [(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(3_000_000)))],
    "more text in total than PIL's limit": [(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000)))] * 70,
    "a profile that is not compressed": [(b"iCCP", b"a\0\0nonsense")],
    "a profile of an unknown method": [(b"iCCP", b"a\0\7nonsense")],
    "an empty profile": [(b"iCCP", b"")],
    "text that is not compressed": [(b"zTXt", b"a\0\0nonsense")],
    "text of an unknown method": [(b"zTXt", b"a\0\7nonsense")],
    "no physical size": [(b"pHYs", b"")],
    "no gamma": [(b"gAMA", b"")],
    "no chromaticities": [(b"cHRM", b"abc")],
    "no rendering intent": [(b"sRGB", b"")],
    "EXIF that is none": [(b"eXIf", b"nonsense")],
    "XMP that is none": [(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta tiff:Orientation='seven'\xff")],
}


@pytest.mark.parametrize("chunks", PNG_CHUNKS.values(), ids=PNG_CHUNKS)
@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
def test_damaged_or_large_metadata_does_not_cost_a_png(written, chunks, before):
    assert is_red(written(png_with(*chunks, before=before)))


def test_a_png_read_without_its_metadata_keeps_orientation_and_transparency(written):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), RED).save(buffer, "PNG", exif=exif, transparency=RED)
    content = buffer.getvalue()
    place = content.index(b"IDAT") - 4
    text = b"zTXt" + b"a\0\0" + zlib.compress(bytes(3_000_000))
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    path = written(content[:place] + chunk + content[place:])
    assert image_size(path) == (6, 4)
    assert read_image(path, 3).shape == (3, 6, 4)
    assert color(read_image(path, 3)) == (255, 255, 255)


def test_damaged_pixels_are_still_damaged_where_metadata_are_damaged_too(written):
    content = png_with((b"iCCP", b"a\0\0nonsense"))
    place = content.index(b"IDAT") + 6
    with pytest.raises(UnreadableImage, match="damaged"):
        read_image(written(content[:place] + b"\0\0\0" + content[place + 3 :]), 3)


JPEG_SEGMENTS = {
    "EXIF that is none": [(0xE1, b"Exif\0\0nonsense")],
    "empty EXIF": [(0xE1, b"Exif\0\0")],
    "EXIF whose directory points beyond its end": [(0xE1, b"Exif\0\0II*\0\xff\xff\0\0")],
    "EXIF of many thousand entries": [(0xE1, b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + bytes(500))],
    "XMP that is none": [(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta tiff:Orientation='seven'\xff")],
    "a profile cut short": [(0xE2, b"ICC_PROFILE\0")],
    "a profile whose parts are lost": [(0xE2, b"ICC_PROFILE\0\x07\x09abc")],
    "a profile cut short before a large one": [
        (0xE2, b"ICC_PROFILE\0"),
        *[(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000))] * 40,
    ],
    "a short JFIF": [(0xE0, b"JFIF")],
    "a Photoshop block cut short": [(0xED, b"Photoshop 3.0\x008BIM\x03\xed\x05")],
    "a multi-picture index that is none": [(0xE2, b"MPF\0nonsense")],
    "a comment that is no text": [(0xFE, b"\xff\xfe\0\x80")],
}


@pytest.mark.parametrize("segments", JPEG_SEGMENTS.values(), ids=JPEG_SEGMENTS)
def test_damaged_metadata_does_not_cost_a_jpeg(written, segments):
    assert is_red(written(jpeg_with(*segments), "a.jpg"))


def test_a_jpeg_read_without_its_metadata_keeps_its_orientation(written):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = written(jpeg_with((0xE1, exif.tobytes()), (0xE2, b"ICC_PROFILE\0")), "a.jpg")
    assert image_size(path) == (6, 4)
    assert read_image(path, 3).shape == (3, 6, 4)
    assert np.allclose(color(read_image(path, 3)), RED, atol=3)


def test_a_jpeg_of_ink_colors_read_without_its_metadata_keeps_its_colors(saved, written):
    content = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg").read_bytes()
    path = written(content[:2] + b"\xff\xe2\0\x0eICC_PROFILE\0" + content[2:], "b.jpg")
    assert np.allclose(color(read_image(path, 3)), RED, atol=5)


@pytest.mark.parametrize("chunk", [b"EXIF", b"XMP ", b"ICCP"])
def test_damaged_metadata_does_not_cost_a_webp(saved, written, chunk):
    options = {b"EXIF": "exif", b"XMP ": "xmp", b"ICCP": "icc_profile"}
    path = saved(Image.new("RGB", (6, 4), RED), "a.webp", lossless=True, **{options[chunk]: bytes(100)})
    content = path.read_bytes()
    place = content.index(chunk) + 8
    assert is_red(written(content[:place] + noise(100).tobytes() + content[place + 100 :], "b.webp"))


UNDONE = {  # the EXIF standard's meaning of row 0 and column 0, as numpy operations that store the upright image so
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("form", [*FORMATS, "bmp", "gif", "ppm"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_size_and_pixels_agree_for_every_orientation(saved, form, mode):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8], upright[:8, 24:], upright[8:, :8] = 200, 150, 100
    for orientation, store in UNDONE.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(np.ascontiguousarray(store(upright))).convert(mode)
        lossless = {"quality": 100} if form == "jpg" else {"lossless": True} if form == "webp" else {}
        options = {"exif": exif} if form in FORMATS else {}
        path = saved(stored, f"{orientation}.{form}", **lossless, **options)
        expected = upright if options else np.asarray(stored.convert("L"))
        for channels, at_least in ((1, None), (3, None), (3, 4)):
            read = read_image(path, channels, at_least=at_least)
            if at_least is None or form != "jpg":
                assert image_size(path) == tuple(read.shape[1:]) == expected.shape, orientation
                assert np.allclose(read.numpy(), expected, atol=3), orientation
            else:  # drawn smaller, never turned
                assert read.shape[1] < read.shape[2], orientation


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate", "packbits"])
def test_size_and_pixels_of_a_tiff_agree_for_every_orientation_and_compression(saved, compression):
    for orientation in UNDONE:
        image = Image.fromarray(noise(16, 48, 3))
        path = saved(image, f"{orientation}.tif", compression=compression, tiffinfo={274: orientation})
        expected = (48, 16) if orientation >= 5 else (16, 48)
        assert image_size(path) == tuple(read_image(path, 3).shape[1:]) == expected, orientation
