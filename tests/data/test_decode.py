"""The pixels that each kind of file has, in 1, 3 or more channels."""

import struct

import numpy as np
import pytest
import torch
from image_files import RED, WHITE, color, noise
from PIL import Image

from sslvision.data.decode import from_pil, read_image
from sslvision.data.source import UnreadableImage


def test_rgb_is_read_as_it_is(saved):
    pixels = noise(5, 7, 3)
    image = read_image(saved(Image.fromarray(pixels), "a.png"), 3)
    assert image.dtype == torch.uint8
    assert image.shape == (3, 5, 7)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_gray_is_read_as_it_is_or_repeated(saved):
    pixels = noise(5, 7)
    path = saved(Image.fromarray(pixels), "a.png")
    assert np.array_equal(read_image(path, 1).numpy(), pixels[None])
    assert np.array_equal(read_image(path, 3).numpy(), np.stack([pixels] * 3))


def test_color_becomes_gray_by_its_luma(saved):
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
    assert color(read, 0, 0) == RED
    assert color(read, 0, 1) == WHITE
    assert color(read, 0, 2) == (127, 127, 127)
    assert read_image(saved(image, "b.png"), 1)[0, 0].tolist() == [76, 255, 127]


def test_transparent_gray_is_composited_on_white(saved):
    image = Image.new("LA", (2, 1))
    image.putdata([(40, 255), (40, 0)])
    assert read_image(saved(image, "a.png"), 1).flatten().tolist() == [40, 255]


def test_a_premultiplied_image_is_composited_on_white():
    image = Image.new("LA", (1, 1), (40, 0)).convert("La")
    assert from_pil(image, 1).flatten().tolist() == [255]
    assert color(from_pil(Image.new("RGBA", (1, 1), (0, 0, 0, 0)).convert("RGBa"), 3)) == WHITE


def test_a_palette_becomes_its_colors(saved):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putdata([0, 1])
    read = read_image(saved(image, "a.png"), 3)
    assert (color(read, 0, 0), color(read, 0, 1)) == (RED, (0, 0, 255))


def test_a_transparent_palette_entry_and_color_key_become_white(saved):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 255])
    image.putdata([0, 1])
    read = read_image(saved(image, "a.png", transparency=b"\xff\x00"), 3)
    assert (color(read, 0, 0), color(read, 0, 1)) == (RED, WHITE)
    keyed = Image.new("RGB", (2, 1), RED)
    keyed.putpixel((1, 0), (1, 2, 3))
    read = read_image(saved(keyed, "b.png", transparency=(1, 2, 3)), 3)
    assert (color(read, 0, 0), color(read, 0, 1)) == (RED, WHITE)


def test_one_bit_becomes_black_and_white(saved):
    image = Image.new("1", (2, 1))
    image.putdata([0, 1])
    assert read_image(saved(image, "a.tif"), 1).flatten().tolist() == [0, 255]


def test_cmyk_becomes_the_color_it_prints(saved):
    path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.tif")
    assert color(read_image(path, 3)) == RED
    red, green, blue = color(read_image(saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg"), 3))
    assert red > 250
    assert green < 5
    assert blue < 5


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_a_16_bit_gray_file_keeps_its_range(saved, name):
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
    assert color(read_image(path, 3)) == WHITE


def test_a_gif_named_jpg_is_read_by_its_content(saved):
    path = saved(Image.new("RGB", (2, 2), RED), "a.jpg", format="GIF")
    assert color(read_image(path, 3)) == RED


def test_the_first_page_of_several_is_read(saved):
    pages = [Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), WHITE)]
    assert color(read_image(saved(pages[0], "a.tif", save_all=True, append_images=pages[1:]), 3)) == RED
    assert color(read_image(saved(pages[0], "a.gif", save_all=True, append_images=pages[1:]), 3)) == RED


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.bmp", "a.tiff", "a.gif"])
def test_the_common_formats_are_read(saved, name):
    read = read_image(saved(Image.new("RGB", (16, 24), (10, 200, 30)), name), 3)
    assert read.shape == (3, 24, 16)
    assert np.allclose(color(read), (10, 200, 30), atol=3)


# Other numbers of channels


def test_four_channels_are_the_bands_as_they_are(saved):
    pixels = noise(5, 7, 4)
    image = read_image(saved(Image.fromarray(pixels), "a.png"), 4)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_five_pages_of_gray_are_five_channels(saved):
    pages = [noise(5, 7, seed=page) for page in range(5)]
    images = [Image.fromarray(page) for page in pages]
    path = saved(images[0], "a.tif", save_all=True, append_images=images[1:])
    assert np.array_equal(read_image(path, 5).numpy(), np.stack(pages))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16, np.float32])
def test_three_pages_of_gray_are_three_channels(saved, depth):
    scale = {np.uint8: 1, np.uint16: 257, np.float32: 1 / 255}[depth]
    images = [Image.fromarray((np.full((4, 6), page) * scale).astype(depth)) for page in (10, 20, 30)]
    path = saved(images[0], "a.tif", save_all=True, append_images=images[1:])
    assert read_image(path, 3)[:, 0, 0].tolist() == [10, 20, 30]
    assert read_image(path, 1).flatten().unique().tolist() == [10]


def test_three_frames_of_an_animation_and_three_pages_that_do_not_fit_together_are_no_channels(saved):
    gray = [Image.new("L", (4, 4), value) for value in (10, 20, 30)]
    animation = saved(gray[0], "a.gif", save_all=True, append_images=gray[1:])
    assert read_image(animation, 3)[:, 0, 0].tolist() == [10, 10, 10]
    previews = [gray[0], *(image.resize((2, 2)) for image in gray[1:])]
    path = saved(previews[0], "a.tif", save_all=True, append_images=previews[1:])
    assert read_image(path, 3)[:, 0, 0].tolist() == [10, 10, 10]
    colored = [Image.new("RGB", (4, 4), RED), *gray[1:]]
    path = saved(colored[0], "b.tif", save_all=True, append_images=colored[1:])
    assert color(read_image(path, 3)) == RED


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
