"""All 16 bits of a color PNG are read where imagecodecs is installed; where it is not, that only 8 are read is told."""

import importlib
import struct
import zlib

import numpy as np
import pytest
import torch

from sslvision.data import arrays
from sslvision.data.cache import cached
from sslvision.data.decode import image_size, read_header, read_image
from sslvision.data.eight_bits import ValueRange
from sslvision.data.source import UnreadableImage
from sslvision.data.sources.folder import open_folder

pytest.importorskip("imagecodecs")
TWELVE = ValueRange((0, 4095), (0, 4095))
TYPES = {2: 4, 3: 2, 4: 6}  # PNG's type of color by number of bands


def deep_png(pixels, *extra):
    """Return a PNG of (H, W, B) uint16, with more chunks before the pixels."""
    height, width, bands = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, TYPES[bands], 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def twelve_bits(bands=3, seed=0):
    return np.random.default_rng(seed).integers(0, 4096, (6, 9, bands)).astype(np.uint16)


def without_imagecodecs(monkeypatch):
    known = importlib.import_module

    def absent(name):
        if name == "imagecodecs":
            raise ImportError(name)
        return known(name)

    monkeypatch.setattr(arrays.importlib, "import_module", absent)


def test_color_of_16_bits_is_scaled_by_the_value_range_as_gray_is(written):
    pixels = twelve_bits()
    file = written(deep_png(pixels))
    image = read_image(file, 3, value_range=TWELVE)
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.rint(pixels / 4095 * 255).astype(np.uint8)))
    header = read_header(file, 3)
    assert (header.height, header.width, header.wide, header.high_bytes) == (6, 9, True, False)


def test_a_set_of_them_has_one_range_decided_from_a_sample(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(deep_png(twelve_bits(seed=number)))
    splits = open_folder(tmp_path, holdout=0)
    assert splits.train.value_range.integers == (0, 4095)
    assert "4 of 4 images looked at (100 %) have values of uint16" in splits.remarks[0]


def test_opacity_keeps_its_own_range_and_white_is_under_it(written):
    pixels = twelve_bits(4)
    pixels[..., 3] = 65535
    pixels[0, :, 3] = 0
    image = read_image(written(deep_png(pixels)), 3, value_range=TWELVE).permute(1, 2, 0).numpy()
    assert (image[0] == 255).all()
    assert np.abs(image[1:].astype(int) - np.rint(pixels[1:, :, :3] / 4095 * 255)).max() <= 1


def test_gray_with_opacity_and_gray_from_color_are_read(written):
    pixels = twelve_bits(2)
    pixels[..., 1] = 65535
    gray = read_image(written(deep_png(pixels)), 1, value_range=TWELVE)[0].numpy()
    assert np.abs(gray.astype(int) - np.rint(pixels[..., 0] / 4095 * 255)).max() <= 1
    assert read_image(written(deep_png(twelve_bits())), 1, value_range=TWELVE).shape == (1, 6, 9)


def test_its_bands_as_they_are_can_be_asked_for(written):
    assert read_image(written(deep_png(twelve_bits(4))), 4, value_range=TWELVE).shape == (4, 6, 9)
    with pytest.raises(UnreadableImage, match="5 channels were asked for"):
        read_image(written(deep_png(twelve_bits(4))), 5)


def test_orientation_and_oversized_metadata_do_no_harm(written):
    turned = b"Exif\0\0"[6:] + b"II*\0\x08\0\0\0\x01\0\x12\1\3\0\1\0\0\0\6\0\0\0\0\0\0\0"
    file = written(deep_png(twelve_bits(), (b"eXIf", turned), (b"iCCP", b"profile\0\0" + zlib.compress(bytes(9)) * 9)))
    assert image_size(file) == (9, 6)
    assert read_image(file, 3, value_range=TWELVE).shape == (3, 9, 6)


def test_a_cut_file_has_its_reason(written):
    file = written(deep_png(np.random.default_rng(0).integers(0, 65536, (90, 90, 3)).astype(np.uint16))[:9000])
    with pytest.raises(UnreadableImage, match="damaged or unsupported image data"):
        read_image(file, 3)


def test_without_the_package_8_bits_are_read_and_that_is_told_with_what_to_install(tmp_path, monkeypatch):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(deep_png(twelve_bits(seed=number)))
    without_imagecodecs(monkeypatch)
    splits = open_folder(tmp_path, holdout=0)
    assert splits.train.value_range is None
    assert torch.equal(splits.train.read(0)[0], torch.from_numpy((twelve_bits()[..., 0] >> 8).astype(np.uint8)))
    (remark,) = splits.remarks
    assert "16 bits per color, of which the upper 8 are used" in remark
    assert 'TIFF and PNG are read in full with pip install "sslvision[tiff]"' in remark


def test_a_cache_of_high_bytes_is_not_used_once_all_bits_are_read(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for number in range(4):
        (tmp_path / "photos" / f"{number}.png").write_bytes(deep_png(twelve_bits(seed=number)))

    def first_image():
        splits = open_folder(tmp_path / "photos", holdout=0, value_range=[0, 4095])
        return cached(splits, "disk", folder=tmp_path / "cache", workers=0).train.read(0).clone()

    with monkeypatch.context() as patched:
        without_imagecodecs(patched)
        before = first_image()
    assert not torch.equal(before, first_image())
