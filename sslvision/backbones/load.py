"""A backbone with its weights from anywhere: a run, an export, a released MAE or DINO checkpoint, or timm's own."""

import difflib
import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from torch import Tensor, nn

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import wrap
from sslvision.backbones.dense import options_for
from sslvision.backbones.fitting import check_fit, load_fitting
from sslvision.backbones.released import read_released, released_vit
from sslvision.backbones.vit import ViT
from sslvision.errors import UsageError
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # timm's names for them in an export folder


class Loaded(NamedTuple):
    """A backbone and what is known of its weights."""

    backbone: Backbone
    mean: list[float] | None  # of the pixels in pretraining, per channel; None where nobody told
    std: list[float] | None
    classes: tuple[str, ...] | None  # of its classifier, if it has one
    weights: str  # where they come from, in words


class _Source(NamedTuple):
    """Weights, before they are read, and the model they are of."""

    name: str  # in timm
    arguments: dict[str, Any]  # timm.create_model's
    image_size: int
    channels: int
    mean: list[float] | None
    std: list[float] | None
    weights: str  # in words
    read: Callable[[], dict[str, Tensor]]
    classes: tuple[str, ...] = ()
    any_channels: bool = False


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
    """Build the model that `where` means and load its weights, each tensor by its name and shape.

    Args:
        where: the first of these that it is.
            - a run folder with an export/ in it;
            - an export folder: config.json beside model.safetensors, as `export_backbone` or timm's `save_for_hf` writes;
            - a .pth or .safetensors file as the authors of MAE or DINO released them (see `released_vit`);
            - a timm name, with or without a tag; its weights are downloaded, or taken from timm's cache.
        image_size: side of the square images in pixels; by default that of the weights. For another one timm resamples
            position embeddings and tables.
        channels: of the images, which the weights must have; timm adapts its own weights to any number.
        pool: what stands for the image in a plain ViT; by default as with the weights. Other models have their own.
        pretrained: False leaves the weights as timm initializes the model.
        head: False leaves an exported classifier's head aside.
        seed: of what is random. The global random numbers are left alone.
        timm_options: keywords of the timm model, in place of those of the weights: drop_path_rate, drop_rate, num_heads, ...

    Raises:
        UsageError: `where` is none of these, the weights cannot be had, or they do not fit what is asked for.
    """
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
        backbone.arguments = arguments
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
    return Loaded(backbone, mean, std, classes or None, source.weights if pretrained else "random")


def refuse_loading(arguments: Mapping[str, Any], file: Path) -> None:
    """Raise UsageError if timm arguments that a file tells would have timm read other files or addresses."""
    keys = [key for key in arguments if str(key).startswith("pretrained") or key in ("checkpoint_path", "cache_dir")]
    if keys:
        raise UsageError(f"{file} would have timm load further files ({', '.join(keys)}), which is not done.")


def size_options(name: str, image_size: int) -> dict[str, Any]:
    """Return the options by which timm builds a model for images of a size, as `build_backbone` gives them."""
    module = timm.model_entrypoint(name).__module__.removeprefix("timm.models.")
    if module in ("vision_transformer", "swin_transformer") or (module == "deit" and "distilled" not in name):
        return {"img_size": image_size}
    return options_for(name, image_size)


def _find(where: str | Path, *, pretrained: bool, heads: int | None) -> _Source:
    """Return what `where` means, told by what is there."""
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
        raise UsageError(f"run={where} has no export/: it has not ended. Let it end (resume=auto), then come back.")
    near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    raise UsageError(
        f"run={where} is nothing to load a backbone from: there is no run folder (with export/), no export folder (with "
        "config.json and model.safetensors) and no .pth or .safetensors file of that name, and no timm model."
        + (f" Near it in timm: {', '.join(near)}." if near else "")
    )


def _exported(folder: Path, where: str | Path) -> _Source:
    """Return what an export folder holds."""
    try:
        config = json.loads((folder / "config.json").read_text())
        name, known = str(config["architecture"]), config["pretrained_cfg"]
        channels, size, _ = known["input_size"]
        arguments = {key: value for key, value in config.get("model_args", {}).items() if key != "num_classes"}
        names, count = config.get("label_names") or {}, config.get("num_classes") or 0
        if isinstance(names, list):
            names = dict(enumerate(names))
        classes = tuple(str(names.get(place, names.get(str(place), place))) for place in range(count))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{folder / 'config.json'} is not as timm writes it ({type(error).__name__}: {error}): give a folder that "
            "a run or timm's save_for_hf exported."
        ) from error
    refuse_loading(arguments, folder / "config.json")
    if not timm.is_model(name):
        raise UsageError(f"{folder} is of a {name}, which this version of timm ({timm.__version__}) does not know.")
    files = [folder / file for file in WEIGHTS if (folder / file).is_file()]
    if not files:
        raise UsageError(f"{folder} has a config.json, but no weights: model.safetensors is missing.")
    weights, read = f"export of {where}", partial(read_released, files[0])
    return _Source(name, arguments, size, channels, known.get("mean"), known.get("std"), weights, read, classes)


def _released(file: Path, heads: int | None) -> _Source:
    """Return what a checkpoint of MAE's or DINO's authors holds. They all normalized by ImageNet's statistics."""
    state, arguments = released_vit(file, heads=heads)
    size, channels, mean, std = arguments["img_size"], arguments["in_chans"], list(IMAGENET_MEAN), list(IMAGENET_STD)
    return _Source(
        "vit_base_patch16_224", arguments, size, channels, mean, std, f"released checkpoint {file}", lambda: state
    )


def _named(name: str, pretrained: bool) -> _Source:
    """Return what timm has under a name."""
    try:
        known = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UsageError(f"run={name}: timm has no weights of this tag, but {', '.join(tags) or 'none'}.") from error
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
    """Return timm's pretrained weights, as they are but for the head."""
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of the network, the file system, or the file
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UsageError(
            f"run={name}: timm's pretrained weights cannot be downloaded ({type(error).__name__}: {reason}). Give a file or "
            "an export folder, or pretrained=false for random weights."
        ) from error
    return dict(model.state_dict())


def _create(name: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # timm has many ways to say that a keyword is unknown or a value impossible
        raise UsageError(f"timm cannot build {name} with {arguments}: {error}") from error


def _adapt(
    state: dict[str, Tensor], own: Mapping[str, Tensor], source: _Source, num_classes: int, arguments: dict[str, Any]
) -> dict[str, Tensor]:
    """Return weights for another size of images or number of channels, as timm makes them."""
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
            warnings.simplefilter("ignore")  # torch's, of how timm's interpolation is written
            return dict(timm.create_model(source.name, pretrained=True, **options, **arguments).state_dict())
    except RuntimeError as error:  # of load_state_dict
        raise UsageError(
            f"timm cannot fit the weights to what is asked for ({source.weights}, of {source.image_size}x"
            f"{source.image_size} pixels): {' '.join(str(error).split())[:300]} Leave image_size and channels as they were."
        ) from error


def _pool_by(backbone: Backbone, pool: str) -> None:
    """Let a ViT pool as told. A norm before or after pooling stays where it is."""
    if pool not in ("token", "avg"):
        raise UsageError(f"pool={pool} is unknown: it is token (class token) or avg (mean of patch tokens).")
    model = backbone.model
    if not isinstance(backbone, ViT) or model.global_pool == pool:
        return
    if model.num_classes:
        raise UsageError(
            f"pool={pool}: the classifier of this model was trained on {model.global_pool}, and stays with it."
        )
    if pool == "token" and not model.has_class_token:
        raise UsageError("pool=token: this ViT has no class token. Leave pool=avg.")
    model.reset_classifier(0, global_pool=pool)
    norm = {"fc_norm": not isinstance(model.fc_norm, nn.Identity)}
    backbone.arguments = {**backbone.arguments, "global_pool": pool, **norm}
