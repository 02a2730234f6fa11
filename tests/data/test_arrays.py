"""Arrays, and TIFF with any number of bands and any type of numbers: the right pixels, or the real reason."""

import io
import zipfile

import numpy as np
import pytest
from image_files import noise
from PIL import Image

from sslvision.data import arrays
from sslvision.data.decode import image_size, read_header, read_image
from sslvision.data.eight_bits import ValueRange
from sslvision.data.source import UnreadableImage


def stored(tmp_path, array, name="a.npy", **options):
    path = tmp_path / name
    if name.endswith(".npy"):
        np.save(path, array, **options)
    else:
        np.savez(path, array, **options)
    return path


SHAPES = {  # shape of the array and channels -> how (C, H, W) is made of it
    "gray": ((5, 7), 1, lambda a: a[None]),
    "gray, repeated": ((5, 7), 3, lambda a: np.stack([a] * 3)),
    "gray with an axis at the end": ((5, 7, 1), 1, lambda a: a.transpose(2, 0, 1)),
    "gray with an axis in front": ((1, 5, 7), 1, lambda a: a),
    "gray with an axis, repeated": ((1, 5, 7), 3, lambda a: np.concatenate([a] * 3)),
    "color, bands last": ((5, 7, 3), 3, lambda a: a.transpose(2, 0, 1)),
    "color, bands first": ((3, 5, 7), 3, lambda a: a),
    "five bands first": ((5, 8, 7), 5, lambda a: a),
    "five bands last": ((8, 7, 5), 5, lambda a: a.transpose(2, 0, 1)),
    "two bands": ((8, 7, 2), 2, lambda a: a.transpose(2, 0, 1)),
}


@pytest.mark.parametrize(("shape", "channels", "expected"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_an_array_is_read_with_its_bands_first_or_last(tmp_path, shape, channels, expected, name):
    array = noise(*shape)
    path = stored(tmp_path, array, name)
    read = read_image(path, channels)
    assert np.array_equal(read.numpy(), expected(array))
    assert image_size(path, channels) == tuple(read.shape[1:])


def test_color_in_an_array_becomes_gray_as_in_an_image(tmp_path, saved):
    array = noise(5, 7, 3)
    assert np.array_equal(
        read_image(stored(tmp_path, array), 1).numpy(), read_image(saved(Image.fromarray(array), "a.png"), 1).numpy()
    )


@pytest.mark.parametrize("dtype", [">u2", "<u2", "u4", "i2", "i8", "f2", "f4", ">f8", "?", "i1"])
def test_numbers_of_every_type_are_scaled_by_the_range(tmp_path, dtype):
    low, high = (0, 1) if dtype == "?" else (0, 100)
    path = stored(tmp_path, np.array([[low, high]]).astype(dtype))
    assert read_image(path, 1, value_range=ValueRange((0, 100), (0, 100))).flatten().tolist() == [0, 255]
    path = stored(tmp_path, np.asfortranarray(np.array([[low, high], [high, low]]).astype(dtype)))
    assert read_image(path, 1, value_range=ValueRange((0, 100), (0, 100))).flatten().tolist() == [0, 255, 255, 0]


def test_what_is_no_image_in_an_array_is_refused_with_the_reason(tmp_path):
    refused = {
        r"Python objects \(a pickle\)": np.array([[{}]], dtype=object),
        r"type complex128": np.zeros((4, 4), complex),
        r"type <U1": np.array([["a"]]),
        r"shape is \(0, 4\)": np.zeros((0, 4)),
        r"shape \(9,\), and data\.channels=3 needs \(H, W\)": np.zeros(9),
        r"shape \(2, 3, 4, 5\)": np.zeros((2, 3, 4, 5)),
        r"shape \(40, 50, 4\), and data\.channels=3 needs .*: data\.channels=4 data\.normalize=computed reads it": np.zeros(
            (40, 50, 4)
        ),
        r"shape \(3, 7, 3\) may be \(C, H, W\) or \(H, W, C\)": np.zeros((3, 7, 3)),
        r"NaN or infinity": np.array([[np.nan, 1]]),
    }
    for reason, array in refused.items():
        with pytest.raises(UnreadableImage, match=reason):
            read_image(stored(tmp_path, array), 3)


def test_several_arrays_no_array_and_cut_files_are_refused(tmp_path, written):
    np.savez(tmp_path / "two.npz", image=np.zeros((4, 4)), mask=np.zeros((4, 4)))
    with pytest.raises(UnreadableImage, match=r"must hold one array, and this has 2: image, mask"):
        read_image(tmp_path / "two.npz", 1)
    with zipfile.ZipFile(tmp_path / "none.npz", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    with pytest.raises(UnreadableImage, match=r"must hold one array, and this has 0"):
        read_image(tmp_path / "none.npz", 1)
    content = stored(tmp_path, noise(40, 40)).read_bytes()
    for length in (7, 20, 200):
        with pytest.raises(UnreadableImage):
            read_image(written(content[:length], "b.npy"), 1)


def test_an_array_with_too_many_pixels_is_refused_by_its_header(tmp_path, written):
    for name in ("a.npy", "a.npz"):
        with pytest.raises(UnreadableImage, match=r"7 x 5 pixels, more than the limit data\.max_pixels=34"):
            read_image(stored(tmp_path, noise(5, 7), name), 1, max_pixels=34)
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (200_000, 200_000)})
    with pytest.raises(UnreadableImage, match=r"200000 x 200000 pixels"):
        read_image(written(buffer.getvalue(), "b.npy"), 1)


# TIFF


@pytest.fixture
def tiff(tmp_path):
    """Return a function that writes an array as a TIFF and gives the path."""
    tifffile = pytest.importorskip("tifffile")

    def write(array, **options):
        tifffile.imwrite(tmp_path / "a.tif", array, **options)
        return tmp_path / "a.tif"

    return write


TYPES = ["u1", "u2", ">u2", "i2", "u4", "i4", "f2", "f4", "f8", "i1"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("planar", ["contig", "separate", "pages"])
def test_a_tiff_of_any_number_of_bands_type_and_order_is_read(tiff, dtype, bands, planar):
    values = noise(bands, 8, 10) // 3  # (C, H, W), within every type
    stack = values.astype(dtype)
    array = stack.transpose(1, 2, 0) if planar == "contig" else stack
    order = {"photometric": "minisblack"} | ({} if planar == "pages" or bands == 1 else {"planarconfig": planar})
    order |= {"byteorder": ">"} if dtype.startswith(">") else {}
    path = tiff(np.ascontiguousarray(stack[0] if bands == 1 else array), **order)
    read = read_image(path, bands, value_range=ValueRange((0, 255), (0, 255)))
    assert np.array_equal(read.numpy(), values)
    assert image_size(path, bands) == (8, 10)
    assert read_header(path, bands).wide == (dtype != "u1")


@pytest.mark.parametrize("dtype", ["u2", "f4"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_color_of_more_than_8_bits_keeps_its_values(tiff, dtype, planar):
    values = noise(8, 10, 3)
    array = values if planar == "contig" else np.ascontiguousarray(values.transpose(2, 0, 1))
    path = tiff(array.astype(dtype), photometric="rgb", planarconfig=planar)
    read = read_image(path, 3, value_range=ValueRange((0, 255), (0, 255)))
    assert np.array_equal(read.permute(1, 2, 0).numpy(), values)
    gray = read_image(path, 1, value_range=ValueRange((0, 255), (0, 255)))
    assert np.array_equal(gray[0].numpy(), np.asarray(Image.fromarray(values).convert("L")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_holds_for_what_pil_does_not_read(tiff, orientation):
    values = noise(8, 10, 5)
    extra = [(274, "H", 1, orientation, True)]
    path = tiff(values, photometric="minisblack", planarconfig="contig", extratags=extra)
    read = read_image(path, 5)
    assert image_size(path, 5) == tuple(read.shape[1:]) == ((10, 8) if orientation >= 5 else (8, 10))
    with Image.open(tiff(values[..., 0], extratags=extra)) as image:
        image.load()
        first = read_image(image.filename, 1)
    assert np.array_equal(read[0].numpy(), first[0].numpy())


def test_deep_color_with_opacity_is_composited_on_white(tiff):
    values = np.full((4, 4, 4), 65535, np.uint16)
    values[:2, :, :3], values[:2, :, 3] = 0, 0  # black, but transparent
    values[2, :, :3] = 0
    path = tiff(values, photometric="rgb", extrasamples=["unassalpha"])
    assert read_image(path, 3)[0, :, 0].tolist() == [255, 255, 0, 255]
    assert read_image(path, 1)[0, :, 0].tolist() == [255, 255, 0, 255]


@pytest.mark.parametrize("compression", ["zlib", "lzw", "zstd", "lerc", "jpeg2000", "jpegxl", "packbits"])
def test_compressed_bands_are_read(tiff, compression):
    pytest.importorskip("imagecodecs")
    values = noise(40, 50, 5).astype(np.uint16)
    path = tiff(values, photometric="minisblack", planarconfig="contig", compression=compression)
    read = read_image(path, 5, value_range=ValueRange((0, 255), (0, 255)))
    assert np.array_equal(read.permute(1, 2, 0).numpy(), values)


def test_bands_and_pages_that_do_not_fit_are_refused_with_what_to_set(tiff):
    path = tiff(noise(8, 10, 5).astype(np.uint16), photometric="minisblack", planarconfig="contig")
    with pytest.raises(
        UnreadableImage,
        match=r"1 page\(s\) of 5 band\(s\) of uint16: data\.channels=5 data\.normalize=computed reads them",
    ):
        read_image(path, 3)
    path = tiff(noise(7, 8, 10).astype(np.float64), photometric="minisblack")
    with pytest.raises(
        UnreadableImage,
        match=r"7 page\(s\) of 1 band\(s\) of float64: data\.channels=7 data\.normalize=computed reads them",
    ):
        read_image(path, 4)
    assert read_header(path, 1).unused_pages == 6


def test_a_cut_or_damaged_tiff_is_refused(tiff, written):
    content = tiff(noise(80, 100, 5).astype(np.uint16), photometric="minisblack", planarconfig="contig").read_bytes()
    for length in (len(content) // 2, len(content) - 10, 300, 60, 9):
        with pytest.raises(UnreadableImage):
            read_image(written(content[:length], "b.tif"), 5)
    with pytest.raises(UnreadableImage, match="damaged"):
        read_image(written(b"II*\0\xff\xff\0\0" + bytes(100), "c.tif"), 5)


def test_a_tiff_with_too_many_pixels_is_refused_by_its_header(tiff):
    path = tiff(noise(8, 10, 5), photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableImage, match=r"10 x 8 pixels, more than the limit data\.max_pixels=79"):
        read_image(path, 5, max_pixels=79)
    path = tiff(noise(6, 8, 10).astype(np.float64), photometric="minisblack")
    with pytest.raises(UnreadableImage, match=r"10 x 8 pixels on each of 6 pages"):
        read_image(path, 6, max_pixels=479)


def test_without_tifffile_the_message_says_how_to_install_it(tiff, monkeypatch):
    five = tiff(noise(8, 10, 5).astype(np.uint16), photometric="minisblack", planarconfig="contig")
    monkeypatch.setattr(arrays, "_imported", lambda: None)
    with pytest.raises(UnreadableImage, match=r'5 band\(s\) of 16-bit unsigned.*pip install "sslvision\[tiff\]"'):
        read_image(five, 5)
    with pytest.raises(UnreadableImage, match=r"1 band\(s\) of 16-bit floats"):
        read_image(tiff(noise(8, 10).astype(np.float16)), 1)
    color = tiff(noise(8, 10, 3).astype(np.uint16) * 256, photometric="rgb")
    assert read_image(color, 3).shape == (3, 8, 10)
    assert read_header(color, 3).high_bytes


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"%PDF-1.7\n", "a PDF document"),
        (b"<!DOCTYPE html><html>", "HTML, SVG or other text"),
        (b"\x1f\x8b\x08\0", "compressed by gzip"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x89PNG\r\n\x1a\nnothing", "a PNG with a damaged header"),
        (b"\xff\xd8\xff\xe0", "a JPEG with a damaged header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"GIF89a", "a GIF with a damaged header"),
    ],
)
def test_a_file_that_is_no_image_is_named_by_what_it_is(written, content, what):
    with pytest.raises(UnreadableImage, match=what):
        read_image(written(content), 3)
