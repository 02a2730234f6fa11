"""A folder of many images is listed once; later, only what has changed in it."""

import os
import pickle
import shutil
import threading

import pytest

from sslvision.data.sources import folder as folder_module
from sslvision.data.sources import remembered, scanning
from sslvision.data.sources.folder import open_folder


@pytest.fixture
def photos(plant, monkeypatch):
    """Return a folder of images of two classes, of which more than one are many, and whose times are believed at once."""
    monkeypatch.setattr(remembered, "MANY", 1)
    monkeypatch.setattr(scanning, "SETTLED", -(10**18))
    return plant("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/deep/3.jpg", "dog/note.txt")


@pytest.fixture
def start(photos, tmp_path, monkeypatch):
    """Return a function that opens the folder, and returns the splits and which folders were listed."""
    listed, scandir = [], os.scandir

    def listing(path):
        if str(path).startswith(str(photos)):
            listed.append(os.path.relpath(path, photos))
        return scandir(path)

    def begin(**options):
        listed.clear()
        with monkeypatch.context() as patched:
            patched.setattr(scanning.os, "scandir", listing)
            splits = open_folder(photos, index_dir=str(tmp_path / "index"), **{"holdout": 0, **options})
        return splits, sorted(listed)

    return begin


def names(splits, root):
    return [os.path.relpath(splits.train.describe(index), root) for index in range(len(splits.train))]


ALL = [".", "cat", "dog", "dog/deep"]


def test_a_second_start_lists_nothing_and_finds_the_same(start, photos):
    first, listed = start()
    assert listed == ALL
    second, listed = start()
    assert listed == []
    assert names(first, photos) == names(second, photos) == ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/deep/3.jpg"]
    assert first.remarks == second.remarks
    assert "1 .txt" in first.remarks[0]
    assert first.train.labels.tolist() == second.train.labels.tolist() == [0, 0, 1, 1]
    assert first.train.classes == second.train.classes == ("cat", "dog")


def test_what_is_remembered_is_what_would_be_found(start, photos, monkeypatch):
    kept = start(holdout=0.5)[0]
    monkeypatch.setattr(remembered, "MANY", 100)
    found = open_folder(photos, holdout=0.5, index_dir=str(photos / "nowhere"))
    assert not (photos / "nowhere").exists()
    for one, other in ((kept.train, found.train), (kept.test, found.test)):
        assert [one.describe(i) for i in range(len(one))] == [other.describe(i) for i in range(len(other))]
        assert one.labels.tolist() == other.labels.tolist()
        assert (one.name, one.classes) == (other.name, other.classes)
    assert kept.remarks == found.remarks


def test_only_a_folder_that_has_changed_is_listed_again(start, photos):
    start()
    (photos / "cat" / "1.jpg").rename(photos / "cat" / "0.jpg")
    splits, listed = start()
    assert listed == ["cat"]
    assert names(splits, photos)[0] == "cat/0.jpg"
    shutil.rmtree(photos / "dog" / "deep")
    splits, listed = start()
    assert listed == ["dog"]
    assert names(splits, photos) == ["cat/0.jpg", "cat/2.jpg", "dog/1.jpg"]
    (photos / "dog" / "new").mkdir()
    (photos / "dog" / "new" / "5.jpg").touch()
    splits, listed = start()
    assert listed == ["dog", "dog/new"]
    assert "dog/new/5.jpg" in names(splits, photos)


def test_times_that_are_set_back_do_not_hide_a_change(start, photos):
    before = os.stat(photos / "cat")
    start()
    (photos / "cat" / "9.jpg").touch()
    os.utime(photos / "cat", ns=(before.st_atime_ns, before.st_mtime_ns))
    splits, listed = start()
    assert listed == ["cat"]
    assert "cat/9.jpg" in names(splits, photos)


def test_a_folder_that_changed_as_it_was_listed_is_listed_again(start, photos, monkeypatch):
    monkeypatch.setattr(scanning, "SETTLED", 2_000_000_000)  # the folders are younger than that
    start()
    assert start()[1] == ALL
    monkeypatch.setattr(scanning, "SETTLED", -(10**18))
    assert start()[1] == ALL  # and now their times are kept
    assert start()[1] == []


def test_a_folder_with_links_is_listed_every_time(start, photos, tmp_path):
    (tmp_path / "elsewhere.jpg").touch()
    (photos / "cat" / "link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    assert "cat/link.jpg" in names(start()[0], photos)
    (tmp_path / "elsewhere.jpg").unlink()
    splits, listed = start()
    assert listed == ["cat"]
    assert "cat/link.jpg" not in names(splits, photos)
    assert any("links that lead nowhere" in remark for remark in splits.remarks)


def test_rescan_lists_all_folders(start):
    start()
    assert start(rescan=True)[1] == ALL


def test_another_holdout_is_decided_without_listing(start):
    start()
    splits, listed = start(holdout=0.5)
    assert listed == []
    assert (len(splits.train), len(splits.test)) == (2, 2)


def test_copies_are_told_by_what_files_hold_now(start, photos):
    assert start()[0].remarks == start()[0].remarks
    for path in ("cat/1.jpg", "dog/1.jpg"):
        (photos / path).write_bytes(bytes(100))  # the folder does not change
    splits, listed = start()
    assert listed == []
    assert any("cat/1.jpg = dog/1.jpg" in remark for remark in splits.remarks)


@pytest.mark.parametrize("damaged", [b"", b"PK\x03\x04 cut off"])
def test_damaged_files_are_found_again(start, photos, tmp_path, damaged):
    expected = names(start()[0], photos)
    files = [file for file in (tmp_path / "index").rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert len(files) > 3
    for file in files:
        file.write_bytes(damaged)
    splits, listed = start()
    assert names(splits, photos) == expected
    assert listed == ALL


def test_where_nothing_can_be_kept_the_images_are_found_and_it_is_said(photos, tmp_path, caplog):
    (tmp_path / "file").touch()
    splits = open_folder(photos, holdout=0, index_dir=str(tmp_path / "file"))
    assert len(splits.train) == 4
    assert "cannot be kept" in caplog.text


def test_the_last_three_decisions_are_kept(start, tmp_path):
    for holdout in (0.1, 0.2, 0.3, 0.4, 0.5):
        start(holdout=holdout)
    assert len([one for one in (tmp_path / "index").iterdir() if one.is_dir()]) == 3
    assert start(holdout=0.5)[1] == []


def test_a_worker_that_is_not_forked_is_sent_names_of_files_and_no_paths(start, photos):
    source = start()[0].train
    source.labels = None
    sent = pickle.dumps(source)
    assert b"1.jpg" not in sent
    assert pickle.loads(sent).describe(3) == str(photos / "dog/deep/3.jpg")


def test_of_two_processes_one_lists_and_decides(photos, tmp_path, monkeypatch):
    decide, inside, go_on, decisions = folder_module._decide, threading.Event(), threading.Event(), []

    def slowly(*arguments):
        decisions.append(threading.current_thread())
        inside.set()
        assert go_on.wait(20)
        return decide(*arguments)

    monkeypatch.setattr(folder_module, "_decide", slowly)
    opened = []

    def begin():
        opened.append(open_folder(photos, holdout=0, index_dir=str(tmp_path / "index")))

    first, second = (threading.Thread(target=begin) for _ in range(2))
    first.start()
    assert inside.wait(20)
    second.start()
    go_on.set()
    first.join()
    second.join()
    assert decisions == [first]
    assert [len(one.train) for one in opened] == [4, 4]
