"""Part `tests`: the parts of the test suite that matter on a GPU machine, and those that only run there."""

import importlib.util
import os
import subprocess
import sys

from benchmarks.on_gpu.findings import DRY, FILES, ROOT, note

FOLDERS = ("nn", "methods", "augment", "optim", "training", "evaluation")
SUITE = [*(f"tests/{folder}" for folder in FOLDERS), "tests/workflows/test_probing.py"]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::DeprecationWarning", "-p", "no:cacheprovider"]


def suite(seconds="150", gpu_seconds="250", processes="8"):
    """Run tests that need no GPU, several at a time, and then those marked `gpu`, one after the other.

    Args:
        seconds, gpu_seconds: limits of the two.
        processes: of pytest-xdist, if it is installed.
    """
    parallel = ["-n", processes] if importlib.util.find_spec("xdist") and not DRY else []
    run("suite", [*parallel, *(["tests/nn/test_masking.py"] if DRY else SUITE)], float(seconds))
    run("on the GPU", ["-m", "gpu", *(["tests/gpu"] if DRY else ["tests"])], float(gpu_seconds))


def run(name, words, seconds):
    try:
        done = subprocess.run(
            [*PYTEST, *words],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        text, code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        text, code = (late.stdout or b"").decode(errors="replace"), "out of time"
    (FILES / f"pytest_{name.replace(' ', '_')}.txt").write_text(text)
    lines = text.splitlines()
    failed = [line[:230] for line in lines if line.startswith(("FAILED", "ERROR"))]
    note(name, {"code": code, "last": lines[-1][:200] if lines else "", "failed": failed[:60]})
