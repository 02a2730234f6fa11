"""Predicting: classify a folder of images into a CSV file, with a row for each image, unreadable ones included."""

import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.load import load_backbone
from sslvision.data.datamodule import available_workers
from sslvision.data.decode import MAX_PIXELS
from sslvision.data.eight_bits import value_range_from
from sslvision.data.encoded import EncodedSource, PathTable
from sslvision.data.loader import EvaluationImages
from sslvision.data.sources.archive_folder import is_archive, open_archive
from sslvision.data.sources.folder import FileSource
from sslvision.data.sources.list_file import open_list
from sslvision.data.sources.scanning import scan
from sslvision.data.sources.tables import KINDS
from sslvision.data.value_range import look_at
from sslvision.errors import DataError, UsageError
from sslvision.nn.normalize import Normalize
from sslvision.runs.weights import recorded_value_range
from sslvision.settings import Predict
from sslvision.training.trainer import configure_torch, select_device
from sslvision.workflows.console import print_findings
from sslvision.workflows.prediction_files import (
    Prediction,
    accuracy_file,
    check_output,
    with_true_classes,
    write_accuracy,
    write_csv,
)


def predict_to_csv(settings: Predict) -> Path:
    """Classify the images that the settings name, and return the path of the CSV file.

    Raises:
        UsageError: The run has no head, or `output` is not a file.
        DataError: There are no images; or, when the CSV file is written, none of them could be read.
        StorageError: The CSV file cannot be written. The others are raised before any image is read.
    """
    started, console = time.perf_counter(), Console(soft_wrap=True, highlight=False)
    device = select_device(settings.device)
    configure_torch(device.type)
    run = settings.run or ""
    loaded = load_backbone(run)
    if not loaded.classes or loaded.mean is None or loaded.std is None:
        raise UsageError(
            f"run={run} has no head and no class names, so it cannot classify images: fine-tune it first, "
            f"python -m sslvision.finetune run={run} data=..."
        )
    remarks: list[str] = []
    source = open_images(
        settings.images or "", channels=loaded.backbone.channels, max_pixels=settings.max_pixels, remarks=remarks
    )
    remarks += look_at_values(source, settings)
    output = _output(settings)
    check_output(output)
    if settings.output is None and output.name != "predictions.csv":
        remarks.append("predictions.csv of an earlier call is kept; overwrite=true would replace it.")
    print_findings(console, remarks)
    rows = predict(
        loaded.backbone.to(device),
        Normalize(loaded.mean, loaded.std).to(device),
        loaded.classes,
        source,
        batch_size=settings.batch_size,
        workers=available_workers() if settings.workers is None else settings.workers,
        top=settings.top,
    )
    known: list[tuple[str, tuple[str, ...]]] = []
    reasons: list[str] = []
    rows = _noting_the_first_problem(with_true_classes(rows, loaded.classes, known), reasons)
    images, problems = write_csv(rows, output, top=min(settings.top, len(loaded.classes)))
    if images == problems:
        raise DataError(
            f"None of {images:,} images can be read; the first: {reasons[0]}. The reasons are in the column `problem` of "
            f"{output.absolute()}."
        )
    first = f", the first: {reasons[0]}" if reasons else ""
    console.print(
        f"{images:,} images in {time.perf_counter() - started:.1f} s, {problems:,} of them unreadable (see the column "
        f"`problem`{first}): {output.absolute()}"
    )
    accuracy_file(output).unlink(missing_ok=True)  # of the call whose file this one has replaced
    if known:
        console.print(write_accuracy(known, loaded.classes, output, unknown=images - problems - len(known)))
    return output


def look_at_values(source: EncodedSource, settings: Predict) -> list[str]:
    """Choose the value range of the images, that of the run unless it is given, and return what there is to say of it."""
    recorded, given = (
        recorded_value_range(settings.run or ""),
        value_range_from(settings.value_range, name="value_range"),
    )
    source.value_range, remarks = look_at(source, given or value_range_from(recorded), of_run=True)
    if given is None and recorded is None and source.value_range is not None:
        return [
            *remarks,
            f"run={settings.run} was trained on images of 8 bits, and these have more. The range above is decided from them: "
            "if another one makes them look like those, set value_range=[low,high].",
        ]
    return [*remarks]


def _noting_the_first_problem(rows: Iterable[Prediction], reasons: list[str]) -> Iterator[Prediction]:
    """Yield predictions unchanged; append the first image that cannot be read, with the reason, to `reasons`."""
    for row in rows:
        if row.problem and not reasons:
            reasons.append(f"{row.image} ({row.problem})")
        yield row


def open_images(
    path: str | Path, *, channels: int, max_pixels: int = MAX_PIXELS, remarks: list[str] | None = None
) -> EncodedSource:
    """Return all images under a folder, at any depth, sorted by relative path; or the one image that `path` names.

    A zip or tar file is read as the folder that it holds, and a list of images (.csv, .jsonl, ...) in its own order.

    Folders named train/ and val/ are like all others. Links are followed. Hidden files and folders are skipped. What was left
    out is added to `remarks`, in sentences.

    Raises:
        UsageError: `path` is empty.
        DataError: There is nothing of that name, or there are no images.
    """
    if not str(path):
        raise UsageError("images is empty: say images=photos, a folder of images or one image.")
    root = os.path.abspath(os.path.expanduser(path))
    if is_archive(root):
        archive = open_archive(root)
        found = archive.scan()
        if remarks is not None:
            remarks += found.remarks()
        return archive.source(root, sorted(found.images), str(path), (channels, None, None, None, max_pixels))
    if os.path.isfile(root) and os.path.splitext(root.removesuffix(".gz"))[1].lower() in KINDS:
        options: dict[str, Any] = {"channels": channels, "max_pixels": max_pixels, "holdout": 0}
        splits = open_list(root, label="none", split="none", **options)
        if remarks is not None:
            remarks += splits.remarks
        return cast(FileSource, splits.train)
    if os.path.isfile(root):
        root, images = os.path.dirname(root), [os.path.basename(root)]
    else:
        found = scan(root, setting="images")
        images = sorted(found.images)
        if remarks is not None:
            remarks += found.remarks()
    paths = PathTable.of(images)
    return FileSource(str(path), channels, None, None, max_pixels=max_pixels, root=root, paths=paths)


def predict(
    backbone: Backbone,
    normalize: Normalize,
    classes: Sequence[str],
    source: EncodedSource,
    *,
    batch_size: int = 256,
    workers: int = 0,
    top: int = 5,
    precision: torch.dtype = torch.float32,
) -> Iterator[Prediction]:
    """Classify all images of a source, each by its central part, as in evaluation.

    Args:
        backbone: A classifier; it runs in eval mode, and gets its training mode back afterwards.
        normalize: Normalization of training.
        classes: Names of the classifier's outputs.
        source: Images, from `open_images`.
        batch_size: Images per forward pass.
        workers: Number of loader processes.
        top: Maximal number of classes per image.
        precision: dtype of matrix products; bfloat16 where training used it too.

    Returns:
        An iterator over a Prediction for each image, in the source's order, computed batch by batch.

    Raises:
        UsageError: The backbone has no classifier of these classes.
    """
    outputs = backbone.model.num_classes
    if not outputs or outputs != len(classes):
        raise UsageError(
            f"This network has {outputs} classes, not {len(classes)}: only a fine-tuned one can predict "
            "(python -m sslvision.finetune)."
        )
    if top < 1:
        raise UsageError(f"top={top} must be at least 1.")
    return _rows(backbone, normalize, classes, source, batch_size, workers, min(top, outputs), precision)


def _rows(
    backbone: Backbone,
    normalize: Normalize,
    classes: Sequence[str],
    source: EncodedSource,
    batch_size: int,
    workers: int,
    top: int,
    precision: torch.dtype,
) -> Iterator[Prediction]:
    loader = DataLoader(
        EvaluationImages(source, backbone.image_size, list(range(len(source))), backbone.crop_pct),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_readable_and_not,
        generator=torch.Generator(),  # instead of the global one
    )
    root = os.path.join(getattr(source, "root", ""), "")
    was_training = backbone.training
    backbone.eval()
    try:
        for indices, images, problems in loader:
            rows = {place: Prediction(_relative(source, place, root), (), (), why) for place, why in problems}
            if indices:
                best = _probabilities(backbone, normalize, images, precision).topk(top)
                for place, values, labels in zip(indices, best.values.tolist(), best.indices.tolist(), strict=True):
                    names = tuple(classes[label] for label in labels)
                    rows[place] = Prediction(_relative(source, place, root), names, tuple(values), "")
            for place in sorted(rows):
                yield rows[place]
    finally:
        backbone.train(was_training)


@torch.no_grad()
def _probabilities(backbone: Backbone, normalize: Normalize, images: Tensor, precision: torch.dtype) -> Tensor:
    """Return the class probabilities (B, K), in main memory, of uint8 images (B, C, H, W)."""
    device = next(backbone.parameters()).device
    with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
        features = backbone(normalize(images.to(device, non_blocking=True)))  # (B, D)
        logits = backbone.model.get_classifier()(features)  # (B, K)
    return logits.float().softmax(dim=1).cpu()


def _readable_and_not(
    items: list[tuple[int, Tensor | None, str]],
) -> tuple[list[int], Tensor, list[tuple[int, str]]]:
    images = [image for _, image, _ in items if image is not None]
    return (
        [place for place, image, _ in items if image is not None],
        torch.stack(images) if images else torch.empty(0, dtype=torch.uint8),
        [(place, _of_prediction(why)) for place, image, why in items if image is None],
    )


def _of_prediction(reason: str) -> str:
    """Return why an image cannot be read in the settings of predict, whose channels the run determines."""
    return re.sub(r": data\.channels=.* reads (it|them)", "", reason).replace("data.", "")


def _relative(source: EncodedSource, place: int, root: str) -> str:
    return source.describe(place).removeprefix(root).replace(os.sep, "/")


def _output(settings: Predict) -> Path:
    """Return where to write: without overwrite=true, a file that does not exist.

    Raises:
        UsageError: The file that `output` names exists.
    """
    if settings.output is not None:
        output = Path(settings.output).expanduser()
        if output.is_file() and not settings.overwrite:
            raise UsageError(f"output={output} exists: replace it with overwrite=true, or give another path.")
        return output
    run = Path(settings.run or "")
    output = first = (run.parent if run.name == "export" else run) / "predictions.csv"
    number = 1
    while output.exists() and not settings.overwrite:
        output = first.with_name(f"predictions-{(number := number + 1)}.csv")
    return output
