"""Turn summaries of run.py into a section of Markdown, printed or written between two markers of a file.

python benchmarks/on_gpu/report.py SUMMARY.json [...] [--write benchmarks/RESULTS.md]

Summaries of one card make one section, in which later ones replace the findings of earlier ones of the same name.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from measure import stated

from benchmarks.on_gpu.findings import USUAL, split_part, stem

BEGIN, END = "<!-- on_gpu: begin -->", "<!-- on_gpu: end -->"
COMMAND = "python3 benchmarks/on_gpu/run.py"
PEERS = {"hf": "transformers", "hfc": "transformers, blocks compiled"}
PEERS |= {"lightly": "lightly", "lightlyc": "lightly, blocks compiled"}
OURS = {
    "run": "ours, as a run is",
    "bytes": "ours, as a run is, from bytes",
    "eager": "ours, eager",
    "eagerbytes": "ours, eager, from bytes",
    "blocks": "ours, compiled, no CUDA graphs",
    "blocksbytes": "ours, compiled, no CUDA graphs, from bytes",
    "graphs": "ours, CUDA graphs, not compiled",
    "onegraph": "ours, compiled, step and optimizer one graph",
    "low": "ours, activation_checkpointing=true",
    "eagerlow": "ours, eager, activation_checkpointing=true",
    "noshare": "ours, first decoder block like the others",
    "torchattention": "ours, attention by torch",
    "whole": "ours, losses compiled as one graph",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", nargs="+", type=Path, metavar="SUMMARY.json")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="replace what is between its markers, or add it at its end"
    )
    arguments = parser.parse_args()
    text = "\n\n".join(section(**about) for about in merged([*map(read, arguments.summaries)]))
    if arguments.write is None:
        print(text)
    else:
        arguments.write.write_text(placed(arguments.write.read_text(), text))


def read(file):
    """Return a summary with its setting; one that has none tells it by the part `env`, and its date by the file's."""
    summary = json.loads(file.read_text())
    if "setting" not in summary:
        about = summary["found"].get("env", {})
        card, driver = [*about.get("card", "").split("\n")[-1].split(", "), None][:2]
        date = time.strftime("%Y-%m-%d", time.localtime(file.stat().st_mtime))
        versions = about.get("versions", {})
        python = versions.get("python")
        summary["setting"] = {"date": date, "card": card, "driver": driver, "python": python, "versions": versions}
    return summary


def merged(summaries):
    """Return the arguments of `section` for each card."""
    cards = {}
    for summary in summaries:
        about = cards.setdefault(summary["setting"]["card"], {"parts": [], "found": {}, "dates": []})
        about["setting"] = summary["setting"]
        about["dates"].append(summary["setting"]["date"])
        about["parts"] += summary["parts"]
        about["found"] |= summary["found"]
    return [*cards.values()]


def placed(text, section):
    """Return a file's text with the section between the markers."""
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{section}\n{END}{rest.split(END, 1)[1]}"


def section(setting, parts, found, dates):
    """Return the tables of a card."""
    versions = ", ".join(f"{name} {version}" for name in ("torch", "triton", "timm", "transformers", "lightly")
                         if (version := setting["versions"].get(name)))  # fmt: skip
    when = dates[0] if len({*dates}) == 1 else f"{min(dates)} to {max(dates)}"
    lines = [
        f"### {setting['card'] or 'No card'}",
        "",
        f"{when}, driver {setting['driver']}, Python {setting['python']}, {versions}. Commands begin with `{COMMAND}`.",
    ]
    given = {
        stem(name, rest): (text, rest) for text, (name, _, rest) in ((p["part"], split_part(p["part"])) for p in parts)
    }
    for kind, make in TABLES.items():
        tables = {}  # by what was timed: findings and commands of several parts may make one table
        for name, findings in found.items():
            if name.split("_")[0] == kind:
                text, rest = given.get(name, (name, []))
                told = {**USUAL, **dict(word.split("=", 1) for word in rest if "=" in word)}
                key = tuple(told[one] for one in USUAL) if kind == "bench" else name
                about = tables.setdefault(key, {"findings": {}, "told": told, "commands": []})
                about["findings"] = findings | about["findings"]
                about["commands"].append(f"`{text}`")
        for about in tables.values():
            lines += ["", *make(about["findings"], about["told"], setting), "", ", ".join(about["commands"])]
    if unfinished := [part for part in parts if part["ended"] != "done"]:
        lines += ["", "Not finished: " + "; ".join(f"`{part['part']}`: {part['ended']}" for part in unfinished) + "."]
    return "\n".join(lines)


def table(head, rows):
    """Return the lines of a table whose first column is text and whose others are numbers."""
    return [
        f"| {' | '.join(head)} |",
        f"| --- |{' ---: |' * (len(head) - 1)}",
        *(f"| {' | '.join(str('' if cell is None else cell) for cell in row)} |" for row in rows),
    ]


def steps(findings, told, setting):
    gflop, peak = findings["flops"].get("gflop_per_image"), stated(setting["card"] or "", "bf16")
    timed = {name: row for name, row in findings.items() if "ms" in row}
    best = max((row["img/s"] for name, row in timed.items() if name in PEERS), default=None)
    rows = []
    for name, row in timed.items():
        mfu = f"{100 * row['img/s'] * gflop * 1e9 / peak:.1f}" if gflop and peak else None
        ratio = f"{row['img/s'] / best:.2f}" if best else None
        who = name.removesuffix(" again")
        label = (OURS | PEERS).get(who, f"ours, {who}") + name[len(who) :]
        cells = (f"{row['img/s']:,.0f}", ratio, f"{row['ms']:.1f}", f"{row['host_ms']:.1f}", mfu, row.get("peak_GB"))
        rows.append((label, *cells))
    rows += [(name, *failure(row)) for name, row in findings.items() if "ms" not in row and name != "flops"]
    about = f"{told['method'].upper()}, {told['arch']}, {told['batch']} images"
    about += f", {gflop:.1f} GFLOP an image by the paper's formula" if gflop else ""
    head = ("", "img/s", "of the best peer's", "ms", "host ms", "MFU %", "peak GB")
    return [f"**A step: {about}**", "", *table(head, rows)]


def failure(row):
    """Return a row's cells for what could not be measured."""
    return [str(row.get("error", row.get("short", row)))[:120].replace("|", "/").replace("\n", " ")]


def in_words(value):
    """Return a finding in a line."""
    if isinstance(value, dict) and "error" in value:
        return "**" + failure(value)[0] + "**"
    if isinstance(value, dict):
        short = value.get("short", {key: one for key, one in value.items() if key != "seconds"})
        if isinstance(short, dict):
            short = ", ".join(f"{key}: {in_words(one)}" for key, one in short.items())
        value = short
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text[:300].replace("|", "/").replace("\n", " ")


def rows_in_words(title):
    """Return a table that says each finding in a line."""

    def make(findings, told, setting):
        lines = table(("", "found"), [(name, in_words(value)) for name, value in findings.items()])
        return [f"**{title}**", "", lines[0], "| --- | --- |", *lines[2:]]

    return make


def micro(findings, told, setting):
    """Return a table of attention's kernels, and the other pieces in a line each."""
    kernels = ("ours", "as chosen", "CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
    rows, others = [], {}
    for name, value in findings.items():
        if name.startswith("attention"):
            cells = [value.get(kernel, {}) for kernel in kernels]
            rows.append((name, *(cell.get("both_ms") if isinstance(cell, dict) else "refused" for cell in cells)))
        else:
            others[name] = value
    head = ("forward and backward, ms", *(kernel.removesuffix("_ATTENTION").lower() for kernel in kernels))
    return [
        "**Attention by our kernel and torch's**",
        "",
        *table(head, rows),
        "",
        *rows_in_words("Pieces of a step")(others, told, setting),
    ]


def machine(findings, told, setting):
    """Return a line about the machine."""
    ceilings, about = findings.get("ceilings", {}), findings.get("machine", {})
    missing = [name for name, value in findings.get("imports", {}).items() if value != "ok" and name != "seconds"]
    line = f"{about.get('cores')} cores; a copy runs at {ceilings.get('copy_TB_s')} TB/s, "
    line += f"a product of bf16 matrices at {ceilings.get('bf16_TFLOP_s')} TFLOP/s."
    return [line + (f" Not to be imported: {', '.join(missing)}." if missing else "")]


TABLES = {  # by part, in the order of the section
    "env": machine,
    "bench": steps,
    "checks": rows_in_words("Checks"),
    "tests": rows_in_words("Tests"),
    "recipe": rows_in_words("A recipe from its command line to its scores"),
    "trainer": rows_in_words("Steps under the Trainer"),
    "loader": rows_in_words("The loader"),
    "profile": rows_in_words("Kernels of a step, ms"),
    "micro": micro,
}


if __name__ == "__main__":
    main()
