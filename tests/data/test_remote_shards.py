"""Shards that are elsewhere: the images of those on the disk, dropped connections, and a folder that stays within its bound."""

import functools
import http.server
import pickle
import socket
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from sslvision.augment.crops import Crop
from sslvision.data import remote_files, remote_shards, shard_cache
from sslvision.data.loader import training_loader
from sslvision.data.remote_files import shown
from sslvision.data.sampler import EpochBatches
from sslvision.data.shard_cache import ShardCache
from sslvision.data.source import SourceGone
from sslvision.data.sources.webdataset import open_webdataset
from sslvision.errors import DataError, UsageError
from sslvision.workflows.packing import pack

fsspec = pytest.importorskip("fsspec")
BUCKET = "memory://bucket/shards"


@pytest.fixture(scope="module")
def packed(settings_of, tmp_path_factory):
    """Six shards of five images to train on, and one to test on, in a folder."""
    root, rng = tmp_path_factory.mktemp("packed"), np.random.default_rng(0)
    for number in range(34):
        folder = root / "photos" / ("train" if number < 30 else "val") / ("cat" if number % 2 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    words = [f"data={root / 'photos'}", "data.channels=3", "shard_size=5", "workers=0"]
    pack(settings_of("pack", *words, f"output_dir={root / 'shards'}"))
    return root / "shards"


@pytest.fixture
def bucket(packed, monkeypatch):
    """The same in a bucket in memory; nobody waits there."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for file in packed.rglob("*"):
        if file.is_file():
            memory.pipe(f"/bucket/shards/{file.relative_to(packed)}", file.read_bytes())
    monkeypatch.setattr(remote_files, "WAITS", [0, 0])
    yield memory
    memory.store.clear()


@pytest.fixture
def opened(tmp_path):
    """Open shards: opened(urls, ...) -> Splits."""
    return lambda urls=BUCKET, **options: open_webdataset(
        urls, index_dir=str(tmp_path / "index"), **({"shard_dir": str(tmp_path / "kept")} | options)
    )


@pytest.fixture
def flaky(bucket, monkeypatch):
    """Let the first so many readings of shards end early, with an error: flaky(times, error); the list of positions."""

    class Flaky:
        def __init__(self, file, log, left, error):
            self.file, self.log, self.left, self.error = file, log, left, error

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, place):
            return self.file.seek(place)

        def read(self, size):
            self.log.append(self.file.tell())
            if self.left and self.file.tell():
                self.left.pop()
                raise self.error
            return self.file.read(4096)

    def make(times, error):
        log, left, plain = [], [None] * times, remote_files._system

        def system(url):
            found, path = plain(url)
            return type("System", (), {
                "__getattr__": lambda self, name: getattr(found, name),
                "open": lambda self, path, *args, **options: Flaky(found.open(path, "rb"), log, left, error),
            })(), path  # fmt: skip

        monkeypatch.setattr(remote_files, "_system", system)
        return log

    return make


def batches(splits, epochs=1):
    train, batches = splits.train, []
    for epoch in range(epochs):
        sampler = EpochBatches(
            len(train), global_batch=6, seed=3, groups=train.groups, updates_done=lambda e=epoch: 5 * e
        )
        batches += training_loader(train, (Crop((16, 16), (0.3, 1.0)),), sampler, workers=0, pin_memory=False)
    return batches


def with_empty_folder(train, tmp_path):
    """Return a source whose folder of shards is another one: that of a small set has all shards once they are opened."""
    train.cache = ShardCache(tmp_path / "empty", 1)
    train.read_alone.clear()
    return train


def kept(tmp_path):
    return sorted(path.name for path in (tmp_path / "kept").glob("*.tar"))


def test_shards_in_a_bucket_give_the_images_labels_and_batches_of_those_on_the_disk(bucket, packed, opened):
    local, remote = opened(str(packed), window=2), opened(window=2)
    for one, other in ((local.train, remote.train), (local.test, remote.test)):
        assert (one.classes, one.labels.tolist()) == (other.classes, other.labels.tolist())
        assert all(torch.equal(one.read(index), other.read(index)) for index in range(len(one)))
    for one, other in zip(batches(local, 2), batches(remote, 2), strict=True):
        assert torch.equal(one.crops[0], other.crops[0])
        assert torch.equal(one.indices, other.indices)
    sent = pickle.loads(pickle.dumps(remote.train))
    assert torch.equal(sent.read(3), local.train.read(3))


def test_ranges_patterns_and_shards_without_an_index_are_found_too(bucket, packed, opened):
    expected = opened(str(packed)).train
    for urls in (f"{BUCKET}/train/train-{{000000..000005}}.tar", f"{BUCKET}/train/*.tar"):
        found = opened(urls, holdout=0).train
        assert len(found) == 30
        assert torch.equal(found.read(17), expected.read(17))
    for file in [*bucket.find("/bucket/shards")]:
        if not file.endswith((".tar", "classes.txt")):
            bucket.rm(file)
    plain = opened()
    assert (plain.train.classes, plain.train.labels.tolist()) == (expected.classes, expected.labels.tolist())
    assert torch.equal(plain.train.read(17), expected.read(17))


def test_a_few_images_are_read_alone_and_more_of_a_shard_fetch_it(bucket, opened, tmp_path):
    train = with_empty_folder(opened().train, tmp_path)
    for index in range(remote_shards.ALONE):
        train.read(index)
        train.read(index + 5)
    assert not train.cache.folder.exists()
    train.read(4)
    assert [*train.cache.folder.glob("*.tar")] == [train.cache.path(train.files[0])]


def test_the_folder_of_shards_stays_within_its_bound_and_what_was_removed_is_fetched_again(bucket, opened, tmp_path):
    unbounded = opened(window=1, shard_dir=str(tmp_path / "other"))
    size = max(file.size for file in unbounded.train.files)
    splits = opened(window=1, cache_gb=2.5 * size / 1e9)
    expected = [batch.crops[0] for batch in batches(unbounded, 2)]
    for number, batch in enumerate(batches(splits, 2)):
        assert torch.equal(batch.crops[0], expected[number])
    deadline = time.monotonic() + 5
    while len(kept(tmp_path)) > 2 and time.monotonic() < deadline:  # threads may be fetching ahead
        time.sleep(0.01)
    assert 1 <= len(kept(tmp_path)) <= 2
    with pytest.raises(UsageError, match=r"data.window=4 needs .* GB on the disk.*data.cache_gb=.* or more"):
        opened(window=4, cache_gb=2.5 * size / 1e9)


def test_a_dropped_connection_is_gone_on_with_where_it_was(flaky, opened, packed, tmp_path):
    train = with_empty_folder(opened().train, tmp_path)
    log = flaky(2, ConnectionResetError(104, "Connection reset by peer"))
    path = train.cache.fetch(train.files[1])
    assert path.read_bytes() == (packed / "train" / "train-000001.tar").read_bytes()
    assert log.count(4096) == 3
    assert log.count(0) == 1


def test_a_connection_that_stays_lost_ends_the_run_with_words_and_leaves_nothing_behind(flaky, opened, tmp_path):
    train = with_empty_folder(opened().train, tmp_path)
    train.read_alone[0] = remote_shards.ALONE
    flaky(1000, ConnectionResetError(104, "Connection reset by peer"))
    with pytest.raises(SourceGone, match=r"train-000000.tar cannot be read, tried 3 times.*resume=auto"):
        train.read(0)
    assert not [file for file in train.cache.folder.iterdir() if file.suffix != ".lock"]


def test_a_missing_shard_and_one_that_has_changed_are_named(bucket, opened):
    content = bucket.cat("/bucket/shards/train/train-000002.tar")
    bucket.rm("/bucket/shards/train/train-000002.tar")
    with pytest.raises(DataError, match=r"1 of 7 shards do not exist: memory://bucket/shards/train/train-000002.tar"):
        opened()
    bucket.pipe("/bucket/shards/train/train-000002.tar", content[:-512])
    with pytest.raises(DataError, match=r"train-000002.tar \([\d,]+ bytes instead of"):
        opened()
    bucket.pipe("/bucket/shards/train/train-000002.tar", content[:9000] + b"x" + content[9001:])
    with pytest.raises(DataError, match=r"train-000002.tar does not have the checksum of its index"):
        opened()
    with pytest.raises(DataError, match=r"names no shards \(.tar\), and has no index.json"):
        opened("memory://bucket/nothing/here/")


def test_a_bucket_that_may_not_be_read_says_where_credentials_are_taken_from(monkeypatch, opened):
    class Closed:
        def __getattr__(self, name):
            def refuse(*_, **__):
                raise PermissionError("Access Denied")

            return refuse

    monkeypatch.setattr(remote_files, "_system", lambda url: (Closed(), "x"))
    with pytest.raises(DataError, match=r"s3://mine/train.tar may not be read \(Access Denied\).*AWS_ACCESS_KEY_ID"):
        opened("s3://mine/train.tar")


def test_one_of_several_that_want_a_shard_fetches_it(bucket, opened, tmp_path, monkeypatch):
    train, fetched, download = with_empty_folder(opened().train, tmp_path), [], shard_cache.download
    monkeypatch.setattr(shard_cache, "download", lambda url, *given, **options: (
        fetched.append(url), time.sleep(0.05), download(url, *given, **options)))  # fmt: skip
    threads = [threading.Thread(target=train.cache.fetch, args=(train.files[4],)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fetched) == 1


@pytest.fixture
def web(packed, monkeypatch):
    """The address of a web server that has the shards, and gives no parts of files."""
    pytest.importorskip("aiohttp")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=str(packed))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(remote_files, "WAITS", [0])
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_web_server_that_gives_no_parts_of_files_will_do(web, packed, opened):
    expected = opened(str(packed)).train
    for urls in (web, f"{web}/train/train-{{000000..000005}}.tar"):
        found = opened(urls, holdout=0).train
        assert len(found) == 30
        assert all(torch.equal(found.read(index), expected.read(index)) for index in (3, 12, 29))
    with pytest.raises(DataError, match=r"1 of 2 shards do not exist: http://.*/train/train-000006.tar"):
        opened(f"{web}/train/train-{{000005..000006}}.tar")


def test_a_server_that_is_down_is_not_taken_for_a_missing_shard(opened, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote_files, "WAITS", [0])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DataError, match=r"cannot be read, tried 2 times.*Is the network up"):
        opened(f"http://127.0.0.1:{port}/a.tar")


def test_addresses_are_shown_without_credentials():
    assert shown("https://me:secret@host/a/b.tar?X-Amz-Signature=abc") == "https://host/a/b.tar"
    assert shown("s3://bucket/a?b.tar") == "s3://bucket/a?b.tar"
    assert shown("/data/a.tar") == "/data/a.tar"


def test_a_missing_package_is_named(monkeypatch, opened):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(UsageError, match=r'pip install "sslvision\[remote\]"'):
        opened("s3://bucket/a.tar")
