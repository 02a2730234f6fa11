"""What the seven steps leave: a recipe with its evidence, and the learning curves of the best training, read."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sslvision.evaluation.curve_run import Reading
from sslvision.evaluation.learning_curves import read_curves
from sslvision.evaluation.step_verdicts import Verdict
from sslvision.runs.metrics import read_metrics
from sslvision.runs.redaction import redact
from sslvision.settings import Finetune
from sslvision.system.files import written_whole
from sslvision.workflows.search_space import RATES
from sslvision.workflows.tuning_report import recipe_of, shown

CONTENTS = """\
# {name}

Made by `{command}`. The same command goes on where it was stopped; a step that passed is not repeated.

| file | what it is |
| --- | --- |
| report.html | all of it to look at: the steps, the rates, the grids; opens in a browser without a network |
| best.yaml | the recipe that was found, ready to run, with the verdicts of all steps in its first lines |
| results.json | the verdicts with their numbers |
| figures/rates.png | what short runs learned at each rate |
| steps.jsonl | verdicts and cells of the grids, as they were recorded |
| steps/ | metrics.csv of every training |
| config.yaml, environment.json | all settings; versions, git commit and hardware |
"""


def curves_verdict(kind: str, settings: Any, best: Mapping[str, Any], number: int) -> Verdict:
    """Read the learning curves of the best cell of a grid."""
    step, file = f"learning curves {number}", Path(str(best.get("metrics")))
    if not file.is_file():
        return Verdict(step, True, "The metrics of the best cell are not there, so that its curves cannot be read.")
    readings = read_curves(read_metrics(file), kind=kind, settings=dataclasses.asdict(settings))
    told = " ".join(map(told_after_grids, readings)) if readings else "The learning curves show nothing that is off."
    return Verdict(step, True, told, numbers={"cell": {key: best[key] for key in ("rate", "weight_decay")}})


def told_after_grids(reading: Reading) -> str:
    """Return a reading without advice on the rate, which the grid has chosen by what it is for."""
    if any(word.split("=")[0] in RATES for word in reading.words):
        return f"{reading.sentence} The grids' other rates score less, or no better."
    return str(reading)


def write_recipe(settings: Any, verdicts: Sequence[Verdict], folder: Path) -> str:
    """Write best.yaml, and return the command that runs it."""
    command = "finetune" if isinstance(settings, Finetune) else "pretrain"
    line = shlex.join(["python", "-m", f"sslvision.{command}", f"recipe={shown(folder / 'best.yaml')}"])
    lines = [line, "", "Found by the steps of sslvision tune:"]
    lines += [f"  {one.step}: {one.words} {one.advice}".rstrip() for one in verdicts]
    lines.append("Grids were trained at a constant rate, shorter than this recipe, which has not been tried in full.")
    header = "".join("# " + text.replace("\n", " ").rstrip() + "\n" for text in lines)
    with written_whole(folder / "best.yaml", "w", concurrent=True) as file:
        file.write(header + yaml.safe_dump(redact(recipe_of(settings)), sort_keys=False, allow_unicode=True))
    return line
