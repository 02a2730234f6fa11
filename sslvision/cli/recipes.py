"""Commands, their recipes, and the settings of a recipe with its data source, as Hydra composes them."""

import difflib
import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Generic, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from sslvision.cli.schema import Settings
from sslvision.errors import UsageError
from sslvision.settings import Finetune, Predict, Pretrain, Probe

_IN_WHEEL = Path(__file__).parents[1] / "recipes"
RECIPES = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[2] / "recipes"  # the latter in a checkout
SOURCES = sorted(file.stem for file in (RECIPES / "data").glob("*.yaml"))


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """A command: `python -m sslvision.<name>`.

    Attributes:
        name: Name of the command and of its folder of recipes.
        kind: Class of its settings.
        recipe: Default recipe; None if one must be named.
    """

    name: str
    kind: type[Settings]
    recipe: str | None = None

    @property
    def recipes(self) -> dict[str, Path]:
        """Return the included recipes by name; none if the command takes no recipe."""
        return {file.stem: file for file in sorted((RECIPES / self.name).glob("*.yaml"))}


PRETRAIN = Command("pretrain", Pretrain)
PROBE = Command("probe", Probe)
FINETUNE = Command("finetune", Finetune, recipe="default")
PREDICT = Command("predict", Predict)
COMMANDS: dict[str, Command[Any]] = {command.name: command for command in (PRETRAIN, PROBE, FINETUNE, PREDICT)}


def compose_recipe(command: Command[Any], recipe: str | None, data: str | None) -> tuple[DictConfig, str]:
    """Return a command's default settings with those of a recipe and a data source, and the recipe's name.

    Args:
        command: Command to compose for.
        recipe: Name of an included recipe or path of a .yaml file; None for the command's default.
        data: Name of a data source; None for the recipe's.

    Raises:
        UsageError: No such recipe or data source, or a file that is not a recipe.
        HydraException: The recipe's defaults cannot be composed.
    """
    choices, name = [], command.name
    with _hydra() as store:
        if command.recipes:
            recipe = recipe or command.recipe
            if recipe is None:
                known = ", ".join(command.recipes)
                raise UsageError(f"No recipe: say recipe=NAME, one of {known}, or the path of your own .yaml file.")
            for one, file in command.recipes.items():
                store.store(group="recipe", name=one, package="_global_", node=_read(file))
            name = _choose_recipe(recipe, command, store)
            choices.append(f"recipe={name}")
        if data is not None:
            _check_choice("data", data, SOURCES)
            choices.append(f"data={data}")
        store.store(name=command.name, node=_defaults(command))
        try:
            composed = compose(command.name, overrides=choices)
        except ConfigCompositionException:
            if data is None:
                raise
            composed = compose(command.name, overrides=[*choices[:-1], f"+data={data}"])  # the recipe names no source
    OmegaConf.set_struct(composed, False)
    return composed, name


def _defaults(command: Command[Any]) -> DictConfig:
    """Return a command's settings before any recipe, with Hydra's list of what to add to them."""
    kind = command.kind
    plain = {
        field.name: field.default if field.default is not MISSING else cast(Any, field.default_factory)()
        for field in fields(kind)
        if field.name not in kind.sections
    }
    sections: dict[str, Any] = {section: {} for section in kind.sections if section != "data"}
    groups: list[Any] = ["_self_"]  # first, so that a recipe's values replace the defaults
    if command is not PRETRAIN and "data" in kind.sections:
        groups.append({"data": None})
    if command.recipes:
        groups.append({"recipe": "???"})
    return OmegaConf.create({"defaults": groups, **plain, **sections})


@contextmanager
def _hydra() -> Iterator[ConfigStore]:
    """Lend Hydra's global state, with an empty store of recipes; a program around this one may be using Hydra itself."""
    state, store = GlobalHydra.instance(), ConfigStore.instance()
    hydra, repo = state.hydra, store.repo
    state.clear()
    store.repo = {key: value for key, value in repo.items() if key == "hydra" or key.startswith("_")}
    try:
        with initialize_config_dir(str(RECIPES), version_base="1.3"):
            yield store
    finally:
        store.repo = repo
        GlobalHydra.instance().hydra = hydra


@functools.cache
def _read(file: Path) -> DictConfig:
    """Return an included recipe."""
    return cast(DictConfig, OmegaConf.load(file))


def _choose_recipe(recipe: str, command: Command[Any], store: ConfigStore) -> str:
    """Return the name of a recipe in the store, after adding it if it is given by its path."""
    if not recipe.endswith((".yaml", ".yml")) and "/" not in recipe:
        return _check_choice("recipe", recipe, list(command.recipes))
    file = Path(recipe).expanduser()
    if not file.is_file():
        raise UsageError(f"recipe={recipe}: there is no such file. Included recipes: {', '.join(command.recipes)}.")
    try:
        node = OmegaConf.load(file)
    except Exception as error:
        raise UsageError(f"recipe={recipe} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(node, DictConfig):
        raise UsageError(f"recipe={recipe} is not a recipe: it must hold settings, one `key: value` a line.")
    name = re.sub(r"\W", "_", file.stem)
    name += "_" if name in command.recipes else ""  # the user's own mae.yaml is not the included one
    store.store(group="recipe", name=name, package="_global_", node=node)
    return name


def _check_choice(group: str, name: str, names: list[str]) -> str:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        raise UsageError(
            f"{group}={name} is unknown: it is one of {', '.join(names)}"
            + (", or the path of your own .yaml file." if group == "recipe" else ".")
            + (f" Did you mean {group}={near[0]}?" if near else "")
        )
    return name
