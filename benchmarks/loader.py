"""Images per second that one processor core gets ready: ours, from JPEGs and from a cache, and the official pipelines.

python benchmarks/loader.py [--rounds 7] [--data folder] [--json outputs/loader.json]

The official pipelines of MAE and DINO are written anew from the papers, on PIL and torchvision as the authors had them. Each
contestant has one loader process with one thread and the same files, round by round in changing order. The JPEGs are drawn with
the spectrum of photographs (1/f noise, 500 x 375, quality 90).

The official pipelines send normalized floats. Ours sends bytes, and changes colors and normalizes on the training device.
What that would cost on one more CPU core is measured as well: "all on the CPU" is a loader process and our device's part done
by the same core, one after the other.
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from sslvision.augment.randomness import ImageRandom
from sslvision.cli.compose import compose_settings
from sslvision.data.cache import cached
from sslvision.data.loader import training_loader
from sslvision.data.sources.folder import open_folder
from sslvision.nn.normalize import IMAGENET_MEAN, IMAGENET_STD
from sslvision.training.trainer import configure_torch
from sslvision.workflows.method import method_from_settings

SKIPPED = 4  # batches that are not timed: those that the loader makes ahead while nobody asks, and one more
RECIPES = {"mae": "mae_vitb16_in1k", "dino": "dino_vits16_in1k"}
TARGETS = {"ours, JPEG": {"mae": 2, "dino": 8}, "ours, cache": {"mae": 10, "dino": 18}}
TINY = {"mae": ["decoder_embed_dim=16", "decoder_num_heads=2"], "dino": ["prototypes=64", "hidden=32", "bottleneck=16"]}
BACKBONE = ["backbone.embed_dim=32", "backbone.depth=1", "backbone.num_heads=2"]  # views do not depend on it


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=6, help="of each contestant in a round")
    parser.add_argument("--data", help="a folder of images; default: 200 JPEGs drawn for it")
    parser.add_argument("--json", type=Path, default=Path("outputs/loader.json"))
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be 2 or more: one round has no quartiles")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.data or draw_photographs(Path(scratch) / "images", 200)
        contestants = {method: line_up(method, folder, f"{scratch}/cache", arguments) for method in RECIPES}
        rates = race(contestants, arguments)
    figures = {method: compared(found, method) for method, found in rates.items()}
    report(figures)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    setting = {"batch": arguments.batch, "processor": processor(), "load_before": os.getloadavg()[0]}
    setting |= {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "data": arguments.data or "drawn"}
    arguments.json.write_text(json.dumps({"setting": setting, **figures}, indent=1) + "\n")
    print(f"All figures: {arguments.json}")


# Ours.


def line_up(method, folder, cache, arguments):
    """Return contestants by name, each a function of the round that returns images per second."""
    splits = open_folder(folder, holdout=0)
    kept = cached(splits, "disk", folder=cache)
    words = [f"recipe={RECIPES[method]}", f"data.root={folder}", *BACKBONE, *TINY[method]]
    ours = method_from_settings(compose_settings(words))
    official = Official(splits.train, official_mae if method == "mae" else OfficialDINO())

    def peer(number):
        keys = in_turn(len(splits.train), arguments, number)
        return rate(DataLoader(official, batch_sampler=keys, num_workers=1), arguments.batch)

    def own(source):
        def run(number):
            keys = Keys([(number, index) for index in part] for part in in_turn(len(source), arguments, number))
            return rate(training_loader(source, ours.crops, keys, workers=1, pin_memory=False), arguments.batch)

        return run

    def device_part(number):
        """Images per second of what is left for the training device, on one CPU core."""
        keys = Keys([(number, index) for index in part] for part in in_turn(len(splits.train), arguments, number))
        batch = next(iter(training_loader(kept.train, ours.crops, keys, workers=0, pin_memory=False)))
        batch = batch._replace(crops=[crop.contiguous() for crop in batch.crops])
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=lambda: sender.send(seconds_of_views(ours, batch)))
        process.start()
        sender.close()  # so that nobody waits for a process that failed
        seconds = receiver.recv()
        process.join()
        return arguments.batch / seconds

    return {
        "official": peer,
        "ours, JPEG": own(splits.train),
        "ours, cache": own(kept.train),
        "device part": device_part,
    }


def seconds_of_views(method, batch):
    """Return how long a process takes that trains on a CPU and is at its second batch."""
    configure_torch("cpu")
    with torch.inference_mode():
        for _ in range(2):
            start = time.perf_counter()
            method.views(batch, ImageRandom(0, batch.epoch, batch.indices))
    return time.perf_counter() - start


class Keys(list):
    """Batches of keys, which is all that a loader needs to know of an epoch."""

    seed = 0


def in_turn(images, arguments, number):
    """Return the batches of a round, each of other images."""
    order = iter(range(number, number + (arguments.batches + SKIPPED) * arguments.batch))
    return [[next(order) % images for _ in range(arguments.batch)] for _ in range(arguments.batches + SKIPPED)]


def rate(loader, batch, skipped=SKIPPED):
    """Return images per second of a loader, once what its processes made ahead has been taken."""
    ends = [time.perf_counter() for _ in loader]
    return batch * (len(ends) - skipped) / (ends[-1] - ends[skipped - 1])


def race(contestants, arguments):
    """Return images per second of every round; each round has another order."""
    rates = {method: {name: [] for name in found} for method, found in contestants.items()}
    everyone = [(method, name) for method, found in contestants.items() for name in found]
    for number in range(arguments.rounds):
        first = number % len(everyone)
        order = everyone[first:] + everyone[:first]
        for method, name in order if number % 2 else order[::-1]:
            rates[method][name].append(contestants[method][name](number))
    return rates


def compared(rates, method):
    """Return each contestant's rates, and how many times the official one's they are, round by round."""
    for name in ("ours, JPEG", "ours, cache"):
        both = zip(rates[name], rates["device part"], strict=True)
        rates[f"{name}, all on the CPU"] = [1 / (1 / loader + 1 / device) for loader, device in both]
    rows = {}
    for name, values in rates.items():
        ratios = [own / official for own, official in zip(values, rates["official"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "images_per_second": statistics.median(values),
            "rounds": values,
            "times_official": {"median": median, "quartiles": [low, high]},
            "target": TARGETS.get(name, {}).get(method),
        }
    return rows


# The official pipelines.


class Official(Dataset):
    """Files opened by PIL and changed one by one."""

    def __init__(self, source, change):
        self.source, self.change = source, change

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        with open(self.source.describe(index), "rb") as file:
            return self.change(Image.open(file).convert("RGB"))


TO_FLOATS = T.Compose([T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
BICUBIC = T.InterpolationMode.BICUBIC

# He et al. 2022, appendix A.1: a random resized crop and a flip.
official_mae = T.Compose(
    [T.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=BICUBIC), T.RandomHorizontalFlip(), TO_FLOATS]
)


class OfficialDINO:
    """Caron et al. 2021, section 3.2: BYOL's colors, blur and solarization on two large crops and eight small ones."""

    def __init__(self):
        colors = T.Compose(
            [
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
            ]
        )

        def view(size, scale, *last):
            return T.Compose([T.RandomResizedCrop(size, scale, interpolation=BICUBIC), colors, *last, TO_FLOATS])

        solarized = T.RandomApply([T.Lambda(ImageOps.solarize)], p=0.2)
        first = view(224, (0.4, 1.0), blurred(1.0))
        second = view(224, (0.4, 1.0), blurred(0.1), solarized)
        self.views = [first, second] + [view(96, (0.05, 0.4), blurred(0.5))] * 8

    def __call__(self, image):
        return [view(image) for view in self.views]


def blurred(probability):
    """Return a Gaussian blur by PIL, of a radius from 0.1 to 2 pixels."""
    by = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    return T.RandomApply([by], p=probability)


# What is said.


def draw_photographs(folder, count, height=375, width=500):
    """Write JPEGs whose spectrum falls with the frequency as that of photographs does, and return their folder."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    rows, columns = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / width) ** 1.2
    for number in range(count):
        noise = np.fft.irfft2(np.fft.rfft2(generator.standard_normal((3, height, width))) * fall, s=(height, width))
        noise = (noise - noise.mean()) / noise.std()
        pixels = (noise[:1] * 45 + noise * 20 + 118).clip(0, 255)  # brightness is common to the colors, mostly
        Image.fromarray(pixels.astype(np.uint8).transpose(1, 2, 0)).save(folder / f"{number:04}.jpg", quality=90)
    return folder


def processor():
    """Return the processor's name, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def report(figures):
    """Print a table for each method."""
    console = Console(width=120)
    for method, rows in figures.items():
        table = Table(title=f"{method}: images per second of one core", title_justify="left")
        for column in ("", "images/s", "x official [quartiles]", "target"):
            table.add_column(column, justify="right" if column else "left")
        for name, row in rows.items():
            low, high = row["times_official"]["quartiles"]
            ratio = f"{row['times_official']['median']:.2f} [{low:.2f}, {high:.2f}]"
            table.add_row(name, f"{row['images_per_second']:,.0f}", ratio, str(row["target"] or ""))
        console.print(table)


if __name__ == "__main__":
    main()
