"""Images in two classes, or held out and trained on, are told with counts, whether as copies or as links."""

import os

import numpy as np
import pytest
from PIL import Image

from sslvision.data.sources import overlaps
from sslvision.data.sources.folder import open_folder


@pytest.fixture
def photos(tmp_path):
    """Twelve pictures, no two alike, in train/cat, train/dog and val/cat, val/dog."""
    for place in range(12):
        folder = tmp_path / "photos" / ("train" if place < 8 else "val") / ("cat", "dog")[place % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(place).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{place}.bmp")  # all of one size
    return tmp_path / "photos"


def copied(source, target):
    target.write_bytes(source.read_bytes())


def linked(source, target):
    target.symlink_to(source)


def hard_linked(source, target):
    os.link(source, target)


@pytest.mark.parametrize("put", [copied, linked, hard_linked])
def test_a_picture_in_two_class_folders_is_told_with_both_paths(put, photos):
    put(photos / "train/cat/0.bmp", photos / "train/dog/also.bmp")
    (remark,) = open_folder(photos).remarks
    assert remark.startswith(
        "2 of 13 images (15.4 %) are the same picture in folders of two or more classes, as links or copies: train/cat/0.bmp = "
        "train/dog/also.bmp. An image has one label here"
    )


def test_two_classes_are_told_across_splits_too(photos):
    copied(photos / "train/cat/0.bmp", photos / "val/dog/also.bmp")
    (remark,) = open_folder(photos).remarks
    assert "train/cat/0.bmp = val/dog/also.bmp" in remark
    assert "folders of two or more classes" in remark


@pytest.mark.parametrize("put", [copied, linked])
def test_a_held_out_picture_that_is_trained_on_is_told(put, photos):
    put(photos / "train/cat/0.bmp", photos / "val/cat/also.bmp")
    assert open_folder(photos).remarks == (
        "1 of 5 held-out images (20 %) are also among the training images, as links or copies: train/cat/0.bmp = "
        "val/cat/also.bmp. Scores on them are too good: delete the copies on one side.",
    )


def test_copies_that_a_random_split_tears_apart_are_told(photos):
    for place in range(0, 8, 2):
        for number in range(6):
            copied(photos / f"train/cat/{place}.bmp", photos / f"train/cat/{place}-{number}.bmp")
    (remark,) = open_folder(photos / "train", holdout=0.5).remarks
    assert "held-out images" in remark
    assert "are also among the training images" in remark


def test_copies_within_a_class_and_a_split_do_no_harm_and_are_not_told(photos):
    copied(photos / "train/cat/0.bmp", photos / "train/cat/also.bmp")
    assert open_folder(photos).remarks == ()


def test_files_of_one_size_with_one_byte_of_difference_are_different(photos):
    data = bytearray((photos / "train/cat/0.bmp").read_bytes())
    data[60] ^= 1  # neither in the middle nor at the end
    (photos / "train/dog/almost.bmp").write_bytes(bytes(data) + bytes(9000))
    (photos / "train/cat/0.bmp").write_bytes((photos / "train/cat/0.bmp").read_bytes() + bytes(9000))
    assert open_folder(photos).remarks == ()


def test_images_without_labels_are_not_compared(photos, monkeypatch):
    copied(photos / "train/cat/0.bmp", photos / "train/cat/also.bmp")
    monkeypatch.setattr(overlaps, "same_files", None)
    assert open_folder(photos / "train/cat").remarks == ()


def test_of_many_images_copies_of_one_name_are_looked_at_together(photos, monkeypatch):
    monkeypatch.setattr(overlaps, "LOOK_AT", 7)
    for place in range(0, 8, 2):
        copied(photos / f"train/cat/{place}.bmp", photos / f"train/dog/{place}.bmp")
    (remark,) = open_folder(photos).remarks
    assert "of 7 images looked at" in remark


def test_a_class_named_like_two_others_is_mentioned(photos):
    (photos / "train/cat_dog").mkdir()
    copied(photos / "train/cat/0.bmp", photos / "train/cat_dog/0.bmp")
    (photos / "train/cat/0.bmp").unlink()
    assert open_folder(photos).remarks == (
        "cat_dog/: named like several classes together, and taken for one class of its own, as an image has one label here.",
    )


def test_lists_of_labels_are_said_to_be_unread(photos):
    (photos / "labels.csv").write_text("image,label\n")
    assert open_folder(photos).remarks == (
        "Left out: 1 of 13 files (7.69 %), not being images that can be read: 1 .csv.",
        "Labels are read from the names of folders only, not from files (1 .csv): if those hold labels, put each image into "
        "the folder of its class, or write a data source (docs/extending.md).",
    )


def test_a_note_is_no_list_of_labels_and_a_text_for_each_image_is(photos):
    (photos / "notes.txt").touch()
    assert len(open_folder(photos).remarks) == 1
    for place in range(0, 8, 2):
        (photos / f"train/cat/{place}.txt").write_text("0 0.5 0.5 1 1\n")
    assert "not from files (5 .txt)" in open_folder(photos).remarks[1]
