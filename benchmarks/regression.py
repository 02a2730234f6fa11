"""Whether a change has cost speed: our ratio to each peer at a small size, beside the last recorded one.

python benchmarks/regression.py [--record]

A ratio to a peer that did not change says more than a time does on a machine that others use, too. Run by hand, before and
after work on the data path, a method or a backbone; it takes three minutes and wants the machine for itself.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

RECORDED = Path(__file__).with_name("regression.json")
THROUGHPUT = Path(__file__).with_name("throughput.py")
SIZES = {  # method: what throughput.py is told
    "mae": [
        "--arch",
        "vit_tiny_patch16_224",
        "--batch",
        "8",
        "decoder_embed_dim=192",
        "decoder_num_heads=3",
        "decoder_depth=4",
    ],
    "dino": ["--arch", "vit_tiny_patch16_224", "--batch", "2", "prototypes=4096"],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="keep the figures of this run as those to compare with")
    parser.add_argument("--rounds", default="15")
    arguments = parser.parse_args()
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    found = {method: measure(method, arguments.rounds) for method in SIZES}
    console = Console()
    for method, now in found.items():
        console.print(compare(method, now, recorded.get(method)))
    if arguments.record:
        RECORDED.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"Recorded in {RECORDED}.")


def measure(method, rounds):
    """Return the setting, and each peer's time as multiples of ours: median and quartiles over rounds."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        words = ["--method", method, "--levels", "step", "--rounds", rounds, "--json", str(file), *SIZES[method]]
        subprocess.run([sys.executable, str(THROUGHPUT), *words], check=True, stdout=subprocess.DEVNULL)
        figures = json.loads(file.read_text())
    peers = {name: row["times_ours"] for name, row in figures["step"].items() if not name.startswith("ours")}
    return {"setting": figures["setting"], "peers": peers}


def compare(method, now, before):
    """Return a table; a ratio below the quartiles of the recorded rounds is worth a look."""
    device, date = now["setting"]["device"], before and before["setting"]["date"]
    table = Table(title=f"{method}: a peer's time / ours, {device}", title_justify="left")
    for column in ("peer", "now [quartiles]", f"recorded {date}" if before else "nothing recorded", ""):
        table.add_column(column)
    same = before and before["setting"]["device"] == device
    for name, ratio in now["peers"].items():
        old = before and before["peers"].get(name)
        told = (
            ""
            if not old or not same
            else "slower than recorded"
            if ratio["median"] < old["quartiles"][0]
            else "as recorded"
        )
        if old and not same:
            told = f"recorded on another machine: {before['setting']['device']}"
        table.add_row(name, shown(ratio), shown(old) if old else "", told)
    return table


def shown(ratio):
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.3f} [{low:.3f}, {high:.3f}]"


if __name__ == "__main__":
    main()
