"""A process of several that is killed or hangs: the others end within the timeout, and torchrun goes on from the checkpoint."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sslvision.system.checkpoint_folders import read_plain_part

pytestmark = [pytest.mark.faults, pytest.mark.e2e]

HANGS = 900  # seconds after which a test gives up
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
LONG = ["epochs=30", "checkpoint_every_steps=8", "knn_every_epochs=0", "optimizer=adamw", "resume=auto", "name=run"]
TWO = ["trainer.devices=2", "trainer.strategy=fsdp2"]


@pytest.fixture
def start(tiny_settings, tmp_path):
    """Start a run of two processes in a session of its own, and kill what is left of it at the end."""
    started = []

    def call(*words, launcher=()):
        given = {word.split("=")[0] for word in (*LONG, *words)}
        tiny = [word for word in tiny_settings("mae") if word.split("=")[0] not in given]
        with (tmp_path / "log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [sys.executable, *launcher, "-m", "sslvision.pretrain", "recipe=mae", *tiny, *LONG, *TWO, *words],
                    cwd=tmp_path,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"},
                )
            )
        return started[-1]

    yield call
    for process in started:
        with contextlib.suppress(ProcessLookupError):  # its children may be left, stopped or not
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_checkpoint(process, folder):
    file, deadline = Path(folder) / "outputs" / "run" / "checkpoints" / "last.ckpt", time.monotonic() + HANGS
    while not file.exists():
        said = (folder / "log").read_text()
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.05)
    return file


def children(process):
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in found.split()]


def test_torchrun_starts_a_run_again_from_its_checkpoint_when_a_process_was_killed(start, tmp_path):
    process = start("timeout=60", launcher=TORCHRUN)
    file = wait_for_checkpoint(process, tmp_path)
    os.kill(children(process)[-1], signal.SIGKILL)
    assert process.wait(timeout=HANGS) == 0, (tmp_path / "log").read_text()
    assert read_plain_part(file)["global_step"] == 120
    assert re.search(r"weights +update \d+ in .*last\.ckpt", (tmp_path / "log").read_text())
    assert (tmp_path / "outputs" / "run" / "results.json").is_file()


def test_a_process_that_hangs_ends_the_others_after_the_timeout_with_words(start, tmp_path):
    process = start("timeout=60")  # the second process needs as long to come
    wait_for_checkpoint(process, tmp_path)
    os.kill(children(process)[0], signal.SIGSTOP)
    assert process.wait(timeout=HANGS) == 1, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "error: Another process of this run has not answered within timeout= seconds" in said
    assert "Traceback" not in said


def test_a_process_that_was_killed_leaves_a_word(start, tmp_path):
    process = start("timeout=60")
    wait_for_checkpoint(process, tmp_path)
    os.kill(children(process)[0], signal.SIGKILL)
    assert process.wait(timeout=HANGS) != 0
    said = (tmp_path / "log").read_text()
    assert "Process 1 of this run was killed by signal 9" in said or "Another process of this run has ended" in said
