"""Where the images lie: read-only, flaky, or gone in the middle of a run (row 32)."""

import builtins
import errno
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslvision.data.decode import read_image
from sslvision.data.loader import evaluation_loader
from sslvision.data.source import SourceGone, UnreadableImage
from sslvision.data.sources.folder import open_folder
from sslvision.data.sources.torchvision_sets import open_torchvision
from sslvision.training.callbacks.unreadable_images import UnreadableImages

pytestmark = pytest.mark.faults

SMALL = ("data=folder", "data.channels=3", "batch_size=6", "epochs=1", "warmup_epochs=0", "checkpoint_every_epochs=1")


@pytest.fixture
def photos(tmp_path):
    """A folder of 30 images in two classes."""
    root = tmp_path / "photos"
    for place in range(30):
        file = root / ("a", "b")[place % 2] / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(place).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return root


def snapshot(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [root, *root.rglob("*")]}


def test_a_run_writes_nothing_into_the_folder_of_its_images(photos, run_tiny, tmp_path):
    before = snapshot(photos)
    folders = [photos, *(path for path in photos.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)  # whoever is not root could not write anyway
    try:
        run_tiny(tmp_path / "run", *SMALL, f"data.root={photos}", "data.workers=0")
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert snapshot(photos) == before


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("leaves", ["nothing", "an empty folder"])
def test_a_folder_that_vanishes_ends_the_run_at_once_with_its_path(
    photos, run_tiny, tmp_path, monkeypatch, workers, leaves
):
    look = UnreadableImages.on_train_batch_start
    seen = []

    def unmount(self, trainer, method, batch, number):
        seen.append(len(batch.unreadable))
        if trainer.current_epoch == 2 and not (tmp_path / "elsewhere").exists():
            photos.rename(tmp_path / "elsewhere")
            if leaves == "an empty folder":
                photos.mkdir()
        look(self, trainer, method, batch, number)

    monkeypatch.setattr(UnreadableImages, "on_train_batch_start", unmount)
    words = (*SMALL[:3], "epochs=200", *SMALL[4:], f"data.root={photos}", f"data.workers={workers}", "data.holdout=0")
    with pytest.raises(SourceGone) as caught:
        run_tiny(tmp_path / "run", *words)
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith(f"The folder of the images is gone or empty: {photos} (while reading {photos}/")
    assert "Traceback" not in str(caught.value), "from a worker it comes as a message alone"
    assert len(seen) < 4 * 5, "at once: not after what was left of the budget"
    assert max(seen) == 0, "no image was taken for damaged"
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file(), "the run can go on"


def test_evaluation_stops_as_well_instead_of_scoring_what_is_left(photos):
    source = open_folder(photos, holdout=0).train
    shutil.rmtree(photos)
    for workers in (0, 1):
        with pytest.raises(SourceGone, match=r"^The folder of the images is gone"):
            list(evaluation_loader(source, (16, 16), [0, 1], workers=workers))


def test_the_folder_of_a_torchvision_set_may_vanish_too(photos):
    eurosat = photos.parent / "sets" / "eurosat" / "2750"
    eurosat.parent.mkdir(parents=True)
    photos.rename(eurosat)
    source = open_torchvision("EuroSAT", photos.parent / "sets").train
    assert source.read(0).shape == (3, 40, 40)
    shutil.rmtree(photos.parent / "sets")
    with pytest.raises(SourceGone, match="sets"):
        source.read(0)


def test_one_missing_file_is_one_unreadable_image(photos):
    source = open_folder(photos, holdout=0).train
    Path(source.describe(3)).unlink()
    with pytest.raises(UnreadableImage, match="gone"):
        source.read(3)
    assert source.read(4).shape == (3, 40, 40)


class Flaky:
    """`open`, failing the first times."""

    def __init__(self, number, times):
        self.number, self.left, self.calls = number, times, 0

    def __call__(self, path, *args, **options):
        self.calls += 1
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number), path)
        return builtins_open(path, *args, **options)


builtins_open = builtins.open


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_what_fails_once_on_a_flaky_disk_is_read_at_the_second_try(photos, monkeypatch, number):
    monkeypatch.setattr("sslvision.data.decode.WAITS", (0, 0))
    flaky = Flaky(number, 2)
    monkeypatch.setattr("sslvision.data.decode.open", flaky, raising=False)
    assert read_image(photos / "a" / "0.png", 3).shape == (3, 40, 40)
    assert flaky.calls == 3


def test_what_keeps_failing_is_unreadable_with_the_disks_own_word(photos, monkeypatch):
    monkeypatch.setattr("sslvision.data.decode.WAITS", (0, 0))
    flaky, source = Flaky(errno.EIO, 99), open_folder(photos, holdout=0).train
    monkeypatch.setattr("sslvision.data.decode.open", flaky, raising=False)
    with pytest.raises(UnreadableImage, match=os.strerror(errno.EIO)):
        source.read(0)
    assert flaky.calls == 3


def test_a_read_that_fails_amid_the_file_is_tried_again_too(photos, monkeypatch):
    class Failing(io.FileIO):
        def read(self, size=-1):
            if self.tell() > 500 and failures:
                raise failures.pop()
            return super().read(size)

    failures = [OSError(errno.EIO, os.strerror(errno.EIO))]
    monkeypatch.setattr("sslvision.data.decode.WAITS", (0, 0))
    monkeypatch.setattr("sslvision.data.decode.open", lambda path, mode: Failing(path), raising=False)
    assert read_image(photos / "a" / "0.png", 3).shape == (3, 40, 40)
    assert not failures


@pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES])
def test_what_will_not_pass_is_not_waited_for(photos, monkeypatch, number):
    monkeypatch.setattr("sslvision.data.decode.time.sleep", lambda _: pytest.fail("waited"))
    flaky = Flaky(number, 1)
    monkeypatch.setattr("sslvision.data.decode.open", flaky, raising=False)
    with pytest.raises(UnreadableImage):
        read_image(photos / "a" / "0.png", 3)
    assert flaky.calls == 1
