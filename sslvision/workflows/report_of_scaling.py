"""The report of a scaling ladder: the laws, whether to believe them, what ten times as much would bring, and all trainings."""

import csv
import shlex
from collections.abc import Mapping
from typing import Any

from sslvision.figures.report_charts import Line, line_chart
from sslvision.figures.report_page import Section, command, folded, listed, page, paragraph, table, verdict_block
from sslvision.figures.report_pictures import encode_pictures, pictures
from sslvision.runs.run_record import RunRecord
from sslvision.workflows.report_of_run import what_was_done
from sslvision.workflows.report_words import KINDS, duration, path_of, status_in_words

AXES = ("parameters", "images", "updates")
LABELS = {"knn": "k-NN error (%)", "loss": "held-out loss"}
OF_A_LADDER = ("axes", "rungs", "factor", "seeds", "score", "budget", "name", "output_dir", "dry_run", "overwrite")
HOW = (
    "A law says that the score is E + A / x to the power α: E is what would remain however large x gets, and α tells how fast "
    "the rest falls. It is believed if it passes its tests; the hardest is to predict the largest size from the smaller ones. "
    "Ranges are 95 % intervals."
)
CAPTION = (
    "Both axes are logarithmic. Dots are trainings, with 95 % intervals over sets of as many held-out images; the line is the "
    "law with its 95 % interval, dashed where it is extrapolated, to ten times the largest size."
)


def scaling_page(run: RunRecord, *, refresh: int = 0) -> str:
    """Return the report of a ladder as one HTML page, which a browser loads again every `refresh` seconds, if any."""
    drawn = "".join(law_block(run, axis, law) for axis, law in laws_of(run).items())
    encoded, told = encode_pictures({} if drawn else run.pictures)
    sections = [
        Section("In short", in_short(run)),
        Section("Laws", (summary(run) + drawn if drawn else points_alone(run)) + pictures(encoded, {}, [*encoded])),
        Section("Trainings", trainings_table(run)),
        Section("What was done", what_was_done(run) + listed(told)),
        Section("Next", "".join(command(line, what) for line, what in next_of_scaling(run))),
    ]
    facts = [KINDS[run.kind], f"{len(run.trainings)} trainings", status_in_words(run)]
    if seconds := duration(run.results.get("seconds")):
        facts.append(f"{seconds} of training")
    return page(run.name, about=str(run.settings.get("about") or ""), facts=facts, sections=sections, refresh=refresh)


def laws_of(run: RunRecord) -> dict[str, Mapping[str, Any]]:
    """Return the laws by axis."""
    return {str(axis): law for axis, law in (run.results.get("laws") or {}).items() if isinstance(law, dict)}


def in_short(run: RunRecord) -> str:
    """Return what each law says, and what was found."""
    warned = [*run.problems, *map(str, run.results.get("findings") or [])]
    if run.status == "stopped":
        warned.insert(
            0, f"The ladder ended before its end{': ' + run.reason if run.reason else '.'} The same command goes on."
        )
    told = [f"{axis}: {' '.join(law.get('sentences') or [])}" for axis, law in laws_of(run).items()]
    nothing = "" if told else paragraph("There are no laws yet: they are fitted when all trainings are done.")
    return listed(told, "verdict") + nothing + listed(warned, "findings")


def summary(run: RunRecord) -> str:
    """Return the numbers of all laws as a table."""
    rows = []
    for axis, law in laws_of(run).items():
        falls = falls_of(law)
        least = law["irreducible"]
        remains = span(least) if law.get("irreducible_determined") else f"{least['high']:.3g} at most"
        numbers = [span(law["ten_times"]), span(law["exponent"]), remains] if falls else ["–", "–", "–"]
        rows.append(
            [axis, f"{law['largest']:,.0f}", f"{law['observed']:.3g}", *numbers, "yes" if law.get("believed") else "no"]
        )
    label = LABELS.get(str(run.results.get("score")), "score")
    columns = ["scaled", "largest", f"{label} there", "at ten times", "exponent α", "remains, E", "believed"]
    return paragraph(HOW, "about") + table(columns, rows)


def law_block(run: RunRecord, axis: str, law: Mapping[str, Any]) -> str:
    """Return a law: whether it is believed, its figure, and its tests."""
    checks = [
        [str(one["name"]), "passed" if one["passed"] else "failed", str(one["words"])]
        for one in law.get("checks") or []
    ]
    tests = folded("Its tests", table(["test", "verdict", "what was found"], checks, numbers=False))
    return verdict_block(
        axis[0].upper() + axis[1:],
        passed=bool(law.get("believed")),
        marks=("believed", "not believed"),
        more=law_chart(run, axis, law) + tests,
    )


def law_chart(run: RunRecord, axis: str, law: Mapping[str, Any] | None) -> str:
    """Return the scores of an axis, and the curve of its law if there is one."""
    score, lines = score_of(run), list[Line]()
    curve = curve_of(run, axis) if law is not None and falls_of(law) else []
    largest = max((one["x"] for one in curve if not one["extrapolated"]), default=0.0)
    for name, style, some in (
        ("law", "line", [one for one in curve if not one["extrapolated"]]),
        ("extrapolated", "dashed", [one for one in curve if one["x"] >= largest]),
    ):
        x, y, low, high = ([one[key] for one in some] for key in ("x", "law", "low", "high"))
        lines.append(Line(name, x, y, 0, low, high, style=style, band=True))  # type: ignore[arg-type]
    points = sorted(points_of(run, axis), key=lambda one: one[axis])
    x, y = ([float(one[key]) for one in points] for key in (axis, score))
    sigma = [float(one.get(f"{score}_error") or 0.0) for one in points]
    low, high = ([v + side * 1.96 * s for v, s in zip(y, sigma, strict=True)] for side in (-1, 1))
    lines.append(Line("measured", x, y, 1, low, high, style="dots"))
    references = []
    if curve and law is not None and law.get("irreducible_determined"):
        references = [("E", float(law["irreducible"]["value"]))]
    return line_chart(
        lines, label=LABELS.get(score, score), caption=CAPTION if curve else "", references=references, x_label=axis,
        log_x=True, log_y=True, tall=True,
    )  # fmt: skip


def points_alone(run: RunRecord) -> str:
    """Return the scores so far, before there are laws."""
    return "".join(law_chart(run, axis, None) for axis in run.settings.get("axes") or AXES)


def points_of(run: RunRecord, axis: str) -> list[Mapping[str, Any]]:
    """Return the trainings of an axis: those that are the largest on the others."""
    score, others = score_of(run), [other for other in AXES if other != axis]
    scored = [one for one in run.trainings if one.get(score) is not None]
    most = {other: max((one[other] for one in scored), default=0) for other in others}
    return [one for one in scored if all(one[other] == most[other] for other in others)]


def curve_of(run: RunRecord, axis: str) -> list[dict[str, float]]:
    """Return the points of a law; none if the folder has none, as of earlier versions."""
    file = run.folder / "laws.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as opened:
        rows = [row for row in csv.DictReader(opened) if row.get("axis") == axis]
    return [{key: float(value) for key, value in row.items() if key != "axis"} for row in rows]


def trainings_table(run: RunRecord) -> str:
    """Return all trainings as a table, the smallest first."""
    order = sorted(run.trainings, key=lambda one: tuple(one.get(key) or 0 for key in (*AXES, "seed")))
    rows = []
    for one in order:
        shape = f"{one['depth']} x {one['embed_dim']}" if one.get("depth") else "the recipe's"
        scores = [
            "–" if one.get(key) is None else f"{one[key]:.3g} ± {1.96 * (one.get(f'{key}_error') or 0):.2g}"
            for key in LABELS
        ]
        counts = [f"{one[key]:,}" for key in ("images", "updates")]
        rows.append(
            [f"{one['parameters']:,}", shape, *counts, str(one["seed"]), *scores, f"{one.get('seconds') or 0:.0f}"]
        )
    columns = ["parameters", "depth x width", "images", "updates", "seed", *LABELS.values(), "seconds"]
    kept = [place for place in range(len(columns)) if any(row[place] not in ("–", "") for row in rows)]
    cut = [[row[place] for place in kept] for row in rows]
    after = paragraph("Scores with 95 % intervals over sets of as many held-out images.", "about") if rows else ""
    return table([columns[place] for place in kept], cut) + after


def next_of_scaling(run: RunRecord) -> list[tuple[str, str]]:
    """Return what to type after a ladder."""
    again, lines = str(run.environment.get("command") or ""), list[tuple[str, str]]()
    words = shlex.split(again)
    if run.status == "stopped" and again:
        lines.append((again, "Go on: trainings that are done are kept:"))
    elif again and any(not law.get("believed") for law in laws_of(run).values()) and "seeds" not in again:
        told = "Train each size three times, which tells smaller falls from noise; trainings that are done are kept:"
        lines.append((shlex.join([*words, "seeds=3"]), told))
    if len(words) > 3 and words[2] == "sslvision.scale":
        kept = [word for word in words[3:] if word.partition("=")[0] not in OF_A_LADDER]
        lines.append(
            (
                shlex.join(["python", "-m", "sslvision.pretrain", *kept]),
                "Train the largest network alone, for its weights and pictures:",
            )
        )
    lines.append((f"python -m sslvision.report {path_of(run.folder)}", "Write this report again:"))
    return lines


def score_of(run: RunRecord) -> str:
    """Return the name of the score that laws are of: that of the results, or what there is."""
    known = run.results.get("score") or run.settings.get("score")
    return (
        str(known) if known in LABELS else "knn" if any(one.get("knn") is not None for one in run.trainings) else "loss"
    )


def falls_of(law: Mapping[str, Any]) -> bool:
    """Return whether the fall of a law is told from noise."""
    return not any(one["name"] == "falls" and not one["passed"] for one in law.get("checks") or [])


def span(interval: Mapping[str, float]) -> str:
    """Return an interval in words."""
    return f"{max(0.0, interval['low']):.3g} to {interval['high']:.3g}"
