"""Run parts one after the other on a GPU machine, each in a process of its own with a time limit of its own.

python3 benchmarks/on_gpu/run.py [--seconds 515] [--out FOLDER] PART[:seconds][:key=value...] ...

env       versions, card, memory; copy bandwidth and speed of a matrix product, the two ceilings
checks    does CUDA compute what a CPU computes, eager and compiled; waits, skipped updates, seeds, TF32 (only=name,name)
tests     part of the test suite on this machine (seconds=150 processes=8)
recipe    a recipe from its command line to its scores: recipe:120:NAME:recipe=mae_gpu:epochs=40
trainer   images per second under the Trainer, without evaluation: recipes=mae_gpu,dino_gpu steps=300
bench     images per second, MFU and memory of a step: method=mae arch=vit_base_patch16_224 batch=256 who=run,eager,hf
profile   kernels of a step by time, and a trace
micro     the pieces that decide: attention kernels, matrix products, decoder blocks, photometry
loader    images per second of the loader by number of processes, and from files through the Trainer

A part that fails, hangs or crashes costs its own limit at most: its process group is killed and the next part begins. Three
files are written to --out, or $OUT: log.txt (what the parts print), summary.json (what they find, rewritten after every part)
and files.tar.gz (traces, pictures, test reports; left out above 15 MB).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.on_gpu.findings import ROOT, SCRATCH, split_part
from benchmarks.on_gpu.part import PARTS

LEAST = 15  # seconds: a part with less than this left is not begun
USUAL = 120  # seconds of a part that names none
LARGEST_FILE, LARGEST_ARCHIVE = 40 << 20, 15 << 20  # bytes
DRY_VARIABLES = {
    "ON_GPU_DRY": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
}  # more threads wait for each other
LIBRARIES = ("torch", "torchvision", "triton", "timm", "pytorch-lightning", "transformers", "lightly")


def main():
    arguments = parse(sys.argv[1:])
    started, ends = time.time(), time.monotonic() + arguments.seconds
    out = arguments.out.absolute()
    for folder in (out, SCRATCH / "found", SCRATCH / "files"):
        folder.mkdir(parents=True, exist_ok=True)
    summary = {"setting": setting(arguments.dry), "parts": [], "found": {}}
    with open(out / "log.txt", "ab") as log:
        for text in arguments.parts:
            name, limit, words = split_part(text)
            limit = min(limit or USUAL, ends - time.monotonic())
            if limit < LEAST:
                summary["parts"].append({"part": text, "ended": "not begun: no time left"})
                continue
            log.write(f"\n=== {text} (at most {limit:.0f} s)\n".encode())
            log.flush()
            ended = run_part(text, [name, *words], limit, log, environment(arguments.dry))
            print(f"{text:58s} {ended['ended']:12s} {ended['seconds']:6.1f} s", flush=True)
            summary["parts"].append(ended)
            write(out, summary)
    write(out, summary)
    pack(out / "files.tar.gz")
    for file in sorted((SCRATCH / "found").glob("*.json")):
        if file.stat().st_mtime >= started - 1:  # of this call
            print_short(file)


def parse(words):
    """Return the command line's arguments, once all its parts are known to exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=515, help="for all parts together")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "outputs/on_gpu")))
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU, to test the program")
    parser.add_argument("parts", nargs="+", metavar="PART[:seconds][:word...]")
    arguments = parser.parse_args(words)
    for text in arguments.parts:
        if split_part(text)[0] not in PARTS:
            parser.error(f"{text}: there is no such part; there are {', '.join(PARTS)}")
    return arguments


def setting(dry):
    """Return date, card, driver and versions: the head of every table made of this call."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        card, driver = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].split(", ")
        )
    except (OSError, subprocess.CalledProcessError, ValueError):
        card = driver = None
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "date": time.strftime("%Y-%m-%d"),
        "card": "CPU, dry run" if dry else card,
        "driver": driver,
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": versions,
    }


def environment(dry):
    """Return the environment variables of a part."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "SCRATCH": str(SCRATCH),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(SCRATCH / "inductor"),
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        **(DRY_VARIABLES if dry else {}),
    }


def run_part(text, words, limit, log, variables):
    """Return how a part ended. Nothing that it started is left running."""
    began, first = time.monotonic(), log.seek(0, os.SEEK_END)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.on_gpu.part", *words],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=variables,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        code = process.wait(limit)
        ended = "done" if code == 0 else f"failed ({code})"
    except subprocess.TimeoutExpired:
        ended = "out of time"
    try:
        os.killpg(process.pid, signal.SIGTERM)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    report = {"part": text, "ended": ended, "seconds": round(time.monotonic() - began, 1)}
    if ended != "done":
        with open(log.name, "rb") as printed:
            printed.seek(max(first, log.seek(0, os.SEEK_END) - 1500))
            report["last_words"] = printed.read().decode(errors="replace")
    return report


def write(out, summary):
    """Write summary.json with all that has been found on this machine, in earlier calls too."""
    for file in sorted((SCRATCH / "found").glob("*.json")):
        summary["found"][file.stem] = json.loads(file.read_text())
    (out / "summary.json").write_text(json.dumps(summary, indent=1))


def pack(target):
    """Write an archive of the files that parts left, unless it gets too large to come back."""
    with tarfile.open(target, "w:gz") as archive:
        for file in sorted((SCRATCH / "files").rglob("*")):
            if file.is_file() and file.stat().st_size < LARGEST_FILE:
                archive.add(file, file.relative_to(SCRATCH / "files"))
    if target.stat().st_size > LARGEST_ARCHIVE:
        target.unlink()


def print_short(file):
    """Print a line for each finding: what a machine sends back may be cut at some thousand characters."""
    for name, value in json.loads(file.read_text()).items():
        text = json.dumps(value.get("short", value) if isinstance(value, dict) else value)
        print(f"{file.stem}: {name}: {text[:190]}")


if __name__ == "__main__":
    main()
