"""What a scaling ladder leaves: the plan before, and laws, sentences, tables and a figure after."""

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sslvision.evaluation.law_verdict import Examined, as_json, examine
from sslvision.evaluation.power_law import Interval
from sslvision.figures.scaling_laws import Panel, scaling_figure
from sslvision.runs import run_files
from sslvision.workflows.console import print_findings
from sslvision.workflows.ladder import Rung, Times, seconds_of, value_of
from sslvision.workflows.rung_training import Ground
from sslvision.workflows.scaling_settings import Scale

FURTHER, POINTS = 10, 40  # times as many; points of a curve within the sizes, and beyond
LAWS = "laws.csv"
LABELS = {"knn": "k-NN error (%)", "loss": "held-out loss"}
MEANS = {
    "parameters": "the same updates on the same images",
    "images": "the same model and updates",
    "updates": "the same model on the same images, which is as many times the compute",
}

CONTENTS = """\
# {name}

Made by `{command}`. The same command continues where it was stopped.

| file | what it is |
| --- | --- |
| results.json | the law of each axis with intervals, ten times the largest size, and the checks |
| report.html | all of it to look at: laws, tables, settings; opens in a browser without a network |
| scaling.csv | every training: sizes, seed, scores with standard errors, seconds |
| laws.csv | the curve of each law with its interval of 95 %, up to ten times the largest size |
| figures/scaling.png | scores and laws, log-log |
| plan.json | the time of an update of each size, and the length of the largest training |
| rungs.jsonl | the trainings that are done, as they were recorded |
| rungs/ | metrics.csv of every training |
| config.yaml, environment.json | all settings; versions, git commit and hardware |
"""

Done = Mapping[tuple[int, int, int, int], Mapping[str, Any]]


def print_plan(
    console: Console, trainings: Sequence[Rung], times: Mapping[int, Times], done: Done, settings: Scale
) -> None:
    """Print the trainings with the minutes that they should take."""
    table = Table(title="Plan", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("parameters", "depth x width", "images", "updates", "seed", "minutes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for rung in trainings:
        options = dict(rung.size.options)
        shape = f"{options['depth']} x {options['embed_dim']}" if options else "the recipe's"
        counts = [f"{value:,}" for value in (rung.size.parameters, rung.images, rung.updates)]
        minutes = "done" if rung.key in done else f"{seconds_of([rung], times) / 60:.1f}"
        table.add_row(counts[0], shape, *counts[1:], str(rung.seed), minutes)
    console.print(table)
    left = [rung for rung in trainings if rung.key not in done]
    budget = f", of the budget of {settings.budget}" if settings.budget and not done else ""
    console.print(f"{len(left)} trainings to do, about {seconds_of(left, times) / 60:.1f} minutes{budget}.")


def report(
    settings: Scale,
    folder: Path,
    ground: Ground,
    ladders: Sequence[Mapping[str, Sequence[Rung]]],
    done: Done,
    console: Console,
    *,
    findings: Sequence[str],
) -> dict[str, Any]:
    """Fit, print and write the laws.

    Args:
        settings: All settings.
        folder: The folder of the ladder.
        ground: What trainings share.
        ladders: The rungs by axis, for each seed.
        done: Records of all trainings.
        console: Where to print.
        findings: What the user should know.

    Returns:
        The content of results.json.
    """
    score = ground.scores[0]
    panels: list[Panel] = []
    found: dict[str, Examined] = {}
    laws: dict[str, Any] = {}
    for axis in settings.axes:
        rungs = [rung for ladder in ladders for rung in ladder[axis]]
        x = [float(value_of(rung, axis)) for rung in rungs]
        y, sigma = ([done[rung.key][name] for rung in rungs] for name in (score, f"{score}_error"))
        examined = examine(x, y, sigma, seed=settings.seed)
        found[axis] = examined
        panels.append(panel_of(axis, examined))
        laws[axis] = {
            **as_json(examined),
            "ten_times": dataclasses.asdict(examined.samples.law(FURTHER * max(x))),
            "sentences": sentences(axis, examined, score),
        }
    results = {
        "score": score,
        "laws": laws,
        "trainings": len(done),
        "seconds": round(sum(entry["seconds"] for entry in done.values()), 1),
        "findings": list(findings),
    }
    run_files.write_json(folder / "results.json", results)
    write_table(folder / "scaling.csv", done)
    write_curves(folder / LAWS, panels)
    title = f"{settings.about or folder.name}: {ground.splits.train.name}"
    scaling_figure(panels, score=LABELS[score], title=title).savefig(folder / "figures" / "scaling.png")
    _print_laws(console, found, score)
    for axis, law in laws.items():
        console.print(f"[bold]{axis}[/]: {' '.join(law['sentences'])}")
    print_findings(console, findings)
    console.print(
        f"{len(done)} trainings in {results['seconds'] / 60:.1f} minutes. Everything is in {folder}, described in its "
        "README.md."
    )
    return results


def panel_of(axis: str, examined: Examined) -> Panel:
    """Return what is drawn of a law: its curve from the smallest size to ten times the largest."""
    fitted, samples = examined.samples.fit, examined.samples
    largest = fitted.law.x0
    inside, beyond = np.geomspace(fitted.x.min(), largest, POINTS), np.geomspace(largest, FURTHER * largest, POINTS)[1:]
    curve = []
    for x in (*inside[:-1], largest, *beyond):
        law = samples.law(float(x))
        curve.append((float(x), law.value, law.low, law.high))
    irreducible = dataclasses.astuple(examined.irreducible) if examined.determined else None
    return Panel(
        axis,
        fitted.x.tolist(),
        fitted.y.tolist(),
        fitted.sigma.tolist(),
        curve,
        irreducible,
        dataclasses.astuple(examined.exponent) if examined.falls else None,
        examined.believed,
    )


def sentences(axis: str, examined: Examined, score: str) -> list[str]:
    """Return what a law says, and whether it is to be believed, in sentences."""
    unit = " %" if score == "knn" else ""
    failed = {check.name: check.words for check in examined.checks if not check.passed}
    if not examined.falls:
        return [
            f"No law of the {axis} can be told: {failed['falls']}. A larger factor=, a longer budget=, seeds=3 or more "
            "held-out images would show a smaller fall."
        ]
    largest = examined.samples.fit.law.x0
    now, further, least = examined.samples.law(largest), examined.samples.law(FURTHER * largest), examined.irreducible
    told = [
        f"Ten times the {axis} ({MEANS[axis]}) would bring {further.value:.3g}{unit} ({_range(further)}) instead of "
        f"{now.value:.3g}{unit}.",
        f"{least.value:.3g}{unit} ({_range(least)}) would remain, however many."
        if examined.determined
        else f"What would remain, however many, is not determined: {least.high:.3g}{unit} at most.",
    ]
    held = [check.words for check in examined.checks if check.passed and check.name == "predicts"]
    if examined.believed:
        return [*told, f"The law passed its tests: {held[0]}."]
    return [*told, f"It is not to be believed: {'; '.join(failed.values())}." + (f" (Yet {held[0]}.)" if held else "")]


def _range(interval: Interval) -> str:
    return f"{max(0.0, interval.low):.3g} to {interval.high:.3g}"


def write_table(file: Path, done: Done) -> None:
    """Write all trainings as a CSV file."""
    left_out = {"findings"}
    columns = list(dict.fromkeys(key for entry in done.values() for key in entry if key not in left_out))
    with open(file, "w", newline="") as opened:
        rows = csv.DictWriter(opened, columns, restval="", extrasaction="ignore")
        rows.writeheader()
        rows.writerows(done.values())


def write_curves(file: Path, panels: Sequence[Panel]) -> None:
    """Write the curves of the laws that are told from noise as a CSV file."""
    with open(file, "w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["axis", "x", "law", "low", "high", "extrapolated"])
        for panel in panels:
            curve = panel.curve if panel.exponent is not None else ()
            rows.writerows(
                [panel.axis, *(f"{value:.6g}" for value in point), int(point[0] > max(panel.x))] for point in curve
            )


def _print_laws(console: Console, laws: Mapping[str, Examined], score: str) -> None:
    table = Table(title=f"{LABELS[score]} = E + A x^-alpha", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("x", no_wrap=True)
    for heading in ("largest", "10 times", "alpha", "E", "believed"):
        table.add_column(heading, justify="right", no_wrap=True)
    for axis, law in laws.items():
        largest = law.samples.fit.law.x0
        least = _range(law.irreducible) if law.determined else f"{law.irreducible.high:.3g} at most"
        numbers = (f"{law.observed:.3g}", _range(law.samples.law(FURTHER * largest)), _range(law.exponent), least)
        if not law.falls:
            numbers = (numbers[0], "–", "–", "–")
        table.add_row(axis, *numbers, "yes" if law.believed else "no")
    console.print(table)
