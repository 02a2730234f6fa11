"""A recipe is tuned by seven steps, each with its verdict in words, its numbers, and advice where it fails.

    1  the loss before the first update, against theory, without regularization
    2  a handful of images, learned by heart; and again with the recipe's regularization
    3  the rate: short runs over five decades about the recipe's
    4  a coarse grid of rate and weight decay, at a constant rate
    5  a finer one about its best cell, longer
    6  the learning curves of the best, read
    7  step 5 again about the new best, as long as there is budget

What is done is recorded at once and not done again. The end is best.yaml.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sslvision.evaluation.step_verdicts import Verdict
from sslvision.runs import run_files
from sslvision.training.trainer import silence_lightning
from sslvision.workflows import trainings_record
from sslvision.workflows.console import print_configuration, print_findings
from sslvision.workflows.reporting import reports
from sslvision.workflows.step_choices import asked, coarse, finer
from sslvision.workflows.steps import RECORD, Steps
from sslvision.workflows.steps_report import CONTENTS, curves_verdict, write_recipe
from sslvision.workflows.trial_training import Finetuning, Pretraining, open_bench
from sslvision.workflows.tuning_settings import Tune, TuneFinetune

MAY_CHANGE = ("name", "output_dir", "resume", "overwrite", "about", "reference", "logger", "budget", "steps")
COARSE, FINE, ROUNDS = 0.45, 0.8, 3  # shares of the time that is left; rounds of step 5 at most
COARSE_EPOCHS, FINE_EPOCHS = 3, 15  # without a budget, and at most


@reports
def tune_by_steps(settings: Tune | TuneFinetune, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Tune a recipe by the seven steps, or by the rest of them.

    Args:
        settings: All settings.
        folder: The folder.
        words: The command line, for the record.

    Returns:
        The content of results.json.

    Raises:
        UsageError: A setting cannot be, or the folder belongs to something else.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    deadline = started + settings.budget_seconds if settings.budget_seconds else None
    silence_lightning()
    bench = open_bench(settings)
    settings = bench.settings
    assert isinstance(bench, Pretraining | Finetuning)
    done = trainings_record.claim(
        settings, folder, words, file=RECORD, kind="tuning", command="tune", contents=CONTENTS, may_change=MAY_CHANGE
    )
    steps = Steps(settings, bench, done, folder, console, deadline)
    rows = {**bench.rows(), "steps": str(settings.steps), "budget": str(settings.budget), "folder": str(folder)}
    print_configuration(console, rows, title=settings.about or folder.name)
    print_findings(console, bench.remarks)
    verdicts, best = run_steps(steps, asked(settings.steps))
    failed = next((one for one in verdicts if not one.passed), None)
    results: dict[str, Any] = {
        "verdicts": [one.record for one in verdicts],
        "stopped_by": failed.step if failed else None,
        "best": best,
        "objective": bench.objective,
        "unit": bench.unit,
        "findings": bench.remarks,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if best is not None:
        line = write_recipe(steps.of_cell(best), verdicts, folder)
        console.print(f"\nThe recipe is in {folder / 'best.yaml'}, with this evidence. Run it:\n  {line}", markup=False)
    elif failed is not None:
        over = deadline is not None and steps.left() <= 0
        how = (
            "The time is over: the same command goes on."
            if over
            else "Correct that, and start again with overwrite=true."
        )
        console.print(f"\nStopped by the step '{failed.step}'. {how}", markup=False)
    run_files.write_json(folder / "results.json", results)
    return results


def run_steps(steps: Steps, numbers: Sequence[int]) -> tuple[list[Verdict], dict[str, Any] | None]:
    """Do the steps that were asked for, until one fails; return the verdicts and the best cell."""
    verdicts: list[Verdict] = []
    best: dict[str, Any] | None = None
    if 1 in numbers:
        verdicts.append(steps.step("initial loss", steps.first_loss))
    if 2 in numbers and all(one.passed for one in verdicts):
        verdicts += steps.handful()
    rate = steps.own_rate
    if 3 in numbers and all(one.passed for one in verdicts):
        verdicts.append(steps.step("rate", steps.rate))
        rate = verdicts[-1].numbers.get("best", rate)
    if 4 in numbers and all(one.passed for one in verdicts):
        cells, epoch = coarse(steps.settings, rate), 1 / steps.bench.epochs(steps.settings)
        verdicts.append(
            steps.step("coarse grid", lambda: steps.grid("coarse grid", cells, [COARSE], COARSE_EPOCHS, epoch))
        )
        best = verdicts[-1].numbers.get("best") if verdicts[-1].passed else None
    for round_ in range(ROUNDS if 7 in numbers and steps.deadline is not None else 1):
        if not (5 in numbers and best is not None and all(one.passed for one in verdicts)):
            break
        usual = [one["seconds"] for one in steps.done if one.get("grid")]
        if round_ and steps.left() < 2 * max(usual, default=0.0):
            break
        name, cells = f"finer grid {round_ + 1}", finer(best, 2.0 ** (1 / (round_ + 1)))
        all_of_it = FINE if round_ == 0 else 0.9
        shares = [all_of_it / 2, all_of_it] if 7 in numbers else [all_of_it]
        longer = 2 * max((one["share"] for one in steps.done if one.get("length") == "coarse grid"), default=0.0)

        def judge(name: str = name, cells: Any = cells, shares: Any = shares, longer: float = longer) -> Verdict:
            return steps.grid(name, cells, shares, FINE_EPOCHS, longer)

        verdict = steps.step(name, judge)
        if not verdict.passed:  # no time was left: the cell of before is the best
            break
        verdicts.append(verdict)
        best = verdict.numbers.get("best", best)
        if 6 in numbers:
            found = curves_verdict(steps.kind, steps.of_cell(best), best, round_ + 1)
            verdicts.append(steps.step(found.step, lambda found=found: found))  # type: ignore[misc]
    return verdicts, best
