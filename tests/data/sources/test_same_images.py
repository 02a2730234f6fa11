"""The same images as folder, list, zip, tar, shards and table: the same bytes, labels and batches."""

import csv
import io
import json
import pickle
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sslvision.augment.crops import Crop
from sslvision.cli.compose import compose_settings
from sslvision.cli.recipes import COMMANDS
from sslvision.data import shard_index
from sslvision.data.archive import members_of
from sslvision.data.cache import cached
from sslvision.data.loader import training_loader
from sslvision.data.sampler import EpochBatches
from sslvision.data.sources.folder import open_folder
from sslvision.data.sources.list_file import open_list
from sslvision.data.sources.webdataset import open_webdataset
from sslvision.workflows.packing import pack

CLASSES = ("cat", "dog", "fox")


@pytest.fixture(scope="module")
def paths():
    """Return the paths of 60 images in train/ and 12 in val/, sorted."""
    return [f"{split}/{CLASSES[number % 3]}/{number:02d}.{'png' if number % 5 else 'jpg'}"
            for split, count in (("train", 60), ("val", 12)) for number in range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def folder(paths, tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("same") / "photos", np.random.default_rng(0)
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(20, 50, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(root / path)
    return root


def as_list(folder, paths):
    rows = "".join(f"{path},{path.split('/')[1]},{path.split('/')[0]}\n" for path in sorted(paths))
    (folder.parent / "photos.csv").write_text("path,label,split\n" + rows)
    return open_list(folder.parent / "photos.csv", root=folder)


def as_zip(folder, paths):
    with zipfile.ZipFile(folder.parent / "photos.zip", "w") as archive:
        for number, path in enumerate(reversed(paths)):
            archive.write(folder / path, f"photos/{path}", zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED)
    return open_folder(folder.parent / "photos.zip")


def as_tar(folder, paths):
    with tarfile.open(folder.parent / "photos.tar", "w") as archive:
        archive.add(folder, ".")
    return open_folder(folder.parent / "photos.tar")


def as_shards(folder, paths):
    shards = folder.parent / "shards"
    shards.mkdir(exist_ok=True)
    for split in ("train", "val"):
        of_split = sorted(path for path in paths if path.startswith(split))
        for start in range(0, len(of_split), 25):
            with tarfile.open(shards / f"{split}-{start:06d}.tar", "w") as archive:
                for path in of_split[start : start + 25]:
                    archive.add(folder / path, path)
                    label = str(CLASSES.index(path.split("/")[1])).encode()
                    info = tarfile.TarInfo(path.rpartition(".")[0] + ".cls")
                    info.size = len(label)
                    archive.addfile(info, io.BytesIO(label))
    (shards / "classes.txt").write_text("\n".join(CLASSES))
    return open_webdataset(str(shards), index_dir=str(folder.parent / "index"))


def as_packed_shards(folder, paths):
    packed = folder.parent / "packed"
    if not packed.exists():
        words = [f"data={folder}", "data.channels=3", f"output_dir={packed}", "shard_size=25", "workers=0"]
        pack(compose_settings(words, COMMANDS["pack"]))
    return open_webdataset(str(packed), index_dir=str(folder.parent / "index"))


def as_table(folder, paths):
    datasets = pytest.importorskip("datasets")
    from sslvision.data.sources.hugging_face import open_hugging_face

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})

    def rows(split):
        of_split = sorted(path for path in paths if path.startswith(split))
        images = [{"bytes": (folder / path).read_bytes(), "path": None} for path in of_split]
        labels = [CLASSES.index(path.split("/")[1]) for path in of_split]
        return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)

    datasets.disable_progress_bars()
    datasets.DatasetDict({"train": rows("train"), "test": rows("val")}).save_to_disk(folder.parent / "table")
    return open_hugging_face(str(folder.parent / "table"))


WAYS = {way.__name__: way for way in (as_list, as_zip, as_tar, as_shards, as_packed_shards, as_table)}


def batches(source, workers=0):
    sampler = EpochBatches(len(source), global_batch=20, seed=3)
    crops = (Crop((16, 16), (0.3, 1.0)),)
    return list(training_loader(source, crops, sampler, workers=workers, pin_memory=False))


@pytest.mark.parametrize("way", WAYS)
def test_every_source_gives_the_bytes_labels_classes_and_batches_of_the_folder(way, folder, paths):
    expected, found = open_folder(folder), WAYS[way](folder, paths)
    assert found.validation is None
    for one, other in ((expected.train, found.train), (expected.test, found.test)):
        assert (len(one), one.classes, one.labels.tolist()) == (len(other), other.classes, other.labels.tolist())
        assert all(torch.equal(one.read(index), other.read(index)) for index in range(len(one)))
    for one, other in zip(batches(expected.train), batches(found.train), strict=True):
        assert torch.equal(one.crops[0], other.crops[0])
        assert torch.equal(one.indices, other.indices)


@pytest.mark.parametrize("way", WAYS)
def test_every_source_can_be_sent_to_another_process_and_cached(way, folder, paths, tmp_path):
    splits = WAYS[way](folder, paths)
    sent = pickle.loads(pickle.dumps(splits.train))
    assert torch.equal(sent.read(7), splits.train.read(7))
    kept = cached(splits, "disk", side=1000, folder=str(tmp_path), workers=0)
    assert torch.equal(kept.train.read(7), splits.train.read(7))
    assert kept.train.source is splits.train


def test_a_second_start_reads_the_index_and_a_changed_shard_is_indexed_again(folder, paths, monkeypatch):
    as_shards(folder, paths)
    read = []
    monkeypatch.setattr(shard_index, "members_of", lambda file: read.append(file) or members_of(file))
    shards, index = folder.parent / "shards", str(folder.parent / "index")
    first = open_webdataset(str(shards), index_dir=index).train
    assert read == []
    shutil.copy2(shards / "train-000050.tar", shards / "train-000075.tar")
    more = open_webdataset(str(shards), index_dir=index).train
    assert [file.rpartition("/")[2] for file in read] == ["train-000075.tar"]
    assert len(more) == len(first) + 10
    (shards / "train-000075.tar").unlink()


WORDS = {
    "folder": ["data=folder", "data.root=photos"],
    "as_list": ["data=list", "data.file=photos.csv", "data.root=photos"],
    "as_zip": ["data=photos.zip"],
    "as_shards": ["data=webdataset", "data.urls=shards", "data.index_dir=index"],
    "as_packed_shards": ["data=webdataset", "data.urls=packed", "data.index_dir=index"],
    "as_table": ["data=hf", "data.path=table"],
}


@pytest.mark.e2e
def test_every_source_trains_to_the_same_losses_and_scores_through_the_command_line(
    folder, paths, tiny_settings, warm_command
):
    place, found = folder.parent, {}
    tiny = [word for word in tiny_settings("mae") if not word.startswith(("data=", "batch_size"))]
    tiny += ["backbone.image_size=16", "data.channels=3", "data.workers=1", "batch_size=20", "flip=true"]
    for name, words in WORDS.items():
        if name in WAYS:
            WAYS[name](folder, paths)
        done = warm_command("recipe=mae", *words, *tiny, f"output_dir=run-{name}", cwd=place)
        assert done.returncode == 0, done.stderr
        rows = list(csv.DictReader((place / f"run-{name}" / "metrics.csv").read_text().splitlines()))
        scores = json.loads((place / f"run-{name}" / "results.json").read_text())
        found[name] = ([row["loss"] for row in rows if row["loss"]], scores["knn_top1"])
    assert len(found["folder"][0]) >= 6
    assert all(one == found["folder"] for one in found.values()), found
