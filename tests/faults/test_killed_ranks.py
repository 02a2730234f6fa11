"""A process of several is killed at random moments: under torchrun the run goes on, and ends as one that never was."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from sslvision.system.checkpoint_folders import read_folder, read_plain_part

pytestmark = [pytest.mark.faults, pytest.mark.slow]
KILLS = 10
UPDATES = 120
HANGS = 600  # seconds after which a test gives up
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
WORDS = ["epochs=30", "checkpoint_every_steps=1", "knn_every_epochs=0", "optimizer=adamw", "resume=auto", "timeout=120"]


@pytest.fixture
def start(tiny_settings, tmp_path):
    """Start a run of two processes; what is left of it is killed at the end."""
    started = []

    def call(name, strategy, restarts):
        words = [*WORDS, "trainer.devices=2", f"trainer.strategy={strategy}", f"name={name}"]
        given = {word.split("=")[0] for word in words}
        tiny = [word for word in tiny_settings("mae") if word.split("=")[0] not in given]
        launcher = [sys.executable, *TORCHRUN, f"--max-restarts={restarts}"]
        with (tmp_path / f"{name}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*launcher, "-m", "sslvision.pretrain", "recipe=mae", *tiny, *words],
                    cwd=tmp_path,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
                )
            )
        return started[-1]

    yield call
    for process in started:
        for pid in (*ranks(process), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_run_whose_processes_are_killed_at_ten_random_moments_ends_as_one_that_never_was(strategy, start, tmp_path):
    whole = start("whole", strategy, restarts=0)
    assert whole.wait(HANGS) == 0, (tmp_path / "whole.log").read_text()
    broken, rng, noticed = start("broken", strategy, restarts=KILLS), random.Random(strategy), []
    for moment in sorted(rng.sample(range(1, UPDATES), KILLS)):
        pids = until(lambda: len(found := ranks(broken)) == 2 and found, broken, tmp_path)
        until(lambda moment=moment: saved(tmp_path) >= moment, broken, tmp_path)
        time.sleep(rng.uniform(0, 0.1))
        killed = rng.choice(pids)
        os.kill(killed, signal.SIGKILL)
        begun = time.monotonic()
        until(lambda pids=pids: not set(pids) & set(ranks(broken)), broken, tmp_path)
        noticed.append(time.monotonic() - begun)
    assert broken.wait(HANGS) == 0, (tmp_path / "broken.log").read_text()
    print(f"{strategy}: the other process was gone after {min(noticed):.1f} to {max(noticed):.1f} s")
    one, other = (weights(tmp_path, name) for name in ("whole", "broken"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert step_of(tmp_path, "whole") == step_of(tmp_path, "broken") == UPDATES


def ranks(process):
    """Return the processes that torchrun has started and that run."""
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-r", "D,R,S,T"], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def until(true, process, folder):
    """Wait until a function returns something true, and return it; not longer than a run may hang, nor than it runs."""
    deadline = time.monotonic() + HANGS
    while not (found := true()):
        assert process.poll() is None, (folder / "broken.log").read_text()
        assert time.monotonic() < deadline, (folder / "broken.log").read_text()
        time.sleep(0.02)
    return found


def saved(folder):
    """Return the update of the newest checkpoint; 0 if there is none."""
    try:
        return step_of(folder, "broken")
    except Exception:  # it is being replaced
        return 0


def step_of(folder, name):
    file = folder / "outputs" / name / "checkpoints" / "last.ckpt"
    found = read_plain_part(file) if file.is_dir() else torch.load(file, weights_only=True)
    return int(found["global_step"])


def weights(folder, name):
    file = folder / "outputs" / name / "checkpoints" / "last.ckpt"
    return (read_folder(file) if file.is_dir() else torch.load(file, weights_only=True))["state_dict"]
