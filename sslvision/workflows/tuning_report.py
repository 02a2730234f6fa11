"""What a search leaves: trials.csv and best.yaml after every trial; importance, a picture and results.json at the end."""

import csv
import dataclasses
import json
import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from sslvision.evaluation.importance import FEWEST, importance
from sslvision.figures.searches import Varied, search_figure
from sslvision.runs import run_files
from sslvision.runs.redaction import redact
from sslvision.settings import Finetune, Pretrain
from sslvision.system.files import written_whole
from sslvision.workflows.console import print_findings
from sslvision.workflows.search_space import Range, with_values
from sslvision.workflows.studies import CUT, DIVERGED, DONE, IMPOSSIBLE, PRUNED, TRAINED, SharedStudy
from sslvision.workflows.trial_training import Bench, Trained
from sslvision.workflows.tuning_settings import Tune, TuneFinetune

SHOWN = 10  # rows of the printed table
EDGE = 0.05  # of a range: the best value this near to an end may lie beyond it
NOT_OF_A_RECIPE = ("name", "output_dir", "overwrite", "resume", "dry_run", "budget", "logger", "compare", "reference")

CONTENTS = """\
# {name}

Made by `{command}`. The same command goes on where it was stopped; started several times, the processes share the trials.

| file | what it is |
| --- | --- |
| best.yaml | the recipe with the best settings, and the evidence for them in its first lines |
| report.html | all of it to look at: trials, importance, the best recipe; opens in a browser without a network |
| trials.csv | every trial: its settings, objective, length, seconds, and what became of it |
| figures/search.png | how much each setting explains, and the objective against each |
| results.json | the best trial, the importance of each setting, findings |
| study.db | the study, in SQLite, for Optuna and its dashboard; study.json says where it is if elsewhere |
| trials/ | metrics.csv of every trial that this machine trained |
| config.yaml, environment.json | all settings; versions, git commit and hardware |
"""

Row = dict[str, Any]


def rows_of(shared: SharedStudy) -> list[Row]:
    """Return a row for each trial that has ended, in their order."""
    rows = []
    for trial in shared.trials():
        facts = trial.user_attrs
        if facts.get("outcome") in (*DONE, CUT):
            kept = {name: fact for name, fact in facts.items() if name not in ("worker", "alive", "score", "outcome")}
            rows.append(
                {
                    "trial": trial.number,
                    "outcome": facts["outcome"],
                    "score": facts.get("score"),
                    **trial.params,
                    **kept,
                }
            )
    return rows


def best_of(rows: Sequence[Row]) -> Row | None:
    """Return the best row: of the trials that were trained to their end, or else of those that the budget cut off."""
    for outcome in (TRAINED, CUT):
        scored = [row for row in rows if row["outcome"] == outcome and row["score"] is not None]
        if scored:
            return max(scored, key=lambda row: (row["score"], -row["trial"]))
    return None


def write_done(
    settings: Tune | TuneFinetune, bench: Bench, shared: SharedStudy, share: float, folder: Path
) -> list[Row]:
    """Write trials.csv and best.yaml with all trials that have ended, of all processes; return the rows."""
    rows = rows_of(shared)
    columns = list(dict.fromkeys(key for row in rows for key in row if key != "findings"))
    with written_whole(folder / "trials.csv", "w", concurrent=True, newline="") as file:
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
    if (best := best_of(rows)) is not None:
        text = recipe_text(settings, bench, shared.plan.space, rows, best, share, folder)
        with written_whole(folder / "best.yaml", "w", concurrent=True) as file:
            file.write(text)
    return rows


def recipe_text(
    settings: Tune | TuneFinetune,
    bench: Bench,
    space: Mapping[str, Range],
    rows: Sequence[Row],
    best: Row,
    share: float,
    folder: Path,
) -> str:
    """Return a recipe with the settings of the best trial, and the evidence in comments above it."""
    found = with_values(settings, space, {key: best[key] for key in space})
    command = "finetune" if isinstance(settings, Finetune) else "pretrain"
    lines = [
        shlex.join(["python", "-m", f"sslvision.{command}", f"recipe={shown(folder / 'best.yaml')}"]),
        "",
        *evidence(settings, bench, space, rows, best, share),
    ]
    header = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    return header + yaml.safe_dump(redact(recipe_of(found)), sort_keys=False, allow_unicode=True)


def evidence(
    settings: Tune | TuneFinetune,
    bench: Bench,
    space: Mapping[str, Range],
    rows: Sequence[Row],
    best: Row,
    share: float,
) -> list[str]:
    """Return, in lines, why a trial is the best, and how sure that is."""
    epochs = bench.epochs(settings)
    values = ", ".join(f"{key}={best[key]}" for key in space)
    trained = [row for row in rows if row["outcome"] == TRAINED]
    sigma = best.get("standard_error")
    lines = [
        f"Found by a search ({settings.search}) over {len(rows)} trials, on {bench.objective}:",
        f"  trial {best['trial']}: {scored(best['score'], bench.unit)}"
        + (f" (standard error {sigma:.2g})" if sigma else ""),
        f"  {values}",
        f"A trial had {share * epochs:.3g} epochs; this recipe has {epochs:.3g}"
        + (", at which it was not tried." if share < 0.999 else "."),
    ]
    if best["outcome"] == CUT:
        lines.append(
            f"The budget ended that trial at update {best['stopped_at']:,} of {best['updates']:,}: no trial was completed."
        )
    if sigma:
        near = [
            row for row in trained if row is not best and best["score"] - row["score"] < 1.96 * math.sqrt(2) * sigma
        ]
        lines.append(
            f"The held-out images do not tell it from {len(near)} of the other {len(rows) - 1} trials."
            if near
            else "No other trial comes as near as the noise of the held-out images."
        )
    if isinstance(settings, Tune) and bench.objective.startswith("k-NN"):
        lines.append("The best of many on the same held-out images: expect a little less on others.")
    return lines


def recipe_of(settings: Tune | TuneFinetune) -> dict[str, Any]:
    """Return the settings of a recipe that differ from the defaults, as plain containers."""
    kind = Finetune if isinstance(settings, Finetune) else Pretrain
    recipe: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        value = getattr(settings, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name not in NOT_OF_A_RECIPE and value != default:
            recipe[field.name] = escaped(json.loads(json.dumps(value)))
    return recipe


def escaped(value: Any) -> Any:
    """Return settings with their strings marked as no references to other settings."""
    if isinstance(value, dict):
        return {key: escaped(one) for key, one in value.items()}
    if isinstance(value, list):
        return [escaped(one) for one in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def shown(path: Path) -> str:
    """Return a path relative to the current folder, if it lies in it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def scored(score: float | None, unit: str) -> str:
    """Return a score with its unit."""
    return "no score" if score is None else f"{score:.1f}{unit}"


def tell(
    console: Console,
    shared: SharedStudy,
    bench: Bench,
    number: int,
    values: Mapping[str, Any],
    found: Trained,
    seconds: float,
) -> None:
    """Print what a trial gave."""
    done = len(shared.ended())
    words = {
        TRAINED: f"{bench.objective} {scored(found.score, bench.unit)}",
        DIVERGED: "diverged",
        PRUNED: f"pruned at {scored(found.score, bench.unit)}",
        IMPOSSIBLE: f"not possible: {found.facts.get('error')}",
        CUT: f"stopped at the end of the budget, at {scored(found.score, bench.unit)}",
    }
    shown_values = ", ".join(f"{key.removeprefix('method.')}={value}" for key, value in values.items())
    console.print(f"{done}/{shared.plan.wanted}  {shown_values}: {words[found.outcome]}, {seconds:.0f} s", markup=False)


def report(
    settings: Tune | TuneFinetune,
    bench: Bench,
    shared: SharedStudy,
    share: float,
    folder: Path,
    console: Console,
    *,
    ended: str,
    started: float,
) -> dict[str, Any]:
    """Print and write what the search found.

    Args:
        settings: All settings.
        bench: What trials share.
        shared: The study.
        share: Length of trials as a share of the recipe's.
        folder: The folder of the search.
        console: Where to print.
        ended: Why the search ended before all trials were done; empty if they are.
        started: Time of `time.perf_counter` at the start of this call.

    Returns:
        The content of results.json.
    """
    space, rows = shared.plan.space, write_done(settings, bench, shared, share, folder)
    best, told = best_of(rows), list(dict.fromkeys(finding for row in rows for finding in row.get("findings") or []))
    counted = [row for row in rows if row["outcome"] in (TRAINED, DIVERGED) and row["score"] is not None]
    explained = {
        key: importance([row[key] for row in counted], [row["score"] for row in counted], log=one.kind == "log")
        for key, one in space.items()
    }
    advice = [ended] * bool(ended) + ([] if best is None else at_the_edge(space, best))
    diverged = sum(row["outcome"] == DIVERGED for row in rows)
    if diverged:
        advice.append(f"{diverged} of {len(rows)} trials diverged: their rates are too high, or a lack of warm-up.")
    results: dict[str, Any] = {
        "objective": bench.objective,
        "unit": bench.unit,
        "best": None if best is None else {key: value for key, value in best.items() if key != "findings"},
        "evidence": [] if best is None else evidence(settings, bench, space, rows, best, share),
        "importance": explained,
        "trials": {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in (*DONE, CUT)},
        "findings": [*bench.remarks, *told, *advice],
        "seconds": round(sum(row.get("seconds", 0.0) for row in rows), 1),
    }
    run_files.write_json(folder / "results.json", results)
    if counted:
        title = f"{settings.about or folder.name}: {len(counted)} trials"
        search_picture(space, counted, explained, bench, title=title).savefig(folder / "figures" / "search.png")
    print_table(console, space, rows, bench)
    print_importance(console, explained)
    print_findings(console, [*told, *advice])
    if best is None:
        console.print(f"No trial was scored, so that there is no best recipe. Everything is in {folder}.")
        return results
    console.print(
        f"{len(rows)} trials in {results['seconds'] / 60:.1f} minutes, this call {(time.perf_counter() - started) / 60:.1f}. "
        f"Everything is in {folder}, described in its README.md. Run the best recipe in full:"
    )
    command = "finetune" if isinstance(settings, Finetune) else "pretrain"
    recipe = shlex.quote(f"recipe={shown(folder / 'best.yaml')}")
    console.print(f"  python -m sslvision.{command} {recipe}", markup=False)
    return results


def search_picture(
    space: Mapping[str, Range],
    counted: Sequence[Row],
    explained: Mapping[str, float | None],
    bench: Bench,
    *,
    title: str,
) -> Figure:
    """Return the picture of the objective against each setting, and of what each explains."""
    varied = [
        Varied(key.removeprefix("method."), [row[key] for row in counted], one.kind == "log", explained[key])
        for key, one in space.items()
    ]
    return search_figure(
        varied,
        [row["score"] for row in counted],
        failed=[row["outcome"] == DIVERGED for row in counted],
        objective=f"{bench.objective}{' (%)' if bench.unit else ''}",
        title=title,
    )


def at_the_edge(space: Mapping[str, Range], best: Row) -> list[str]:
    """Return, in sentences, which settings are best at an end of their range."""
    told = []
    for key, one in space.items():
        if one.kind == "choice":
            continue
        place = math.log if one.kind == "log" else float
        share = (place(best[key]) - place(one.low)) / (place(one.high) - place(one.low))
        if share < EDGE or share > 1 - EDGE:
            end, beyond = ("lower", "below") if share < EDGE else ("upper", "above")
            told.append(
                f"{key} is best at {best[key]}, the {end} end of its range: better values may lie {beyond} it. Search "
                "there in a new folder (name=)."
            )
    return told


def print_table(console: Console, space: Mapping[str, Range], rows: Sequence[Row], bench: Bench) -> None:
    """Print the best trials."""
    order = sorted(rows, key=lambda row: (row["outcome"] != TRAINED, -(row["score"] or 0.0)))
    title = "Trials, the best first" + (f" ({SHOWN} of {len(order)})" if len(order) > SHOWN else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in (
        "trial",
        *(key.removeprefix("method.") for key in space),
        f"{bench.objective}{bench.unit}",
        "seconds",
        "",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in order[:SHOWN]:
        score = "–" if row["score"] is None else f"{row['score']:.1f}"
        outcome = "" if row["outcome"] == TRAINED else row["outcome"]
        table.add_row(
            str(row["trial"]), *(str(row[key]) for key in space), score, f"{row.get('seconds', 0):.0f}", outcome
        )
    console.print(table)


def print_importance(console: Console, explained: Mapping[str, float | None]) -> None:
    """Print how much of the differences each setting explains."""
    known = {key: share for key, share in explained.items() if share is not None}
    if not known:
        console.print(
            f"How much each setting matters cannot be told from so few trials, or equal scores ({FEWEST} or more are needed)."
        )
        return
    words = ", ".join(
        f"{key.removeprefix('method.')} {100 * share:.0f} %"
        for key, share in sorted(known.items(), key=lambda item: -item[1])
    )
    console.print(
        f"Each setting by itself explains, of the differences between trials (by rank): {words}.", markup=False
    )
