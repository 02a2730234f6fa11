"""Where the time of a training step goes, from image to updated weights.

python benchmarks/profile_step.py recipe=mae [key=value ...]

Runs the recipe's own loader, crops, views, losses and optimizer without a Trainer, and then with one; what the second
takes more is the Trainer's. Times are medians over steps, on whatever device the recipe would train on.
"""

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pytorch_lightning as L
import torch
from rich.console import Console
from rich.table import Table

from sslvision import config
from sslvision.data.loading import cut_crops, training_loader
from sslvision.data.module import ImageData, pixel_statistics
from sslvision.methods.base import Clock
from sslvision.nn.randomness import ImageRandom
from sslvision.stage_one import build_method, hush_lightning, open_splits
from sslvision.training.trainer import build_trainer, choose_kernels, choose_layers, compute_dtype

STEPS, WARM_UP = 60, 10


class StepTimes(L.Callback):
    """Wall time from one step's end to the next one's, everything between included."""

    def __init__(self):
        self.ends = []

    def on_train_batch_end(self, trainer, *_):
        self.ends.append(time.perf_counter())
        trainer.should_stop = len(self.ends) >= STEPS

    def median(self):
        gaps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)]
        return statistics.median(gaps[WARM_UP:])


def main():
    settings = config.tree(config.prepare(sys.argv[1:]))
    hush_lightning()
    choose_kernels(settings.trainer.get("accelerator", "auto"))
    splits = open_splits(settings.data)

    def build():
        method = build_method(settings)
        choose_layers(method, trainer.strategy.root_device, compiled=settings.compile)
        method.normalize.set(*pixel_statistics(splits.train, settings.data.get("normalize", "computed")))
        return method, ImageData(
            splits, method.crops, batch_size=settings.batch_size, workers=settings.data.get("workers")
        )

    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            folder=Path(folder),
            epochs=settings.epochs,
            steps=settings.epochs * (len(splits.train) // settings.batch_size),
            dry_run=False,
            loggers=[],
            callbacks=[times],
            options={**settings.trainer, "enable_progress_bar": False},
        )
        phases = by_hand(*build(), device=trainer.strategy.root_device, dtype=compute_dtype(trainer))
        method, data = build()
        trainer.fit(method, datamodule=data)
    report(phases, times.median(), settings.batch_size)


def by_hand(method, data, *, device, dtype):
    """Return seconds per phase."""
    method.to(device).train()
    optimizer = method.configure_optimizers()
    clock = Clock(0, 1000, len(data.batches(0, 1, 1)))
    loader = training_loader(
        data.splits.train, method.crops, data.batches(0, 1, 1), workers=data.workers, pin_memory=device.type == "cuda"
    )
    taken = defaultdict(list)

    def lap(phase, since):
        if device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        taken[phase].append(now - since)
        return now

    batches = iter(loader)
    for _ in range(min(STEPS, len(loader))):
        at = time.perf_counter()
        batch = next(batches)
        batch = batch._replace(
            crops=[crop.to(device) for crop in batch.crops],
            places=batch.places.to(device),
            epoch=batch.epoch.to(device),
        )
        at = lap("loader and transfer", at)
        if data.splits.train.images is not None:
            batch = cut_crops(batch, method.crops, data.seed)
        at = lap("crops (on the device)", at)
        views = method.views(batch, ImageRandom(method.seed, batch.epoch, batch.places))
        at = lap("views: augment, normalise, mask noise", at)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = method.losses(views, clock)["loss"]
        at = lap("forward", at)
        loss.backward()
        at = lap("backward", at)
        method.ready(optimizer, clock)
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(clock)
        lap("update: clip, optimizer, teacher", at)
    return {phase: statistics.median(seconds[WARM_UP:]) for phase, seconds in taken.items()}


def report(phases, whole, batch_size):
    table = Table(title=f"One step of {batch_size} images, {torch.get_num_threads()} CPU threads", title_justify="left")
    table.add_column("phase")
    table.add_column("ms", justify="right")
    table.add_column("share of a step %", justify="right")
    phases = {**phases, "trainer, logging, callbacks": whole - sum(phases.values())}
    for phase, seconds in phases.items():
        table.add_row(phase, f"{1e3 * seconds:.2f}", f"{100 * seconds / whole:.1f}")
    table.add_section()
    table.add_row("a step under the Trainer", f"{1e3 * whole:.2f}", f"{batch_size / whole:,.0f} img/s")
    Console().print(table)


if __name__ == "__main__":
    main()
