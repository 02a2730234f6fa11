"""Write docs/settings.md from the settings of the commands and from signatures and docstrings.

    python scripts/make_settings_reference.py

A test compares the file with what this script makes.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from sslvision.augment.randaugment import RandAugment
from sslvision.backbones.build import build_backbone
from sslvision.cli.slurm_settings import SlurmJobs
from sslvision.data.sources.digits import open_digits
from sslvision.data.sources.embedded import open_embedded
from sslvision.data.sources.folder import open_folder
from sslvision.data.sources.hugging_face import open_hugging_face
from sslvision.data.sources.list_file import open_list
from sslvision.data.sources.torchvision_sets import open_torchvision
from sslvision.data.sources.webdataset import open_webdataset
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.methods.supervised import Supervised
from sslvision.settings import Finetune, Predict, Pretrain, Probe
from sslvision.workflows.embedding_settings import Cluster, Duplicates, Embed, Outliers, Search, Select
from sslvision.workflows.exporting_settings import Export
from sslvision.workflows.inspecting_settings import Inspect
from sslvision.workflows.packing_settings import Pack
from sslvision.workflows.report_settings import Report
from sslvision.workflows.scaling_settings import Scale
from sslvision.workflows.segmenting_settings import Segment
from sslvision.workflows.tuning_settings import Tune, TuneFinetune

FILE = Path(__file__).parents[1] / "docs" / "settings.md"
INTRODUCTION = """\
# Settings

<!-- Made by scripts/make_settings_reference.py: change docstrings and help texts, not this file. -->

Settings are written `key=value` after a command; `sslvision COMMAND --help` prints the first tables. Settings of a section
are written with its name: `backbone.depth=6`, `data.root=photos`. Those of a method need no prefix: `mask_ratio=0.6` is
short for `method.mask_ratio=0.6`. Defaults below are those of the code; a recipe may set other values.
"""
COMMANDS: dict[str, Any] = {
    "pretrain": Pretrain,
    "probe": Probe,
    "segment": Segment,
    "finetune": Finetune,
    "predict": Predict,
    "inspect": Inspect,
    "scale": Scale,
    "export": Export,
    "report": Report,
    "tune": Tune,
    "tune run=...": TuneFinetune,
    "embed": Embed,
    "search": Search,
    "duplicates": Duplicates,
    "outliers": Outliers,
    "select": Select,
    "cluster": Cluster,
    "pack": Pack,
}
SOURCE = "`data.*`, in addition to the [settings of all data sources](#all-data-sources)."
TARGETS: tuple[tuple[str, Callable[..., Any], str, Collection[str]], ...] = (
    ("MAE", MAE, "`method.*` of the recipes named `mae...`.", Pretrain.elsewhere),
    ("DINO", DINO, "`method.*` of the recipes named `dino...`.", Pretrain.elsewhere),
    ("Supervised", Supervised, "`method.*` of `sslvision finetune`.", Finetune.elsewhere),
    ("RandAugment", RandAugment, "`randaugment=9` is its magnitude; the number of operations is fixed.", ()),
    ("Backbone", build_backbone, "`backbone.*` of every command. `channels` follows `data.channels`.", ("channels",)),
    ("data=embedded", open_embedded, SOURCE, ()),
    ("data=digits", open_digits, SOURCE, ()),
    ("data=folder", open_folder, SOURCE, ()),
    ("data=list", open_list, SOURCE, ()),
    ("data=hf", open_hugging_face, SOURCE, ()),
    ("data=webdataset", open_webdataset, SOURCE, ()),
    ("data=torchvision", open_torchvision, SOURCE, ()),
)
SOURCES = {  # of data sources, whose docstrings are prose
    "root": "Folder of the images, or a .zip or .tar file of it; for torchvision, the folder in which it keeps its data sets.",
    "channels": "Channels of an image: 1, 3, or for files as many as those have.",
    "holdout": "Fraction of the images held out for scores, where the data has no split for it.",
    "size": "Side of an image in pixels.",
    "name": "Class name of a data set in torchvision.datasets, such as CIFAR10.",
    "download": "Download the data set if it is not in `root`.",
    "follow_symlinks": "Follow symbolic links that lead out of `root`; if false, they are left out, and named.",
    "index_dir": "Folder where what was found is kept (default: sslvision/folders in $XDG_CACHE_HOME or ~/.cache).",
    "rescan": "List all folders again, whether or not their times say that they have changed.",
    "at_least": "Decode large JPEGs at a fraction of their size, with at least this short side in pixels (default: in full).",
    "value_range": "`auto` or `[low, high]`: the values that become black and white in images of more than 8 bits.",
    "max_pixels": "Images with more pixels are rejected by their header, before they are decoded.",
}
SHARED = (  # settings of the loader, written data.*
    (
        "workers",
        "int \\| None",
        "None",
        "Loader processes per device (default: the cores that are available, less one).",
    ),
    (
        "normalize",
        "str \\| list",
        "computed",
        "`computed`, `imagenet`, or `[[mean, ...], [std, ...]]` on the scale 0 to 1.",
    ),
    ("max_unreadable", "float", "0.1", "Largest fraction of unreadable images with which a run continues."),
    ("cache", "none \\| ram \\| disk", "none", "Where decoded images are kept."),
    ("cache_size", "int", "320", "Images with a longer short side are resized to this one in the cache."),
    ("cache_dir", "str \\| None", "None", "Folder of `cache=disk` (default: `~/.cache/sslvision`)."),
)


def make() -> str:
    """Return the text of docs/settings.md."""
    parts = [INTRODUCTION]
    for name, kind in COMMANDS.items():
        rows = [(f.name, type_of(f.type), default_of_field(f), f.metadata["help"]) for f in dataclasses.fields(kind)]
        parts.append(section(name, summary(kind), rows))
    rows = [(f.name, type_of(f.type), default_of_field(f), f.metadata["help"]) for f in dataclasses.fields(SlurmJobs)]
    parts.append(section("slurm", summary(SlurmJobs), rows))
    for name, target, text, without in TARGETS:
        parts.append(section(name, f"{text} {summary(target)}", list(parameters(target, without))))
    parts.append(section("All data sources", "`data.*` of every source.", list(SHARED)))
    return "\n".join(parts)


def section(title: str, text: str, rows: list[tuple[str, str, str, str]]) -> str:
    """Return a heading, a sentence and a table of settings."""
    lines = [f"## {title}", "", text, "", "| setting | type | default | description |", "| --- | --- | --- | --- |"]
    lines += [f"| `{key}` | {kind} | {default} | {escape(told)} |" for key, kind, default, told in rows]
    return "\n".join([*lines, ""])


def parameters(target: Callable[..., Any], without: Collection[str]) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and description of the keyword parameters of a function or class."""
    told = {**(SOURCES if target.__name__.startswith("open_") else {}), **described(inspect.getdoc(target) or "")}
    for name, parameter in inspect.signature(target).parameters.items():
        if name in without:
            continue
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            yield "...", "", "", told.get(name, "")
            continue
        default = "required" if parameter.default is inspect.Parameter.empty else shown(parameter.default)
        yield name, type_of(parameter.annotation), default, told.get(name, "")


def described(docstring: str) -> dict[str, str]:
    """Return the descriptions of a docstring's Args or Attributes, by name; "a, b: Text." describes both."""
    lines = re.split(r"^(?:Args|Attributes):\n", docstring, maxsplit=1, flags=re.MULTILINE)[-1].splitlines()
    found: dict[str, str] = {}
    names: list[str] = []
    for line in lines:
        if line and not line.startswith(" "):
            break
        if match := re.match(r"    ([\w*, ]+): (.*)", line):
            names = [name.strip("* ") for name in match[1].split(",")]
            found |= dict.fromkeys(names, match[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


def summary(target: Any) -> str:
    """Return the first sentence of a docstring."""
    return escape((inspect.getdoc(target) or "").split("\n\n")[0].replace("\n", " "))


def default_of_field(field: "dataclasses.Field[Any]") -> str:
    """Return the default of a setting as it is written on the command line."""
    return shown(field.default_factory() if callable(field.default_factory) else field.default)


def shown(value: Any) -> str:
    """Return a default as it is written on the command line."""
    if value in ("", {}) or value is None:
        return ""
    text = str(value).lower() if isinstance(value, bool) else str(list(value) if isinstance(value, tuple) else value)
    return f"`{text}`"


def type_of(annotation: Any) -> str:
    """Return a type as a reader of Python knows it."""
    text = inspect.formatannotation(annotation).replace("typing.", "").replace("collections.abc.", "")
    text = re.sub(r"Literal\[([^]]*)\]", lambda match: match[1].replace("'", "").replace(", ", " | "), text)
    return escape(re.sub(r"os\.PathLike\[str\]", "path", text).replace("NoneType", "None"))


def escape(text: str) -> str:
    """Return text for a cell of a table."""
    return text.replace("|", "\\|").replace("<name>", "`<name>`").replace("``", "`")


if __name__ == "__main__":
    FILE.write_text(make(), encoding="utf-8")
