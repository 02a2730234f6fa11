"""From the text of a setting to its value: literal where the setting is a string, Hydra's grammar of values elsewhere."""

import functools
import inspect
import os
import re
import typing
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from sslvision.errors import UsageError


def value_of(key: str, text: str, kind: Any) -> Any:
    """Return the value that a text stands for.

    Args:
        key: Key of the setting, for messages.
        text: Text after `key=`.
        kind: Declared type of the setting; Any if there is none.

    Raises:
        UsageError: The text cannot be read, or gives several values, which only a sweep has.
    """
    if is_text(kind):
        return literal(text)
    if is_text_list(kind) and text.lower() != "null":  # a,b is short for [a,b]
        inside = text[1:-1] if text.startswith("[") and text.endswith("]") else text
        return [literal(one) for one in split_at_commas(inside)]
    found = _parse(text)
    if isinstance(found, Override):
        if found.is_sweep_override():
            raise UsageError(
                f"{key}={text} gives several values. For a sweep, one run for each of them, add -m; a list is written "
                f"{key}=[{text}]."
            )
        return found.value()
    if _may_be_text(kind):
        return literal(text)
    raise UsageError(f"Cannot read the command line: {key}={text}: {found}")


def sweep_values(key: str, text: str) -> list[str]:
    """Return the values that a setting takes in a sweep, as texts: those of a,b or of range(...), or the only one."""
    found = _parse(text)
    if not isinstance(found, Override):
        return split_at_commas(text)
    if not found.is_sweep_override():
        return [text]
    values = found.value()
    if isinstance(values, ChoiceSweep) and values.simple_form:
        return split_at_commas(text)
    try:
        return [str(value) for value in found.sweep_string_iterator()]
    except Exception as error:
        raise UsageError(f"{key}={text} cannot be swept over: {_first_line(error)}") from error


def literal(text: str) -> str | None:
    """Return a text as it stands, without one pair of quotes around it; `null` is None, and ~/ the home directory."""
    if text.lower() == "null":
        return None
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        inside = text[1:-1]
        if not re.search(rf"(?<!\\){text[0]}", inside):
            return inside.replace(f"\\{text[0]}", text[0])
    return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text


def split_at_commas(text: str) -> list[str]:
    """Return the parts of a text between its commas, except commas in quotes or brackets."""
    parts, depth, quote = [""], 0, ""
    for place, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote and text[place - 1] != "\\" else quote
        elif letter in "'\"" and not parts[-1].strip():  # an apostrophe within a word is no quote
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append("")
            continue
        parts[-1] += letter
    parts = [part.strip() for part in parts]
    return parts if any(parts) else []


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _parse(text: str) -> Override | str:
    """Return a text as Hydra reads it, or, if it cannot, why not."""
    try:
        return _parser().parse_override(f"key={text}")
    except HydraException as error:
        return _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _members(kind: Any) -> list[Any]:
    """Return the types of a union without None; of any other type, that one."""
    union = typing.get_origin(kind) in (typing.Union, UnionType)
    return [one for one in typing.get_args(kind) if one is not NoneType] if union else [kind]


def is_text(kind: Any) -> bool:
    """Return whether a type is that of strings or paths, or one of several given strings."""
    return all(
        one in (str, Path)
        or typing.get_origin(one) is os.PathLike
        or (typing.get_origin(one) is Literal and all(isinstance(value, str) for value in typing.get_args(one)))
        for one in _members(kind)
    )


def is_text_list(kind: Any) -> bool:
    """Return whether a type is that of lists of strings."""
    return all(
        typing.get_origin(one) in (list, tuple) and all(part in (str, Ellipsis) for part in typing.get_args(one))
        for one in _members(kind)
    )


def _may_be_text(kind: Any) -> bool:
    return kind in (Any, inspect.Parameter.empty) or any(one is str or isinstance(one, str) for one in _members(kind))
