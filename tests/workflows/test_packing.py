"""Packing images into shards: what is in them, that what is whole is not written again, and what their reader checks."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from sslvision.data import shard_index, shard_writer
from sslvision.data.archive import members_of
from sslvision.data.image_bytes import image_file
from sslvision.data.sources.digits import open_digits
from sslvision.data.sources.folder import open_folder
from sslvision.data.sources.webdataset import open_webdataset
from sslvision.errors import DataError, UsageError
from sslvision.workflows.packing import pack as pack_images
from sslvision.workflows.packing_settings import size_of


@pytest.fixture
def photos(tmp_path):
    """Nine images of two classes, each larger than the one before, and two to test on."""
    rng = np.random.default_rng(0)
    for number in range(11):
        folder = tmp_path / "photos" / ("train" if number < 9 else "val") / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20 + 4 * number, 30 + 4 * number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{'png' if number % 3 else 'jpg'}")
    return tmp_path / "photos"


@pytest.fixture
def pack(settings_of, photos, tmp_path):
    """Pack into a folder: pack("shard_size=4", ...) -> its path."""

    def call(*words, to="shards"):
        given = {word.split("=")[0] for word in words}
        usual = [f"data={photos}", "data.channels=3", "shard_size=4", "workers=0", f"output_dir={tmp_path / to}"]
        pack_images(settings_of("pack", *[word for word in usual if word.split("=")[0] not in given], *words))
        return tmp_path / to

    return call


def read(shards, **options):
    return open_webdataset(str(shards), index_dir=str(shards.parent / "index"), **options)


def shards_in(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def test_a_shard_has_the_bytes_of_the_files_their_labels_and_paths(pack, photos):
    shards = pack()
    assert list(shards_in(shards)) == ["train/train-000000.tar", "train/train-000001.tar", "train/train-000002.tar",
                                       "val/val-000000.tar"]  # fmt: skip
    with tarfile.open(shards / "train" / "train-000001.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    about = json.loads(files["000000004.json"])
    assert about == {"path": "train/cat/7.png", "label": "cat"} or about["path"].startswith("train/")
    ending = about["path"].rpartition(".")[2]
    assert files[f"000000004.{ending}"] == (photos / about["path"]).read_bytes()
    assert (shards / "train" / "classes.txt").read_text().splitlines()[int(files["000000004.cls"])] == about["label"]


def test_only_larger_images_are_shrunk_and_the_others_keep_their_bytes(pack, photos):
    shards, original = pack("image_size=40", "format=png"), open_folder(photos).train
    train = read(shards).train
    for index in range(len(original)):
        found, image = train.read(index), original.read(index)
        assert min(found.shape[1:]) == min(40, *image.shape[1:])
        if min(image.shape[1:]) <= 40:
            assert torch.equal(found, image)
    assert any(min(original.read(index).shape[1:]) > 40 for index in range(len(original)))


def test_images_without_files_are_packed_without_loss(pack):
    shards, digits = pack("data=digits", "data.channels=1", "shard_size=600"), open_digits()
    splits = read(shards, channels=1)
    for packed, source in ((splits.train, digits.train), (splits.test, digits.test)):
        assert packed.classes == source.classes
        assert torch.equal(packed.labels, source.labels)
        assert all(torch.equal(packed.read(index), source.read(index)) for index in range(0, len(source), 97))


def test_an_interrupted_command_goes_on_to_the_same_bytes_and_leaves_whole_shards_alone(pack, monkeypatch):
    expected = shards_in(pack(to="uninterrupted"))
    image_file, read_so_far = shard_writer.image_file, []

    def until_the_sixth(source, index, **options):
        if len(read_so_far) == 6:
            raise OSError(28, "No space left on device")
        read_so_far.append(index)
        return image_file(source, index, **options)

    monkeypatch.setattr(shard_writer, "image_file", until_the_sixth)
    with pytest.raises(OSError, match="No space"):
        pack()
    monkeypatch.setattr(shard_writer, "image_file", lambda *given, **options: (
        read_so_far.append(given[1]), image_file(*given, **options))[1])  # fmt: skip
    read_so_far.clear()
    assert shards_in(pack()) == expected
    assert read_so_far == [*range(4, 9), 0, 1]
    read_so_far.clear()
    pack()
    assert read_so_far == []


def test_a_shard_that_is_gone_or_cut_off_is_written_again(pack):
    shards = pack()
    expected = shards_in(shards)
    (shards / "train" / "train-000001.tar").unlink()
    (shards / "val" / "val-000000.tar").write_bytes(expected["val/val-000000.tar"][:-100])
    assert shards_in(pack()) == expected


def test_shards_of_other_settings_are_refused_or_replaced_and_other_files_never_deleted(pack, tmp_path):
    shards = pack()
    with pytest.raises(UsageError, match="shards of other images, labels or settings"):
        pack("shard_size=5")
    pack("shard_size=5", "overwrite=true")
    assert len(shards_in(shards)) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"something else than packed shards \(notes.txt\)"):
        pack("overwrite=true", to="mine")


def test_labels_that_were_corrected_are_not_those_of_shards_from_before(pack, tmp_path, photos):
    files = sorted(photos.rglob("*.*"))
    listed = tmp_path / "images.csv"
    words = ("data=list", f"data.file={listed}", "data.holdout=0")

    def write(label):
        listed.write_text("path,label\n" + "".join(f"{file},{label(file)}\n" for file in files))

    write(lambda file: file.parent.name)
    pack(*words)
    write(lambda file: {"cat": "dog", "dog": "cat"}.get(file.parent.name, file.parent.name))
    with pytest.raises(UsageError, match="shards of other images, labels or settings"):
        pack(*words)


def test_images_of_16_bits_that_are_not_shrunk_have_the_range_of_those_that_are(tmp_path):
    for number, side in enumerate((20, 40, 20, 40)):
        values = np.full((side, side), 500 if side == 20 else 4000, np.uint16)
        values[0] = 0
        Image.fromarray(values).save(tmp_path / f"{number}.png")
    source = open_folder(tmp_path, holdout=0, channels=1).train
    files = [image_file(source, index, side=24, encoding="png", quality=95) for index in range(4)]
    packed = [np.array(Image.open(io.BytesIO(file.content))) for file in files]
    assert {image.dtype for image in packed} == {np.dtype(np.uint8)}
    expected = [31, 249, 31, 249]  # of 255, for 500 and 4,000 of 0 to 4,095
    assert [int(source.read(index).median()) for index in range(4)] == expected
    assert [int(np.median(image)) for image in packed] == expected


def test_what_cannot_be_read_is_left_out_and_named_until_it_is_too_much(pack, photos):
    (photos / "train" / "cat" / "empty.jpg").touch()
    shards = pack("max_unreadable=0.2")
    assert "train/cat/empty.jpg,the file is empty" in (shards / "unreadable.csv").read_text()
    assert len(read(shards).train) == 9
    with pytest.raises(DataError, match=r"train/cat/empty.jpg \(the file is empty\).*max_unreadable=0.05"):
        pack("max_unreadable=0.05", to="others")


def test_the_reader_names_shards_that_are_missing_cut_off_or_damaged(pack):
    shards = pack()
    first, second = shards / "train" / "train-000000.tar", shards / "train" / "train-000001.tar"
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(DataError, match=r"1 of 4 shards do not exist: .*train-000001.tar"):
        read(shards)
    second.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"sizes.*train-000001.tar \([\d,]+ bytes instead of"):
        read(shards)
    second.write_bytes(content)
    assert len(read(shards, verify=True).train) == 9
    flipped = bytearray(first.read_bytes())
    flipped[700] ^= 1
    first.write_bytes(flipped)
    with pytest.raises(DataError, match=r"1 of 4 shards do not have the checksums of index.json: .*train-000000.tar"):
        read(shards, verify=True)


def test_the_reader_takes_counts_and_places_from_the_index_and_without_it_from_the_shards(pack, monkeypatch):
    shards, opened = pack(), []
    monkeypatch.setattr(shard_index, "members_of", lambda file: opened.append(file) or members_of(file))
    expected = read(shards).train
    assert opened == []
    (shards / "train" / "train-000001.members.npz").write_bytes(b"damaged")
    again = read(shards).train
    assert [os.path.basename(file) for file in opened] == ["train-000001.tar"]
    (shards / "index.json").unlink()
    shutil.rmtree(shards.parent / "index")
    plain = read(shards).train
    for found in (again, plain):
        assert found.labels.tolist() == expected.labels.tolist()
        assert found.classes == expected.classes == ("cat", "dog")
        assert all(torch.equal(found.read(index), expected.read(index)) for index in range(9))
    with pytest.raises(UsageError, match="sslvision pack writes one"):
        read(shards, verify=True)


def test_parquet_shards_have_the_same_images_labels_and_splits_and_keep_bytes_and_paths(pack, photos):
    parquet = pytest.importorskip("pyarrow.parquet")
    shards = pack("shards=parquet")
    names = sorted(path.relative_to(shards).as_posix() for path in shards.rglob("*.*"))
    assert [name for name in names if name.endswith(".parquet")] == [
        *(f"train/train-00000{number}.parquet" for number in range(3)),
        "val/val-000000.parquet",
    ]
    rows = [row for name in names if name.endswith(".parquet") for row in parquet.read_table(shards / name).to_pylist()]
    assert len(rows) == 11
    for row in rows:
        path = row["image"]["path"]
        assert row["image"]["bytes"] == (photos / path).read_bytes()
        assert row["label"] == ["cat", "dog"].index(path.split("/")[1])
    again = pack("shards=parquet", to="again")
    assert all((again / name).read_bytes() == (shards / name).read_bytes() for name in names if "." in name[-8:])


def test_parquet_shards_are_read_as_a_hugging_face_data_set(pack, photos):
    pytest.importorskip("datasets")
    from sslvision.data.sources.hugging_face import open_hugging_face

    shards = pack("shards=parquet")
    found, expected = open_hugging_face(str(shards)), open_folder(photos)
    for one, other in (
        (found.train, expected.train),
        (found.validation or found.test, expected.validation or expected.test),
    ):
        assert (one.classes, one.labels.tolist()) == (other.classes, other.labels.tolist())
        assert all(torch.equal(one.read(index), other.read(index)) for index in range(len(other)))
    with pytest.raises(UsageError, match=r"data=hf data\.path"):
        read(shards)
    with open(shards / "train" / "train-000001.parquet", "ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match=r"1 of 4 shards do not have the sizes .*train-000001"):
        open_hugging_face(str(shards))
    (shards / "train" / "train-000001.parquet").unlink()
    with pytest.raises(DataError, match=r"1 of 4 shards do not exist: .*train-000001"):
        open_hugging_face(str(shards))


def test_an_index_of_another_program_is_none(pack):
    shards = pack()
    (shards / "index.json").write_text("<html>not ours")
    assert len(read(shards).train) == 9
    (shards / "index.json").write_text('{"format": "sslvision shards", "version": 1, "shards": [')
    with pytest.raises(DataError, match=r"index.json is damaged"):
        read(shards)


def test_the_size_of_a_shard_is_a_number_of_images_or_of_bytes():
    assert [size_of(text) for text in ("1000", "256MB", "1.5 gb")] == [
        (1000, "images"), (256_000_000, "bytes"), (1_500_000_000, "bytes")]  # fmt: skip
    for wrong in ("0", "1.5", "12KB", "-3"):
        with pytest.raises(UsageError, match="number of images, such as 1000, or a size"):
            size_of(wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "No images: say data=photos"),
        (("data=digits",), "output_dir is not given"),
        (("data=digits", "output_dir=a", "data.cache=disk"), "data.cache is not for packing"),
        (("data=digits", "output_dir=a", "data.workers=2"), "data.workers is the setting workers here: say workers=2"),
        (("data=digits", "output_dir=a", "quality=0"), "quality=0"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_read(words, message, settings_of):
    with pytest.raises(UsageError, match=message):
        settings_of("pack", *words)
