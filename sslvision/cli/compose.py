"""From the command line to checked settings: Hydra composes recipes, overrides and sweeps; schema.py checks the result.

All points of a sweep are checked before the first of them runs. A recipe is found by name, or given by path.
"""

import contextlib
import difflib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Generic, cast

from hydra import compose, initialize
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sslvision.cli.schema import Settings, checked
from sslvision.errors import UsageError
from sslvision.runs.config import config_file, read_settings, refuse_foreign
from sslvision.runs.redaction import REDACTED
from sslvision.settings import Finetune, Predict, Pretrain, Probe

_IN_WHEEL = Path(__file__).parents[1] / "recipes"
RECIPES = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[2] / "recipes"  # the latter in a checkout


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """A command: `python -m sslvision.<name>`.

    Attributes:
        name: also of its folder of recipes.
        kind: the class of its settings.
        recipe: the one it takes unless told; None if the command line must name one.
    """

    name: str
    kind: type[Settings]
    recipe: str | None = None

    @property
    def recipes(self) -> dict[str, Path]:
        """Return the recipes that come along, by name; none if the command has no use for any."""
        return {file.stem: file for file in sorted((RECIPES / self.name).glob("*.yaml"))}


PRETRAIN = Command("pretrain", Pretrain)
PROBE = Command("probe", Probe)
FINETUNE = Command("finetune", Finetune, recipe="default")
PREDICT = Command("predict", Predict)
COMMANDS: dict[str, Command[Any]] = {command.name: command for command in (PRETRAIN, PROBE, FINETUNE, PREDICT)}


def prepare(arguments: Sequence[str], command: Command[Any] = PRETRAIN) -> list[str]:
    """Register all recipes with Hydra and return the command line in its full form, every sweep point of it checked.

    Args:
        arguments: the command line after the program's name.
        command: whose.

    Raises:
        UsageError: an unknown or repeated key, an unknown recipe, a value of the wrong type or range.
    """
    words = get_args_parser().parse_args(list(arguments)).overrides
    flags = [argument for argument in arguments if argument not in words]
    overrides = parse(words)
    _register(command)
    lines = [_full_form(override, command) for override in overrides]
    if command is PRETRAIN and not any(override.key_or_group == "recipe" for override in overrides):
        raise UsageError(
            f"No recipe: say recipe=NAME, one of {', '.join(command.recipes)}, or the path of your own .yaml file."
        )
    gone = _of_another_backbone(overrides) if command is PRETRAIN else []
    for point in _points(overrides, lines):
        tree([*point, *gone], command)
    return [*flags, *lines, *gone]


def parse(arguments: Sequence[str]) -> list[Override]:
    """Parse Hydra overrides; each key may come once."""
    try:
        overrides = OverridesParser.create().parse_overrides(list(arguments))
    except HydraException as error:
        first = str(error).splitlines()[0]
        raise UsageError(f"Cannot read the command line: {first} Settings are written key=value.") from error
    seen = set()
    for override in overrides:
        key = override.key_or_group
        if key in seen and not key.startswith("hydra"):
            raise UsageError(f"{key} is given twice; which one is meant? Give it once.")
        seen.add(key)
    return overrides


def tree(lines: Sequence[str], command: Command[Settings] = PRETRAIN) -> Settings:  # type: ignore[assignment]
    """Compose and check one run."""
    GlobalHydra.instance().clear()
    try:
        with initialize(version_base="1.3", config_path=None):
            composed = compose(command.name, overrides=[line for line in lines if not line.startswith("hydra")])
        return check(composed, command)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(str(error).strip().splitlines()[0]) from error
    finally:
        GlobalHydra.instance().clear()


def check(composed: DictConfig, command: Command[Settings]) -> Settings:
    """Check a composed tree, key by key and value by value. Where it has a run and no data, the data are the run's."""
    try:
        settings = cast(dict[str, Any], OmegaConf.to_container(composed, resolve=True))
    except OmegaConfBaseException as error:
        raise UsageError(str(error).splitlines()[0]) from error
    given = settings.get("data") or {}
    if "run" in settings and "data" in command.kind.sections and "_target_" not in given:
        settings["data"] = data_of(settings["run"]) | given
    for key in _redacted(settings):
        raise UsageError(f"{key} is not kept in the files of a run, as it is a secret: give it again, {key}=...")
    return checked(settings, command.kind)


def data_of(run: Any) -> dict[str, Any]:
    """Return the data section of a run by its folder; empty if it is none. Raises UsageError if it is not to be trusted."""
    if (file := config_file(str(run))) is None:
        return {}
    section = cast(dict[str, Any], read_settings(file, ("data",))["data"])
    if section:
        refuse_foreign("data", section, file)
    return section


def _redacted(value: Any, key: str = "") -> Iterator[str]:
    """Yield the keys whose values were left out where they were written down."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _redacted(one, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, str) and REDACTED in value:
        yield key


class SweepFile(Callback):
    """Hydra writes a sweep's whole configuration, secrets included, to a file that nobody reads: to the null device with it."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Make the file a link to nowhere."""
        file = Path(config.hydra.sweep.dir) / "multirun.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # of a disk without links
            file.symlink_to(os.devnull)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Remove it."""
        (Path(config.hydra.sweep.dir) / "multirun.yaml").unlink(missing_ok=True)


def _register(command: Command[Any]) -> None:
    """Tell Hydra the recipes and data sources that come along."""
    store = ConfigStore.instance()
    schema = {
        f.name: f.default if f.default is not MISSING else cast(Any, f.default_factory)()
        for f in fields(command.kind)
        if f.name not in command.kind.sections
    }
    quiet: dict[str, Any] = {
        "run": {"dir": "."},
        "sweep": {"dir": "outputs/.sweep", "subdir": "."},
        "output_subdir": None,
    }
    quiet["callbacks"] = {"sweep_file": {"_target_": f"{__name__}.{SweepFile.__name__}"}}
    defaults: list[Any] = [{"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}]
    if command.recipes:
        defaults.insert(0, {"recipe": command.recipe or "???"})
    if command is not PRETRAIN and "data" in command.kind.sections:  # pretraining's recipes choose theirs
        defaults.insert(0, {"data": None})
    sections: dict[str, Any] = {section: {} for section in command.kind.sections if section != "data"}
    # `_self_` first: a recipe's values replace the schema's defaults.
    node = {"defaults": ["_self_", *defaults], **schema, **sections, "hydra": quiet}
    store.store(name=command.name, node=OmegaConf.create(node))
    for name, file in command.recipes.items():
        store.store(group="recipe", name=name, package="_global_", node=OmegaConf.load(file))
    for file in (RECIPES / "data").glob("*.yaml"):
        store.store(group="data", name=file.stem, package="data", node=OmegaConf.load(file))


def _full_form(override: Override, command: Command[Any]) -> str:
    """Return the override as Hydra wants it: method settings under method., open sections free to grow."""
    key, line, sections = override.key_or_group, str(override.input_line), command.kind.sections
    if key.startswith("hydra") or override.type is OverrideType.DEL:
        return line
    value = line.split("=", 1)[1] if "=" in line else ""
    if key == "recipe" and command.recipes:
        return f"recipe={','.join(_recipe(one, command) for one in _values(override))}"
    if key == "data" and "data" in sections:
        sources = sorted(file.stem for file in (RECIPES / "data").glob("*.yaml"))
        return f"data={','.join(_choice('data', one, sources) for one in _values(override))}"
    if key.split(".", 1)[0] in sections:
        return f"++{key}={value}"
    if key in {f.name for f in fields(command.kind)}:
        return f"{key}={value}"
    return f"++method.{key}={value}" if "method" in sections else f"++{key}={value}"


def _of_another_backbone(overrides: Sequence[Override]) -> list[str]:
    """Return, if the command line names another backbone, the deletions of what the recipe says of its own one's make.

    The size of the images stays, for it is theirs, and so does what the command line itself says.
    """
    given = {override.key_or_group: _values(override) for override in overrides}
    files = [PRETRAIN.recipes.get(name, Path(name)) for name in given["recipe"]]
    own = [OmegaConf.select(OmegaConf.load(file), "backbone", default={}) for file in files]
    if all(given.get("backbone.name", [backbone.get("name")]) == [backbone.get("name")] for backbone in own):
        return []
    make = set.intersection(*(set(backbone) for backbone in own)) - {"name", "image_size", "pool"}
    return [f"~backbone.{key}" for key in sorted(make) if f"backbone.{key}" not in given]


def _recipe(name: str, command: Command[Any]) -> str:
    """Return a recipe's name, after registering it if it is given by path."""
    recipes = command.recipes
    if not name.endswith((".yaml", ".yml")) and "/" not in name:
        return _choice("recipe", name, list(recipes))
    file = Path(name)
    if not file.is_file():
        raise UsageError(f"recipe={name}: there is no such file. Recipes that come along: {', '.join(recipes)}.")
    try:
        node = OmegaConf.load(file)
    except Exception as error:
        raise UsageError(f"recipe={name} is not valid YAML: {str(error).splitlines()[0]}") from error
    name = re.sub(r"\W", "_", file.stem)
    name += "_" if name in recipes else ""  # one's own mae.yaml is not ours
    ConfigStore.instance().store(group="recipe", name=name, package="_global_", node=node)
    return name


def _choice(group: str, name: str, names: list[str]) -> str:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        raise UsageError(
            f"{group}={name} is unknown: it is one of {', '.join(names)}"
            + (", or the path of your own .yaml file." if group == "recipe" else ".")
            + (f" Did you mean {group}={near[0]}?" if near else "")
        )
    return name


def _values(override: Override) -> list[str]:
    """Return what an override sets, one text for each point of a sweep."""
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [str(override.get_value_element_as_str()).strip("'\"")]


def _points(overrides: Sequence[Override], lines: Sequence[str], at_most: int = 200) -> Iterator[list[str]]:
    """Yield the overrides of every point of a sweep, `at_most` of them."""
    choices = [
        [f"{line.split('=', 1)[0]}={value}" for value in _values(override)] if override.is_sweep_override() else [line]
        for override, line in zip(overrides, lines, strict=True)
    ]
    for point in itertools.islice(itertools.product(*choices), at_most):
        yield list(point)
