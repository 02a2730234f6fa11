"""Which keys exist, and which values fit. Independent of the command line; the settings themselves are in settings.py."""

import ast
import difflib
import inspect
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal, TypeVar

from sslvision.backbones.timm_options import check_options_of_timm
from sslvision.errors import UsageError
from sslvision.nn.image_size import height_and_width, shortest
from sslvision.settings import Finetune, Predict, Pretrain, Probe, locate
from sslvision.workflows.embedding_settings import Cluster, Duplicates, Embed, Outliers, Search, Select
from sslvision.workflows.exporting_settings import Export
from sslvision.workflows.inspecting_settings import Inspect
from sslvision.workflows.packing_settings import Pack
from sslvision.workflows.report_settings import Report
from sslvision.workflows.scaling_settings import Scale
from sslvision.workflows.segmenting_settings import Segment
from sslvision.workflows.tuning_settings import Tune, TuneFinetune

Settings = TypeVar(
    "Settings",
    Pretrain,
    Probe,
    Finetune,
    Predict,
    Inspect,
    Scale,
    Export,
    Report,
    Tune,
    TuneFinetune,
    Embed,
    Segment,
    Search,
    Duplicates,
    Outliers,
    Select,
    Cluster,
    Pack,
)

# Trainer options that sslvision sets itself, and what to use instead.
OURS = {
    "max_epochs": "epochs",
    "max_steps": "max_steps (or dry_run=true)",
    "min_epochs": "epochs",
    "min_steps": "epochs",
    "max_time": "budget",
    "fast_dev_run": "dry_run=true",
    "overfit_batches": "a smaller data set",
    "limit_train_batches": "epochs, or a smaller data set",
    "logger": "logger=csv|wandb|tensorboard",
    "callbacks": "your own script",
    "default_root_dir": "output_dir",
    "use_distributed_sampler": "nothing: sslvision distributes the batches over the processes",
    "enable_checkpointing": "checkpoint_every_epochs",
    "reload_dataloaders_every_n_epochs": "nothing: every epoch has its own order",
    "barebones": "nothing: it is not supported",
}

# What other programs call a setting.
ELSEWHERE = {
    "gpus": "trainer.devices",
    "num_gpus": "trainer.devices",
    "nodes": "trainer.num_nodes",
    "learning_rate": "lr",
    "num_workers": "data.workers",
}

_CLASS_FOLDERS = "labels are the names of class folders, one for each image (docs/guide/your-own-images.md)"
ABSENT = {  # what others have, and what is here instead
    **dict.fromkeys(("labels", "label_file", "labels_file", "annotations", "csv"), _CLASS_FOLDERS),
    **dict.fromkeys(
        ("multilabel", "multi_label", "loss", "criterion"),
        f"the loss is that of one class for each image: {_CLASS_FOLDERS}",
    ),
    "slurm": "slurm.time=2h submits the runs to SLURM, and --help lists the other settings of slurm",
    "recipe": "this command has no recipes: its settings are given on the command line, and --help lists them",
}


def checked(settings: dict[str, Any], kind: type[Settings]) -> Settings:
    """Return the settings of a command, after checking every key and value.

    Args:
        settings: Settings by key; those of a section in a dictionary of their own.
        kind: Class of the settings, from settings.py.

    Raises:
        UsageError: An unknown key, with the nearest known ones; a value of the wrong type or range.
    """
    known = known_keys(settings, kind)
    sections = {section: settings.get(section) or {} if section else settings for section in known}
    for section, values in sections.items():
        any_key = None in known[section]
        for key in values:
            if (section, key) == ("data", "channels"):  # recipes and runs give it, not only users: see open_splits
                continue
            if key != "_target_" and key not in known[section] and not any_key:
                raise UsageError(_unknown(f"{section}.{key}" if section else key, known))
    for section, values in sections.items():
        for key in [key for key in values if key in known[section]]:
            values[key] = fit(f"{section}.{key}" if section else key, values[key], known[section][key])
    backbone = sections.get("backbone", {})
    if backbone.get("image_size") is not None:  # [s,s] is s, for a run to be resumed with either
        backbone["image_size"] = shortest(height_and_width(backbone["image_size"], "backbone.image_size"))
    result = kind(**{key: {} if value is None and key in kind.sections else value for key, value in settings.items()})
    # Of a fine-tuning run, backbone.pretrained=false means the network of `run` with random weights.
    taken = ("pretrained",) if issubclass(kind, Finetune) else ()
    check_options_of_timm({key: value for key, value in backbone.items() if key not in taken})
    return result


def known_keys(settings: dict[str, Any], kind: type[Settings]) -> dict[str, dict[str | None, Any]]:
    """Return the keys of every section and their types; the key None stands for any."""
    known: dict[str, dict[str | None, Any]] = {"": {f.name: f.type for f in fields(kind)}}
    for section, of in kind.sections.items():
        target = (settings.get(section) or {}).get("_target_") if of is None else of
        if target is not None:
            known[section] = parameters(locate(section, target))
    for key in kind.elsewhere:
        known.get("method", {}).pop(key, None)
    for key in OURS:
        known.get("trainer", {}).pop(key, None)
        if key in (settings.get("trainer") or {}):
            raise UsageError(f"trainer.{key} is set by sslvision; use {OURS[key]}.")
    known.get("data", {}).update({"workers": int | None, "normalize": Any, "max_unreadable": float})
    cache = {"cache": Literal["none", "ram", "disk"], "cache_size": int, "cache_dir": str | None}
    known.get("data", {}).update(cache)
    return known


def parameters(target: Callable[..., Any]) -> dict[str | None, Any]:
    """Return the keyword parameters of a callable and their types; the key None stands for **options that can be anything.

    Where a class passes its **options to `super().__init__`, they are the parameters of the base class.
    """
    functions = [target]
    if inspect.isclass(target):
        functions = [vars(kind)["__init__"] for kind in inspect.getmro(target) if "__init__" in vars(kind)]
    found: dict[str | None, Any] = {}
    given: set[str] = set()
    positional = 0
    for function in functions:
        own = [one for name, one in inspect.signature(function, eval_str=False).parameters.items() if name != "self"]
        given |= {one.name for one in own[:positional]}
        options = [one.name for one in own if one.kind is inspect.Parameter.VAR_KEYWORD]
        for one in own:
            if one.name not in (*given, *options):
                found.setdefault(one.name, one.annotation)
        if not options:
            return found
        passed = _passed_to_super(function, options[0])
        if passed is None:
            break
        positional, names = passed
        given |= names
    return {**found, None: Any}


def _passed_to_super(function: Callable[..., Any], options: str) -> tuple[int, set[str]] | None:
    """Return the arguments of `super().__init__(..., **options)` besides the options: the number of positional ones, and names.

    None if the function does not pass its options on, or its source is not available.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "super().__init__":
            values = {keyword.arg or ast.unparse(keyword.value): keyword.arg for keyword in node.keywords}
            if values.get(options, "") is None:
                return len(node.args), {name for name in values.values() if name}
    return None


def fit(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as the type `kind`, or raise UsageError. Other types than plain ones are checked by whoever takes them."""
    if value is None:
        if kind in (Any, inspect.Parameter.empty) or isinstance(kind, str) or type(None) in typing.get_args(kind):
            return None
        raise UsageError(f"{key} is not given: say {key}=...")
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
    plain = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "a section"}
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
    shown = key.removeprefix("method.")  # it may have been given without
    if last in OURS:
        return f"There is no setting {shown}; use {OURS[last]}."
    if not near and last in ABSENT:
        return f"There is no setting {shown}: {ABSENT[last]}."
    near = [ELSEWHERE[last]] if last in ELSEWHERE else near
    return f"There is no setting {shown}." + (f" Did you mean {' or '.join(near[:3])}?" if near else " See --help.")
