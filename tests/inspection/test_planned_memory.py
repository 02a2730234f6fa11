"""The peak that dry_run=plan computes is the one that training has: benchmarks/plan_memory.py on a small case."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "plan_memory.py"
WORDS = ["recipe=mae", "data=digits", "data.channels=3", "optimizer=adamw", "compile=false", "cuda_graphs=false"]
WORDS += [
    "backbone.image_size=32",
    "backbone.embed_dim=512",
    "backbone.num_heads=8",
    "backbone.depth=8",
    "batch_size=32",
]


def deviations(folder, *words):
    """Return the deviation of the plan from the measured peak in each way to train."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *words, "--json", str(folder / "found.json"), "--words", *WORDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "found.json").read_text())
    print(done.stdout)
    return {(one["processes"], one["strategy"]): one["deviation"] for one in found}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads peaks from Linux's /proc")
def test_the_planned_peak_is_the_measured_one_within_10_percent(tmp_path):
    found = deviations(tmp_path, "--processes", "1", "2")
    assert found.keys() == {(1, "auto"), (2, "ddp"), (2, "fsdp2")}
    assert max(map(abs, found.values())) < 0.1, found
