"""The sections of a report on the seven steps of tuning: each step with its question, verdict, numbers and figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sslvision.figures.report_charts import Line, line_chart
from sslvision.figures.report_page import Section, facts_table, folded, listed, paragraph, table, verdict_block
from sslvision.runs.run_record import RunRecord

ASKED = {  # by the beginning of a step's name
    "initial loss": "Is the loss before the first update what theory says? If it is not, images, labels or the first weights "
    "are not what they should be, and no rate will mend that.",
    "overfit a handful": "Can the network learn 16 images by heart, without regularization? One that cannot has too "
    "low a rate, too few parameters, or a fault.",
    "overfit, regularized": "Can it still, with the recipe's regularization? If not, the regularization is too strong.",
    "rate": "Which learning rates learn most in a hundred updates? Too high ones diverge, and far lower ones waste time.",
    "coarse grid": "Which rate goes with which weight decay? Short trainings at a constant rate, scored on held-out images.",
    "finer grid": "The same around the best cell, in smaller steps and longer.",
    "learning curves": "What do the learning curves of the best cell say: too short, overfitted, or unstable?",
}
Numbers = Mapping[str, Any]


def steps_sections(run: RunRecord) -> list[Section]:
    """Return the sections of the seven steps."""
    verdicts = verdicts_of(run)
    return [
        Section("In short", in_short(run, verdicts)),
        Section("Steps", "".join(block(run, one) for one in verdicts)),
    ]


def verdicts_of(run: RunRecord) -> list[Numbers]:
    """Return the last verdict of each step, in the order of the steps."""
    found: dict[str, Numbers] = {}
    for entry in run.trainings:
        if isinstance(one := entry.get("verdict"), dict) and "step" in one:
            found[str(one["step"])] = one
    return [*found.values()]


def in_short(run: RunRecord, verdicts: Sequence[Numbers]) -> str:
    """Return the best settings, or what stopped the steps."""
    results, told, warned = run.results, [], list(run.problems)
    if best := results.get("best"):
        score = (
            f": {results.get('objective', 'score')} {best['score']:.1f}{results.get('unit') or ''}"
            if best.get("score")
            else ""
        )
        told.append(
            f"The best of the grids is rate {best['rate']:.3g} with weight decay {best['weight_decay']:g}{score}."
        )
        told.append(
            "Grids train shorter than the recipe, and at a constant rate: the recipe itself has not been tried in full."
        )
    passed = sum(bool(one.get("passed")) for one in verdicts)
    told.append(f"{passed} of {len(verdicts)} steps that were done have passed.")
    if run.status == "stopped":
        warned.append(
            f"The steps ended before their end{': ' + run.reason if run.reason else '.'} The same command goes on."
        )
    for one in verdicts:
        if not one.get("passed"):
            warned.append(f"The step “{one['step']}” failed: {one.get('words', '')} {one.get('advice') or ''}".strip())
        elif one.get("advice") and not best:  # which the best recipe follows
            warned.append(f"{one['step']}: {one['advice']}")
    warned += [str(one) for one in results.get("findings") or []]
    return listed(told, "verdict") + listed(warned, "findings")


def block(run: RunRecord, verdict: Numbers) -> str:
    """Return a step: its question, its verdict, and what is behind it."""
    step, numbers = str(verdict["step"]), verdict.get("numbers") or {}
    asked = next((text for name, text in ASKED.items() if step.startswith(name)), "")
    figure = rates(run, numbers) if step == "rate" else grid(run, step) if "grid" in step else ""
    plain = {
        key: f"{value:.4g}"
        for key, value in numbers.items()
        if type(value) in (int, float) and math.isfinite(value) and key != "missing"
    }
    more = figure + folded("Numbers", facts_table({key.replace("_", " "): value for key, value in plain.items()}))
    return verdict_block(
        step, passed=bool(verdict.get("passed")), asked=asked, words=str(verdict.get("words", "")),
        advice=str(verdict.get("advice") or ""), more=more,
    )  # fmt: skip


def rates(run: RunRecord, numbers: Numbers) -> str:
    """Return what short runs learned at each rate."""
    tried = [(float(rate), float(gain)) for rate, gain in numbers.get("tried") or [] if gain is not None]
    good = [(rate, gain) for rate, gain in tried if math.isfinite(gain) and gain >= 0]
    lost = [f"{rate:.2g}" for rate, gain in tried if not (math.isfinite(gain) and gain >= 0)]
    own, best = numbers.get("own"), numbers.get("best")
    marks = [(f"recipe {own:.2g}", float(own))] if own else []
    if best and best != own:
        marks.append((f"best {best:.2g}", float(best)))
    elif best:
        marks = [(f"recipe and best {best:.2g}", float(best))]
    of_features = "DINO" in str((run.settings.get("method") or {}).get("_target_", ""))
    label = "rise of the score of the features" if of_features else "share by which the loss fell"
    caption = "One short run at each rate."
    if lost:
        caption += f" Not drawn, for they diverged or became worse than before: {', '.join(lost)}."
    line = Line("learned", [rate for rate, _ in good], [gain for _, gain in good])
    return line_chart([line], label=label, caption=caption, marks=marks, x_label="learning rate", log_x=True, tall=True)


def grid(run: RunRecord, name: str) -> str:
    """Return the scores of a grid, a line for each weight decay, and as a table."""
    cells: dict[tuple[float, float], Numbers] = {}
    for entry in run.trainings:
        if entry.get("grid") == name and entry.get("outcome") != "cut":
            cells[float(entry["weight_decay"]), float(entry["rate"])] = entry
    scored = {key: one for key, one in cells.items() if one.get("score") is not None}
    lines = []
    for color, decay in enumerate(sorted({decay for decay, _ in scored})):
        own = [scored[key] for key in sorted(scored) if key[0] == decay]
        sigmas = [one.get("sigma") for one in own]
        most = 100.0 if (run.results.get("unit") or "").strip() == "%" else math.inf
        low, high = (
            [min(most, max(0.0, one["score"] + side * 1.96 * one["sigma"])) for one in own] if all(sigmas) else ()
            for side in (-1, 1)
        )
        rates_, scores = ([one[key] for one in own] for key in ("rate", "score"))
        lines.append(Line(f"weight decay {decay:g}", rates_, scores, color, low, high))
    label = f"{run.results.get('objective') or 'score'}{' (%)' if (run.results.get('unit') or '').strip() else ''}"
    caption = "Bars are 95 % intervals over sets of as many held-out images." if any(line.low for line in lines) else ""
    chart = line_chart(lines, label=label, caption=caption, x_label="learning rate", log_x=True, tall=True)
    order = sorted(cells.values(), key=lambda one: -(one["score"] if one.get("score") is not None else -math.inf))
    rows = [
        [
            f"{one['rate']:.3g}", f"{one['weight_decay']:g}",
            "–" if one.get("score") is None else f"{one['score']:.1f}",
            "" if one.get("updates") is None else f"{one['updates']:,}",
            f"{one.get('seconds') or 0:.0f}", "" if one.get("outcome") == "trained" else str(one.get("outcome")),
        ]
        for one in order
    ]  # fmt: skip
    columns = ["learning rate", "weight decay", label, "updates", "seconds", ""]
    nothing = paragraph("No cell of this grid has been trained.", "about") if not cells else ""
    return chart + nothing + folded(f"All {len(rows)} cells", table(columns, rows, first=True))
