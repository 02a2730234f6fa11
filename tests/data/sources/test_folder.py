import os
import pickle
from hashlib import blake2b

import numpy as np
import pytest
import torch
from PIL import Image

from sslvision.data.source import UnreadableImage
from sslvision.data.sources.folder import hold_out, open_folder
from sslvision.errors import DataError, UsageError


def names(source, root):
    return [os.path.relpath(source.describe(index), root).replace(os.sep, "/") for index in range(len(source))]


# What counts as an image


def test_every_extension_counts_in_either_case(plant):
    files = [f"a.{extension}" for extension in ("JPG", "jpeg", "Png", "webp", "tif", "tiff", "bmp", "gif")]
    root = plant(*files, "a.txt", "jpg", "b.jpg.part")
    assert names(open_folder(root, holdout=0).train, root) == sorted(files)


def test_hidden_files_and_folders_are_left_out(plant):
    root = plant("a.jpg", ".b.jpg", "._a.jpg", ".cache/c.jpg", "__MACOSX/d.jpg", "sub/__MACOSX/e.jpg", "sub/f.jpg")
    assert names(open_folder(root, holdout=0).train, root) == ["a.jpg", "sub/f.jpg"]


def test_the_order_is_sorted_whatever_the_disk_says(plant, monkeypatch):
    root = plant("b/2.jpg", "a.jpg", "b/10.jpg", "c/d/1.jpg", "B.jpg")
    expected = ["B.jpg", "a.jpg", "b/10.jpg", "b/2.jpg", "c/d/1.jpg"]
    assert names(open_folder(root, holdout=0).train, root) == expected
    scandir = os.scandir

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(os, "scandir", Reversed)
    assert names(open_folder(root, holdout=0).train, root) == expected


def test_names_that_are_not_ascii_or_not_even_text_are_read(plant):
    root = plant("été 1.jpg", "猫.jpg", "new\nline.jpg")
    try:
        (root / os.fsdecode(b"latin\xe9.jpg")).touch()
    except OSError:
        pytest.skip("this file system takes no such name")
    source = open_folder(root, holdout=0).train
    assert len(source) == 4
    assert all(os.path.exists(source.describe(index)) for index in range(4))


def test_files_that_are_not_images_are_counted_by_extension(plant):
    remark, on_labels = open_folder(plant("a.jpg", "b.csv", "c.CSV", "d.txt", ".hidden")).remarks
    assert remark == "Left out: 3 of 4 files (75 %), not being images that can be read: 2 .csv, 1 .txt."
    assert "not from files (2 .csv)" in on_labels


# Links


def test_a_link_out_of_the_folder_is_followed_unless_refused(plant, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.jpg").touch()
    root = plant("a.jpg")
    (root / "linked").symlink_to(elsewhere)
    (root / "y.jpg").symlink_to(elsewhere / "x.jpg")
    followed = open_folder(root, holdout=0)
    assert names(followed.train, root) == ["a.jpg", "linked/x.jpg", "y.jpg"]
    assert followed.remarks == ()
    refused = open_folder(root, holdout=0, follow_symlinks=False)
    assert names(refused.train, root) == ["a.jpg"]
    asked = "Left out: links that lead outside the folder, as data.follow_symlinks=false asks (2): linked, y.jpg."
    assert refused.remarks == (asked,)


def test_a_link_within_the_folder_is_followed(plant):
    root = plant("pool/1.jpg", "pool/2.jpg", "train/x/3.jpg")
    (root / "train" / "y.jpg").symlink_to(root / "pool" / "1.jpg")
    assert "train/y.jpg" in names(open_folder(root, holdout=0).train, root)


@pytest.mark.parametrize("follow", [False, True])
def test_links_in_a_circle_end(plant, follow):
    root = plant("a/1.jpg", "b/2.jpg")
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "other").symlink_to(root / "b")
    (root / "b" / "other").symlink_to(root / "a")
    found = names(open_folder(root, holdout=0, follow_symlinks=follow).train, root)
    assert found == ["a/1.jpg", "a/other/2.jpg", "b/2.jpg", "b/other/1.jpg"]


def test_a_link_that_leads_nowhere_is_left_out_and_named(plant):
    root = plant("a.jpg")
    (root / "b.jpg").symlink_to(root / "gone.jpg")
    splits = open_folder(root, holdout=0)
    assert names(splits.train, root) == ["a.jpg"]
    assert splits.remarks == ("Left out: links that lead nowhere or in a circle, and special files (1): b.jpg.",)


def test_the_root_itself_may_be_a_link(plant, tmp_path):
    plant("a.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "photos")
    assert len(open_folder(tmp_path / "link", holdout=0).train) == 1


def test_a_folder_that_cannot_be_listed_is_named_and_the_rest_is_read(plant, monkeypatch):
    root = plant("a.jpg", "closed/b.jpg")
    scandir = os.scandir

    def refuse(path):
        if "closed" in os.fspath(path):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    splits = open_folder(root, holdout=0)
    assert names(splits.train, root) == ["a.jpg"]
    assert splits.remarks == ("Left out: folders that cannot be read (1): closed/ (Permission denied).",)


# Classes


def test_sub_folders_are_classes_in_sorted_order(plant):
    train = open_folder(plant("dog/1.jpg", "cat/2.jpg", "cat/deep/er/3.jpg", "Ant/4.jpg"), holdout=0).train
    assert train.classes == ("Ant", "cat", "dog")
    assert train.labels.dtype == torch.int64
    assert train.labels.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize(
    "files",
    [
        ("1.jpg", "2.jpg"),
        ("cat/1.jpg", "dog/2.jpg", "3.jpg", "4.jpg"),
        ("cat/1.jpg", "cat/2.jpg"),
        ("val/1.jpg", "test/2.jpg"),
    ],
    ids=["flat", "images beside the folders", "one folder", "folders named like splits"],
)
def test_without_two_class_folders_there_are_no_labels(plant, files):
    train = open_folder(plant(*files), holdout=0).train
    assert train.labels is None
    assert train.classes is None
    assert len(train) == len(files)


def test_empty_class_folders_are_ignored_and_named(plant):
    root = plant("cat/1.jpg", "dog/2.jpg", "notes/readme.txt")
    (root / "empty").mkdir()
    splits = open_folder(root, holdout=0)
    assert splits.train.classes == ("cat", "dog")
    assert "photos: class folders without images are ignored: empty, notes." in splits.remarks


def test_empty_class_folders_of_a_split_are_ignored_and_named(plant):
    splits = open_folder(plant("train/cat/1.jpg", "train/dog/2.jpg", "val/dog/3.jpg", "train/cow/readme.txt"))
    assert splits.train.classes == ("cat", "dog")
    assert "train/: class folders without images are ignored: cow." in splits.remarks


# Splits


def test_train_and_val_are_the_two_splits(plant):
    root = plant("train/cat/1.jpg", "train/dog/2.jpg", "train/dog/3.jpg", "val/dog/4.jpg")
    train, test, *_ = open_folder(root)
    assert names(train, root) == ["train/cat/1.jpg", "train/dog/2.jpg", "train/dog/3.jpg"]
    assert names(test, root) == ["val/dog/4.jpg"]
    assert train.classes == test.classes == ("cat", "dog")
    assert test.labels.tolist() == [1]  # by train's classes, though val has only one
    assert train.name == test.name == "photos (3 + 1)"


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Test"])
def test_a_held_out_split_may_have_any_of_its_usual_names(plant, name):
    root = plant("Train/1.jpg", f"{name}/2.jpg")
    train, test, *_ = open_folder(root)
    assert names(train, root) == ["Train/1.jpg"]
    assert names(test, root) == [f"{name}/2.jpg"]
    assert test.labels is None


@pytest.mark.parametrize(("val", "test"), [("val", "test"), ("Valid", "testing"), ("validation", "TEST")])
def test_with_both_val_and_test_choices_are_made_on_the_one_and_scores_on_the_other(plant, val, test):
    root = plant("train/cat/1.jpg", "train/dog/2.jpg", "train/dog/3.jpg", f"{val}/dog/4.jpg", f"{test}/cat/5.jpg")
    splits = open_folder(root)
    assert names(splits.train, root) == ["train/cat/1.jpg", "train/dog/2.jpg", "train/dog/3.jpg"]
    assert names(splits.validation, root) == [f"{val}/dog/4.jpg"]
    assert names(splits.test, root) == [f"{test}/cat/5.jpg"]
    assert splits.validation.labels.tolist() == [1]
    assert splits.test.labels.tolist() == [0]
    assert {source.name for source in splits[:3]} == {"photos (3 + 1 + 1)"}
    assert {source.classes for source in splits[:3]} == {("cat", "dog")}
    assert splits.remarks == ()


@pytest.mark.parametrize("name", ["val", "test"])
def test_one_held_out_folder_is_for_scores_and_none_is_for_choices(plant, name):
    splits = open_folder(plant("train/1.jpg", f"{name}/2.jpg"))
    assert len(splits.test) == 1
    assert splits.validation is None


def test_images_outside_the_splits_are_counted_and_named(plant):
    root = plant("train/1.jpg", "test/2.jpg", "test/3.jpg", "val/4.jpg", "valid/5.jpg", "6.jpg")
    splits = open_folder(root)
    assert names(splits.validation, root) == ["val/4.jpg"]
    assert names(splits.test, root) == ["test/2.jpg", "test/3.jpg"]
    outside = "2 of 6 images (33.3 %) outside train/, val/ and test/ are not used: those in 6.jpg, valid/."
    assert splits.remarks == (outside,)


def test_train_alone_is_held_out_from(plant):
    root = plant(*(f"train/{n}.jpg" for n in range(40)))
    train, test, *_ = open_folder(root)
    assert (len(train), len(test)) == (38, 2)
    assert set(names(train, root)) | set(names(test, root)) == {f"train/{n}.jpg" for n in range(40)}


def test_opening_train_itself_holds_out_the_same_images(plant):
    root = plant(*(f"train/{n}.jpg" for n in range(40)))
    assert names(open_folder(root).test, root) == names(open_folder(root / "train").test, root)


def test_a_class_called_train_is_a_class_when_there_is_no_test_split(plant):
    train = open_folder(plant("train/1.jpg", "car/2.jpg", "plane/3.jpg"), holdout=0).train
    assert train.classes == ("car", "plane", "train")


def test_a_class_in_val_that_train_has_not_is_a_data_error_that_names_it(plant):
    root = plant("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "val/Dog/4.jpg", "val/cow/5.jpg")
    with pytest.raises(DataError, match=r"val has classes that train/ has not: Dog, cow \(train/ has cat, dog\)"):
        open_folder(root)


def test_the_classes_of_val_and_test_are_both_checked(plant):
    root = plant("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg", "test/cow/4.jpg")
    with pytest.raises(DataError, match=r"test has classes that train/ has not: cow \(train/ has cat, dog\)"):
        open_folder(root)
    (root / "val" / "cat").rename(root / "val" / "eel")
    (root / "test" / "cow").rename(root / "test" / "cat")
    with pytest.raises(DataError, match=r"val has classes that train/ has not: eel"):
        open_folder(root)


def test_labels_of_val_alone_are_no_labels(plant):
    splits = open_folder(plant("train/1.jpg", "val/cat/2.jpg", "val/dog/3.jpg"))
    assert splits.train.labels is None
    assert splits.test.labels is None
    assert splits.remarks == ("train/ has no two class folders: the labels of val/ (cat, dog) are not used.",)


def test_an_empty_train_beside_a_full_val_is_a_data_error(plant):
    root = plant("val/1.jpg")
    (root / "train").mkdir()
    with pytest.raises(DataError, match="train holds no images, and val/ beside it does"):
        open_folder(root)


# Holding out


def test_the_same_images_are_held_out_on_every_machine(plant):
    root = plant(*(f"{n}.jpg" for n in range(20)))
    assert names(open_folder(root, holdout=0.2).test, root) == ["1.jpg", "11.jpg", "12.jpg", "15.jpg"]


def test_held_out_images_keep_their_labels(plant):
    root = plant(*(f"{'cat' if n % 2 else 'dog'}/{n}.jpg" for n in range(20)))
    train, test, *_ = open_folder(root, holdout=0.3)
    for source in (train, test):
        assert source.classes == ("cat", "dog")
        expected = [("cat", "dog").index(name.split("/")[0]) for name in names(source, root)]
        assert source.labels.tolist() == expected
    assert (len(train), len(test)) == (14, 6)


def test_those_with_the_lowest_hashes_are_held_out_and_of_equal_ones_the_first():
    keys = [f"{number % 90}.jpg" for number in range(100)]
    digests = [blake2b(key.encode(), digest_size=8).digest() for key in keys]
    lowest = sorted(range(100), key=digests.__getitem__)[:95]
    assert hold_out(iter(keys), 0.95, 100).nonzero()[0].tolist() == sorted(lowest)


def test_the_held_out_fraction_is_exact_at_least_one_and_at_most_5000():
    keys = [f"{n}.jpg" for n in range(200_000)]
    assert hold_out(keys[:1000], 0.05).sum() == 50
    assert hold_out(keys[:3], 0.05).sum() == 1
    assert hold_out(keys, 0.05).sum() == 5000
    assert hold_out(keys[:1], 0.9).sum() == 0  # the only image is for training
    assert hold_out(keys, 0).sum() == 0


def test_few_images_change_sides_when_some_are_added():
    keys = [f"{n}.jpg" for n in range(2200)]
    before, after = hold_out(keys[:2000], 0.1), hold_out(keys, 0.1)
    assert (before & ~after[:2000]).sum() + (after[:2000] & ~before).sum() < 30


def test_nothing_is_held_out_when_asked_so(plant):
    train, test, *_ = open_folder(plant("1.jpg", "2.jpg"), holdout=0)
    assert test is None
    assert len(train) == 2
    assert train.name == "photos (2)"


@pytest.mark.parametrize("holdout", [-0.1, 0.91, float("nan"), 5])
def test_a_holdout_out_of_range_is_a_usage_error(plant, holdout):
    with pytest.raises(UsageError, match=r"data\.holdout is the fraction .* from 0 to 0\.9"):
        open_folder(plant("1.jpg"), holdout=holdout)


# Nothing to read


def test_a_missing_folder_a_file_and_a_folder_without_images_are_data_errors(plant, tmp_path):
    with pytest.raises(DataError, match=r"nowhere does not exist\. Set data\.root"):
        open_folder(tmp_path / "nowhere")
    (tmp_path / "photos.zip").touch()
    with pytest.raises(DataError, match=r"photos\.zip cannot be read as a zip or tar file"):
        open_folder(tmp_path / "photos.zip")
    (tmp_path / "photos.rar").touch()
    with pytest.raises(DataError, match=r"photos\.rar is a file, not a folder: unpack it"):
        open_folder(tmp_path / "photos.rar")
    with pytest.raises(DataError, match=r"No images in .*photos\. Nothing is there\. Expected files ending in \.jpg"):
        open_folder(plant())
    root = plant("a.csv", "b/c.csv", "notes", ".cache/d.jpg")
    with pytest.raises(DataError, match=r"2 \.csv, 1 without an extension\. Left out: hidden .* \(1\): \.cache\."):
        open_folder(root)


def test_less_than_one_channel_is_a_usage_error(plant):
    with pytest.raises(UsageError, match=r"data\.channels must be at least 1"):
        open_folder(plant("1.jpg"), channels=0)


# Reading


def test_reading_gives_the_pixels_in_the_channels_asked_for(plant):
    root = plant()
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    Image.fromarray(pixels).save(root / "a.png")
    train = open_folder(root, holdout=0).train
    assert (train.channels, train.images) == (3, None)
    assert np.array_equal(train.read(0).permute(1, 2, 0).numpy(), pixels)
    assert open_folder(root, holdout=0, channels=1).train.read(0).shape == (1, 4, 4)


def test_settings_of_decoding_reach_the_decoder(plant):
    root = plant()
    Image.new("RGB", (64, 64)).save(root / "a.jpg")
    assert open_folder(root, holdout=0, at_least=16).train.read(0).shape == (3, 16, 16)
    with pytest.raises(UnreadableImage, match=r"more than the limit data\.max_pixels=4000"):
        open_folder(root, holdout=0, max_pixels=4000).train.read(0)


def test_an_unreadable_image_is_met_when_it_is_read(plant):
    with pytest.raises(UnreadableImage, match="the file is empty"):
        open_folder(plant("a.jpg"), holdout=0).train.read(0)


def test_describe_is_the_absolute_path_and_knows_the_end(plant, monkeypatch):
    root = plant("a.jpg", "b.jpg")
    monkeypatch.chdir(root.parent)
    train = open_folder("photos", holdout=0).train
    assert train.describe(1) == str(root / "b.jpg")
    with pytest.raises(IndexError):
        train.describe(2)


def test_a_source_is_small_when_it_is_sent_to_a_worker(plant):
    root = plant(*(f"cat/{n:07}.jpg" for n in range(500)), *(f"dog/{n:07}.jpg" for n in range(500)))
    train = open_folder(root, holdout=0).train
    sent = pickle.dumps(train)
    assert len(sent) < 1000 * (len("cat/0000000.jpg") + 24) + 2000  # the name, its end and its label
    received = pickle.loads(sent)
    assert names(received, root) == names(train, root)


def test_a_good_folder_is_opened_without_a_word(plant):
    splits = open_folder(plant("train/cat/1.jpg", "train/dog/2.jpg", "val/dog/4.jpg", ".DS_Store", "val/dog/._4.jpg"))
    assert splits.remarks == ()
