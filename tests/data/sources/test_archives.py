import io
import tarfile
import zipfile

import pytest
from PIL import Image

from sslvision.data.source import SourceGone, UnreadableImage
from sslvision.data.sources.folder import open_folder
from sslvision.data.sources.shard_files import _ranges, expanded
from sslvision.data.sources.webdataset import open_webdataset
from sslvision.errors import DataError, UsageError


def encoded(gray=0, side=8):
    content = io.BytesIO()
    Image.new("RGB", (side, side), (gray, gray, gray)).save(content, "PNG")
    return content.getvalue()


@pytest.fixture
def zipped(tmp_path):
    """Return a function that writes a zip file of names and contents."""

    def write(files, **options):
        with zipfile.ZipFile(tmp_path / "photos.zip", "w", **options) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return tmp_path / "photos.zip"

    return write


@pytest.fixture
def shard(tmp_path):
    """Return a function that writes a tar file of names and contents."""

    def write(files, name="train-000000.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, content in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return tmp_path / name

    return write


def opened(path, **options):
    return open_webdataset(str(path), **{"holdout": 0, "index_dir": str(path.parent / "index"), **options})


# Zip files as folders


def test_what_is_left_out_of_an_archive_is_said_as_of_a_folder(zipped):
    images = {f"{name}/{number}.png": encoded(number) for name in ("cat", "dog") for number in range(2)}
    splits = open_folder(zipped(images | {"__MACOSX/cat/._0.png": b"x", "notes.csv": b"a,b"}), holdout=0)
    assert splits.train.classes == ("cat", "dog")
    assert len(splits.train) == 4
    assert "1 of 5 files (20 %), not being images that can be read: 1 .csv" in splits.remarks[0]
    assert "are the same picture in folders of two or more classes" in " ".join(splits.remarks)


def test_an_unreadable_image_is_named_by_archive_and_member(zipped):
    path = zipped({"a/0.png": encoded(), "a/1.png": b"no image", "a/2.png": encoded(9)})
    source = open_folder(path, holdout=0).train
    assert source.describe(1) == f"{path}/a/1.png"
    with pytest.raises(UnreadableImage, match="the content is not an image"):
        source.read(1)
    content = path.read_bytes()
    at = content.index(encoded(9))
    path.write_bytes(content[: at + 60] + b"\x55" + content[at + 61 :])
    with pytest.raises(UnreadableImage, match="checksum"):
        source.read(2)


def test_an_archive_that_disappears_ends_the_run(zipped):
    path = zipped({"0.png": encoded(), "1.png": encoded(1)})
    source = open_folder(path, holdout=0).train
    path.unlink()
    with pytest.raises(SourceGone, match=r"The archive of the images is gone: .*photos\.zip"):
        source.read(0)


def test_archives_that_cannot_be_read_one_by_one_are_named(zipped, tmp_path):
    with pytest.raises(DataError, match=r"compressed by method 14 of zip, such as 0\.png: pack it again"):
        open_folder(zipped({"0.png": encoded()}, compression=zipfile.ZIP_LZMA))
    with tarfile.open(tmp_path / "photos.tar", "w:gz") as archive:
        archive.add(tmp_path / "photos.zip")
    with pytest.raises(DataError, match="compressed as a whole"):
        open_folder(tmp_path / "photos.tar")


@pytest.mark.parametrize("length", [600, 1024, 1200, 1600])
def test_a_tar_file_that_was_cut_off_is_refused(shard, length):
    path = shard({"0.png": encoded(), "1.png": encoded(1, 400)})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(
        DataError, match=r"train-000000\.tar (is cut off or damaged|cannot be read as a zip or tar file)"
    ):
        open_folder(path)


# Shards


def test_braces_name_ranges_and_alternatives():
    assert list(_ranges("{a,b}/x-{008..010}.tar")) == [
        f"{one}/x-{number:03d}.tar" for one in "ab" for number in (8, 9, 10)
    ]


def test_missing_shards_are_named(shard):
    path = shard({"0.png": encoded()})
    with pytest.raises(DataError, match=r"2 of 3 shards do not exist: .*train-000001\.tar, .*train-000002\.tar"):
        expanded(f"{path.parent}/train-{{000000..000002}}.tar")


def test_a_shard_that_is_named_twice_is_read_once(shard):
    path = shard({f"{number}.png": encoded(number) for number in range(3)})
    splits = open_webdataset([str(path), f"{path.parent}/*.tar"], holdout=0, index_dir=str(path.parent / "index"))
    assert len(splits.train) == 3
    assert "1 shards are named more than once" in splits.remarks[0]


def test_shards_named_as_held_out_among_others_without_such_a_name_are_said_to_be_for_training(shard):
    for name in ("all/train-000.tar", "all/val-000.tar", "all/extra-000.tar"):
        path = shard({"0.png": encoded(), "1.png": encoded(1)}, name)
    splits = opened(path.parent)
    assert (len(splits.train), splits.test) == (6, None)
    assert any("All shards are for training, also 1 named as held out" in remark for remark in splits.remarks)


def test_a_hard_link_in_a_tar_file_is_an_image_as_in_the_folder(tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        for name in ("a", "b"):
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(encoded(ord(name)))
            archive.addfile(info, io.BytesIO(encoded(ord(name))))
        link = tarfile.TarInfo("c.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    source = open_folder(tmp_path / "photos.tar", holdout=0).train
    assert [int(source.read(place)[0, 0, 0]) for place in range(len(source))] == [97, 98, 97]


def test_classes_of_a_windows_editor_are_those_that_are_seen(shard):
    path = shard({"0.png": encoded(), "0.cls": b"0", "1.png": encoded(1), "1.cls": b"1"})
    (path.parent / "classes.txt").write_bytes("\ufeffcat\r\ndog\r\n\r\n".encode())
    assert opened(path).train.classes == ("cat", "dog")


def test_labels_are_of_cls_or_of_a_key_of_json_or_of_none(shard):
    files = {}
    for number, name in enumerate(("cat", "dog")):
        files |= {f"{number}.png": encoded(number), f"{number}.cls": str(1 - number).encode()}
        files |= {f"{number}.json": f'{{"species": "{name}"}}'.encode()}
    path = shard(files)
    assert opened(path).train.labels.tolist() == [1, 0]
    by_key = opened(path, label="species").train
    assert (by_key.classes, by_key.labels.tolist()) == (("cat", "dog"), [0, 1])
    assert opened(path, label="none").train.labels is None
    with pytest.raises(UsageError, match=r"data\.label=kind: no sample has such a file"):
        opened(path, label="kind")
    (path.parent / "classes.txt").write_text("zebra\nant\n")
    assert opened(path).train.classes == ("zebra", "ant")


def test_several_labels_and_several_images_of_a_sample_are_refused(shard):
    with pytest.raises(DataError, match="several labels each"):
        opened(shard({"0.png": encoded(), "0.json": b'{"labels": [1, 2]}'}))
    path = shard({"0.png": encoded(), "0.jpg": encoded(), "1.seg.png": encoded()})
    with pytest.raises(UsageError, match=r"sample 0 has several images \(png, jpg\): say which, data\.column="):
        opened(path)
    splits = opened(path, column="png")
    assert len(splits.train) == 1
    assert "1 of 2 samples (50 %) in the shards have no image" in splits.remarks[0]


def test_shards_named_like_splits_are_splits(shard):
    shard({"0.png": encoded()})
    path = shard({"1.png": encoded(1)}, "val-000000.tar")
    splits = open_webdataset(str(path.parent), index_dir=str(path.parent / "index"))
    assert (splits.train.describe(0), splits.test.describe(0)) == (
        f"{path.parent}/train-000000.tar/0.png",
        f"{path}/1.png",
    )
    assert splits.remarks == ("By their names, shards are of several splits: 1 train, 1 validation.",)
    with pytest.raises(UsageError, match="among the shards of two splits"):
        open_webdataset(str(path), test_urls=str(path))
