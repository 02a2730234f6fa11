"""Part `loader`: images per second of the loader by number of processes, and from files through the Trainer."""

import dataclasses
import os
import tempfile
import time
from pathlib import Path

from whole_run import draw_photographs

from benchmarks.on_gpu.findings import DRY, attempt, device, set_up, wait
from benchmarks.on_gpu.recipe import TINY, TRAINER, under_trainer
from sslvision.cli.compose import compose_settings
from sslvision.data.loader import training_loader
from sslvision.data.sampler import EpochBatches
from sslvision.workflows.method import method_from_settings
from sslvision.workflows.pretraining import open_splits

DRAWN, NAMES = (16, 64) if DRY else (200, 40_000)  # pictures, and names for them: as many as a minute's run wants
RECIPES = {"mae_vitb16_in1k": 1, "dino_vits16_in1k": 4}  # and what part of `batch` a batch is


def loader(batch="256", processes="4,8,14", seconds="10", steps="60"):
    """Time both recipes for ImageNet on 500 x 400 JPEGs."""
    set_up()
    counts = [0] if DRY else [*map(int, processes.split(","))]
    with tempfile.TemporaryDirectory() as scratch:
        folder = draw_names(Path(scratch))
        for recipe, part in RECIPES.items():
            size = (8 if DRY else int(batch)) // part
            words = [f"recipe={recipe}", f"data.root={folder}", f"batch_size={size}", "data.holdout=0.01"]
            if DRY:
                words += [f"trainer.accelerator={TRAINER['accelerator']}", *TINY, *tiny_of(recipe)]
            settings = compose_settings(words)
            splits, method = open_splits(settings.data), method_from_settings(settings)
            for count in counts:
                attempt(f"{recipe}, {count} processes", rate, splits.train, method.crops, size, count, float(seconds))
            settings = dataclasses.replace(settings, data={**settings.data, "workers": counts[-1]})
            attempt(f"{recipe}, through the Trainer", under_trainer, settings, splits, 6 if DRY else int(steps))


def tiny_of(recipe):
    return ["decoder_depth=1", "decoder_embed_dim=16", "decoder_num_heads=2"] if "mae" in recipe else ["prototypes=64"]


def draw_names(scratch):
    """Return a folder of many names for a few drawn pictures."""
    drawn = sorted(draw_photographs(scratch / "drawn", DRAWN).glob("*.jpg"))
    folder = scratch / "images"
    folder.mkdir()
    for number in range(NAMES):
        os.link(drawn[number % DRAWN], folder / f"{number:06}.jpg")
    return folder


def rate(source, crops, size, processes, seconds):
    """Return images per second of the loader alone, crops brought to the device."""
    batches = EpochBatches(len(source), global_batch=size, seed=0)
    batches = iter(training_loader(source, crops, batches, workers=processes, pin_memory=not DRY))
    for _ in range(1 if DRY else 2 * processes + 2):  # made ahead
        next(batches)
    began, images = time.perf_counter(), 0
    while time.perf_counter() - began < (0.1 if DRY else seconds):
        batch = next(batches, None)
        if batch is None:
            break
        moved = [crop.to(device(), non_blocking=True).contiguous() for crop in batch.crops]
        images += len(moved[0])
    wait()
    return {"img/s": round(images / (time.perf_counter() - began), 1)}
