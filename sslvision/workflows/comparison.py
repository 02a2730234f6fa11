"""What was pretraining worth? Four ways to the same classifier, at several numbers of labels, every one tuned alike.

    from scratch      the network with random weights, all of it trained
    frozen features   a linear head on the pretrained features: nothing else is trained
    partial           that head first; then the upper half of the blocks is trained with it
    full              that head first; then everything is trained

All that train are tried with the same learning rates, on the labeled images of the first seed; the rate whose weights do
best on the validation images is kept for the other seeds. The L2 strength of the linear head is chosen by the same images.
They are set aside before, belong to no training set, and are the same for all arms and numbers of labels. From scratch
takes `scratch_longer` times as many updates, since it starts from nothing. Training sets
grow: that of five labels has that of two inside. Test images choose nothing.

Every training is written down when it is done and never repeated, so a comparison may be stopped and called again.
"""

import csv
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional as F

from sslvision.data.subsets import Subset, draw_per_class
from sslvision.errors import UsageError
from sslvision.evaluation.linear_probe import linear_probe
from sslvision.evaluation.scores import ranking_of, score
from sslvision.figures.label_efficiency import Cell, label_efficiency_figure
from sslvision.runs import run_folder
from sslvision.runs.redaction import redact
from sslvision.settings import Finetune
from sslvision.training.trainer import build_trainer, choose_kernels, compute_dtype
from sslvision.workflows.console import print_comparison, print_configuration
from sslvision.workflows.labeled_data import Encoded, LabeledData, encode, open_labeled_data, rank
from sslvision.workflows.pretraining import hush_lightning
from sslvision.workflows.transfer import (
    Head,
    adapt_statistics,
    batch_size,
    build,
    classifier,
    fit,
    fit_head,
    from_scratch,
    with_method,
)

SCRATCH, FROZEN, PARTIAL, FULL = ARMS = ("from scratch", "frozen features", "partial", "full")
VALIDATE_ON = 1_000  # images at most
MAY_CHANGE = ("labels_per_class", "seeds", "name", "output_dir", "resume", "overwrite", "about", "logger")

CONTENTS = """\
# {name}

Made by `{command}`. The same command goes on where it was stopped.

| file | what it is |
| --- | --- |
| comparison.csv | mean and deviation of top-1 for each arm and number of labels |
| comparison.png | the same as a picture |
| cells.jsonl | every training there was: arm, labels, seed, rate, validation and test accuracy, seconds |
| config.yaml, environment.json | every setting; versions, git commit and hardware |
"""

Point = tuple[str, Any, int, float]  # arm, labels per class, seed, learning rate in parts of pretraining's


def compare(config: Finetune, folder: Path, words: Sequence[str] = ()) -> list[Cell]:
    """Run the comparison, or what is left of it.

    Returns:
        A cell for each arm and number of labels.

    Raises:
        UsageError: more than one device, or another comparison's folder.
    """
    console = Console(soft_wrap=True, highlight=False)
    hush_lightning()
    choose_kernels(config.trainer.get("accelerator", "auto"))
    trainer = build_trainer(
        folder=folder, epochs=1, steps=1, dry_run=True, loggers=[], callbacks=[], options=config.trainer
    )
    if trainer.world_size > 1:
        raise UsageError(
            "A comparison trains many small networks one after another, on one device: leave trainer.devices at 1, and run "
            "several commands beside one another for several devices."
        )
    labeled = open_labeled_data(config, validate_on=VALIDATE_ON)
    if labeled.validation is None:
        raise UsageError("A comparison chooses learning rates on validation images: set holdout above 0.")
    done = claim(config, folder, words)
    bench = Comparison(config, labeled, done, folder, console, compute_dtype(trainer), trainer.strategy.root_device)
    cells: list[Cell] = []
    rows = {
        "weights": labeled.weights,
        "images": f"{labeled.train.name}: {len(labeled.train):,} to draw from, {len(labeled.validation):,} to choose by, "
        f"{len(labeled.test):,} to score by",
        "rates": f"{', '.join(map(str, config.lr_ratios))} of pretraining's {labeled.base_lr:g} per 256 images",
        "trainings": f"{bench.total}, of which {len(done)} are done",
        "folder": str(folder),
    }
    print_configuration(console, rows, title=config.about or folder.name)
    for labels in config.labels_per_class:
        cells += [bench.cell(arm, labels) for arm in ARMS]
        write(cells, folder, labeled)
        print_comparison(console, cells, title=f"Top-1 % on {labeled.test.name}, by labeled images of each class")
    spent = sum(entry["seconds"] for entry in bench.done.values())
    console.print(
        f"{len(bench.done)} trainings, {spent:,.0f} s. Everything is in {folder}; its README.md says what is what."
    )
    return cells


def claim(config: Finetune, folder: Path, words: Sequence[str]) -> dict[Point, dict[str, Any]]:
    """Take the comparison's folder, and return the trainings done before.

    Raises:
        UsageError: the folder is in use by something else, or by a comparison with other settings.
    """
    record, kept = folder / "cells.jsonl", folder / "settings.json"
    settings = json.loads(json.dumps(redact(dataclasses.asdict(config))))
    resumes = kept.is_file() and not (config.overwrite or config.dry_run)
    if resumes:
        before = json.loads(kept.read_text())
        changed = [key for key in settings if key not in MAY_CHANGE and settings[key] != before.get(key)]
        if changed:
            told = ", ".join(f"{key}={settings[key]} (it was {before.get(key)})" for key in changed)
            raise UsageError(
                f"{folder} holds a comparison with other settings: {told}. Give this one another name=, or overwrite=true."
            )
    run_folder.claim(folder, overwrite=config.overwrite or config.dry_run, resume=resumes)
    run_folder.describe(folder, dataclasses.asdict(config), words, command="finetune", contents=CONTENTS)
    run_folder.write_json(kept, settings)
    if not record.is_file():
        return {}
    lines = record.read_text().splitlines()
    found = [json.loads(line) for line in lines if line.endswith("}")]  # a kill may have torn the last one
    record.write_text("".join(json.dumps(entry) + "\n" for entry in found))
    return {(entry["arm"], entry["labels"], entry["seed"], entry["lr_ratio"]): entry for entry in found}


class Comparison:
    """The trainings of a comparison, those that are done and those to do."""

    def __init__(
        self,
        config: Finetune,
        labeled: LabeledData,
        done: dict[Point, dict[str, Any]],
        folder: Path,
        console: Console,
        precision: torch.dtype,
        device: torch.device,
    ):
        self.config, self.labeled, self.done, self.folder, self.console = config, labeled, done, folder, console
        self.precision, self.device = precision, device
        assert labeled.validation is not None
        assert labeled.train.labels is not None
        self.validation, self.labels = labeled.validation, labeled.train.labels
        tried = len(config.lr_ratios) + config.seeds - 1
        self.total = len(config.labels_per_class) * (config.seeds + tried * (len(ARMS) - 1))
        self.settings = {
            SCRATCH: from_scratch(config),
            PARTIAL: with_method(config, freeze=0.5, freeze_stages=0),
            FULL: with_method(config, freeze=0, freeze_stages=0),
        }
        self._encoded: list[Encoded] | None = None
        self._heads: dict[tuple[int, int], tuple[Head, dict[str, Any]]] = {}  # by number of images and seed

    def cell(self, arm: str, labels: Any) -> Cell:
        """Return mean and deviation over the seeds, each with the rate that validated best with the first."""
        seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        if arm == FROZEN:
            entries = [self.entry((arm, labels, seed, 0.0)) for seed in seeds]
        else:
            tried = [self.entry((arm, labels, seeds[0], ratio)) for ratio in self.config.lr_ratios]
            best = max(tried, key=lambda entry: (entry["val_top1"], -entry["val_loss"]))
            entries = [best, *(self.entry((arm, labels, seed, best["lr_ratio"])) for seed in seeds[1:])]
        scores = [entry["test_top1"] for entry in entries]
        return Cell(
            arm=arm,
            labels_per_class=labels,
            images=entries[0]["images"],
            mean=statistics.fmean(scores),
            deviation=statistics.stdev(scores) if len(scores) > 1 else 0.0,
            seeds=len(scores),
        )

    def entry(self, point: Point) -> dict[str, Any]:
        """Return a training's record, after doing it if it is not done."""
        if point not in self.done:
            started, (arm, labels, seed, ratio) = time.perf_counter(), point
            indices = draw_per_class(self.labels, None if labels == "all" else labels, seed=seed)
            found = self._frozen(indices, seed)[1] if arm == FROZEN else self._trained(arm, indices, seed, ratio)
            entry = {
                **{"arm": arm, "labels": labels, "seed": seed, "lr_ratio": ratio, "images": len(indices)},
                **found,
                "seconds": round(time.perf_counter() - started, 1),
            }
            with open(self.folder / "cells.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self.done[point] = entry
            rated = "" if arm == FROZEN else f", rate {ratio:g}"
            self.console.print(
                f"{len(self.done)}/{self.total}  {arm}, {labels} per class, seed {seed}{rated}: "
                f"validation {entry['val_top1']:.1f}, test {entry['test_top1']:.1f} %, {entry['seconds']:.0f} s"
            )
        return self.done[point]

    def _frozen(self, indices: torch.Tensor, seed: int) -> tuple[Head, dict[str, Any]]:
        """Fit a linear head on frozen features, once; return it and its accuracies in percent."""
        if (known := self._heads.get((len(indices), seed))) is not None:
            return known
        if self._encoded is None:
            backbone = build(self.config, pretrained=True, seed=self.config.seed).to(self.device)
            sources = (self.labeled.train, self.validation, self.labeled.test)
            self._encoded = [encode(backbone, self.labeled, one, precision=self.precision) for one in sources]
        pool, held, tested = self._encoded
        rows = torch.isin(pool.indices, indices)  # those of the indices that can be read
        classes = len(self.labeled.classes)
        probe = linear_probe(
            pool.features[rows].to(self.device),
            pool.labels[rows],
            tested.features,
            tested.labels,
            validation=(held.features, held.labels),
            num_classes=classes,
            seed=seed,
        )
        head = (probe.weight, probe.bias)
        ranking = ranking_of(F.linear(held.features, *(part.cpu() for part in head)))
        fitted = (
            head,
            {
                "val_top1": score(ranking, held.labels, classes=classes).top1,
                "test_top1": score(probe.ranking, tested.labels, classes=classes).top1,
                "l2": probe.l2,
            },
        )
        self._heads[len(indices), seed] = fitted
        return fitted

    def _trained(self, arm: str, indices: torch.Tensor, seed: int, ratio: float) -> dict[str, Any]:
        """Train an arm on some of the labeled images; return its accuracies in percent."""
        labeled = dataclasses.replace(self.labeled, train=Subset(self.labeled.train, indices))
        config = self.settings[arm]
        method = classifier(
            config,
            labeled,
            build(config, pretrained=arm != SCRATCH, seed=seed),
            lr=ratio * labeled.base_lr * batch_size(config, labeled) / 256,
            seed=seed,
        )
        if arm != SCRATCH:
            adapted = adapt_statistics(method.backbone.to(self.device), labeled, seed=seed)
            method.start_head(
                *fit_head(labeled, method.backbone, precision=self.precision, seed=seed)[0]
                if adapted
                else self._frozen(indices, seed)[0]
            )
        fitted = fit(config, labeled, method, folder=self.folder)
        ranking, labels = rank(fitted.method.evaluated.to(self.device), labeled, labeled.test, precision=self.precision)
        return {
            "val_top1": fitted.best["val_top1"],
            "val_loss": fitted.best["val_loss"],
            "test_top1": score(ranking, labels, classes=len(labeled.classes)).top1,
            "updates": fitted.updates,
        }


def write(cells: Sequence[Cell], folder: Path, labeled: LabeledData) -> None:
    """Write the table and its picture."""
    with open(folder / "comparison.csv", "w", newline="") as file:
        rows = csv.DictWriter(file, list(cells[0]))
        rows.writeheader()
        rows.writerows(
            {**cell, "mean": f"{cell['mean']:.2f}", "deviation": f"{cell['deviation']:.2f}"} for cell in cells
        )
    title = f"{labeled.test.name}: what pretraining is worth"
    label_efficiency_figure(cells, title=title, classes=len(labeled.classes)).savefig(folder / "comparison.png")
