"""The tables of inspected networks: printed, in CSV, in Markdown, and by layer."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from sslvision.inspection.receptive_field import ReceptiveField, Window
from sslvision.runs.run_files import write_json
from sslvision.system.files import written_whole

NONE = "–"
COLUMNS = (  # in CSV
    *("name", "weights", "height", "width", "parameters", "flops", "saved_bytes", "peak_bytes"),
    *("theoretical_height", "theoretical_width", "reach_height", "reach_width", "side_50", "side_95"),
    *("forward_images_per_second", "training_images_per_second", "remarks"),
)


def layer_rows(
    model: nn.Module,
    parameters: Mapping[str, int],
    flops: Mapping[str, int] | None,
    saved: Mapping[str, int] | None,
    theory: ReceptiveField | None,
) -> list[dict[str, Any]]:
    """Return a row for each module that has anything to tell, in the order of the model; those inside it are included."""
    windows = {window.module: window for window in (theory.windows if theory else ())}
    inside: dict[str, list[Window]] = {}  # windows of each module and of those in it, in the order of execution
    for name, window in windows.items():
        parts = name.split(".")
        for outer in {".".join(parts[:length]) for length in range(len(parts) + 1)}:
            inside.setdefault(outer, []).append(window)
    rows = []
    for name, module in model.named_modules():
        own, of_all = windows.get(name), inside.get(name, [])
        row: dict[str, Any] = {"layer": name, "type": type(module).__name__, "parameters": parameters[name]}
        row |= {"flops": flops.get(name, 0) if flops else None, "saved_bytes": saved.get(name, 0) if saved else None}
        row |= {"kernel": own and [*own.kernel], "stride": own and [*own.stride], "padding": own and [*own.padding]}
        row |= {"map": [*of_all[-1].map_size] if of_all else None, "receptive_field": _widest(of_all)}
        if any(row[key] for key in ("parameters", "flops", "saved_bytes", "map")):
            rows.append(row)
    return rows


def _widest(windows: Sequence[Window]) -> list[int] | str | None:
    """Return the field behind windows of which some are side by side: that of the widest; None if it is not known."""
    if any(window.whole for window in windows):
        return "whole"
    fields = [window.field for window in windows]
    known = [field for field in fields if field is not None]
    return [*max(known)] if known and len(known) == len(fields) else None


def write_networks(folder: Path, results: Mapping[str, Any]) -> None:
    """Write inspect.json, inspect.csv and inspect.md."""
    write_json(folder / "inspect.json", dict(results))
    with written_whole(folder / "inspect.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(_csv_row(record) for record in results["networks"])
    with written_whole(folder / "inspect.md", "w", encoding="utf-8") as file:
        file.write(markdown(results))


def write_layers(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the layers of a network as CSV."""
    with written_whole(file, "w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows({key: _by(value, "") for key, value in row.items()} for row in rows)


def _csv_row(record: Mapping[str, Any]) -> dict[str, Any]:
    height, width = record["image_size"]
    field = record.get("receptive_field") or {}
    theory, effective = field.get("theoretical"), field.get("effective") or {}
    known = theory if isinstance(theory, list) else [theory, theory]
    reach = effective.get("reach") or [None, None]
    row = {"height": height, "width": width, "theoretical_height": known[0], "theoretical_width": known[1]}
    row |= {"reach_height": reach[0], "reach_width": reach[1], "remarks": "; ".join(record["remarks"])}
    return {**record, **row, "side_50": effective.get("side_50"), "side_95": effective.get("side_95")}


def headings(results: Mapping[str, Any]) -> list[str]:
    """Return the headings of the table."""
    batch = results["measured_on"]["batch_size"]
    return [
        *("network", "image", "params\nM", "GFLOPs", "saved\nMB/image", f"peak MB\nbatch {batch}"),
        *("field\ntheory", "field\n95 %", "img/s\nforward", "img/s\n+ backward"),
    ]


def cells(record: Mapping[str, Any], batch: int) -> list[str]:
    """Return a row of the table."""
    field = record.get("receptive_field") or {}
    theory, effective = field.get("theoretical"), field.get("effective")
    return [
        record["name"],
        _by(record["image_size"]),
        scaled(record["parameters"], 1e6, 2),
        scaled(record.get("flops"), 1e9, 2),
        scaled(record.get("saved_bytes"), 1e6 * batch, 1),
        scaled(record.get("peak_bytes"), 1e6, 0),
        "whole" if theory == "whole image" else _by(theory),
        _by(effective and effective["side_95"]),
        _rate(record.get("forward_images_per_second")),
        _rate(record.get("training_images_per_second")),
    ]


def markdown(results: Mapping[str, Any]) -> str:
    """Return the table in Markdown."""
    names = [heading.replace("\n", " ") for heading in headings(results)]
    batch = results["measured_on"]["batch_size"]
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *(cells(record, batch) for record in results["networks"])]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def print_networks(console: Console, results: Mapping[str, Any]) -> None:
    """Print a row for each network, what was measured where, and the remarks."""
    on = results["measured_on"]
    records, batch = results["networks"], on["batch_size"]
    rows = [cells(record, batch) for record in records]
    lines = [headings(results), *rows]
    used = [number for number in range(len(lines[0])) if any(row[number] != NONE for row in rows)]
    widths = [max(len(part) for line in lines for part in line[number].split("\n")) + 2 for number in used]
    half = (len(used) + 1) // 2
    parts = [used] if sum(widths) <= console.width else [used[:half], [0, *used[half:]]]
    for part in parts:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
        for number in part:
            justify: Literal["left", "right"] = "left" if number == 0 else "right"
            table.add_column(lines[0][number], justify=justify, overflow="fold", no_wrap=number > 0)
        for row in rows:
            table.add_row(*(escape(row[number]) for number in part))
        console.print(table)
    threads = f", {on['threads']} thread{'' if on['threads'] == 1 else 's'}" if on["device"] == "cpu" else ""
    console.print(
        f"[dim]{escape(on['name'])}{threads}, {on['precision']}, batches of {batch}, medians of {on['repeats']}. "
        "MB are 1e6 bytes; fields are sides in pixels; all definitions are in inspect.json.[/]"
    )
    for record in records:
        for remark in record["remarks"]:
            console.print(f"[yellow]{escape(record['name'])}: {escape(remark)}.[/]")


def print_layers(console: Console, record: Mapping[str, Any], batch: int) -> None:
    """Print the layers of a network: its parts, and the parts of those that are mere sequences. The CSV file has all."""
    table = Table(title=f"{record['name']} by layer", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(("layer", "type", "parameters", "MFLOPs", "saved MB\nper image", "map", "field")):
        table.add_column(heading, justify="left" if number < 2 else "right", overflow="fold", no_wrap=number > 1)
    for row in _outline(record["layers"]):
        table.add_row(
            escape(row["layer"]),
            escape(row["type"]),
            f"{row['parameters']:,}",
            scaled(row["flops"], 1e6, 1),
            scaled(row["saved_bytes"], 1e6 * batch, 2),
            _by(row["map"]),
            _by(row["receptive_field"]),
        )
    console.print(table)


def _outline(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a model's parts; for a sequence of parts, the rows of these."""
    listed = list(rows)
    sequences = {row["layer"] for row in listed if row["layer"] and row["type"] in ("Sequential", "ModuleList")}
    inside = {row["layer"].rpartition(".")[0] for row in listed}
    for row in listed:
        above = row["layer"].rpartition(".")[0]
        part = "." not in row["layer"] or (above in sequences and "." not in above)
        if (
            row["layer"]
            and part
            and not (row["layer"] in sequences and row["layer"] in inside and "." not in row["layer"])
        ):
            yield row


def plain_name(name: str) -> str:
    """Return a name for a file."""
    return re.sub(r"[^\w.-]", "_", name)


def _by(value: Any, none: str = NONE) -> Any:
    """Return a size as one number, or as height x width."""
    if isinstance(value, list):
        return str(value[0]) if value[0] == value[1] else f"{value[0]}x{value[1]}"
    return none if value is None else str(value)


def scaled(value: float | None, unit: float, digits: int) -> str:
    """Return a value in a unit with so many decimals; a small one with two digits that are not 0."""
    if value is None:
        return NONE
    return f"{value / unit:.2g}" if 0 < value / unit < 10 ** (1 - digits) else f"{value / unit:,.{digits}f}"


def _rate(value: float | None) -> str:
    return (
        NONE
        if value is None
        else f"{value:,.0f}"
        if value >= 100
        else f"{value:.1f}"
        if value >= 10
        else f"{value:.2f}"
    )
