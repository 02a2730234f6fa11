"""What each regularizer brings when a pretrained backbone is fine-tuned on few labels.

python benchmarks/regularizers.py --run outputs/mae [--data embedded] [--labels 10 50] [--seeds 0 1 2]
python benchmarks/regularizers.py --run outputs/photos --data folder --updates 100 data.root=~/imagenette
python benchmarks/regularizers.py --report

Each line of CHANGES is one change of `finetune run=... scratch=false`. The same seed has the same labeled images, order and
head in all of them, so that differences to the first line are taken in pairs. What is done stands in outputs/regularizers/ and
is not repeated. The test images choose nothing: weights are chosen on held-out training images, as in any fine-tuning.
"""

import argparse
import csv
import shutil
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

import sslvision

FOLDER = Path("outputs/regularizers")
CHANGES = {
    "none": {},
    "no early choice (weights of the last update)": {"evaluations": 1},
    "patience=5": {"patience": 5},
    "weight_decay=0": {"method.weight_decay": 0.0},
    "weight_decay=0.3": {"method.weight_decay": 0.3},
    "label_smoothing=0.1": {"method.label_smoothing": 0.1},
    "mixup=0.8": {"method.mixup": 0.8},
    "cutmix=1": {"method.cutmix": 1.0},
    "cutout=0.5": {"method.cutout": 0.5},
    "erase=0.25": {"method.erase": 0.25},
    "randaugment=9": {"randaugment": 9},
    "backbone.drop_rate=0.2": {"backbone.drop_rate": 0.2},
    "backbone.drop_path_rate=0.1": {"backbone.drop_path_rate": 0.1},
    "weight_noise=0.1": {"method.weight_noise": 0.1},
    "ema=0.99": {"method.ema": 0.99},
    "flip=true": {"method.flip": True},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of the pretraining run")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--labels", type=int, nargs="+", default=[10, 50], help="labeled images per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, help="of each fine-tuning (default: as many as `finetune` makes)")
    parser.add_argument("--report", action="store_true", help="print what there is")
    parser.add_argument("settings", nargs="*", help="further settings of the data, such as data.root=photos")
    arguments = parser.parse_args()
    if not arguments.report:
        measure(arguments)
    report()


def measure(arguments):
    """Fine-tune once for each seed, number of labels and change that is not done."""
    length = {"epochs": 1, "min_updates": arguments.updates} if arguments.updates else {}
    named = f"-{arguments.updates}-updates" if length else ""
    file = FOLDER / f"{Path(arguments.run).name}-on-{arguments.data}{named}.csv"
    file.parent.mkdir(parents=True, exist_ok=True)
    done = {(row["change"], int(row["labels"]), int(row["seed"])) for row in rows_of(file)}
    given = {key: str(Path(value).expanduser()) for key, value in (word.split("=", 1) for word in arguments.settings)}
    for seed in arguments.seeds:
        for labels in arguments.labels:
            for change, settings in CHANGES.items():
                if (change, labels, seed) in done:
                    continue
                folder = file.with_suffix(".run")
                results = sslvision.finetune(
                    arguments.run,
                    data=arguments.data,
                    labels_per_class=labels,
                    seed=seed,
                    scratch=False,
                    output_dir=str(folder),
                    overwrite=True,
                    **given,
                    **length,
                    **settings,
                )
                row = [change, labels, seed, results["fine_tuned"]["top1"], results["frozen_features"]["top1"]]
                with file.open("a", newline="") as stream:
                    csv.writer(stream).writerow(row)
                shutil.rmtree(folder)


def rows_of(file):
    """Return the rows of a file, if it exists."""
    if not file.is_file():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream, ["change", "labels", "seed", "top1", "frozen"]))


def report():
    """Print, for each set and number of labels, the mean top-1 of each change and its mean difference to none, in pairs."""
    for file in sorted(FOLDER.glob("*.csv")):
        rows = rows_of(file)
        found = {(row["change"], int(row["labels"]), int(row["seed"])): float(row["top1"]) for row in rows}
        numbers = sorted({labels for _, labels, _ in found})
        table = Table(title=f"{file.stem}: top-1 %, and difference to none, mean ± deviation", title_justify="left")
        for column in ("change", *(f"{labels} a class" for labels in numbers)):
            table.add_column(column)
        for change in CHANGES:
            table.add_row(change, *(cell(found, change, labels) for labels in numbers))
        table.add_row("frozen features, linear probe", *(frozen(rows, labels) for labels in numbers))
        Console(width=120).print(table)


def cell(found, change, labels):
    seeds = [seed for name, number, seed in found if (name, number) == (change, labels)]
    if not seeds:
        return "-"
    scores = [found[change, labels, seed] for seed in seeds]
    if change == "none":
        return spread(scores)
    gains = [found[change, labels, seed] - found["none", labels, seed] for seed in seeds]
    return f"{statistics.mean(scores):.1f}  ({spread(gains, signed=True)})"


def frozen(rows, labels):
    return spread([float(row["frozen"]) for row in rows if int(row["labels"]) == labels and row["change"] == "none"])


def spread(values, *, signed=False):
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{'+' if signed else ''}.1f}{deviation}"


if __name__ == "__main__":
    main()
