"""Rows 1, 2, 4 and 6, many times over: a run killed at random moments ends with the weights of one that nobody disturbed.

By hand, with fewer kills: SSLVISION_SOAK_KILLS=5 pytest -m slow tests/faults/test_soak.py
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

pytestmark = [pytest.mark.faults, pytest.mark.slow]

KILLS = int(os.environ.get("SSLVISION_SOAK_KILLS", "30"))
UPDATES_PER_KILL = 40  # so that the run is not over before the last kill


class Run:
    """A run through the command line, called again and again with the same words."""

    def __init__(self, folder, words):
        self.folder, self.words = folder, words
        self.checkpoint = folder / "checkpoints" / "last.ckpt"
        self.saving = self.checkpoint.with_name(".last.ckpt.tmp")

    def start(self):
        self.before = self._saved_at()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sslvision.pretrain", *self.words, f"output_dir={self.folder}", "resume=auto"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in the background
        )

    def wait_until_it_trains(self):
        self._wait(lambda: self._saved_at() != self.before)

    def wait_until_it_saves(self):
        self.wait_until_it_trains()
        self._wait(self.saving.exists)

    def end(self):
        """Return the exit code and what was said."""
        said, complained = self.process.communicate(timeout=900)
        return self.process.returncode, said + complained

    def _wait(self, what):
        deadline = time.monotonic() + 120
        while not what() and self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)

    def _saved_at(self):
        return self.checkpoint.stat().st_mtime_ns if self.checkpoint.exists() else None


def weights_and_moments(run):
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    found = dict(checkpoint["state_dict"])
    for number, state in checkpoint["optimizer_states"][0]["state"].items():
        found |= {f"optimizer {number} {name}": value for name, value in state.items()}
    return checkpoint["global_step"], found


@pytest.mark.parametrize("method", ["mae", "dino"])
def test_a_run_killed_at_random_moments_ends_with_the_weights_of_an_undisturbed_one(method, tiny_settings, tmp_path):
    rng = random.Random(f"{method} {KILLS}")
    changed = {
        "batch_size": 500,  # 20 updates to an epoch
        "epochs": max(2, KILLS * UPDATES_PER_KILL // 20),
        "knn_every_epochs": 7,
        "checkpoint_every_epochs": 3,
        "checkpoint_every_steps": 7,
    }
    kept = [word for word in tiny_settings(method) if word.split("=")[0] not in changed]
    words = [
        f"recipe={method}",
        *kept,
        "backbone.drop_path_rate=0.1",
        *(f"{key}={value}" for key, value in changed.items()),
    ]
    undisturbed, killed = Run(tmp_path / "undisturbed", words), Run(tmp_path / "killed", words)
    begun = time.monotonic()
    undisturbed.start()
    undisturbed.wait_until_it_trains()
    to_start = time.monotonic() - begun
    code, said = undisturbed.end()
    assert code == 0, said
    ten_updates = 10 * (time.monotonic() - begun - to_start) / (20 * changed["epochs"])

    kinds = Counter()
    while kinds.total() < KILLS:
        signum = rng.choice([signal.SIGKILL, signal.SIGTERM])
        when = rng.choices(["starting", "training", "saving"], [2, 5, 3])[0]
        pause = rng.uniform(0, to_start if when == "starting" else ten_updates)
        killed.start()
        if when == "starting":
            time.sleep(pause)
        elif when == "training":
            killed.wait_until_it_trains()
            time.sleep(pause)
        else:
            killed.wait_until_it_saves()
        killed.process.send_signal(signum)
        code, said = killed.end()
        assert code != 0, f"the run was over after {kinds}: more UPDATES_PER_KILL are needed"
        # -15: in the first half second, before the program has said what is to become of signals.
        assert code in ((-9,) if signum == signal.SIGKILL else (143, -15)), f"{code} {when}: {said}"
        assert "Traceback" not in said, said
        kinds[f"{signum.name} {when}"] += 1

    killed.start()
    code, said = killed.end()
    assert code == 0, said
    (step, wanted), (again, found) = weights_and_moments(undisturbed), weights_and_moments(killed)
    assert step == again == 20 * changed["epochs"]
    assert wanted.keys() == found.keys()
    different = [name for name, value in wanted.items() if not torch.equal(value, found[name])]
    assert not different, f"{len(different)} of {len(wanted)} tensors differ after {dict(kinds)}: {different[:5]}"
    print(f"\n{method}: bit-equal at update {step:,} after {dict(sorted(kinds.items()))}")
