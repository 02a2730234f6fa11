import hashlib
import json
import pickle
import struct
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from sslvision.data.decode import from_pil
from sslvision.data.source import UnreadableImage
from sslvision.data.sources.torchvision_sets import SPLITS, open_torchvision
from sslvision.errors import DataError, UsageError


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_idx(path, array, kind=8):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(">HBB", 0, kind, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def write_image(path, color=(255, 0, 0), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), color).save(path, **options)


@pytest.fixture
def mnist(tmp_path):
    """The four files of MNIST, 12 and 5 images large."""
    for stem, count in (("train", 12), ("t10k", 5)):
        write_idx(tmp_path / f"MNIST/raw/{stem}-images-idx3-ubyte", noise(count, 28, 28, seed=count))
        write_idx(tmp_path / f"MNIST/raw/{stem}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return tmp_path


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-10 in the authors' format, 10 images a batch."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        batch = {"data": noise(10, 3072, seed=len(name)), "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch))
    meta = pickle.dumps({"label_names": [f"thing {n}" for n in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", hashlib.md5(meta).hexdigest())
    return tmp_path


@pytest.fixture
def tiny(monkeypatch):
    """FakeData of 20 images of 12 x 10."""

    class Tiny(datasets.FakeData):
        def __init__(self):
            super().__init__(size=20, image_size=(3, 10, 12), num_classes=4)

    monkeypatch.setitem(globals(), "Tiny", Tiny)  # where pickle looks for it
    Tiny.__qualname__ = "Tiny"
    monkeypatch.setattr(datasets, "FakeData", Tiny)
    return Tiny()


# Sets in memory


def test_mnist_is_in_memory_with_the_authors_pixels_labels_and_classes(mnist):
    train, test, *_ = open_torchvision("MNIST", mnist, channels=1)
    assert np.array_equal(train.images[:, 0].numpy(), noise(12, 28, 28, seed=12))
    assert np.array_equal(test.images[:, 0].numpy(), noise(5, 28, 28, seed=5))
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert train.labels.dtype == torch.int64
    assert test.classes[3] == "3 - three"
    assert train.name == test.name == "MNIST (12 + 5)"
    assert test.describe(4) == "MNIST (12 + 5), test image 4"
    assert torch.equal(test.read(4), test.images[4])


def test_gray_sets_are_repeated_to_three_channels(mnist):
    train = open_torchvision("MNIST", mnist, channels=3).train
    assert train.channels == 3
    assert train.images.shape == (12, 3, 28, 28)
    assert torch.equal(train.images[:, 0], train.images[:, 2])


@pytest.mark.parametrize("channels", [1, 3])
def test_cifar_in_memory_is_what_torchvision_hands_out(cifar, channels):
    train, test, *_ = open_torchvision("CIFAR10", cifar, channels=channels)
    assert (len(train), len(test)) == (50, 10)
    assert train.images.shape == (50, channels, 32, 32)
    for split, source in ((True, train), (False, test)):
        theirs = datasets.CIFAR10(cifar, train=split)
        for place in (0, 3, 9):
            image, label = theirs[place]
            assert torch.equal(source.images[place], from_pil(image, channels))
            assert source.labels[place] == label
    assert test.classes[9] == "thing 9"


@pytest.mark.parametrize("channels", [1, 3])
def test_stl10_in_memory_is_what_torchvision_hands_out(tmp_path, monkeypatch, channels):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for split, count in (("train", 4), ("test", 3)):
        noise(count, 3, 96, 96).tofile(folder / f"{split}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{split}_y.bin")
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    train, test, *_ = open_torchvision("STL10", tmp_path, channels=channels)
    theirs = datasets.STL10(tmp_path)
    assert torch.equal(train.images[3], from_pil(theirs[3][0], channels))
    assert test.labels.tolist() == [0, 1, 2]
    assert train.classes == test.classes == ("0", "1", "2", "3")  # numbers, as the file of names is missing


def test_svhn_in_memory_has_its_zeros_labeled_zero(tmp_path, monkeypatch):
    pixels = noise(32, 32, 3, 4)
    scipy, io = ModuleType("scipy"), ModuleType("scipy.io")
    scipy.io = io
    io.loadmat = lambda path: {"X": pixels, "y": np.array([[1], [10], [3], [9]], np.uint8)}
    monkeypatch.setitem(sys.modules, "scipy", scipy)
    monkeypatch.setitem(sys.modules, "scipy.io", io)
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    train = open_torchvision("SVHN", tmp_path).train
    assert train.labels.tolist() == [1, 0, 3, 9]
    assert train.classes == tuple("0123456789")
    assert np.array_equal(train.images[2].numpy(), pixels[..., 2].transpose(2, 0, 1))


def test_emnist_is_its_balanced_split_of_47_classes(tmp_path):
    for split, count in (("train", 6), ("test", 3)):
        stem = f"EMNIST/raw/emnist-balanced-{split}"
        write_idx(tmp_path / f"{stem}-images-idx3-ubyte", noise(count, 28, 28))
        write_idx(tmp_path / f"{stem}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8))
    train, test, *_ = open_torchvision("EMNIST", tmp_path, channels=1)
    assert (len(train), len(test), len(train.classes)) == (6, 3, 47)


def test_qmnist_labels_are_the_first_of_its_columns(tmp_path):
    for split, count in (("train", 6), ("test", 3)):
        write_idx(tmp_path / f"QMNIST/raw/qmnist-{split}-images-idx3-ubyte", noise(count, 28, 28))
        columns = np.stack([np.arange(count), np.full(count, 77)], axis=1).astype(">i4")
        write_idx(tmp_path / f"QMNIST/raw/qmnist-{split}-labels-idx2-int", columns, kind=12)
    assert open_torchvision("QMNIST", tmp_path, channels=1).test.labels.tolist() == [0, 1, 2]


# Sets of files


@pytest.fixture
def food(tmp_path):
    """Food-101 with two classes."""
    for split, numbers in (("train", (3, 1)), ("test", (2,))):
        listed = {name: [f"{name}/{n}" for n in numbers] for name in ("soup", "cake")}
        (tmp_path / "food-101/meta").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"food-101/meta/{split}.json").write_text(json.dumps(listed))
        for name, color in (("soup", (255, 0, 0)), ("cake", (0, 0, 255))):
            for n in numbers:
                write_image(tmp_path / f"food-101/images/{name}/{n}.jpg", color, quality=100)
    return tmp_path


def test_a_set_of_files_is_read_as_files_sorted_by_path(food):
    train, test, *_ = open_torchvision("Food101", food)
    folder = food / "food-101" / "images"
    assert [train.describe(n) for n in range(4)] == [
        str(folder / name) for name in ("cake/1.jpg", "cake/3.jpg", "soup/1.jpg", "soup/3.jpg")
    ]
    assert train.classes == ("cake", "soup")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert test.labels.tolist() == [0, 1]
    assert train.images is None
    assert np.allclose(train.read(3)[:, 0, 0], (255, 0, 0), atol=3)
    assert np.allclose(train.read(0)[:, 0, 0], (0, 0, 255), atol=3)
    assert open_torchvision("Food101", food, channels=1).train.read(0).shape == (1, 6, 8)


def test_an_unreadable_file_of_a_set_is_met_when_it_is_read(food):
    (food / "food-101/images/cake/1.jpg").write_bytes(b"")
    train = open_torchvision("Food101", food).train
    assert len(train) == 4
    with pytest.raises(UnreadableImage, match="the file is empty"):
        train.read(0)


def test_a_set_without_splits_holds_out_the_same_files_wherever_it_lies(tmp_path):
    held_out = []
    for place in ("here", "there"):
        for name in ("Forest", "River"):
            for n in range(20):
                write_image(tmp_path / place / "eurosat/2750" / name / f"{n}.jpg")
        train, test, *_ = open_torchvision("EuroSAT", tmp_path / place, holdout=0.1)
        assert (len(train), len(test)) == (36, 4)
        held_out.append([test.describe(n).split("2750")[1] for n in range(4)])
        assert test.labels.tolist() == ["River" in test.describe(n) for n in range(4)]
        assert not {train.describe(n) for n in range(36)} & {test.describe(n) for n in range(4)}
    assert held_out[0] == held_out[1]


def test_caltech101_is_read_without_scipy(tmp_path):
    for name in ("BACKGROUND_Google", "ant", "bee"):
        for n in (1, 2):
            write_image(tmp_path / f"caltech101/101_ObjectCategories/{name}/image_{n:04}.jpg")
    (tmp_path / "caltech101/Annotations").mkdir()
    train, test, *_ = open_torchvision("Caltech101", tmp_path, holdout=0)
    assert test is None
    assert train.classes == ("ant", "bee")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert train.describe(3).endswith("bee/image_0002.jpg")
    assert train.read(3).shape == (3, 6, 8)
    assert train.name == "Caltech101 (4)"


def test_caltech256_names_its_files_by_class_and_number(tmp_path):
    for place, name in enumerate(("001.ak47", "002.flag"), start=1):
        write_image(tmp_path / f"caltech256/256_ObjectCategories/{name}/{place:03}_0001.jpg")
    train = open_torchvision("Caltech256", tmp_path, holdout=0).train
    assert train.labels.tolist() == [0, 1]
    assert train.read(1).shape == (3, 6, 8)


def test_inaturalist_has_the_species_as_classes(tmp_path):
    species = [f"0000{n}_Animalia_P_C_O_F_Genus_species{n}" for n in range(2)]
    for version in ("2021_train", "2021_valid"):
        for name in species:
            write_image(tmp_path / version / name / "x.jpg")
    train, test, *_ = open_torchvision("INaturalist", tmp_path)
    assert test.classes == tuple(species)
    assert test.labels.tolist() == [0, 1]
    assert "2021_valid" in test.describe(1)
    assert train.read(1).shape == (3, 6, 8)


# Sets asked for one image at a time


def test_a_set_that_only_gives_images_is_asked_for_them(tiny):
    train, test, *_ = open_torchvision("FakeData", "unused", holdout=0.25)
    assert (len(train), len(test)) == (15, 5)
    assert train.images is None
    indices = [int(test.describe(n).rsplit(" ", 1)[1]) for n in range(5)]
    for n, place in enumerate(indices):
        image, label = tiny[place]
        assert torch.equal(test.read(n), from_pil(image, 3))
        assert test.labels[n] == label
    assert test.describe(0).startswith("FakeData (15 + 5), test image ")
    assert train.classes == ("0", "1", "2", "3")


def test_a_failing_set_gives_a_reason_in_words(tiny, monkeypatch):
    train = open_torchvision("FakeData", "unused").train

    def fail(self, index):
        raise OSError("image file is truncated")

    monkeypatch.setattr(type(tiny), "__getitem__", fail)
    with pytest.raises(UnreadableImage, match="image file is truncated"):
        train.read(0)


def test_pcam_labels_are_read_without_decoding_and_it_can_be_sent_to_a_worker(tmp_path, monkeypatch):
    h5py = ModuleType("h5py")
    h5py.File = h5_file
    monkeypatch.setitem(sys.modules, "h5py", h5py)
    for split, count in (("train", 5), ("test", 3)):
        files = datasets.PCAM._FILES[split]
        (tmp_path / "pcam").mkdir(exist_ok=True)
        for kind, arrays in (
            ("images", {"x": noise(count, 96, 96, 3)}),
            ("targets", {"y": (np.arange(count) % 2).astype(np.uint8).reshape(-1, 1, 1, 1)}),
        ):
            with open(tmp_path / "pcam" / files[kind][0], "wb") as file:
                np.savez(file, **arrays)
    decoded = []
    getitem = datasets.PCAM.__getitem__
    monkeypatch.setattr(datasets.PCAM, "__getitem__", lambda self, n: decoded.append(n) or getitem(self, n))
    train, test, *_ = open_torchvision("PCAM", tmp_path)
    assert train.labels.tolist() == [0, 1, 0, 1, 0]
    assert test.classes == ("0", "1")
    assert decoded == []
    received = pickle.loads(pickle.dumps(train))
    assert np.array_equal(received.read(2).permute(1, 2, 0).numpy(), noise(5, 96, 96, 3)[2])


def h5_file(path):
    """Stand in for h5py.File with an .npz file."""
    return np.load(path)


@pytest.mark.parametrize("name", ["CIFAR10", "Food101", "FakeData"])
def test_every_kind_of_source_survives_pickling(name, cifar, food, tiny):
    source = open_torchvision(name, cifar).train
    received = pickle.loads(pickle.dumps(source))
    assert torch.equal(received.read(2), source.read(2))
    assert torch.equal(received.labels, source.labels)
    assert received.describe(2) == source.describe(2)


def test_labels_that_were_never_published_are_none(cifar, monkeypatch):
    load = datasets.CIFAR10._load_meta

    def forget(self):
        load(self)
        self.targets = self.targets if self.train else [None] * len(self.targets)

    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", forget)
    train, test, *_ = open_torchvision("CIFAR10", cifar)
    assert test.labels is None
    assert test.classes is None
    assert len(train.classes) == 10


# What cannot be opened


@pytest.mark.parametrize(
    ("name", "near"), [("cifar10", "CIFAR10"), ("FashonMNIST", "FashionMNIST"), ("Foods101", "Food101")]
)
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(UsageError, match=f"{name} is not one of .* Did you mean .*{near}"):
        open_torchvision(name, "unused")


def test_a_name_near_nothing_gets_the_list():
    with pytest.raises(UsageError, match="There are: CIFAR10, CIFAR100, "):
        open_torchvision("xyzzy", "unused")


def test_a_set_that_is_not_of_classes_is_unknown():
    with pytest.raises(UsageError, match="VOCDetection is not one of torchvision's labeled classification sets"):
        open_torchvision("VOCDetection", "unused")


@pytest.mark.parametrize("settings", [{"channels": 2}, {"holdout": 0.95}])
def test_settings_out_of_range_are_usage_errors(settings):
    with pytest.raises(UsageError, match=f"data.{next(iter(settings))}"):
        open_torchvision("CIFAR10", "unused", **settings)


@pytest.mark.parametrize("name", sorted(SPLITS.keys() - {"FakeData"}))
def test_missing_files_are_a_data_error_that_says_what_to_do(name, tmp_path):
    with pytest.raises(DataError) as caught:
        open_torchvision(name, tmp_path)
    words = str(caught.value)
    assert "Unknown value" not in words  # the set accepts the arguments of SPLITS
    assert "unexpected keyword" not in words
    assert words.startswith((f"{name} could not be opened from {tmp_path}", f"{name} needs the Python package"))
    assert "download=True" not in words
    unfetched = ("FER2013", "ImageNet")  # torchvision cannot fetch them; ImageNet needs scipy to say so
    if name not in unfetched and "needs the Python package" not in words:
        assert "Pass data.download=true to fetch it, or put its files into" in words


def test_a_set_that_cannot_be_downloaded_says_where_to_put_its_files(tmp_path, monkeypatch):
    def fail(self):
        raise RuntimeError("The archive is not present in the root directory.")

    monkeypatch.setattr(datasets.ImageNet, "parse_archives", fail)
    with pytest.raises(DataError, match=f"Put its files into {tmp_path} as torchvision's documentation"):
        open_torchvision("ImageNet", tmp_path, download=True)


def test_a_failed_download_is_named_as_such(tmp_path, monkeypatch):
    def fail(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fail)
    with pytest.raises(DataError, match=r"CIFAR10 could not be downloaded to .*no route to host\. Put its files into"):
        open_torchvision("CIFAR10", tmp_path, download=True)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(datasets.SVHN, "_check_integrity", lambda self: True)
    with pytest.raises(DataError, match=r"SVHN needs the Python package scipy: pip install scipy\."):
        open_torchvision("SVHN", tmp_path)


def test_a_missing_package_that_torchvision_hides_in_another_error_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match=r"PCAM needs the Python package h5py: pip install h5py\."):
        open_torchvision("PCAM", tmp_path)
