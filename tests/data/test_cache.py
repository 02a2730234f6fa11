"""Caches of decoded images: the same pixels, built once, whole or not at all, and never beyond the room there is."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sslvision.data import cache as cache_module
from sslvision.data import cache_build
from sslvision.data.base import Splits, UnreadableImage
from sslvision.data.cache import CachedSource, cached
from sslvision.data.embedded import open_embedded
from sslvision.data.folder import open_folder
from sslvision.data.loading import training_loader
from sslvision.data.sampler import EpochBatches
from sslvision.errors import DataError, StorageError, UsageError
from sslvision.stage_one import open_splits
from sslvision.views.geometry import Crop, resize

KINDS = ["disk", pytest.param("ram", marks=pytest.mark.skipif(cache_module.fcntl is None, reason="no locks here"))]


@pytest.fixture
def photos(tmp_path):
    """Return a folder of photographs of many sizes in two classes, one of them grey, one on its side."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(40, 60), (90, 50), (64, 64), (20, 200), (31, 77), (48, 48), (128, 96)]):
        folder = tmp_path / "photos" / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 1 else 1
        image = small.resize((width, height), Image.Resampling.BICUBIC)
        image = image.convert("L") if number == 3 else image
        image.save(folder / f"{number}.{'png' if number == 2 else 'jpg'}", exif=exif)
    return tmp_path / "photos"


@pytest.fixture
def cache_of(tmp_path, monkeypatch):
    """Return a function that opens a source's cache in a folder of the test, of whichever kind."""
    root = tmp_path / "caches"
    root.mkdir()
    monkeypatch.setattr(cache_module, "SHARED_MEMORY", root)
    locks = []
    monkeypatch.setattr(cache_module, "_in_use", locks)
    monkeypatch.setattr(cache_module.atexit, "register", lambda *_: None)

    def open_cache(source, kind="disk", *, side=48, workers=0):
        return cached(Splits(source, None), kind, side=side, folder=root, workers=workers).train

    open_cache.root = root
    yield open_cache
    for lock in locks:
        lock.close()


def built(root):
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


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
    with pytest.raises(StorageError, match=rf"takes {needed:,} bytes, and there are {needed:,} free"):
        cache_of(source, kind)
    assert built(cache_of.root) == []


def test_shared_memory_is_refused_beyond_what_processes_can_have(photos, cache_of, monkeypatch):
    monkeypatch.setattr(cache_build, "_available_memory", lambda: 1000)
    with pytest.raises(StorageError, match=r"1,000 free.*data\.cache=disk"):
        cache_of(open_folder(photos, holdout=0).train, "ram")


def test_a_folder_that_cannot_be_written_to_is_refused_in_words(photos, tmp_path):
    (tmp_path / "file").write_text("")
    splits = open_folder(photos, holdout=0)
    with pytest.raises(StorageError, match=r"cannot be written to .*data\.cache_dir"):
        cached(splits, "disk", folder=str(tmp_path / "file" / "caches"), workers=0)


# Killed, damaged, several at once

SCRIPT = """
import sys, time
from sslvision.data import cache, folder
from sslvision.data.base import Splits

def slow(self, index, read=folder.FileSource.read):
    print("decoding", flush=True)
    time.sleep(float(sys.argv[4]))
    return read(self, index)

folder.FileSource.read = slow
cache.SHARED_MEMORY = cache.Path(sys.argv[2])
splits = folder.open_folder(sys.argv[1], holdout=0)
kept = cache.cached(splits, sys.argv[3], side=48, folder=sys.argv[2], workers=0).train
print("sum", sum(int(kept.read(index).sum()) for index in range(len(kept))), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def process(photos, cache_of):
    """Return a function that opens the cache in a process of its own, which ends when its input does."""
    started = []

    def start(kind="disk", seconds=0.0):
        words = [sys.executable, "-c", SCRIPT, str(photos), str(cache_of.root), kind, str(seconds)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(words, **pipes))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


def until(process, word):
    """Return the lines that a process prints before one with a word in it, and that line."""
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if word in line:
            return lines
    raise AssertionError(f"it ended without {word}")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_while_it_is_built_a_cache_is_built_again_and_nothing_is_left_over(photos, cache_of, process, kind):
    one = process(kind, seconds=0.3)
    until(one, "decoding")
    time.sleep(0.4)
    (part,) = built(cache_of.root)
    assert ".part" in part
    one.send_signal(signal.SIGKILL)
    one.wait()
    kept = cache_of(open_folder(photos, holdout=0).train, kind)
    assert built(cache_of.root) == [kept.folder.name]
    assert kept.read(0).numel()


def test_of_two_processes_one_builds_and_both_read(photos, cache_of, process):
    one, other = process(seconds=0.1), process(seconds=0.1)
    printed = [until(one, "sum"), until(other, "sum")]
    assert sorted(sum(line == "decoding" for line in lines) for lines in printed) == [0, 7]
    assert printed[0][-1] == printed[1][-1]
    assert len(built(cache_of.root)) == 1


def test_without_locks_the_process_that_builds_last_takes_what_is_there(photos, cache_of, monkeypatch):
    source, reserve = open_folder(photos, holdout=0).train, cache_build._reserve
    monkeypatch.setattr(cache_module, "fcntl", None)

    def meanwhile(*settings):
        monkeypatch.setattr(cache_build, "_reserve", reserve)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            other.setattr(cache_build.shutil, "rmtree", lambda *_, **__: None)  # it began a little later
            meanwhile.built = cache_of(source)
        reserve(*settings)

    monkeypatch.setattr(cache_build, "_reserve", meanwhile)
    kept = cache_of(source)
    assert kept.folder == meanwhile.built.folder
    assert built(cache_of.root) == [kept.folder.name]
    assert torch.equal(kept.read(0), meanwhile.built.read(0))


@pytest.mark.skipif(cache_module.fcntl is None, reason="no locks here")
def test_shared_memory_is_free_again_when_its_last_user_has_gone(photos, cache_of, process):
    one, other = process("ram"), process("ram")
    until(one, "sum"), until(other, "sum")
    one.communicate("")
    assert len(built(cache_of.root)) == 1
    other.communicate("")
    assert built(cache_of.root) == []


@pytest.mark.skipif(cache_module.fcntl is None, reason="no locks here")
def test_of_two_processes_that_find_no_cache_one_builds_and_both_use_it(photos, cache_of, process, monkeypatch):
    """Where the one that comes second to the lock waited to have it alone, it waited until the first one's run was over."""
    take, quicker = cache_module._take, []

    def late(lock, **words):
        if not quicker:
            cache_module.fcntl.flock(lock, cache_module.fcntl.LOCK_UN)
            quicker.append(process("ram"))
            until(quicker[0], "sum")  # it uses the cache now, for as long as it lives
        return take(lock, **words)

    monkeypatch.setattr(cache_module, "_take", late)
    kept = cache_of(open_folder(photos, holdout=0).train, "ram")
    assert built(cache_of.root) == [kept.folder.name]


@pytest.mark.skipif(cache_module.fcntl is None, reason="no locks here")
def test_what_a_killed_process_left_in_shared_memory_is_freed_by_the_next(photos, cache_of, process):
    one = process("ram")
    until(one, "sum")
    one.kill()
    one.wait()
    (left,) = built(cache_of.root)
    kept = cache_of(open_folder(photos, holdout=0).train, "ram", side=40)
    assert built(cache_of.root) == [kept.folder.name] != [left]


def test_a_damaged_cache_is_named(photos, cache_of):
    source = open_folder(photos, holdout=0).train
    folder = cache_of(source).folder
    os.truncate(folder / "pixels", 100)
    with pytest.raises(DataError, match=r"damaged: 100 bytes instead of .* Delete that folder"):
        cache_of(source)


def test_a_cache_that_fails_while_it_is_built_leaves_nothing(photos, cache_of, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_build, "_reserve", full)
    with pytest.raises(OSError, match="No space left"):
        cache_of(open_folder(photos, holdout=0).train)
    assert built(cache_of.root) == []


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
