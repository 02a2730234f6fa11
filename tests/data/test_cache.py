"""Caches of decoded images: the same pixels, built once, whole or not at all, and never beyond the room there is."""

import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from caches import KINDS, built
from PIL import Image

from sslvision.augment.crops import Crop, resize
from sslvision.data import cache as cache_module
from sslvision.data.cache import CachedSource, cached
from sslvision.data.loader import evaluation_loader, training_loader
from sslvision.data.sampler import EpochBatches
from sslvision.data.source import Splits, UnreadableImage
from sslvision.data.sources.embedded import open_embedded
from sslvision.data.sources.folder import open_folder
from sslvision.errors import StorageError, UsageError
from sslvision.system import files
from sslvision.workflows.pretraining import open_splits

# The pixels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_cache_holds_the_pixels_of_the_originals_at_its_size(photos, cache_of, kind, channels):
    source = open_folder(photos, holdout=0, channels=channels).train
    kept = cache_of(source, kind)
    for index in range(len(source)):
        image = source.read(index)
        height, width = image.shape[1:]
        short = min(height, width)
        if short > 48:
            image = resize(image, (round(height * 48 / short), round(width * 48 / short)))
        assert torch.equal(kept.read(index), image)
    assert sorted(min(kept.read(index).shape[1:]) for index in range(7)) == [20, 31, 40, 48, 48, 48, 48]


def test_a_cache_is_read_without_its_originals(photos, cache_of):
    source = open_folder(photos, holdout=0).train
    pixels = [source.read(index) for index in range(len(source))]
    kept = cache_of(source, side=500)
    shutil.rmtree(photos)
    assert all(torch.equal(kept.read(index), pixels[index]) for index in range(len(source)))


def test_all_that_is_not_pixels_stays_as_it_is(photos, cache_of):
    source = open_folder(photos, holdout=0).train
    kept = cache_of(source)
    assert (kept.name, kept.channels, kept.classes, kept.images) == (source.name, 3, ("cat", "dog"), None)
    assert torch.equal(kept.labels, source.labels)
    assert [kept.describe(index) for index in range(7)] == [source.describe(index) for index in range(7)]


def test_five_channels_are_cached_as_they_are(tmp_path, cache_of):
    pages = [Image.fromarray(np.full((60, 70), 40 * page, dtype=np.uint8)) for page in range(5)]
    (tmp_path / "stacks").mkdir()
    pages[0].save(tmp_path / "stacks" / "a.tif", save_all=True, append_images=pages[1:])
    kept = cache_of(open_folder(tmp_path / "stacks", holdout=0, channels=5).train)
    assert kept.read(0).shape == (5, 48, 56)
    assert kept.read(0)[:, 3, 3].tolist() == [0, 40, 80, 120, 160]


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("form", ["tif", "jpg", "png", "webp"])
def test_an_image_on_its_side_is_cached_upright_and_not_squeezed(tmp_path, cache_of, orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "turned").mkdir()
    Image.new("RGB", (400, 200), "red").save(tmp_path / "turned" / f"a.{form}", exif=exif)
    kept = cache_of(open_folder(tmp_path / "turned", holdout=0).train, side=50)
    assert kept.read(0).shape == ((3, 100, 50) if orientation >= 5 else (3, 50, 100))


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (20_000, 10), (1, 1)])
def test_thin_images_are_cached_as_they_are(tmp_path, cache_of, size):
    (tmp_path / "thin").mkdir()
    Image.new("L", size, 9).save(tmp_path / "thin" / "a.png")
    kept = cache_of(open_folder(tmp_path / "thin", holdout=0, channels=1).train)
    assert kept.read(0).shape == (1, *reversed(size))
    (_, images), *_ = evaluation_loader(kept, (32, 32), [0])
    assert images.unique().tolist() == [9]


def test_a_jpeg_that_need_not_be_decoded_in_full_is_cached_as_it_was_decoded(tmp_path, cache_of):
    (tmp_path / "large").mkdir()
    Image.new("RGB", (403, 301), "red").save(tmp_path / "large" / "a.jpg")
    source = open_folder(tmp_path / "large", holdout=0, at_least=48).train
    assert cache_of(source, side=1000).read(0).shape == source.read(0).shape == (3, 76, 101)
    assert cache_of(source, side=48).read(0).shape == (3, 48, 64)


def test_reading_from_a_cache_copies_nothing(photos, cache_of):
    kept = cache_of(open_folder(photos, holdout=0).train)
    assert kept.read(2).untyped_storage().data_ptr() == kept.read(5).untyped_storage().data_ptr()


@pytest.mark.parametrize("workers", [0, 2])
def test_several_processes_build_the_same_cache_and_read_the_same_crops(photos, cache_of, workers):
    source = open_folder(photos, holdout=0).train
    kept = cache_of(source, side=500, workers=workers)

    def crops(source, workers):
        batches = EpochBatches(7, global_batch=7, seed=1)
        (batch,) = training_loader(source, (Crop(24, (0.3, 1.0)),), batches, workers=workers, pin_memory=False)
        return batch.crops[0]

    assert torch.equal(crops(kept, workers), crops(source, 0))


def test_a_worker_that_is_not_forked_maps_the_cache_itself(photos, cache_of):
    kept = cache_of(open_folder(photos, holdout=0).train)
    sent = pickle.dumps(kept)
    assert len(sent) < 20_000
    assert torch.equal(pickle.loads(sent).read(1), kept.read(1))


# Built once


def test_a_cache_is_built_once(photos, cache_of, monkeypatch):
    first = cache_of(open_folder(photos, holdout=0).train)
    monkeypatch.setattr(cache_module, "build", None)
    again = cache_of(open_folder(photos, holdout=0).train)
    assert again.folder == first.folder
    assert torch.equal(again.read(0), first.read(0))


def test_a_changed_file_makes_another_cache(photos, cache_of):
    before = cache_of(open_folder(photos, holdout=0).train)
    path = photos / "dog" / "0.jpg"
    Image.new("RGB", (60, 40), "blue").save(path)
    after = cache_of(open_folder(photos, holdout=0).train)
    assert after.folder != before.folder
    place = next(index for index in range(7) if after.describe(index) == str(path))
    assert after.read(place)[2].min() > 200
    stamp = path.stat()
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert cache_of(open_folder(photos, holdout=0).train).folder != after.folder


def test_every_setting_that_changes_pixels_makes_another_cache(photos, cache_of):
    caches = [cache_of(open_folder(photos, holdout=0).train, side=side).folder for side in (48, 32)]
    caches += [
        cache_of(open_folder(photos, holdout=0, **one).train).folder for one in ({"channels": 1}, {"at_least": 8})
    ]
    assert len(set(caches)) == 4


def test_each_split_has_a_cache_of_its_own(photos, cache_of):
    splits = cached(open_folder(photos, holdout=0.3), "disk", side=48, folder=cache_of.root, workers=0)
    assert (len(splits.train), len(splits.test), splits.validation) == (5, 2, None)
    assert len(built(cache_of.root)) == 2


# Unreadable images


def test_unreadable_images_keep_their_reasons(photos, cache_of):
    (photos / "cat" / "empty.jpg").write_bytes(b"")
    sound = (photos / "dog" / "0.jpg").read_bytes()
    (photos / "cat" / "torn.jpg").write_bytes(sound[: len(sound) // 2])
    source = open_folder(photos, holdout=0).train
    reasons = {}
    for index in range(len(source)):
        try:
            source.read(index)
        except UnreadableImage as error:
            reasons[index] = str(error)
    assert len(reasons) == 2
    kept = cache_of(source)
    shutil.rmtree(photos)
    for index in range(len(source)):
        if index in reasons:
            with pytest.raises(UnreadableImage) as caught:
                kept.read(index)
            assert str(caught.value) == reasons[index]
        else:
            assert kept.read(index).numel()


def test_an_image_that_the_disk_would_not_give_is_asked_for_again(photos, cache_of, monkeypatch):
    source = open_folder(photos, holdout=0).train
    image, real = source.read(1), type(source).read

    def fail(self, index):
        if index == 1:
            raise UnreadableImage("the file cannot be read: Input/output error") from OSError(5, "Input/output error")
        return real(self, index)

    monkeypatch.setattr(type(source), "read", fail)
    kept = cache_of(source, side=500)
    with pytest.raises(UnreadableImage, match="Input/output"):
        kept.read(1)
    monkeypatch.setattr(type(source), "read", real)
    assert torch.equal(kept.read(1), image)


def test_a_folder_without_a_readable_image_has_a_cache_of_reasons(tmp_path, cache_of):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_bytes(b"no image")
    kept = cache_of(open_folder(tmp_path / "bad", holdout=0).train)
    with pytest.raises(UnreadableImage, match="not an image"):
        kept.read(0)


# Room


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_is_refused_before_anything_is_decoded_if_there_is_not_the_room(photos, cache_of, kind, monkeypatch):
    source = open_folder(photos, holdout=0).train
    needed = sum(cache_of(source).read(index).numel() for index in range(7))
    shutil.rmtree(cache_of.root / built(cache_of.root)[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    monkeypatch.setattr(type(source), "read", None)
    with pytest.raises(StorageError, match=rf"need {needed:,} bytes, but .* has {needed:,} bytes free, 10% of which"):
        cache_of(source, kind)
    assert built(cache_of.root) == []


def test_shared_memory_is_refused_beyond_what_processes_can_have(photos, cache_of, monkeypatch):
    monkeypatch.setattr(files, "SHARED_MEMORY", cache_of.root)
    monkeypatch.setattr(files, "_available_memory", lambda: 1000)
    with pytest.raises(StorageError, match=r"1,000 bytes free.*data\.cache=disk"):
        cache_of(open_folder(photos, holdout=0).train, "ram")


def test_a_folder_that_cannot_be_written_to_is_refused_in_words(photos, tmp_path):
    (tmp_path / "file").write_text("")
    splits = open_folder(photos, holdout=0)
    with pytest.raises(StorageError, match=r"cannot be written to .*data\.cache_dir"):
        cached(splits, "disk", folder=str(tmp_path / "file" / "caches"), workers=0)


# Settings


def test_images_in_memory_need_no_cache():
    splits = open_embedded()
    assert cached(splits, "ram").train is splits.train
    assert cached(splits, None) is splits
    assert cached(splits, "none") is splits


def test_a_source_without_files_is_refused():
    source = SimpleNamespace(images=None, name="PCAM")
    with pytest.raises(UsageError, match=r"PCAM has none: set data\.cache=none"):
        cached(Splits(source, None), "disk")


@pytest.mark.parametrize(("kind", "side"), [("disc", 320), ("disk", 0)])
def test_settings_that_cannot_be_are_refused(kind, side):
    with pytest.raises(UsageError, match=r"data\.cache"):
        cached(Splits(SimpleNamespace(images=None), None), kind, side=side)


def test_a_recipe_asks_for_a_cache(photos, tmp_path, settings_of):
    words = [f"data.root={photos}", "data.cache=disk", "data.cache_size=40", f"data.cache_dir={tmp_path / 'kept'}"]
    config = settings_of("pretrain", "recipe=mae", "data=folder", "data.workers=0", *words)
    splits = open_splits(config.data)
    assert isinstance(splits.train, CachedSource)
    assert splits.train.folder.parent == tmp_path / "kept"
    assert max(min(splits.train.read(index).shape[1:]) for index in range(len(splits.train))) == 40
    with pytest.raises(UsageError, match=r"data\.cache=disc.*Did you mean disk"):
        settings_of("pretrain", "recipe=mae", "data=folder", f"data.root={photos}", "data.cache=disc")
