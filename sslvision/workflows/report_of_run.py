"""The report of one run, from what its folder tells."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import yaml

from sslvision.figures.report_charts import SMOOTHED_FROM, Bar, Line, interval_chart, line_chart
from sslvision.figures.report_page import Section, command, facts_table, folded, listed, page, paragraph, table
from sslvision.figures.report_pictures import encode_pictures, pictures
from sslvision.runs.run_record import RunRecord
from sslvision.workflows.report_of_map import map_section
from sslvision.workflows.report_words import (
    KINDS,
    ROWS,
    SCORES,
    classifiers_of,
    duration,
    interval_of,
    next_lines,
    rows_of,
    status_in_words,
    verdict,
)

DRAWN = (
    "learning_curve",
    "health",
    "learning_curve_fine_tuned",
    "learning_curve_from_scratch",
    "comparison",
)  # as charts here
CAPTIONS = {
    "reconstructions": "Held-out images, what the network sees of them (gray is hidden from it), and what it fills in. Right "
    "shapes and colors in the hidden parts mean that it has learned what usually stands there; fine detail is not expected.",
    "attention": "Where the class token of the last block looks, one column for each attention head, from where it looks least "
    "(black) to where most (white). Heads that follow objects have learned to find them without labels.",
    "patch_features": "The first three principal components of the patch features as red, green and blue. Parts of the same "
    "color are alike to the network: objects that stand out, and parts that recur, are a good sign.",
    "neighbors": "Left the image that is asked for, beside it the training images whose features are nearest. Good features "
    "give neighbors that you find alike in what matters to you, and not only in color.",
    "confusion": "A row for each true class, with the share of its test images that was taken for each class. Blue is right; "
    "orange tells which classes are confused.",
}
ARMS = {
    "from scratch": "all layers, from random weights",
    "frozen features": "a linear classifier on features that stay as they are",
    "partial": "the upper half of the network and the classifier",
    "full": "all layers, from the pretrained weights",
}
CAPTION_OF_BARS = "Bars are 95 % intervals over test sets of the same size."
CAPTION_OF_CLASSIFIERS = CAPTION_OF_BARS + (
    " k-NN asks the k nearest training images for their class, and a linear probe draws straight borders between features of "
    "classes; neither changes the network."
)
CAPTION_OF_LOSS = "Thin: every logged value; thick: their running mean."
CAPTION_OF_DINO = (
    "DINO's loss is measured against a teacher that changes, and may rise: alone it says little. See Health."
)
HEALTH = {  # by metric: its name, and what to see in it
    "rankme": ("RankMe", "How many dimensions the features use. A fall towards 1 is a collapse."),
    "grad_norm": ("norm of the gradient", "Jumps go with instability."),
    "loss_over_ln_k": (
        "loss / ln K",
        "DINO's loss, relative to that of a network that says the same of all images. Healthy: below 1 after the warm-up.",
    ),
    "teacher_entropy": (
        "entropy of the teacher",
        "How undecided the teacher is, in nats. At 0, or at ln K while the distance below is near 0, it has collapsed.",
    ),
    "kl": (
        "distance of student and teacher",
        "Their Kullback-Leibler divergence, in nats: what there is to learn from. Healthy: not 0.",
    ),
    "mutual_information": (
        "mutual information",
        "What an output tells about its image, in nats. At 0, all images get the same output, which is a collapse.",
    ),
    "center_norm": ("norm of the center", "Of what is subtracted from the teacher's outputs. Healthy: it settles."),
}
NOT_HEALTH = ("step", "epoch", "loss", "lr", "weight_decay", "val_loss")


def run_page(run: RunRecord, *, refresh: int = 0, layout: Literal["tsne", "umap"] = "tsne") -> str:
    """Return the report of a run as one HTML page, which a browser loads again every `refresh` seconds, if any."""
    encoded, told = encode_pictures({name: file for name, file in run.pictures.items() if name not in DRAWN})
    heads = ("reconstructions", "attention", "patch_features", "neighbors")
    others = [name for name in encoded if name not in (*heads, "confusion")]
    sections = [
        Section("In short", in_short(run)),
        Section("Scores", scores(run)),
        Section("Learning curves", curves(run) + speed(run)),
        Section("Map of images", map_section(run, layout)),
        Section("What it sees", pictures(encoded, CAPTIONS, [*heads, *others])),
        Section("Classes", per_class(run) + pictures(encoded, CAPTIONS, ["confusion"])),
        Section("Health", health(run)),
        Section("What was done", what_was_done(run) + listed(told)),
        Section("Next", "".join(command(line, what) for line, what in next_lines(run))),
    ]
    facts = [KINDS[run.kind], *method_of(run), status_in_words(run)]
    if seconds := duration(run.results.get("seconds")):
        facts.append(f"{seconds} in all")
    return page(run.name, about=str(run.settings.get("about") or ""), facts=facts, sections=sections, refresh=refresh)


def in_short(run: RunRecord) -> str:
    """Return what a hurried reader should know: what the scores say, and what went wrong."""
    findings = [str(one) for one in run.results.get("findings") or []]
    stopped = []
    if run.status == "stopped":
        why = f": {run.reason}" if run.reason else ". Nothing tells why; it may have been killed."
        stopped = [f"The run ended before its end{why}"]
    said = verdict(run)
    nothing = (
        "" if said or run.status == "finished" else paragraph("There are no scores yet: they are measured at the end.")
    )
    fine = (
        ""
        if findings or stopped or run.problems or run.status != "finished"
        else paragraph("Nothing went wrong on the way.", "about")
    )
    return (
        listed([*stopped, *run.problems], "findings")
        + listed(said, "verdict")
        + nothing
        + listed(findings, "findings")
        + fine
    )


def scores(run: RunRecord) -> str:
    """Return the scores as a figure and as a table, beside untrained and pixels."""
    if run.kind == "pretrain":
        return scores_of_pretraining(run)
    if run.kind in ("finetune", "probe"):
        return scores_of_classifiers(run)
    return label_efficiency(run) if run.kind == "compare" else ""


def scores_of_pretraining(run: RunRecord) -> str:
    """Return the scores of frozen features."""
    rows = rows_of(run.results)
    shown = {key: name for key, name in SCORES.items() if any(key in row for row in rows.values())}
    prefixes = {name: prefix for prefix, name in ROWS.items()}
    charts = ""
    for key, label in (("knn_top1", "k-NN top-1 (%)"), ("linear_top1", "linear probe top-1 (%)")):
        bars = [
            Bar(name, row[key], interval_of(run.results, f"{prefixes[name]}{key}"), color=0 if place == 0 else 7)
            for place, (name, row) in enumerate(rows.items())
            if key in row
        ]
        charts += interval_chart(bars, label=label)
    cells = [[name, *(f"{row[key]:.2f}" if key in row else "–" for key in shown)] for name, row in rows.items()]
    images = run.results.get("held_out_images")
    on = f"On {images:,} held-out images. " if images else "Of frozen features. "
    meaning = on + " ".join(
        text
        for text, told in (
            (
                "Bars are 95 % intervals: what another test set of the same size could give.",
                bool(images) and bool(charts),
            ),
            (
                "k-NN asks the nearest training images for their class, a linear probe draws straight borders; neither changes "
                "the features.",
                bool(charts),
            ),
            ("RankMe is the effective number of dimensions that the features use.", "rankme" in shown),
        )
        if told
    )
    return (
        charts
        + table(["frozen features", *shown.values()], cells, first=True)
        + (paragraph(meaning, "about") if cells else "")
    )


def scores_of_classifiers(run: RunRecord) -> str:
    """Return the scores of a fine-tuned network or of a probe, beside others."""
    found = classifiers_of(run.results)
    bars = [
        Bar(
            name,
            one["top1"],
            tuple(one["top1_interval"]) if one.get("top1_interval") else None,
            color=0 if place == 0 else 7,
        )
        for place, (name, one) in enumerate(found.items())
    ]
    rows = [
        [name, *(f"{one[key]:.2f}" if one.get(key) is not None else "–" for key in ("top1", "top5", "mean_per_class"))]
        for name, one in found.items()
    ]
    pixels = run.results.get("pixels") or {}
    for key, name in (("linear_top1", "raw pixels, linear probe"), ("knn_top1", "raw pixels, k-NN")):
        if key in pixels:
            bars.append(Bar(name, pixels[key], color=7))
            rows.append([name, f"{pixels[key]:.2f}", "–", "–"])
    chart = interval_chart(
        bars, label="top-1 (%)", caption=CAPTION_OF_CLASSIFIERS if run.kind == "probe" else CAPTION_OF_BARS
    )
    deviations = [f"Deviation from the paper: {one}" for one in (run.results.get("linear") or {}).get("deviations", [])]
    return (
        chart + table(["classifier", "top-1 %", "top-5 %", "mean per class %"], rows, first=True) + listed(deviations)
    )


def label_efficiency(run: RunRecord) -> str:
    """Return accuracy by labeled images per class, for each way of transfer."""
    cells: list[Mapping[str, Any]] = run.results.get("cells") or []
    if not cells:
        return ""
    arms, budgets = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("arm", "labels_per_class"))
    numbers = {labels: _images_per_class(labels, cells) for labels in budgets}
    lines = []
    for color, arm in enumerate(arms):
        own = sorted((cell for cell in cells if cell["arm"] == arm), key=lambda cell: numbers[cell["labels_per_class"]])
        low, high = (
            [c["mean"] + side * c["deviation"] for c in own] if own[0]["seeds"] > 1 else () for side in (-1, 1)
        )
        x = [numbers[cell["labels_per_class"]] for cell in own]
        lines.append(Line(arm, x, [cell["mean"] for cell in own], color, low, high))
    ticks = [(number, str(labels)) for labels, number in numbers.items()]
    caption = (
        "Where lines are further apart than their bars, which are one standard deviation over the seeds, the way of "
    )
    caption += "transfer matters; where the line from scratch is below the others, pretraining saves labels. "
    caption += "; ".join(f"{arm}: {ARMS[arm]}" for arm in arms if arm in ARMS) + "."
    chart = line_chart(
        lines,
        label="top-1 (%)",
        caption=caption,
        x_label="labeled images per class",
        x_ticks=ticks,
        log_x=True,
        tall=True,
    )
    rows = [
        [arm, *(_cell([c for c in cells if (c["arm"], c["labels_per_class"]) == (arm, labels)]) for labels in budgets)]
        for arm in arms
    ]
    return chart + table(["labels per class", *map(str, budgets)], rows)


def _images_per_class(labels: Any, cells: Sequence[Mapping[str, Any]]) -> float:
    """Return a number of labels as a number; "all" as many times the greatest other one as it has more images."""
    if labels != "all":
        return float(labels)
    of_all = next(cell["images"] for cell in cells if cell["labels_per_class"] == "all")
    others = [cell["images"] / cell["labels_per_class"] for cell in cells if cell["labels_per_class"] != "all"]
    return float(of_all / max(others)) if others else float(of_all)


def _cell(found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "–"
    return f"{found[0]['mean']:.2f}" + (f" ± {found[0]['deviation']:.2f}" if found[0]["seeds"] > 1 else "")


def curves(run: RunRecord) -> str:
    """Return loss, accuracies during training, and learning rate."""
    names = ("fine-tuned", "from scratch") if run.scratch else ("", "")
    charts = {}
    for key, label in (
        ("loss", "training loss"),
        ("knn_top1", "k-NN top-1 (%)"),
        ("val_top1", "validation top-1 (%)"),
        ("lr", "learning rate"),
    ):
        own = Line(names[0] or label, *run.curve(key), smooth=key == "loss")
        scratch = Line(names[1], *run.curve(key, scratch=True), color=1, smooth=key == "loss")
        untrained = run.results.get("untrained_knn_top1")
        references = [("untrained", float(untrained))] if key == "knn_top1" and untrained is not None else []
        of_loss = [CAPTION_OF_LOSS] * any(len(line.x) >= SMOOTHED_FROM for line in (own, scratch))
        of_loss += [CAPTION_OF_DINO] * ("loss_over_ln_k" in run.metrics)
        captions = {"loss": " ".join(of_loss)}
        charts[key] = line_chart(
            [own, scratch], label=label, references=references, caption=captions.get(key, ""), tall=key == "loss"
        )
    rest = "".join(chart for key, chart in charts.items() if key != "loss")
    return charts["loss"] + (f'<div class="panels">{rest}</div>' if rest else "")


def speed(run: RunRecord) -> str:
    """Return how fast training was, and how long it waited for images."""
    results, settings = run.results, run.settings
    rows = {
        "images per second": f"{results['images_per_second']:,.0f}, evaluation not counted"
        if results.get("images_per_second")
        else "",
        "waiting for images": f"{results['waiting_for_data_percent']:.0f} % of the time"
        if "waiting_for_data_percent" in results
        else "",
        "training": duration(results.get("training_seconds")),
        "updates": f"{run.steps:,} of {settings.get('batch_size')} images" if run.steps else "",
    }
    return facts_table(rows)


def health(run: RunRecord) -> str:
    """Return what else was logged during training, a small chart for each."""
    names = [
        name
        for name in run.metrics
        if name not in NOT_HEALTH
        and not name.endswith(("_top1", "_top5"))
        and not name.startswith(("untrained_", "pixels_", "start_", "best_"))
    ]
    charts = []
    for name in names:
        label, caption = HEALTH.get(name, (name.replace("_", " "), ""))
        charts.append(line_chart([Line(label, *run.curve(name), smooth=True)], label=label, caption=caption))
    shown = "".join(charts)
    return f'<div class="panels">{shown}</div>' if shown else ""


def per_class(run: RunRecord) -> str:
    """Return the accuracy of each class of the main classifier, the worst first."""
    first = next(iter(classifiers_of(run.results).items()), None)
    if first is None or not (classes := {k: v for k, v in (first[1].get("per_class") or {}).items() if v is not None}):
        return ""
    ordered = sorted(classes.items(), key=lambda item: item[1])
    bars = [Bar(str(name), float(value), color=0) for name, value in ordered]
    chart = interval_chart(bars[:20], label=f"top-1 of each class (%), {first[0]}, worst first", from_zero=True)
    rest = table(["class", "top-1 %"], [[bar.name, f"{bar.value:.2f}"] for bar in bars]) if len(bars) > 20 else ""
    return chart + folded(f"All {len(bars)} classes", rest)


def what_was_done(run: RunRecord) -> str:
    """Return command, hardware, versions, commit, and all settings."""
    environment, settings = run.environment, run.settings
    versions = {"Python": environment.get("python"), **(environment.get("packages") or {})}
    changed = environment.get("git_changed_files")
    commit = str(environment.get("git_commit") or "")
    gpus = environment.get("gpus") or []
    cores = f"{environment.get('processor', '')}, {environment['cores']} cores" if "cores" in environment else ""
    data = settings.get("data") or {}
    backbone = settings.get("backbone") or {}
    rows = {
        "recipe": str(settings.get("about") or ""),
        "reference": str(settings.get("reference") or ""),
        "command": str(environment.get("command") or ""),
        "backbone": ", ".join(str(backbone[key]) for key in ("name", "image_size", "patch_size") if key in backbone),
        "weights": str(run.results.get("weights") or settings.get("init_from") or ""),
        "images": " ".join(
            [
                str(data.get("_target_", "")).rpartition(".")[2].removeprefix("open_"),
                str(data.get("root") or data.get("name") or ""),
            ]
        ),
        "hardware": ", ".join([*map(str, gpus), cores] if cores else map(str, gpus)),
        "system": str(environment.get("system") or ""),
        "versions": ", ".join([f"{name} {version}" for name, version in versions.items() if version]),
        "commit": commit + (f", with {changed} changed files" if commit and changed else ""),
        "begun": str(environment.get("date") or ""),
        "folder": str(run.folder),
    }
    flat = [[key, shown_setting(value)] for key, value in flattened(settings).items()]
    return facts_table(rows) + folded("All settings", table(["setting", "value"], flat, kind="settings", numbers=False))


def method_of(run: RunRecord) -> list[str]:
    """Return the name of the method and of the backbone, as far as they are known."""
    target = str((run.settings.get("method") or {}).get("_target_", "")).rpartition(".")[2]
    backbone = str((run.settings.get("backbone") or {}).get("name") or "")
    return [one for one in (target if run.kind == "pretrain" else "", backbone) if one]


def flattened(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= (
            flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        )
    return found


def shown_setting(value: Any) -> str:
    """Return the value of a setting as it is written."""
    if isinstance(value, str):
        return value
    return (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, list | dict | bool | type(None))
        else str(yaml.safe_dump(value)).split("\n")[0]
    )
