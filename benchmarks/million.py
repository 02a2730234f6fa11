"""A million files: seconds from the command to the first update, the first and the second time, and memory of all processes.

python benchmarks/million.py --source /data/imagenette/train --at /tmp/million

Makes a million hard links to some JPEGs, in a thousand folders and in one, and pretrains a tiny MAE on them through the command
line, twice each, until `--updates` updates are done. With `--rows 100000000` also on a Parquet list of so many paths, which
lead to the same files. What is printed of a process: resident memory, its proportional share (a page that four processes
map counts a quarter in each), what it alone holds, and the highest resident memory that it ever had; in MiB.
"""

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

LINKS = 60_000  # to one file; ext4 has 65,000
TINY = (
    "recipe=mae data.channels=3 backbone.image_size=32 backbone.patch_size=8 batch_size=64 epochs=1 knn_every_epochs=0"
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="a folder of JPEGs, at any depth")
    parser.add_argument("--at", type=Path, required=True, help="where the links, the cache and the runs are made")
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, nargs="*", default=[1000, 1])
    parser.add_argument("--rows", type=int, default=0, help="rows of a Parquet list")
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    files = copies(arguments.source, arguments.at / "files", at_least=-(-arguments.images // LINKS), usual=200)
    for folders in arguments.folders:
        root = linked(files, arguments.at / f"{arguments.images}_in_{folders}", arguments.images, folders)
        print(f"\n{arguments.images:,} files in {folders:,} folder(s)")
        twice(arguments, ["data=folder", f"data.root={root}"])
    if arguments.rows:
        table = listed(files, arguments.at / f"{arguments.rows}.parquet", arguments.rows)
        print(f"\n{arguments.rows:,} rows of a Parquet list, {table.stat().st_size:,} bytes")
        twice(arguments, ["data=list", f"data.file={table}"])


def copies(source, folder, *, at_least, usual):
    """Copy some JPEGs, so that links do not reach the originals."""
    if not folder.is_dir():
        found = sorted(source.rglob("*.JPEG")) + sorted(source.rglob("*.jpg"))
        folder.mkdir(parents=True)
        for number, file in enumerate(found[:: max(1, len(found) // max(at_least, usual))]):
            shutil.copyfile(file, folder / f"{number:05}.jpg")
    files = sorted(folder.iterdir())
    if len(files) < at_least:
        raise SystemExit(f"{source} has {len(files)} JPEGs; {at_least} are needed.")
    return files


def linked(files, root, images, folders):
    """Link to the files, in turn, from that many folders; return their folder."""
    if root.is_dir():
        return root
    part = root.with_name(f"{root.name}.part")
    part.mkdir()
    each = -(-images // folders)
    turn = itertools.cycle(files)
    for folder in range(folders):
        into = part / f"class_{folder:04}" if folders > 1 else part
        into.mkdir(exist_ok=True)
        for image in range(min(each, images - folder * each)):
            os.link(next(turn), into / f"image_{folder * each + image:08}.jpg")
    return part.rename(root)


def listed(files, table, rows):
    """Write a Parquet list of paths that are all different, and all lead to the files.

    Folders named 00 to 99 are links to the folder that they are in: files/12/34/56/00078.jpg is files/00078.jpg.
    """
    import pyarrow as pa
    from pyarrow import compute, parquet

    if table.is_file():
        return table
    for number in range(100):
        link = files[0].parent / f"{number:02}"
        if not link.is_symlink():
            link.symlink_to(".")
    names = pa.array([file.name for file in files])
    classes = pa.array([f"class_{number:04}" for number in range(1000)])
    schema = pa.schema([("path", pa.string()), ("label", pa.dictionary(pa.int32(), pa.string()))])

    def of_two(numbers):
        return compute.utf8_lpad(pa.array(numbers % 100).cast(pa.string()), 2, "0")

    part = table.with_suffix(".part")
    with parquet.ParquetWriter(part, schema) as writer:
        for start in range(0, rows, 1 << 20):
            numbers = np.arange(start, min(rows, start + (1 << 20)))
            turns = numbers // len(files)
            folders = [of_two(turns // 100**level) for level in range(-(-len(str(rows // len(files))) // 2))]
            paths = compute.binary_join_element_wise(
                files[0].parent.name, *folders, names.take(pa.array(numbers % len(files))), "/"
            )
            labels = pa.DictionaryArray.from_arrays(pa.array((numbers % 1000).astype(np.int32)), classes)
            writer.write_table(pa.table({"path": paths, "label": labels}, schema=schema))
    return part.rename(table)


def twice(arguments, words):
    cache = arguments.at / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    for time_ in ("first", "second"):
        print(f"  {time_} start:")
        run(arguments, words, cache)


def run(arguments, words, cache):
    """Pretrain, print when the first update was done and what memory there was then and later, and stop."""
    with tempfile.TemporaryDirectory(dir=arguments.at) as output:
        command = [
            sys.executable,
            "-m",
            "sslvision.pretrain",
            *TINY.split(),
            *words,
            f"data.workers={arguments.workers}",
        ]
        command += [f"output_dir={output}/run", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu"]
        environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
        log = Path(output, "log")
        begun = time.perf_counter()
        with open(log, "w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        metrics = Path(output, "run", "metrics.csv")
        try:
            for updates in (1, arguments.updates):
                while updates_in(metrics) < updates:
                    if process.poll() is not None:
                        raise SystemExit(f"The run ended early:\n{log.read_text()[-3000:]}")
                    time.sleep(0.05)
                seconds = time.perf_counter() - begun
                print(f"    update {updates:,} after {seconds:.1f} s, {cpu_seconds(process.pid):.1f} s of CPU time")
                for one in memory(process.pid):
                    print(f"      {one}")
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def updates_in(metrics):
    """Return the number of updates that a run has logged."""
    try:
        lines = metrics.read_text().splitlines()
        return int(lines[-1].split(",")[0]) if len(lines) > 1 else 0
    except (OSError, ValueError):
        return 0


def cpu_seconds(pid):
    """Return the CPU time of a process and its children, in seconds."""
    ticks = 0
    for one in (pid, *children(pid)):
        fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
        ticks += sum(map(int, fields[11:15]))  # its own, and of children that have ended
    return ticks / os.sysconf("SC_CLK_TCK")


def memory(pid):
    """Return the memory of a process and its children, in words."""
    lines = []
    for number, one in enumerate((pid, *children(pid))):
        pages = values(f"/proc/{one}/smaps_rollup")
        own = pages["Private_Clean"] + pages["Private_Dirty"]
        highest = values(f"/proc/{one}/status")["VmHWM"]
        name = f"worker {number}" if number else "main"
        figures = {"resident": pages["Rss"], "proportional": pages["Pss"], "own": own, "highest": highest}
        lines.append(f"{name:9} " + ", ".join(f"{word} {size / 1024:,.0f}" for word, size in figures.items()))
    return lines


def values(file):
    """Return the sizes in kB of a file of /proc by name."""
    pairs = (line.split(":", 1) for line in Path(file).read_text().splitlines() if line.endswith("kB"))
    return {name: int(size.split()[0]) for name, size in pairs}


def children(pid):
    """Return the processes that a process has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


if __name__ == "__main__":
    main()
