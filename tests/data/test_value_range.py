"""One value range for a set of images of more than 8 bits: decided from a sample, told, recorded, and used again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

from sslvision.data.datamodule import pixel_statistics
from sslvision.data.eight_bits import ValueRange, eight_bits, value_range_from
from sslvision.data.sources.folder import open_folder
from sslvision.errors import UsageError
from sslvision.runs.weights import record_value_range, recorded_value_range
from sslvision.workflows.pretraining import decided_from, open_splits, read_as_in_training

FOLDER = "sslvision.data.sources.folder.open_folder"


def folder_of(root, arrays, form="tif"):
    root.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        if form == "npy":
            np.save(root / f"{number}.npy", array)
        else:
            Image.fromarray(array).save(root / f"{number}.{form}")
    return root


def ramps(low, high, dtype, count=6):
    """Images whose values go from low to high; each reaches a little further than the one before."""
    tops = np.linspace(low + (high - low) * 0.7, high, count)
    return [np.linspace(low, top, 16 * 16).reshape(16, 16).astype(dtype) for top in tops]


def levels(source):
    return max(len(source.read(index).unique()) for index in range(len(source)))


SETS = {  # values of a set -> the range decided
    "12 bits in 16-bit files": (ramps(0, 4095, np.uint16), "png", (0, 4095)),
    "12 bits in 16-bit TIFF": (ramps(0, 4095, np.uint16), "tif", (0, 4095)),
    "10 bits": (ramps(0, 1000, np.uint16), "tif", (0, 1023)),
    "14 bits": (ramps(0, 16000, np.uint16), "npy", (0, 16383)),
    "16 bits": (ramps(0, 60000, np.uint16), "png", (0, 65535)),
    "8 bits in 16-bit files": (ramps(0, 250, np.uint16), "tif", (0, 255)),
    "12 bits in 32-bit integers": (ramps(0, 4000, np.int32), "tif", (0, 4095)),
    "integers beyond 16 bits": (ramps(0, 1_000_000, np.int32), "tif", (0, 1_000_000)),
    "Hounsfield units": (ramps(-1024, 3071, np.int16), "npy", (-1024, 3071)),
    "floats from 0 to 1": (ramps(0, 0.9, np.float32), "tif", (0, 1)),
    "floats from 0 to 10": (ramps(0, 10, np.float32), "tif", (0, 10)),
    "floats from 0 to 300 kelvin": (ramps(250, 300, np.float32), "tif", (250, 300)),
    "floats of both signs": (ramps(-3, 5, np.float64), "npy", (-3, 5)),
    "half floats": (ramps(0, 40, np.float16), "npy", (0, 40)),
}


@pytest.mark.parametrize(("arrays", "form", "expected"), SETS.values(), ids=SETS)
def test_the_range_of_a_set_is_decided_once_and_keeps_its_levels(tmp_path, arrays, form, expected):
    splits = open_folder(folder_of(tmp_path / "set", arrays, form), channels=1, holdout=0)
    assert splits.train.value_range == ValueRange(pytest.approx(expected), pytest.approx(expected))
    assert decided_from(splits)["value_range"] == pytest.approx(list(expected))
    assert levels(splits.train) > 120
    (remark,) = splits.remarks
    assert "6 of 6 images looked at (100 %) have values of" in remark
    assert f"{expected[0]:g} becomes black and {expected[1]:g} white in all images (data.value_range=[" in remark


def test_images_of_a_set_stay_comparable(tmp_path):
    dark, light = np.full((8, 8), 400, np.uint16), np.full((8, 8), 4000, np.uint16)
    source = open_folder(folder_of(tmp_path / "set", [dark, light]), channels=1, holdout=0).train
    assert [int(source.read(index).unique()) for index in (0, 1)] == [25, 249]


def test_a_few_outliers_do_not_make_all_others_black(tmp_path):
    arrays = ramps(0, 10, np.float32)
    arrays[2][0, 0] = 1e6
    source = open_folder(folder_of(tmp_path / "set", arrays), channels=1, holdout=0)
    assert source.train.value_range.floats[1] == pytest.approx(10, abs=0.2)
    assert levels(source.train) > 200
    assert "% of the values are beyond and become one of them" in source.remarks[0]


def test_images_of_8_bits_are_as_they_were_and_nothing_is_decided(tmp_path):
    arrays = ramps(0, 100, np.uint8)
    splits = open_folder(folder_of(tmp_path / "set", arrays, "png"), channels=1, holdout=0)
    assert splits.train.value_range is None
    assert splits.remarks == ()
    assert decided_from(splits) == {}
    assert np.array_equal(splits.train.read(0)[0].numpy(), arrays[0])


def test_floats_and_integers_in_one_set_have_a_range_each(tmp_path):
    root = folder_of(tmp_path / "set", ramps(0, 4095, np.uint16), "png")
    folder_of(root, ramps(0, 1, np.float32), "tif")
    splits = open_folder(root, channels=1, holdout=0)
    assert splits.train.value_range == ValueRange((0, 4095), (0, 1))
    setting = decided_from(splits)["value_range"]
    assert setting == {"integers": [0, 4095], "floats": [0, 1]}
    assert value_range_from(setting) == splits.train.value_range
    assert len(splits.remarks) == 2


def test_a_given_range_is_used_and_what_is_beyond_it_becomes_black_or_white(tmp_path):
    root = folder_of(tmp_path / "set", [np.array([[0, 1000, 1500, 2000, 60000]], np.uint16)])
    splits = open_folder(root, channels=1, holdout=0, value_range=[1000, 2000])
    assert splits.train.read(0).flatten().tolist() == [0, 0, 128, 255, 255]
    assert "1000 becomes black and 2000 white" in splits.remarks[0]
    assert "40 % of the values are beyond" in splits.remarks[0]


def test_few_gray_levels_are_a_finding_with_the_range_to_set(tmp_path):
    root = folder_of(tmp_path / "set", ramps(0, 0.05, np.float32))
    *_, finding = open_folder(root, channels=1, holdout=0).remarks
    assert "6 of 6 images looked at (100 %) have fewer than 32 gray levels after conversion to 8 bits" in finding
    assert "set data.value_range=[0,0.05]" in finding
    splits = open_folder(root, channels=1, holdout=0, value_range=[0, 0.05])
    assert len(splits.remarks) == 1
    assert levels(splits.train) > 200


def test_images_that_have_few_values_themselves_are_no_finding(tmp_path):
    masks = [np.random.default_rng(n).integers(0, 2, (16, 16)).astype(np.uint16) * 4000 for n in range(4)]
    assert len(open_folder(folder_of(tmp_path / "set", masks), channels=1, holdout=0).remarks) == 1


def test_all_splits_and_the_cache_have_the_same_range(tmp_path):
    for split, top in (("train", 4095), ("val", 1000)):
        for name in ("a", "b"):
            folder_of(tmp_path / "set" / split / name, ramps(0, top, np.uint16, 3))
    data = {"_target_": FOLDER, "root": str(tmp_path / "set"), "channels": 1}
    splits = open_splits(data)
    kept = open_splits(data | {"cache": "disk", "cache_dir": str(tmp_path / "cache"), "workers": 0})
    assert splits.test.value_range == splits.train.value_range == kept.train.value_range == kept.test.value_range
    assert torch.equal(splits.test.read(4), kept.test.read(4))
    assert decided_from(kept) == decided_from(splits) == {"value_range": [0, 4095]}
    assert kept.remarks == splits.remarks != ()
    other = open_splits(data | {"cache": "disk", "cache_dir": str(tmp_path / "cache"), "value_range": [0, 100]})
    assert not torch.equal(other.test.read(4), kept.test.read(4))


def test_thousands_of_pages_are_not_counted_one_by_one(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3000, 4, 5), np.uint8), photometric="minisblack")
    seen = []
    seek = TiffImagePlugin.TiffImageFile.seek
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "seek", lambda self, page: seen.append(page) or seek(self, page))
    splits = open_folder(tmp_path, holdout=0)
    assert splits.train.read(0).shape == (3, 4, 5)
    assert max(seen) <= 4
    assert "several pages" in splits.remarks[0]


def test_pages_frames_and_bands_that_are_not_read_are_told(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    page = Image.new("L", (8, 8), 9)
    for number in range(2):
        page.save(root / f"{number}.tif", save_all=True, append_images=[page] * 3)
        Image.new("RGB", (8, 8)).save(root / f"{number}.png")
    page.save(root / "a.gif", save_all=True, append_images=[Image.new("L", (8, 8), 200)])
    (remark,) = open_folder(root, channels=3, holdout=0).remarks
    assert remark.startswith(
        "3 of 5 images looked at (60 %) have several pages or frames, of which the first alone is used"
    )
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).convert("RGBX").save(root / "x.tif")
    assert "1 of 6 images looked at (16.7 %) have bands beyond gray or color" in open_folder(root, holdout=0).remarks[1]


def test_a_set_of_several_depths_says_that_8_bits_stay_as_they_are(tmp_path):
    root = folder_of(tmp_path / "set", ramps(0, 4095, np.uint16, 3))
    Image.new("L", (8, 8), 200).save(root / "eight.png")
    (remark,) = open_folder(root, channels=1, holdout=0).remarks
    assert "3 of 4 images looked at (75 %) have values of uint16, from 0 to 4095" in remark
    assert remark.endswith("The other 1 have 8 bits and stay as they are: their 255 is white.")


def test_a_range_without_effect_is_told(tmp_path):
    Image.new("L", (8, 8), 200).save(tmp_path / "eight.png")
    splits = open_folder(tmp_path, channels=1, holdout=0, value_range=[0, 4095])
    assert splits.train.read(0).flatten()[0] == 200
    assert splits.remarks == (
        "All 1 images looked at have 8 bits and stay as they are, so that data.value_range=[0,4095] has no effect on them.",
    )


def test_what_cannot_be_read_in_the_sample_is_told_before_training(tmp_path):
    for number in range(4):
        Image.new("L", (8, 8), 200).save(tmp_path / f"{number}.png")
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes()[:20])
    Image.new("L", (30, 40)).save(tmp_path / "map.png")
    (remark,) = open_folder(tmp_path, holdout=0, max_pixels=1000).remarks
    assert remark.startswith("2 of 5 images looked at (40 %) cannot be read, and others will take their place: ")
    assert "map.png (30 x 40 pixels, more than the limit data.max_pixels=1000)" in remark


@pytest.mark.parametrize("channels", [7, 9])
def test_the_advice_on_bands_and_pages_works_as_it_is_written(tmp_path, channels):
    tifffile = pytest.importorskip("tifffile")
    pages = np.random.default_rng(0).integers(0, 255, (channels, 8, 8)).astype(np.uint8)
    for number in range(4):
        tifffile.imwrite(tmp_path / f"{number}.tif", pages, photometric="minisblack")
    (remark,) = open_folder(tmp_path, holdout=0).remarks
    assert "data.channels=N data.normalize=computed reads N pages of one size as channels" in remark
    source = open_folder(tmp_path, holdout=0, channels=channels).train
    mean, _ = pixel_statistics(source, "computed")
    assert len(mean) == channels
    with pytest.raises(UsageError, match=r"set data\.normalize=computed, or give"):
        pixel_statistics(source, "imagenet")


@pytest.mark.parametrize(
    "wrong", ["full", [1], [1, 2, 3], [5, 5], [5, 1], [0, float("inf")], "12", {"ints": [0, 1]}, 7]
)
def test_a_range_that_cannot_be_is_refused(tmp_path, wrong):
    with pytest.raises(UsageError, match=r"data\.value_range=.* must be auto, or .*\[low, high\]"):
        open_folder(tmp_path, value_range=wrong)


def test_prediction_and_probing_use_the_range_of_training(tmp_path):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "export" / "config.json").write_text('{"architecture": "vit"}')
    record_value_range(tmp_path / "run" / "export", [0, 4095])
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())["architecture"] == "vit"
    for run in (tmp_path / "run", tmp_path / "run" / "export"):
        assert recorded_value_range(run) == [0, 4095]
        assert read_as_in_training({"_target_": FOLDER}, str(run)) == {"_target_": FOLDER, "value_range": [0, 4095]}
        own = {"_target_": FOLDER, "value_range": [0, 9]}
        assert read_as_in_training(own, str(run)) == own
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / "config.yaml").write_text("data: {value_range: [0, 1023]}")
    assert recorded_value_range(tmp_path / "stopped") == [0, 1023]  # of a run that has no export yet
    digits = {"_target_": "sslvision.data.sources.digits.open_digits"}
    assert read_as_in_training(digits, str(tmp_path / "run")) == digits
    assert recorded_value_range("vit_tiny_patch16_224") is None


def test_scaling_takes_the_memory_of_its_result(monkeypatch):
    values = np.arange(60_000, dtype=np.uint16).reshape(300, 200)
    whole = eight_bits(values)
    monkeypatch.setattr("sslvision.data.eight_bits.AT_ONCE", 1000)
    assert np.array_equal(eight_bits(values), whole)
    assert np.array_equal(eight_bits(values[:1]), whole[:1])
