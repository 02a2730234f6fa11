"""The comparison of several runs: scores with intervals, curves over one another, and the settings that differ."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from sslvision.figures.report_charts import Bar, Line, interval_chart, line_chart
from sslvision.figures.report_page import Section, command, facts_table, folded, listed, page, paragraph, table
from sslvision.runs.run_record import RunRecord
from sslvision.workflows.report_of_run import flattened, shown_setting
from sslvision.workflows.report_words import (
    KINDS,
    SCORES,
    Interval,
    against,
    classifiers_of,
    duration,
    interval_of,
    next_lines,
    path_of,
    rows_of,
    status_in_words,
)

COLORS = 10
OF_A_RUN = {"name", "output_dir", "overwrite", "resume", "about", "reference"}  # settings that say nothing of results
LIMITED = 40  # letters of a setting in a column


class Scored(NamedTuple):
    """A score of a run, with its interval if it has one."""

    value: float
    interval: Interval | None


def runs_page(runs: Sequence[RunRecord], *, refresh: int = 0) -> str:
    """Return the comparison of runs as one HTML page, which a browser loads again every `refresh` seconds, if any."""
    names = names_of(runs)
    sections = [
        Section("In short", in_short(runs, names)),
        Section("Scores", scores_of_runs(runs, names)),
        Section("Learning curves", curves_of_runs(runs, names)),
        Section("Settings that differ", differences(runs, names)),
        Section("What was done", what_was_done(runs, names)),
        Section("Next", reports_of_each(runs, names)),
    ]
    kinds = " and ".join(dict.fromkeys(KINDS[run.kind] for run in runs))
    facts = [
        f"{len(runs)} runs",
        kinds,
        *(f"{name}: {status_in_words(run)}" for run, name in zip(runs, names, strict=True)),
    ]
    return page(" · ".join(names), about="Runs beside one another", facts=facts, sections=sections, refresh=refresh)


def names_of(runs: Sequence[RunRecord]) -> list[str]:
    """Return names that tell runs apart: those of their folders, with the folders above where these are the same."""
    parts = [run.folder.absolute().parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def scored(run: RunRecord) -> dict[str, Scored]:
    """Return the main scores of a run by name."""
    if run.kind == "pretrain":
        first = next(iter(rows_of(run.results).items()), ("", {}))
        own = first[1] if first[0] == "pretrained" else {}
        return {SCORES[key]: Scored(value, interval_of(run.results, key)) for key, value in own.items()}
    found = {}
    for name, one in classifiers_of(run.results).items():
        given = f" ({run.settings.get('protocol')})" if name == "linear probe" else ""
        interval = one.get("top1_interval")
        found[f"{name}{given} top-1 %"] = Scored(one["top1"], tuple(interval) if interval else None)
    return found


def in_short(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Return which run is best by each score, whether that is told from noise, and what was found in each."""
    told: list[str] = []
    warned: list[str] = []
    if len({_tested(run) for run in runs}) > 1:
        warned.append("The runs are of different images, so that their scores cannot be compared.")
    for score in columns(runs) if not warned else []:
        ranked = sorted(
            ((scored(run)[score], name) for run, name in zip(runs, names, strict=True) if score in scored(run)),
            key=lambda pair: -pair[0].value,
        )
        if len(ranked) > 1 and score.endswith("top-1 %"):
            (best, first), (second, other) = ranked[:2]
            told.append(f"{score}: {first} is best, {best.value:.1f}: {against(*best, *second, other)}.")
    findings = [
        f"{name}: {finding}"
        for run, name in zip(runs, names, strict=True)
        for finding in [
            *([f"stopped: {run.reason}"] if run.reason else []),
            *run.problems,
            *(run.results.get("findings") or []),
        ]
    ]
    once = "One training each: another seed may change the order; intervals are over test sets, not over trainings."
    return (
        listed(told, "verdict") + (paragraph(once, "about") if told else "") + listed([*warned, *findings], "findings")
    )


def columns(runs: Sequence[RunRecord]) -> list[str]:
    """Return the names of all scores of the runs, in their order."""
    return list(dict.fromkeys(name for run in runs for name in scored(run)))


def scores_of_runs(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Return all scores, as figures and as a table with intervals."""
    shown = columns(runs)
    charts = "".join(
        interval_chart(
            [
                Bar(name, *scored(run)[score], color=number % COLORS)
                for number, (run, name) in enumerate(zip(runs, names, strict=True))
                if score in scored(run)
            ],
            label=score,
        )
        for score in shown
        if score.endswith("top-1 %")
    )
    rows = [
        [
            name,
            *(_cell(scored(run).get(score)) for score in shown),
            duration(run.results.get("training_seconds") or run.results.get("seconds")),
        ]
        for run, name in zip(runs, names, strict=True)
    ]
    return charts + table(["run", *shown, "time"], rows) if shown else ""


def curves_of_runs(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Return the curves of all runs over one another; losses only of the same method."""
    methods = [_method(run) for run in runs]
    charts = ""
    for method in dict.fromkeys(methods):
        lines = [
            _line(run, name, "loss", number)
            for number, (run, name) in enumerate(zip(runs, names, strict=True))
            if methods[number] == method
        ]
        alone = "" if len(set(methods)) == 1 else f" of {method}"
        caption = "Losses are comparable where the settings of the method are the same." if len(lines) > 1 else ""
        charts += line_chart(lines, label=f"training loss{alone}", caption=caption, tall=True)
    for key, label in (
        ("knn_top1", "k-NN top-1 (%)"),
        ("val_top1", "validation top-1 (%)"),
        ("rankme", "RankMe"),
        ("lr", "learning rate"),
    ):
        lines = [_line(run, name, key, number) for number, (run, name) in enumerate(zip(runs, names, strict=True))]
        charts += line_chart(lines, label=label)
    return charts


def differences(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Return settings, versions and hardware in which the runs differ."""
    flat = [flattened(run.settings) | _surroundings(run) for run in runs]
    keys = [key for key in dict.fromkeys(key for one in flat for key in one) if key not in OF_A_RUN]
    rows = []
    for key in keys:
        values = ["not set" if one.get(key) is None else shown_setting(one[key]) for one in flat]
        if len(set(values)) > 1:
            rows.append([key, *(value if len(value) <= LIMITED else f"{value[:LIMITED]}…" for value in values)])
    if not rows:
        return paragraph("The runs have the same settings, versions and hardware.")
    return table(["setting", *names], rows, kind="settings", numbers=False)


def what_was_done(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Return the command of each run."""
    rows = {name: str(run.environment.get("command") or run.folder) for run, name in zip(runs, names, strict=True)}
    return facts_table(rows)


def reports_of_each(runs: Sequence[RunRecord], names: Sequence[str]) -> str:
    """Return the lines that report on each run, and what to type after it."""
    found = ""
    for run, name in zip(runs, names, strict=True):
        lines = [
            (f"python -m sslvision.report {path_of(run.folder)}", "The report of this run alone:"),
            *next_lines(run)[:-1],
        ]
        found += folded(name, "".join(command(line, told) for line, told in lines))
    return found


def _surroundings(run: RunRecord) -> dict[str, Any]:
    environment = run.environment
    packages = {f"version of {name}": version for name, version in (environment.get("packages") or {}).items()}
    hardware = {key: environment[key] for key in ("processor", "cores", "threads", "gpus") if key in environment}
    return packages | hardware | {"git commit": environment.get("git_commit")}


def _tested(run: RunRecord) -> tuple[str, ...]:
    """Return what tells test images apart: data source, folder or name, and their number."""
    data = run.settings.get("data") or {}
    number = run.results.get("held_out_images") or run.results.get("test_images")
    return (*(str(data.get(key)) for key in ("_target_", "root", "name")), str(number))


def _method(run: RunRecord) -> str:
    return str((run.settings.get("method") or {}).get("_target_") or run.kind).rpartition(".")[2]


def _line(run: RunRecord, name: str, key: str, number: int) -> Line:
    return Line(name, *run.curve(key), color=number % COLORS, smooth=key == "loss")


def _cell(score: Scored | None) -> str:
    if score is None:
        return "–"
    interval = f" ({score.interval[0]:.1f} to {score.interval[1]:.1f})" if score.interval else ""
    return f"{score.value:.2f}{interval}"
