"""Exporting: a network becomes a folder that other libraries load, compared with the original before it is called done.

Everything is written to a folder beside the one that is named, which appears when the comparison has succeeded.
"""

import os
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from torch import Tensor

from sslvision.backbones.load import Loaded, load_backbone
from sslvision.backbones.swin import Swin
from sslvision.errors import UsageError
from sslvision.exports.deviation import Deviation, deviation, preprocessing_deviation, require_close
from sslvision.exports.graphs import read_onnx, read_program, write_onnx, write_program
from sslvision.exports.hub import hub_token, push_to_hub, require_hub, uploaded_files
from sslvision.exports.model_card import without_folders, write_card
from sslvision.exports.network import ExportedNetwork, Interface, our_outputs, outputs_of, preprocessing, statistics_of
from sslvision.exports.optional import require_packages
from sslvision.exports.timm_folder import read_timm, timm_pixels, write_timm
from sslvision.exports.transformers_folder import (
    read_transformers,
    transformers_pixels,
    write_counterpart,
    write_processor,
)
from sslvision.exports.transformers_names import Counterpart, counterpart
from sslvision.nn.image_size import height_and_width, written
from sslvision.nn.normalize import Normalize
from sslvision.runs import run_files
from sslvision.runs.redaction import redact
from sslvision.runs.weights import recorded_value_range
from sslvision.workflows.console import print_findings
from sslvision.workflows.exporting_settings import OPSET, Export

RECORD = "export.json"
SHIFT = 3.0  # gray levels, more than any rounding
ROUNDING = 1e-3  # gray levels: of normalizing and back


class Written(NamedTuple):
    """What was written and found.

    Attributes:
        deviation: From our outputs.
        facts: What else is recorded.
        lines: What else is told, in sentences.
    """

    deviation: Deviation
    facts: dict[str, Any]
    lines: list[str]


def export_network(settings: Export, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Export the network that the settings name.

    Args:
        settings: All settings.
        folder: Folder of the export, which appears when it is complete.
        words: The command line, for the record.

    Returns:
        The content of export.json.

    Raises:
        UsageError: There is nothing to export there, the folder is in use, or a package is missing. Raised before the work.
        SSLVisionError: The network cannot be exported to this format, or the export deviates by more than the tolerance.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    require_packages(settings.format)
    if settings.push is not None:
        require_hub()
    check_folder(folder, overwrite=settings.overwrite)
    size = None if settings.image_size is None else height_and_width(settings.image_size)
    loaded = load_backbone(settings.run or "", image_size=size)
    loaded.backbone.eval().requires_grad_(False)
    statistics_of(loaded, settings.run or "")
    outputs_of(loaded, settings.outputs)
    console.print(escape(f"{loaded.weights}: {described(loaded)}"))
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        done = WRITERS[settings.format](loaded, unfinished, settings)
        record = {
            "format": settings.format,
            "source": without_folders(settings.run or "", settings.run),
            "weights": without_folders(loaded.weights, settings.run),
            "deviation": done.deviation.record(),
            **done.facts,
            "environment": run_files.environment(
                without_folders(shlex.join(["python", "-m", "sslvision.export", *redact([*words])]))
            ),
        }
        run_files.write_json(unfinished / RECORD, record)
        write_card(
            unfinished,
            loaded,
            name=folder.name,
            format=settings.format,
            run=settings.run,
            license=settings.license,
            deviation=done.deviation.words(),
            facts=done.facts,
        )
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    console.print(f"Largest deviation from our outputs: {done.deviation.words()}.")
    print_findings(console, done.lines)
    files = ", ".join(sorted(file.name for file in folder.iterdir()))
    console.print(f"Exported in {time.perf_counter() - started:.0f} s to {folder}: {files}.", markup=False)
    if settings.push is not None:
        push(settings, folder, console)
    return record


def push(settings: Export, folder: Path, console: Console) -> None:
    """Upload the folder; without a token, or in a dry run, list what would be uploaded."""
    assert settings.push is not None
    token = hub_token()
    if token is not None and not settings.push_dry_run:
        console.print(f"Uploaded to {push_to_hub(folder, settings.push, private=settings.private)}.", markup=False)
        return
    why = "push_dry_run=true" if token else "there is no token of the hub (HF_TOKEN, or hf auth login)"
    console.print(f"Nothing was uploaded to {settings.push}: {why}. These files would be:", markup=False)
    for name, size in uploaded_files(folder):
        console.print(f"  {name}  {size:,} bytes", markup=False)


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise UsageError if a folder has content, unless it is an export that is to be replaced."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: give the path of a folder, output_dir=...")
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{folder} is in use: replace it with overwrite=true, or choose another name= or output_dir=.")
    if not (folder / RECORD).is_file():
        raise UsageError(f"{folder} is no export (it has no {RECORD}), so it is not replaced; choose another one.")


def described(loaded: Loaded) -> str:
    """Return the network in a few words."""
    backbone = loaded.backbone
    count = sum(parameter.numel() for parameter in backbone.model.parameters())
    classes = f", a classifier of {len(loaded.classes):,} classes" if loaded.classes else ""
    return (
        f"{backbone.model.pretrained_cfg['architecture']}, {count / 1e6:.3g} million parameters, images of "
        f"{written(backbone.image_size)} pixels and {backbone.channels} channels, {backbone.embed_dim} features{classes}"
    )


def to_timm(loaded: Loaded, folder: Path, settings: Export) -> Written:
    """Write the folder of timm, and compare timm's outputs and preprocessing with ours."""
    mean, std = statistics_of(loaded, settings.run or "")
    write_timm(loaded, folder, mean=mean, std=std, value_range=recorded_value_range(settings.run or ""))
    ours = our_outputs(loaded, ("features", "logits") if loaded.classes else ("features",))
    found = deviation(ours, read_timm(folder, Normalize(mean, std)), loaded.backbone, settings.batch_sizes)
    advice = ""
    if isinstance(loaded.backbone, Swin) and not loaded.backbone.windows_divide:
        advice = (
            "timm pads the maps of this Swin where its windows do not divide them, and attends to the padding; pretraining did "
            "not. format=onnx and format=program have our features. "
        )
    require_close(found, settings.tolerance, advice)
    pixels = preprocessing_deviation(timm_pixels(folder), loaded.backbone)
    facts = {"timm": version("timm"), "preprocessing": pixels}
    return Written(found, facts, [in_words(pixels, "timm's transform")])


def to_transformers(loaded: Loaded, folder: Path, settings: Export) -> Written:
    """Write a folder of transformers' own classes where they compute the same, else timm's, and compare."""
    mean, std = statistics_of(loaded, settings.run or "")
    ours = our_outputs(loaded, ("features", "logits") if loaded.classes else ("features",))
    own, kind, lines, found = counterpart(loaded), "TimmWrapperModel", list[str](), None
    if isinstance(own, Counterpart):
        kind = write_counterpart(loaded, own, folder)
        write_processor(loaded, folder)
        read = read_transformers(folder, loaded, Normalize(mean, std))
        found = deviation(ours, read, loaded.backbone, settings.batch_sizes)
        if not found.largest <= settings.tolerance:
            own, found = f"{kind} deviates by {found.largest:.1e}", None
    if found is None:
        (folder / "preprocessor_config.json").unlink(missing_ok=True)  # the wrapper has timm's
        lines.append(f"Loading it takes timm too, by transformers' TimmWrapper: {own}.")
        kind = "TimmWrapperForImageClassification" if loaded.classes else "TimmWrapperModel"
        write_timm(loaded, folder, mean=mean, std=std, value_range=recorded_value_range(settings.run or ""))
        read = read_transformers(folder, loaded, Normalize(mean, std))
        found = deviation(ours, read, loaded.backbone, settings.batch_sizes)
        require_close(found, settings.tolerance)
    pixels = preprocessing_deviation(transformers_pixels(folder, loaded), loaded.backbone)
    facts = {"transformers": version("transformers"), "class": kind, "preprocessing": pixels}
    return Written(found, facts, [f"transformers' class: {kind}.", *lines, in_words(pixels, "AutoImageProcessor")])


def to_program(loaded: Loaded, folder: Path, settings: Export) -> Written:
    """Write torch.export's program, and compare what it returns with our outputs."""
    interface, network = graph_of(loaded, settings)
    write_program(network, loaded, folder)
    found = compared(read_program(folder), loaded, interface, settings)
    return Written(found, preprocessing(loaded, interface), [told_of_input(interface)])


def to_onnx(loaded: Loaded, folder: Path, settings: Export) -> Written:
    """Write a model of ONNX, and compare what onnxruntime computes with our outputs."""
    interface, network = graph_of(loaded, settings)
    opset = settings.opset or OPSET
    write_onnx(network, loaded, folder, opset=opset)
    found = compared(read_onnx(folder, interface.outputs), loaded, interface, settings)
    packages = {name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}
    facts = {"opset": opset, **packages, **preprocessing(loaded, interface)}
    return Written(found, facts, [f"Operator set {opset}. {told_of_input(interface)}"])


def graph_of(loaded: Loaded, settings: Export) -> tuple[Interface, ExportedNetwork]:
    """Return input and outputs of a graph, and the network to trace."""
    interface = Interface(outputs_of(loaded, settings.outputs), settings.normalize, settings.pixels)
    return interface, ExportedNetwork(loaded, interface)


def compared(
    graph: Callable[[Tensor], Mapping[str, Tensor]], loaded: Loaded, interface: Interface, settings: Export
) -> Deviation:
    """Return the deviation of a graph from our outputs. Raises SSLVisionError if it is too large."""
    mean, std = statistics_of(loaded, settings.run or "")
    ours = our_outputs(loaded, interface.outputs)
    found = deviation(
        ours, lambda images: graph(interface.values(images, mean, std)), loaded.backbone, settings.batch_sizes
    )
    require_close(found, settings.tolerance)
    return found


def told_of_input(interface: Interface) -> str:
    """Return what the caller of a graph passes, in a sentence."""
    values = {
        ("inside", "uint8"): "uint8 pixels of 0 to 255; the normalization is inside",
        ("inside", "float"): "float32 pixels of 0 to 1; the normalization is inside",
    }.get((interface.normalize, interface.pixels), "float32, normalized by the caller: (pixels / 255 - mean) / std")
    return f"Input: images (batch, channels, height, width), {values}. Outputs: {', '.join(interface.outputs)}."


def in_words(pixels: Mapping[str, float], whose: str) -> str:
    """Return the deviation of a preprocessing in a sentence."""
    if not pixels:
        return (
            "Preprocessing was not compared: images of this number of channels are no files that other libraries read."
        )
    usual, long, shifted = (pixels.get(key, 0.0) for key in ("pixels", "long", "shifted"))
    if "pixels" not in pixels:  # of this image size, all crops begin at half a pixel
        usual, shifted = (shifted, 0.0) if shifted < SHIFT else (0.0, shifted)
    told = (
        f"differs from ours by at most {usual:.3g} of 255 gray levels"
        if usual > ROUNDING
        else "gives our pixels exactly"
    )
    end = (
        f" ({long:.3g} in very long images, of which we resize the center alone)" if long > max(usual, ROUNDING) else ""
    )
    if shifted >= max(usual + 1, SHIFT):
        often = "one size of images in four" if "pixels" in pixels else "every image of this image_size"
        end += (
            f", but where 4n + 3 pixels are cut off a side after resizing, its crop begins one pixel earlier: {often}"
        )
    return f"Preprocessing: {whose} {told}{end}."


WRITERS: dict[str, Callable[[Loaded, Path, Export], Written]] = {
    "timm": to_timm,
    "transformers": to_transformers,
    "onnx": to_onnx,
    "program": to_program,
}
