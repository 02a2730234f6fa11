"""Backbones with weights from a run, an export, a released MAE or DINO checkpoint, or timm."""

import difflib
import json
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor, nn

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone, check_dimensions, wrap
from sslvision.backbones.dense import options_for
from sslvision.backbones.fitting import check_fit, load_fitting
from sslvision.backbones.released import INSTEAD_OF_TRANSFORMERS, part_of, read_released, released_network
from sslvision.backbones.vit import ViT
from sslvision.errors import UsageError
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from sslvision.settings import check_backbone
from sslvision.system.resuming import command_to_resume

OF_METHODS = (
    "teacher.backbone.model.",
    "ema.module.model.",
    "backbone.model.",
)  # in checkpoints of methods, best first
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # timm's names for them in an export folder


class Loaded(NamedTuple):
    """A backbone and what is known about its weights."""

    backbone: Backbone
    mean: list[float] | None  # pixel statistics of pretraining, per channel; None if unknown
    std: list[float] | None
    classes: tuple[str, ...] | None  # class names of its classifier, if it has one
    weights: str  # where they come from, for the user


class _Source(NamedTuple):
    """Weights that are not yet read, and the model they belong to."""

    name: str  # timm's model name
    arguments: dict[str, Any]  # of timm.create_model
    image_size: int
    channels: int
    mean: list[float] | None
    std: list[float] | None
    weights: str  # where they come from, for the user
    read: Callable[[], dict[str, Tensor]]
    classes: tuple[str, ...] = ()
    any_channels: bool = False
    crop_pct: float | None = None


def load_backbone(
    where: str | Path,
    *,
    image_size: int | None = None,
    channels: int | None = None,
    pool: Literal["token", "avg"] | None = None,
    pretrained: bool = True,
    head: bool = True,
    seed: int = 0,
    **timm_options: Any,
) -> Loaded:
    """Build the model that `where` refers to and load its weights strictly.

    Args:
        where: One of the following, tried in this order:
            - a run folder: its export/, or the newest whole checkpoint of a run that has not ended;
            - an export folder: config.json beside model.safetensors, as `export_backbone` or timm's `save_for_hf` writes;
            - a .pth or .safetensors file as the authors of MAE, DINO, DINOv2 or SwAV released them (see `released_network`);
            - a timm model name, with or without a tag; its weights are downloaded, or taken from the cache.
        image_size: Side of the square images in pixels; by default that of the weights. For other sizes timm resamples position
            embeddings and bias tables.
        channels: Number of image channels, which must be that of the weights; timm adapts its own weights to any number.
        pool: Feature of a plain ViT, "token" or "avg"; by default that of the weights. Other models have their own pooling.
        pretrained: False leaves the model randomly initialized.
        head: False ignores the head of an exported classifier.
        seed: Seed of random weights. The global random state is not changed.
        timm_options: Arguments of the timm model that override those of the weights: drop_path_rate, num_heads, ...

    Raises:
        UsageError: `where` is none of these, the weights cannot be loaded, or they do not fit the arguments; or an option is
            one of timm's factory (checkpoint_path, ...), as the weights are those that `where` refers to.
    """
    check_backbone(timm_options if image_size is None else {"image_size": image_size, **timm_options})
    check_dimensions(timm_options)
    source = _find(where, pretrained=pretrained, heads=timm_options.get("num_heads"))
    size, depth = image_size or source.image_size, channels or source.channels
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
        backbone = wrap(_create(source.name, num_classes=len(classes), **arguments), size)
        backbone.arguments, backbone.crop_pct = arguments, source.crop_pct
        if pretrained:
            own, state = backbone.model.state_dict(), source.read()
            if source.classes and not head:
                state = {name: value for name, value in state.items() if name in own}
            if (size, depth) != (source.image_size, source.channels):
                state = _adapt(state, own, source, len(classes), arguments)
            load_fitting(backbone.model, state, where)
    if pool is not None:
        _pool_by(backbone, pool)
    mean, std = (
        values if values and len(values) == backbone.channels else None for values in (source.mean, source.std)
    )
    weights = source.weights + (
        f", made for {source.image_size}x{source.image_size} pixels" if size != source.image_size else ""
    )
    return Loaded(backbone, mean, std, classes or None, weights if pretrained else "random")


def backbone_of_weights(where: str | Path) -> dict[str, Any]:
    """Return the arguments of build_backbone for the model that weights belong to: name, image_size, and others.

    Args:
        where: As in `load_backbone`.

    Raises:
        UsageError: `where` is nothing that a backbone can be loaded from.
    """
    source = _find(where, pretrained=True, heads=None)
    own = {"in_chans", "num_classes", "fc_norm", "global_pool", *size_options(source.name, source.image_size)}
    options = {key: value for key, value in source.arguments.items() if key not in own}
    pool = source.arguments.get("global_pool")
    return {
        "name": source.name,
        "image_size": source.image_size,
        **({"pool": pool} if pool in ("token", "avg") else {}),
    } | options


def refuse_loading(arguments: Mapping[str, Any], file: Path) -> None:
    """Raise UsageError if timm arguments from a file would make timm load other files or URLs."""
    keys = [key for key in arguments if str(key).startswith("pretrained") or key in ("checkpoint_path", "cache_dir")]
    if keys:
        raise UsageError(f"{file} would make timm load other files ({', '.join(keys)}), which is refused.")


def size_options(name: str, image_size: int) -> dict[str, Any]:
    """Return timm's options to build a model for an image size, as `build_backbone` does."""
    module = timm.model_entrypoint(name).__module__.removeprefix("timm.models.")
    if module in ("vision_transformer", "swin_transformer") or (module == "deit" and "distilled" not in name):
        return {"img_size": image_size}
    return options_for(name, image_size)


def _find(where: str | Path, *, pretrained: bool, heads: int | None) -> _Source:
    """Return the weights that `where` refers to."""
    path, name = Path(where).expanduser(), str(where)
    for folder in (path / "export", path):
        if (folder / "config.json").is_file():
            return _exported(folder, where)
    if path.is_file():
        if path.name in WEIGHTS and (path.parent / "config.json").is_file():
            return _exported(path.parent, path.parent)
        return _released(path, heads)
    if timm.is_model(name):
        return _named(name, pretrained)
    if (path / "config.yaml").is_file():
        return _unfinished(path, where)
    if (told := elsewhere(path, "run")) is not None:
        raise UsageError(told)
    near = timm.list_models(f"{name}_*")[:3] or difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    raise UsageError(
        f"run={where} is nothing to load a backbone from: no run folder (with export/), no export folder (with "
        "config.json and model.safetensors), no .pth or .safetensors file, and no timm model has that name."
        + (f" Near it in timm: {', '.join(near)}." if near else "")
    )


def elsewhere(path: Path, setting: str) -> str | None:
    """Return what to do about a path that does not exist, if it is a URL, a name of weights on a hub, or of a file; or None.

    Args:
        path: The path.
        setting: Setting that it was given for.
    """
    name = str(path)
    if re.match(r"https?:/", name):
        return f"{setting}={name} is a URL: download the file, and give its path, {setting}={path.name}."
    if timm.is_model(short := name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")):
        return f"{setting}={name} is the name of weights on a hub: timm's name of them is {setting}={short}."
    if path.suffix in (".pth", ".pt", ".ckpt", ".bin", ".safetensors"):
        return f"{setting}={name}: there is no such file in {path.absolute().parent}."
    return None


def _exported(folder: Path, where: str | Path) -> _Source:
    """Return the weights in an export folder."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if "model_type" in config and "architecture" not in config:
            raise UsageError(f"{folder} holds a model of transformers. {INSTEAD_OF_TRANSFORMERS}")
        name, known = str(config["architecture"]), config["pretrained_cfg"]
        channels, size, _ = known["input_size"]
        arguments = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        names, count = config.get("label_names") or {}, config.get("num_classes") or 0
        if isinstance(names, list):
            names = dict(enumerate(names))
        classes = tuple(str(names.get(index, names.get(str(index), index))) for index in range(count))
        crop_pct = _crop_pct(known)
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / 'config.json'} is not in timm's format ({type(error).__name__}: {error}): give a folder "
            "exported by a run or by timm's save_for_hf."
        ) from error
    refuse_loading(arguments, folder / "config.json")
    if not timm.is_model(name):
        raise UsageError(
            f"{folder} is the export of a {name}, which this version of timm ({timm.__version__}) does not know."
        )
    files = [folder / file for file in WEIGHTS if (folder / file).is_file()]
    if not files:
        raise UsageError(f"{folder} has a config.json, but no weights: model.safetensors is missing.")
    weights, read = f"export of {where}", partial(read_released, files[0])
    return _Source(
        name, arguments, size, channels, known.get("mean"), known.get("std"), weights, read, classes, crop_pct=crop_pct
    )


def _crop_pct(known: Mapping[str, Any]) -> float | None:
    """Return the central share of an image that an export says it was evaluated on; None if it is not known."""
    if known.get("crop_pct") is None or (known.get("tag") == "sslvision" and "crop_mode" not in known):
        return None  # exports of earlier versions: always 0.875, though images of exactly image_size were taken whole
    crop_pct = float(known["crop_pct"])
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct} is not a share of an image")
    return crop_pct


def _unfinished(folder: Path, where: str | Path) -> _Source:
    """Return the weights in the newest whole checkpoint of a run that has no export."""
    reasons = []
    ranked = sorted((len(file.stem), file.stem, file) for file in (folder / "checkpoints").glob("last*.ckpt"))
    for *_, file in ranked:  # last.ckpt, last-1.ckpt, ...
        try:
            content = read_released(file)
            state, built = content["state_dict"], _built(content, file)
            prefix = next(p for p in OF_METHODS if any(name.startswith(p) for name in state))
        except (UsageError, KeyError, TypeError, StopIteration) as error:
            reasons.append(str(error) if isinstance(error, UsageError) else f"{file} is not as sslvision writes it.")
            continue
        best = content.get("callbacks", {}).get("KeepBest", {}).get("weights")  # of a classifier: that validated best
        network = part_of(best, "model.") if best else part_of(state, prefix)
        mean, std = (state[f"normalize.{name}"].flatten().tolist() for name in ("mean", "std"))
        classes = tuple(content.get("hyper_parameters", {}).get("classes", ()))
        weights = f"update {content['global_step']:,} in {file} (the run has not ended, and has no export)"
        size, channels = built["image_size"], built["arguments"]["in_chans"]
        read: Callable[[], dict[str, Tensor]] = partial(dict, network)
        return _Source(
            built["name"],
            built["arguments"],
            size,
            channels,
            mean,
            std,
            weights,
            read,
            classes,
            crop_pct=built.get("crop_pct"),
        )
    raise UsageError(
        f"run={where} has no export/: it has not ended, and it has no whole checkpoint to read instead. "
        f"{' '.join(reasons)} Let it finish first: {command_to_resume(folder)}.".replace("  ", " ")
    )


def _built(content: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """Return name, arguments and image size of the backbone in a run's checkpoint."""
    built = content.get("method", {}).get("backbone")
    if built is None:  # of earlier versions
        settings = content["sslvision"]["settings"]
        refuse_loading(settings["backbone"], file)
        backbone = build_backbone(**settings["backbone"], channels=int(settings["data"].get("channels", 3)))
        name = settings["backbone"]["name"]
        built = {"name": name, "arguments": backbone.arguments, "image_size": backbone.image_size[0]}
    refuse_loading(built["arguments"], file)
    return dict(built)


def _released(file: Path, heads: int | None) -> _Source:
    """Return the weights of a released checkpoint. All of these were trained with ImageNet's pixel statistics."""
    name, state, arguments, words = released_network(file, heads=heads)
    size, mean, std = arguments.get("img_size", 224), list(IMAGENET_MEAN), list(IMAGENET_STD)
    weights = f"released checkpoint {file}{words}"
    return _Source(name, arguments, size, arguments["in_chans"], mean, std, weights, lambda: state)


def _named(name: str, pretrained: bool) -> _Source:
    """Return timm's weights of a model name."""
    try:
        known = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UsageError(
            f"run={name}: timm has no weights with this tag; it has {', '.join(tags) or 'none'}."
        ) from error
    if pretrained and not known.has_weights:
        raise UsageError(
            f"run={name}: timm publishes no weights of this model. Choose another one (timm.list_pretrained() lists them), "
            "or pretrained=false for random weights."
        )
    full = f"{name}.{known.tag}" if known.tag and "." not in name else name
    channels, size = known.input_size[0], known.input_size[-1]
    arguments = {"in_chans": channels, **size_options(name, size)}
    mean, std = (list(known.mean), list(known.std)) if pretrained else (None, None)
    weights, read = f"timm's pretrained {full}", partial(_fetch, name)
    return _Source(name, arguments, size, channels, mean, std, weights, read, any_channels=True)


def _fetch(name: str) -> dict[str, Tensor]:
    """Return timm's pretrained weights without the head."""
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of the network, the file system, or the file itself
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UsageError(
            f"run={name}: timm's pretrained weights cannot be downloaded ({type(error).__name__}: {reason}). Give a file or "
            "an export folder, or pretrained=false for random weights."
        ) from error
    return dict(model.state_dict())


def _create(name: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # timm raises many types of errors for invalid arguments
        raise UsageError(f"timm cannot build {name} with {arguments}: {error}") from error


def _adapt(
    state: dict[str, Tensor], own: Mapping[str, Tensor], source: _Source, num_classes: int, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Return weights adapted by timm to another image size or number of channels."""
    check_fit(own, state, source.weights, shapes=False)
    overlay = {
        "state_dict": state,
        "input_size": (source.channels, source.image_size, source.image_size),
        "num_classes": num_classes,
        "label_offset": 0,
        "custom_load": False,
    }
    made_for = {"img_size": source.image_size} | source.arguments
    options = {"pretrained_cfg_overlay": overlay, "pretrained_model_args": made_for, "num_classes": num_classes}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about timm's interpolation
            return dict(timm.create_model(source.name, pretrained=True, **options, **arguments).state_dict())
    except RuntimeError as error:  # of load_state_dict
        raise UsageError(
            f"timm cannot adapt the weights to these settings ({source.weights}, of {source.image_size}x"
            f"{source.image_size} pixels): {' '.join(str(error).split())[:300]} Do not change image_size and channels."
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
