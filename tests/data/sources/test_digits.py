import hashlib
import pickle
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from sslvision.data.sources.digits import FILE, open_digits
from sslvision.errors import UsageError

SCRIPT = Path(__file__).parents[3] / "scripts" / "make_digits.py"


@pytest.fixture(scope="module")
def splits():
    return open_digits()


@pytest.fixture(scope="module")
def stored():
    with np.load(FILE, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]


def run_script(monkeypatch, target):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--target", str(target)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def scikit_learn(monkeypatch):
    """A scikit-learn of three digits; returns what load_digits gives."""
    images = np.arange(3 * 64, dtype=np.float64).reshape(3, 8, 8) % 17
    digits = SimpleNamespace(images=images, target=np.array([2, 0, 1]))
    module = ModuleType("sklearn.datasets")
    module.load_digits = lambda: digits
    monkeypatch.setitem(sys.modules, "sklearn", ModuleType("sklearn"))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", module)
    return digits


def test_the_digits_are_1198_and_599_of_32_by_32(splits):
    train, test, validation, _ = splits
    assert train.images.shape == (1198, 1, 32, 32)
    assert test.images.shape == (599, 1, 32, 32)
    assert train.images.dtype == torch.uint8
    assert train.name == test.name == "digits (1,198 + 599)"
    assert validation is None
    assert test.describe(3) == "digits (1,198 + 599), test image 3"


def test_two_thirds_of_each_class_are_for_training_the_first_in_the_files_order(splits, stored):
    images, labels = stored
    assert splits.train.labels.dtype == torch.int64
    for label in range(10):
        first_to_last = torch.from_numpy(images[labels == label])
        train, test = (source.images[source.labels == label] for source in splits[:2])
        assert len(train) == round(len(first_to_last) * 2 / 3)
        assert len(train) + len(test) == len(first_to_last)
        together = torch.cat([train, test])[:, 0].float()
        darkness = torch.nn.functional.avg_pool2d(together, 4) * 16 / 255  # what each pixel was, nearly
        assert (darkness.round() - first_to_last).abs().mean() < 1.6
        order = (darkness[:, None] - first_to_last[None].float()).square().sum((2, 3)).argmin(1)
        assert (order == torch.arange(len(order))).float().mean() > 0.97  # each is most like the one in its place


def test_the_stored_digits_are_those_of_scikit_learn(stored):
    images, labels = stored  # compared with scikit-learn 1.9 when they were made
    assert hashlib.sha256(images.tobytes()).hexdigest()[:16] == "8f26b2bd9d135c25"
    assert hashlib.sha256(labels.tobytes()).hexdigest()[:16] == "8ba4f891220f5e4c"
    assert labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert images[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_the_pixels_fill_the_range_of_a_byte(stored):
    train = open_digits(size=8).train
    (indices,) = np.nonzero(stored[1] == 0)
    assert torch.equal(train.images[0, 0], (torch.from_numpy(stored[0][indices[0]]) * (255 / 16)).round().byte())
    assert train.images.unique().tolist() == [round(count * 255 / 16) for count in range(17)]


def test_three_channels_repeat_the_gray_and_the_size_is_chosen(splits):
    colored = open_digits(channels=3).test
    assert colored.channels == 3
    assert torch.equal(colored.images, splits.test.images.expand(-1, 3, -1, -1))
    assert open_digits(size=56).test.images.shape == (599, 1, 56, 56)


@pytest.mark.parametrize(
    ("settings", "words"), [({"channels": 2}, r"data\.channels must be 1, or 3"), ({"size": 7}, r"data\.size must be")]
)
def test_settings_out_of_range_are_usage_errors(settings, words):
    with pytest.raises(UsageError, match=words):
        open_digits(**settings)


def test_the_source_survives_pickling(splits):
    copy = pickle.loads(pickle.dumps(splits.test))
    assert torch.equal(copy.images, splits.test.images)
    assert copy.classes == tuple("0123456789")


def test_the_file_is_small_and_its_license_is_beside_it():
    assert FILE.stat().st_size <= 100_000
    notice = FILE.with_name("NOTICE").read_text(encoding="utf-8")
    assert "E. Alpaydin and C. Kaynak" in notice
    assert "creativecommons.org/licenses/by/4.0" in notice


def test_the_script_stores_what_scikit_learn_has_and_the_same_bytes_again(scikit_learn, monkeypatch, tmp_path):
    for name in ("first.npz", "second.npz"):
        run_script(monkeypatch, tmp_path / name)
    with np.load(tmp_path / "first.npz", allow_pickle=False) as arrays:
        assert arrays["images"].dtype == arrays["labels"].dtype == np.uint8
        assert np.array_equal(arrays["images"], scikit_learn.images)
        assert arrays["labels"].tolist() == [2, 0, 1]
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()


def test_the_script_refuses_pixels_that_bytes_cannot_hold(scikit_learn, monkeypatch, tmp_path):
    scikit_learn.images[0, 0, 0] = 0.5
    with pytest.raises(SystemExit, match="not the whole numbers"):
        run_script(monkeypatch, tmp_path / "made.npz")


def test_the_script_says_that_it_needs_scikit_learn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        run_script(monkeypatch, tmp_path / "made.npz")
