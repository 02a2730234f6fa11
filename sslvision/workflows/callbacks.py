"""The callbacks of a pretraining run."""

import math
from pathlib import Path

from pytorch_lightning.callbacks import Callback

from sslvision.data.datamodule import ImageData
from sslvision.data.source import Splits
from sslvision.evaluation.evaluate import has_labels
from sslvision.settings import Pretrain
from sslvision.training.callbacks.continued import Continued
from sslvision.training.callbacks.data_waits import DataWaits
from sslvision.training.callbacks.health import Health
from sslvision.training.callbacks.online_evaluation import ON_THE_WAY, OnlineEvaluation
from sslvision.training.callbacks.periodic_checkpoints import PeriodicCheckpoints
from sslvision.training.callbacks.pictures import Pictures
from sslvision.training.callbacks.progress import Progress
from sslvision.training.callbacks.skipped_updates import SkippedUpdates
from sslvision.training.callbacks.stop_on_signal import StopOnSignal
from sslvision.training.callbacks.unreadable_images import UnreadableImages


def pretraining_callbacks(
    settings: Pretrain, folder: Path, data: ImageData, evaluated: Splits, steps: int
) -> list[Callback]:
    """Return the callbacks of a pretraining run, checkpoints and progress included.

    Args:
        settings: All settings.
        folder: The run folder.
        data: The images of training.
        evaluated: The images of the evaluation on the way.
        steps: Optimizer updates of the whole run.
    """
    splits, every_steps = data.splits, settings.knn_every_steps
    every = (
        min(settings.knn_every_epochs, math.ceil(settings.epochs / 2)) or None
    )  # a short run has a look on the way, too
    callbacks: list[Callback] = [
        UnreadableImages(
            splits.train, folder / "unreadable.csv", settings.data.get("max_unreadable", 0.1), timeout=settings.timeout
        ),
        PeriodicCheckpoints(
            folder / "checkpoints" / "last.ckpt",
            every_epochs=settings.checkpoint_every_epochs,
            every_steps=settings.checkpoint_every_steps,
        ),
        StopOnSignal(
            folder / "checkpoints" / "last.ckpt",
            folder,
            requeues=settings.resume == "auto",
            timeout=settings.timeout,
        ),
        SkippedUpdates(folder, settings.max_skipped),
        Health(settings.health),
    ]
    looks = every is not None or every_steps is not None
    if looks:
        labeled = has_labels(evaluated)
        evaluation = OnlineEvaluation(
            evaluated,
            labeled=labeled,
            every_epochs=every,
            every_steps=every_steps,
            at_most=min(ON_THE_WAY, settings.evaluate_images),
            workers=data.workers,
            from_start=settings.init_from is not None,
        )
        callbacks += [evaluation, Continued(evaluation)] if settings.init_from is not None else [evaluation]
    if looks and splits.test is not None:
        callbacks.append(Pictures(splits.test, folder / "figures", every_epochs=every, every_steps=every_steps))
    waits = None
    if splits.train.images is None:  # images in memory have no loader to wait for
        callbacks.append(waits := DataWaits(workers=data.workers, cached=settings.data.get("cache") in ("ram", "disk")))
    if settings.trainer.get("enable_progress_bar", True):
        callbacks.append(
            Progress(
                images_per_step=settings.batch_size,
                total_steps=2 if settings.dry_run else steps,
                steps_per_epoch=len(splits.train) // settings.batch_size,
                waits=waits,
            )
        )
    return callbacks
