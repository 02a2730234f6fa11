"""What a search varies: settings and their ranges, as values, points of a grid, and changed settings.

log(1e-4,1e-2)      numbers whose logarithms are uniform
uniform(0.5,0.9)    numbers
int(2,6)            whole numbers, both ends included
choice(a,b,c)       what is listed: numbers, true, false, null, words, [lists]
"""

import dataclasses
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from sslvision.errors import UsageError
from sslvision.settings import Finetune, Pretrain

Settings = TypeVar("Settings", bound=Pretrain | Finetune)
Values = dict[str, Any]  # by key: numbers of a range; of a choice the text as it was written

FORMS = "log(1e-4,1e-2), uniform(0.5,0.9), int(2,6), or choice(a,b,c)"
RATES = ("lr", "base_lr", "lr_ratio")  # the first of them that is given is in effect
SEARCHABLE = (
    *RATES,
    "batch_size",
    "seed",
    "randaugment",
    "head_first",
    "scratch_lr_ratio",
)  # besides method and backbone


@dataclass(frozen=True)
class Range:
    """The values that a setting takes.

    Attributes:
        kind: How they are spread.
        low, high: Ends of a range of numbers.
        choices: What is listed, as it was written.
    """

    kind: Literal["log", "uniform", "int", "choice"]
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def at(self, share: float) -> Any:
        """Return the value at a share from 0 to 1 of the range."""
        if self.kind == "choice":
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        if self.kind == "int":
            return min(int(self.low + share * (self.high - self.low + 1)), int(self.high))
        if self.kind == "log":
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def points(self, number: int) -> list[Any]:
        """Return evenly spread values: both ends and those between; of a choice all."""
        if self.kind == "choice":
            return [*self.choices]
        if self.kind == "int":
            whole = [round(self.low + (self.high - self.low) * place / max(1, number - 1)) for place in range(number)]
            return list(dict.fromkeys(whole))
        return list(dict.fromkeys(self.at(place / max(1, number - 1)) for place in range(number)))

    def extremes(self) -> list[Any]:
        """Return the values to try settings with: both ends, or all that is listed."""
        return self.points(2)

    def setting(self, value: Any) -> Any:
        """Return the value of the setting that a value of the range stands for."""
        return read_word(value) if self.kind == "choice" else value


def parse_range(key: str, text: Any) -> Range:
    """Read a range.

    Raises:
        UsageError: It is none.
    """
    if isinstance(text, list | tuple):
        text = f"choice({','.join(json.dumps(one) if not isinstance(one, str) else one for one in text)})"
    found = re.fullmatch(r"\s*(\w+)\((.*)\)\s*", str(text), re.DOTALL)
    kind, inside = (found[1], split_words(found[2])) if found else ("", [])
    if kind == "choice" and inside:
        if len(set(inside)) < len(inside):
            raise UsageError(f"ranges.{key}={text} lists a value twice.")
        return Range("choice", choices=tuple(inside))
    if kind not in ("log", "uniform", "int") or len(inside) != 2:
        raise UsageError(f"ranges.{key}={text} is no range: write {FORMS}, in quotes.")
    try:
        low, high = (float(one) for one in inside)
    except ValueError as error:
        raise UsageError(f"ranges.{key}={text}: {kind}(low,high) needs two numbers.") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UsageError(f"ranges.{key}={text}: the first number must be below the second.")
    if kind == "log" and low <= 0:
        raise UsageError(f"ranges.{key}={text}: a logarithm needs numbers above 0; uniform(...) takes others.")
    if kind == "int" and (low % 1 or high % 1):
        raise UsageError(f"ranges.{key}={text}: int(low,high) needs whole numbers; uniform(...) takes others.")
    return Range(kind, low, high)  # type: ignore[arg-type]


def split_words(text: str) -> list[str]:
    """Return the parts of a text between its commas, except commas in brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts] if any(part.strip() for part in parts) else []


def read_word(text: str) -> Any:
    """Return what a listed value stands for: a number, true, false, null, a list, or the word itself."""
    if text.startswith("[") and text.endswith("]"):
        return [read_word(one) for one in split_words(text[1:-1])]
    plain = {"true": True, "false": False, "null": None}
    if text.lower() in plain:
        return plain[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text.strip("'\"")


def flat_ranges(ranges: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ranges given in sections under their full keys: {"method": {"mask_ratio": ...}} as "method.mask_ratio"."""
    found: dict[str, Any] = {}
    for key, value in ranges.items():
        found |= flat_ranges(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def parse_space(ranges: Mapping[str, Any]) -> dict[str, Range]:
    """Read all ranges, by their full keys.

    Raises:
        UsageError: One is no range, or of a setting that a search cannot vary.
    """
    space = {key: parse_range(key, text) for key, text in flat_ranges(ranges).items()}
    for key in space:
        if key.split(".")[0] not in ("method", "backbone") and key not in SEARCHABLE:
            raise UsageError(
                f"ranges.{key}: a search varies {', '.join(SEARCHABLE[:4])} and the settings of the method and the backbone; "
                f"{key} is the same in all trials."
            )
    if "backbone.name" in space or "backbone.image_size" in space:
        raise UsageError(
            "ranges.backbone.name and ranges.backbone.image_size would compare different networks or images: make a search "
            "for each."
        )
    rates = [key for key in RATES if key in space]
    if len(rates) > 1:
        raise UsageError(f"ranges.{rates[0]} and ranges.{rates[1]} set the same learning rate: give one of them.")
    return space


def with_values(settings: Settings, space: Mapping[str, Range], values: Mapping[str, Any]) -> Settings:
    """Return settings changed to values of the ranges; a learning rate that would hide another is removed."""
    changed = settings
    for key, value in values.items():
        changed = with_setting(changed, key, space[key].setting(value))
    return changed


def with_setting(settings: Settings, key: str, value: Any) -> Settings:
    """Return settings with one of them changed, given by its full key."""
    name, _, rest = key.partition(".")
    if rest:
        changes: dict[str, Any] = {name: _nested(getattr(settings, name), rest, value)}
        return dataclasses.replace(settings, **changes)
    changes = {name: value}
    if name in ("base_lr", "lr_ratio"):
        changes["lr"] = None
    if name == "lr_ratio":
        changes["base_lr"] = None
    return dataclasses.replace(settings, **changes)


def _nested(section: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    name, _, rest = key.partition(".")
    return {**section, name: _nested(section.get(name) or {}, rest, value) if rest else value}


# Proposals.


def key_of_values(values: Mapping[str, Any]) -> str:
    """Return what tells values from others."""
    return json.dumps(dict(values), sort_keys=True)


def grid(space: Mapping[str, Range], *, points: int, seed: int) -> list[Values]:
    """Return all cells of a grid, in random order: whatever stops a search, what is done is spread over the grid."""
    cells = [
        dict(zip(space, cell, strict=True))
        for cell in itertools.product(*(one.points(points) for one in space.values()))
    ]
    random.Random(seed).shuffle(cells)
    return cells


def draw(space: Mapping[str, Range], *, seed: int, number: int) -> Iterator[Values]:
    """Yield random values, a function of the seed and the number of a trial."""
    drawn = random.Random(f"{seed}-{number}")
    while True:
        yield {key: one.at(drawn.random()) for key, one in space.items()}


def cells_of(space: Mapping[str, Range]) -> int | None:
    """Return how many different values there are; None for a continuum."""
    sizes: Sequence[int | None] = [
        len(one.choices) if one.kind == "choice" else int(one.high - one.low) + 1 if one.kind == "int" else None
        for one in space.values()
    ]
    return None if None in sizes else math.prod(size for size in sizes if size is not None)
