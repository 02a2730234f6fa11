"""The config.yaml of an earlier run. It may come from anybody, so only sslvision's own code that it names is run."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sslvision.errors import UsageError
from sslvision.runs.renamed_settings import renamed
from sslvision.settings import locate


def config_file(run: str | Path) -> Path | None:
    """Return the config.yaml of a run, given its folder or the export/ in it; None if there is none."""
    files = (folder / "config.yaml" for folder in (Path(run), Path(run).parent))
    return next((file for file in files if file.is_file()), None)


def read_settings(file: Path, sections: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings in a run's config.yaml as plain containers, under their current names.

    Args:
        file: File to read.
        sections: Keys that must hold sections; missing ones are empty.

    Raises:
        UsageError: The file cannot be read, or is not a config.yaml of a run.
    """
    try:
        content = yaml.safe_load(file.read_text())  # safe_load builds plain containers only
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{file} cannot be read as the settings of a run: {reason}") from error
    found = {**{section: {} for section in sections}, **content} if isinstance(content, dict) else {}
    if wrong := [section for section in sections if not isinstance(found.get(section), dict)]:
        raise UsageError(f"{file} is not as sslvision writes it: it has no section {' and no section '.join(wrong)}.")
    return renamed(found, str(file))


def refuse_foreign(section: str, values: Mapping[str, Any], file: Path) -> None:
    """Raise UsageError if the `_target_` of a section in a run's file is not one of sslvision's methods or data sources."""
    target, home = str(values.get("_target_")), {"method": r"methods", "data": r"data\.sources"}[section]
    module, _, _ = target.rpartition(".")
    # Defined in that module: sslvision.data.sources.folder.os.system is not.
    if (
        re.fullmatch(rf"sslvision\.{home}\.\w+", module)
        and getattr(locate(section, target), "__module__", "") == module
    ):
        return
    raise UsageError(
        f"{file} names {section}._target_={target}, which is not part of sslvision. The files of a run may come from anybody, "
        f"so nothing else that they name is run. If you trust it, name it yourself: {section}._target_=... and what it needs, "
        "on the command line or in your own recipe."
    )
