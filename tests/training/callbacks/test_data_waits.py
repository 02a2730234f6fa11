"""The share of time that training waits for images: on the clock of a CPU, and in the queue of a device that lags behind."""

from io import StringIO
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as L
import torch
from PIL import Image
from pytorch_lightning.plugins.io import TorchCheckpointIO
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, Dataset

from sslvision.methods.mae import MAE
from sslvision.training.callbacks import data_waits, progress
from sslvision.training.callbacks.data_waits import DataWaits
from sslvision.training.callbacks.progress import Progress

pytestmark = pytest.mark.filterwarnings("ignore:.*many workers")
BATCHES = 30


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(data_waits, "monotonic", clock)
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


class Slow(Dataset):
    """Images that take their time, the first of an epoch longer."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __len__(self):
        return BATCHES

    def __getitem__(self, index):
        self.clock.now += 100 if index == 0 else self.seconds
        return torch.ones(1)


class Tiny(L.LightningModule):
    """Every step takes a second."""

    def __init__(self, clock, read):
        super().__init__()
        self.layer, self.clock, self.read, self.latest = nn.Linear(1, 1), clock, read, {}

    def training_step(self, batch, batch_idx):
        self.clock.now += 1
        return self.layer(batch).square().mean()

    def train_dataloader(self):
        return DataLoader(Slow(self.clock, self.read))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model, *callbacks, **settings):
    quiet = {"logger": False, "enable_checkpointing": True, "enable_model_summary": False, "accelerator": "cpu"}
    bar = {} if any(isinstance(one, Progress) for one in callbacks) else {"enable_progress_bar": False}
    L.Trainer(**{"max_epochs": 1, **quiet, **bar, **settings}, callbacks=list(callbacks)).fit(model)


def test_on_a_cpu_it_is_the_time_between_the_batches_and_the_first_one_is_left_out(clock):
    waits = DataWaits(workers=0)
    fit(Tiny(clock, read=3), waits, max_epochs=2)
    assert waits.share == pytest.approx(75)
    assert waits.batches == 2 * (BATCHES - 1)


def test_evaluation_and_checkpoints_are_not_waiting(clock):
    class Evaluated(Tiny):
        def validation_step(self, batch, batch_idx):
            self.clock.now += 500

        def val_dataloader(self):
            return DataLoader(torch.ones(1, 1))

    class Saving(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step % 4 == 0:
                clock.now += 300
                trainer.save_checkpoint("unused")

    class Nowhere(TorchCheckpointIO):
        def save_checkpoint(self, *_, **__):
            clock.now += 700

    waits = DataWaits(workers=0)
    fit(Evaluated(clock, read=3), Saving(), waits, val_check_interval=10, plugins=[Nowhere()])
    assert waits.share == pytest.approx(75)


def test_what_other_callbacks_do_between_two_batches_is_not_waiting(clock):
    class Busy(L.Callback):
        def on_train_batch_end(self, *_):
            clock.now += 4

    waits = DataWaits(workers=0)
    fit(Tiny(clock, read=5), waits, Busy())
    assert waits.share == pytest.approx(50)


def test_a_handful_of_batches_tells_nothing(clock):
    waits = DataWaits(workers=0)
    fit(Tiny(clock, read=3), waits, max_steps=data_waits.LEAST)
    assert waits.share is None
    assert waits.recent is None
    assert not waits.found


class Device:
    """What a GPU does: it works off its queue while the host goes on, and knows when it passed an event."""

    def __init__(self, clock, monkeypatch):
        device, self.clock, self.free_at = self, clock, 0.0

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.free_at = max(device.free_at, clock.now)

            def query(self):
                return self.at <= clock.now

            def elapsed_time(self, other):
                assert max(self.at, other.at) <= clock.now, "this would be an error, or wait"
                return 1e3 * (other.at - self.at)

        monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(Event=Event))

    def launch(self, seconds):
        self.free_at = max(self.free_at, self.clock.now) + seconds


def train_on(device, waits, *, read, compute, launch=0.0, batches=100):
    """Train with a loader that takes `read` seconds a batch, as Lightning would; wait for the device every 50 steps."""
    module = SimpleNamespace(device=torch.device("cuda"))
    trainer = SimpleNamespace(num_devices=1, is_last_batch=False)
    waits.on_train_start(trainer, module)
    for number in range(1, batches + 1):
        device.clock.now += read
        waits.on_train_batch_start(trainer, module, None, 0)
        device.launch(compute)
        device.clock.now += launch
        if number % 50 == 0:  # the log is written
            device.clock.now = max(device.clock.now, device.free_at)
        waits.on_train_batch_end(trainer, module, None, None, 0)


def test_on_a_gpu_the_host_may_wait_as_long_as_the_device_does_not(clock, monkeypatch):
    waits = DataWaits(workers=2)
    train_on(Device(clock, monkeypatch), waits, read=0.6, compute=1.0)  # 60 % of the host's time
    assert waits.share < 2
    assert not waits.found


def test_a_gpu_that_runs_dry_is_waiting(clock, monkeypatch):
    waits = DataWaits(workers=2)
    train_on(Device(clock, monkeypatch), waits, read=2.5, compute=1.0)
    assert waits.share == pytest.approx(60, abs=1)
    assert waits.found


def test_a_host_that_is_slow_to_launch_is_not_taken_for_a_slow_loader(clock, monkeypatch):
    waits = DataWaits(workers=2)
    train_on(Device(clock, monkeypatch), waits, read=0.05, compute=0.2, launch=1.0)
    assert waits.share < 6


def bar_of(clock, read):
    file = StringIO()
    waits = DataWaits(workers=2)
    numbers = {"total_steps": BATCHES, "steps_per_epoch": BATCHES, "images_per_step": 1, "plain_every_s": 1}
    bar = Progress(**numbers, waits=waits, console=Console(file=file, width=120))
    fit(Tiny(clock, read), waits, bar)
    return file.getvalue().splitlines()


def test_the_progress_bar_says_so(clock):
    lines = bar_of(clock, read=3)
    assert "waiting" not in lines[5]  # too early to tell
    assert all("  waiting for data 75 %  " in line for line in lines[-3:])


def test_the_progress_bar_says_nothing_of_a_tenth(clock):
    assert not any("waiting" in line for line in bar_of(clock, read=0.1))


@pytest.mark.parametrize(
    ("workers", "cached", "devices", "advice"),
    [
        (2, False, 1, "images; raise data.workers (2 now, 16 cores here) or set data.cache=ram."),
        (2, True, 1, "images; raise data.workers (2 now, 16 cores here)."),
        (8, False, 2, "images; set data.cache=ram."),
        (16, True, 1, "use all 16 cores, and images are already decoded: use more cores, or fewer or smaller crops"),
    ],
)
def test_the_advice_is_one_that_can_be_followed(clock, monkeypatch, workers, cached, devices, advice):
    monkeypatch.setattr(data_waits, "available_cores", lambda: 16)
    waits = DataWaits(workers=workers, cached=cached)
    fit(Tiny(clock, read=3), waits)
    waits.devices = devices
    assert waits.summary().startswith("Data-bound: 75 % of the time was spent waiting for images; ")
    assert advice in waits.summary()


def test_a_run_on_a_slow_disk_is_told_that_it_is_data_bound(tmp_path, run_tiny, clock, monkeypatch):
    """Image files read by the process that trains: three seconds a batch of two, beside one second a step."""
    monkeypatch.setattr(data_waits, "LEAST", 6)
    open_image, training_step = Image.open, MAE.training_step

    def slow_open(*args, **kwargs):
        clock.now += 1.5
        return open_image(*args, **kwargs)

    def step(*args, **kwargs):
        clock.now += 1
        return training_step(*args, **kwargs)

    monkeypatch.setattr(Image, "open", slow_open)
    monkeypatch.setattr(MAE, "training_step", step)
    folder = tmp_path / "photos"
    for number in range(12):
        (folder / "a").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "a" / f"{number}.png")
    words = ["data=folder", f"data.root={folder}", "data.channels=3", "data.workers=0", "data.normalize=imagenet"]
    small = ["backbone.image_size=32", "backbone.patch_size=8", "batch_size=2", "knn_every_epochs=0", "epochs=3"]
    results = run_tiny(tmp_path / "run", *words, *small)
    assert results["waiting_for_data_percent"] == pytest.approx(75, abs=0.1)
    told = "Data-bound: 75 % of the time was spent waiting for images; "
    assert any(finding.startswith(told) for finding in results["findings"])


def test_images_in_memory_are_not_waited_for(tiny_run):
    assert "waiting_for_data" not in (tiny_run / "results.json").read_text()
