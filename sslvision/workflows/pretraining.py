"""Pretraining: settings become a method, data and a trainer; training leaves a backbone, its scores and figures."""

import dataclasses
import inspect
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone
from sslvision.data.cache import cached
from sslvision.data.contract import check_contract
from sslvision.data.datamodule import ImageData, pixel_statistics
from sslvision.data.source import Splits, remarks_in_errors
from sslvision.evaluation.central_crop import choose_crop_pct, describe_crop
from sslvision.evaluation.evaluate import evaluate_backbone, evaluate_pixels, has_labels, why_not_evaluated
from sslvision.figures.curves import health_figure, learning_curve_figure
from sslvision.methods.base import Method
from sslvision.nn.compilation import should_compile
from sslvision.runs import run_files
from sslvision.runs.checkpoint import AtomicCheckpoints
from sslvision.runs.loggers import build_loggers, close_loggers
from sslvision.runs.metrics import read_metrics
from sslvision.runs.resume import check_same, checkpoint_to_resume, record, rewind_metrics, take_folder
from sslvision.runs.weights import export_backbone, load_weights, record_value_range, recorded_value_range
from sslvision.settings import Pretrain, locate
from sslvision.training.callbacks.data_waits import DataWaits
from sslvision.training.callbacks.health import Health
from sslvision.training.callbacks.online_evaluation import OnlineEvaluation
from sslvision.training.callbacks.periodic_checkpoints import PeriodicCheckpoints
from sslvision.training.callbacks.pictures import Pictures, draw_pictures
from sslvision.training.callbacks.progress import Progress
from sslvision.training.callbacks.skipped_updates import SkippedUpdates
from sslvision.training.callbacks.stop_on_signal import StopOnSignal
from sslvision.training.callbacks.unreadable_images import UnreadableImages
from sslvision.training.trainer import (
    build_trainer,
    compute_dtype,
    configure_method,
    configure_torch,
    fit,
    precision_in_effect,
    silence_lightning,
)
from sslvision.workflows.console import (
    classes_in_words,
    findings_of,
    print_configuration,
    print_findings,
    print_scores,
    waiting_of,
)


def pretrain(settings: Pretrain, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Pretrain a backbone, export it, and evaluate its features.

    Args:
        settings: All settings.
        folder: The run folder.
        words: The command line, for the record.

    Returns:
        The content of results.json; empty in all processes but the first.

    Raises:
        UsageError, DataError: Before the first step, for settings or data that cannot be used. DataError also when too many
            images turn out unreadable, and Diverged when the loss is no longer finite.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    silence_lightning()
    configure_torch(settings.trainer.get("accelerator", "auto"))
    method = method_from_settings(settings)
    resume = checkpoint_to_resume(settings.resume, folder)
    weights, findings = load_weights(method, None if resume else settings.init_from)
    data = open_data(settings, method)
    images = len(data.splits.train)
    checkpoints = AtomicCheckpoints(keep=settings.keep_checkpoints, record=record(settings, images=images))
    trainer = build_trainer(
        folder=folder,
        epochs=settings.epochs,
        steps=settings.epochs * (images // settings.batch_size),
        dry_run=settings.dry_run,
        loggers=build_loggers(settings.logger, folder, dataclasses.asdict(settings)),
        callbacks=pretraining_callbacks(settings, folder, data),
        options=settings.trainer,
        checkpoints=checkpoints,
    )
    configure_method(
        method,
        trainer.strategy.root_device,
        compile=settings.compile,
        cuda_graphs=settings.cuda_graphs,
        world_size=trainer.world_size,
        accumulate=trainer.accumulate_grad_batches,
    )
    steps_per_epoch = data.batches_of(trainer).steps_per_epoch  # raises if there are fewer images than a batch has
    if resume is not None:
        check_same(resume, checkpoints.record)
    findings = [*findings, *data.splits.remarks, *(resume.findings if resume is not None else [])]
    if trainer.is_global_zero:
        take_folder(folder, settings, resume)
        rewind_metrics(trainer.loggers, resume)
        run_files.describe(folder, dataclasses.asdict(settings), words)
        rows = effective_configuration(settings, method, data.splits, trainer, steps_per_epoch) | {
            "weights": weights if resume is None else f"update {resume.step:,} in {resume.path}",
            "run folder": str(folder),
        }
        print_configuration(console, rows, title=settings.about or folder.name)
        print_findings(console, findings)
    fit(trainer, method, data, checkpoint=resume.path if resume is not None else None)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    if not trainer.is_global_zero:
        return {}
    training_seconds = time.perf_counter() - started
    findings = list(dict.fromkeys(findings + (found := findings_of(trainer))))  # a resumed run finds some of them again
    print_findings(console, found)
    console.print("\nTraining is finished. Exporting and evaluating the backbone.")
    results = export_and_evaluate(settings, folder, data, trainer, console)
    results |= {
        "findings": findings + results.get("findings", []),
        **waiting_of(trainer),
        "training_seconds": round(training_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    run_files.write_json(folder / "results.json", results)
    if unsent := close_loggers(trainer.loggers, folder):
        console.print(unsent)
    console.print(f"Finished in {results['seconds']:.0f} s. Everything is in {folder}, described in its README.md.")
    return results


def method_from_settings(settings: Pretrain) -> Method:
    """Build the method that the settings describe."""
    return build_method(
        settings.method,
        settings.backbone,
        channels=int(settings.data.get("channels", 3)),
        lr=settings.peak_lr,
        seed=settings.seed,
        activation_checkpointing=settings.activation_checkpointing,
    )


def build_method(
    method: Mapping[str, Any],
    backbone: Mapping[str, Any],
    *,
    channels: int,
    lr: float,
    seed: int,
    activation_checkpointing: bool = False,
) -> Method:
    """Build a method on its backbone, with random weights that are a function of the seed.

    Args:
        method: The method's `_target_` and its settings.
        backbone: Arguments of build_backbone.
        channels: Channels of an image.
        lr: Peak learning rate.
        seed: Seed for the weights, and for everything that the method draws.
        activation_checkpointing: Recompute activations in the backward pass.
    """
    options = {key: value for key, value in method.items() if key != "_target_"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        neutral = [0.5] * channels  # until the statistics of the pixels are known
        built = locate("method", method["_target_"])(
            build_backbone(**backbone, channels=channels), lr=lr, mean=neutral, std=neutral, seed=seed, **options
        )
    assert isinstance(built, Method)
    if activation_checkpointing:
        built.enable_activation_checkpointing()
    return built


def open_data(settings: Pretrain, method: Method) -> ImageData:
    """Open the images as batches for the method, and give it the statistics of their pixels."""
    splits, normalize = open_splits(settings.data), settings.data.get("normalize", "computed")
    settings.data |= decided_from(splits)
    with remarks_in_errors(splits.remarks):
        method.normalize.set(*pixel_statistics(splits.train, normalize, seed=settings.seed))
    crop_pct = choose_crop_pct([splits.train, splits.test], method.pretrained().image_size[0])
    for module in method.modules():
        if isinstance(module, Backbone):
            module.crop_pct = crop_pct
    return ImageData(
        splits,
        method.crops,
        batch_size=settings.batch_size,
        seed=settings.seed,
        workers=settings.data.get("workers"),
        crop_pct=crop_pct,
    )


def open_splits(data: Mapping[str, Any]) -> Splits:
    """Open the source that the `data` section of a recipe describes.

    Args:
        data: The source's `_target_` and its arguments, and the arguments of loader and cache.

    Raises:
        UsageError, DataError: From the source.
    """
    cache = ("cache", "cache_size", "cache_dir")
    loader = ("workers", "normalize", "max_unreadable", *cache)  # arguments that the source does not get
    target = locate("data", data["_target_"])
    splits = target(**{key: value for key, value in data.items() if key not in ("_target_", *loader)})
    check_contract(splits)
    side, workers = data.get("cache_size", 320), data.get("workers")
    return cached(splits, data.get("cache"), side=side, folder=data.get("cache_dir"), workers=workers)


def decided_from(splits: Splits) -> dict[str, Any]:
    """Return the settings of `data` that were decided from the images themselves; a run's files keep them."""
    value_range = getattr(splits.train, "value_range", None)
    return {} if value_range is None else {"value_range": value_range.setting}


def read_as_in_training(data: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Return a `data` section with the value range of the images that a run was trained on, unless it has its own."""
    takes_one = "value_range" in inspect.signature(locate("data", data["_target_"])).parameters
    recorded = recorded_value_range(run) if takes_one and data.get("value_range", "auto") == "auto" else None
    return {**data} if recorded is None else {**data, "value_range": recorded}


def pretraining_callbacks(settings: Pretrain, folder: Path, data: ImageData) -> list[Callback]:
    """Return the callbacks of a pretraining run, checkpoints and progress included."""
    splits, every = data.splits, settings.knn_every_epochs
    callbacks: list[Callback] = [
        UnreadableImages(splits.train, folder / "unreadable.csv", settings.data.get("max_unreadable", 0.1)),
        PeriodicCheckpoints(
            folder / "checkpoints" / "last.ckpt",
            every_epochs=settings.checkpoint_every_epochs,
            every_steps=settings.checkpoint_every_steps,
        ),
        StopOnSignal(folder / "checkpoints" / "last.ckpt", folder, requeues=settings.resume == "auto"),
        SkippedUpdates(folder, settings.max_skipped),
        Health(settings.health),
    ]
    if every:
        labeled = has_labels(splits)
        callbacks.append(OnlineEvaluation(splits, labeled=labeled, every_epochs=every, workers=data.workers))
    if every and splits.test is not None:
        callbacks.append(Pictures(splits.test, folder / "figures", every_epochs=every))
    waits = None
    if splits.train.images is None:  # images in memory have no loader to wait for
        callbacks.append(waits := DataWaits(workers=data.workers, cached=settings.data.get("cache") in ("ram", "disk")))
    if settings.trainer.get("enable_progress_bar", True):
        steps_per_epoch = len(splits.train) // settings.batch_size
        steps = 2 if settings.dry_run else settings.epochs * steps_per_epoch
        callbacks.append(
            Progress(
                images_per_step=settings.batch_size, total_steps=steps, steps_per_epoch=steps_per_epoch, waits=waits
            )
        )
    return callbacks


def effective_configuration(
    settings: Pretrain, method: Method, splits: Splits, trainer: L.Trainer, steps_per_epoch: int
) -> dict[str, str]:
    """Return the configuration in effect, in the terms to check before a run of days."""
    steps = steps_per_epoch * settings.epochs
    accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
    per_device = settings.batch_size // (accumulate * world)
    rule = "given as lr" if settings.lr is not None else f"{settings.base_lr:g} x {settings.batch_size} / 256"
    warmup = float(settings.method.get("warmup_epochs", 0))
    held_out = f", {len(splits.test):,} held out" if splits.test is not None else ", none held out"
    encoder = sum(parameter.numel() for parameter in method.pretrained().parameters())
    trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    options = ", ".join(f"{key} {value}" for key, value in settings.backbone.items() if key != "name")
    device = trainer.strategy.root_device
    gpu = (
        f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f" ({torch.get_num_threads()} threads)"
    )
    precision = precision_in_effect(trainer, method.pretrained())
    rows = {
        "method": f"{type(method).__name__} on {settings.backbone['name']}" + (f" with {options}" if options else ""),
        "parameters": f"{encoder:,} in the backbone, {trained:,} trained",
        "data": f"{splits.train.name}: {len(splits.train):,} images{held_out}; {classes_in_words(splits.train)}",
        "global batch": f"{settings.batch_size} = {per_device} x {world} device(s) x {accumulate} accumulated",
        "learning rate": f"{settings.peak_lr:.3g} = {rule}, warm-up {round(warmup * steps_per_epoch):,} steps"
        + (" (longer than the run: the peak is never reached)" if warmup > settings.epochs else ""),
        "steps": f"{steps:,} = {settings.epochs} epochs of {steps_per_epoch:,}"
        + (" (dry run: 2)" if settings.dry_run else ""),
        **method.describe(),
        "evaluation": describe_crop(method.pretrained().crop_pct),
        "device": f"{device.type}{gpu if world == 1 else f' x {world}'}, precision {precision}",
    }
    if should_compile(settings.compile, device):
        rows["kernels"] = (
            "blocks and losses are compiled during the first steps" + method.captures * ", steps are CUDA graphs"
        )
    if settings.activation_checkpointing:
        rows["memory"] = "activations are recomputed in the backward pass (activation_checkpointing=true)"
    return rows | ({"reference": settings.reference} if settings.reference else {})


def export_and_evaluate(
    settings: Pretrain, folder: Path, data: ImageData, trainer: L.Trainer, console: Console
) -> dict[str, Any]:
    """Export the backbone of the last checkpoint, draw the figures, and evaluate the features."""
    splits, device = data.splits, trainer.strategy.root_device
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    method = method_from_settings(settings)
    method.load_state_dict(checkpoint["state_dict"])
    method.pretrained().crop_pct = data.crop_pct
    mean, std = method.normalize.mean.tolist(), method.normalize.std.tolist()
    export_backbone(method.pretrained(), folder / "export", mean=mean, std=std)
    record_value_range(folder / "export", settings.data.get("value_range"))
    method.to(device)
    if splits.test is not None:
        draw_pictures(method, splits.test, folder / "figures", trainer.loggers, trainer.global_step)
    scores: dict[str, float] = {}
    findings: list[str] = []
    if has_labels(splits):
        rows = score_features(settings, method, data, precision=compute_dtype(trainer))
        if unreadable := max([row.pop("unreadable_share") for row in rows.values()]):
            findings = [
                f"{100 * unreadable:.3g} % of the held-out images cannot be read: scores are those of the others."
            ]
            print_findings(console, findings)
        print_scores(console, rows, title=f"Frozen features on {splits.train.name}")
        for prefix, row in zip(("", "untrained_", "pixels_"), rows.values(), strict=True):
            scores |= {f"{prefix}{name}": round(value, 2) for name, value in row.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=trainer.global_step)
    else:
        console.print(f"{why_not_evaluated(splits)}, so the features are not scored.")
    metrics = read_metrics(folder / "metrics.csv")
    figure = learning_curve_figure(
        metrics, title=settings.about or folder.name, untrained_knn=scores.get("untrained_knn_top1")
    )
    figure.savefig(folder / "figures" / "learning_curve.png")
    if (health := health_figure(metrics, title=f"Health: {settings.about or folder.name}")) is not None:
        health.savefig(folder / "figures" / "health.png")
    losses = [loss for loss in metrics.get("loss", []) if loss is not None]
    return {"loss": losses[-1] if losses else None, **scores, "findings": findings}


def score_features(
    settings: Pretrain, method: Method, data: ImageData, *, precision: torch.dtype
) -> dict[str, dict[str, float]]:
    """Return the scores of the pretrained backbone, of the same backbone untrained, and of raw pixels."""
    options: dict[str, Any] = {
        "at_most": 256 if settings.dry_run else settings.evaluate_images,
        "workers": data.workers,
    }
    untrained = method_from_settings(settings).pretrained().to(method.device)
    untrained.crop_pct = data.crop_pct
    rows = {
        name: evaluate_backbone(backbone, method.normalize, data.splits, precision=precision, **options)
        for name, backbone in (("pretrained", method.pretrained()), ("the same, untrained", untrained))
    }
    return rows | {"raw pixels": evaluate_pixels(data.splits, device=method.device, **options)}
