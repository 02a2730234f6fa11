"""Stage two: a pretrained backbone becomes a classifier of a small labeled set, beside the same network from scratch.

The head comes first: fitted on frozen features, it is what training goes on from (LP-FT: Kumar et al. 2022,
arXiv:2202.10054), so that the gradients of a random head do not spoil the features. Then the layers that are not frozen
train, at a tenth of the pretraining rate. The weights that did best on the validation images are kept.
"""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from rich.markup import escape

from sslvision.evaluation.scores import Scores, as_json, score
from sslvision.figures.curves import learning_curve_figure
from sslvision.figures.confusion import confusion_figure
from sslvision.methods.supervised import Supervised
from sslvision.runs import run_folder
from sslvision.runs.checkpoint import AtomicCheckpoints
from sslvision.runs.loggers import build_loggers, close_loggers
from sslvision.runs.metrics import read_metrics
from sslvision.runs.resume import Resume, check_same, checkpoint_to_resume, record, rewind_metrics, take_folder
from sslvision.runs.weights import export_backbone
from sslvision.settings import Finetune
from sslvision.training.callbacks.data_waits import DataWaits
from sslvision.training.callbacks.periodic_checkpoints import PeriodicCheckpoints
from sslvision.training.callbacks.progress import Progress
from sslvision.training.callbacks.stop_on_signal import StopOnSignal
from sslvision.training.callbacks.unreadable_images import UnreadableImages
from sslvision.training.trainer import build_trainer, choose_kernels, compute_dtype
from sslvision.workflows.console import findings_of, print_configuration, print_probe, waiting_of
from sslvision.workflows.labeled_data import LabeledData, open_labeled_data, rank
from sslvision.workflows.pretraining import hush_lightning
from sslvision.workflows.transfer import (
    Fitted,
    adapt_statistics,
    batch_size,
    build,
    classifier,
    fit,
    fit_head,
    from_scratch,
    plan,
)

CONTENTS = """\
# {name}

Made by `{command}`.

| file | what it is |
| --- | --- |
| results.json | top-1, top-5 and per-class accuracy of the fine-tuned network, of its frozen features and from scratch |
| export/ | the classifier with its class names: `timm.create_model("local-dir:{folder}/export", pretrained=True)` |
| figures/ | what is taken for what (confusion), learning curves |
| metrics.csv, scratch/metrics.csv | loss, rate and validation accuracy by step |
| checkpoints/last.ckpt, last-1.ckpt, ... | all that `resume=auto` needs to go on, and the same of before |
| config.yaml | every setting of the run, in full |
| environment.json | versions, git commit and hardware |
| unreadable.csv | images that could not be read, if there were any |

Label new images: `python -m sslvision.predict run={folder} images=...`
"""


def finetune(config: Finetune, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Fine-tune, and train from scratch for comparison; export the classifier and say how good it is.

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
    labeled = open_labeled_data(config)
    lr = rate(config, labeled, config.lr_ratio)
    method = classifier(config, labeled, build(config, pretrained=True, seed=config.seed), lr=lr, seed=config.seed)
    first, checkpoints, resume = going_on(config, labeled, folder)
    findings = resume.findings if resume is not None else []
    is_first, precision, device = first.is_global_zero, compute_dtype(first), first.strategy.root_device
    if is_first:
        take_folder(folder, config, resume)
        run_folder.describe(folder, dataclasses.asdict(config), words, command="finetune", contents=CONTENTS)
        print_configuration(console, configuration(config, labeled, method, folder), title=config.about or folder.name)
        for finding in findings:
            console.print(f"[yellow]{escape(finding)}[/]")

    scores: dict[str, Scores] = {}
    if config.head_first and labeled.weights != "random":
        head, scores["frozen features"] = fit_head(
            labeled, method.backbone.to(device), precision=precision, seed=config.seed
        )
        if adapt_statistics(method.backbone, labeled, seed=config.seed):
            head, _ = fit_head(labeled, method.backbone, precision=precision, seed=config.seed)
        method.start_head(*head)
        if is_first:
            console.print(f"The head on frozen features: {scores['frozen features'].top1:.1f} % of the test images.")
    tuned = train(config, labeled, method, folder, checkpoints, resume)
    scores = {"fine-tuned": test_scores(tuned, labeled, precision)} | scores
    rates = {"fine-tuned": lr}
    if config.scratch and labeled.weights != "random":
        if is_first:
            console.print("\nThe same network from random weights:")
        plain = dataclasses.replace(from_scratch(config), lr=None, base_lr=None)
        rates["from scratch"] = rate(plain, labeled, config.scratch_lr_ratio)
        network = build(plain, pretrained=False, seed=config.seed)
        method = classifier(plain, labeled, network, lr=rates["from scratch"], seed=config.seed)
        _, checkpoints, resume = going_on(plain, labeled, folder / "scratch")
        if is_first and resume is not None:
            resume.set_aside()
        untuned = train(plain, labeled, method, folder / "scratch", checkpoints, resume)
        scores["from scratch"] = test_scores(untuned, labeled, precision)
    if not tuned.trainer.is_global_zero:
        return {}
    results = finish(config, folder, labeled, tuned, scores, rates, console)
    findings += findings_of(tuned.trainer)
    results |= ({"findings": findings} if findings else {}) | waiting_of(tuned.trainer)
    results |= {"seconds": round(time.perf_counter() - started, 1)}
    run_folder.write_json(folder / "results.json", results)
    console.print(f"{results['seconds']:.0f} s in all. Everything is in {folder}; its README.md says what is what.")
    return results


def rate(config: Finetune, labeled: LabeledData, ratio: float) -> float:
    """Return the peak learning rate: the given one, or a part of pretraining's for as large a batch."""
    if config.lr is not None:
        return config.lr
    base_lr = config.base_lr if config.base_lr is not None else ratio * labeled.base_lr
    return base_lr * batch_size(config, labeled) / 256


def going_on(
    config: Finetune, labeled: LabeledData, folder: Path
) -> tuple[L.Trainer, AtomicCheckpoints, Resume | None]:
    """Return a trainer to ask about the machine, how checkpoints are written in `folder`, and where to go on, if at all.

    Raises:
        UsageError: there is a checkpoint, but damaged or of other settings.
    """
    checkpoints = AtomicCheckpoints(
        keep=config.keep_checkpoints,
        record=record(config, images=len(labeled.train), batch=batch_size(config, labeled)),
    )
    trainer = build_trainer(
        folder=folder,
        epochs=1,
        steps=1,
        dry_run=True,
        loggers=[],
        callbacks=[],
        options=config.trainer,
        checkpoints=checkpoints,
    )
    resume = checkpoint_to_resume(config.resume, folder)
    if resume is not None:
        check_same(resume, checkpoints.record)
    return trainer, checkpoints, resume


def train(
    config: Finetune,
    labeled: LabeledData,
    method: Supervised,
    folder: Path,
    checkpoints: AtomicCheckpoints,
    resume: Resume | None,
) -> Fitted:
    """Train one network, with all that a person watches and keeps of it."""
    batch = batch_size(config, labeled)
    updates, every = plan(config, len(labeled.train), batch)
    last = folder / "checkpoints" / "last.ckpt"
    watchers: list[Callback] = [
        UnreadableImages(labeled.train, folder / "unreadable.csv", config.data.get("max_unreadable", 0.1)),
        PeriodicCheckpoints(last, every_steps=every)
        if labeled.validation is None
        else ModelCheckpoint(  # after each validation, so that what was best is in it
            last.parent, filename="last", save_on_train_epoch_end=False, enable_version_counter=False
        ),
        StopOnSignal(last, folder.parent if folder.name == "scratch" else folder, requeues=config.resume == "auto"),
    ]
    waits = None
    if labeled.train.images is None or config.randaugment:  # those in memory need no loader, unless it augments them
        cached = labeled.train.images is not None or config.data.get("cache") in ("ram", "disk")
        watchers.append(waits := DataWaits(workers=labeled.workers, cached=cached))
    if config.trainer.get("enable_progress_bar", True):
        per_epoch = max(1, len(labeled.train) // batch)
        watchers.append(Progress(images_per_step=batch, total_steps=updates, steps_per_epoch=per_epoch, waits=waits))
    folder.mkdir(parents=True, exist_ok=True)
    loggers = build_loggers(config.logger, folder, dataclasses.asdict(config))
    rewind_metrics(loggers, resume)
    fitted = fit(
        config,
        labeled,
        method,
        folder=folder,
        loggers=loggers,
        callbacks=watchers,
        checkpoints=checkpoints,
        resume_from=resume.path if resume is not None else None,
    )
    close_loggers(loggers, folder)
    return fitted


def test_scores(fitted: Fitted, labeled: LabeledData, precision: torch.dtype) -> Scores:
    """Return the scores of a trained classifier on the test images."""
    backbone = fitted.method.evaluated.to(fitted.trainer.strategy.root_device)
    return score(*rank(backbone, labeled, labeled.test, precision=precision), classes=len(labeled.classes))


def configuration(config: Finetune, labeled: LabeledData, method: Supervised, folder: Path) -> dict[str, str]:
    """Return what will happen, in the terms a person checks."""
    batch = batch_size(config, labeled)
    updates, every = plan(config, len(labeled.train), batch)
    part = method.lr / (labeled.base_lr * batch / 256)
    held = f"{len(labeled.validation):,} to validate on" if labeled.validation is not None else "none to validate on"
    return {
        "weights": labeled.weights,
        "images": f"{labeled.train.name}: {len(labeled.train):,} to learn from, {held}, {len(labeled.test):,} to score by",
        **method.describe(),
        "learning rate": f"{method.lr:.3g}, {part:.3g} of pretraining's for {batch} images",
        "updates": f"{updates:,} of {batch} images, validated every {every:,}",
        "run folder": str(folder),
    }


def finish(
    config: Finetune,
    folder: Path,
    labeled: LabeledData,
    tuned: Fitted,
    scores: dict[str, Scores],
    rates: dict[str, float],
    console: Console,
) -> dict[str, Any]:
    """Export the classifier, draw, and print what it is worth."""
    best = tuned.method.evaluated.cpu()
    export_backbone(best, folder / "export", mean=labeled.mean, std=labeled.std, classes=labeled.classes)
    tested = int(scores["fine-tuned"].confusion.sum())
    print_probe(console, scores, title=f"How good is it, on {tested:,} test images of {labeled.test.name}?")
    if tested < len(labeled.test):
        console.print(f"[yellow]{len(labeled.test) - tested:,} test images cannot be read, and count for nothing.[/]")
    figures = folder / "figures"
    confusion_figure(
        scores["fine-tuned"].confusion, labeled.classes, title="Fine-tuned: what is taken for what"
    ).savefig(figures / "confusion.png")
    for name, where in (("fine-tuned", folder), ("from scratch", folder / "scratch")):
        if (where / "metrics.csv").is_file():
            figure = learning_curve_figure(read_metrics(where / "metrics.csv"), title=f"{folder.name}: {name}")
            figure.savefig(figures / f"learning_curve_{name.replace(' ', '_').replace('-', '_')}.png")
    for finding in findings_of(tuned.trainer):
        console.print(f"[yellow]{escape(finding)}[/]")
    if tuned.best.get("step") == 0:
        console.print(
            "[yellow]No update did better on the validation images than the fitted head on frozen features, so these are what "
            "is kept. A higher rate (lr_ratio=), more updates or more validation images (holdout=) may change it.[/]"
        )
    if (scratch := scores.get("from scratch")) is not None:
        gain = scores["fine-tuned"].top1 - scratch.top1
        console.print(
            f"Fine-tuned against from scratch: {gain:+.1f} points at {len(labeled.train):,} labeled images. That is one "
            "training of each at one rate, a hint; compare=true tunes and repeats both."
        )
    return {
        name.replace(" ", "_").replace("-", "_"): as_json(arm, labeled.classes)
        | ({"lr": rates[name]} if name in rates else {})
        for name, arm in scores.items()
    } | {
        "validation_top1": tuned.best.get("val_top1"),
        "best_update": tuned.best.get("step"),
        "updates": tuned.updates,
        "weights": labeled.weights,
    }
