"""What a checkpoint says of the method that it is of, and building that method again."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone, wrap
from sslvision.backbones.released import read_released
from sslvision.backbones.weight_sources import refuse_loading
from sslvision.errors import UsageError
from sslvision.nn.image_size import height_and_width, shortest

SETTINGS, METHOD = "hyper_parameters", "method"  # keys of a checkpoint


def describe_method(checkpoint: dict[str, Any], kind: type, backbone: Backbone) -> None:
    """Add to a checkpoint which method on which backbone it is of, as far as that is plain containers."""
    name = (backbone.model.pretrained_cfg or {}).get("architecture")
    built = {"name": name, "arguments": dict(backbone.arguments), "image_size": shortest(backbone.image_size)}
    built["crop_pct"] = backbone.crop_pct
    checkpoint[METHOD] = {"class": kind.__name__, "backbone": built if is_plain(built) else None}
    if SETTINGS in checkpoint:  # what is not plain could not be loaded again
        checkpoint[SETTINGS] = {key: value for key, value in checkpoint[SETTINGS].items() if is_plain(value)}


def is_plain(value: Any) -> bool:
    """Return whether a value consists of numbers, strings and plain containers."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)


def rebuild(kind: type, file: str | Path, *, strict: bool, **given: Any) -> Any:
    """Build a method as a checkpoint says, and load its weights. See `Method.load_from_checkpoint`."""
    content = read_released(file)
    if not isinstance(content.get("state_dict"), Mapping):
        raise UsageError(
            f"{file} is no checkpoint of a method. {kind.__name__}.from_official or init_from= may read it."
        )
    of = content.get(METHOD) or {}
    if of.get("class") and kind.__name__ not in (of["class"], "Method"):
        raise UsageError(f"{file} is a checkpoint of {of['class']}: use {of['class']}.load_from_checkpoint.")
    record = content.get("sslvision", {}).get("settings", {})
    recorded = {key: value for key, value in record.get("method", {}).items() if key != "_target_"}
    settings = {**recorded, **(content.get(SETTINGS) or {}), **given}
    for name in ("mean", "std"):  # the weights have them, too
        if name not in settings and f"normalize.{name}" in content["state_dict"]:
            settings[name] = content["state_dict"][f"normalize.{name}"].flatten().tolist()
    if "classes" in settings:  # labels are needed to train, not to classify
        settings.setdefault("labels", torch.arange(len(settings["classes"])))
    backbone = settings.pop("backbone", None) or _backbone(of.get("backbone"), record, file)
    try:
        method = kind(backbone, **settings)
    except TypeError as error:
        raise UsageError(
            f"{file} does not say how its method was built ({error}): give the missing settings, as in "
            f"{kind.__name__}.load_from_checkpoint(file, backbone=..., name=value)."
        ) from error
    assert isinstance(method, nn.Module)
    try:
        method.load_state_dict(dict(content["state_dict"]), strict=strict)
    except RuntimeError as error:
        raise UsageError(f"The weights of {file} do not fit: {' '.join(str(error).split())[:400]}") from error
    return method


def _backbone(built: Mapping[str, Any] | None, record: Mapping[str, Any], file: str | Path) -> Backbone:
    """Return the backbone with random weights."""
    if built:
        refuse_loading(built["arguments"], Path(file))
        return wrap(
            timm.create_model(built["name"], num_classes=0, **built["arguments"]), height_and_width(built["image_size"])
        )
    if "name" in record.get("backbone", {}):  # of earlier versions
        refuse_loading(record["backbone"], Path(file))
        return build_backbone(**record["backbone"], channels=int(record.get("data", {}).get("channels", 3)))
    raise UsageError(
        f"{file} does not say what its backbone is: give backbone=build_backbone(...), as it was in training."
    )
