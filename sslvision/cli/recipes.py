"""Commands, their recipes, and the settings of a recipe with its data source, as Hydra composes them."""

import copy
import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from sslvision.cli.check_settings import Settings, parameters
from sslvision.cli.recipe_file import OF_A_RUN, RecipeFile, read_recipe
from sslvision.errors import UsageError
from sslvision.settings import Finetune, Predict, Pretrain, Probe, locate
from sslvision.workflows.embedding_settings import Cluster, Duplicates, Embed, Outliers, Search, Select
from sslvision.workflows.exporting_settings import Export
from sslvision.workflows.inspecting_settings import Inspect
from sslvision.workflows.packing_settings import Pack
from sslvision.workflows.report_settings import Report
from sslvision.workflows.scaling_settings import Scale
from sslvision.workflows.segmenting_settings import Segment
from sslvision.workflows.tuning_settings import Tune, TuneFinetune

_IN_WHEEL = Path(__file__).parents[1] / "recipes"
RECIPES = _IN_WHEEL if _IN_WHEEL.is_dir() else Path(__file__).parents[2] / "recipes"  # the latter in a checkout
GIVEN = "given"  # where Hydra finds a recipe of one's own
SOURCES = sorted(file.stem for file in (RECIPES / "data").glob("*.yaml"))


@dataclass(frozen=True)
class Command(Generic[Settings]):
    """A command: `python -m sslvision.<name>`.

    Attributes:
        name: Name of the command and of its folder of recipes.
        kind: Class of its settings.
        recipe: Default recipe; None if one must be named.
        folder: Folder of its recipes, if it is not the command's name.
        words: Name of the setting, a list, that words without `=` are values of; None if there must be none.
        with_run: The same command where run=... is given: what it does to pretraining, it then does to fine-tuning.
    """

    name: str
    kind: type[Settings]
    recipe: str | None = None
    folder: str | None = None
    words: str | None = None
    with_run: "Command[Any] | None" = None

    def given(self, keys: Iterable[str]) -> "Command[Any]":
        """Return the command for a command line with these keys."""
        return self if self.with_run is None or "run" not in keys else self.with_run

    @property
    def pretrains(self) -> bool:
        """Return whether its recipes are those of pretraining, which name a method, a backbone and images."""
        return issubclass(self.kind, Pretrain)

    @property
    def recipes(self) -> dict[str, Path]:
        """Return the included recipes by name; none if the command takes no recipe."""
        return {file.stem: file for file in sorted((RECIPES / (self.folder or self.name)).glob("*.yaml"))}


PRETRAIN = Command("pretrain", Pretrain)
PROBE = Command("probe", Probe)
FINETUNE = Command("finetune", Finetune, recipe="default")
PREDICT = Command("predict", Predict)
SEGMENT = Command("segment", Segment)
INSPECT = Command("inspect", Inspect)
SCALE = Command("scale", Scale, folder="pretrain")
EXPORT = Command("export", Export)
REPORT = Command("report", Report, words="run")
TUNE_FINETUNE = Command("tune", TuneFinetune, recipe="default", folder="finetune")
TUNE = Command("tune", Tune, folder="pretrain", with_run=TUNE_FINETUNE)
EMBED, PACK = Command("embed", Embed), Command("pack", Pack)
SEARCH, DUPLICATES = Command("search", Search), Command("duplicates", Duplicates)
OUTLIERS, SELECT, CLUSTER = Command("outliers", Outliers), Command("select", Select), Command("cluster", Cluster)
COMMANDS: dict[str, Command[Any]] = {
    one.name: one
    for one in (
        *(PRETRAIN, PROBE, SEGMENT, FINETUNE, PREDICT, INSPECT, SCALE, TUNE, EXPORT, REPORT),
        *(EMBED, SEARCH, DUPLICATES, OUTLIERS, SELECT, CLUSTER, PACK),
    )
}


@dataclass(frozen=True)
class Composed:
    """A recipe with a data source.

    Attributes:
        tree: Settings.
        name: The recipe's name.
        texts: See RecipeFile; empty for an included recipe.
    """

    tree: DictConfig
    name: str
    texts: Mapping[str, str | list[str]]


def compose_recipe(command: Command[Any], recipe: str | RecipeFile | None, data: str | None) -> Composed:
    """Return a command's default settings with those of a recipe and a data source.

    Args:
        command: Command to compose for.
        recipe: Name of an included recipe, path of a .yaml file, or its content; None for the command's default.
        data: Name of a data source, which replaces the recipe's; None for the recipe's.

    Raises:
        UsageError: No such recipe or data source, or a file that is not a recipe.
        HydraException: The recipe's defaults cannot be composed.
    """
    if isinstance(recipe, RecipeFile) or (recipe is not None and _is_path(recipe)):
        return _compose(command, recipe, data)
    composed = _compose_included(command, recipe, data)
    return replace(composed, tree=copy.deepcopy(composed.tree))  # the caller's own, to change


@functools.cache  # takes Hydra a quarter of a second, for each run of a sweep
def _compose_included(command: Command[Any], recipe: str | None, data: str | None) -> Composed:
    return _compose(command, recipe, data)


def _compose(command: Command[Any], recipe: str | RecipeFile | None, data: str | None) -> Composed:
    choices, name, own, kept = [], command.name, None, OmegaConf.create()
    with _hydra() as store:
        if command.recipes:
            recipe = recipe or command.recipe
            if recipe is None:
                known = ", ".join(command.recipes)
                raise UsageError(f"No recipe: say recipe=NAME, one of {known}, or the path of your own .yaml file.")
            for one, file in command.recipes.items():
                store.store(group="recipe", name=one, package="_global_", node=_read(file))
            if isinstance(recipe, str) and not _is_path(recipe):
                name = _check_choice("recipe", recipe, list(command.recipes))
            else:
                own = recipe if isinstance(recipe, RecipeFile) else _own_recipe(recipe, command)
                if data is not None:
                    own, kept = _without_source(own, data)
                name = f"{own.name}_" if own.name in command.recipes else own.name  # one's own mae.yaml is another
                store.store(group="recipe", name=GIVEN, package="_global_", node=own.settings)
            choices.append(f"recipe={name if own is None else GIVEN}")
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
    if kept:
        composed.data = OmegaConf.merge(composed.data, kept)
    return Composed(composed, name, own.texts if own else {})


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
    if not command.pretrains and "data" in kind.sections:
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
    """Return an included recipe or data source."""
    return cast(DictConfig, OmegaConf.load(file))


def _is_path(recipe: str) -> bool:
    return recipe.endswith((".yaml", ".yml")) or "/" in recipe


def _own_recipe(recipe: str, command: Command[Any]) -> RecipeFile:
    """Return a recipe given by its path."""
    file = Path(recipe).expanduser()
    if file.is_dir() and (file / "config.yaml").is_file():
        raise UsageError(
            f"recipe={recipe} is a folder: the settings of that run are recipe={recipe.rstrip('/')}/config.yaml."
        )
    if not file.is_file():
        raise UsageError(f"recipe={recipe}: there is no such file. Included recipes: {', '.join(command.recipes)}.")
    own = read_recipe(file, recipe)
    for other in COMMANDS.values():
        if issubclass(command.kind, other.kind):  # a ladder takes the settings of a pretraining run
            continue
        theirs, ours = ({f.name for f in fields(one.kind)} - {*OF_A_RUN} for one in (other, command))
        if theirs - set(own.settings) == set() != ours - set(own.settings):
            raise UsageError(
                f"recipe={recipe} holds the settings of {other.name}, not of {command.name}: use it with "
                f"python -m sslvision.{other.name}."
            )
    return own


def source_target(source: str) -> str:
    """Return the `_target_` of a data source."""
    return str(_read_source(source)._target_)


def _read_source(source: str) -> DictConfig:
    return _read(RECIPES / "data" / f"{source}.yaml")


def _without_source(own: RecipeFile, data: str) -> tuple[RecipeFile, DictConfig]:
    """Return a recipe without the data source that it holds, since `data` names one; and what stays in effect.

    That is what any source can have (workers, cache, ...), and of the same source all.
    """
    section = own.settings.get("data")
    if not isinstance(section, DictConfig) or "_target_" not in section or data not in SOURCES:
        return own, OmegaConf.create()
    same = section._target_ == source_target(data)
    of_source = {"_target_"} if same else {"_target_", *parameters(locate("data", section._target_))}
    plain = cast(dict[str, Any], OmegaConf.to_container(own.settings, resolve=False))
    default = next((_read_source(one) for one in SOURCES if source_target(one) == section._target_), OmegaConf.create())
    kept = {
        key: value
        for key, value in plain.pop("data").items()
        if key not in of_source and (same or value != default.get(key))
    }
    texts = {
        key: text for key, text in own.texts.items() if key.removeprefix("data.") in kept or not key.startswith("data.")
    }
    return RecipeFile(own.name, OmegaConf.create(plain), texts), OmegaConf.create(kept)


def _check_choice(group: str, name: str, names: list[str]) -> str:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        raise UsageError(
            f"{group}={name} is unknown: it is one of {', '.join(names)}"
            + (", or the path of your own .yaml file." if group == "recipe" else ".")
            + (f" Did you mean {group}={near[0]}?" if near else "")
        )
    return name
