"""The model card of an export: README.md in the format that the Hugging Face hub reads, of what is known and no more.

Scores, settings, versions and hardware are those in the files of the run. What nobody recorded is left to be filled in.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from sslvision.backbones.load import Loaded
from sslvision.errors import UsageError
from sslvision.exports.loading import loading_code
from sslvision.nn.image_size import written
from sslvision.runs.config import config_file, read_settings
from sslvision.runs.redaction import redact

LIBRARIES = {"timm": "timm", "transformers": "transformers", "onnx": "onnx", "program": "pytorch"}
SCORES = {  # key in results.json: name in the card
    "knn_top1": "k-NN top-1 %, frozen features",
    "linear_top1": "linear probe top-1 %, frozen features",
    "rankme": "RankMe, effective rank of the features",
}
CLASSIFIERS = {
    "fine_tuned": "fine-tuned",
    "frozen_features": "linear head on frozen features",
    "from_scratch": "from scratch",
}
ROWS = {
    "": "this network",
    "start_": "the weights it started from",
    "untrained_": "the same, untrained",
    "pixels_": "raw pixels",
}


def write_card(
    folder: Path,
    loaded: Loaded,
    *,
    name: str,
    format: str,
    run: str | Path | None,
    license: str | None = None,
    deviation: str | None = None,
    facts: Mapping[str, Any] | None = None,
    scores: str = "",
) -> None:
    """Write README.md into the folder of an export.

    Args:
        folder: Folder of the export.
        loaded: The network.
        name: Name of the model.
        format: Format of the export.
        run: Run that it was made of, whose files tell about training.
        license: License of the weights; None leaves it to be filled in.
        deviation: How far the export is from the original, in words.
        facts: The content of export.json, as far as it tells how to load the export.
        scores: Prefix of its scores in results.json: "best_" of the best weights on the way.
    """
    known = files_of(run)
    parts = [
        front_matter(name, loaded, known, format=format, license=license, scores=scores),
        f"# {name}\n\n{introduction(loaded, known)}",
        f"## How to load it\n\n{loading_code(loaded, format, facts or {})}",
        f"## Training\n\n{training(loaded, known)}",
        f"## Data\n\n{data(loaded, known)}",
        f"## Scores\n\n{scores_of(known, scores)}",
        USE_OF_CLASSIFIERS.format(data=data_name(known)) if loaded.classes else USE.format(data=data_name(known)),
    ]
    if deviation is not None:
        parts.append(f"## Fidelity of this export\n\nDeviation from the outputs in training's own code: {deviation}.")
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8", errors="backslashreplace")


USE = """\
## Intended use and limits

A backbone for features: nearest neighbors, a linear classifier, clustering, or a start for fine-tuning on labeled images like
those of training ({data}). It classifies nothing by itself.

The scores above are of one data set, and say little about images of another kind. Whoever and whatever is rare in the training
images is represented worse; which groups that concerns has not been examined. Do not use it for decisions about people without
an evaluation of your own."""
USE_OF_CLASSIFIERS = """\
## Intended use and limits

To classify images like those of training ({data}) into the classes that the model knows. An image of anything else gets one of
these classes too, perhaps with a high probability: probabilities have not been calibrated.

The scores above are of one data set, and say little about images of another kind. Whoever and whatever is rare in the training
images is classified worse; which groups that concerns has not been examined. Do not use it for decisions about people without
an evaluation of your own."""


def files_of(run: str | Path | None) -> dict[str, Any]:
    """Return a run, and the content of its config.yaml, results.json and environment.json, as far as they are there."""
    config = None if run is None else config_file(run)
    if config is None:
        return {"run": run, "config": {}, "results": {}, "environment": {}}
    try:
        settings = read_settings(config, ("data",))
    except UsageError:
        settings = {}
    found: dict[str, Any] = {"run": run, "config": redact(settings)}
    for name in ("results", "environment"):
        try:
            content = json.loads((config.parent / f"{name}.json").read_text())
        except (OSError, ValueError):
            content = {}
        found[name] = content if isinstance(content, dict) else {}
    return found


def front_matter(
    name: str, loaded: Loaded, known: Mapping[str, Any], *, format: str, license: str | None, scores: str
) -> str:
    """Return the metadata that hubs read, between two lines of dashes."""
    method = method_name(known)
    task = "image-classification" if loaded.classes else "image-feature-extraction"
    tags = ["sslvision", "self-supervised-learning", *([method.lower()] if method else []), architecture(loaded)]
    about: dict[str, Any] = {"license": license or "unknown", "library_name": LIBRARIES[format], "pipeline_tag": task}
    about["tags"] = tags
    metrics = [
        {"type": "accuracy", "value": value, "name": text}
        for text, value, _ in rows_of(known, scores)
        if "top-1" in text or text == CLASSIFIERS["fine_tuned"]
    ]
    if metrics:
        dataset = data_name(known)
        result = {
            "task": {"type": "image-classification", "name": "image classification"},
            "dataset": {"type": dataset, "name": dataset},
            "metrics": metrics,
        }
        about["model-index"] = [{"name": name, "results": [result]}]
    text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    if license is None:
        text = text.replace("license: unknown\n", "license: unknown  # fill in: the license of these weights\n", 1)
    return f"---\n{text}---"


def introduction(loaded: Loaded, known: Mapping[str, Any]) -> str:
    """Return what the network is, in a paragraph."""
    backbone, method = loaded.backbone, method_name(known)
    count = sum(parameter.numel() for parameter in backbone.model.parameters())
    by = f", pretrained by {method} without labels" if method and not loaded.classes else ""
    start = known["config"].get("run") or known["config"].get("init_from")
    by += f", {'fine-tuned' if loaded.classes else 'continued'} from {Path(str(start)).name}" if start else ""
    text = (
        f"A {architecture(loaded)} of {count / 1e6:.3g} million parameters{by}. It reads images of "
        f"{written(backbone.image_size)} pixels and {backbone.channels} channel{'s' * (backbone.channels > 1)}, and makes "
        f"{backbone.embed_dim} features of each."
    )
    if loaded.classes:
        shown = ", ".join(loaded.classes[:20]) + (", ..." if len(loaded.classes) > 20 else "")
        text += f" It tells {len(loaded.classes):,} classes apart: {shown}."
    return text


def training(loaded: Loaded, known: Mapping[str, Any]) -> str:
    """Return how it was trained: recipe, length, hardware and versions."""
    config, environment, results = known["config"], known["environment"], known["results"]
    if not config:
        weights = without_folders(loaded.weights, known["run"])
        return f"The weights are: {weights}. Nothing else is recorded about their training."
    rows = {
        "command": f"`{without_folders(environment['command'])}`" if environment.get("command") else None,
        "recipe": config.get("about") or None,
        "method": _settings(config.get("method", {})),
        "epochs": config.get("epochs"),
        "images per update": config.get("batch_size"),
        "seed": config.get("seed"),
        "seconds of training": results.get("training_seconds") or results.get("seconds"),
        "hardware": ", ".join(environment.get("gpus") or []) or environment.get("processor"),
        "versions": _versions(environment),
        "commit": environment.get("git_commit"),
        "date": environment.get("date"),
    }
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items() if value not in (None, "")]
    ended = "" if results else "\n\nThe run had not ended when this was exported; its scores are not known."
    return "\n".join(["| | |", "| --- | --- |", *lines]) + ended


def data(loaded: Loaded, known: Mapping[str, Any]) -> str:
    """Return what images it was trained on, how many, and how they are normalized."""
    results = known["results"]
    counts = results.get("images") or {}
    lines = [f"- images: {data_name(known)}"]
    lines += [f"- {kind} images: {number:,}" for kind, number in counts.items() if number is not None]
    if "held_out_images" in results and "held-out" not in counts:
        lines.append(f"- held-out images, which scores are of: {results['held_out_images']:,}")
    for name, values in (("mean", loaded.mean), ("standard deviation", loaded.std)):
        lines.append(
            f"- {name} of the pixels, per channel, from 0 to 1: {', '.join(f'{value:.4g}' for value in values or ())}"
        )
    lines.append("- origin, license and consent: not recorded; fill in")
    return "\n".join(lines)


def scores_of(known: Mapping[str, Any], prefix: str) -> str:
    """Return a table of scores with their intervals, as they stand in results.json."""
    results = known["results"]
    lines = ["| | value | 95 % interval |", "| --- | ---: | --- |"]
    rows = list(rows_of(known, prefix))
    for other, whose in ROWS.items():
        if other and other != prefix:
            rows += [(f"{text}: {whose}", value, interval) for text, value, interval in rows_of(known, other)]
    if not rows:
        return "None were measured." if results else "None are recorded."
    shown = [
        (text, f"{value:g}", f"{interval[0]:g} to {interval[1]:g}" if interval else "")
        for text, value, interval in rows
    ]
    return "\n".join([*lines, *(f"| {text} | {value} | {interval} |" for text, value, interval in shown)])


def rows_of(known: Mapping[str, Any], prefix: str) -> list[tuple[str, float, list[float] | None]]:
    """Return name, value and interval of each score with a prefix; of a classifier, of every way that it was trained."""
    results = known["results"]
    intervals = results.get("intervals", {})
    rows = [
        (text, results[f"{prefix}{key}"], intervals.get(f"{prefix}{key}"))
        for key, text in SCORES.items()
        if f"{prefix}{key}" in results
    ]
    if not prefix:
        rows += [
            (f"{text}", results[key]["top1"], results[key].get("top1_interval"))
            for key, text in CLASSIFIERS.items()
            if isinstance(results.get(key), dict) and "top1" in results[key]
        ]
    return rows


def architecture(loaded: Loaded) -> str:
    """Return timm's name of a network."""
    return str(loaded.backbone.model.pretrained_cfg["architecture"])


def method_name(known: Mapping[str, Any]) -> str:
    """Return the name of the method of pretraining; "" if there is none."""
    return str((known["config"].get("method") or {}).get("_target_", "")).rpartition(".")[2]


def data_name(known: Mapping[str, Any]) -> str:
    """Return the name of the images without the path to them."""
    section = known["config"].get("data") or {}
    named = section.get("name") or section.get("root")
    if named:
        return Path(str(named)).name
    target = str(section.get("_target_", "")).rpartition(".")[2].removeprefix("open_")
    return target or "unknown images"


def without_folders(text: str, run: str | Path | None = None) -> str:
    """Return text with the last part alone of each absolute path: an export is given away, and folders name people.

    Args:
        text: Words, or a command as shlex joins it.
        run: A path in it that may have spaces.
    """
    if run is not None and str(run).startswith(("/", "~")):
        text = text.replace(str(run), Path(run).name)
    text = re.sub(r"'([^'=]*=)?~?/[^']*/([^'/]+)/?'", r"'\1\2'", text)  # in quotes, with spaces
    return re.sub(r"(?<![\w./:])(?:~?/[^\s'\"=,]+/)([^\s'\"=,/]+)", r"\1", text)


def _settings(section: Mapping[str, Any]) -> str:
    name = str(section.get("_target_", "")).rpartition(".")[2]
    listed = ", ".join(f"{key} {value}" for key, value in section.items() if key != "_target_" and value is not None)
    return f"{name}: {listed}" if name and listed else name or listed


def _versions(environment: Mapping[str, Any]) -> str:
    packages = environment.get("packages") or {"torch": torch.__version__}
    return ", ".join(f"{name} {number}" for name, number in packages.items() if number)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
