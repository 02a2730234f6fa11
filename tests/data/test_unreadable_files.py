"""What cannot be read is refused in words, and nothing else happens."""

import io
import os
import pickle
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from image_files import RED, color, noise, png_bytes
from PIL import Image, ImageFile

from sslvision.data.decode import image_size, read_image
from sslvision.data.source import UnreadableImage


def test_an_empty_file_is_named_as_such(written):
    with pytest.raises(UnreadableImage, match="the file is empty"):
        read_image(written(b""), 3)


def test_garbage_is_named_as_no_known_format(written):
    with pytest.raises(UnreadableImage, match="not an image in a known format"):
        read_image(written(noise(1000).tobytes()), 3)


def test_a_file_for_another_program_is_never_handed_to_it(written):
    with pytest.raises(UnreadableImage, match="not an image in a known format"):
        read_image(written(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a.png"), 3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_unreadable_and_says_why(written, kind, share):
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(buffer, kind)
    content = buffer.getvalue()
    with pytest.raises(UnreadableImage) as caught:
        read_image(written(content[: int(share * len(content))]), 3)
    assert 10 < len(str(caught.value)) < 250


def test_no_flipped_byte_of_a_png_gives_other_pixels(written):
    pixels = noise(16, 16, 3)
    content = png_bytes(Image.fromarray(pixels))
    refused = 0
    for place in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        try:
            read = read_image(written(bytes(damaged)), 3)
        except UnreadableImage:
            refused += 1
        else:
            assert np.array_equal(read.permute(1, 2, 0).numpy(), pixels)
    assert refused > 0.9 * len(range(0, len(content), 5))


def test_random_damage_to_any_format_never_raises_anything_else(written):
    rng = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM"):
        buffer = io.BytesIO()
        Image.fromarray(noise(24, 24, 3)).save(buffer, kind)
        for _ in range(60):
            damaged = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            damaged[rng.integers(0, min(len(damaged), 400), 3)] = rng.integers(0, 256, 3)
            try:
                read = read_image(written(damaged.tobytes()), 3, max_pixels=1_000_000)
            except UnreadableImage:
                continue
            assert read.shape[0] == 3


def test_a_decompression_bomb_is_refused_by_its_header(written, monkeypatch):
    content = bytearray(png_bytes(Image.new("L", (1, 1))))
    content[16:24] = struct.pack(">II", 12_000, 9_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path = written(bytes(content))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("the pixels were decoded"))
    with pytest.raises(UnreadableImage, match=r"12000 x 9000 pixels, more than the limit data\.max_pixels=100000000"):
        read_image(path, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.gif", "a.webp", "a.jpg", "a.bmp", "a.ppm"])
def test_the_setting_alone_decides_which_images_are_too_large(saved, name, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # PIL refuses what has more than twice as many
    path = saved(Image.new("RGB", (20, 10), RED), name)
    assert read_image(path, 3, max_pixels=200).shape == (3, 10, 20)
    assert image_size(path, max_pixels=200) == (10, 20)
    for read in (lambda: read_image(path, 3, max_pixels=199), lambda: image_size(path, max_pixels=199)):
        with pytest.raises(UnreadableImage, match=r"^20 x 10 pixels, more than the limit data.max_pixels=199$"):
            read()
    assert Image.MAX_IMAGE_PIXELS == 50
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)


def test_pils_limit_is_put_back_when_the_last_of_several_threads_is_done(saved, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    path = saved(Image.new("RGB", (20, 10), RED), "a.png")
    with ThreadPoolExecutor(4) as threads:
        shapes = list(threads.map(lambda _: read_image(path, 3).shape, range(100)))
    assert set(shapes) == {(3, 10, 20)}
    assert Image.MAX_IMAGE_PIXELS == 50


def test_the_limit_of_pixels_can_be_set_and_counts_all_pages_read(saved):
    path = saved(Image.new("RGB", (20, 10)), "a.png")
    assert read_image(path, 3, max_pixels=200).shape == (3, 10, 20)
    with pytest.raises(UnreadableImage, match=r"20 x 10 pixels, more than the limit data\.max_pixels=199"):
        read_image(path, 3, max_pixels=199)
    pages = [Image.new("L", (20, 10))] * 4
    path = saved(pages[0], "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(UnreadableImage, match="on each of 4 pages"):
        read_image(path, 4, max_pixels=799)
    assert read_image(path, 4, max_pixels=800).shape == (4, 10, 20)


def test_a_vanished_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(UnreadableImage, match="the file is gone"):
        read_image(tmp_path / "none.png", 3)
    with pytest.raises(UnreadableImage, match="directory"):
        read_image(tmp_path, 3)


def test_a_file_without_permission_is_named(saved, monkeypatch):
    path = saved(Image.new("L", (2, 2)), "a.png")
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UnreadableImage, match="no permission"):
        read_image(path, 3)


def test_running_out_of_memory_is_a_reason(saved, monkeypatch):
    path = saved(Image.new("L", (2, 2)), "a.png")

    def fail(self):
        raise MemoryError

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(UnreadableImage, match="not enough memory"):
        read_image(path, 3)


def test_the_reason_survives_the_way_from_a_worker(written):
    with pytest.raises(UnreadableImage) as caught:
        read_image(written(b""), 3)
    assert str(pickle.loads(pickle.dumps(caught.value))) == "the file is empty"


def test_pils_warnings_are_dropped_and_its_settings_left_alone(saved, monkeypatch):
    path = saved(Image.new("RGB", (4, 4), RED), "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(path).close()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        assert color(read_image(path, 3)) == RED
        assert warnings.filters == filters
    assert seen == []
    assert Image.MAX_IMAGE_PIXELS == 10
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
