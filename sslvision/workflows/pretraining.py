"""Stage one: a recipe becomes objects, the objects train, and what is left is a backbone, its scores and its pictures."""

import dataclasses
import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from rich.console import Console
from rich.markup import escape

from sslvision.backbones.build import build_backbone
from sslvision.data.cache import cached
from sslvision.data.datamodule import ImageData, pixel_statistics
from sslvision.data.source import Splits
from sslvision.evaluation.evaluate import evaluate_backbone, evaluate_pixels, has_labels
from sslvision.figures.curves import health_figure, learning_curve_figure
from sslvision.methods.base import Method
from sslvision.nn.compilation import wanted
from sslvision.runs import run_folder
from sslvision.runs.checkpoint import AtomicCheckpoints
from sslvision.runs.loggers import build_loggers, close_loggers
from sslvision.runs.metrics import read_metrics
from sslvision.runs.resume import check_same, checkpoint_to_resume, record, rewind_metrics, take_folder, train_from
from sslvision.runs.weights import export_backbone, load_weights
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
from sslvision.training.trainer import build_trainer, choose_kernels, choose_layers_for, compute_dtype
from sslvision.workflows.console import findings_of, print_configuration, print_scores, waiting_of


def pretrain(config: Pretrain, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Pretrain a backbone, export it, and say how good it is.

    Args:
        config: all settings.
        folder: of the run.
        words: the command line, for the record.

    Returns:
        What results.json holds; in all processes but the first, nothing.

    Raises:
        UsageError, DataError: before the first step, for settings or data that cannot be; DataError also when too many
            images turn out unreadable, and Diverged when the loss is no longer finite.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    hush_lightning()
    choose_kernels(config.trainer.get("accelerator", "auto"))
    method = method_of(config)
    resume = checkpoint_to_resume(config.resume, folder)
    weights = load_weights(method, config.init_from) if config.init_from and resume is None else "random"
    splits = open_splits(config.data)
    statistics = pixel_statistics(splits.train, config.data.get("normalize", "computed"), seed=config.seed)
    method.normalize.set(*statistics)
    data = ImageData(
        splits, method.crops, batch_size=config.batch_size, seed=config.seed, workers=config.data.get("workers")
    )
    checkpoints = AtomicCheckpoints(keep=config.keep_checkpoints, record=record(config, images=len(splits.train)))
    trainer = build_trainer(
        folder=folder,
        epochs=config.epochs,
        steps=config.epochs * (len(splits.train) // config.batch_size),
        dry_run=config.dry_run,
        loggers=build_loggers(config.logger, folder, dataclasses.asdict(config)),
        callbacks=watchers(config, folder, data),
        options=config.trainer,
        checkpoints=checkpoints,
    )
    choose_layers_for(trainer, method, compiled=config.compile, captured=config.cuda_graphs)
    steps_per_epoch = data.batches_of(trainer).steps_per_epoch  # raises if there are too few images for a batch
    if resume is not None:
        check_same(resume, checkpoints.record)
    if trainer.is_global_zero:
        take_folder(folder, config, resume)
        rewind_metrics(trainer.loggers, resume)
        run_folder.describe(folder, dataclasses.asdict(config), words)
        rows = effective_configuration(config, method, splits, trainer, steps_per_epoch) | {
            "weights": weights if resume is None else f"those of update {resume.step:,} in {resume.path}",
            "run folder": str(folder),
        }
        print_configuration(console, rows, title=config.about or folder.name)
        for finding in resume.findings if resume is not None else ():
            console.print(f"[yellow]{escape(finding)}[/]")

    train_from(resume.path if resume is not None else None, trainer, method, data)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    if not trainer.is_global_zero:
        return {}
    seconds = time.perf_counter() - started
    findings = (resume.findings if resume is not None else []) + findings_of(trainer)
    for finding in findings:
        console.print(f"[yellow]{escape(finding)}[/]")
    console.print("\nTraining is done; now the backbone is exported and evaluated.")
    results = finish(config, folder, data, trainer, console)
    results |= {
        "findings": findings,
        **waiting_of(trainer),
        "training_seconds": round(seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    run_folder.write_json(folder / "results.json", results)
    if left := close_loggers(trainer.loggers, folder):
        console.print(left)
    console.print(f"{results['seconds']:.0f} s in all. Everything is in {folder}; its README.md says what is what.")
    return results


def hush_lightning() -> None:
    """Silence what Lightning says that a person can do nothing about, or that our own configuration panel says."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*LeafSpec.*",  # a call in Lightning 2.6 that torch 2.15 deprecates
        ".*Checkpoint directory .* exists and is not empty.*",  # it does when a run is resumed
        ".*The dirpath has changed.*",  # a run's folder may be moved; what the callback forgets we do not use
        ".*module\\(s\\) in eval mode at the start of training.*",  # a teacher is
        ".*dataloader is not resumable.*",  # its sampler begins at the trainer's position
        ".*does not have many workers.*",  # images in memory need none
        ".*smaller than the logging interval.*",  # the last update is always logged
        ".*no `val_dataloader`.*",  # a set may be too small to validate on
    ):
        warnings.filterwarnings("ignore", message=message)


def build_method(
    method: Mapping[str, Any],
    backbone: Mapping[str, Any],
    *,
    channels: int,
    lr: float,
    seed: int,
    activation_checkpointing: bool = False,
) -> Method:
    """Build a method on its backbone with random weights, which are a function of the seed.

    Args:
        method: `_target_` and its settings.
        backbone: see build_backbone.
        channels: of the images.
        lr: peak learning rate.
        seed: of the weights, and of all that the method draws.
        activation_checkpointing: compute activations again in the backward pass.
    """
    settings = {key: value for key, value in method.items() if key != "_target_"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        neutral = [0.5] * channels  # until the data are known
        built = locate("method", method["_target_"])(
            build_backbone(**backbone, channels=channels), lr=lr, mean=neutral, std=neutral, seed=seed, **settings
        )
    assert isinstance(built, Method)
    if activation_checkpointing:
        built.enable_activation_checkpointing()
    return built


def method_of(config: Pretrain) -> Method:
    """Build the method that the settings describe."""
    options: dict[str, Any] = {
        "lr": config.peak_lr,
        "seed": config.seed,
        "channels": int(config.data.get("channels", 3)),
    }
    options["activation_checkpointing"] = config.activation_checkpointing
    return build_method(config.method, config.backbone, **options)


def open_splits(data: Mapping[str, Any]) -> Splits:
    """Open the source that the `data` section of a recipe describes.

    Args:
        data: `_target_` and its keywords, and the keywords of the loader.

    Raises:
        UsageError, DataError: whatever the source says.
    """
    cache = ("cache", "cache_size", "cache_dir")
    loader = ("workers", "normalize", "max_unreadable", *cache)  # the loader's keys, not the source's
    target = locate("data", data["_target_"])
    splits = target(**{key: value for key, value in data.items() if key not in ("_target_", *loader)})
    side, workers = data.get("cache_size", 320), data.get("workers")
    return cached(splits, data.get("cache"), side=side, folder=data.get("cache_dir"), workers=workers)


def watchers(config: Pretrain, folder: Path, data: ImageData) -> list[Callback]:
    """Return what looks on while training goes: progress, checkpoints, unreadable images, health, features, pictures."""
    splits, every = data.splits, config.knn_every_epochs
    found: list[Callback] = [
        UnreadableImages(splits.train, folder / "unreadable.csv", config.data.get("max_unreadable", 0.1)),
        PeriodicCheckpoints(
            folder / "checkpoints" / "last.ckpt",
            every_epochs=config.checkpoint_every_epochs,
            every_steps=config.checkpoint_every_steps,
        ),
        StopOnSignal(folder / "checkpoints" / "last.ckpt", folder, requeues=config.resume == "auto"),
        SkippedUpdates(folder, config.max_skipped),
        Health(config.health),
    ]
    if every:
        labeled = has_labels(splits)
        found.append(OnlineEvaluation(splits, labeled=labeled, every_epochs=every, workers=data.workers))
    if every and splits.test is not None:
        found.append(Pictures(splits.test, folder / "figures", every_epochs=every))
    waits = None
    if splits.train.images is None:  # those in memory need no loader
        found.append(waits := DataWaits(workers=data.workers, cached=config.data.get("cache") in ("ram", "disk")))
    if config.trainer.get("enable_progress_bar", True):
        steps_per_epoch = len(splits.train) // config.batch_size
        steps = 2 if config.dry_run else config.epochs * steps_per_epoch
        found.append(
            Progress(images_per_step=config.batch_size, total_steps=steps, steps_per_epoch=steps_per_epoch, waits=waits)
        )
    return found


def effective_configuration(
    config: Pretrain, method: Method, splits: Splits, trainer: L.Trainer, steps_per_epoch: int
) -> dict[str, str]:
    """Return what will happen, in the terms a person checks before letting it run for days."""
    steps = steps_per_epoch * config.epochs
    accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
    per_device = config.batch_size // (accumulate * world)
    rule = "given as lr" if config.lr is not None else f"{config.base_lr:g} x {config.batch_size} / 256"
    warmup = float(config.method.get("warmup_epochs", 0))
    held_out = f", {len(splits.test):,} held out" if splits.test is not None else ", none held out"
    encoder = sum(parameter.numel() for parameter in method.pretrained().parameters())
    trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    options = ", ".join(f"{key} {value}" for key, value in config.backbone.items() if key != "name")
    device = trainer.strategy.root_device
    gpu = (
        f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f" ({torch.get_num_threads()} threads)"
    )
    rows = {
        "method": f"{type(method).__name__} on {config.backbone['name']}" + (f" with {options}" if options else ""),
        "parameters": f"{encoder:,} in the backbone, {trained:,} trained",
        "data": f"{splits.train.name}: {len(splits.train):,} images{held_out}",
        "global batch": f"{config.batch_size} = {per_device} x {world} device(s) x {accumulate} accumulated",
        "learning rate": f"{config.peak_lr:.3g} = {rule}, warm-up {round(warmup * steps_per_epoch):,} steps"
        + (" (longer than the run, so the peak is never reached)" if warmup > config.epochs else ""),
        "steps": f"{steps:,} = {config.epochs} epochs of {steps_per_epoch:,}"
        + (" (dry run: 2)" if config.dry_run else ""),
        **method.describe(),
        "device": f"{device.type}{gpu if world == 1 else f' x {world}'}, precision {trainer.precision}",
    }
    if wanted(config.compile, device):
        rows["kernels"] = (
            "blocks and loss are compiled in the first steps" + method.captures * ", steps are CUDA graphs"
        )
    if config.activation_checkpointing:
        rows["memory"] = "activations are computed again in the backward pass instead of being kept"
    return rows | ({"reference": config.reference} if config.reference else {})


def finish(config: Pretrain, folder: Path, data: ImageData, trainer: L.Trainer, console: Console) -> dict[str, Any]:
    """Export what the last checkpoint holds, picture it, and say how good it is."""
    splits, device = data.splits, trainer.strategy.root_device
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    method = method_of(config)
    method.load_state_dict(checkpoint["state_dict"])
    mean, std = method.normalize.mean.tolist(), method.normalize.std.tolist()
    export_backbone(method.pretrained(), folder / "export", mean=mean, std=std)
    method.to(device)
    if splits.test is not None:
        draw_pictures(method, splits.test, folder / "figures", trainer.loggers, trainer.global_step)
    scores: dict[str, float] = {}
    if has_labels(splits):
        rows = score(config, method, data, precision=compute_dtype(trainer))
        print_scores(console, rows, title=f"How good are the features, on {splits.train.name}?")
        for prefix, row in zip(("", "untrained_", "pixels_"), rows.values(), strict=True):
            scores |= {f"{prefix}{name}": round(value, 2) for name, value in row.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scores, step=trainer.global_step)
    else:
        console.print(f"{splits.train.name} has no labels (class folders), so there is nothing to score features by.")
    metrics = read_metrics(folder / "metrics.csv")
    figure = learning_curve_figure(
        metrics, title=config.about or folder.name, untrained_knn=scores.get("untrained_knn_top1")
    )
    figure.savefig(folder / "figures" / "learning_curve.png")
    if (health := health_figure(metrics, title=f"Health: {config.about or folder.name}")) is not None:
        health.savefig(folder / "figures" / "health.png")
    losses = [loss for loss in metrics.get("loss", []) if loss is not None]
    return {"loss": losses[-1] if losses else None, **scores}


def score(config: Pretrain, method: Method, data: ImageData, *, precision: torch.dtype) -> dict[str, dict[str, float]]:
    """Return the scores of the pretrained backbone, of the same one untrained, and of raw pixels."""
    settings: dict[str, Any] = {
        "at_most": 256 if config.dry_run else config.evaluate_images,
        "workers": data.workers,
    }
    untrained = method_of(config).pretrained().to(method.device)
    rows = {
        name: evaluate_backbone(backbone, method.normalize, data.splits, precision=precision, **settings)
        for name, backbone in (("pretrained", method.pretrained()), ("the same, untrained", untrained))
    }
    return rows | {"raw pixels": evaluate_pixels(data.splits, device=method.device, **settings)}
