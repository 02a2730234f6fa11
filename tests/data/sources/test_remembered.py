"""A folder of many images is listed once; later, only what has changed in it."""

import os
import pickle
import shutil
import threading

import pytest

from sslvision.data.encoded import PathTable
from sslvision.data.sources import folder as folder_module
from sslvision.data.sources import list_file, remembered, scanning
from sslvision.data.sources.folder import open_folder
from sslvision.data.sources.list_file import open_list
from sslvision.errors import DataError


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


# Lists


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Return a Parquet list of images with classes, splits, and a repeated row; any list counts as large and settled."""
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setattr(remembered, "LARGE", 1)
    monkeypatch.setattr(scanning, "SETTLED", -(10**18))
    names = [f"{'é' * (number % 3)}{number}" for number in range(12)]
    for name in names:
        (tmp_path / f"{name}.jpg").touch()
    rows = {"image": [*names, names[3]], "label": [*"ab" * 6, "b"], "split": [*["train", "val", "test"] * 4, "train"]}
    parquet.write_table(pa.table(rows), tmp_path / "images.parquet", row_group_size=5)
    return tmp_path / "images.parquet"


def shown(splits):
    parts = [one for one in splits if hasattr(one, "labels")]
    images = [[(one.describe(index), int(one.labels[index])) for index in range(len(one))] for one in parts]
    return images, [part.name for part in parts], [part.classes for part in parts], splits.remarks


OPTIONS = {"column": "image", "suffix": ".jpg"}


def test_a_parquet_list_by_columns_has_what_it_has_row_by_row(table, monkeypatch):
    def opened():
        return shown(open_list(table, index_dir=str(table.parent / "nowhere" / str(len(done))), **OPTIONS))

    done = []
    done.append(opened())
    monkeypatch.setattr(list_file, "has_columns", lambda *_: False)
    done.append(opened())
    assert done[0] == done[1]
    assert "repeat an image" in " ".join(done[0][3])
    assert [len(images) for images in done[0][0]] == [4, 4, 4]


def test_a_list_is_read_once_and_again_when_it_changes(table, tmp_path, monkeypatch):
    def opened():
        return shown(open_list(table, index_dir=str(tmp_path / "index"), **OPTIONS))

    first = opened()
    with monkeypatch.context() as patched:
        patched.setattr(list_file, "_read", None)
        assert opened() == first
        with pytest.raises(TypeError):
            open_list(table, index_dir=str(tmp_path / "index"), **OPTIONS, label="none")
    os.utime(table)  # rewritten
    monkeypatch.setattr(list_file, "_read", None)
    with pytest.raises(TypeError):
        opened()


def test_a_row_without_a_path_is_named_whatever_the_batch(table):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = [f"{number}.jpg" for number in range(9)]
    for missing in (None, ""):
        parquet.write_table(pa.table({"path": [*paths, missing, "z.jpg"]}), table, row_group_size=4)
        with pytest.raises(DataError, match=r"row 10 has no path"):
            open_list(table, split="none")


def test_paths_have_a_hash_each_of_all_their_bytes():
    paths = [f"{'x' * length}{end}" for length in range(30) for end in ("", "a", "b", "ab")] + ["", "é", "\0", "\0\0"]
    paths = list(dict.fromkeys(paths))
    whole = PathTable.of(paths)
    hashes = whole.hashes()
    assert len(set(hashes.tolist())) == len(paths)
    for index in (0, 1, 5, 50, len(paths) - 1):  # neither what stands before nor behind matters
        assert PathTable.of([paths[index]]).hashes()[0] == hashes[index]
        assert PathTable.of(["before", paths[index], "behind"]).hashes()[1] == hashes[index]
