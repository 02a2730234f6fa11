"""Backbones with weights from a run, an export, a released MAE or DINO checkpoint, or timm."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor, nn

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import check_dimensions, wrap
from sslvision.backbones.fitting import check_fit, grids_of, load_fitting, resampled
from sslvision.backbones.timm_options import check_options_of_timm
from sslvision.backbones.vit import ViT
from sslvision.backbones.weight_sources import WeightSource, create_model, find_source, patch_grids, size_options
from sslvision.errors import UsageError
from sslvision.nn.image_size import height_and_width, shortest


class Loaded(NamedTuple):
    """A backbone and what is known about its weights."""

    backbone: Backbone
    mean: list[float] | None  # pixel statistics of pretraining, per channel; None if unknown
    std: list[float] | None
    classes: tuple[str, ...] | None  # class names of its classifier, if it has one
    weights: str  # where they come from, for the user


def load_backbone(
    where: str | Path,
    *,
    image_size: int | Sequence[int] | None = None,
    channels: int | None = None,
    pool: Literal["token", "avg"] | None = None,
    pretrained: bool = True,
    head: bool = True,
    seed: int = 0,
    setting: str = "run",
    **timm_options: Any,
) -> Loaded:
    """Build the model that `where` refers to and load its weights strictly.

    Args:
        where: One of the following, tried in this order:
            - a run folder: its export/, or the newest whole checkpoint of a run that has not ended;
            - an export folder: config.json beside model.safetensors, as `export_backbone` or timm's `save_for_hf` writes;
            - a .pth or .safetensors file as the authors of MAE, DINO, DINOv2 or SwAV released them (see `released_network`);
            - a timm model name, with or without a tag; its weights are downloaded, or taken from the cache.
        image_size: Side of the square images in pixels, or [height, width]; by default that of the weights. For other sizes
            position embeddings and bias tables are resampled.
        channels: Number of image channels, which must be that of the weights; timm adapts its own weights to any number.
        pool: Feature of a plain ViT, "token" or "avg"; by default that of the weights. Other models have their own pooling.
        pretrained: False leaves the model randomly initialized.
        head: False ignores the head of an exported classifier.
        seed: Seed of random weights. The global random state is not changed.
        setting: Name that errors give to `where`: "run" or "init_from".
        timm_options: Arguments of the timm model that override those of the weights: drop_path_rate, num_heads, ...

    Raises:
        UsageError: `where` is none of these, the weights cannot be loaded, or they do not fit the arguments; or an option is
            one of timm's factory (checkpoint_path, ...), as the weights are those that `where` refers to.
    """
    check_options_of_timm(timm_options)
    check_dimensions(timm_options)
    given = None if image_size is None else height_and_width(image_size, "backbone.image_size")
    source = find_source(
        where, pretrained=pretrained, heads=timm_options.get("num_heads"), image_size=given, setting=setting
    )
    size, depth = given or source.image_size, channels or source.channels
    if depth != source.channels and not source.any_channels:
        raise UsageError(
            f"The weights of {where} read {source.channels} channel(s), and the images have {depth}: set "
            f"data.channels={source.channels}."
        )
    arguments = source.arguments | {"in_chans": depth}
    if size != source.image_size:
        arguments |= size_options(source.name, size)
    arguments |= timm_options
    classes = source.classes if head else ()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = wrap(create_model(source.name, num_classes=len(classes), **arguments), size)
        backbone.arguments, backbone.crop_pct = arguments, source.crop_pct
        if pretrained:
            own, state = backbone.model.state_dict(), source.read()
            if source.classes and not head:
                state = {name: value for name, value in state.items() if name in own}
            if (size, depth) != (source.image_size, source.channels):
                state = _adapt(state, backbone, source, len(classes), arguments)
            load_fitting(backbone.model, state, where)
    if pool is not None:
        _pool_by(backbone, pool)
    mean, std = (
        values if values and len(values) == backbone.channels else None for values in (source.mean, source.std)
    )
    weights = source.weights + (
        f", made for {source.image_size[0]}x{source.image_size[1]} pixels" if size != source.image_size else ""
    )
    return Loaded(backbone, mean, std, classes or None, weights if pretrained else "random")


def backbone_of_weights(where: str | Path, *, setting: str = "run") -> dict[str, Any]:
    """Return the arguments of build_backbone for the model that weights belong to: name, image_size, and others.

    Args:
        where, setting: As in `load_backbone`.

    Raises:
        UsageError: `where` is nothing that a backbone can be loaded from.
    """
    source = find_source(where, pretrained=True, heads=None, image_size=None, setting=setting)
    own = {"in_chans", "num_classes", "fc_norm", "global_pool", *size_options(source.name, source.image_size)}
    options = {key: value for key, value in source.arguments.items() if key not in own}
    pool = source.arguments.get("global_pool")
    return {
        "name": source.name,
        "image_size": shortest(source.image_size),
        **({"pool": pool} if pool in ("token", "avg") else {}),
    } | options


def _adapt(
    state: dict[str, Tensor], backbone: Backbone, source: WeightSource, num_classes: int, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Return weights adapted by timm to another image size or number of channels.

    Position embeddings and bias tables are resampled before, if a size is not square: timm takes some of them for square ones.
    """
    own, size, known = backbone.model.state_dict(), source.image_size, source.arguments
    check_fit(own, state, source.weights, shapes=False)
    if any(height != width for height, width in (source.image_size, backbone.image_size)):
        state, _ = resampled(own, state, grids_of(backbone.model), patch_grids(source.name, source.arguments))
        size, known = backbone.image_size, arguments
    overlay = {
        "state_dict": state,
        "input_size": (source.channels, *size),
        "num_classes": num_classes,
        "label_offset": 0,
        "custom_load": False,
    }
    args = {"img_size": shortest(size)} | known
    options = {"pretrained_cfg_overlay": overlay, "pretrained_model_args": args, "num_classes": num_classes}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about timm's interpolation
            return dict(timm.create_model(source.name, pretrained=True, **options, **arguments).state_dict())
    except RuntimeError as error:  # of load_state_dict
        raise UsageError(
            f"timm cannot adapt the weights to these settings ({source.weights}, of {source.image_size[0]}x"
            f"{source.image_size[1]} pixels): {' '.join(str(error).split())[:300]} Do not change image_size and channels."
        ) from error


def _pool_by(backbone: Backbone, pool: str) -> None:
    """Set the pooling of a ViT. A norm before or after pooling keeps its position."""
    if pool not in ("token", "avg"):
        raise UsageError(f"pool={pool} is unknown: it is token (class token) or avg (mean of patch tokens).")
    model = backbone.model
    if not isinstance(backbone, ViT) or model.global_pool == pool:
        return
    if model.num_classes:
        raise UsageError(
            f"pool={pool}: the classifier of this model was trained with pool={model.global_pool}: leave it."
        )
    if pool == "token" and not model.has_class_token:
        raise UsageError("pool=token: this ViT has no class token: use pool=avg.")
    model.reset_classifier(0, global_pool=pool)
    norm = {"fc_norm": not isinstance(model.fc_norm, nn.Identity)}
    backbone.arguments = {**backbone.arguments, "global_pool": pool, **norm}
