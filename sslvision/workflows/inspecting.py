"""Inspecting: what networks cost and what they see, in one table, by layer in CSV files, and in pictures.

All names, runs and image sizes are checked before anything is measured. A figure that has no meaning for a network, or cannot
be measured, is left out with the reason, and the others go on. What has been measured is on disk after each network.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.load import load_backbone
from sslvision.errors import SSLVisionError, UsageError
from sslvision.figures.fields import Panel, field_figure
from sslvision.figures.filters import filters_figure
from sslvision.inspection import peak_memory as peaks
from sslvision.inspection.cost import count_flops, count_parameters, count_saved_bytes
from sslvision.inspection.effective_field import EffectiveField, central, effective_field, open_branches
from sslvision.inspection.first_filters import filters_of, first_convolution, strongest
from sslvision.inspection.networks import named_networks, random_network
from sslvision.inspection.receptive_field import ReceptiveField, receptive_field
from sslvision.inspection.throughput import forward_rates, training_rates
from sslvision.runs import run_files
from sslvision.runs.config import config_file, read_settings
from sslvision.training.trainer import configure_torch, select_device
from sslvision.workflows.inspecting_settings import Inspect
from sslvision.workflows.inspection_tables import (
    layer_rows,
    plain_name,
    print_layers,
    print_networks,
    write_layers,
    write_networks,
)
from sslvision.workflows.labeled_data import untrained_backbone

FILTERS = 64  # drawn at most
CONTENTS = """\
# {name}

Made by `{command}`. The same command overwrites it.

| file | what it is |
| --- | --- |
| inspect.json | all figures, their definitions, every repetition of a timing, and the layers |
| inspect.csv, inspect.md | the table, a row for each network |
| layers-*.csv | a network by layer: parameters, FLOPs, saved activations, windows, theoretical receptive field |
| receptive_fields.png | the effective receptive field of the central output position of each network |
| filters-*.png | the filters of the first convolution or patch embedding, of a run before and after pretraining |
| config.yaml, environment.json | all settings; versions, git commit and hardware |
"""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A network to inspect.

    Attributes:
        name: Its name in tables, unique.
        weights: Where its weights are from, for the user.
        open: Returns it, in eval mode.
        run: What `run` named; None for random weights.
    """

    name: str
    weights: str
    open: Callable[[], Backbone]
    run: str | None = None


def inspect_networks(settings: Inspect, folder: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Measure networks, print a table, and write figures and pictures.

    Args:
        settings: All settings.
        folder: Where results go.
        words: The command line, for the record.

    Returns:
        The content of inspect.json.

    Raises:
        UsageError: There is no such network, run or device, or a network does not read images of this size.
    """
    console, device = Console(soft_wrap=False, highlight=False), select_device(settings.device)
    configure_torch(device.type)
    subjects = open_subjects(settings)
    folder.mkdir(parents=True, exist_ok=True)
    run_files.describe(folder, dataclasses.asdict(settings), words, command="inspect", contents=CONTENTS)
    results: dict[str, Any] = {"measured_on": where(device, settings), "definitions": definitions(device)}
    results |= {"field_images": settings.field_images, "networks": []}
    panels: list[Panel] = []
    for subject in subjects:
        started = time.perf_counter()
        record, field = measure(subject, settings, device, folder)
        results["networks"].append(record)
        panels += [field] if field else []
        write_networks(folder, results)
        write_layers(folder / f"layers-{plain_name(subject.name)}.csv", record["layers"])
        console.print(f"[dim]{subject.name}: {time.perf_counter() - started:.0f} s[/]")
    if panels:
        field_figure(panels).savefig(folder / "receptive_fields.png")
    if len(subjects) == 1:
        print_layers(console, results["networks"][0], settings.batch_size)
    print_networks(console, results)
    console.print(f"Tables, layers and pictures are in {folder}.", soft_wrap=True)
    return results


def open_subjects(settings: Inspect) -> list[Subject]:
    """Return the networks of the settings, the runs first. All have been found, and can be built.

    Raises:
        UsageError: See `inspect_networks`.
    """
    options, subjects = {**settings.backbone}, []
    names: list[str] = options.pop("name", None) or []
    for given in (names, settings.run):
        if again := [one for one in given if given.count(one) > 1]:
            raise UsageError(f"{again[0]} is given twice; give it once.")
    for run in settings.run:
        loaded = load_backbone(run, head=False, seed=settings.seed, **options)
        path = Path(run).expanduser()
        name = path.absolute().parent.name if path.name == "export" else path.name if path.exists() else run
        subjects.append(Subject(name, loaded.weights, partial(_itself, loaded.backbone.eval()), run))
    for name, _ in zip(names, named_networks(names, **options), strict=True):
        subjects.append(Subject(name, "random", partial(random_network, name, settings.seed, **options)))
    doubled = {one.name for one in subjects if [other.name for other in subjects].count(one.name) > 1}
    return [
        dataclasses.replace(one, name=one.run or f"{one.name} (random)") if one.name in doubled else one
        for one in subjects
    ]


def _itself(backbone: Backbone) -> Backbone:
    return backbone


class Attempts:
    """Measurements that may fail for a network without ending the others.

    Attributes:
        remarks: What was not measured, and why, in sentences for the user.
    """

    def __init__(self) -> None:
        self.remarks: list[str] = []

    def __call__(self, what: str, function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        """Return what a function returns; None if it fails, with a remark."""
        try:
            return function(*inputs, **options)
        except Exception as error:  # of any layer of any timm model
            told = (str(error).splitlines() or [""])[0][:200]
            kind = "" if isinstance(error, SSLVisionError | ValueError) and told else f"{type(error).__name__}: "
            self.remarks.append(f"{what}: not measured, {kind}{told}".removesuffix("."))
            return None


def measure(
    subject: Subject, settings: Inspect, device: torch.device, folder: Path
) -> tuple[dict[str, Any], Panel | None]:
    """Return the figures of a network, and the panel of its effective receptive field; draw its filters."""
    backbone, attempt, wanted = subject.open(), Attempts(), set(settings.measure)
    model, shape = backbone.model, (backbone.channels, *backbone.image_size)
    record: dict[str, Any] = {"name": subject.name, "weights": subject.weights, "image_size": [*backbone.image_size]}
    record |= {"channels": backbone.channels, "output_map": [*backbone.grid], "features": backbone.embed_dim}
    parameters, flops, saved, theory, panel = count_parameters(model), None, None, None, None
    record["parameters"] = parameters[""]
    if wanted & {"cost", "field"}:
        theory = attempt("theoretical receptive field", receptive_field, model, shape)
    if "cost" in wanted:
        flops = attempt("FLOPs", count_flops, model, shape)
        record["flops"] = flops and flops[""]
    backbone.to(device)
    if "field" in wanted:
        field = attempt("effective receptive field", look, subject, backbone, theory, settings, attempt.remarks)
        record["receptive_field"] = field_record(theory, field)
        if theory and theory.why and not theory.whole:
            attempt.remarks.append(f"theoretical receptive field: no formula, by {theory.why}")
        panel = panel_of(subject.name, theory, field) if field else None
    images = torch.randn(settings.batch_size, *shape, generator=torch.Generator().manual_seed(settings.seed)).to(device)
    if "speed" in wanted:
        record |= speed(model, images, settings.repeats, attempt)
    if "memory" in wanted:
        saved = attempt("saved activations", count_saved_bytes, copy.deepcopy(model), images)
        record["saved_bytes"] = saved and saved[""]
        record["peak_bytes"] = attempt("peak memory", peaks.peak_memory, copy.deepcopy(model), images)
    if "filters" in wanted:
        attempt("filters", draw_filters, subject, backbone, settings, folder, attempt.remarks)
    record["remarks"] = attempt.remarks
    record["layers"] = layer_rows(model, parameters, flops, saved, theory)
    return record, panel


def speed(model: Any, images: Tensor, repeats: int, attempt: Attempts) -> dict[str, Any]:
    """Return images per second forward, and forward and backward: medians, and every repetition."""
    found: dict[str, Any] = {}
    for key, rates_of in (("forward", forward_rates), ("training", training_rates)):
        rates = attempt(f"images per second, {key}", rates_of, copy.deepcopy(model), images, repeats=repeats)
        found[f"{key}_images_per_second"] = rates and statistics.median(rates)
        found[f"{key}_rates"] = rates
    return found


def look(
    subject: Subject, backbone: Backbone, theory: ReceptiveField | None, settings: Inspect, remarks: list[str]
) -> EffectiveField:
    """Return the effective receptive field of a network; of an untrained one with open residual branches, which is told."""
    looking = copy.deepcopy(backbone)
    if subject.run is None and (opened := open_branches(looking.model)):
        remarks.append(
            f"effective receptive field: {len(opened)} scales that begin at almost 0, such as {opened[0]}, were set to 1, or "
            "nothing would be seen of the branches behind them"
        )
    return effective_field(
        looking.encode,
        (backbone.channels, *backbone.image_size),
        backbone.grid,
        prefix=backbone.num_prefix,
        center=theory.center(central(backbone.grid), backbone.grid) if theory else None,
        images=settings.field_images,
        seed=settings.seed,
        device=next(backbone.parameters()).device,
    )


def field_record(theory: ReceptiveField | None, field: EffectiveField | None) -> dict[str, Any]:
    """Return receptive fields as they stand in inspect.json."""
    known = None if theory is None else "whole image" if theory.whole else theory.size and [*theory.size]
    effective = field and {"reach": [*field.reach], "side_50": field.half, "side_95": field.most}
    return {"theoretical": known, "why": theory.why if theory else "", "effective": effective}


def panel_of(name: str, theory: ReceptiveField | None, field: EffectiveField) -> Panel:
    """Return what the picture shows of a network's receptive field."""
    size, whole = (theory.size, theory.whole) if theory else (None, False)
    return Panel(name, field.map, field.center, field.half, field.most, size, whole)


def draw_filters(subject: Subject, backbone: Backbone, settings: Inspect, folder: Path, remarks: list[str]) -> None:
    """Draw the first filters, those with the largest norms; of a run, beside them what they were before."""
    name = first_convolution(backbone.model, backbone.channels)
    if name is None:
        raise ValueError("no convolution or patch embedding reads the image")
    filters = filters_of(backbone.model, name)
    chosen = strongest(filters, FILTERS)
    groups = [("random weights" if subject.run is None else "trained", filters[chosen])]
    if subject.run is not None:
        try:
            words, before = initial_backbone(subject.run, settings)
            earlier = filters_of(before.model, name)
        except (SSLVisionError, AttributeError) as error:
            remarks.append(f"filters before training: not drawn, {error}")
        else:
            if earlier.shape == filters.shape:
                groups.insert(0, (words, earlier[chosen]))
    of = (
        f"{len(chosen)} of {len(filters)}, those with the largest norms"
        if len(chosen) < len(filters)
        else f"all {len(filters)}"
    )
    size = "x".join(map(str, filters.shape[1:]))
    figure = filters_figure(groups, title=subject.name, about=f"{name}: filters of {size}, {of}")
    figure.savefig(folder / f"filters-{plain_name(subject.name)}.png")


def initial_backbone(run: str, settings: Inspect) -> tuple[str, Backbone]:
    """Return a run's backbone as it was when training began, and words for it.

    A run with init_from began with these weights, and a fine-tuned one with those of its `run`; others with random weights of
    their seed. Of weights without a run's files, it is the same network with random weights of `seed`.

    Raises:
        UsageError: The weights that training began with cannot be loaded.
    """
    options = {key: value for key, value in settings.backbone.items() if key != "name"}
    recorded: Mapping[str, Any] = {} if (file := config_file(run)) is None else read_settings(file)
    for key in ("init_from", "run"):
        if recorded.get(key):
            return f"before, {key}={Path(str(recorded[key])).name}", load_backbone(
                recorded[key], head=False, **options
            ).backbone
    if "seed" in recorded:
        built = {key: value for key, value in options.items() if key != "channels"}
        if (untrained := untrained_backbone(run, seed=int(recorded["seed"]), **built)) is not None:
            return f"before training, seed {recorded['seed']}", untrained
    random = load_backbone(run, head=False, pretrained=False, seed=settings.seed, **options).backbone
    return f"random weights, seed {settings.seed}", random


def where(device: torch.device, settings: Inspect) -> dict[str, Any]:
    """Return what figures depend on: the device, the number of threads, and the batch size."""
    known = run_files.environment("")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else known["processor"]
    precision = (
        "fp32, products and convolutions in TF32" if device.type == "cuda" else "fp32"
    )  # as `configure_torch` sets it
    about = {"device": device.type, "name": name, "threads": torch.get_num_threads(), "precision": precision}
    return about | {"batch_size": settings.batch_size, "repeats": settings.repeats, "torch": torch.__version__}


def definitions(device: torch.device) -> dict[str, str]:
    """Return what each figure means."""
    return {
        "network": "timm's model without its classifier",
        "flops": "forward pass of one image, by torch.utils.flop_counter: matrix products, convolutions and attention; a "
        "multiplication and an addition are 2",
        "saved_bytes": "bytes that a forward pass in training mode keeps for the backward pass, each storage once, without "
        "parameters and buffers, for the whole batch",
        "peak_bytes": "forward and backward pass of the batch in training mode, without an optimizer: "
        + (peaks.CUDA if device.type == "cuda" else peaks.ELSEWHERE),
        "theoretical": "pixels (height, width) that a position of the last map can depend on, by arithmetic",
        "effective": "gradient of the central position of the last map: reach is where it is not 0; side_50 and side_95 are "
        "sides of the square around it that holds 50 and 95 %, at most the image",
        "images_per_second": "median of repeated passes; training is forward and backward, without optimizer, loss and data",
    }
