"""The table of a plan."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

NONE = "–"


def print_plan(console: Console, results: Mapping[str, Any], *, about: str) -> None:
    """Print the parts of each plan in a column, the largest batches, what to choose, and what is not counted."""
    plans, memory = results["plans"], results["memory"]
    console.print(f"[bold]{escape(about)}[/]")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("GB per device")
    for name in plans:
        table.add_column(name.replace(", ", ",\n"), justify="right", no_wrap=True)
    for row in rows(plans):
        table.add_row(*(escape(cell) for cell in row))
    table.add_section()
    table.add_row("[bold]at most at once", *(f"[bold]{gigabytes(one['peak'])}" for one in plans.values()))
    fits = ["yes" if one["peak"] <= memory else "no" for one in plans.values()]
    table.add_row(f"fits in {memory / 1e9:g} GB", *fits)
    table.add_row("largest batch that fits", *(f"{one['largest_batch']:,}" for one in plans.values()))
    table.add_section()
    for key in dict.fromkeys(key for one in plans.values() for key in one["sent"]):
        table.add_row(f"sent: {key}", *(gigabytes(one["sent"].get(key)) for one in plans.values()))
    console.print(table)
    console.print(f"[bold]Choose[/] {escape(results['choice'])}")
    unknown = results["optimizer_unknown"]
    more = f"; temporary tensors of the optimizer, which looks at numbers on the device ({unknown})" if unknown else ""
    console.print(
        f"[dim]Computed, not measured; GB are 1e9 bytes. recomputed: with activation_checkpointing=true. Not counted: "
        f"{escape(results['not_counted'])}{escape(more)}.[/]"
    )


def rows(plans: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return a row for each part that any of the plans has."""
    keys = dict.fromkeys(key for one in plans.values() for key in one["held"])
    return [[key, *(gigabytes(one["held"].get(key)) for one in plans.values())] for key in keys]


def gigabytes(value: float | None) -> str:
    """Return bytes in GB with two decimals; a small number with two digits."""
    if value is None:
        return NONE
    return f"{value / 1e9:,.2f}" if value >= 1e7 or value == 0 else f"{value / 1e9:.2g}"
