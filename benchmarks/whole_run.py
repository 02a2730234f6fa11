"""Levels above the step: the loader alone, and a run from files through our Trainer."""

import dataclasses

import numpy as np
import torch
from loader import Keys, rate
from PIL import Image
from profile_step import StepTimes

from sslvision.data.datamodule import ImageData, pixel_statistics
from sslvision.data.loader import training_loader
from sslvision.training.trainer import build_trainer, configure_method, fit
from sslvision.workflows.callbacks import pretraining_callbacks
from sslvision.workflows.method import method_from_settings
from sslvision.workflows.pretraining import open_splits


def loader_level(settings, arguments):
    """Return images per second of our loader alone, with the processes it would have; benchmarks/loader.py compares it."""
    splits, method = open_splits(settings.data), method_from_settings(settings)
    workers = ImageData(splits, method.crops, batch_size=1, workers=settings.data.get("workers")).workers
    ahead = 2 * workers  # batches that they make while nobody asks
    batches = [range(n, n + settings.batch_size) for n in range(ahead + arguments.trainer_steps)]
    keys = Keys([(0, index % len(splits.train)) for index in batch] for batch in batches)
    loader = training_loader(splits.train, method.crops, keys, workers=workers, pin_memory=False)
    return {"images_per_second": rate(loader, settings.batch_size, ahead + 1), "workers": workers}


def trainer_level(settings, arguments, accelerator, folder):
    """Return images per second of a run: files, loader, views, step, all that watches a run but evaluation."""
    precision = {"bf16": "bf16-mixed", "fp32": "32-true"}[arguments.precision]
    options = {"accelerator": accelerator, "devices": 1, "precision": precision}
    return train(settings, open_splits(settings.data), folder, steps=arguments.trainer_steps, options=options)


def train(settings, splits, folder, *, steps, options):
    """Train as a run does for `steps` updates, a third of them to warm up. Return images per second and ms of the others.

    Left out are evaluation, checkpoints but the last, loggers and the progress bar.
    """
    settings = dataclasses.replace(
        settings,
        knn_every_epochs=0,
        checkpoint_every_epochs=1_000_000,
        trainer={**settings.trainer, **options, "enable_progress_bar": False},
    )
    method = method_from_settings(settings)
    method.normalize.set(
        *pixel_statistics(splits.train, settings.data.get("normalize", "computed"), seed=settings.seed)
    )
    data = ImageData(
        splits, method.crops, batch_size=settings.batch_size, seed=settings.seed, workers=settings.data.get("workers")
    )
    times = StepTimes(steps)
    trainer = build_trainer(
        folder=folder,
        epochs=-1,
        steps=steps,
        max_steps=steps,
        dry_run=False,
        loggers=[],
        callbacks=[times, *pretraining_callbacks(settings, folder, data, splits, steps)],
        options=settings.trainer,
    )
    configure_method(method, trainer.strategy.root_device, compile=settings.compile, cuda_graphs=settings.cuda_graphs)
    fit(trainer, method, data, checkpoint=None)
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()
    ends = times.ends[steps // 3 :]
    took = (ends[-1] - ends[0]) / (len(ends) - 1)
    rates = {"images_per_second": settings.batch_size / took, "ms": 1e3 * took}
    return {**rates, "workers": data.workers, "steps": len(ends) - 1}


def draw_photographs(folder, count):
    """Write JPEGs of 500x400 with the spectrum of photographs, roughly, and return their folder."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        image = np.zeros((400, 500, 3))
        for scale in (4, 16, 64, 250):  # blobs of falling strength
            noise = generator.integers(0, 256, (400 // scale + 2, 500 // scale + 2, 3), dtype=np.uint8)
            image += np.asarray(Image.fromarray(noise).resize((500, 400), Image.Resampling.BICUBIC)) * scale**0.5
        image = 255 * (image - image.min()) / (image.max() - image.min())
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number:04}.jpg", quality=90)
    return folder
