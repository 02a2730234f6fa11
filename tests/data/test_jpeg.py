"""JPEGs: decoded smaller where that will do, and in color by a shorter way to the bytes that PIL gives."""

import numpy as np
import pytest
import torch
from image_files import color, noise
from PIL import Image

from sslvision.data.decode import from_pil, read_image
from sslvision.data.source import UnreadableImage


@pytest.mark.parametrize(
    ("at_least", "expected"),
    [(None, (480, 640)), (300, (480, 640)), (240, (240, 320)), (61, (120, 160)), (8, (60, 80))],
)
def test_a_large_jpeg_is_decoded_no_smaller_than_needed(saved, at_least, expected):
    path = saved(Image.new("RGB", (640, 480), (10, 200, 30)), "a.jpg")
    read = read_image(path, 3, at_least=at_least)
    assert tuple(read.shape[1:]) == expected
    assert np.allclose(color(read, 5, 5), (10, 200, 30), atol=3)


def test_other_formats_are_decoded_in_full_whatever_is_needed(saved):
    assert read_image(saved(Image.new("RGB", (640, 480)), "a.png"), 3, at_least=8).shape == (3, 480, 640)


# The shorter way of a color JPEG


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


def test_a_color_jpeg_has_the_bytes_that_pil_gives_whatever_its_encoding(saved, pixels_of):
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


def test_a_turned_jpeg_in_color_is_put_upright(saved, pixels_of):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(Image.fromarray(noise(8, 16, 3)), "a.jpg", exif=exif)
    assert read_image(path, 3).shape == (3, 16, 8)
    assert torch.equal(read_image(path, 3), pixels_of(path))
