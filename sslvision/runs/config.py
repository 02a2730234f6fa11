"""What the files of an earlier run tell. They may come from anybody, so what they name is run only if it is sslvision's own."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sslvision.errors import UsageError
from sslvision.settings import MOVED, locate


def config_file(run: str | Path) -> Path | None:
    """Return the config.yaml of the run that a folder, or the export/ in it, is of; None if there is none."""
    files = (folder / "config.yaml" for folder in (Path(run), Path(run).parent))
    return next((file for file in files if file.is_file()), None)


def read_settings(file: Path, sections: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings in a run's config.yaml as plain containers.

    Args:
        file: to read.
        sections: that are to be sections; missing ones are empty.

    Raises:
        UsageError: it is no such file.
    """
    try:
        told = yaml.safe_load(file.read_text())  # safe: builds plain containers alone
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{file} cannot be read as the settings of a run: {reason}") from error
    found = {**{section: {} for section in sections}, **told} if isinstance(told, dict) else {}
    if wrong := [section for section in sections if not isinstance(found.get(section), dict)]:
        raise UsageError(f"{file} is not as sslvision writes it: it has no section {' and no section '.join(wrong)}.")
    return found


def refuse_foreign(section: str, told: Mapping[str, Any], file: Path) -> None:
    """Raise UsageError if the `_target_` of a section in a run's file is not a method or a data source of sslvision's own."""
    target, home = str(told.get("_target_")), {"method": "methods", "data": "data.sources"}[section].replace(".", r"\.")
    module, _, _ = target.rpartition(".")
    module = MOVED.get(module, module)
    # Of that module itself: sslvision.data.sources.folder.os.system is none of ours.
    if (
        re.fullmatch(rf"sslvision\.{home}\.\w+", module)
        and getattr(locate(section, target), "__module__", "") == module
    ):
        return
    raise UsageError(
        f"{file} names {section}._target_={target}, which is not sslvision's own. Files of a run may come from anybody, so "
        f"nothing that they name is run. If you trust it, name it yourself: {section}._target_=... and what it needs, on "
        "the command line or in a recipe of your own."
    )
