"""The one schema: what a run's settings are, which keys exist, and what fits them. Knows nothing of command lines."""

import difflib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from sslvision.errors import UsageError

OPEN_SECTIONS = ("method", "backbone", "data", "trainer")  # their keys are those of what they build

# Trainer options that have one owner already, and what to use in their place.
OURS = {
    "max_epochs": "epochs",
    "max_steps": "epochs (or dry_run=true)",
    "min_epochs": "epochs",
    "min_steps": "epochs",
    "max_time": "epochs",
    "fast_dev_run": "dry_run=true",
    "overfit_batches": "a smaller data set",
    "limit_train_batches": "epochs, or a smaller data set",
    "logger": "logger=csv|wandb|tensorboard",
    "callbacks": "a script of your own",
    "default_root_dir": "output_dir",
    "use_distributed_sampler": "nothing: sslvision deals the batches out to the processes",
    "enable_checkpointing": "checkpoint_every_epochs",
    "reload_dataloaders_every_n_epochs": "nothing: every epoch has an order of its own",
    "barebones": "nothing in its place",
}


def _option(default: Any, text: str) -> Any:
    """Declare a setting with its line in --help."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class Pretrain:
    """All settings of a pretraining run."""

    method: dict[str, Any] = _option(
        {}, "the method and its settings; mask_ratio=0.6 is short for method.mask_ratio=0.6"
    )
    backbone: dict[str, Any] = _option(
        {}, "name (any of timm; MAE: ViT or Swin), image_size, pool, and any timm keyword: patch_size, depth, ..."
    )
    data: dict[str, Any] = _option({}, "embedded | folder | torchvision; data.root, data.channels, data.workers, ...")
    epochs: int = _option(100, "passes over the training images")
    batch_size: int = _option(256, "images per optimizer update, over all devices and accumulated batches together")
    base_lr: float = _option(1.5e-4, "learning rate per 256 images: the peak rate is base_lr x batch_size / 256")
    lr: float | None = _option(None, "the peak learning rate itself, in place of base_lr")
    seed: int = _option(0, "of weights, order, crops and masks")
    name: str | None = _option(None, "name of the run's folder under outputs/ (default: recipe and time)")
    output_dir: str | None = _option(None, "whole path of the run's folder, in place of outputs/<name>")
    overwrite: bool = _option(False, "empty the run's folder first if it is in use")
    resume: str | None = _option(
        None, "auto: go on from the run folder's last checkpoint, if any; or a checkpoint's path"
    )
    init_from: str | None = _option(
        None, "start from the weights of a run folder, a checkpoint or an exported backbone"
    )
    dry_run: bool = _option(False, "two steps of everything, then stop: training, evaluation, export, figures")
    logger: Literal["csv", "wandb", "tensorboard"] = _option("csv", "beside metrics.csv, which is always written")
    knn_every_epochs: int = _option(
        10, "k-NN accuracy, RankMe and pictures while training, every so many epochs (0: never)"
    )
    health: Literal["warn", "stop"] = _option("warn", "warn | stop: what to do when the method has collapsed")
    checkpoint_every_epochs: int = _option(10, "write checkpoints/last.ckpt every so many epochs")
    evaluate_images: int = _option(50_000, "at most so many training images are used by k-NN and linear probe")
    trainer: dict[str, Any] = _option(
        {}, "any option of pytorch_lightning.Trainer: devices, strategy, num_nodes, precision, ..."
    )
    about: str = _option("", "what the recipe is, in a line")
    reference: str = _option("", "scores others reported for this recipe")

    def __post_init__(self) -> None:
        for key, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("knn_every_epochs", 0),
            ("checkpoint_every_epochs", 1),
            ("evaluate_images", 1),
            ("seed", 0),
        ):
            if getattr(self, key) < least:
                raise UsageError(f"{key}={getattr(self, key)} is too small: it must be {least} or more.")
        for key in ("base_lr", "lr"):
            value = getattr(self, key)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{key}={value} must be a number above 0.")
        if self.name is not None and (self.name in ("", ".", "..") or set(self.name) & set('/\\:*?"<>|\0')):
            raise UsageError(f"name={self.name} is not a plain folder name; output_dir=... sets a whole path.")
        for section in ("method", "data"):
            if "_target_" not in getattr(self, section):
                raise UsageError(
                    f"The recipe names no {section}: give {section}._target_, as the recipes that come along do."
                )
        if "name" not in self.backbone:
            raise UsageError(
                "The recipe names no backbone: give backbone.name, any timm ViT such as vit_small_patch16_224."
            )

    @property
    def peak_lr(self) -> float:
        """Return the peak learning rate of the global batch."""
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 256


def checked(settings: dict[str, Any]) -> Pretrain:
    """Return the settings of a run, after checking every key and value.

    Raises:
        UsageError: an unknown key, with the nearest known ones; a value of the wrong type or range.
    """
    known = _known_keys(settings)
    sections = {section: settings.get(section) or {} if section else settings for section in known}
    for section, values in sections.items():
        any_key = None in known[section]
        for key in values:
            if key != "_target_" and key not in known[section] and not any_key:
                raise UsageError(_unknown(f"{section}.{key}" if section else key, known))
    for section, values in sections.items():
        for key in [key for key in values if key in known[section]]:
            values[key] = fit(f"{section}.{key}" if section else key, values[key], known[section][key])
    return Pretrain(**{key: {} if value is None and key in OPEN_SECTIONS else value for key, value in settings.items()})


def _known_keys(settings: dict[str, Any]) -> dict[str, dict[str | None, Any]]:
    """Return the keys of every section and their types; the key None stands for any."""
    from pytorch_lightning import Trainer  # heavy, and not needed to print --help

    from sslvision.backbones.build import build_backbone

    known: dict[str, dict[str | None, Any]] = {"": {f.name: f.type for f in fields(Pretrain)}}
    known["backbone"] = parameters(build_backbone)
    known["trainer"] = {key: kind for key, kind in parameters(Trainer.__init__).items() if key not in OURS}
    for key, instead in OURS.items():
        if key in (settings.get("trainer") or {}):
            raise UsageError(f"trainer.{key} is set by sslvision; use {instead}.")
    for section in ("method", "data"):
        target = (settings.get(section) or {}).get("_target_")
        if target is not None:
            known[section] = parameters(locate(section, target))
    if "method" in known:
        for key in ("backbone", "lr", "mean", "std", "seed"):
            known["method"].pop(key, None)  # given by other keys
    known.get("data", {}).update({"workers": int | None, "normalize": Any, "max_unreadable": float})
    return known


def parameters(target: Callable[..., Any]) -> dict[str | None, Any]:
    """Return the keyword parameters of a callable and their types; with **options there is also the key None."""
    found: dict[str | None, Any] = {}
    for name, parameter in inspect.signature(target, eval_str=False).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found[None] = Any
        elif name != "self":
            found[name] = parameter.annotation
    return found


def locate(section: str, target: Any) -> Callable[..., Any]:
    """Return the class or function a `_target_` names."""
    try:
        found = pkgutil.resolve_name(target)
    except Exception as error:
        raise UsageError(f"{section}._target_={target} cannot be imported: {str(error).splitlines()[0]}") from error
    return cast(Callable[..., Any], found)


def fit(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as the type `kind`, or say why it is not one. Types beyond plain ones are left to their owner."""
    if value is None:
        if kind in (Any, inspect.Parameter.empty) or isinstance(kind, str) or type(None) in typing.get_args(kind):
            return None
        raise UsageError(f"{key} is not given, and it is needed: say {key}=...")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [argument for argument in arguments if argument is not type(None)]
        return fit(key, value, kinds[0]) if len(kinds) == 1 else value
    if origin is Literal:
        if value not in arguments:
            words = [str(argument) for argument in arguments]
            near = difflib.get_close_matches(str(value), words, n=1)
            raise UsageError(
                f"{key}={value} is unknown: it is {', '.join(words)}." + (f" Did you mean {near[0]}?" if near else "")
            )
        return value
    if origin in (tuple, list) and arguments:
        if not isinstance(value, (list, tuple)):
            raise UsageError(f"{key}={value} is not a list; write {key}=[...].")
        wanted = arguments if origin is tuple and Ellipsis not in arguments else [arguments[0]] * len(value)
        if len(wanted) != len(value):
            raise UsageError(f"{key}={value} has {len(value)} values; {len(wanted)} are needed.")
        return origin(
            fit(f"{key}[{i}]", one, one_kind) for i, (one, one_kind) in enumerate(zip(value, wanted, strict=True))
        )
    plain = {int: "a whole number", float: "a number", str: "a word", bool: "true or false", dict: "a section"}
    kind = origin or kind
    if kind not in plain:
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) in (int, float):
        return str(value)
    if type(value) is not kind:
        raise UsageError(f"{key}={value} is not {plain[kind]}.")
    return value


def _unknown(key: str, known: Mapping[str, Mapping[str | None, Any]]) -> str:
    """Return the message for an unknown key, with the nearest known ones."""
    everywhere = [
        f"{section}.{name}" if section else str(name) for section, keys in known.items() for name in keys if name
    ]
    by_last_word: dict[str, list[str]] = {}
    for name in everywhere:
        by_last_word.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    last = key.rsplit(".", 1)[-1]
    near = [
        name for word in difflib.get_close_matches(last, by_last_word, n=2, cutoff=0.6) for name in by_last_word[word]
    ]
    shown = key.removeprefix("method.")  # what may have been typed without it
    if last in OURS:
        return f"There is no setting {shown}; use {OURS[last]}."
    return f"There is no setting {shown}." + (f" Did you mean {' or '.join(near[:3])}?" if near else " See --help.")
