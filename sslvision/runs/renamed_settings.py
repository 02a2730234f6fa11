"""Settings that have changed their names. The old names still work; a line on stderr tells the new ones.

The table is applied wherever settings are read: the command line, recipes, and the config.yaml and checkpoints of earlier runs.
"""

import functools
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any

from sslvision.errors import UsageError
from sslvision.settings import locate

RENAMED = {
    "memory": "activation_checkpointing",
    "method.centre_momentum": "method.center_momentum",
    "method.grey": "method.gray",
    "method.unit_prototypes": "method.norm_last_layer",
    "method.decoder_width": "method.decoder_embed_dim",
    "method.decoder_heads": "method.decoder_num_heads",
}
VALUES: dict[str, dict[str, Any]] = {"memory": {"low": True, "normal": False}}
MOVED = {  # modules named by the `_target_` of a section
    "sslvision.data.digits": "sslvision.data.sources.digits",
    "sslvision.data.embedded": "sslvision.data.sources.embedded",
    "sslvision.data.folder": "sslvision.data.sources.folder",
    "sslvision.data.torchvision_sets": "sslvision.data.sources.torchvision_sets",
}


def renamed(settings: Mapping[str, Any], where: str, *, trusted: bool = False) -> dict[str, Any]:
    """Return settings under their current names.

    Args:
        settings: Settings by key; those of a section in a dictionary of their own.
        where: Where they were read, for the warning.
        trusted: Whether a method that is not sslvision's own may be imported to see which names are its own.

    Raises:
        UsageError: An old setting has a value it never had.
    """
    found = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for section in ("method", "data"):
        if isinstance(values := found.get(section), dict) and "_target_" in values:
            values["_target_"] = current_target(values["_target_"])
    method = found.get("method")
    target = method.get("_target_") if isinstance(method, dict) else None
    told = []
    for old, new in RENAMED.items():
        section, _, name = old.rpartition(".")
        values = found.get(section) if section else found
        if isinstance(values, dict) and name in values and current_name(old, target, trusted=trusted) == new:
            values[new.rpartition(".")[2]] = current_value(old, values.pop(name))
            told.append(f"{old} is now {new}")
    if told:
        warn(f"{where} uses old names of settings, which still work: {'; '.join(told)}.")
    return found


def current_name(key: str, method: Any, *, trusted: bool) -> str:
    """Return the current name of a setting.

    Args:
        key: Old or current name, with its section.
        method: `_target_` of the method; one that is not sslvision's own may have a setting with a name that is old here.
        trusted: Whether that method may be imported to see.
    """
    new = RENAMED.get(key, key)
    if new == key or not key.startswith("method.") or str(method).startswith("sslvision."):
        return new
    if method is None or not trusted:
        return key
    return key if key.removeprefix("method.") in inspect.signature(locate("method", method)).parameters else new


def current_value(old: str, value: Any) -> Any:
    """Return the value that a setting's current name takes for the value of its old name."""
    if (values := VALUES.get(old)) is None:
        return value
    if not isinstance(value, str) or value not in values:
        known = ", ".join(f"{old}={one} is now {RENAMED[old]}={str(new).lower()}" for one, new in values.items())
        raise UsageError(f"{old}={value} is unknown: {known}.")
    return values[value]


def current_target(target: Any) -> Any:
    """Return the current place of a class or function that a `_target_` names."""
    module, _, name = str(target).rpartition(".")
    return f"{MOVED[module]}.{name}" if module in MOVED else target


@functools.cache
def warn(line: str) -> None:
    """Print a line to stderr, once, in the first process of a run."""
    if os.environ.get("LOCAL_RANK", "0") == os.environ.get("SLURM_PROCID", "0") == "0":
        print(line, file=sys.stderr)
