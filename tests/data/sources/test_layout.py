"""Which folders are taken for splits and which for classes, what is left out, and that all of it is said."""

import os

import pytest
import torch
from PIL import Image

from sslvision.data.cache import cached
from sslvision.data.sources.folder import open_folder
from sslvision.data.sources.layout import split_of
from sslvision.errors import UsageError


def names(source, root):
    return [os.path.relpath(source.describe(index), root).replace(os.sep, "/") for index in range(len(source))]


def classes(*folders, each=1):
    return [f"{folder}/{n}.jpg" for folder in folders for n in range(each)]


# Images beside class folders


def test_one_stray_image_is_left_out_by_name_and_the_labels_stay(plant):
    splits = open_folder(plant(*classes("cat", "dog", each=10), "stray.jpg"), holdout=0)
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.labels.tolist() == [0] * 10 + [1] * 10
    assert splits.remarks == ("photos: 1 of 21 images (4.76 %), stray.jpg, outside the class folders: left out.",)


def test_a_few_strays_among_many_images_are_left_out(plant):
    strays = [f"s{n}.jpg" for n in range(9)]
    splits = open_folder(plant(*classes("cat", "dog", each=100), *strays), holdout=0)
    assert len(splits.train) == 200
    assert "9 of 209 images (4.31 %), s0.jpg, s1.jpg, " in splits.remarks[0]
    assert "and 1 more, outside the class folders: left out." in splits.remarks[0]


def test_many_strays_take_all_labels_and_the_message_counts_and_names_them(plant):
    splits = open_folder(plant(*classes("cat", "dog", each=10), *(f"s{n}.jpg" for n in range(3))), holdout=0)
    assert splits.train.labels is None
    assert len(splits.train) == 23
    (remark,) = splits.remarks
    assert remark.startswith("photos: 3 of 23 images (13 %), s0.jpg, s1.jpg, s2.jpg, outside the class folders, so")
    assert "no image has a label" in remark
    assert remark.endswith("every image must be in the folder of its class (cat, dog).")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_stray_image_in_a_split_is_left_out_by_name(plant, split):
    splits = open_folder(plant(*classes("train/cat", "train/dog", "val/cat", "val/dog", each=4), f"{split}/stray.png"))
    assert (len(splits.train), len(splits.test)) == (8, 8)
    assert splits.test.labels.tolist() == [0] * 4 + [1] * 4
    assert splits.remarks == (f"{split}/: 1 of 9 images (11.1 %), stray.png, outside the class folders: left out.",)


def test_a_stray_image_beside_train_alone_is_left_out_by_name(plant):
    splits = open_folder(plant(*classes("train/cat", "train/dog", each=10), "stray.png"), holdout=0)
    assert splits.train.classes == ("cat", "dog")
    assert splits.remarks == ("1 of 21 images (4.76 %) outside train/ are not used: those in stray.png.",)


# Splits by name


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("training_set", "test_set"),
        ("train_images", "test_images"),
        ("Train", "TEST"),
        ("training_data", "testing_data"),
        ("imgs_train", "imgs_val"),
        ("train2017", "val2017"),
        ("trainset", "testset"),
        ("TrainImages", "TestImages"),
        ("images-train", "images-eval"),
        ("01 train", "02 valid"),
        ("seg_train", "seg_test"),
        ("trainval", "test"),
    ],
)
def test_folders_named_like_splits_are_splits(plant, train, test):
    root = plant(*classes(f"{train}/cat", f"{train}/dog", f"{test}/cat", f"{test}/dog", each=3))
    splits = open_folder(root)
    assert {name.split("/")[0] for name in names(splits.train, root)} == {train}
    assert {name.split("/")[0] for name in names(splits.test, root)} == {test}
    assert splits.train.classes == splits.test.classes == ("cat", "dog")
    guessed = f"By their names, {train}/ is taken for training and {test}/ for held-out images."
    usual = {train.lower(), test.lower()} <= {"train", "test", "trainval"}
    assert splits.remarks == (() if usual else (guessed,))


def test_three_splits_by_similar_names_and_a_fourth_folder_that_is_counted(plant):
    root = plant(*classes("seg_train/sea", "seg_train/ice", "seg_test/sea", "seg_test/ice", "seg_pred", each=2))
    splits = open_folder(root)
    assert (len(splits.train), len(splits.test)) == (4, 4)
    assert (
        splits.remarks[-1] == "2 of 10 images (20 %) outside seg_train/ and seg_test/ are not used: those in seg_pred/."
    )


def test_the_usual_name_is_preferred(plant):
    root = plant("train/1.jpg", "train_old/2.jpg", "train_images/3.jpg", "val/4.jpg")
    splits = open_folder(root)
    assert names(splits.train, root) == ["train/1.jpg"]
    assert splits.remarks == (
        "2 of 4 images (50 %) outside train/ and val/ are not used: those in train_images/, train_old/.",
    )


@pytest.mark.parametrize("other", [(), ("beach",)])
def test_classes_that_sound_like_splits_stay_classes_and_are_questioned(plant, other):
    splits = open_folder(plant(*classes("train_station", "test_tube", *other, each=4)), holdout=0)
    assert splits.train.classes == (*other, "test_tube", "train_station")
    (remark,) = splits.remarks
    assert "test_tube/, train_station/" in remark
    assert "If they are splits, name them train/, val/ and test/." in remark


def test_splits_of_each_class_side_by_side_are_no_classes(plant):
    splits = open_folder(plant(*classes("cat_train", "cat_test", "dog_train", "dog_test", each=4)), holdout=0)
    assert splits.train.labels is None
    assert any("cat_test/, cat_train/, dog_test/, dog_train/" in remark for remark in splits.remarks)


def test_splits_within_the_class_folders_are_questioned(plant):
    splits = open_folder(plant(*classes("cat/train", "cat/test", "dog/train", "dog/test", each=4)), holdout=0)
    assert splits.train.classes == ("cat", "dog")
    assert "hold folders named like splits" in splits.remarks[0]


@pytest.mark.parametrize("folders", [("val", "test"), ("test_set", "val_set"), ("train1", "train2")])
def test_held_out_folders_without_a_train_are_no_classes_and_that_is_said(plant, folders):
    splits = open_folder(plant(*classes(*folders, each=4)), holdout=0)
    assert splits.train.labels is None
    assert "named like splits" in splits.remarks[0]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("cat", (None, "cat")),
        ("trains", (None, "trains")),
        ("strain", (None, "strain")),
        ("contest_images", (None, "contest")),
        ("latest", (None, "latest")),
        ("évaluation", (None, "évaluation")),
        ("train_val", ("train", "")),
        ("train_and_test", (None, "and")),
        ("my train set 2", ("train", "my")),
    ],
)
def test_the_split_that_a_name_tells(name, split):
    assert split_of(name) == split


# A folder in a folder


@pytest.mark.parametrize("wrapper", ["dataset", "archive/Dataset"])
def test_splits_in_the_only_folder_are_found(plant, wrapper):
    root = plant(*classes(f"{wrapper}/train/cat", f"{wrapper}/train/dog", f"{wrapper}/test/cat"), "readme.txt")
    splits = open_folder(root)
    assert (len(splits.train), len(splits.test)) == (2, 1)
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.name == "photos (2 + 1)"
    assert f"The only folder with images is {wrapper}/, which is taken for the data set itself." in splits.remarks


def test_images_in_a_single_folder_stay_as_they_were(plant):
    root = plant(*classes("only", each=3))
    splits = open_folder(root, holdout=0)
    assert names(splits.train, root) == ["only/0.jpg", "only/1.jpg", "only/2.jpg"]
    assert splits.remarks == ()


# Held-out folders without labels


def test_labels_of_train_are_used_beside_a_flat_val(plant):
    root = plant(*classes("train/cat", "train/dog", each=20), *classes("val", each=10))
    splits = open_folder(root)
    assert (len(splits.train), len(splits.test), splits.validation) == (38, 2, None)
    assert splits.test.labels is not None
    assert splits.remarks == (
        "10 of 50 images (20 %) in val/ have no labels, for want of class folders, and are not used. Scores are measured on "
        "2 of 40 images (5 %) of train/, held out from training (data.holdout).",
    )


def test_a_flat_test_leaves_the_scores_to_val(plant):
    root = plant(*classes("train/cat", "train/dog", "val/cat", "val/dog", each=5), *classes("test", each=5))
    splits = open_folder(root)
    assert {name.split("/")[0] for name in names(splits.test, root)} == {"val"}
    assert splits.validation is None
    assert splits.remarks[0].endswith("and are not used. Scores are measured on val/.")


def test_a_flat_val_and_a_flat_test_are_both_named(plant):
    splits = open_folder(plant(*classes("train/cat", "train/dog", each=20), *classes("val", "test", each=5)))
    assert splits.remarks[0].startswith(
        "5 of 50 images (10 %) in val/ and 5 of 50 images (10 %) in test/ have no labels"
    )


def test_without_a_holdout_nothing_is_scored_and_that_is_said(plant):
    splits = open_folder(plant(*classes("train/cat", "train/dog", each=20), *classes("val", each=10)), holdout=0)
    assert splits.test is None
    assert splits.remarks[0].endswith("No image is held out, so nothing is scored.")


# Links


def test_a_linked_split_and_linked_classes_are_read(plant, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    for name in ("val/cat/1.jpg", "val/dog/2.jpg", "dogs/3.jpg"):
        (elsewhere / name).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / name).touch()
    root = plant("train/cat/4.jpg")
    (root / "val").symlink_to("../elsewhere/val")
    (root / "train" / "dog").symlink_to(elsewhere / "dogs")
    splits = open_folder(root)
    assert names(splits.train, root) == ["train/cat/4.jpg", "train/dog/3.jpg"]
    assert names(splits.test, root) == ["val/cat/1.jpg", "val/dog/2.jpg"]
    assert splits.remarks == ()
    refused = open_folder(root, follow_symlinks=False, holdout=0)
    assert names(refused.train, root) == ["train/cat/4.jpg"]
    assert refused.remarks[0].endswith("as data.follow_symlinks=false asks (2): train/dog, val.")


def test_links_of_other_folders_in_a_circle_end(plant, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "1.jpg").touch()
    root = plant("cat/2.jpg", "dog/3.jpg")
    (root / "cat" / "out").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(root)
    (elsewhere / "all").symlink_to("/")
    splits = open_folder(root, holdout=0)
    assert names(splits.train, root) == ["cat/2.jpg", "cat/out/1.jpg", "dog/3.jpg"]
    assert "Left out: links that lead nowhere or in a circle, and special files (2)" in splits.remarks[0]


# What else is left out


def test_hidden_images_and_folders_are_named(plant):
    splits = open_folder(plant("a.jpg", ".b.jpg", ".cache/c.jpg", ".gitignore", "__MACOSX/d.jpg", "._a.jpg"), holdout=0)
    named = "Left out: hidden images and folders, whose names begin with a dot (2): .b.jpg, .cache."
    assert splits.remarks == (named,)


def test_archives_are_to_be_unpacked(plant):
    (remark,) = open_folder(plant("a.jpg", "b.zip", "c.tar"), holdout=0).remarks
    assert remark.endswith("1 .zip, 1 .tar. Unpack the archives to use what is in them.")


def test_remarks_pass_through_the_cache(tmp_path):
    for n in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{n}.png")
    (tmp_path / "notes.txt").touch()
    splits = cached(open_folder(tmp_path), "disk", side=8, folder=str(tmp_path / "cache"), workers=0)
    assert splits.remarks == ("Left out: 1 of 4 files (25 %), not being images that can be read: 1 .txt.",)
    assert torch.equal(splits.train.read(0), torch.zeros(3, 8, 8, dtype=torch.uint8))


def test_an_empty_root_is_not_the_working_directory():
    with pytest.raises(UsageError, match=r"data\.root is empty"):
        open_folder("")
