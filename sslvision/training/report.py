"""What a person reads in the terminal: the effective configuration before the first step, the table after the last."""

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table


def print_configuration(console: Console, rows: Mapping[str, str], title: str) -> None:
    """Print what is about to happen."""
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        table.add_row(f"[bold]{key}", value)
    console.print(Panel(table, title=title, title_align="left", box=box.ROUNDED, expand=False))


def print_scores(console: Console, rows: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Print k-NN and linear-probe accuracy and RankMe, a line for each set of features, the first one set off."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("frozen features")
    table.add_column("k-NN top-1 %", justify="right")
    table.add_column("linear probe top-1 %", justify="right")
    table.add_column("RankMe", justify="right")
    for number, (name, scores) in enumerate(rows.items()):
        style = "bold" if number == 0 else None
        numbers = (f"{scores[key]:.1f}" for key in ("knn_top1", "linear_top1", "rankme"))
        table.add_row(name, *numbers, style=style)
    console.print(table)
