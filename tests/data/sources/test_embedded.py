import gzip
import hashlib
import pickle
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sslvision.data.sources.embedded import CLASSES, FILE, open_embedded
from sslvision.errors import UsageError

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_embedded_data.py"


@pytest.fixture(scope="module")
def splits():
    return open_embedded()


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def idx_folder(tmp_path):
    """Two splits of three classes in the order 2, 1, 0, 2, 1, 0, ...; the first pixel is the image's place."""
    for stem, count in (("train", 15), ("t10k", 9)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 0, 0] = np.arange(count)
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte.gz", (2 - np.arange(count) % 3).astype(np.uint8))
    return tmp_path


def test_the_embedded_images_are_ten_thousand_and_two_thousand_of_32_by_32(splits):
    assert splits.train.images.shape == (10_000, 1, 32, 32)
    assert splits.test.images.shape == (2_000, 1, 32, 32)
    assert splits.train.images.dtype == torch.uint8
    assert (len(splits.train), len(splits.test)) == (10_000, 2_000)
    assert splits.train.name == splits.test.name == "embedded (Fashion-MNIST, 10,000 + 2,000)"


def test_the_embedded_classes_are_balanced_and_named(splits):
    assert splits.train.labels.dtype == torch.int64
    assert splits.train.labels.bincount().tolist() == [1000] * 10
    assert splits.test.labels.bincount().tolist() == [200] * 10
    assert splits.train.classes == splits.test.classes == CLASSES
    assert len(set(CLASSES)) == 10


def test_the_embedded_pixels_are_the_authors(splits):
    def digest(tensor):
        return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()[:16]

    assert digest(splits.train.images) == "b30e5bef23c32c28"  # compared with the authors' files when they were made
    assert digest(splits.train.labels) == "edb5c24bb179a655"
    assert digest(splits.test.images) == "1379bb830e016a3e"
    assert digest(splits.test.labels) == "677b67be3a6866e8"


def test_the_padding_is_two_rows_of_zeros_all_around(splits):
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[2:-2, 2:-2] = False
    assert splits.train.images[..., frame].max() == 0
    assert splits.train.images[:, 0, 2:-2, 2:-2].amax(0).min() > 0  # no further row or column is empty throughout


def test_three_channels_repeat_the_gray(splits):
    colored = open_embedded(channels=3).test
    assert colored.channels == 3
    assert torch.equal(colored.images, splits.test.images.expand(-1, 3, -1, -1))


def test_two_channels_are_a_usage_error():
    with pytest.raises(UsageError, match=r"data\.channels must be 1, or 3"):
        open_embedded(channels=2)


def test_reading_one_image_gives_that_image_and_its_place_in_words(splits):
    assert torch.equal(splits.test.read(7), splits.test.images[7])
    assert splits.test.describe(7) == "embedded (Fashion-MNIST, 10,000 + 2,000), test image 7"


def test_the_embedded_source_survives_pickling(splits):
    copy = pickle.loads(pickle.dumps(splits.test))
    assert torch.equal(copy.images, splits.test.images)
    assert copy.classes == splits.test.classes


def test_the_embedded_file_is_at_most_six_megabytes_and_its_license_is_beside_it():
    assert FILE.stat().st_size <= 6_000_000
    assert "2017 Zalando SE" in FILE.with_name("NOTICE").read_text(encoding="utf-8")


def test_the_script_keeps_the_first_images_of_each_class_in_the_authors_order(idx_folder, monkeypatch):
    target = idx_folder / "made.npz"
    run_script(monkeypatch, "--source", idx_folder, "--target", target, "--train-per-class", 2, "--test-per-class", 1)
    with np.load(target, allow_pickle=False) as arrays:
        assert arrays["train_images"].shape == (6, 28, 28)
        assert arrays["train_images"][:, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert arrays["train_labels"].tolist() == [2, 1, 0, 2, 1, 0]
        assert arrays["test_images"][:, 0, 0].tolist() == [0, 1, 2]
        assert arrays["test_labels"].tolist() == [2, 1, 0]


def test_the_script_makes_the_same_bytes_again(idx_folder, monkeypatch):
    first, second = idx_folder / "first.npz", idx_folder / "second.npz"
    for target in (first, second):
        run_script(monkeypatch, "--source", idx_folder, "--target", target)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[10:14] == b"\x00\x00\x21\x00"  # the date of a ZIP entry: midnight of 1 January 1980
