"""A real object store on this machine: pretraining on its shards equals that on the disk, also when connections drop.

Needs s3fs and moto[server], which no extra installs: pip install s3fs "moto[server]".
"""

import csv
import json
import socket
import threading
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from sslvision.workflows.packing import pack

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")
pytestmark = [
    pytest.mark.e2e,
    # The proxy and moto's server, in the process of the test, leave sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "AKIAWRITTENNOWHERE01", "AWS_SECRET_ACCESS_KEY": "a-secret-to-be-written-nowhere"}
DROPPED_AFTER = 30_000  # bytes of an answer


class DroppingProxy:
    """Passes connections on, and cuts off the first few with a long answer in the middle of it.

    Args:
        port: Where to, on this machine.
        drops: How many.
    """

    def __init__(self, port, drops):
        self.port, self.drops, self.dropped = port, drops, 0
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self.server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:  # closed
                return
            store = socket.create_connection(("127.0.0.1", self.port))
            threading.Thread(target=self._pass_on, args=(client, store, False), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(store, client, True), daemon=True).start()

    def _pass_on(self, source, target, is_answer):
        passed = 0
        with suppress(OSError):
            while content := source.recv(8192):
                passed += len(content)
                if is_answer and passed > DROPPED_AFTER and self.dropped < self.drops:
                    self.dropped += 1
                    break
                target.sendall(content)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def packed(settings_of, tmp_path_factory):
    """Six shards of ten images to train on, and two to test on."""
    root, rng = tmp_path_factory.mktemp("bucket"), np.random.default_rng(0)
    for number in range(72):
        folder = root / "photos" / ("train" if number < 60 else "val") / ("cat", "dog", "fox")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + number % 5, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    words = [f"data={root / 'photos'}", "data.channels=3", "shard_size=10", "workers=0"]
    pack(settings_of("pack", *words, f"output_dir={root / 'shards'}"))
    return root / "shards"


@pytest.fixture
def store(packed, monkeypatch):
    """An object store that has them in the bucket `photos`: its port."""
    import s3fs

    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    system = s3fs.S3FileSystem(endpoint_url=f"http://{host}:{port}", skip_instance_cache=True)
    if not system.exists("photos"):  # one store for all servers of a process
        system.mkdir("photos")
    for file in packed.rglob("*"):
        if file.is_file() and not file.name.startswith("."):
            system.pipe_file(f"photos/shards/{file.relative_to(packed)}", file.read_bytes())
    system.port = port
    yield system
    server.stop()


@pytest.fixture
def pretrain(tiny_settings, warm_command, packed, tmp_path):
    """Pretrain on shards: pretrain(urls, name, ...) -> the finished process."""
    tiny = [word for word in tiny_settings("mae") if not word.startswith(("data=", "batch_size"))]
    tiny += ["backbone.image_size=16", "data.channels=3", "data.workers=2", "batch_size=12", "flip=true"]
    tiny += ["data.window=2", "data.index_dir=index", "data.shard_dir=kept"]

    def call(urls, name, *words, **environment):
        given = ["recipe=mae", "data=webdataset", f"data.urls={urls}", *tiny, *words, f"output_dir={name}"]
        return warm_command(*given, cwd=tmp_path, timeout=1200, **CREDENTIALS, **environment)

    return call


def results_of(folder):
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    return [row["loss"] for row in rows if row["loss"]], json.loads((folder / "results.json").read_text())["knn_top1"]


def test_a_bucket_behind_a_bad_connection_trains_as_the_disk_does_and_no_credentials_are_written(
    store, packed, pretrain, tmp_path
):
    proxy = DroppingProxy(store.port, drops=3)
    one = pretrain(packed, "disk")
    other = pretrain("s3://photos/shards", "bucket", AWS_ENDPOINT_URL=proxy.address)
    proxy.server.close()
    assert one.returncode == 0, one.stderr
    assert other.returncode == 0, other.stderr
    assert proxy.dropped == 3
    assert len(results_of(tmp_path / "disk")[0]) >= 8
    assert results_of(tmp_path / "bucket") == results_of(tmp_path / "disk")
    assert len(list((tmp_path / "kept").glob("*.tar"))) >= 6
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    for secret in CREDENTIALS.values():
        assert not [file for file in files if secret.encode() in file.read_bytes()]
        assert secret not in other.stdout + other.stderr


def test_a_missing_shard_and_a_bucket_that_does_not_exist_are_named_before_training(store, pretrain):
    store.rm_file("photos/shards/train/train-000003.tar")
    endpoint = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{store.port}"}
    done = pretrain("s3://photos/shards", "missing", **endpoint)
    assert done.returncode == 3
    assert "1 of 8 shards do not exist: s3://photos/shards/train/train-000003.tar. Check data.urls." in done.stderr
    done = pretrain("s3://nobodys/shards", "nobodys", **endpoint)
    assert done.returncode == 3
    assert "s3://nobodys/shards" in done.stderr
    assert "Traceback" not in done.stderr
