"""Folders that belong to the images beside them are no classes, and every one that is left out or odd is named."""

import pytest

from sslvision.data.sources.companions import holds_images, is_companion
from sslvision.data.sources.folder import open_folder


def each(*folders, images=10):
    return [f"{folder}/{number}.png" if folder else f"{number}.png" for folder in folders for number in range(images)]


@pytest.mark.parametrize(
    ("images", "companion"),
    [
        *(("images", "masks"), ("images", "labels"), ("imgs", "annotations"), ("JPEGImages", "SegmentationClass")),
        *(("leftImg8bit", "gtFine"), ("image", "ground_truth"), ("train/images", "train/masks"), ("", "thumbnails")),
        *(("2021/images", "2021/masks"), ("imagesTr", "labelsTr"), ("rgb", "depth")),
    ],
)
def test_masks_and_their_like_are_left_out_and_their_images_have_no_labels(plant, images, companion):
    splits = open_folder(plant(*each(images, companion)), holdout=0)
    assert len(splits.train) == 10
    assert splits.train.labels is None
    assert splits.remarks[0].startswith(f"Left out: 10 of 20 images (50 %), in {companion}/: folders named ")
    assert all(f"/{companion}/" not in splits.train.describe(place) for place in range(10))


def test_masks_in_each_split_and_in_each_class_are_left_out(plant):
    folders = [f"{split}/{kind}" for split in ("train", "val") for kind in ("images", "masks")]
    splits = open_folder(plant(*each(*folders)))
    assert (len(splits.train), len(splits.test), splits.train.labels) == (10, 10, None)
    assert splits.remarks == (
        "Left out: 20 of 40 images (50 %), in train/masks/, val/masks/: folders named masks belong to the images beside them, "
        "as masks and small copies do. To train on one, give it as data.root.",
    )


def test_masks_within_classes_leave_the_labels(plant):
    folders = [f"{name}/{kind}" for name in ("cat", "dog") for kind in ("images", "masks")]
    splits = open_folder(plant(*each(*folders)), holdout=0)
    assert splits.train.classes == ("cat", "dog")
    assert len(splits.train) == 20


def test_the_advice_on_masks_works(plant):
    root = plant(*each("images", "masks"))
    splits = open_folder(root / "masks", holdout=0)
    assert len(splits.train) == 10
    assert splits.remarks == ()


def test_splits_within_the_images_are_found(plant):
    folders = [f"{kind}/{split}" for kind in ("images", "annotations") for split in ("training", "validation")]
    splits = open_folder(plant(*each(*folders)))
    assert (len(splits.train), len(splits.test)) == (10, 10)


def test_thumbnails_among_classes_are_questioned(plant):
    splits = open_folder(plant(*each("cat", "dog", "thumbnails")), holdout=0)
    assert splits.train.classes == ("cat", "dog", "thumbnails")
    (remark,) = splits.remarks
    assert remark.startswith("thumbnails/ with 10 of 30 images (33.3 %) is taken for a class")
    assert "move it out of the folder" in remark


@pytest.mark.parametrize(
    "names", [("mask", "no_mask"), ("with_mask", "without_mask"), ("images", "photographs"), ("cat", "dog"), ("0", "1")]
)
def test_classes_of_such_names_are_classes_without_a_word(plant, names):
    splits = open_folder(plant(*each(*names)), holdout=0)
    assert splits.train.classes == names
    assert splits.remarks == ()


@pytest.mark.parametrize(
    "names", [("fold1", "fold2"), ("batch_01", "batch_02"), ("2023", "2024"), ("2024-01", "2024-02")]
)
def test_parts_of_a_set_are_questioned(plant, names):
    splits = open_folder(plant(*each(*names)), holdout=0)
    assert splits.train.classes == names
    (remark,) = splits.remarks
    assert f"The folders {names[0]}/, {names[1]}/ are taken for classes, though" in remark


def test_an_image_lost_among_masks_does_not_make_them_companions(plant):
    splits = open_folder(plant("stray.png", *each("masks", images=40)), holdout=0)
    assert len(splits.train) == 41


def test_names_tell_companions_from_images():
    assert all(map(is_companion, ("masks", "image_labels", "gtFine", "SegmentationObject", "Ground Truth")))
    assert not any(map(is_companion, ("images", "train", "masked_owl", "labrador", "ground_beetle")))
    assert all(map(holds_images, ("images", "imgs", "leftImg8bit", "raw_images")))
    assert not any(map(holds_images, ("raw", "image_net", "masks")))
