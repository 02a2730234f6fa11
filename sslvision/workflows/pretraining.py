"""Pretraining: settings become a method, data and a trainer; training leaves a backbone, its scores and figures."""

import dataclasses
import inspect
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from rich.console import Console

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.load import backbone_of_weights
from sslvision.data.cache import cached
from sslvision.data.contract import check_contract
from sslvision.data.datamodule import ImageData, pixel_statistics
from sslvision.data.source import Source, Splits, remarks_in_errors
from sslvision.errors import UsageError
from sslvision.evaluation.central_crop import choose_crop_pct, describe_crop, typical_size
from sslvision.evaluation.evaluate import has_labels, why_not_evaluated
from sslvision.methods.base import Method
from sslvision.nn.compilation import should_compile
from sslvision.nn.image_size import written
from sslvision.runs import run_files
from sslvision.runs.checkpoint import AtomicCheckpoints
from sslvision.runs.loggers import build_loggers, close_loggers
from sslvision.runs.resume import Resume, check_same, checkpoint_to_resume, record, rewind_metrics, take_folder
from sslvision.runs.weights import load_weights, recorded_value_range
from sslvision.settings import Pretrain, locate
from sslvision.training.trainer import (
    build_trainer,
    configure_for,
    configure_torch,
    fit,
    precision_in_effect,
    silence_lightning,
)
from sslvision.workflows.budget import Length, fill_budget, keep_budget, length_of_steps, recorded_length
from sslvision.workflows.callbacks import pretraining_callbacks
from sslvision.workflows.cards_of_run import write_cards_of_run
from sslvision.workflows.console import (
    classes_in_words,
    findings_of,
    print_configuration,
    print_findings,
    waiting_of,
)
from sslvision.workflows.final_evaluation import encode_share, export_and_evaluate
from sslvision.workflows.method import method_from_settings, with_settings
from sslvision.workflows.readings import next_command, print_next, read_curves_of
from sslvision.workflows.reporting import reports

SMALL = 40  # pixels: the side of images that recipes for small images have


@reports
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
    resume = checkpoint_to_resume(settings.resume, folder)
    settings = continued(settings, resume)
    method = method_from_settings(settings)
    weights, findings = load_weights(method, None if resume else settings.init_from)
    data, length = open_data(settings, method), None
    if settings.budget is not None and not settings.dry_run:
        length = (
            recorded_length(settings, resume)
            if resume is not None
            else fill_budget(settings, method_from_settings(settings), data, words, started=started)
        )
    elif settings.max_steps is not None:
        length = length_of_steps(settings, len(data.splits.train), words, resume)
    if length is not None:
        settings, method = length.settings, with_settings(method, length.settings)
    evaluated, images = open_evaluated(settings, data.splits), len(data.splits.train)
    steps = length.updates if length is not None else settings.epochs * (images // settings.batch_size)
    timed = length if settings.budget is not None else None
    facts = {"images": images} | ({} if timed is None else {"budget": timed.record})
    checkpoints = AtomicCheckpoints(keep=settings.keep_checkpoints, record=record(settings, **facts))
    keeping = [] if timed is None else keep_budget(timed, checkpoints.record, folder, words, console)
    trainer = build_trainer(
        folder=folder,
        epochs=settings.epochs,
        steps=steps,
        max_steps=length.updates if length is not None else -1,
        dry_run=bool(settings.dry_run),
        loggers=build_loggers(settings.logger, folder, dataclasses.asdict(settings)),
        callbacks=[*keeping, *pretraining_callbacks(settings, folder, data, evaluated, steps)],
        options=settings.trainer,
        timeout=settings.timeout,
        checkpoints=checkpoints,
    )
    configure_for(trainer, method, compile=settings.compile, cuda_graphs=settings.cuda_graphs)
    steps_per_epoch = data.batches_of(trainer).steps_per_epoch  # raises if there are fewer images than a batch has
    if resume is not None:
        check_same(resume, checkpoints.record)
    told = [*data.splits.remarks, *method.remarks(), *shrunk(data.splits.train, method.pretrained().image_size)]
    findings = [*findings, *told, *(resume.findings if resume is not None else [])]
    if trainer.is_global_zero:
        take_folder(folder, settings, resume)
        rewind_metrics(trainer.loggers, resume)
        run_files.describe(folder, dataclasses.asdict(settings), words)
        rows = effective_configuration(settings, method, data.splits, trainer, steps_per_epoch, length) | {
            "weights": weights if resume is None else f"update {resume.step:,} in {resume.path}",
            "run folder": str(folder),
        }
        print_configuration(console, rows, title=settings.about or folder.name)
        print_findings(console, findings)
    fit(trainer, method, data, checkpoint=resume.path if resume is not None else None)
    trainer.save_checkpoint(folder / "checkpoints" / "last.ckpt")
    if not trainer.is_global_zero:
        encode_share(settings, data, evaluated, trainer)
        return {}
    return conclude(settings, folder, data, evaluated, trainer, console, words, findings=findings, started=started)


def conclude(
    settings: Pretrain,
    folder: Path,
    data: ImageData,
    evaluated: Splits,
    trainer: L.Trainer,
    console: Console,
    words: Sequence[str],
    *,
    findings: list[str],
    started: float,
) -> dict[str, Any]:
    """Export and evaluate after training, read the curves, and write results.json, whose content is returned."""
    training_seconds = time.perf_counter() - started
    findings = list(dict.fromkeys(findings + (found := findings_of(trainer))))  # a resumed run finds some of them again
    print_findings(console, found)
    console.print("\nTraining is finished. Exporting and evaluating the backbone.")
    results = export_and_evaluate(settings, folder, data, evaluated, trainer, console)
    method, held_out = trainer.lightning_module, len(evaluated.test) if evaluated.test is not None else None
    assert isinstance(method, Method)
    readings = read_curves_of(settings, folder, method, validation_images=held_out)
    print_findings(console, read := [str(reading) for reading in readings])
    results |= {
        "images": {"training": len(data.splits.train)},
        "findings": findings + results.get("findings", []) + read,
        **next_command(readings, words, command="pretrain", folder=folder),
        **waiting_of(trainer),
        "training_seconds": round(training_seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }
    run_files.write_json(folder / "results.json", results)
    write_cards_of_run(folder)
    if unsent := close_loggers(trainer.loggers, folder):
        console.print(unsent)
    print_next(console, results)
    console.print(f"Finished in {results['seconds']:.0f} s. Everything is in {folder}, described in its README.md.")
    return results


def continued(settings: Pretrain, resume: Resume | None) -> Pretrain:
    """Return the settings with the backbone of `init_from`, if none is named, and with the `init_from` of a resumed run."""
    then = resume.record["settings"] if resume is not None else {}
    init_from = settings.init_from or then.get("init_from")
    backbone = settings.backbone
    if "name" not in backbone:
        known = then["backbone"] if then else backbone_of_weights(str(init_from), setting="init_from")
        backbone = {**known, **backbone}
    return dataclasses.replace(settings, init_from=init_from, backbone=backbone)


def open_data(settings: Pretrain, method: Method) -> ImageData:
    """Open the images as batches for the method, and give it the statistics of their pixels."""
    splits, normalize = open_splits(settings.data), settings.data.get("normalize", "computed")
    settings.data |= decided_from(splits)
    with remarks_in_errors(splits.remarks):
        method.normalize.set(*pixel_statistics(splits.train, normalize, seed=settings.seed))
    crop_pct = choose_crop_pct([splits.train, splits.test], method.pretrained().image_size)
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


def open_evaluated(settings: Pretrain, splits: Splits) -> Splits:
    """Return the images that features are evaluated on: those of `probe_data`, or the training images and theirs.

    Raises:
        UsageError: `probe_data` has no labels, or no images to hold out.
    """
    if settings.probe_data is None:
        return splits
    taken = ("channels", "max_pixels", "value_range")  # read as the training images are
    options = {key: settings.data[key] for key in taken if key in settings.data}
    target = "sslvision.data.sources.folder.open_folder"
    evaluated = open_splits({"_target_": target, "root": settings.probe_data, **options})
    if not has_labels(evaluated):
        raise UsageError(
            f"probe_data={settings.probe_data} cannot be evaluated on: {why_not_evaluated(evaluated)}. Give a folder of class "
            "folders, best of train/ and val/ with class folders each."
        )
    return evaluated


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
    parameters = inspect.signature(target).parameters
    any_key = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    if "channels" in data and "channels" not in parameters and not any_key:
        raise UsageError(
            f"data._target_={data['_target_']} has no parameter channels: a function that opens a data source takes channels, "
            "the number of channels of its images (docs/extending.md)."
        )
    splits = target(**{key: value for key, value in data.items() if key not in ("_target_", *loader)})
    splits = check_contract(splits)
    side, workers = data.get("cache_size", 320), data.get("workers")
    return cached(splits, data.get("cache"), side=side, folder=data.get("cache_dir"), workers=workers)


def shrunk(source: Source, size: tuple[int, int]) -> list[str]:
    """Return, in a sentence, that photographs are shrunk to the size of a recipe for small images."""
    height, width = typical_size(source)
    if max(size) > SMALL or min(height, width) < 3 * max(size):
        return []
    return [
        f"Images of about {width}x{height} pixels are shrunk to {written(size)} (backbone.image_size). Recipes of that size "
        "are made for small, centered images: recipe=mae_photos and recipe=dino_photos are made for photographs."
    ]


def decided_from(splits: Splits) -> dict[str, Any]:
    """Return the settings of `data` that were decided from the images themselves; a run's files keep them."""
    value_range = getattr(splits.train, "value_range", None)
    return {} if value_range is None else {"value_range": value_range.setting}


def read_as_in_training(data: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Return a `data` section with the value range of the images that a run was trained on, unless it has its own."""
    takes_one = "value_range" in inspect.signature(locate("data", data["_target_"])).parameters
    recorded = recorded_value_range(run) if takes_one and data.get("value_range", "auto") == "auto" else None
    return {**data} if recorded is None else {**data, "value_range": recorded}


def effective_configuration(
    settings: Pretrain,
    method: Method,
    splits: Splits,
    trainer: L.Trainer,
    steps_per_epoch: int,
    length: Length | None = None,
) -> dict[str, str]:
    """Return the configuration in effect, in the terms to check before a run of days."""
    steps = steps_per_epoch * settings.epochs if length is None else length.updates
    accumulate, world = trainer.accumulate_grad_batches, trainer.world_size
    per_device = settings.batch_size // (accumulate * world)
    rule = "given as lr" if settings.lr is not None else f"{settings.base_lr:g} x {settings.batch_size} / 256"
    warmup = float(settings.method.get("warmup_epochs", 0))
    held_out = f", {len(splits.test):,} held out" if splits.test is not None else ", none held out"
    encoder = sum(parameter.numel() for parameter in method.pretrained().parameters())
    trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    options = ", ".join(f"{key} {value}" for key, value in settings.backbone.items() if key != "name")
    device, chosen = trainer.strategy.root_device, settings.method.get("optimizer")
    of_optimizer = [f"{key} {value}" for key, value in (settings.method.get("optimizer_options") or {}).items()]
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
        **({"optimizer": ", ".join([chosen, *of_optimizer])} if chosen else {}),
        "steps": f"{steps:,} = {steps / steps_per_epoch:.4g} epochs of {steps_per_epoch:,}"
        + (" (dry run: 2)" if settings.dry_run else ""),
        **method.describe(),
        "evaluation": describe_crop(method.pretrained().crop_pct, method.pretrained().image_size),
        "device": f"{device.type}{gpu if world == 1 else f' x {world}'}, precision {precision}",
    }
    if length is not None and length.words:
        rows["budget" if settings.budget is not None else "scaled"] = length.words
    if should_compile(settings.compile, device):
        rows["kernels"] = (
            "blocks and losses are compiled during the first steps" + method.captures * ", steps are CUDA graphs"
        )
    if settings.activation_checkpointing:
        rows["memory"] = "activations are recomputed in the backward pass (activation_checkpointing=true)"
    return rows | ({"reference": settings.reference} if settings.reference else {})
