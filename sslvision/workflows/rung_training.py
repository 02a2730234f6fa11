"""One training of a scaling ladder, by the building blocks of pretraining, and its scores; and how long both take."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning.callbacks import Callback
from rich.console import Console

from sslvision.augment.randomness import permutation
from sslvision.backbones.backbone import Backbone
from sslvision.data.datamodule import ImageData
from sslvision.data.source import Splits
from sslvision.data.subsets import Subset
from sslvision.errors import UsageError
from sslvision.evaluation.evaluate import has_labels, why_not_evaluated
from sslvision.evaluation.features import Extraction
from sslvision.evaluation.held_out_scores import DRAW, held_out_loss, knn_error
from sslvision.methods.base import Method
from sslvision.methods.mae import MAE
from sslvision.runs.loggers import build_loggers, close_loggers
from sslvision.runs.weights import load_weights
from sslvision.settings import Pretrain
from sslvision.training.callbacks.health import Health
from sslvision.training.callbacks.skipped_updates import SkippedUpdates
from sslvision.training.callbacks.unreadable_images import UnreadableImages
from sslvision.training.trainer import Machine, build_trainer, configure_for, fit
from sslvision.workflows.budget import scale_epochs, time_updates
from sslvision.workflows.ladder import Rung, Size, Times
from sslvision.workflows.method import method_from_settings

WARMING = 100  # images of each kind that are evaluated before the evaluation is timed
TRIED = 500  # images of each kind that it is timed with


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all trainings of a ladder share, so that their scores can be compared.

    Attributes:
        settings: All settings.
        splits: The images.
        evaluated: The images of k-NN: those, or of `probe_data`.
        crop_pct: The share of an image that is evaluated.
        mean, std: Pixel statistics of all training images, whatever their share.
        scores: Names of the scores that are taken: knn, loss.
        machine: What trains.
    """

    settings: Pretrain
    splits: Splits
    evaluated: Splits
    crop_pct: float
    mean: list[float]
    std: list[float]
    scores: tuple[str, ...]
    machine: Machine

    def of_size(self, size: Size, seed: int) -> Pretrain:
        """Return the settings of a model."""
        backbone = {**self.settings.backbone, **dict(size.options)}
        return dataclasses.replace(self.settings, backbone=backbone, seed=seed, budget=None)

    def build(self, settings: Pretrain) -> Method:
        """Return the method of a training, with the weights it starts from, if any, and the statistics of all images."""
        method = method_from_settings(settings)
        load_weights(method, settings.init_from)
        method.normalize.set(self.mean, self.std)
        for module in method.modules():
            if isinstance(module, Backbone):
                module.crop_pct = self.crop_pct
        return method

    def batches(self, method: Method, images: int, seed: int, *, batch_size: int | None = None) -> ImageData:
        """Return the training images, or a share of them: the same images and more for a larger one."""
        train = self.splits.train
        if images < len(train):
            train = Subset(train, permutation(len(train), seed=seed, epoch=0)[:images].sort().values)
        return ImageData(
            Splits(train, None),
            method.crops,
            batch_size=batch_size or self.settings.batch_size,
            seed=seed,
            workers=self.settings.data.get("workers"),
            crop_pct=self.crop_pct,
        )

    def score(self, method: Method, *, at_most: int, workers: int) -> dict[str, float]:
        """Return the scores of a method and their standard errors, "knn" in percent of error."""
        how, found = Extraction(workers=workers, precision=self.machine.precision), dict[str, float]()
        method.to(self.machine.device)
        if "knn" in self.scores:
            found["knn"], found["knn_error"] = knn_error(method, self.evaluated, at_most=at_most, how=how)
        if "loss" in self.scores:
            assert isinstance(method, MAE)
            assert self.splits.test is not None
            found["loss"], found["loss_error"] = held_out_loss(method, self.splits.test, at_most=at_most, how=how)
        return found


def scores_of(asked: str, method: Method, splits: Splits, evaluated: Splits, *, at_most: int) -> tuple[str, ...]:
    """Return the scores that can be taken, of at most so many images each, the one to fit laws to first.

    Raises:
        UsageError: The one that was asked for cannot be taken, or none.
    """
    held_out = min(at_most, len(splits.test)) if splits.test is not None else 0
    possible = {"knn": has_labels(evaluated), "loss": isinstance(method, MAE) and held_out > DRAW}
    if asked != "auto" and not possible[asked]:
        of_loss = (
            f"it is MAE's, on more than {DRAW} images that are held out, and {held_out} are (evaluate_images={at_most})"
        )
        why = why_not_evaluated(evaluated) if asked == "knn" else of_loss
        raise UsageError(f"score={asked} is not possible: {why}. score=auto takes what is.")
    found = [name for name, can in possible.items() if can]
    if not found:
        raise UsageError(
            f"There is nothing to score: {why_not_evaluated(evaluated)}, and a {type(method).__name__} without labels has no "
            "number that can be compared between sizes: the loss of a teacher and student is measured against themselves, and "
            "RankMe is no error. Give labeled images with probe_data=FOLDER, or use MAE, with more than "
            f"{DRAW} images held out (data.holdout=0.1), where {held_out} are now."
        )
    return tuple(sorted(found, key=lambda name: name != asked))


def measure(ground: Ground, size: Size, *, seconds: float) -> Times:
    """Return how long updates, and all else of a training, take for a size.

    Args:
        ground: What trainings share.
        size: The model.
        seconds: Time to spend on updates.
    """
    began = time.perf_counter()
    settings = ground.of_size(size, ground.settings.seed)
    method = ground.build(settings)
    data = ground.batches(method, len(ground.splits.train), settings.seed)
    timed = time_updates(settings, method, data, seconds=seconds)
    overhead = time.perf_counter() - began - (timed.updates + timed.skipped) * timed.each
    ground.score(method.float(), at_most=WARMING, workers=data.workers)  # what comes once must not be multiplied
    began = time.perf_counter()
    ground.score(method, at_most=TRIED, workers=data.workers)
    scored = time.perf_counter() - began
    sources = (ground.evaluated.train, ground.evaluated.test) if "knn" in ground.scores else (None, ground.splits.test)
    counts = [min(len(source), settings.evaluate_images) if source is not None else 0 for source in sources]
    tried = sum(min(count, TRIED) for count in counts)
    return Times(timed.each, max(0.0, overhead) + scored * sum(counts) / tried)


def train(ground: Ground, rung: Rung, folder: Path) -> dict[str, Any]:
    """Train a rung from random weights and score it.

    Returns:
        Its scores with their standard errors, the last training loss, what was found, and seconds.

    Raises:
        Diverged: The loss is no longer finite.
    """
    began = time.perf_counter()
    settings: Pretrain = ground.of_size(rung.size, rung.seed)
    per_epoch = rung.images // settings.batch_size
    scaled, _ = scale_epochs(settings, rung.updates / per_epoch, ())
    method = ground.build(scaled)
    data = ground.batches(method, rung.images, rung.seed)
    findings = fit_updates(scaled, method, data, updates=rung.updates, folder=folder)
    trained = time.perf_counter() - began
    scores = ground.score(method.float(), at_most=settings.evaluate_images, workers=data.workers)
    return {
        **scores,
        "training_loss": method.logged.get("loss"),
        "findings": findings,
        "training_seconds": round(trained, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def fit_updates(
    settings: Pretrain,
    method: Method,
    data: ImageData,
    *,
    updates: int,
    folder: Path,
    callbacks: Sequence[Callback] = (),
) -> list[str]:
    """Train a method for some updates, without checkpoints; metrics.csv goes to the folder. Return what was found.

    Args:
        settings: Its settings.
        method: The method.
        data: The images.
        updates: Number of updates, with which the schedule ends.
        folder: Where metrics go; those of a training that was cut off are deleted.
        callbacks: Further callbacks.

    Raises:
        Diverged: The loss is no longer finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").unlink(missing_ok=True)
    watching: list[Callback] = [
        UnreadableImages(data.splits.train, folder / "unreadable.csv", settings.data.get("max_unreadable", 0.1)),
        SkippedUpdates(folder, settings.max_skipped),
        Health(settings.health, Console(quiet=True)),  # advises to go on from checkpoints, which there are none of
    ]
    loggers = build_loggers(settings.logger, folder, dataclasses.asdict(settings))
    trainer = build_trainer(
        folder=folder,
        epochs=-1,
        steps=updates,
        max_steps=updates,
        dry_run=False,
        loggers=loggers,
        callbacks=[*watching, *callbacks],
        options={"enable_checkpointing": False, **settings.trainer, "enable_progress_bar": False},
    )
    configure_for(trainer, method, compile=settings.compile, cuda_graphs=settings.cuda_graphs)
    try:
        fit(trainer, method, data, checkpoint=None)
    finally:
        close_loggers(loggers, folder)
    return _findings(watching)


def _findings(callbacks: Sequence[Callback]) -> list[str]:
    found: list[str] = []
    for callback in callbacks:
        if isinstance(callback, UnreadableImages | SkippedUpdates) and callback.found:
            found.append(callback.summary())
        elif isinstance(callback, Health):
            found += callback.found.values()
    return found
