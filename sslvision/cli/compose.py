"""From what a user gives to checked settings, once for each run.

words of a command line  ->  texts by key      words.py
recipe and data source   ->  a tree of settings, composed by Hydra (recipes.py)
every other key          ->  a value by its declared type (values.py), set in that tree
the tree                 ->  checked settings  check_settings.py
"""

import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, cast

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, InterpolationResolutionError, OmegaConfBaseException

from sslvision.cli.check_settings import Settings, checked, known_keys, parameters
from sslvision.cli.recipes import PRETRAIN, Command, compose_recipe
from sslvision.cli.shorthands import ExistingPath, implied_source, in_full, recipe_to_resume
from sslvision.cli.values import is_text, is_text_list, value_of
from sslvision.cli.words import Words, join_words, split_words
from sslvision.errors import UsageError
from sslvision.runs.config import config_file, read_settings, refuse_foreign
from sslvision.runs.redaction import REDACTED
from sslvision.runs.renamed_settings import current_name, current_target, current_value, renamed, warn
from sslvision.settings import locate
from sslvision.workflows.search_space import flat_ranges, parse_space

_REMOVED = object()  # the value of a key given as ~key
Read = Callable[[str, Any, Any], Any]  # from a key, what was given for it, and its declared type, to its value


@dataclass(frozen=True)
class Run(Generic[Settings]):
    """One run, composed and checked.

    Attributes:
        settings: Its settings.
        recipe: Name of its recipe; of the command, if that takes none.
        words: The command line of this run alone.
        suffix: Ending of the run folder's name: its number in a sweep, or nothing.
    """

    settings: Settings
    recipe: str
    words: list[str]
    suffix: str = ""


def compose_settings(words: Sequence[str], command: Command[Settings] = PRETRAIN) -> Settings:  # type: ignore[assignment]
    """Return the checked settings of a command line of a single run.

    Raises:
        UsageError: An unknown or repeated key, an unknown recipe, a value of the wrong type or range.
    """
    return compose_texts(split_words(words).settings, command).settings


def compose_runs(words: Words, command: Command[Settings]) -> list[Run[Settings]]:
    """Return the runs of a command line, all of them checked.

    Raises:
        UsageError: As compose_settings, for any of the runs.
    """
    if not words.sweep:
        return [compose_texts(words.settings, command)]
    return [compose_texts(point, command, suffix=f"-{number}") for number, point in enumerate(words.points())]


def compose_texts(texts: Mapping[str, str | None], command: Command[Settings], suffix: str = "") -> Run[Settings]:
    """Return the run of settings given as texts; None removes a key."""

    def read(key: str, text: Any, kind: Any) -> Any:
        if not isinstance(text, str):  # to be removed, or the value of an old name
            return text
        is_path = key in ("recipe", "data") and os.path.exists(os.path.expanduser(text))
        return value_of(key, text, str if is_path else kind)

    given = {key: _REMOVED if text is None else text for key, text in texts.items()}
    settings, recipe = _compose(given, command.given(given), read)
    return Run(settings, recipe, join_words(texts), suffix)


def compose_values(values: Mapping[str, Any], command: Command[Settings]) -> Run[Settings]:
    """Return the run of settings given as Python values, those of a section also in a dictionary of their own."""
    given: dict[str, Any] = {}
    for key, value in values.items():
        in_section = key in command.kind.sections and isinstance(value, Mapping)
        for name, one in (
            {f"{key}.{name}": one for name, one in value.items()}.items() if in_section else [(key, value)]
        ):
            if name in given:
                raise UsageError(f"{name} is given twice; give it once.")
            given[name] = _plain(name, one)
    settings, recipe = _compose(given, command.given(given), lambda key, value, kind: value)
    return Run(settings, recipe, [f"{key}={_written(value)}" for key, value in given.items()])


def _compose(given: Mapping[str, Any], command: Command[Settings], read: Read) -> tuple[Settings, str]:
    """Compose the recipe, set what is given in it, and check the whole; return the settings and the recipe's name."""
    sections, texts = command.kind.sections, ("recipe", "resume", "name", "output_dir")
    words = {
        key: read(key, value, _kind_of_word(key, command))
        for key, value in given.items()
        if key in sections or (key == "recipe" and command.recipes)
    }
    given = in_full({**given, **{key: value for key, value in words.items() if value is not _REMOVED}}, command)
    choices = {key: given[key] for key in ("recipe", "data") if key in words}
    for key, value in choices.items():
        if not isinstance(value, str):
            raise UsageError(f"{key} is chosen by name: {key}=NAME.")
    recipe = choices.get("recipe") or recipe_to_resume(
        {key: value for key, value in given.items() if value is not _REMOVED},
        lambda key: read(key, given[key], str if key in texts else bool),
        command,
    )
    try:
        composed = compose_recipe(command, recipe, choices.get("data"))
        if "data" in sections and "data._target_" not in given:
            target = _target_of_data(composed.tree, read("run", given.get("run"), str))
            if (source := implied_source(given, target, chosen="data" in choices)) is not None:
                composed = compose_recipe(command, recipe, source)
        where = f"recipe={choices.get('recipe')}"
        tree = OmegaConf.create(renamed(_plain_tree(composed.tree, resolve=False), where, trusted=True))
        rest = {key: value for key, value in given.items() if key not in choices}
        _set_all(tree, rest, composed.texts, command, read)
        settings = _plain_tree(tree, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_told(error)) from error
    for key in _redacted(settings):
        raise UsageError(f"{key} is not kept in the files of a run, as it is a secret: give it again, {key}=...")
    if settings.get("ranges"):
        settings["ranges"] = _ranges(settings, command)
    result = checked(settings, command.kind)
    searches = hasattr(result, "ranges")
    lengths = [name for name in ("budget", "max_steps") if getattr(result, name, None) is not None and not searches]
    if len(lengths := ["epochs"] * ("epochs" in given) + lengths) > 1:
        told = " and ".join(f"{name}={settings[name]}" for name in lengths)
        raise UsageError(
            f"{told} are {len(lengths)} lengths of one run: give one of them (~{lengths[-1]} removes that of a recipe)."
        )
    return result, composed.name


def _ranges(settings: dict[str, Any], command: Command[Any]) -> dict[str, Any]:
    """Return the ranges of a search by their full keys, after checking that the settings of their ends are possible.

    Raises:
        UsageError: A range or its setting is unknown, or an end has the wrong type or range.
    """
    ranges = {_full_key(key, command): text for key, text in flat_ranges(settings["ranges"]).items()}
    for key, one in parse_space(ranges).items():
        for value in one.extremes():
            tree = OmegaConf.create({name: part for name, part in settings.items() if name != "ranges"})
            OmegaConf.update(tree, "ranges", ranges, force_add=True)
            OmegaConf.update(tree, key, one.setting(value), force_add=True)
            try:
                checked(_plain_tree(tree, resolve=False), command.kind)
            except UsageError as error:
                raise UsageError(f"ranges.{key}, at {value}: {error}") from error
    return ranges


def _kind_of_word(key: str, command: Command[Any]) -> Any:
    """Return the type of backbone=... where it is short for several names; of what else is given for a section, any."""
    names = parameters(locate(key, command.kind.sections[key])).get("name") if key == "backbone" else Any
    return names if is_text_list(names) else Any


def _target_of_data(tree: DictConfig, run: Any) -> str | None:
    """Return the data source of a recipe, or of a run, if the recipe has none."""
    target = (tree.get("data") or {}).get("_target_")
    run = tree.get("run") if run is None else run
    return target if target is not None or run in (None, _REMOVED) else data_of(run).get("_target_")


def _told(error: Exception) -> str:
    """Return the first line of an error of Hydra or OmegaConf, with how to write what it took for a reference."""
    first = str(error).strip().splitlines()[0]
    if isinstance(error, InterpolationResolutionError | GrammarParseError):
        where = f"{error.full_key}: " if error.full_key else ""
        return f"{where}{first}. In a value ${{...}} is a reference to another setting; to mean the characters, write \\${{."
    return first


def _set_all(
    tree: DictConfig, given: Mapping[str, Any], texts: Mapping[str, Any], command: Command[Settings], read: Read
) -> None:
    """Set what is given in the composed tree, under full and current keys, as values of the declared types.

    Strings of the recipe become what is written there: `texts`, by key.
    """
    full: dict[str, Any] = {}
    for short, value in given.items():
        if (key := _full_key(short, command)) in full:
            raise UsageError(f"{key} is given twice; give it once.")
        full[key] = value
    # First what tells the types of the others.
    for key in [key for key, value in full.items() if key.endswith("._target_") and value is not _REMOVED]:
        OmegaConf.update(tree, key, current_target(read(key, full.pop(key), str)), force_add=True)
    if "data" in command.kind.sections and full.get("run", _REMOVED) is not _REMOVED:
        OmegaConf.update(tree, "run", read("run", full.pop("run"), str))
    needs_data = "data" in command.kind.sections and "_target_" not in (tree.get("data") or {})
    if needs_data and tree.get("run") is not None:
        tree.data = _plain("data", data_of(tree.run))
    full = _current(full, OmegaConf.select(tree, "method._target_")) if "method" in tree else full
    if command.pretrains and "backbone.name" in full:
        _drop_options_of_another_backbone(tree, read("backbone.name", full["backbone.name"], str))
    known = known_keys(_plain_tree(tree, resolve=False), command.kind)
    for key, written in texts.items():
        section, _, name = key.rpartition(".")
        kind = known.get(section, {}).get(name, Any)
        if OmegaConf.select(tree, key) is not None and (is_text_list if isinstance(written, list) else is_text)(kind):
            OmegaConf.update(tree, key, written, merge=False)
    for key, value in full.items():
        if value is _REMOVED:
            _remove(tree, key)
            continue
        section, _, name = key.rpartition(".")
        kind = known.get(section, {}).get(name, str if key.split(".")[0] == "ranges" else Any)
        value = _plain(key, str(value)) if isinstance(value, ExistingPath) else read(key, value, kind)
        OmegaConf.update(tree, key, value, merge=True, force_add=True)


def _drop_options_of_another_backbone(tree: DictConfig, name: Any) -> None:
    """Remove the recipe's options of its own backbone if another one is named; image size and pooling stay."""
    options = tree.get("backbone") or {}
    if options.get("name") != name:
        for key in set(options) - {"name", "image_size", "pool"}:
            del options[key]


def _full_key(key: str, command: Command[Any]) -> str:
    """Return a key with its section: settings of the method may be written without."""
    kind = command.kind
    top_level = key.split(".")[0] in kind.sections or key in {field.name for field in fields(kind)}
    if top_level or "method" not in kind.sections or current_name(key, None, trusted=False) != key:
        return key
    return f"method.{key}"


def _current(given: Mapping[str, Any], method: Any) -> dict[str, Any]:
    """Return what is given under its current names, and tell those that have changed."""
    found: dict[str, Any] = {}
    for old, value in given.items():
        key = current_name(old, method, trusted=True)
        if key != old and value is not _REMOVED:
            value = current_value(old, value)
            warn(f"{old} is now {key}. The old name still works; the new form is {_short(key)}={_written(value)}.")
        if key in found:
            raise UsageError(f"{key} is given twice, by its old name and by its current one; give it once.")
        found[key] = value
    return found


def _remove(tree: DictConfig, key: str) -> None:
    section, _, name = key.rpartition(".")
    values = OmegaConf.select(tree, section) if section else tree
    if not isinstance(values, DictConfig) or name not in values:
        raise UsageError(f"~{_short(key)}: the recipe has no such setting to remove.")
    del values[name]


def data_of(run: Any) -> dict[str, Any]:
    """Return the data section of a run, given its folder; empty if it is not a run's.

    Raises:
        UsageError: The section names code that is not sslvision's own.
    """
    if (file := config_file(str(run))) is None:
        return {}
    section = cast(dict[str, Any], read_settings(file, ("data",))["data"])
    if section:
        refuse_foreign("data", section, file)
    return section


def _plain_tree(tree: DictConfig, *, resolve: bool) -> dict[str, Any]:
    return cast(dict[str, Any], OmegaConf.to_container(tree, resolve=resolve))


def _redacted(value: Any, key: str = "") -> Iterator[str]:
    """Yield the keys whose values were left out of the files of a run."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield from _redacted(one, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, str) and REDACTED in value:
        yield key


def _plain(key: str, value: Any) -> Any:
    """Return a Python value as settings hold it, in plain containers."""
    if isinstance(value, Mapping):
        return {str(name): _plain(f"{key}.{name}", one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(key, one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, str):
        return value.replace("${", "\\${")  # a string, and no reference to another setting
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # numpy's
        return value.item()
    if value is None or isinstance(value, bool | int | float):
        return value
    raise UsageError(
        f"{key}={value!r}: settings are numbers, strings, booleans, None, and lists and dictionaries of them."
    )


def _written(value: Any) -> str:
    """Return a value as it is written on a command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, list):
        return f"[{','.join(_written(one) for one in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(one)}" for key, one in value.items()) + "}"
    return str(value)


def _short(key: str) -> str:
    return key.removeprefix("method.")
