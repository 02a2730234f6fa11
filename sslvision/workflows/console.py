"""What the commands print: the configuration in effect before the first step, findings and tables at the end."""

from collections.abc import Mapping, Sequence

import pytorch_lightning as L
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from sslvision.data.source import Source
from sslvision.data.sources.list_images import some
from sslvision.evaluation.confidence import Scores
from sslvision.evaluation.evaluate import intervals_of
from sslvision.figures.label_efficiency import Cell
from sslvision.training.callbacks.continued import Continued
from sslvision.training.callbacks.data_waits import DataWaits
from sslvision.training.callbacks.health import Health
from sslvision.training.callbacks.progress import Progress
from sslvision.training.callbacks.skipped_updates import SkippedUpdates
from sslvision.training.callbacks.unreadable_images import UnreadableImages


def print_configuration(console: Console, rows: Mapping[str, str], title: str) -> None:
    """Print the configuration in effect."""
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        table.add_row(f"[bold]{key}", escape(value))
    console.print(Panel(table, title=title, title_align="left", box=box.ROUNDED, expand=False))


def classes_in_words(source: Source) -> str:
    """Return how many classes the images of a source have, and the first names: they may come from the names of folders."""
    if source.labels is None:
        return "no labels"
    names = source.classes or ()
    return f"{len(names):,} classes: {some(names, most=4)}" if names else f"{int(source.labels.max()) + 1:,} classes"


def print_findings(console: Console, findings: Sequence[str]) -> None:
    """Print what the user should know about a run."""
    for finding in findings:
        console.print(f"[yellow]{escape(finding)}[/]")


def findings_of(trainer: L.Trainer) -> list[str]:
    """Return what the callbacks found: unreadable images, skipped updates, waiting for data, collapse."""
    findings: list[str] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, UnreadableImages | SkippedUpdates | DataWaits | Continued) and callback.found:
            findings.append(callback.summary())
        elif isinstance(callback, Health):
            findings += callback.found.values()
    return findings


def waiting_of(trainer: L.Trainer) -> dict[str, float]:
    """Return the percentage of time spent waiting for images, and images per second, as far as they were measured."""
    measured: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, DataWaits) and callback.share is not None:
            measured["waiting_for_data_percent"] = round(callback.share, 1)
        elif isinstance(callback, Progress) and callback.images_per_second:
            measured["images_per_second"] = round(callback.images_per_second, 1)
    return measured


def print_scores(console: Console, rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Print k-NN accuracy, linear-probe accuracy and RankMe, as far as measured, a row for each backbone, the first bold."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("frozen features")
    columns = {"knn_top1": "k-NN top-1 %", "linear_top1": "linear probe top-1 %", "rankme": "RankMe"}
    columns = {key: heading for key, heading in columns.items() if any(key in scores for scores in rows.values())}
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for number, (name, scores) in enumerate(rows.items()):
        style = "bold" if number == 0 else None
        table.add_row(name, *(_with_interval(key, scores) for key in columns), style=style)
    console.print(table)


def _with_interval(key: str, scores: Mapping[str, float]) -> str:
    """Return a score, and of an accuracy the 95 % interval over test sets of the same size."""
    interval = intervals_of(scores).get(key)
    return f"{scores[key]:.1f}" + (f" ({interval[0]:.1f} to {interval[1]:.1f})" if interval else "")


def print_classifiers(console: Console, rows: Mapping[str, Scores], title: str) -> None:
    """Print the scores of classifiers ("k-NN, k = 10", "linear probe", "fine-tuned"), a row for each."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("classifier")
    for heading in ("top-1 %", "95 % interval", "top-5 %", "mean per class %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, scores in rows.items():
        low, high = scores.interval
        table.add_row(
            name, f"{scores.top1:.1f}", f"{low:.1f} to {high:.1f}", f"{scores.top5:.1f}", f"{scores.mean_per_class:.1f}"
        )
    console.print(table)


def print_comparison(console: Console, cells: Sequence[Cell], title: str) -> None:
    """Print top-1 accuracy with its standard deviation over the seeds, by arm and labels per class; a column's best is bold."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge, table.show_edge = (0, 1, 0, 0), False, False  # six columns fit a terminal's 80
    table.add_column("labels\nper class")
    budgets = sorted({cell["labels_per_class"] for cell in cells}, key=lambda labels: (labels == "all", labels))
    for labels in budgets:
        table.add_column(str(labels), justify="right", no_wrap=True)
    best = {
        labels: max(round(cell["mean"], 1) for cell in cells if cell["labels_per_class"] == labels)
        for labels in budgets
    }
    for arm in dict.fromkeys(cell["arm"] for cell in cells):
        row = {cell["labels_per_class"]: cell for cell in cells if cell["arm"] == arm}
        table.add_row(arm, *(_cell(row[labels], best[labels]) if labels in row else "–" for labels in budgets))
    console.print(table)


def _cell(cell: Cell, best: float) -> str:
    text = f"{cell['mean']:.1f}" + (f" ± {cell['deviation']:.1f}" if cell["seeds"] > 1 else "")
    return f"[bold]{text}[/]" if round(cell["mean"], 1) == best else text
