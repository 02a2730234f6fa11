"""One trial of a search: a training by the building blocks of pretraining or of fine-tuning, and its objective.

All trials have the same share of the recipe's length, and what counts epochs in a recipe keeps its share of a trial. The
objective never is the pretraining loss, whose meaning changes with settings such as mask_ratio.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from pytorch_lightning.callbacks import Callback

from sslvision.errors import Diverged, UsageError
from sslvision.evaluation.confidence import standard_error
from sslvision.evaluation.evaluate import has_labels, why_not_evaluated
from sslvision.evaluation.features import Extraction
from sslvision.methods.base import Method
from sslvision.runs.loggers import build_loggers, close_loggers
from sslvision.settings import Finetune
from sslvision.training.callbacks.stop_at import Prune, StopAt
from sslvision.training.trainer import Machine, configure_torch, resolve_machine
from sslvision.workflows.budget import Clocked, counts_epochs, scale_epochs, time_updates
from sslvision.workflows.classifier_training import (
    Head,
    TrainingPlan,
    adapt_batch_norms,
    build_classifier,
    build_classifier_trainer,
    fit_head,
    plan_training,
    train_classifier,
    with_method,
)
from sslvision.workflows.console import classes_in_words
from sslvision.workflows.final_evaluation import RANKME_IMAGES, rank_of
from sslvision.workflows.labeled_data import open_labeled_data
from sslvision.workflows.ladder import Times
from sslvision.workflows.method import method_from_settings
from sslvision.workflows.pretraining import continued, open_data, open_evaluated, shrunk
from sslvision.workflows.rung_training import WARMING, Ground, fit_updates
from sslvision.workflows.studies import CUT, DIVERGED, IMPOSSIBLE, PRUNED, TRAINED
from sslvision.workflows.tuning_settings import Tune, TuneFinetune

ON_THE_WAY = (0.25, 0.5, 0.75)  # of a trial: when it is scored for pruning
PRUNE_ON = 2_000  # images of each kind at most, for that

Judge = Callable[[int, float], bool]  # from the percentage that is done and the score to whether to stop


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a trial gave.

    Attributes:
        outcome: See studies.py.
        score: The objective; None if there is none.
        facts: What else is recorded.
    """

    outcome: str
    score: float | None
    facts: dict[str, Any]


class Bench(Protocol):
    """What trials share: the images, the machine, and the objective."""

    settings: Any
    objective: str
    unit: str
    machine: Machine
    remarks: list[str]

    def rows(self) -> dict[str, str]:
        """Return what trials share, for the printed configuration."""

    def check(self, settings: Any) -> None:
        """Build what settings describe. Raises UsageError."""

    def full_updates(self, settings: Any) -> int:
        """Return the number of updates of the recipe."""

    def epochs(self, settings: Any) -> float:
        """Return the passes over the images of the recipe."""

    def measure(self, settings: Any, *, seconds: float) -> Times:
        """Return the time of an update, and of everything else of a trial."""

    def train(
        self, settings: Any, *, share: float, folder: Path, deadline: float | None, rest: float, judge: Judge | None
    ) -> Trained:
        """Train and score.

        Args:
            settings: Settings of the trial.
            share: Its length as a share of the recipe's.
            folder: Where its metrics go.
            deadline: Time of `time.perf_counter` at which the score must be there; None for no end.
            rest: Seconds that scoring takes.
            judge: Decides on the way whether to go on; None if nothing is pruned.
        """


def open_bench(settings: Tune | TuneFinetune) -> Bench:
    """Open the images of a search, and choose its objective.

    Raises:
        UsageError, DataError: There is more than one device, or nothing to score by.
    """
    configure_torch(settings.trainer.get("accelerator", "auto"))
    machine = resolve_machine(settings.trainer)
    if machine.world_size > 1:
        raise UsageError(
            "A search trains many networks one after another, on one device: set trainer.devices=1. To use several devices, "
            "start the same command once for each: they share the study."
        )
    return Pretraining(settings, machine) if isinstance(settings, Tune) else Finetuning(settings, machine)


def updates_of(full: int, share: float) -> int:
    """Return the updates of a trial."""
    return max(1, round(full * share))


class Pretraining:
    """Trials of a pretraining recipe, scored by k-NN on held-out images, or by RankMe."""

    def __init__(self, settings: Tune, machine: Machine):
        self.machine = machine
        self.settings = continued(settings, None)
        method = method_from_settings(self.settings)
        data = open_data(self.settings, method)
        splits, evaluated = data.splits, open_evaluated(self.settings, data.splits)
        labeled = has_labels(evaluated)
        if settings.objective == "knn" and not labeled:
            raise UsageError(
                f"objective=knn is not possible: {why_not_evaluated(evaluated)}. Give labeled images with probe_data=FOLDER, "
                "or take objective=rankme."
            )
        self.scores = "rankme" if settings.objective == "rankme" or not labeled else "knn"
        self.objective = "k-NN top-1" if self.scores == "knn" else "RankMe"
        self.unit = " %" if self.scores == "knn" else ""
        self.ground = Ground(
            settings=self.settings,
            splits=splits,
            evaluated=evaluated,
            crop_pct=data.crop_pct or 1.0,
            mean=method.normalize.mean.flatten().tolist(),
            std=method.normalize.std.flatten().tolist(),
            scores=("knn",) if self.scores == "knn" else (),
            machine=machine,
        )
        self.workers = data.workers
        self.images = len(splits.train)
        self.remarks = [*splits.remarks, *method.remarks(), *shrunk(splits.train, method.pretrained().image_size)]

    def rows(self) -> dict[str, str]:
        """See Bench."""
        splits, settings = self.ground.splits, self.settings
        on = self.ground.evaluated.test if self.scores == "knn" else splits.train
        assert on is not None
        scored = f"{min(len(on), settings.evaluate_images):,} held-out" if self.scores == "knn" else "training"
        return {
            "method": f"{settings.method['_target_'].rsplit('.', 1)[-1]} on {settings.backbone['name']}",
            "data": f"{splits.train.name}: {self.images:,} images; {classes_in_words(splits.train)}",
            "objective": f"{self.objective} of frozen features on {scored} images",
        }

    def check(self, settings: Any) -> None:
        """See Bench."""
        self.full_updates(settings)
        method_from_settings(settings)

    def full_updates(self, settings: Any) -> int:
        """See Bench."""
        per_epoch = self.images // settings.batch_size
        if not per_epoch:
            raise UsageError(f"There are {self.images:,} training images, fewer than batch_size={settings.batch_size}.")
        return int(settings.epochs * per_epoch)

    def epochs(self, settings: Any) -> float:
        """See Bench."""
        return float(settings.epochs)

    def measure(self, settings: Any, *, seconds: float) -> Times:
        """See Bench."""
        began = time.perf_counter()
        method = self.ground.build(settings)
        data = self.ground.batches(method, self.images, settings.seed, batch_size=settings.batch_size)
        timed = time_updates(settings, method, data, seconds=seconds)
        overhead = time.perf_counter() - began - (timed.updates + timed.skipped) * timed.each
        self.score(method.float(), at_most=WARMING)
        began = time.perf_counter()
        self.score(method, at_most=settings.evaluate_images)
        return Times(timed.each, max(0.0, overhead) + time.perf_counter() - began)

    def score(self, method: Method, *, at_most: int) -> tuple[float, float | None]:
        """Return the objective and its standard error."""
        if self.scores == "knn":
            found = self.ground.score(method, at_most=at_most, workers=self.workers)
            return 100 - found["knn"], found["knn_error"]
        method.to(self.machine.device)
        how = Extraction(workers=self.workers, precision=self.machine.precision)
        at_most = min(at_most, RANKME_IMAGES)
        return rank_of(method.pretrained(), method, self.ground.evaluated, at_most=at_most, how=how), None

    def train(
        self, settings: Any, *, share: float, folder: Path, deadline: float | None, rest: float, judge: Judge | None
    ) -> Trained:
        """See Bench."""
        try:
            updates = updates_of(self.full_updates(settings), share)
            scaled, _ = scale_epochs(settings, share * settings.epochs, ())
            method = self.ground.build(scaled)
        except UsageError as error:
            return Trained(IMPOSSIBLE, None, {"error": str(error)})
        data = self.ground.batches(method, self.images, settings.seed, batch_size=settings.batch_size)
        stop = StopAt(None if deadline is None else deadline - rest)
        callbacks: list[Callback] = [stop]
        if judge is not None:
            at = sorted({updates_of(updates, one) for one in ON_THE_WAY} - {updates})
            callbacks.append(prune := Prune(at, lambda trained: self.score(trained, at_most=PRUNE_ON)[0], judge))
        facts: dict[str, Any] = {"updates": updates}
        try:
            facts["findings"] = fit_updates(scaled, method, data, updates=updates, folder=folder, callbacks=callbacks)
        except Diverged as error:
            return Trained(DIVERGED, 0.0, facts | {"error": str(error)})
        except torch.cuda.OutOfMemoryError as error:
            return Trained(IMPOSSIBLE, None, facts | {"error": str(error).splitlines()[0]})
        score, sigma = self.score(method.float(), at_most=settings.evaluate_images)
        facts |= {"training_loss": method.logged.get("loss"), "standard_error": sigma}
        return _ended(score, facts, stop, judge is not None and prune.stopped)


def _ended(score: float, facts: dict[str, Any], stop: StopAt, pruned: bool) -> Trained:
    """Return what a training that ended by itself, by pruning, or with the budget gave."""
    if not math.isfinite(score):
        return Trained(DIVERGED, 0.0, facts | {"error": "The score is not finite."})
    if pruned:
        return Trained(PRUNED, score, facts)
    if stop.stopped_at is not None:
        return Trained(CUT, score, facts | {"stopped_at": stop.stopped_at})
    return Trained(TRAINED, score, facts)


class Finetuning:
    """Trials of a fine-tuning recipe, scored by their best validation accuracy."""

    objective, unit = "validation top-1", " %"

    def __init__(self, settings: TuneFinetune, machine: Machine):
        self.settings, self.machine = settings, machine
        self.labeled = open_labeled_data(settings)
        if self.labeled.validation is None:
            raise UsageError("A search chooses by validation images, and there are none: set holdout to more than 0.")
        self.remarks = list(self.labeled.remarks)
        self._heads: dict[str, Head] = {}  # by the settings of the backbone

    def rows(self) -> dict[str, str]:
        """See Bench."""
        labeled = self.labeled
        assert labeled.validation is not None
        return {
            "weights": labeled.weights,
            "images": f"{labeled.train.name}: {len(labeled.train):,} for training, {len(labeled.validation):,} for validation; "
            f"{len(labeled.classes)} classes",
            "objective": "accuracy on the validation images; test images are not looked at",
        }

    def plan(self, settings: Finetune, share: float = 1.0, folder: Path = Path()) -> TrainingPlan:
        """Return the plan of a trial."""
        warmed = {key: share * value for key, value in settings.method.items() if counts_epochs(key) and value}
        plan = plan_training(
            with_method(dataclasses.replace(settings, dry_run=False), **warmed),
            self.labeled,
            self.machine,
            folder=folder,
            lr_ratio=settings.lr_ratio,
            seed=settings.seed,
            pretrained=True,
            head_first=settings.head_first and self.labeled.weights != "random",
        )
        updates = updates_of(plan.updates, share)
        every = max(1, round(updates / settings.evaluations))
        return dataclasses.replace(plan, updates=math.ceil(updates / every) * every, validate_every=every)

    def check(self, settings: Any) -> None:
        """See Bench."""
        build_classifier(self.plan(settings), self.labeled)

    def full_updates(self, settings: Any) -> int:
        """See Bench."""
        return self.plan(settings).updates

    def epochs(self, settings: Any) -> float:
        """See Bench."""
        plan = self.plan(settings)
        return plan.updates / max(1, len(self.labeled.train) // plan.batch_size)

    def measure(self, settings: Any, *, seconds: float) -> Times:
        """See Bench."""
        began = time.perf_counter()
        clocked = Clocked(seconds=seconds, skipped=3 + 4 * self.labeled.workers)
        plan = dataclasses.replace(self.plan(settings), updates=100_000, validate_every=100_000)
        with_options = dataclasses.replace(settings, trainer={**settings.trainer, "enable_checkpointing": False})
        plan = dataclasses.replace(plan, settings=dataclasses.replace(with_options, patience=0))
        method = self._start(plan)
        trainer = build_classifier_trainer(plan, self.labeled, callbacks=[clocked])
        train_classifier(plan, self.labeled, method, trainer)
        return Times(clocked.each, max(0.0, time.perf_counter() - began - clocked.updates * clocked.each))

    def _start(self, plan: TrainingPlan) -> Any:
        """Return the classifier to train, with its head fitted first where the plan says so."""
        method = build_classifier(plan, self.labeled)
        if plan.head_first:
            backbone, precision = method.backbone.to(self.machine.device), self.machine.precision
            key = json.dumps([plan.settings.backbone, plan.seed], sort_keys=True, default=str)
            if adapt_batch_norms(backbone, self.labeled, seed=plan.seed) or key not in self._heads:
                self._heads[key], _ = fit_head(self.labeled, backbone, precision=precision, seed=plan.seed)
            method.start_head(*self._heads[key])
        return method

    def train(
        self, settings: Any, *, share: float, folder: Path, deadline: float | None, rest: float, judge: Judge | None
    ) -> Trained:
        """See Bench."""
        try:
            plan = self.plan(settings, share, folder)
            method = self._start(plan)
        except UsageError as error:
            return Trained(IMPOSSIBLE, None, {"error": str(error)})
        stop = StopAt(deadline)
        callbacks: list[Callback] = [stop]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.csv").unlink(missing_ok=True)
        if judge is not None:
            callbacks.append(prune := Prune(_after_validations(plan), _validated, judge))
        facts: dict[str, Any] = {"updates": plan.updates}
        loggers = build_loggers(settings.logger, folder, dataclasses.asdict(plan.settings))
        trainer = build_classifier_trainer(plan, self.labeled, callbacks=callbacks, loggers=loggers)
        try:
            best = train_classifier(plan, self.labeled, method, trainer)
        except Diverged as error:
            return Trained(DIVERGED, 0.0, facts | {"error": str(error)})
        except torch.cuda.OutOfMemoryError as error:
            return Trained(IMPOSSIBLE, None, facts | {"error": str(error).splitlines()[0]})
        finally:
            close_loggers(loggers, folder)
        facts |= {"training_loss": method.logged.get("loss"), "val_loss": best.get("val_loss")}
        facts |= {"best_update": best.get("step"), "standard_error": self._sigma(best.get("val_top1", math.nan))}
        return _ended(best.get("val_top1", math.nan), facts, stop, judge is not None and prune.stopped)

    def _sigma(self, top1: float) -> float | None:
        """Return the standard error of an accuracy on the validation images."""
        assert self.labeled.validation is not None
        return standard_error(top1, len(self.labeled.validation)) if math.isfinite(top1) else None


def _after_validations(plan: TrainingPlan) -> list[int]:
    """Return the updates that follow the validations near the shares at which trials are judged."""
    validations = plan.updates // plan.validate_every
    shares: Sequence[int] = [max(1, round(validations * share)) * plan.validate_every + 1 for share in ON_THE_WAY]
    return sorted({step for step in shares if step < plan.updates})


def _validated(method: Method) -> float:
    return float(method.trainer.callback_metrics["val_top1"])
