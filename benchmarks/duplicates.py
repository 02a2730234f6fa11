"""Precision and recall of `sslvision duplicates` on planted copies: resized to half, compressed again, mirrored.

python benchmarks/duplicates.py --data ~/imagenette --run outputs/first
"""

import argparse
import csv
import itertools
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageOps

KINDS = ("resized", "compressed", "mirrored")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of val/ with class folders")
    parser.add_argument("--run", required=True, help="run=... of sslvision embed")
    parser.add_argument("--images", type=int, default=1000, help="of which three fifths are copied")
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.7, 0.8, 0.9, 0.99])
    parser.add_argument("--pixels", type=float, nargs="+", default=[0.95, -1])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        photos, embedded = Path(folder) / "photos", Path(folder) / "embedded"
        plant(sorted(arguments.data.expanduser().glob("val/*/*")), photos, arguments.images)
        sslvision("embed", f"run={arguments.run}", f"data={photos}", "data.holdout=0", f"output_dir={embedded}")
        for pixels, threshold in itertools.product(arguments.pixels, arguments.thresholds):
            found, words = Path(folder) / f"{threshold}-{pixels}", (f"threshold={threshold}", f"pixels={pixels}")
            sslvision("duplicates", f"embeddings={embedded}", *words, f"output_dir={found}")
            report(found / "duplicates.csv", " ".join(words))


def plant(files, photos, images):
    """Write images, and copies of three fifths of them, whose names begin with that of the original."""
    photos.mkdir()
    random.Random(0).shuffle(files)
    for number, file in enumerate(files[:images]):
        image, name = Image.open(file).convert("RGB"), f"{number:06d}"
        image.save(photos / f"{name}.png")
        if number < images // 5:
            half = (image.width // 2, image.height // 2)
            image.resize(half, Image.Resampling.LANCZOS).save(photos / f"{name}-resized.png")
        elif number < 2 * images // 5:
            image.save(photos / f"{name}-compressed.jpg", quality=50)
        elif number < 3 * images // 5:
            ImageOps.mirror(image).save(photos / f"{name}-mirrored.png")


def sslvision(command, *words):
    subprocess.run([sys.executable, "-m", f"sslvision.{command}", *words], check=True, stdout=subprocess.DEVNULL)


def report(file, words):
    """Print how many pairs were found, how many are right, and how many of each kind. All pairs of a group count."""
    groups = {}
    with file.open(newline="") as opened:
        for row in csv.DictReader(opened):
            groups.setdefault(row["group"], []).append(row["path"])
    pairs = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
    right = [pair for pair in pairs if pair[0][:6] == pair[1][:6]]
    kinds = {kind: sum(any(kind in path for path in pair) for pair in right) for kind in KINDS}
    print(
        f"{words}: {len(pairs):,} pairs, {len(right) / max(1, len(pairs)):.1%} right, {kinds}",
        flush=True,
    )


if __name__ == "__main__":
    main()
