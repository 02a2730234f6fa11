"""The words of a command line: options such as --help, and settings as key=value."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from sslvision.cli.values import sweep_values
from sslvision.errors import UsageError

_SETTING = re.compile(r"(\+\+|\+|~)?([\w./@-]+)(?:=(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Words:
    """A command line, split.

    Attributes:
        settings: Texts by key, as given; None for a key to remove (~key).
        slurm: Texts of the keys `slurm.KEY`, by KEY: how SLURM is to run them. Empty to run here.
        sweep: Whether -m was given: one run for each combination of values.
        show: Whether --cfg job was given: print the settings and stop.
        help: Whether --help was given.
    """

    settings: Mapping[str, str | None]
    slurm: Mapping[str, str] = field(default_factory=dict)
    sweep: bool = False
    show: bool = False
    help: bool = False

    def points(self) -> Iterator[dict[str, str | None]]:
        """Yield the settings of each run of a sweep."""
        values: list[Sequence[str | None]] = [
            [text] if text is None or key.startswith("ranges.") else sweep_values(key, text)
            for key, text in self.settings.items()
        ]
        for point in itertools.product(*values):
            yield dict(zip(self.settings, point, strict=True))


def split_words(words: Sequence[str]) -> Words:
    """Split a command line into options and settings.

    Raises:
        UsageError: An unknown option, a word that is not a setting, or a key given twice.
    """
    options, settings, slurm, rest = set(), {}, {}, iter(words)
    for word in rest:
        if word.startswith("-"):
            options.add(_option(word, rest))
            continue
        found = _SETTING.fullmatch(word)
        if found is None or (found[1] == "~") != (found[3] is None):
            raise UsageError(
                f"Cannot read the command line: {word!r} is not a setting. Settings are written key=value; ~key removes one."
            )
        key = found[2]
        if key.split(".")[0].split("/")[0] == "hydra":
            raise UsageError(
                f"{key}: sslvision has no settings of Hydra. Runs of a sweep (-m) run one after another, or with slurm.time=2h "
                "as jobs of SLURM, and a run's folder is set by name= or output_dir=."
            )
        of_slurm = key.startswith("slurm.")
        if key in settings or (of_slurm and key[6:] in slurm):
            raise UsageError(f"{key} is given twice; give it once.")
        if of_slurm and found[3] is None:
            raise UsageError(f"~{key}: no recipe has settings of SLURM, so there is nothing to remove.")
        if of_slurm:
            slurm[key.removeprefix("slurm.")] = str(found[3])
        else:
            settings[key] = found[3]
    return Words(settings, slurm, sweep="sweep" in options, show="show" in options, help="help" in options)


def as_settings(words: Sequence[str], key: str | None) -> list[str]:
    """Return a command line whose words without `=`, and those that are folders, are values of the list `key`.

    Args:
        words: The command line.
        key: Name of the setting; None if there is none, and the words stay as they are.
    """
    if key is None:
        return list(words)
    folders = [word for word in words if not word.startswith(("-", "~")) and ("=" not in word or os.path.isdir(word))]
    rest = [word for word in words if word not in folders]
    quoted = ",".join(folder if re.fullmatch(r"[\w./=+@-]+", folder) else f'"{_escaped(folder)}"' for folder in folders)
    return [f"{key}=[{quoted}]"] * bool(folders) + rest


def _escaped(text: str) -> str:
    return text.replace('"', '\\"')


def join_words(settings: Mapping[str, str | None]) -> list[str]:
    """Return settings as the words of a command line."""
    return [f"~{key}" if text is None else f"{key}={text}" for key, text in settings.items()]


def _option(word: str, rest: Iterator[str]) -> str:
    """Return what an option asks for, after taking its value from the words that follow."""
    known = {"--help": "help", "-h": "help", "--multirun": "sweep", "-m": "sweep", "--cfg=job": "show"}
    if word in known:
        return known[word]
    if word in ("--cfg", "-c"):
        value = next(rest, "")
        if value == "job":
            return "show"
        word = f"{word} {value}".strip()
    raise UsageError(
        f"There is no option {word}. Options are --help, -m (a sweep: one run for each of several values) and --cfg job "
        "(print the settings and stop); everything else is written key=value."
    )
