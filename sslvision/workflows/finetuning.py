"""Fine-tuning: a pretrained backbone becomes a classifier of a small labeled set, beside the same network from scratch.

The head comes first: fitted on frozen features, it is where training starts (LP-FT: Kumar et al. 2022, arXiv:2202.10054),
so that the gradients of a random head do not distort the features. Then the layers that are not frozen train, at a tenth
of the learning rate of pretraining. The latest weights that did best on the validation images, up to noise, are kept.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as L
from pytorch_lightning.callbacks import Callback, ModelCheckpoint
from rich.console import Console

from sslvision.data.sources.list_images import share
from sslvision.evaluation.central_crop import describe_crop
from sslvision.evaluation.confidence import Scores, as_json, score
from sslvision.figures.confusion import save_confusion
from sslvision.figures.curves import learning_curve_figure
from sslvision.methods.supervised import Supervised
from sslvision.runs import run_files
from sslvision.runs.checkpoint import AtomicCheckpoints
from sslvision.runs.loggers import build_loggers, close_loggers
from sslvision.runs.metrics import read_metrics
from sslvision.runs.resume import Resume, check_same, checkpoint_to_resume, record, rewind_metrics, take_folder
from sslvision.runs.weights import export_backbone, record_value_range
from sslvision.settings import Finetune
from sslvision.training.callbacks.data_waits import DataWaits
from sslvision.training.callbacks.periodic_checkpoints import PeriodicCheckpoints
from sslvision.training.callbacks.progress import Progress
from sslvision.training.callbacks.stop_on_signal import StopOnSignal
from sslvision.training.callbacks.unreadable_images import UnreadableImages
from sslvision.training.trainer import configure_torch, resolve_machine, silence_lightning
from sslvision.workflows.cards_of_run import write_cards_of_run
from sslvision.workflows.classifier_training import (
    TrainingPlan,
    adapt_batch_norms,
    build_classifier,
    build_classifier_trainer,
    fit_head,
    from_scratch,
    plan_training,
    train_classifier,
)
from sslvision.workflows.console import (
    findings_of,
    print_classifiers,
    print_configuration,
    print_findings,
    waiting_of,
)
from sslvision.workflows.labeled_data import LabeledData, open_labeled_data, rank_classes
from sslvision.workflows.readings import next_command, print_next, read_curves_of
from sslvision.workflows.reporting import reports

CONTENTS = """\
# {name}

Made by `{command}`.

| file | what it is |
| --- | --- |
| report.html | all of it to look at: scores, curves, pictures, settings; opens in a browser without a network |
| results.json | top-1, top-5 and per-class accuracy of the fine-tuned network, of its frozen features and from scratch |
| export/ | the classifier with its class names: `timm.create_model("local-dir:{folder}/export", pretrained=True)` |
| figures/ | confusion matrix, learning curves |
| metrics.csv, scratch/metrics.csv | loss, learning rate and validation accuracy by step |
| checkpoints/last.ckpt, last-1.ckpt, ... | the state from which `resume=auto` continues, and earlier ones |
| config.yaml | all settings of the run |
| environment.json | versions, git commit and hardware |
| unreadable.csv | images that could not be read, if any |

Label new images: `python -m sslvision.predict run={folder} images=...`
"""

TOO_HIGH = ("diverging", "degrading")  # readings of learning curves that advise a lower rate


@dataclasses.dataclass(frozen=True)
class Plan:
    """The trainings of a fine-tuning run; `scratch` is None where nothing is trained from random weights."""

    tuned: TrainingPlan
    scratch: TrainingPlan | None


@reports
def finetune(settings: Finetune, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Fine-tune, and train from scratch for comparison; export the classifier and evaluate both.

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
    labeled = open_labeled_data(settings)
    plan = plan_finetuning(settings, labeled, folder)
    method = build_classifier(plan.tuned, labeled)
    trainer, resume = prepare_trainer(plan.tuned, labeled)
    findings = [*labeled.remarks, *(resume.findings if resume is not None else [])]
    if trainer.is_global_zero:
        take_folder(folder, settings, resume)
        run_files.describe(folder, dataclasses.asdict(settings), words, command="finetune", contents=CONTENTS)
        print_configuration(
            console, effective_configuration(plan.tuned, labeled, method), title=settings.about or folder.name
        )
        print_findings(console, findings)

    scores: dict[str, Scores] = {}
    if plan.tuned.head_first:
        scores["frozen features"] = start_from_fitted_head(plan.tuned, labeled, method)
        if trainer.is_global_zero:
            console.print(f"Linear head on frozen features: {scores['frozen features'].top1:.1f} % test accuracy.")
    best = train(plan.tuned, labeled, method, trainer, resume)
    scores = {"fine-tuned": score_on_test_images(plan.tuned, labeled, method)} | scores
    held_out = len(labeled.validation) if labeled.validation is not None else None
    readings = read_curves_of(settings, folder, method, validation_images=held_out)
    found = (
        findings_of(trainer) + unreadable_test_images(labeled, scores["fine-tuned"]) + [str(one) for one in readings]
    )
    findings += found
    following = next_command(readings, words, command="finetune", folder=folder)
    results: dict[str, Any] = {}
    if trainer.is_global_zero:  # before the comparison, which takes longer, and may be stopped
        export_classifier(plan, labeled, method)
        found += draw_figures(plan, labeled, scores)
        results = write_results(plan, labeled, scores, best, findings, following, trainer, started)
        print_findings(console, found)
    if plan.scratch is not None:
        if trainer.is_global_zero:
            console.print(
                f"\nFine-tuned: {scores['fine-tuned'].top1:.1f} % of the test images, written to {folder}. For comparison, the "
                f"same network from random weights, with {plan.scratch.updates / plan.tuned.updates:.3g} times the updates:"
            )
        scores["from scratch"] = train_from_scratch(plan.scratch, labeled)
    if not trainer.is_global_zero:
        return {}
    if plan.scratch is not None:
        draw_figures(plan, labeled, scores)
        results = write_results(plan, labeled, scores, best, findings, following, trainer, started)
    tested = int(scores["fine-tuned"].confusion.sum())
    print_classifiers(console, scores, title=f"Accuracy on {tested:,} test images of {labeled.test.name}")
    print_conclusions(labeled, scores, best, console, too_high=any(one.rule in TOO_HIGH for one in readings))
    print_next(console, results)
    console.print(f"Finished in {results['seconds']:.0f} s. Everything is in {folder}, described in its README.md.")
    return results


def plan_finetuning(settings: Finetune, labeled: LabeledData, folder: Path) -> Plan:
    """Plan the trainings: learning rates, batches, updates and validations, on the machine at hand."""
    machine, pretrained = resolve_machine(settings.trainer), labeled.weights != "random"
    tuned = plan_training(
        settings,
        labeled,
        machine,
        folder=folder,
        lr_ratio=settings.lr_ratio,
        seed=settings.seed,
        pretrained=True,
        head_first=settings.head_first and pretrained,
    )
    if not (settings.scratch and pretrained):
        return Plan(tuned, None)
    scratch = plan_training(
        from_scratch(settings),
        labeled,
        machine,
        folder=folder / "scratch",
        lr_ratio=settings.scratch_lr_ratio,
        seed=settings.seed,
        pretrained=False,
        head_first=False,
    )
    return Plan(tuned, scratch)


def prepare_trainer(plan: TrainingPlan, labeled: LabeledData) -> tuple[L.Trainer, Resume | None]:
    """Build the trainer, and find the checkpoint to resume from, if any.

    Raises:
        UsageError: Lightning rejects an option; or the checkpoint is damaged or of other settings.
    """
    settings = plan.settings
    checkpoints = AtomicCheckpoints(
        keep=settings.keep_checkpoints,
        record=record(settings, images=len(labeled.train), batch=plan.batch_size),
    )
    trainer = build_classifier_trainer(
        plan,
        labeled,
        callbacks=finetuning_callbacks(plan, labeled),
        loggers=build_loggers(settings.logger, plan.folder, dataclasses.asdict(settings)),
        checkpoints=checkpoints,
    )
    resume = checkpoint_to_resume(settings.resume, plan.folder)
    if resume is not None:
        check_same(resume, checkpoints.record)
    return trainer, resume


def finetuning_callbacks(plan: TrainingPlan, labeled: LabeledData) -> list[Callback]:
    """Return the callbacks of a run with a folder: unreadable images, checkpoints, signals, progress.

    Early stopping and the best weights belong to every training: see build_classifier_trainer.
    """
    settings, folder, batch_size = plan.settings, plan.folder, plan.batch_size
    last = folder / "checkpoints" / "last.ckpt"
    callbacks: list[Callback] = [
        UnreadableImages(labeled.train, folder / "unreadable.csv", settings.data.get("max_unreadable", 0.1)),
        PeriodicCheckpoints(last, every_steps=plan.validate_every)
        if labeled.validation is None
        else ModelCheckpoint(  # after each validation, so that it contains the best weights
            last.parent, filename="last", save_on_train_epoch_end=False, enable_version_counter=False
        ),
        StopOnSignal(last, folder.parent if folder.name == "scratch" else folder, requeues=settings.resume == "auto"),
    ]
    waits = None
    if labeled.train.images is None or settings.randaugment:  # images in memory need no loader, except to augment them
        cached = labeled.train.images is not None or settings.data.get("cache") in ("ram", "disk")
        callbacks.append(waits := DataWaits(workers=labeled.workers, cached=cached))
    if settings.trainer.get("enable_progress_bar", True):
        per_epoch = max(1, len(labeled.train) // batch_size)
        callbacks.append(
            Progress(images_per_step=batch_size, total_steps=plan.updates, steps_per_epoch=per_epoch, waits=waits)
        )
    return callbacks


def effective_configuration(plan: TrainingPlan, labeled: LabeledData, method: Supervised) -> dict[str, str]:
    """Return the configuration in effect, for the user to check."""
    ratio = plan.lr / (labeled.base_lr * plan.batch_size / 256)
    validation = f"{len(labeled.validation):,} for validation" if labeled.validation is not None else "no validation"
    return {
        "weights": labeled.weights,
        "images": f"{labeled.train.name}: {len(labeled.train):,} for training, {validation}, {len(labeled.test):,} for testing",
        **method.describe(),
        "evaluation": describe_crop(labeled.crop_pct, method.backbone.image_size),
        "learning rate": f"{plan.lr:.3g}, {ratio:.3g} of pretraining's for {plan.batch_size} images",
        "updates": f"{plan.updates:,} of {plan.batch_size} images, validation every {plan.validate_every:,}",
        "run folder": str(plan.folder),
    }


def start_from_fitted_head(plan: TrainingPlan, labeled: LabeledData, method: Supervised) -> Scores:
    """Fit the head on frozen features, start training from it, and return its scores on the test images."""
    backbone, precision = method.backbone.to(plan.machine.device), plan.machine.precision
    head, scores = fit_head(labeled, backbone, precision=precision, seed=plan.seed)
    if adapt_batch_norms(backbone, labeled, seed=plan.seed):
        head, _ = fit_head(labeled, backbone, precision=precision, seed=plan.seed)
    method.start_head(*head)
    return scores


def train(
    plan: TrainingPlan, labeled: LabeledData, method: Supervised, trainer: L.Trainer, resume: Resume | None
) -> Mapping[str, float]:
    """Train, from the checkpoint if there is one, and return the best validation; metrics go to the run folder."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    rewind_metrics(trainer.loggers, resume)
    checkpoint = resume.path if resume is not None else None
    best = train_classifier(plan, labeled, method, trainer, checkpoint=checkpoint)
    close_loggers(trainer.loggers, plan.folder)
    return best


def train_from_scratch(plan: TrainingPlan, labeled: LabeledData) -> Scores:
    """Train the same network from random weights, and return its scores on the test images."""
    method = build_classifier(plan, labeled)
    trainer, resume = prepare_trainer(plan, labeled)
    if trainer.is_global_zero and resume is not None:
        resume.set_aside()
    train(plan, labeled, method, trainer, resume)
    return score_on_test_images(plan, labeled, method)


def score_on_test_images(plan: TrainingPlan, labeled: LabeledData, method: Supervised) -> Scores:
    """Return the scores of a trained classifier on the test images."""
    backbone = method.evaluated.to(plan.machine.device)
    ranking, labels = rank_classes(backbone, labeled, labeled.test, precision=plan.machine.precision)
    return score(ranking, labels, classes=len(labeled.classes))


def export_classifier(plan: Plan, labeled: LabeledData, method: Supervised) -> None:
    """Export the fine-tuned classifier."""
    folder = plan.tuned.folder / "export"
    export_backbone(method.evaluated.cpu(), folder, mean=labeled.mean, std=labeled.std, classes=labeled.classes)
    record_value_range(folder, labeled.value_range)


def draw_figures(plan: Plan, labeled: LabeledData, scores: Mapping[str, Scores]) -> list[str]:
    """Draw the confusion matrix and the learning curves there are; return what there is to say of them."""
    folder, figures = plan.tuned.folder, plan.tuned.folder / "figures"
    told = save_confusion(
        scores["fine-tuned"].confusion,
        labeled.classes,
        figures / "confusion.png",
        title="Confusion matrix, fine-tuned",
    )
    for name, where in (("fine-tuned", folder), ("from scratch", folder / "scratch")):
        if (where / "metrics.csv").is_file():
            figure = learning_curve_figure(read_metrics(where / "metrics.csv"), title=f"{folder.name}: {name}")
            figure.savefig(figures / f"learning_curve_{key_of(name)}.png")
    return [told] if told else []


def write_results(
    plan: Plan,
    labeled: LabeledData,
    scores: Mapping[str, Scores],
    best: Mapping[str, float],
    findings: list[str],
    following: Mapping[str, str],
    trainer: L.Trainer,
    started: float,
) -> dict[str, Any]:
    """Write results.json, and return its content."""
    results = results_of(plan, labeled, scores, best)
    results |= ({"findings": findings} if findings else {}) | {**following} | waiting_of(trainer)
    results |= {"seconds": round(time.perf_counter() - started, 1)}
    run_files.write_json(plan.tuned.folder / "results.json", results)
    write_cards_of_run(plan.tuned.folder)
    return results


def unreadable_test_images(labeled: LabeledData, scores: Scores) -> list[str]:
    """Return in a sentence how many test images could not be read, if any."""
    missing = len(labeled.test) - int(scores.confusion.sum())
    return (
        [f"{share(missing, len(labeled.test), 'test images')} cannot be read, and are not counted."] if missing else []
    )


def print_conclusions(
    labeled: LabeledData, scores: Mapping[str, Scores], best: Mapping[str, float], console: Console, *, too_high: bool
) -> None:
    """Print what the scores mean. `too_high` says that the learning curves show too high a rate."""
    if best.get("step") == 0 and not too_high:
        console.print(
            "[yellow]After every update the validation accuracy is lower than with the fitted head on frozen features, by more "
            "than a standard error, so that one is kept. Another learning rate (lr_ratio=), more updates, or more validation "
            "images (holdout=) may help.[/]"
        )
    if (scratch := scores.get("from scratch")) is not None:
        gain = scores["fine-tuned"].top1 - scratch.top1
        console.print(
            f"Fine-tuned against from scratch: {gain:+.1f} points at {len(labeled.train):,} labeled images, from one training "
            "each at one learning rate. For a fair comparison, compare=true tunes and repeats both."
        )


def results_of(
    plan: Plan, labeled: LabeledData, scores: Mapping[str, Scores], best: Mapping[str, float]
) -> dict[str, Any]:
    """Return the content of results.json."""
    rates = {"fine-tuned": plan.tuned.lr}
    if plan.scratch is not None:
        rates["from scratch"] = plan.scratch.lr
    return {
        key_of(name): as_json(arm, labeled.classes) | ({"lr": rates[name]} if name in rates else {})
        for name, arm in scores.items()
    } | {
        "validation_top1": best.get("val_top1"),
        "best_update": best.get("step"),
        "updates": plan.tuned.updates,
        "weights": labeled.weights,
        "images": {
            "training": len(labeled.train),
            "validation": None if labeled.validation is None else len(labeled.validation),
            "test": len(labeled.test),
        },
    }


def key_of(name: str) -> str:
    """Return the name of a classifier as a key and in file names: "fine-tuned" is fine_tuned."""
    return name.replace(" ", "_").replace("-", "_")
