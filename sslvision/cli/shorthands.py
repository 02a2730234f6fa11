"""Short forms: data=/path, backbone=NAME, data.root= without data=folder, and resume= without a recipe."""

import difflib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sslvision.cli.check_settings import parameters
from sslvision.cli.recipe_file import RecipeFile, resumed_recipe
from sslvision.cli.recipes import SOURCES, Command, source_target
from sslvision.errors import UsageError
from sslvision.runs.renamed_settings import warn
from sslvision.settings import locate
from sslvision.system.checkpoint_folders import is_folder_of_shards

_NAMED = {
    "method": "a method is chosen by its recipe: recipe=mae, recipe=dino, ... Its settings are method.KEY=...",
    "trainer": "options of the Lightning Trainer are given one by one: trainer.accelerator=..., trainer.devices=...",
}

FILES = {  # a source, its setting, and the endings of its files
    "folder": ("data.root", (".zip", ".tar")),
    "list": ("data.file", (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")),
}


class ExistingPath(str):
    """A path that has been read: it is taken literally from here on."""


def in_full(given: Mapping[str, Any], command: Command[Any]) -> dict[str, Any]:
    """Return what is given, with data=/path as data=folder data.root=/path or the like, and backbone=NAME in full.

    Raises:
        UsageError: There is no such folder, the long form is given too, or a section is given a value.
    """
    full = dict(given)
    for key, told in _NAMED.items():
        if key in command.kind.sections and _is_word(full.get(key)):
            raise UsageError(f"{key}={full[key]} is not a setting: {told}")
    long = {}
    if "backbone" in command.kind.sections and _is_word(full.get("backbone")):
        long["backbone.name"] = full.pop("backbone")
    data = full.get("data")
    if "data" in command.kind.sections and isinstance(data, str):
        if data in SOURCES:
            if os.path.isdir(data):
                warn(f"data={data} is the source of that name; the folder of that name is data=./{data}.")
        else:
            full["data"], key, path = source_of(data)
            long[key] = ExistingPath(path)
    for key, value in long.items():
        if key in full:
            raise UsageError(
                f"{key} is given twice, as {key.split('.')[0]}={value} and by its full name; give it once."
            )
    return full | long


def _is_word(value: Any) -> bool:
    several = isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    return bool(several) or (isinstance(value, str) and value != "")


def source_of(data: str) -> tuple[str, str, str]:
    """Return what data=... names where it is not the name of a source: the source, its setting, and the path.

    A folder is a folder of images, and a file is a list of images, by its ending.

    Raises:
        UsageError: There is no such folder, or it is another file.
    """
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        return "folder", "data.root", path
    known = f"It is one of {', '.join(SOURCES)}, or the path of a folder or a list of images."
    if os.path.exists(path):
        ending = os.path.splitext(path.removesuffix(".gz"))[1].lower()
        for source, (key, endings) in FILES.items():
            if ending in endings:
                return source, key, path
        raise UsageError(f"data={data} is a file. {known}")
    if os.sep in data or data.startswith((".", "~")):
        raise UsageError(f"data={data}: there is no such folder. {known}")
    from sslvision.data.sources.torchvision_sets import SPLITS  # imports torch

    sets = {name.lower(): f"torchvision data.name={name} data.root=..." for name in SPLITS}
    named = {source: source for source in SOURCES} | sets
    near = difflib.get_close_matches(data.lower().replace("-", ""), named, n=1, cutoff=0.6)
    told = f" Did you mean data={named[near[0]]}?" if near else ""
    raise UsageError(f"data={data} is unknown, and there is no folder of that name. {known}{told}")


def implied_source(given: Mapping[str, Any], target: str | None, *, chosen: bool) -> str | None:
    """Return the source that data.root=... implies, where the source in effect has no such setting; None if it implies none.

    Args:
        given: The settings given, by key.
        target: `_target_` of the source in effect, if there is one.
        chosen: Whether that source was given, by data=...

    Raises:
        UsageError: Other settings are of another source, which is named.
    """
    keys = {key.removeprefix("data.") for key in given if key.startswith("data.")}
    present = parameters(locate("data", target)) if target else {}
    if None in present or not keys - set(present):
        return None
    offered: dict[str, set[Any]] = {
        source: set(parameters(locate("data", source_target(source)))) for source in SOURCES
    }
    unknown = (keys - set(present)) & set.union(*offered.values())  # the others are of the loader, or do not exist
    fitting = [source for source, names in offered.items() if unknown <= names]
    now = next((source for source in SOURCES if source_target(source) == target), target)
    if not unknown or not fitting:
        return None
    if "root" in unknown and "folder" in fitting and not chosen:
        instead = f", and not data={now}, which has no data.root" if now else ""
        warn(f"data.root={given['data.root']}: data=folder is used{instead}.")
        return "folder"
    shown = " and ".join(f"data.{key}" for key in sorted(unknown))
    of = f"data={now}, the source of this run, has no setting {shown}" if now else f"No source of images for {shown}"
    raise UsageError(f"{of}: give {' or '.join(f'data={source}' for source in fitting)}{' instead' if chosen else ''}.")


def recipe_to_resume(given: Mapping[str, Any], read: Callable[[str], Any], command: Command[Any]) -> RecipeFile | None:
    """Return the settings of the run that `resume` names, where no recipe is named; None where nothing is resumed.

    Args:
        given: The settings given.
        read: Returns the value of one of them.
        command: The command.

    Raises:
        UsageError: There is no such run, and too little is given to start it.
    """
    resume = read("resume") if "resume" in given and "recipe" not in given else None
    if resume is None or not command.recipes:
        return None
    folder = _run_to_resume(resume, *(read(key) if key in given else None for key in ("name", "output_dir", "dry_run")))
    if folder is not None and (found := resumed_recipe(folder, resume, given)) is not None:
        return found
    if not command.pretrains and "run" in given:  # a job that may start or resume
        return None
    if folder is None:
        raise UsageError("resume=auto needs to know which run folder: give name=... or output_dir=...")
    near = difflib.get_close_matches(
        folder.name, [file.parent.name for file in folder.parent.glob("*/config.yaml")], n=1
    )
    told = f" Did you mean name={near[0]}?" if near and not given.get("output_dir") else ""
    start = "recipe=NAME" if command.pretrains else "run=..."
    if resume != "auto" and not folder.exists():
        raise UsageError(
            f"resume={resume}: there is no such checkpoint or run folder. {_WHAT_TO_RESUME} To start a run that a later call "
            f"resumes, add {start}."
        )
    raise UsageError(
        f"resume={resume}: there is no run in {folder} (no config.yaml).{told} To start one that a later call resumes, add "
        f"{start}."
    )


_WHAT_TO_RESUME = "Give the path of a .ckpt file, or resume=auto with the name= or output_dir= of a run."


def _run_to_resume(resume: str, name: Any, output_dir: Any, dry_run: Any) -> Path | None:
    if resume != "auto":
        given = Path(resume)
        return given.absolute().parent.parent if given.is_file() or is_folder_of_shards(given) else given
    if output_dir is None and name is None:
        return None
    folder = Path(output_dir) if output_dir is not None else Path("outputs") / str(name)
    is_dry = dry_run and dry_run != "plan" and "-dry-run" not in folder.name
    return folder.with_name(f"{folder.name}-dry-run") if is_dry else folder
