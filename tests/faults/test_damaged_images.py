"""One run over a folder in which every kind of file lies that people's folders hold (rows 13 to 20)."""

import csv
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sslvision.data.sources.folder import open_folder
from sslvision.errors import DataError

pytestmark = pytest.mark.faults

RED, BLUE = (200, 30, 40), (20, 40, 220)
# A batch is all 29 images, so that each is drawn.
SMALL = (
    *("data=folder", "data.channels=3", "data.workers=1", "data.follow_symlinks=false"),
    *("batch_size=29", "epochs=1", "warmup_epochs=0"),
)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bomb(width, height):
    """Return a PNG whose header says more than its few bytes hold."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    parts = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def flipped(content, place):
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


PHOTO = Image.fromarray(noise(48, 40, 3))
BAD = {  # name -> content, and a word of the reason
    "empty.jpg": (b"", "empty"),
    "garbage.png": (bytes(noise(3000)), "not an image"),
    "truncated.jpg": (encoded(PHOTO, "JPEG")[:1500], "truncated"),
    "flipped.png": (flipped(encoded(PHOTO, "PNG"), 3000), "damaged"),
    "bomb.png": (bomb(20_000, 20_000), "20000 x 20000 pixels"),
    "page.jpg": (b"<html>404 Not Found</html>", "not an image"),
}


def half_and_half():
    """Return 40 x 20 pixels, red above and blue below."""
    return Image.fromarray(np.repeat(np.array([[RED], [BLUE]], dtype=np.uint8), 20, axis=0).repeat(20, axis=1))


def odd_images():
    """Return files that have one defined conversion each: name -> (content, its pixel at (5, 5), shape)."""
    gray16 = Image.fromarray(np.full((20, 20), 40_000, dtype=np.uint16))
    sideways = Image.Exif()
    sideways[0x0112] = 6  # to be turned by 90 degrees clockwise
    see_through = Image.new("RGBA", (20, 20), (*RED, 128))
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, *BLUE])
    half_white = tuple(round((color * 128 + 255 * 127) / 255) for color in RED)
    return {
        "16bit.png": (encoded(gray16, "PNG"), (156, 156, 156), (20, 20)),  # 40,000 / 257
        "print.jpg": (
            encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", quality=95),
            (254, 0, 0),
            (20, 20),
        ),
        "see_through.png": (encoded(see_through, "PNG"), half_white, (20, 20)),
        "gray.png": (encoded(Image.new("L", (20, 20), 77), "PNG"), (77, 77, 77), (20, 20)),
        "palette.png": (encoded(palette, "PNG"), BLUE, (20, 20)),
        "sideways.png": (encoded(half_and_half(), "PNG", exif=sideways), BLUE, (20, 40)),
        "really_a_gif.jpg": (encoded(Image.new("RGB", (20, 20), BLUE).quantize(2), "GIF"), BLUE, (20, 20)),
        "thin.png": (encoded(Image.new("RGB", (4000, 1), RED), "PNG"), None, (1, 4000)),
        "animal.WEBP": (encoded(Image.new("RGB", (20, 20), BLUE), "WEBP", lossless=True), BLUE, (20, 20)),
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of two classes with good images, all of the above, and rubbish."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for name in ("cats", "dogs", "empty", ".thumbnails", "__MACOSX"):
        (root / "train" / name).mkdir(parents=True)
    (root / "val" / "cats").mkdir(parents=True)
    (root / "val" / "dogs").mkdir()
    for place in range(14):
        Image.fromarray(noise(40, 48, 3, seed=place)).save(
            root / "train" / ("cats", "dogs")[place % 2] / f"{place}.jpg"
        )
    for place in range(4):
        Image.fromarray(noise(40, 48, 3, seed=place)).save(root / "val" / ("cats", "dogs")[place % 2] / f"{place}.png")
    for name, (content, _) in BAD.items():
        (root / "train" / "cats" / name).write_bytes(content)
        (root / "val" / "dogs" / name).write_bytes(content)
    for name, (content, *_) in odd_images().items():
        (root / "train" / "dogs" / name).write_bytes(content)
    for rubbish in ("cats/._0.jpg", ".thumbnails/1.jpg", "__MACOSX/2.jpg", "dogs/Thumbs.db", "dogs/notes.txt"):
        (root / "train" / rubbish).write_bytes(b"rubbish")
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    PHOTO.save(elsewhere / "secret.jpg")
    (root / "train" / "cats" / "link.jpg").symlink_to(elsewhere / "secret.jpg")
    return root


@pytest.fixture(scope="module")
def finished(photos, run_tiny, tmp_path_factory):
    """The folder of a run over all of them, and its results."""
    folder = tmp_path_factory.mktemp("runs") / "all"
    results = run_tiny(folder, *SMALL, f"data.root={photos}", "data.max_unreadable=0.5")
    return folder, results


def test_the_run_ends_and_names_every_image_that_cannot_be_read(photos, finished):
    folder, results = finished
    with open(folder / "unreadable.csv", newline="") as file:
        named = {os.path.basename(row["image"]): row["reason"] for row in csv.DictReader(file)}
    assert named.keys() == BAD.keys()
    for name, (_, word) in BAD.items():
        assert word in named[name]
    assert f"{len(BAD)} of 29 images cannot be read" in " ".join(results["findings"])
    assert "60 % of the held-out images cannot be read: scores are those of the others." in results["findings"]
    assert json.loads((folder / "results.json").read_text())["findings"] == results["findings"]
    assert 0 < results["loss"] < 10


def test_more_of_them_than_the_budget_end_the_run_with_exit_code_3(photos, run_tiny, tmp_path):
    with pytest.raises(DataError, match=r"more than data.max_unreadable=0.05 of them: repair or remove") as caught:
        run_tiny(tmp_path / "run", *SMALL, f"data.root={photos}", "data.max_unreadable=0.05")
    assert caught.value.exit_code == 3
    assert (tmp_path / "run" / "unreadable.csv").read_text().count("\n") > 1, "those that were met are named"


@pytest.mark.parametrize("name", odd_images())
def test_every_odd_image_has_the_pixels_of_its_defined_conversion(photos, name):
    _, pixel, (height, width) = odd_images()[name]
    source = open_folder(photos).train
    image = next(source.read(place) for place in range(len(source)) if source.describe(place).endswith(f"/{name}"))
    assert image.shape == (3, height, width)
    assert pixel is None or image[:, 5, 5].tolist() == pytest.approx(pixel, abs=1)


def test_rubbish_makes_no_classes_and_is_reported(photos, finished):
    train, *_, remarks = open_folder(photos, follow_symlinks=False)
    assert train.classes == ("cats", "dogs")
    assert len(train) == 14 + len(BAD) + len(odd_images())
    said = " ".join(remarks)
    for word in (
        "1 .db",
        "1 .txt",
        "links that lead outside the folder, as data.follow_symlinks=false asks (1): train/cats/link.jpg.",
        "hidden images and folders, whose names begin with a dot (1): train/.thumbnails.",
        "are ignored: empty",
    ):
        assert word in said
    assert finished[1]["findings"][: len(remarks)] == [*remarks]


def test_a_link_out_of_the_folder_is_trained_on_unless_refused(photos):
    links = [
        [place for place in range(len(source)) if source.describe(place).endswith("link.jpg")]
        for source in (open_folder(photos, follow_symlinks=False).train, open_folder(photos).train)
    ]
    assert links[0] == []
    assert len(links[1]) == 1


def test_held_out_images_that_cannot_be_read_leave_the_scores_of_the_others(finished):
    _, results = finished
    assert {results[f"{which}knn_top1"] * 4 % 100 for which in ("", "untrained_", "pixels_")} == {0}  # of four images


def test_held_out_images_none_of_which_can_be_read_are_told_so_after_the_export(photos, run_tiny, tmp_path):
    for split in ("train", "val"):
        for place in range(4):
            file = tmp_path / "photos" / split / ("cats", "dogs")[place % 2] / f"{place}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PHOTO.save(file) if split == "train" else file.write_bytes(b"rubbish")
    words = [word for word in SMALL if not word.startswith(("batch_size", "epochs"))]
    with pytest.raises(DataError, match="None of the test images can be read: photos"):
        run_tiny(tmp_path / "run", *words, "epochs=2", "batch_size=4", f"data.root={tmp_path / 'photos'}")
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file(), "training was not for nothing"
