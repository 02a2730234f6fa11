"""Images per second that one processor core gets ready from each kind of data source, beside the folder's, in one run.

python benchmarks/sources.py --data photos [--rounds 5] [--json outputs/sources.json]

The same files as a folder, a list, a zip file, a table of Hugging Face's `datasets`, packed shards (images mixed over all, and
over windows), and shards in an object store on this machine (moto, in a process of its own), which are fetched anew for every
round. Each contestant has one loader process with one thread, and the rounds have changing order. What a source makes of an
epoch is timed from its fifth batch on; of the object store, the seconds to the first batch are told as well.

Needs `pip install datasets s3fs "moto[server]"`; what is not installed is left out. Without --data, 400 JPEGs are drawn.
"""

import argparse
import importlib.util
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from loader import SKIPPED, draw_photographs, processor
from rich.console import Console
from rich.table import Table

from sslvision.augment.crops import Crop
from sslvision.cli.compose import compose_settings
from sslvision.cli.recipes import COMMANDS
from sslvision.data.loader import training_loader
from sslvision.data.sampler import EpochBatches
from sslvision.data.sources.folder import open_folder
from sslvision.data.sources.list_file import open_list
from sslvision.data.sources.webdataset import open_webdataset
from sslvision.workflows.packing import pack

BUCKET = "s3://photos/shards"
KEYS = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_DEFAULT_REGION": "us-east-1"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder of images; default: 400 JPEGs drawn for it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images-per-shard", type=int, help="default: so many that there are 32 shards")
    parser.add_argument("--window", type=int, default=4, help="shards whose images are mixed")
    parser.add_argument("--json", type=Path, default=Path("outputs/sources.json"))
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be 2 or more: one round has no quartiles")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        os.environ["XDG_CACHE_HOME"] = str(scratch / "caches")
        folder = Path(arguments.data or draw_photographs(scratch / "images", 400)).absolute()
        contestants = line_up(folder, scratch, arguments)
        with object_store(scratch / "shards") as found:
            if found:
                contestants |= of_the_store(scratch, arguments)
            rates, first = race(contestants, arguments)
    report(rates, first, arguments)


# The sources.


def line_up(folder, scratch, arguments):
    """Return functions by name that open the same images."""
    train = open_folder(folder, holdout=0).train
    paths = [train.describe(index) for index in range(len(train))]
    (scratch / "images.csv").write_text("".join(f"{path}\n" for path in ["path", *paths]))
    with zipfile.ZipFile(scratch / "images.zip", "w", strict_timestamps=False) as archive:
        for path in paths:
            archive.write(path, Path(path).relative_to(folder))
    per_shard = arguments.images_per_shard or max(1, len(train) // 32)
    words = [
        f"data={folder}",
        "data.channels=3",
        "data.holdout=0",
        f"shard_size={per_shard}",
        "workers=0",
        "split=train",
    ]
    pack(compose_settings([*words, f"output_dir={scratch / 'shards'}"], COMMANDS["pack"]))
    found = {
        "folder": lambda: open_folder(folder, holdout=0),
        "list": lambda: open_list(scratch / "images.csv", holdout=0),
        "zip": lambda: open_folder(scratch / "images.zip", holdout=0),
        "shards": lambda: open_webdataset(str(scratch / "shards"), holdout=0),
        "shards, windows": lambda: open_webdataset(str(scratch / "shards"), holdout=0, window=arguments.window),
    }
    if importlib.util.find_spec("datasets"):
        import datasets

        from sslvision.data.sources.hugging_face import open_hugging_face

        rows = {"image": [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(scratch / "table")
        found["hf"] = lambda: open_hugging_face(str(scratch / "table"), holdout=0)
    return found


@contextmanager
def object_store(shards):
    """Start an object store with the shards in it, and tell whether there is one."""
    if not all(importlib.util.find_spec(name) for name in ("s3fs", "moto", "flask")):
        yield False
        return
    import s3fs

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ |= {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        system = s3fs.S3FileSystem()
        system.mkdir("photos")
        for file in sorted(shards.rglob("*")):
            if file.is_file() and not file.name.startswith("."):
                system.pipe_file(f"photos/shards/{file.relative_to(shards)}", file.read_bytes())
        yield True
    finally:
        server.terminate()
        server.wait()


def of_the_store(scratch, arguments):
    def opened():
        shutil.rmtree(scratch / "kept", ignore_errors=True)
        splits = open_webdataset(BUCKET, holdout=0, window=arguments.window, shard_dir=str(scratch / "kept"))
        shutil.rmtree(scratch / "kept", ignore_errors=True)  # what was looked at
        splits.train.cache.touched.clear()
        return splits

    return {"bucket": opened}


# The race.


def race(contestants, arguments):
    """Return images per second of every round, and seconds to the first batch; each round has another order."""
    rates, first = ({name: [] for name in contestants} for _ in range(2))
    names = list(contestants)
    for number in range(arguments.rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order if number % 2 else order[::-1]:
            rate, waited = epoch(contestants[name]().train, number, arguments.batch)
            rates[name].append(rate)
            first[name].append(waited)
    return rates, first


def epoch(source, number, batch):
    """Return images per second of an epoch, and the seconds to its first batch."""
    steps = len(source) // batch
    if steps <= SKIPPED + 1:
        raise SystemExit(f"{len(source)} images are too few: {SKIPPED + 2} batches of {batch} are needed.")
    keys = EpochBatches(
        *(len(source),),
        global_batch=batch,
        seed=0,
        groups=getattr(source, "groups", None),
        updates_done=lambda: number * steps,
    )
    crops = (Crop((224, 224), (0.2, 1.0)),)
    begun = time.perf_counter()
    ends = [time.perf_counter() for _ in training_loader(source, crops, keys, workers=1, pin_memory=False)]
    return batch * (len(ends) - SKIPPED) / (ends[-1] - ends[SKIPPED - 1]), ends[0] - begun


def report(rates, first, arguments):
    """Print a table, and write all figures."""
    table = Table(title="images per second of one core", title_justify="left")
    for column in ("", "images/s", "x folder [quartiles]", "seconds to the first batch"):
        table.add_column(column, justify="right" if column else "left")
    rows = {}
    for name, values in rates.items():
        low, median, high = statistics.quantiles(
            [one / other for one, other in zip(values, rates["folder"], strict=True)]
        )
        rows[name] = {
            "images_per_second": statistics.median(values),
            "rounds": values,
            "times_folder": {"median": median, "quartiles": [low, high]},
            "seconds_to_first_batch": statistics.median(first[name]),
        }
        told = f"{median:.2f} [{low:.2f}, {high:.2f}]"
        table.add_row(name, f"{statistics.median(values):,.0f}", told, f"{statistics.median(first[name]):.2f}")
    Console(width=120).print(table)
    if "bucket" in rates:
        shares = [one / other for one, other in zip(rates["bucket"], rates["shards, windows"], strict=True)]
        rows["bucket"]["times_shards_in_windows"] = statistics.median(shares)
        print(f"bucket: {statistics.median(shares):.0%} of the same shards on the disk, in the same order (aim: 90 %)")
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    setting = {"batch": arguments.batch, "window": arguments.window, "processor": processor()}
    setting |= {"load_before": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    arguments.json.write_text(json.dumps({"setting": setting, **rows}, indent=1) + "\n")
    print(f"All figures: {arguments.json}")


if __name__ == "__main__":
    main()
