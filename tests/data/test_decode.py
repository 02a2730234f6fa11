import io
import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from sslvision.data.base import UnreadableImage
from sslvision.data.decode import from_pil, read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves an image and gives the path."""

    def save(image, name, **options):
        image.save(tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def written(tmp_path):
    """Return a function that writes bytes and gives the path."""

    def write(content, name="file.png"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def colour(tensor, row=0, column=0):
    return tuple(tensor[:, row, column].tolist())


# What is read


def test_rgb_is_read_as_it_is(saved):
    pixels = noise(5, 7, 3)
    image = read_image(saved(Image.fromarray(pixels), "a.png"), 3)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 5, 7)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_grey_is_read_as_it_is_or_repeated(saved):
    pixels = noise(5, 7)
    path = saved(Image.fromarray(pixels), "a.png")
    assert np.array_equal(read_image(path, 1).numpy(), pixels[None])
    assert np.array_equal(read_image(path, 3).numpy(), np.stack([pixels] * 3))


def test_colour_becomes_grey_by_its_luma(saved):
    image = Image.new("RGB", (3, 1))
    image.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
    assert read_image(saved(image, "a.png"), 1).flatten().tolist() == [76, 150, 29]  # .299, .587, .114 of 255


def test_the_pixels_can_be_written_to(saved):
    image = read_image(saved(Image.fromarray(noise(5, 7)), "a.png"), 3)
    image[0] = 9
    assert (image[0] == 9).all()
    assert not (image[1] == 9).all()


def test_transparency_is_composited_on_white(saved):
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 128)])
    read = read_image(saved(image, "a.png"), 3)
    assert colour(read, 0, 0) == RED
    assert colour(read, 0, 1) == WHITE
    assert colour(read, 0, 2) == (127, 127, 127)
    assert read_image(saved(image, "b.png"), 1)[0, 0].tolist() == [76, 255, 127]


def test_transparent_grey_is_composited_on_white(saved):
    image = Image.new("LA", (2, 1))
    image.putdata([(40, 255), (40, 0)])
    assert read_image(saved(image, "a.png"), 1).flatten().tolist() == [40, 255]


def test_a_premultiplied_image_is_composited_on_white():
    image = Image.new("LA", (1, 1), (40, 0)).convert("La")
    assert from_pil(image, 1).flatten().tolist() == [255]
    assert colour(from_pil(Image.new("RGBA", (1, 1), (0, 0, 0, 0)).convert("RGBa"), 3)) == WHITE


def test_a_palette_becomes_its_colours(saved):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putdata([0, 1])
    read = read_image(saved(image, "a.png"), 3)
    assert (colour(read, 0, 0), colour(read, 0, 1)) == (RED, (0, 0, 255))


def test_a_transparent_palette_entry_and_colour_key_become_white(saved):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putdata([0, 1])
    read = read_image(saved(image, "a.png", transparency=b"\xff\x00"), 3)
    assert (colour(read, 0, 0), colour(read, 0, 1)) == (RED, WHITE)
    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((1, 0), (1, 2, 3))
    read = read_image(saved(keyed, "b.png", transparency=(1, 2, 3)), 3)
    assert (colour(read, 0, 0), colour(read, 0, 1)) == (RED, WHITE)


def test_one_bit_becomes_black_and_white(saved):
    image = Image.new("1", (2, 1))
    image.putdata([0, 1])
    assert read_image(saved(image, "a.tif"), 1).flatten().tolist() == [0, 255]


def test_cmyk_becomes_the_colour_it_prints(saved):
    path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.tif")
    assert colour(read_image(path, 3)) == RED
    red, green, blue = colour(read_image(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg"), 3))
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_16_bit_grey_file_keeps_its_range(saved, name):
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    path = saved(Image.fromarray(values), name)
    assert read_image(path, 1).flatten().tolist() == [0, 0, 1, 1, 128, 255]  # value / 257, rounded
    assert read_image(path, 3).shape == (3, 1, 6)


def test_a_dark_16_bit_image_stays_dark(saved):
    assert read_image(saved(Image.fromarray(np.full((2, 2), 514, np.uint16)), "a.png"), 1).unique().tolist() == [2]


def test_big_endian_16_bit_tiff_is_read_like_little_endian(written):
    values = np.array([[0, 257, 65535]], ">u2")
    entries = [(256, 3, 1, 3), (257, 3, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 110), (277, 3, 1, 1), (278, 3, 1, 1)]
    directory = struct.pack(">H", len(entries))
    for tag, kind, count, value in entries:
        directory += struct.pack(">HHI", tag, kind, count)
        directory += struct.pack(">HH", value, 0) if kind == 3 else struct.pack(">I", value)
    content = b"MM\0*" + struct.pack(">I", 8) + directory + struct.pack(">I", 0)
    path = written(content.ljust(110, b"\0") + values.tobytes(), "a.tif")
    assert read_image(path, 1).flatten().tolist() == [0, 1, 255]


def test_32_bit_integers_within_16_bits_are_scaled_as_16_bits(saved):
    path = saved(Image.fromarray(np.array([[0, 257, 65535]], np.int32)), "a.tif")
    assert read_image(path, 1).flatten().tolist() == [0, 1, 255]


def test_integers_beyond_16_bits_are_stretched_from_least_to_greatest(saved):
    path = saved(Image.fromarray(np.array([[-100, 0, 155]], np.int32)), "a.tif")
    assert read_image(path, 1).flatten().tolist() == [0, 100, 255]
    path = saved(Image.fromarray(np.full((1, 2), 70_000, np.int32)), "b.tif")
    assert read_image(path, 1).flatten().tolist() == [0, 0]


def test_floats_from_0_to_1_fill_the_range_and_greater_ones_count_as_16_bits(saved):
    path = saved(Image.fromarray(np.array([[0, 0.5, 1]], np.float32)), "a.tif")
    assert read_image(path, 1).flatten().tolist() == [0, 128, 255]
    path = saved(Image.fromarray(np.array([[0, 257, 65535]], np.float32)), "b.tif")
    assert read_image(path, 1).flatten().tolist() == [0, 1, 255]
    path = saved(Image.fromarray(np.array([[0, 1.5]], np.float32)), "d.tif")
    assert read_image(path, 1).flatten().tolist() == [0, 0]
    path = saved(Image.fromarray(np.array([[-3e38, 0, 3e38]], np.float32)), "c.tif")
    assert read_image(path, 1).flatten().tolist() == [0, 128, 255]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_floats_that_are_no_numbers_are_refused(saved, value):
    path = saved(Image.fromarray(np.array([[0, value]], np.float32)), "a.tif")
    with pytest.raises(UnreadableImage, match="NaN or infinity"):
        read_image(path, 1)


def test_a_16_bit_colour_png_gives_its_high_bytes(written):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + struct.pack(">HHH", 0x1280, 0xFFFF, 0x00FF))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert colour(read_image(written(content), 3)) == (0x12, 0xFF, 0x00)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_undone(saved, orientation):
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :8], upright[:8, 24:], upright[8:, :8] = 200, 150, 100
    undo = {  # the EXIF standard's meaning of row 0 and column 0, as numpy operations that store the upright image so
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    read = read_image(saved(stored, "a.png", exif=exif), 1)
    assert np.array_equal(read[0].numpy(), upright)


def test_damaged_exif_does_not_cost_the_image(saved):
    path = saved(Image.new("RGB", (16, 16), WHITE), "a.png", exif=b"Exif\0\0nonsense")
    with Image.open(path) as image, pytest.raises(SyntaxError):
        image.getexif()
    assert colour(read_image(path, 3)) == WHITE


def test_a_gif_named_jpg_is_read_by_its_content(saved):
    path = saved(Image.new("RGB", (2, 2), RED), "a.jpg", format="GIF")
    assert colour(read_image(path, 3)) == RED


def test_the_first_page_of_several_is_read(saved):
    pages = [Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), WHITE)]
    assert colour(read_image(saved(pages[0], "a.tif", save_all=True, append_images=pages[1:]), 3)) == RED
    assert colour(read_image(saved(pages[0], "a.gif", save_all=True, append_images=pages[1:]), 3)) == RED


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.bmp", "a.tiff", "a.gif"])
def test_the_common_formats_are_read(saved, name):
    read = read_image(saved(Image.new("RGB", (16, 24), (10, 200, 30)), name), 3)
    assert read.shape == (3, 24, 16)
    assert np.allclose(colour(read), (10, 200, 30), atol=3)


# Other numbers of channels


def test_four_channels_are_the_bands_as_they_are(saved):
    pixels = noise(5, 7, 4)
    image = read_image(saved(Image.fromarray(pixels), "a.png"), 4)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_five_pages_of_grey_are_five_channels(saved):
    pages = [noise(5, 7, seed=page) for page in range(5)]
    images = [Image.fromarray(page) for page in pages]
    path = saved(images[0], "a.tif", save_all=True, append_images=images[1:])
    assert np.array_equal(read_image(path, 5).numpy(), np.stack(pages))


def test_sixteen_bit_pages_are_scaled_like_single_images(saved):
    images = [Image.fromarray(np.full((2, 2), 257 * page, np.uint16)) for page in range(6)]
    path = saved(images[0], "a.tif", save_all=True, append_images=images[1:])
    assert read_image(path, 6)[:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_another_number_of_channels_than_the_file_has_is_refused_with_what_it_has(saved):
    path = saved(Image.new("RGB", (4, 4)), "a.png")
    with pytest.raises(UnreadableImage, match=r"5 channels were asked for.* 1 page\(s\) of 3 band\(s\) \(RGB\)"):
        read_image(path, 5)


def test_several_pages_of_several_bands_are_refused(saved):
    pages = [Image.new("RGBA", (4, 4)), Image.new("RGBA", (4, 4))]
    with pytest.raises(UnreadableImage, match=r"2 page\(s\) of 4 band\(s\)"):
        read_image(saved(pages[0], "a.tif", save_all=True, append_images=pages[1:]), 4)


def test_pages_of_different_sizes_are_refused(saved):
    images = [Image.new("L", (4, 4)), Image.new("L", (5, 4))]
    path = saved(images[0], "a.tif", save_all=True, append_images=images[1:])
    with pytest.raises(UnreadableImage, match="different sizes"):
        read_image(path, 2)


# What cannot be read


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
    with pytest.raises(UnreadableImage, match="12000 x 9000 pixels, more than the limit of 100,000,000"):
        read_image(path, 3)


def test_a_bomb_beyond_pils_own_limit_is_refused_in_words(written):
    content = bytearray(png_bytes(Image.new("L", (1, 1))))
    content[16:24] = struct.pack(">II", 50_000, 50_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    with pytest.raises(UnreadableImage, match="too many pixels"):
        read_image(written(bytes(content)), 3, max_pixels=10**12)


def test_the_limit_of_pixels_can_be_set_and_counts_all_pages_read(saved):
    path = saved(Image.new("RGB", (20, 10)), "a.png")
    assert read_image(path, 3, max_pixels=200).shape == (3, 10, 20)
    with pytest.raises(UnreadableImage, match="20 x 10 pixels, more than the limit of 199"):
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
        assert colour(read_image(path, 3)) == RED
        assert warnings.filters == filters
    assert seen == []
    assert Image.MAX_IMAGE_PIXELS == 10
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


# Reduced decoding of JPEG


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [(None, (480, 640)), (300, (480, 640)), (240, (240, 320)), (61, (120, 160)), (8, (60, 80))],
)
def test_a_large_jpeg_is_decoded_no_smaller_than_needed(saved, at_least, expected):
    path = saved(Image.new("RGB", (640, 480), (10, 200, 30)), "a.jpg")
    read = read_image(path, 3, at_least=at_least)
    assert tuple(read.shape[1:]) == expected
    assert np.allclose(colour(read, 5, 5), (10, 200, 30), atol=3)


def test_other_formats_are_decoded_in_full_whatever_is_needed(saved):
    assert read_image(saved(Image.new("RGB", (640, 480)), "a.png"), 3, at_least=8).shape == (3, 480, 640)


# The shorter way of a colour JPEG


@pytest.fixture
def pixels_of():
    """Return a function that reads a file by PIL alone: its pixels, or None."""

    def read(path):
        try:
            with Image.open(path) as image:
                return from_pil(image, 3)
        except Exception:
            return None

    return read


def test_a_colour_jpeg_has_the_bytes_that_pil_gives_whatever_its_encoding(saved, pixels_of):
    image = Image.fromarray(noise(40, 60, 3)).resize((237, 119))
    for subsampling in (0, 1, 2):
        for options in ({}, {"progressive": True}, {"quality": 100}, {"quality": 20, "restart_marker_rows": 1}):
            path = saved(image, "a.jpg", subsampling=subsampling, **options)
            assert torch.equal(read_image(path, 3), pixels_of(path))


def test_a_damaged_jpeg_is_read_or_refused_as_pil_does(written, saved, pixels_of, capfd):
    rng = np.random.default_rng(0)
    content = saved(Image.fromarray(noise(30, 40, 3)).resize((90, 70)), "sound.jpg").read_bytes()
    outcomes = set()
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(2, len(content), rng.integers(1, 6)):
            damaged[place] ^= 1 << int(rng.integers(8))
        path = written(damaged[: len(damaged) if rng.random() < 0.8 else rng.integers(100, len(damaged))], "a.jpg")
        expected = pixels_of(path)
        outcomes.add(expected is None)
        if expected is None:
            with pytest.raises(UnreadableImage):
                read_image(path, 3)
        else:
            assert torch.equal(read_image(path, 3), expected)
    assert outcomes == {True, False}
    capfd.readouterr()  # libjpeg's own words


def test_what_torchvision_does_not_read_pil_does(saved, pixels_of, monkeypatch):
    def refuse(*_):
        raise RuntimeError("not supported")

    path = saved(Image.fromarray(noise(30, 40, 3)), "a.jpg")
    monkeypatch.setattr("sslvision.data.decode.decode_jpeg", refuse)
    assert torch.equal(read_image(path, 3), pixels_of(path))


def test_a_turned_jpeg_in_colour_is_put_upright(saved, pixels_of):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(Image.fromarray(noise(8, 16, 3)), "a.jpg", exif=exif)
    assert read_image(path, 3).shape == (3, 16, 8)
    assert torch.equal(read_image(path, 3), pixels_of(path))
