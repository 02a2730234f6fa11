"""What the learning curves of a run show, for its closing lines and its results.json, with the command to type next."""

import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from sslvision.evaluation.learning_curves import Reading, read_curves
from sslvision.methods.base import Method
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.methods.supervised import Supervised
from sslvision.runs.metrics import read_metrics
from sslvision.runs.redaction import redact
from sslvision.settings import Finetune, Pretrain

OF_THE_RUN = ("name", "output_dir", "overwrite", "resume")  # words that the next run does not repeat


def read_curves_of(
    settings: Pretrain | Finetune, folder: Path, method: Method, *, validation_images: int | None
) -> list[Reading]:
    """Return what the metrics in a run folder show; nothing of a dry run.

    Args:
        settings: Settings of the run.
        folder: Its folder, with metrics.csv.
        method: The method that was trained.
        validation_images: Images that accuracy was measured on, if any.
    """
    if settings.dry_run or not (folder / "metrics.csv").is_file():
        return []
    return read_curves(
        read_metrics(folder / "metrics.csv"),
        kind=kind_of(method),
        settings=dataclasses.asdict(settings),
        chance_loss=chance_loss(method),
        validation_images=validation_images,
    )


def kind_of(method: Method) -> str:
    """Return the kind of a method whose curves are read; the name of its class if it is another one."""
    kinds = {MAE: "mae", DINO: "dino", Supervised: "supervised"}
    return next((kind for known, kind in kinds.items() if isinstance(method, known)), type(method).__name__)


def chance_loss(method: Method) -> float | None:
    """Return the loss of a network that knows nothing about an image: ln K, or of MAE the variance of normalized pixels."""
    if isinstance(method, Supervised):
        return math.log(max(2, len(method.classes)))
    if isinstance(method, DINO):
        return math.log(method.center.shape[1])
    return 1.0 if isinstance(method, MAE) else None


def command_with(words: Sequence[str], changed: Sequence[str], *, command: str, folder: Path) -> str:
    """Return the command line of a run with some of its words replaced, for a new run folder.

    Args:
        words: Arguments of the command line of the run.
        changed: Words of a reading.
        command: "pretrain" or "finetune".
        folder: Folder of the run. Its config.yaml is the recipe if the words name none, as when a run is resumed by its name.
    """
    if not any(_key(word) in ("recipe", "run") for word in words):
        words = [f"recipe={folder / 'config.yaml'}", *words]
    replaced = {_key(word) for word in changed} | set(OF_THE_RUN)
    if replaced & {"lr", "base_lr", "lr_ratio"}:
        replaced |= {"lr", "base_lr", "lr_ratio"}
    kept = [word for word in words if _key(word) not in replaced]
    return shlex.join(["python", "-m", f"sslvision.{command}", *redact([*kept, *changed])])


def next_command(readings: Sequence[Reading], words: Sequence[str], *, command: str, folder: Path) -> dict[str, str]:
    """Return under "next" the command that the most important reading advises, if one does."""
    first = next((reading for reading in readings if reading.words), None)
    return {} if first is None else {"next": command_with(words, first.words, command=command, folder=folder)}


def print_next(console: Console, results: dict[str, object]) -> None:
    """Print the command to type next, if there is one."""
    if "next" in results:
        console.print(f"By the learning curves, try next:\n  {escape(str(results['next']))}")


def _key(word: str) -> str:
    """Return the last part of a word's key: mixup of method.mixup=0.8."""
    return word.partition("=")[0].lstrip("+~").rpartition(".")[2]
