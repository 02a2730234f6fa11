"""The value of pretraining: four ways to the same classifier, at several numbers of labels, all tuned alike.

    from scratch      the network with random weights, trained completely
    frozen features   a linear head on the pretrained features, nothing else trained
    partial           starts from that head, and trains the upper half of the blocks with it
    full              starts from that head, and trains everything

The arms that train try the same learning rates on the labeled images of the first seed; the rate that does best on the
validation images is used for the other seeds. The L2 strength of the linear head is chosen on the same images. They are
set aside first, belong to no training set, and are the same for all arms and numbers of labels. From scratch gets
`scratch_longer` times as many updates, because it starts from nothing. Training sets are nested: the one of five labels
contains the one of two. Nothing is chosen on test images.

Every training is recorded when it is done and never repeated, so a comparison can be stopped and started again.
"""

import csv
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

from sslvision.data.sources.list_images import share, some
from sslvision.data.subsets import Subset, draw_up_to
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.confidence import ranking_of, score, wilson_interval
from sslvision.evaluation.linear_probe import linear_probe
from sslvision.figures.label_efficiency import Cell, about_seeds, about_test_images, label_efficiency_figure
from sslvision.runs import run_files
from sslvision.settings import Finetune
from sslvision.training.trainer import Machine, configure_torch, resolve_machine, silence_lightning
from sslvision.workflows import trainings_record
from sslvision.workflows.classifier_training import (
    Head,
    adapt_batch_norms,
    build_classifier,
    build_classifier_trainer,
    build_network,
    count_updates,
    fit_head,
    from_scratch,
    plan_training,
    train_classifier,
    with_method,
)
from sslvision.workflows.comparison_record import RECORD, Point, claim
from sslvision.workflows.console import print_comparison, print_configuration, print_findings
from sslvision.workflows.labeled_data import (
    Features,
    LabeledData,
    frozen_features,
    open_labeled_data,
    rank_classes,
)
from sslvision.workflows.reporting import reports
from sslvision.workflows.time_left import Training, estimate, in_words

SCRATCH, FROZEN, PARTIAL, FULL = ARMS = ("from scratch", "frozen features", "partial", "full")
VALIDATE_ON = 1_000  # images at most


@reports
def compare(settings: Finetune, folder: Path, words: Sequence[str] = ()) -> list[Cell]:
    """Run the comparison, or the rest of it.

    Returns:
        A cell for each arm and number of labels.

    Raises:
        UsageError: There is more than one device, or the folder belongs to another comparison.
    """
    console = Console(soft_wrap=True, highlight=False)
    silence_lightning()
    configure_torch(settings.trainer.get("accelerator", "auto"))
    machine = resolve_machine(settings.trainer)
    if machine.world_size > 1:
        raise UsageError(
            "A comparison trains many small networks one after another, on one device: set trainer.devices=1. To use several "
            "devices, run several commands at once."
        )
    labeled = open_labeled_data(settings, validate_on=VALIDATE_ON)
    if labeled.validation is None:
        raise UsageError("A comparison chooses learning rates on validation images: set holdout to more than 0.")
    done = claim(settings, folder, words)
    comparison = Comparison(settings, labeled, machine, done, folder, console)
    cells: list[Cell] = []
    rows = {
        "weights": labeled.weights,
        "images": f"{labeled.train.name}: {len(labeled.train):,} to draw training sets from, {len(labeled.validation):,} for "
        f"validation, {len(labeled.test):,} for testing",
        "learning rates": f"{', '.join(map(str, settings.lr_ratios))} times pretraining's {labeled.base_lr:g} per 256 images",
        "trainings": f"{comparison.total}, {len(done)} of them done",
        "folder": str(folder),
    }
    print_configuration(console, rows, title=settings.about or folder.name)
    print_findings(console, [*labeled.remarks, *comparison.small_classes()])
    for labels in settings.labels_per_class:
        cells += [comparison.cell(arm, labels) for arm in ARMS]
        write(cells, folder, labeled, comparison.findings())
        print_comparison(console, cells, title=f"Top-1 % on {labeled.test.name}, by labeled images per class")
        console.print(f"{about_seeds(cells)[0].upper()}{about_seeds(cells)[1:]}; {about_test_images(cells)}.")
    print_findings(console, comparison.unreadable)
    spent = sum(entry["seconds"] for entry in comparison.done.values())
    console.print(
        f"{len(comparison.done)} trainings in {spent:,.0f} s. Everything is in {folder}, described in its README.md."
    )
    return cells


class Comparison:
    """The trainings of a comparison, done and to do."""

    def __init__(
        self,
        settings: Finetune,
        labeled: LabeledData,
        machine: Machine,
        done: dict[Point, dict[str, Any]],
        folder: Path,
        console: Console,
    ):
        self.settings, self.labeled, self.machine = settings, labeled, machine
        self.done, self.folder, self.console = done, folder, console
        assert labeled.validation is not None
        assert labeled.train.labels is not None
        self.validation, self.labels = labeled.validation, labeled.train.labels
        tried = len(settings.lr_ratios) + settings.seeds - 1
        self.total = len(settings.labels_per_class) * (settings.seeds + tried * (len(ARMS) - 1))
        rated = dataclasses.replace(settings, lr=None, base_lr=None)  # every arm is tried with lr_ratios
        self.settings_of = {
            SCRATCH: from_scratch(rated),
            PARTIAL: with_method(rated, freeze=0.5, freeze_stages=0),
            FULL: with_method(rated, freeze=0, freeze_stages=0),
        }
        self._features: list[Features] | None = None
        self._heads: dict[tuple[int, int], tuple[Head, dict[str, Any]]] = {}  # by number of images and seed

    @property
    def unreadable(self) -> list[str]:
        """Return in sentences how many images could not be read; none before the first training on frozen features."""
        sources = {"training": self.labeled.train, "validation": self.validation, "test": self.labeled.test}
        missing = {
            name: len(source) - len(found.indices)
            for (name, source), found in zip(sources.items(), self._features or (), strict=False)
        }
        return [
            f"{share(count, len(sources[name]), f'{name} images')} cannot be read, and are left out."
            for name, count in missing.items()
            if count
        ]

    def findings(self) -> list[str]:
        """Return what was left out or guessed, with what an earlier call found that had the features to compute."""
        file = self.folder / "results.json"
        before = json.loads(file.read_text())["findings"] if file.is_file() and self.done else []
        return list(dict.fromkeys([*self.labeled.remarks, *self.small_classes(), *self.unreadable, *before]))

    def small_classes(self) -> list[str]:
        """Return, in a sentence each, which numbers of labels some classes do not have."""
        sizes, remarks = self.labels.bincount(minlength=len(self.labeled.classes)), []
        for labels in self.settings.labels_per_class:
            few = [] if labels == "all" else [place for place, size in enumerate(sizes.tolist()) if size < labels]
            if few:
                named = [f"{self.labeled.classes[place]} {int(sizes[place])}" for place in few]
                remarks.append(
                    f"{len(few)} of {len(sizes)} classes have fewer than {labels} images to draw from ({some(named, most=4)}): "
                    f"at {labels} per class, all of theirs are used."
                )
        return remarks

    def time_left(self) -> str:
        """Return an estimate of the time that is left, in words; features of frozen networks, computed once, are not in it."""
        seeds = range(self.settings.seed, self.settings.seed + self.settings.seeds)
        ended = [
            Training(entry["arm"], entry["updates"], self._batch_size(entry["images"]), entry["seconds"])
            for entry in self.done.values()
            if entry["arm"] != FROZEN
        ]
        if not ended or len(self.done) >= self.total:
            return ""
        left: list[Training] = []
        for labels in self.settings.labels_per_class:
            images = len(draw_up_to(self.labels, None if labels == "all" else labels, seed=seeds[0]))
            batch_size = self._batch_size(images)
            for arm in (SCRATCH, PARTIAL, FULL):
                done = sum(key[:2] == (arm, labels) for key in self.done)
                missing = len(self.settings.lr_ratios) + len(seeds) - 1 - done
                updates = count_updates(self.settings_of[arm], images, batch_size)[0]
                left += [Training(arm, updates, batch_size)] * max(0, missing)
        return f", {in_words(estimate(left, ended))}" if left else ""

    def _batch_size(self, images: int) -> int:
        return min(self.settings.batch_size, images)

    def cell(self, arm: str, labels: Any) -> Cell:
        """Return mean and standard deviation over the seeds, each with the rate that validated best with the first."""
        seeds = range(self.settings.seed, self.settings.seed + self.settings.seeds)
        if arm == FROZEN:
            entries = [self.entry((arm, labels, seed, 0.0)) for seed in seeds]
        else:
            tried = [self.entry((arm, labels, seeds[0], ratio)) for ratio in self.settings.lr_ratios]
            best = max(tried, key=lambda entry: (entry["val_top1"], -entry["val_loss"]))
            entries = [best, *(self.entry((arm, labels, seed, best["lr_ratio"])) for seed in seeds[1:])]
        scores = [entry["test_top1"] for entry in entries]
        tested = entries[0].get("test_images", len(self.labeled.test))  # not in records of earlier versions
        low, high = wilson_interval(statistics.fmean(scores) / 100 * tested, tested)
        return Cell(
            arm=arm,
            labels_per_class=labels,
            images=entries[0]["images"],
            mean=statistics.fmean(scores),
            deviation=statistics.stdev(scores) if len(scores) > 1 else 0.0,
            seeds=len(scores),
            test_images=tested,
            low=low,
            high=high,
        )

    def entry(self, point: Point) -> dict[str, Any]:
        """Return the record of a training, after doing it if it is not done."""
        if point not in self.done:
            started, (arm, labels, seed, ratio) = time.perf_counter(), point
            indices = draw_up_to(self.labels, None if labels == "all" else labels, seed=seed)
            found = self._fit_frozen(indices, seed)[1] if arm == FROZEN else self._train(arm, indices, seed, ratio)
            entry = {
                **{"arm": arm, "labels": labels, "seed": seed, "lr_ratio": ratio, "images": len(indices)},
                **found,
                "seconds": round(time.perf_counter() - started, 1),
            }
            trainings_record.append(self.folder / RECORD, entry)
            self.done[point] = entry
            rate = "" if arm == FROZEN else f", rate {ratio:g}"
            self.console.print(
                f"{len(self.done)}/{self.total}  {arm}, {labels} per class, seed {seed}{rate}: "
                f"validation {entry['val_top1']:.1f}, test {entry['test_top1']:.1f} %, {entry['seconds']:.0f} s"
                f"{self.time_left()}"
            )
        return self.done[point]

    def _fit_frozen(self, indices: torch.Tensor, seed: int) -> tuple[Head, dict[str, Any]]:
        """Fit a linear head on frozen features, once; return it and its accuracies in percent."""
        if (known := self._heads.get((len(indices), seed))) is not None:
            return known
        if self._features is None:
            backbone = build_network(self.settings, self.labeled, pretrained=True, seed=self.settings.seed).to(
                self.machine.device
            )
            sources = (self.labeled.train, self.validation, self.labeled.test)
            self._features = [
                frozen_features(backbone, self.labeled, source, precision=self.machine.precision) for source in sources
            ]
        pool, validation, test = self._features
        rows = torch.isin(pool.indices, indices)  # the indices that can be read
        classes = len(self.labeled.classes)
        probe = linear_probe(
            pool.features[rows].to(self.machine.device),
            pool.labels[rows],
            test.features,
            test.labels,
            validation=(validation.features, validation.labels),
            num_classes=classes,
            seed=seed,
        )
        head = (probe.weight, probe.bias)
        ranking = ranking_of(F.linear(validation.features, *(part.cpu() for part in head)))
        accuracies = {
            "val_top1": score(ranking, validation.labels, classes=classes).top1,
            "test_top1": score(probe.ranking, test.labels, classes=classes).top1,
            "l2": probe.l2,
            "test_images": len(test.labels),
        }
        self._heads[len(indices), seed] = head, accuracies
        return head, accuracies

    def _train(self, arm: str, indices: torch.Tensor, seed: int, ratio: float) -> dict[str, Any]:
        """Train an arm on some of the labeled images; return its accuracies in percent."""
        labeled = dataclasses.replace(self.labeled, train=Subset(self.labeled.train, indices))
        device, precision = self.machine.device, self.machine.precision
        plan = plan_training(
            self.settings_of[arm],
            labeled,
            self.machine,
            folder=self.folder,
            lr_ratio=ratio,
            seed=seed,
            pretrained=arm != SCRATCH,
            head_first=arm != SCRATCH,
        )
        trainer = build_classifier_trainer(plan, labeled)
        method = build_classifier(plan, labeled)
        if plan.head_first:
            head, _ = self._fit_frozen(indices, seed)
            if adapt_batch_norms(method.backbone.to(device), labeled, seed=seed):
                head, _ = fit_head(labeled, method.backbone, precision=precision, seed=seed)
            method.start_head(*head)
        best = train_classifier(plan, labeled, method, trainer)
        if "val_top1" not in best:
            raise DataError(
                f"None of the {len(self.validation):,} validation images of {labeled.train.name} can be read, and a comparison "
                "chooses learning rates by them: repair these files, or hold out more images (holdout=0.2)."
            )
        ranking, labels = rank_classes(method.evaluated.to(device), labeled, labeled.test, precision=precision)
        return {
            "val_top1": best["val_top1"],
            "val_loss": best["val_loss"],
            "test_top1": score(ranking, labels, classes=len(labeled.classes)).top1,
            "updates": plan.updates,
            "test_images": len(labels),
        }


def write(cells: Sequence[Cell], folder: Path, labeled: LabeledData, findings: Sequence[str]) -> None:
    """Write the table, its figure and the findings."""
    run_files.write_json(
        folder / "results.json", {"weights": labeled.weights, "findings": [*findings], "cells": [*cells]}
    )
    with open(folder / "comparison.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, list(cells[0]))
        rows.writeheader()
        rows.writerows(
            {key: f"{value:.2f}" if isinstance(value, float) else value for key, value in cell.items()}
            for cell in cells
        )
    title = f"{labeled.test.name}: the value of pretraining"
    label_efficiency_figure(cells, title=title, classes=len(labeled.classes)).savefig(folder / "comparison.png")
