"""A scaling ladder: trainings of several sizes, shares of the images and lengths, within a budget; and the laws they follow.

    plan     the time of an update is measured for each size, and the base length chosen that fills the budget
    train    every rung by the building blocks of pretraining, scored on the same held-out images; the cheapest first
    fit      a power law for each axis, with intervals, what ten times as much would bring, and whether to believe it

Every training is recorded when it is done and never repeated, so a ladder can be stopped and started again.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sslvision.errors import UsageError
from sslvision.runs import run_files
from sslvision.training.trainer import configure_torch, resolve_machine, silence_lightning
from sslvision.workflows import trainings_record
from sslvision.workflows.console import classes_in_words, print_configuration, print_findings
from sslvision.workflows.ladder import (
    SHORTEST,
    Rung,
    Size,
    Times,
    count_parameters,
    rungs_of,
    seconds_of,
    shares_of,
    sizes_of,
    trainings_of,
)
from sslvision.workflows.method import method_from_settings
from sslvision.workflows.pretraining import open_data, open_evaluated
from sslvision.workflows.reporting import reports
from sslvision.workflows.rung_training import Ground, measure, scores_of, train
from sslvision.workflows.scaling_report import CONTENTS, print_plan, report
from sslvision.workflows.scaling_settings import Scale

RECORD = "rungs.jsonl"
MAY_CHANGE = ("axes", "seeds", "score", "name", "output_dir", "resume", "overwrite", "about", "logger")
SHARE, LONGEST_S = 0.05, 10.0  # of the budget, for measuring all sizes; for one at most so long
ALONE_S = 1.0  # for each size without a budget, to tell how long the ladder takes

Ladder = Mapping[str, Sequence[Rung]]
Ladders = Callable[[int], list[Ladder]]  # one for each seed, by the length of the largest training
Done = dict[tuple[int, int, int, int], dict[str, Any]]  # by the key of a rung


@dataclasses.dataclass(frozen=True)
class Plan:
    """The trainings of a ladder.

    Attributes:
        updates: Length of the largest.
        times: Seconds of each number of parameters.
    """

    updates: int
    times: Mapping[int, Times]

    @property
    def record(self) -> dict[str, Any]:
        """Return what plan.json keeps."""
        return {
            "updates": self.updates,
            "times": {str(key): dataclasses.asdict(one) for key, one in self.times.items()},
        }


@reports
def scale(settings: Scale, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Train a ladder, or the rest of it, and fit its laws.

    Args:
        settings: All settings.
        folder: The folder of the ladder.
        words: The command line, for the record.

    Returns:
        The content of results.json; the plan, of a dry run.

    Raises:
        UsageError: There is more than one device, the budget is too small, nothing can be scored, or the folder belongs to
            another ladder.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    silence_lightning()
    ground, sizes, shares, remarks = prepare(settings)
    done, plan = claim(settings, folder, words)

    def ladders(updates: int) -> list[Ladder]:
        seeds = range(settings.seed, settings.seed + settings.seeds)
        return [
            rungs_of(settings.axes, sizes, shares, updates, rungs=settings.rungs, factor=settings.factor, seed=seed)
            for seed in seeds
        ]

    print_configuration(console, _configuration(settings, ground, sizes, folder), title=settings.about or folder.name)
    print_findings(console, remarks)
    before, images = plan, shares[-1]
    plan = _planned(settings, ground, sizes, images, ladders, before, console, started=started)
    if plan != before and not settings.dry_run:
        run_files.write_json(folder / "plan.json", plan.record)
    trainings = trainings_of(ladders(plan.updates))
    print_plan(console, trainings, plan.times, done, settings)
    if settings.dry_run:
        return plan.record
    for number, rung in enumerate(trainings, 1):
        if rung.key not in done:
            done[rung.key] = _record(folder, rung, train(ground, rung, folder / "rungs" / rung.folder))
            _tell(console, number, trainings, rung, done[rung.key], ground.scores[0], plan.times, done)
    findings = [*remarks, *(finding for rung in trainings for finding in done[rung.key]["findings"])]
    return report(
        settings, folder, ground, ladders(plan.updates), done, console, findings=list(dict.fromkeys(findings))
    )


def prepare(settings: Scale) -> tuple[Ground, list[Size], list[int], list[str]]:
    """Open the images and choose sizes and shares; return also what the user should know.

    Raises:
        UsageError: See `scale`.
    """
    configure_torch(settings.trainer.get("accelerator", "auto"))
    machine = resolve_machine(settings.trainer)
    if machine.world_size > 1:
        raise UsageError("A ladder trains many networks one after another, on one device: set trainer.devices=1.")
    method = method_from_settings(settings)
    backbone, rungs, factor = method.pretrained(), settings.rungs, settings.factor
    sizes = [Size(count_parameters(backbone))]
    if "parameters" in settings.axes:
        sizes = sizes_of(
            settings.backbone, backbone, channels=int(settings.data.get("channels", 3)), rungs=rungs, factor=factor
        )
    data = open_data(settings, method)
    images = len(data.splits.train)
    if images < settings.batch_size:
        raise UsageError(f"There are {images:,} training images, fewer than batch_size={settings.batch_size}.")
    shares = (
        shares_of(images, batch_size=settings.batch_size, rungs=rungs, factor=factor)
        if "images" in settings.axes
        else [images]
    )
    evaluated = open_evaluated(settings, data.splits)
    ground = Ground(
        settings=settings,
        splits=data.splits,
        evaluated=evaluated,
        crop_pct=data.crop_pct or 1.0,
        mean=method.normalize.mean.flatten().tolist(),
        std=method.normalize.std.flatten().tolist(),
        scores=scores_of(settings.score, method, data.splits, evaluated, at_most=settings.evaluate_images),
        machine=machine,
    )
    return ground, sizes, shares, [*data.splits.remarks, *method.remarks()]


def claim(settings: Scale, folder: Path, words: Sequence[str]) -> tuple[Done, Plan | None]:
    """Claim the ladder's folder; return the trainings done before, and their plan.

    Raises:
        UsageError: The folder is used by something else, or by a ladder with other settings.
    """
    if settings.dry_run:
        return {}, None
    entries = trainings_record.claim(
        settings,
        folder,
        words,
        file=RECORD,
        kind="ladder",
        command="scale",
        contents=CONTENTS,
        may_change=MAY_CHANGE,
    )
    if not entries:
        return {}, None
    planned = json.loads((folder / "plan.json").read_text())
    done = {(entry["parameters"], entry["images"], entry["updates"], entry["seed"]): entry for entry in entries}
    return done, Plan(planned["updates"], {int(key): Times(**one) for key, one in planned["times"].items()})


def _planned(
    settings: Scale,
    ground: Ground,
    sizes: Sequence[Size],
    images: int,
    ladders: Ladders,
    before: Plan | None,
    console: Console,
    *,
    started: float,
) -> Plan:
    """Return the plan of a ladder: with that of before, only the times of sizes that another axis adds are measured.

    Args:
        settings: All settings.
        ground: What trainings share.
        sizes: Sizes of the model.
        images: Number of all training images.
        ladders: Returns the trainings for a length.
        before: The plan of the trainings that are done, if any.
        console: Where to print.
        started: Time of `time.perf_counter` from which the budget counts.

    Raises:
        UsageError: The shortest training would have too few updates.
    """
    times = {} if before is None else dict(before.times)
    if before is not None and before.updates < (shortest := _shortest(settings)):
        raise UsageError(
            f"The largest training of this ladder has {before.updates:,} updates; axes={settings.axes} needs {shortest:,}. Use "
            "another name= or overwrite=true, with a longer budget= or more epochs=."
        )
    fixed = _updates_of_epochs(settings, images) if settings.budget is None else None  # refused before measuring
    unknown = [size for size in sizes if size.parameters not in times]
    if unknown:
        console.print(f"Measuring the time of updates of {len(unknown)} size(s).")
        seconds = settings.budget_seconds
        each = min(LONGEST_S, SHARE * seconds / len(sizes)) if seconds else ALONE_S
        times |= {size.parameters: measure(ground, size, seconds=each) for size in unknown}
    if before is not None:
        return Plan(before.updates, times)
    if fixed is not None:
        return Plan(fixed, times)
    return Plan(_updates_of_budget(settings, times, ladders, spent=time.perf_counter() - started), times)


def _shortest(settings: Scale) -> int:
    """Return the least number of updates of the largest training, with which the shortest one has SHORTEST."""
    return round(SHORTEST * settings.factor ** (settings.rungs - 1)) if "updates" in settings.axes else SHORTEST


def _updates_of_epochs(settings: Scale, images: int) -> int:
    """Return the length of the largest training without a budget.

    Raises:
        UsageError: The shortest training would have too few updates.
    """
    per_epoch = images // settings.batch_size
    updates, shortest = settings.epochs * per_epoch, _shortest(settings)
    if updates < shortest:
        raise UsageError(
            f"epochs={settings.epochs} is {updates:,} updates, and the largest training needs {shortest:,}: give "
            f"epochs={math.ceil(shortest / per_epoch)} or more, or take fewer rungs or a smaller batch_size."
        )
    return updates


def _updates_of_budget(settings: Scale, times: Mapping[int, Times], ladders: Ladders, *, spent: float) -> int:
    """Return the length of the largest training with which all trainings fill the budget.

    Args:
        settings: All settings; `budget` is given.
        times: Seconds of each number of parameters.
        ladders: Returns the trainings for a length.
        spent: Seconds of the budget that are over.

    Raises:
        UsageError: The shortest training would have too few updates.
    """
    assert settings.budget_seconds is not None
    shortest = _shortest(settings)
    many = 1_000_000  # of which lengths are fractions without rounding that matters
    trainings = trainings_of(ladders(many))
    whole, fixed = seconds_of(trainings, times), sum(times[rung.size.parameters].rest for rung in trainings)
    updates = int((settings.budget_seconds - spent - fixed) / (whole - fixed) * many)
    if updates < shortest:
        needed = spent + fixed + shortest * (whole - fixed) / many
        raise UsageError(
            f"budget={settings.budget} is too small: measuring and evaluating take {(spent + fixed) / 60:.1f} minutes, and the "
            f"largest training would have {max(0, updates):,} updates, of {shortest:,} or more. Give "
            f"budget={needed / 60 + 1:.0f}m or more, or take fewer axes or rungs, a smaller model (backbone.depth, "
            "backbone.embed_dim), or fewer images to evaluate (evaluate_images)."
        )
    return updates


def _record(folder: Path, rung: Rung, found: Mapping[str, Any]) -> dict[str, Any]:
    """Write down what a training gave, at once."""
    entry = {
        "parameters": rung.size.parameters,
        "images": rung.images,
        "updates": rung.updates,
        "seed": rung.seed,
        **dict(rung.size.options),
        **found,
    }
    trainings_record.append(folder / RECORD, entry)
    return entry


def _tell(
    console: Console,
    number: int,
    trainings: Sequence[Rung],
    rung: Rung,
    entry: Mapping[str, Any],
    score: str,
    times: Mapping[int, Times],
    done: Done,
) -> None:
    left = seconds_of([one for one in trainings if one.key not in done], times)
    scored = f"k-NN error {entry['knn']:.2f} %" if score == "knn" else f"held-out loss {entry['loss']:.4g}"
    console.print(
        f"{number}/{len(trainings)}  {rung.size.parameters:,} parameters, {rung.images:,} images, {rung.updates:,} updates: "
        f"{scored}, {entry['seconds']:.0f} s" + (f", about {left / 60:.1f} minutes left" if left else "")
    )


def _configuration(settings: Scale, ground: Ground, sizes: Sequence[Size], folder: Path) -> dict[str, str]:
    splits = ground.splits
    scored = {"knn": "k-NN error on held-out images, in percent", "loss": "loss on held-out images with fixed masks"}
    length = f"budget {settings.budget}" if settings.budget else f"{settings.epochs} epochs of the largest training"
    return {
        "method": f"{settings.method['_target_'].rsplit('.', 1)[-1]} on {settings.backbone['name']}",
        "parameters": " to ".join(f"{size.parameters:,}" for size in dict.fromkeys((sizes[0], sizes[-1]))),
        "data": f"{splits.train.name}: {len(splits.train):,} images; {classes_in_words(splits.train)}",
        "axes": f"{', '.join(settings.axes)}: {settings.rungs} sizes each, by a factor of {settings.factor:g}",
        "score": scored[ground.scores[0]],
        "length": length,
        "learning rate": f"{settings.peak_lr:.3g} at all sizes; what counts epochs keeps its share of every training",
        "folder": str(folder),
    }
