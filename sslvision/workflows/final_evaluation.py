"""What a pretraining run leaves: exports, figures, and what its features are worth.

All processes encode the images, each its share. The first does the rest, after the others have ended.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.data.datamodule import ImageData
from sslvision.data.source import Splits
from sslvision.errors import UsageError
from sslvision.evaluation.evaluate import (
    Encoded,
    encode,
    evaluate_pixels,
    has_labels,
    intervals_of,
    scores_of,
    why_not_evaluated,
)
from sslvision.evaluation.features import Extraction
from sslvision.evaluation.placement import place_for
from sslvision.evaluation.rankme import rankme
from sslvision.figures.curves import health_figure, learning_curve_figure
from sslvision.methods.base import Method
from sslvision.runs.metrics import read_metrics
from sslvision.runs.weights import export_backbone, load_weights, record_value_range
from sslvision.settings import Pretrain
from sslvision.system.checkpoint_folders import OPTIMIZERS, read_folder
from sslvision.system.torch_files import load_plain
from sslvision.training.callbacks.continued import Continued
from sslvision.training.callbacks.online_evaluation import ON_THE_WAY
from sslvision.training.callbacks.pictures import draw_neighbors, draw_pictures
from sslvision.training.trainer import compute_dtype
from sslvision.workflows.console import print_findings, print_scores
from sslvision.workflows.map_of_images import write_map
from sslvision.workflows.method import method_from_settings
from sslvision.workflows.reporting import without_cost

RANKME_IMAGES = 10_000  # training images, as during training


def export_and_evaluate(
    settings: Pretrain, folder: Path, data: ImageData, evaluated: Splits, trainer: L.Trainer, console: Console
) -> dict[str, Any]:
    """Export the backbone of the last checkpoint and the best one on the way, draw figures, and evaluate the features.

    Args:
        settings: All settings.
        folder: The run folder.
        data: The images of training.
        evaluated: The images of the evaluation: those, or labeled ones beside them.
        trainer: The trainer, after training.
        console: Where to print.

    Returns:
        Loss, scores and findings.
    """
    device = trainer.strategy.root_device
    last = folder / "checkpoints" / "last.ckpt"
    checkpoint = read_folder(last, without=[OPTIMIZERS]) if last.is_dir() else load_plain(last)
    method = method_from_settings(settings)
    method.load_state_dict(checkpoint["state_dict"])
    method.to(device)
    compared, findings = compared_backbones(settings, method, trainer)
    for prefix, (_, backbone) in compared.items():
        backbone.crop_pct = data.crop_pct
        if prefix in ("", "best_"):
            export(settings, method, backbone, folder / ("export-best" if prefix else "export"))
    encoded = encode_together(
        settings, method, {prefix: one for prefix, (_, one) in compared.items()}, data, evaluated, trainer
    )
    at_most = images_at_most(settings)
    how = Extraction(workers=data.workers, precision=compute_dtype(trainer))
    draw_images(method, data, evaluated, folder / "figures", trainer, console, at_most=at_most, how=how)
    if has_labels(evaluated):
        rows = {
            prefix: scores_of(features, evaluated, at_most=at_most, device=device)
            for prefix, features in encoded.items()
        }
        rows["pixels_"] = evaluate_pixels(
            evaluated,
            method.pretrained().image_size,
            crop_pct=method.pretrained().crop_pct,
            device=device,
            at_most=at_most,
            workers=data.workers,
        )
        if unreadable := max([row.pop("unreadable_share") for row in rows.values()]):
            findings.append(
                f"{100 * unreadable:.3g} % of the held-out images cannot be read: scores are those of the others."
            )
    else:
        rows = {prefix: {"rankme": rank_on(device, features)} for prefix, ((_, features),) in encoded.items()}
        console.print(
            f"{why_not_evaluated(evaluated)}, so that accuracy is not measured. RankMe, the effective rank of the features, "
            "and figures/neighbors.png tell what was learned: more than the untrained network, and neighbors that you find "
            "alike. probe_data=FOLDER measures accuracy on labeled images beside these."
        )
    print_findings(console, findings)
    names = {prefix: name for prefix, (name, _) in compared.items()} | {"pixels_": "raw pixels"}
    title = f"Frozen features on {evaluated.train.name}" + (" (95 % interval)" if has_labels(evaluated) else "")
    print_scores(console, {names[prefix]: row for prefix, row in rows.items()}, title=title)
    intervals = {
        f"{prefix}{name}": [round(end, 2) for end in interval]
        for prefix, row in rows.items()
        for name, interval in intervals_of(row).items()
    }
    images = max([row.pop("held_out", 0) for row in rows.values()])
    scores = {f"{prefix}{name}": round(value, 2) for prefix, row in rows.items() for name, value in row.items()}
    more = min(at_most, len(evaluated.train)) > ON_THE_WAY  # more neighbors: no point of the curve of k-NN accuracy
    logged = {f"final_{name}" if more and name == "knn_top1" else name: value for name, value in scores.items()}
    for logger in trainer.loggers:
        logger.log_metrics(logged, step=trainer.global_step)
    loss = draw_curves(settings, folder, untrained_knn=scores.get("untrained_knn_top1"))
    tested = {"held_out_images": images, "intervals": intervals} if images else {}
    return {"loss": loss, **scores, **tested, "findings": findings}


def encode_share(settings: Pretrain, data: ImageData, evaluated: Splits, trainer: L.Trainer) -> None:
    """Take part in `export_and_evaluate` of the first process."""
    method, device = method_from_settings(settings), trainer.strategy.root_device
    for module in (method.normalize, method.pretrained()):
        module.to(device)
    encode_together(settings, method, {}, data, evaluated, trainer)


def encode_together(
    settings: Pretrain,
    method: Method,
    backbones: dict[str, Backbone],
    data: ImageData,
    evaluated: Splits,
    trainer: L.Trainer,
) -> dict[str, list[Encoded]]:
    """Return the features of training images and, with labels, of test images, by the name of the backbone.

    All processes call this; the result is the first one's. The weights are, too: others may have no files to load them from.

    Args:
        settings: All settings.
        method: The method, its normalization and backbone on the device of this process.
        backbones: The backbones of the first process, on its device; none in the others.
        data: The images of training.
        evaluated: The images to encode.
        trainer: The trainer, after training.
    """
    together = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    precision = compute_dtype(trainer)
    how = Extraction(workers=data.workers, precision=precision, rank=rank, world_size=world_size)
    labeled, at_most = has_labels(evaluated), images_at_most(settings)
    sources = [evaluated.train, *([evaluated.test] if labeled and evaluated.test is not None else [])]
    names, encoded = [list(backbones)], dict[str, list[Encoded]]()
    if together:
        dist.broadcast_object_list(names, device=trainer.strategy.root_device)
        send_weights(method.normalize)
    for name in names[0]:
        backbone = backbones.get(name, method.pretrained())
        backbone.crop_pct = data.crop_pct
        if together:
            send_weights(backbone)
        most = at_most if labeled else min(at_most, RANKME_IMAGES)
        features = encode(backbone, method.normalize, sources, at_most=most, how=how)
        if rank == 0:
            encoded[name] = features
    return encoded


def send_weights(module: torch.nn.Module) -> None:
    """Give all processes the parameters and buffers of the first."""
    for tensor in module.state_dict().values():
        sent = tensor.contiguous()
        dist.broadcast(sent, src=0)
        tensor.copy_(sent)


def images_at_most(settings: Pretrain) -> int:
    """Return the maximal number of images to evaluate."""
    return min(256, settings.evaluate_images) if settings.dry_run else settings.evaluate_images


def draw_images(
    method: Method,
    data: ImageData,
    evaluated: Splits,
    folder: Path,
    trainer: L.Trainer,
    console: Console,
    *,
    at_most: int,
    how: Extraction,
) -> None:
    """Draw the method's pictures of held-out images, nearest neighbors, and the map of images."""
    pictured = data.splits.test if data.splits.test is not None else evaluated.test
    if pictured is not None:
        draw_pictures(method, pictured, folder, trainer.loggers, trainer.global_step)
    draw_neighbors(method, evaluated, folder, trainer.loggers, trainer.global_step, at_most=at_most, how=how)
    mapped = evaluated.test if evaluated.test is not None else evaluated.train

    def draw_map() -> None:
        write_map(method.pretrained(), method.normalize, mapped, folder, at_most=at_most, how=how)

    without_cost(draw_map, "The map of images", console)


def compared_backbones(
    settings: Pretrain, method: Method, trainer: L.Trainer
) -> tuple[dict[str, tuple[str, Backbone]], list[str]]:
    """Return the backbones to evaluate, each with its name, by the prefix of their scores; and findings."""
    compared, findings = {"": ("pretrained", method.pretrained())}, list[str]()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Continued) and callback.weights and not callback.improved_until_the_end:
            best = method_from_settings(settings).pretrained()
            best.load_state_dict(callback.weights)
            name = f"best on the way, after epoch {callback.best_epoch:g}" if callback.best else "best: the start"
            compared["best_"] = (name, best.to(method.device))
    if settings.init_from is not None:
        started = method_from_settings(settings)
        try:
            load_weights(started, settings.init_from)
            compared["start_"] = ("the start, init_from", started.pretrained().to(method.device))
        except UsageError as error:
            findings.append(f"The weights of the start are not compared with: {error}")
    untrained = method_from_settings(settings).pretrained()
    return compared | {"untrained_": ("the same, untrained", untrained.to(method.device))}, findings


def export(settings: Pretrain, method: Method, backbone: Backbone, folder: Path) -> None:
    """Write a backbone with the method's pixel statistics and the value range of the images."""
    mean, std = method.normalize.mean.tolist(), method.normalize.std.tolist()
    export_backbone(backbone, folder, mean=mean, std=std)
    record_value_range(folder, settings.data.get("value_range"))


def rank_of(backbone: Backbone, method: Method, splits: Splits, *, at_most: int, how: Extraction) -> float:
    """Return RankMe of the features of training images."""
    ((_, features),) = encode(backbone, method.normalize, [splits.train], at_most=at_most, how=how)
    return rank_on(method.device, features)


def rank_on(device: torch.device, features: Tensor) -> float:
    """Return RankMe of features (N, D), computed on `device` if it has enough memory."""
    return rankme(features.to(place_for(device, 4 * features.nbytes)))


def draw_curves(settings: Pretrain, folder: Path, *, untrained_knn: float | None) -> float | None:
    """Draw learning curve and health from metrics.csv. Return the last loss."""
    metrics, title = read_metrics(folder / "metrics.csv"), settings.about or folder.name
    figure = learning_curve_figure(metrics, title=title, untrained_knn=untrained_knn)
    figure.savefig(folder / "figures" / "learning_curve.png")
    if (health := health_figure(metrics, title=f"Health: {title}")) is not None:
        health.savefig(folder / "figures" / "health.png")
    losses = [loss for loss in metrics.get("loss", []) if loss is not None]
    return losses[-1] if losses else None
