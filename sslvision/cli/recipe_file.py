"""A recipe of one's own: a .yaml file, the output of --cfg job, or the config.yaml of a run."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from sslvision.errors import UsageError
from sslvision.runs.config import read_settings, refuse_foreign
from sslvision.runs.renamed_settings import warn

OF_A_RUN = ("name", "output_dir", "overwrite", "resume")  # settings that belong to one run, and to no other


@dataclass(frozen=True)
class RecipeFile:
    """The content of a recipe of one's own.

    Attributes:
        name: Name for run folders.
        settings: Its settings, and Hydra's `defaults`.
        texts: What is written at each key without quotes, some of which YAML reads as something else: data.root ->
            "2024_01", and not the number 202401. A list has a text for each of its values.
    """

    name: str
    settings: DictConfig
    texts: Mapping[str, str | list[str]]


def read_recipe(file: Path, given: str) -> RecipeFile:
    """Read a recipe.

    Args:
        file: The file. Of a run's config.yaml, what belongs to that run alone (its name, ...) is left out.
        given: What was given for it, for messages.

    Raises:
        UsageError: The file is not YAML, or holds no settings.
    """
    try:
        text = file.read_text(encoding="utf-8")
        settings, node = OmegaConf.load(file), yaml.compose(text, Loader=yaml.SafeLoader)
    except Exception as error:
        raise UsageError(f"recipe={given} is not valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(settings, DictConfig):
        raise UsageError(f"recipe={given} is not a recipe: it must hold settings, one `key: value` a line.")
    if not (file.name == "config.yaml" and (file.parent / "environment.json").is_file()):
        texts = {key: _at_home(text) for key, text in _texts(node)}
        return RecipeFile(re.sub(r"\W", "_", file.stem), settings, texts)
    plain = _without_those_of_the_run(read_settings(file), f"recipe={given}")
    texts = {key: _literal(text) for key, text in _texts(node) if key not in OF_A_RUN}
    return RecipeFile(file.absolute().parent.name, OmegaConf.create(_literal(plain)), texts)


def resumed_recipe(folder: Path, resume: str, given: Mapping[str, Any]) -> RecipeFile | None:
    """Return the settings of the run in a folder, to resume it without naming its recipe; None if there are none.

    Args:
        folder: The run folder.
        resume: What was given for `resume`, for messages.
        given: The settings given, by key.

    Raises:
        UsageError: They name code that is not sslvision's own.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    plain = read_settings(file)
    for section in ("method", "data"):
        values = plain.get(section)
        if isinstance(values, dict) and "_target_" in values and not {section, f"{section}._target_"} & set(given):
            refuse_foreign(section, values, file)
    warn(f"resume={resume}: no recipe is named, so the settings are those of {file}, and on top those given here.")
    return RecipeFile(folder.name, OmegaConf.create(_literal(_of_no_run(plain))), {})


def _without_those_of_the_run(plain: dict[str, Any], given: str) -> dict[str, Any]:
    left = {key: plain[key] for key in OF_A_RUN if plain.get(key)}
    if left:
        shown = ", ".join(f"{key}={str(value).lower() if value is True else value}" for key, value in left.items())
        warn(f"{given}: not taken over from that run, which has its own folder: {shown}.")
    return _of_no_run(plain)


def _of_no_run(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plain.items() if key not in OF_A_RUN}


def _literal(value: Any) -> Any:
    """Return settings of a run, which are resolved, with their strings marked as no references to other settings."""
    if isinstance(value, dict):
        return {key: _literal(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_literal(one) for one in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _texts(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, str | list[str]]]:
    if not isinstance(node, yaml.MappingNode):
        return
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if isinstance(value, yaml.MappingNode):
            yield from _texts(value, f"{key}.")
        elif isinstance(value, yaml.SequenceNode):
            if all(isinstance(one, yaml.ScalarNode) for one in value.value):
                yield key, [str(one.value) for one in value.value]
        elif value.style is None and not value.tag.endswith(":null"):
            yield key, str(value.value)


def _at_home(text: str | list[str]) -> str | list[str]:
    """Return a path that begins with ~/ with the home directory."""
    return os.path.expanduser(text) if isinstance(text, str) and text.startswith("~/") else text
