"""The short trainings of the first steps: on one batch, on a handful of images, at many rates.

They go through the same functions as the trainings of pretraining and of fine-tuning, without regularization.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback

from sslvision.data.subsets import Subset
from sslvision.errors import Diverged
from sslvision.evaluation.step_verdicts import Start
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.runs.loggers import build_loggers, close_loggers
from sslvision.runs.metrics import read_metrics
from sslvision.settings import Finetune, Pretrain, locate
from sslvision.training.callbacks.first_batch import FirstBatch
from sslvision.training.callbacks.stop_at import StopAt
from sslvision.workflows.classifier_training import build_classifier, build_classifier_trainer, train_classifier
from sslvision.workflows.rung_training import fit_updates
from sslvision.workflows.trial_training import Finetuning, Pretraining

HANDFUL = 16  # images that are learned by heart
NONE = {  # regularization, and the value without it
    **dict.fromkeys(("weight_decay", "weight_decay_end", "label_smoothing", "mixup", "cutmix", "erase", "cutout"), 0.0),
    **dict.fromkeys(("weight_noise", "ema"), 0.0),
}
OF_BACKBONES = ("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "pos_drop_rate", "patch_drop_rate")


@dataclasses.dataclass(frozen=True)
class Curve:
    """The metrics of a short training.

    Attributes:
        losses: The loss of each update; of DINO the one without the teacher's entropy.
        first: What was measured in the first batch.
        raw_loss, gradient: Loss and norm of the gradient of the first update.
        accuracy: Of a classifier, on its validation images; None for pretraining.
        score: The objective after it; None where it was not measured.
        diverged: Whether the loss became infinite.
    """

    losses: list[float]
    first: FirstBatch
    raw_loss: float
    gradient: float
    accuracy: float | None
    score: float | None
    diverged: bool


def plain(settings: Any, *, augment: bool = False) -> Any:
    """Return settings without regularization; without random crops, too, unless `augment`."""
    finetunes = isinstance(settings, Finetune)
    method = {key: 0.0 if key in NONE else value for key, value in settings.method.items()}
    if finetunes:
        method |= {key: value for key, value in NONE.items() if not key.startswith("weight_decay_")}
    else:
        method["weight_decay"] = 0.0
        if settings.method["_target_"].endswith("DINO"):
            method["weight_decay_end"] = 0.0
    if not augment and (finetunes or "crop_scale" in method):
        method |= {"crop_scale": [1.0, 1.0], "flip": False}
    backbone = {key: 0.0 if key in OF_BACKBONES else value for key, value in settings.backbone.items()}
    changes: dict[str, Any] = {"method": method, "backbone": backbone} | ({"randaugment": 0} if finetunes else {})
    return dataclasses.replace(settings, **changes)


def constant(rate: float, settings: Any, *, warm: bool = False) -> Any:
    """Return settings whose rate does not decay, nor warm up unless `warm`; those of methods of one's own as they are."""
    known = isinstance(settings, Finetune) or settings.method["_target_"].startswith("sslvision.")
    method = {**settings.method, "min_lr": rate} if known else settings.method
    if known and not warm:
        method["warmup_epochs"] = 0.0
    return dataclasses.replace(settings, method=method)


def train_for(
    bench: Pretraining | Finetuning,
    settings: Any,
    *,
    updates: int,
    folder: Path,
    handful: bool = False,
    scored: bool = False,
    deadline: float | None = None,
) -> Curve:
    """Train for some updates, on all images or on a handful.

    Args:
        bench: What trainings share.
        settings: Settings of the training.
        updates: Updates.
        folder: Where metrics go.
        handful: Whether a few images are all there is.
        scored: Whether to measure the objective at the end.
        deadline: Time of `time.perf_counter` at which to stop.
    """
    first, stop = FirstBatch(), StopAt(deadline)
    logged = dataclasses.replace(settings, trainer={**settings.trainer, "log_every_n_steps": 1})
    if isinstance(bench, Finetuning):
        accuracy, diverged = _classify(bench, logged, updates, folder, [first, stop], handful=handful)
        score = accuracy
    else:
        accuracy = None
        score, diverged = _pretrain(bench, logged, updates, folder, [first, stop], handful=handful, scored=scored)
    metrics = read_metrics(folder / "metrics.csv") if (folder / "metrics.csv").is_file() else {}
    raw = _column(metrics, "loss")
    losses = _column(metrics, "kl") or raw
    gradients = _column(metrics, "grad_norm")
    return Curve(
        losses,
        first,
        raw[0] if raw else math.nan,
        gradients[0] if gradients else math.nan,
        accuracy,
        score,
        diverged,
    )


def _column(metrics: dict[str, list[float | None]], name: str) -> list[float]:
    return [value for value in metrics.get(name, []) if value is not None]


def _pretrain(
    bench: Pretraining,
    settings: Pretrain,
    updates: int,
    folder: Path,
    callbacks: Sequence[Callback],
    *,
    handful: bool,
    scored: bool,
) -> tuple[float | None, bool]:
    method = bench.ground.build(settings)
    images = HANDFUL if handful else settings.batch_size
    data = bench.ground.batches(method, HANDFUL if handful else bench.images, settings.seed, batch_size=images)
    try:
        fit_updates(settings, method, data, updates=updates, folder=folder, callbacks=callbacks)
    except Diverged:
        return None, True
    return (bench.score(method.float(), at_most=settings.evaluate_images)[0] if scored else None), False


def _classify(
    bench: Finetuning,
    settings: Finetune,
    updates: int,
    folder: Path,
    callbacks: Sequence[Callback],
    *,
    handful: bool,
) -> tuple[float | None, bool]:
    labeled = bench.labeled
    if handful:
        few = Subset(labeled.train, spread_over_classes(labeled.train.labels, HANDFUL))
        labeled = dataclasses.replace(labeled, train=few, validation=few)
    plan = dataclasses.replace(bench.plan(settings, folder=folder), head_first=False, updates=updates)
    plan = dataclasses.replace(
        plan, validate_every=max(1, updates // 4), batch_size=min(plan.batch_size, len(labeled.train))
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.csv").unlink(missing_ok=True)
    method = build_classifier(plan, labeled)
    loggers = build_loggers(settings.logger, folder, {})
    trainer = build_classifier_trainer(plan, labeled, callbacks=callbacks, loggers=loggers)
    try:
        best = train_classifier(plan, labeled, method, trainer)
    except Diverged:
        return None, True
    finally:
        close_loggers(loggers, folder)
    return best.get("val_top1"), False


def spread_over_classes(labels: Any, number: int) -> Any:
    """Return the indices of a few images, of as many classes as there are."""
    order = torch.argsort(labels, stable=True)
    places = torch.linspace(0, len(order) - 1, min(number, len(order))).round().long()
    return order[places].unique()


def start_of(bench: Pretraining | Finetuning, settings: Any, curve: Curve) -> Start:
    """Return what is known of a network before its first update."""
    kind = kind_of(bench, settings)
    outputs = {"supervised": lambda: len(bench.labeled.classes), "dino": lambda: _prototypes(settings)}  # type: ignore[union-attr]
    first = curve.first
    return Start(
        kind=kind,
        loss=curve.raw_loss,
        outputs=outputs[kind]() if kind in outputs else 0,
        targets=first.targets,
        predictions=first.predictions,
        gradient=curve.gradient,
        pixel_mean=first.pixel_mean,
        pixel_std=first.pixel_std,
        spread=first.spread,
        norm_pix=bool(settings.method.get("norm_pix", True)) and kind == "mae",
    )


def _prototypes(settings: Pretrain) -> int:
    return int(settings.method.get("prototypes", 65_536))


def kind_of(bench: Pretraining | Finetuning, settings: Any) -> str:
    """Return mae, dino or supervised; other for a method of one's own."""
    if isinstance(bench, Finetuning):
        return "supervised"
    target = locate("method", settings.method["_target_"])
    if isinstance(target, type):
        return "mae" if issubclass(target, MAE) else "dino" if issubclass(target, DINO) else "other"
    return "other"
