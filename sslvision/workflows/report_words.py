"""What a report says in words: what the scores mean, where a run stands, and what to type next."""

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeGuard

from sslvision.runs.run_record import RunRecord
from sslvision.system.resuming import command_to_resume

KINDS = {
    "pretrain": "pretraining",
    "finetune": "fine-tuning",
    "compare": "comparison of label efficiency",
    "probe": "probe of frozen features",
    "scale": "scaling ladder",
    "tune": "tuning",
    "other": "run",
}
ROWS = {  # of the scores of pretraining, by the prefix of their names in results.json
    "": "pretrained",
    "best_": "best on the way",
    "start_": "the start, init_from",
    "untrained_": "the same, untrained",
    "pixels_": "raw pixels",
}
SCORES = {
    "knn_top1": "k-NN top-1 %",
    "knn_top5": "k-NN top-5 %",
    "linear_top1": "linear probe top-1 %",
    "rankme": "RankMe",
}
CLASSIFIERS = {"fine_tuned": "fine-tuned", "frozen_features": "frozen features", "from_scratch": "from scratch"}
IN_PROSE = {
    "fine-tuned": "fine-tuning",
    "frozen features": "a linear head on frozen features",
    "from scratch": "training from scratch",
}
Interval = tuple[float, float]


def interval_of(results: Mapping[str, Any], name: str) -> Interval | None:
    """Return the 95 % interval of a score of pretraining, if there is one."""
    found = (results.get("intervals") or {}).get(name)
    return (float(found[0]), float(found[1])) if found else None


def rows_of(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the scores of pretraining by the name of the row, then by the name of the score."""
    rows = {
        name: {
            score: float(results[f"{prefix}{score}"]) for score in SCORES if _is_number(results.get(f"{prefix}{score}"))
        }
        for prefix, name in ROWS.items()
    }
    return {name: row for name, row in rows.items() if row}


def classifiers_of(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the classifiers of a fine-tuning run or a probe by name, the main one first."""
    found = {name: results[key] for key, name in CLASSIFIERS.items() if isinstance(results.get(key), dict)}
    if isinstance(results.get("linear"), dict):
        found["linear probe"] = results["linear"]
    if isinstance(results.get("knn"), dict):
        found |= {f"k-NN, k = {k}": one for k, one in results["knn"].items() if isinstance(one, dict)}
    return {name: one for name, one in found.items() if _is_number(one.get("top1"))}


def verdict(run: RunRecord) -> list[str]:
    """Return what the scores of a run say, in sentences."""
    if run.kind == "pretrain":
        return verdict_of_pretraining(run.results)
    if run.kind in ("finetune", "probe"):
        return verdict_of_classifiers(run.results)
    if run.kind == "compare":
        return verdict_of_comparison(run.results)
    return []


def verdict_of_pretraining(results: Mapping[str, Any]) -> list[str]:
    """Return what k-NN and linear probe say of the features, beside the untrained network and pixels."""
    told = []
    for score, name in (("knn_top1", "k-NN"), ("linear_top1", "A linear probe")):
        if not _is_number(value := results.get(score, math.nan)):
            continue
        interval = interval_of(results, score)
        of = f" of {results['held_out_images']:,} held-out images" if results.get("held_out_images") else ""
        beside = [
            against(
                float(value), interval, results[f"{prefix}{score}"], interval_of(results, f"{prefix}{score}"), other
            )
            for prefix, other in (("untrained_", "the same network untrained"), ("pixels_", "raw pixels"))
            if _is_number(results.get(f"{prefix}{score}"))
        ]
        told.append(f"{name} on the frozen features is right for {value:.1f} %{of}{_listed(beside)}.")
    if not told and _is_number(rank := results.get("rankme")):
        untrained = results.get("untrained_rankme")
        of_untrained = f" (untrained: {untrained:.1f})" if _is_number(untrained) else ""
        told.append(
            "The images have no labels that accuracy could be measured by. RankMe, the effective number of dimensions of the "
            f"features, is {rank:.1f}{of_untrained}. Whether neighbors are alike is seen below; probe_data=FOLDER "
            "measures accuracy."
        )
    return told


def verdict_of_classifiers(results: Mapping[str, Any]) -> list[str]:
    """Return what the accuracies of a fine-tuning run or a probe say."""
    found = classifiers_of(results)
    if not found:
        return []
    (name, first), *others = found.items()
    interval, pixels = _interval(first), results.get("pixels") or {}
    beside = [
        against(first["top1"], interval, one["top1"], _interval(one), IN_PROSE[other])
        for other, one in others
        if other in CLASSIFIERS.values()
    ]
    if name == "linear probe" and _is_number(pixels.get("linear_top1")):
        beside.append(against(first["top1"], interval, pixels["linear_top1"], None, "raw pixels"))
    told = [f"{name[0].upper()}{name[1:]}: {first['top1']:.1f} % of the test images are right{_listed(beside)}."]
    classes = {one: value for one, value in (first.get("per_class") or {}).items() if _is_number(value)}
    if len(classes) > 2:
        worst, best = min(classes, key=classes.__getitem__), max(classes, key=classes.__getitem__)
        told.append(f"Best class: {best} ({classes[best]:.0f} %); worst class: {worst} ({classes[worst]:.0f} %).")
    return told


def verdict_of_comparison(results: Mapping[str, Any]) -> list[str]:
    """Return which way of transfer was best at the fewest and the most labels."""
    cells = results.get("cells") or []
    budgets = list(dict.fromkeys(cell["labels_per_class"] for cell in cells))
    told = []
    for labels in dict.fromkeys([*budgets[:1], *budgets[-1:]]):
        column = [cell for cell in cells if cell["labels_per_class"] == labels]
        best = max(column, key=lambda cell: cell["mean"])
        near = [cell["arm"] for cell in column if cell is not best and _not_told_apart(best, cell)]
        scratch = next((cell for cell in column if cell["arm"] == "from scratch"), None)
        gain = ""
        if scratch is not None and scratch is not best and "from scratch" not in near:
            gain = f", {best['mean'] - scratch['mean']:.1f} points above training from scratch"
        like = f". Not told apart from it, by the spread over seeds: {', '.join(near)}" if near else ""
        images = f"{labels} labeled images per class" if labels != "all" else "all labeled images"
        told.append(f"With {images}, the best is “{best['arm']}”: {best['mean']:.1f} %{gain}{like}.")
    return told


def _not_told_apart(best: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two cells of a comparison lie within twice the standard error of their difference over the seeds."""
    errors = [cell["deviation"] / math.sqrt(cell["seeds"]) for cell in (best, other)]
    return bool(best["mean"] - other["mean"] <= 2 * math.hypot(*errors))


def against(value: float, interval: Interval | None, other: float, of_other: Interval | None, name: str) -> str:
    """Return how far a score is from that of `name`, and whether test sets of that size can tell them apart.

    Both are of the same images, which tell them apart better than this says: as if they were of different ones.
    """
    difference = value - other
    if interval is None or of_other is None:
        return f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'} {name}, with unknown noise"
    noise = math.hypot(interval[1] - interval[0], of_other[1] - of_other[0]) / 2
    if abs(difference) <= noise:
        return f"not told apart from {name} ({other:.1f} %)"
    return f"{abs(difference):.1f} points {'above' if difference > 0 else 'below'} {name}"


def _listed(parts: Sequence[str]) -> str:
    return f": {', and '.join(parts)}" if parts else ""


def status_in_words(run: RunRecord) -> str:
    """Return whether a run has ended, and when."""
    dry = "dry run, " if run.settings.get("dry_run") else ""
    when = f" {run.ended:%Y-%m-%d %H:%M}" if run.ended else ""
    if run.status == "running":
        return f"{dry}running{f', update {run.steps:,}' if run.steps else ''}"
    return f"{dry}{run.status}{f' at update {run.steps:,},' if run.status == 'stopped' and run.steps else ''}{when}"


def duration(seconds: Any) -> str:
    """Return seconds as hours, minutes and seconds; nothing if they are not a number."""
    return str(timedelta(seconds=round(seconds))) if _is_number(seconds) else ""


def path_of(folder: Path) -> str:
    """Return a folder as it is typed: relative where it is below the current folder."""
    relative = os.path.relpath(folder)
    return shlex.quote(str(folder.absolute()) if relative.startswith("..") else relative)


def next_lines(run: RunRecord) -> list[tuple[str, str]]:
    """Return command lines that are of use after a run, each with what it does."""
    where, lines = path_of(run.folder), list[tuple[str, str]]()
    if following := run.results.get("next"):
        lines.append((str(following), "By the learning curves (see the findings), try next:"))
    if run.status == "stopped" and run.kind in ("pretrain", "finetune") and any(run.folder.glob("checkpoints/*.ckpt")):
        lines.append((command_to_resume(run.folder), "Go on from the last checkpoint:"))
    elif run.status == "stopped" and (again := run.environment.get("command")):
        lines.append((str(again), "The same command goes on, or begins anew:"))
    ready = (run.folder / "export").is_dir() or any(run.folder.glob("checkpoints/*.ckpt"))
    if run.kind == "pretrain" and ready:
        lines.append(
            (f"python -m sslvision.probe run={where}", "Measure the frozen features by the protocols of the papers:")
        )
        lines.append(
            (
                f"python -m sslvision.finetune run={where} data=FOLDER",
                "Train a classifier on your labeled images, one folder per class:",
            )
        )
    if run.kind == "finetune" and ready:
        lines.append((f"python -m sslvision.predict run={where} images=FOLDER", "Label new images:"))
    if run.kind == "compare" and (of := run.settings.get("run")) and run.status == "finished":
        line = f"python -m sslvision.finetune run={shlex.quote(str(of))} data=FOLDER"
        lines.append((line, "Train one classifier, with its report and an export:"))
    if run.kind in ("finetune", "probe") and (of := run.settings.get("run")):
        line = f"python -m sslvision.finetune run={shlex.quote(str(of))} compare=true 'labels_per_class=[1,10,all]'"
        lines.append((line, "Ask what pretraining is worth at several numbers of labels, tuned alike:"))
    if (run.folder / "export").is_dir():
        # Not shell-quoted: it is Python.
        model = repr(
            f"local-dir:{os.path.relpath(run.folder) if not where.startswith('/') else run.folder.absolute()}/export"
        )
        line = f"import timm; model = timm.create_model({model}, pretrained=True{', num_classes=0' * (run.kind == 'pretrain')})"
        lines.append((line, "Use the network in Python, with timm alone:"))
    lines.append((f"python -m sslvision.report {where} OTHER", "Compare with another run:"))
    return lines


def _interval(scores: Mapping[str, Any]) -> Interval | None:
    found = scores.get("top1_interval")
    return (float(found[0]), float(found[1])) if found else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
