"""Where weights are: a run, an export, a file that others published, or timm. They are described first and read later."""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

from sslvision.backbones.build import build_backbone
from sslvision.backbones.dense import options_for
from sslvision.backbones.fitting import Grids, grids_of
from sslvision.backbones.released import INSTEAD_OF_TRANSFORMERS, part_of, read_released, released_network
from sslvision.errors import UsageError
from sslvision.nn.image_size import height_and_width, shortest
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from sslvision.system.checkpoint_folders import is_folder_of_shards
from sslvision.system.resuming import command_to_resume

OF_METHODS = (
    "teacher.backbone.model.",
    "ema.module.model.",
    "backbone.model.",
)  # in checkpoints of methods, best first
RANDOM = {"run": "pretrained=false", "init_from": "no init_from"}  # setting: what gives random weights instead
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # timm's names for them in an export folder


class WeightSource(NamedTuple):
    """Weights that are not yet read, and the model they belong to."""

    name: str  # timm's model name
    arguments: dict[str, Any]  # of timm.create_model
    image_size: tuple[int, int]
    channels: int
    mean: list[float] | None
    std: list[float] | None
    weights: str  # where they come from, for the user
    read: Callable[[], dict[str, Tensor]]
    classes: tuple[str, ...] = ()
    any_channels: bool = False
    crop_pct: float | None = None


def refuse_loading(arguments: Mapping[str, Any], file: Path) -> None:
    """Raise UsageError if timm arguments from a file would make timm load other files or URLs."""
    keys = [key for key in arguments if str(key).startswith("pretrained") or key in ("checkpoint_path", "cache_dir")]
    if keys:
        raise UsageError(f"{file} would make timm load other files ({', '.join(keys)}), which is refused.")


def size_options(name: str, image_size: tuple[int, int]) -> dict[str, Any]:
    """Return timm's options to build a model for an image size, as `build_backbone` does."""
    module = timm.model_entrypoint(name).__module__.removeprefix("timm.models.")
    if module in ("vision_transformer", "swin_transformer") or (module == "deit" and "distilled" not in name):
        return {"img_size": shortest(image_size)}
    return options_for(name, image_size)


def made_for(file: Path, content: Mapping[str, Any]) -> Grids:
    """Return `grids_of` the network in a checkpoint or export of a run on images that are not square; else nothing.

    Args:
        file: The file of the weights.
        content: What it contains.
    """
    method = content.get("method")
    if isinstance(method, Mapping) and method.get("backbone"):
        built = _built(content, file)
        name, arguments, size = built["name"], built["arguments"], height_and_width(built["image_size"])
    elif file.name in WEIGHTS and (file.parent / "config.json").is_file():
        name, arguments, size, *_ = _exported(file.parent, file.parent)
    else:
        return {}
    return {} if size[0] == size[1] else patch_grids(name, arguments)


def patch_grids(name: str, arguments: Mapping[str, Any]) -> Grids:
    with torch.device("meta"):
        return grids_of(create_model(name, num_classes=0, **arguments))


def find_source(
    where: str | Path, *, pretrained: bool, heads: int | None, image_size: tuple[int, int] | None, setting: str
) -> WeightSource:
    """Return the weights that `where` refers to, which was given as `setting`: "run" or "init_from"."""
    path, name = Path(where).expanduser(), str(where)
    for folder in (path / "export", path):
        if (folder / "config.json").is_file():
            return _exported(folder, where)
    if path.is_file() or is_folder_of_shards(path):
        if path.name in WEIGHTS and (path.parent / "config.json").is_file():
            return _exported(path.parent, path.parent)
        return _released(path, heads, image_size)
    if timm.is_model(name):
        return _named(name, pretrained, setting)
    if (path / "config.yaml").is_file():
        return _unfinished(path, where, setting)
    if (told := elsewhere(where, setting)) is not None:
        raise UsageError(told)
    near = timm.list_models(f"{name}_*")[:3] or difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    raise UsageError(
        f"{setting}={where} is nothing to load a backbone from: no run folder (with export/), no export folder (with "
        "config.json and model.safetensors), no .pth or .safetensors file, and no timm model has that name."
        + (f" Near it in timm: {', '.join(near)}." if near else "")
    )


def elsewhere(where: str | Path, setting: str) -> str | None:
    """Return what to do about a path that does not exist, if it is a URL, a name of weights on a hub, or of a file; or None.

    Args:
        where: The path, as it was given.
        setting: Setting that it was given for.
    """
    path, name = Path(where), str(where)
    if re.match(r"https?:/", name):
        return f"{setting}={name} is a URL: download the file, and give its path, {setting}={path.name}."
    if timm.is_model(short := name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")):
        return f"{setting}={name} is the name of weights on a hub: timm's name of them is {setting}={short}."
    if path.suffix in (".pth", ".pt", ".ckpt", ".bin", ".safetensors"):
        return f"{setting}={name}: there is no such file in {path.absolute().parent}."
    return None


def _exported(folder: Path, where: str | Path) -> WeightSource:
    """Return the weights in an export folder."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if "model_type" in config and "architecture" not in config:
            raise UsageError(f"{folder} holds a model of transformers. {INSTEAD_OF_TRANSFORMERS}")
        name, known = str(config["architecture"]), config["pretrained_cfg"]
        channels, *sides = known["input_size"]
        size = height_and_width(sides)
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
    return WeightSource(
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


def _unfinished(folder: Path, where: str | Path, setting: str) -> WeightSource:
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
        size, channels = height_and_width(built["image_size"]), built["arguments"]["in_chans"]
        read: Callable[[], dict[str, Tensor]] = partial(dict, network)
        return WeightSource(
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
        f"{setting}={where} has no export/: it has not ended, and it has no whole checkpoint to read instead. "
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
        built = {"name": name, "arguments": backbone.arguments, "image_size": backbone.image_size}
    refuse_loading(built["arguments"], file)
    return dict(built)


def _released(file: Path, heads: int | None, image_size: tuple[int, int] | None) -> WeightSource:
    """Return the weights of a released checkpoint. All of these were trained with ImageNet's pixel statistics."""
    name, state, arguments, words = released_network(file, heads=heads, image_size=image_size)
    size, mean, std = height_and_width(arguments.get("img_size", 224)), list(IMAGENET_MEAN), list(IMAGENET_STD)
    weights = f"released checkpoint {file}{words}"
    return WeightSource(name, arguments, size, arguments["in_chans"], mean, std, weights, lambda: state)


def _named(name: str, pretrained: bool, setting: str) -> WeightSource:
    """Return timm's weights of a model name."""
    try:
        known = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise UsageError(
            f"{setting}={name}: timm has no weights with this tag; it has {', '.join(tags) or 'none'}."
        ) from error
    if pretrained and not known.has_weights:
        raise UsageError(
            f"{setting}={name}: timm publishes no weights of this model. Choose another one (timm.list_pretrained() lists "
            f"them), or {RANDOM[setting]} for random weights."
        )
    full = f"{name}.{known.tag}" if known.tag and "." not in name else name
    channels, *sides = known.input_size
    size = height_and_width(sides)
    arguments = {"in_chans": channels, **size_options(name, size)}
    mean, std = (list(known.mean), list(known.std)) if pretrained else (None, None)
    weights, read = f"timm's pretrained {full}", partial(_fetch, name, setting)
    return WeightSource(name, arguments, size, channels, mean, std, weights, read, any_channels=True)


def _fetch(name: str, setting: str) -> dict[str, Tensor]:
    """Return timm's pretrained weights without the head."""
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of the network, the file system, or the file itself
        reason = (str(error).splitlines() or [""])[0][:300]
        raise UsageError(
            f"{setting}={name}: timm's pretrained weights cannot be downloaded ({type(error).__name__}: {reason}). Give a "
            f"file or an export folder, or {RANDOM[setting]} for random weights."
        ) from error
    return dict(model.state_dict())


def create_model(name: str, **arguments: Any) -> Any:
    try:
        return timm.create_model(name, **arguments)
    except Exception as error:  # timm raises many types of errors for invalid arguments
        raise UsageError(f"timm cannot build {name} with {arguments}: {error}") from error
