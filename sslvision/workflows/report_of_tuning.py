"""The report of a tuning: of a search over ranges of settings. That of the seven steps is in report_of_steps.py."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from sslvision.figures.report_charts import Bar, Line, interval_chart, line_chart
from sslvision.figures.report_page import Section, code, command, folded, listed, page, paragraph, table
from sslvision.runs.run_record import RunRecord
from sslvision.workflows.report_of_run import what_was_done
from sslvision.workflows.report_of_steps import steps_sections
from sslvision.workflows.report_words import KINDS, duration, path_of, status_in_words
from sslvision.workflows.search_space import Range, flat_ranges, parse_range

SHOWN = 10  # trials that are not folded
OUTCOMES = {
    "trained": "",
    "diverged": "diverged",
    "pruned": "stopped early: worse than others",
    "impossible": "not possible",
    "cut": "stopped at the end of the budget",
}
Trial = Mapping[str, Any]


def tuning_page(run: RunRecord, *, refresh: int = 0) -> str:
    """Return the report of a search or of the seven steps, which a browser loads again every `refresh` seconds, if any."""
    own = search_sections(run) if run.settings.get("search") else steps_sections(run)
    sections = [
        *own,
        Section("Best recipe", best_recipe(run)),
        Section("What was done", what_was_done(run)),
        Section("Next", "".join(command(line, told) for line, told in next_of_tuning(run))),
    ]
    how = f"by {run.settings['search']} search" if run.settings.get("search") else "by the seven steps"
    facts = [f"{KINDS[run.kind]} {how}", status_in_words(run)]
    if seconds := duration(run.results.get("seconds")):
        facts.append(f"{seconds} in all")
    return page(run.name, about=str(run.settings.get("about") or ""), facts=facts, sections=sections, refresh=refresh)


def search_sections(run: RunRecord) -> list[Section]:
    """Return the sections of a search."""
    space = {key: parse_range(key, text) for key, text in flat_ranges(run.settings.get("ranges") or {}).items()}
    return [
        Section("In short", in_short(run, space)),
        Section("What matters", importances(run)),
        Section("Trials", trials_of(run, space)),
    ]


def in_short(run: RunRecord, space: Mapping[str, Range]) -> str:
    """Return the best trial with the evidence for it, and what was found."""
    results, stopped = run.results, []
    best = results.get("best") or best_of(run.trainings)
    told = [str(one).strip() for one in results.get("evidence") or []]
    if not told and best:
        told = [f"The best of {len(run.trainings)} trials so far is trial {best['trial']}:"]
    if told and best:
        values = f"{values_of(best, space)} gave " if space else ""
        told = [f"{told[0]} {values}{score_of(run, best)}.", *told[3:]]
    if run.status == "stopped":
        why = f": {run.reason}" if run.reason else "."
        stopped = [f"The search ended before its end{why} The same command goes on."]
    nothing = "" if told else paragraph("No trial has been scored yet.")
    findings = [str(one) for one in results.get("findings") or []]
    return (
        listed([*stopped, *run.problems], "findings") + listed(told, "verdict") + nothing + listed(findings, "findings")
    )


def importances(run: RunRecord) -> str:
    """Return how much of the differences between trials each setting explains."""
    found: dict[str, float | None] = run.results.get("importance") or {}
    known = sorted(((key, share) for key, share in found.items() if share is not None), key=lambda pair: -pair[1])
    if not known:
        return (
            paragraph(
                "How much each setting matters cannot be told: there are too few trials, or their scores are equal."
            )
            if found
            else ""
        )
    bars = [Bar(named(key), 100 * share) for key, share in known]
    caption = (
        "How much of the differences between trials each setting explains by itself, by rank. What explains much is worth a "
        "finer search; what explains little may stay as it is. Effects that two settings have only together are not in it."
    )
    return interval_chart(bars, label="differences that a setting explains (%)", caption=caption, from_zero=True)


def trials_of(run: RunRecord, space: Mapping[str, Range]) -> str:
    """Return the score against each setting, and a table of all trials, the best first."""
    trained = [trial for trial in run.trainings if trial.get("outcome") == "trained" and is_scored(trial)]
    diverged = [trial for trial in run.trainings if trial.get("outcome") == "diverged"]
    label = objective_of(run)
    charts = "".join(chart_of(key, one, trained, diverged, label) for key, one in space.items())
    others = len(run.trainings) - len(trained)
    told = f"Dots are trials that were trained to their end; {others} others are in the table alone." if others else ""
    order = sorted(run.trainings, key=lambda one: (one.get("outcome") != "trained", -number_of(one.get("score"))))
    columns = ["trial", *map(named, space), label, "seconds", ""]
    rows = [
        [
            str(one.get("trial")),
            *(str(one.get(key) or "–") for key in space),
            f"{number_of(one['score']):.1f}" if is_scored(one) else "–",
            f"{number_of(one.get('seconds')):.0f}",
            OUTCOMES.get(str(one.get("outcome")), str(one.get("outcome"))),
        ]
        for one in order
    ]
    first = bool(order) and order[0].get("outcome") == "trained"
    rest = folded(f"All {len(rows)} trials", table(columns, rows, first=first)) if len(rows) > SHOWN else ""
    panels = f'<div class="panels">{charts}</div>' if charts else ""
    return (
        panels
        + (paragraph(told, "about") if told and panels else "")
        + table(columns, rows[:SHOWN], first=first)
        + rest
    )


def chart_of(key: str, one: Range, trained: Sequence[Trial], diverged: Sequence[Trial], label: str) -> str:
    """Return the score of each trial against a setting."""
    if not trained:
        return ""
    listed_values = one.kind == "choice"

    def place(trial: Trial) -> float:
        return float(one.choices.index(str(trial[key]))) if listed_values else float(trial[key])

    order = sorted(trained, key=place)
    best = max(order, key=lambda trial: number_of(trial["score"]))
    lines = [
        Line(name, [place(trial) for trial in some], [number_of(trial["score"]) for trial in some], color, style="dots")
        for name, color, some in (("trial", 0, [trial for trial in order if trial is not best]), ("best", 1, [best]))
    ]
    ends = [f"{value:.3g}" for value in sorted(float(trial[key]) for trial in diverged)] if one.kind == "log" else []
    told = f"Diverged, and not drawn: {', '.join(ends)}." if ends else ""
    ticks = [(float(number), choice) for number, choice in enumerate(one.choices)] if listed_values else []
    return line_chart(lines, label=label, x_label=named(key), x_ticks=ticks, log_x=one.kind == "log", caption=told)


def best_recipe(run: RunRecord) -> str:
    """Return the recipe that was found, as it lies in the folder."""
    file = run.folder / "best.yaml"
    if not file.is_file():
        return ""
    told = f"In {path_of(file)}. The first lines are the evidence; below them are all settings that differ from the defaults."
    return paragraph(told) + folded("The recipe", code(file.read_text(encoding="utf-8", errors="replace")))


def next_of_tuning(run: RunRecord) -> list[tuple[str, str]]:
    """Return what to type after a tuning."""
    lines, again = list[tuple[str, str]](), str(run.environment.get("command") or "")
    if (run.folder / "best.yaml").is_file():
        verb = "finetune" if "lr_ratio" in run.settings else "pretrain"
        recipe = shlex.quote(f"recipe={path_of(run.folder / 'best.yaml')}")
        lines.append((f"python -m sslvision.{verb} {recipe}", "Train with the best settings in full:"))
    if again and run.settings.get("search"):
        lines.append((again, "Go on: trials that are done are kept, and a larger trials= adds more:"))
    elif again and not run.results.get("best"):
        lines.append((again, "Go on: steps that passed are not repeated:"))
    lines.append((f"python -m sslvision.report {path_of(run.folder)}", "Write this report again:"))
    return lines


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the best trial of those that were trained to their end."""
    scored = [one for one in trials if one.get("outcome") == "trained" and is_scored(one)]
    return max(scored, key=lambda one: number_of(one["score"]), default=None)


def score_of(run: RunRecord, trial: Trial) -> str:
    """Return the score of a trial with its interval, in words."""
    score, sigma = number_of(trial["score"]), number_of(trial.get("standard_error"))
    name = str(run.results.get("objective") or "a score")
    spread = f" (95 % interval {score - 1.96 * sigma:.1f} to {score + 1.96 * sigma:.1f})" if sigma else ""
    return f"{name} {score:.1f}{run.results.get('unit') or ''}{spread}"


def values_of(trial: Trial, space: Mapping[str, Range]) -> str:
    """Return the settings of a trial, as they are typed."""
    return ", ".join(f"{key}={trial[key]}" for key in space if key in trial)


def objective_of(run: RunRecord) -> str:
    """Return the name of the score, with its unit."""
    unit = str(run.results.get("unit") or "").strip()
    return f"{run.results.get('objective') or 'score'}{f' ({unit})' if unit else ''}"


def named(key: str) -> str:
    """Return the name of a setting in figures."""
    return key.removeprefix("method.")


def is_scored(trial: Trial) -> bool:
    """Return whether a trial has a score."""
    return trial.get("score") not in (None, "")


def number_of(value: Any) -> float:
    """Return a number of a table; 0 if there is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0
