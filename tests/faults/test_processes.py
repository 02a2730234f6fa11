"""Signals and lost processes as a shell sees them: exit codes, words, and what is left."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sslvision.system.failures import explained
from sslvision.system.torch_files import load_verified

pytestmark = pytest.mark.faults

HANGS = 300  # seconds after which a test gives up


def saved(folder):
    return load_verified(folder / "checkpoints" / "last.ckpt")


class Process:
    """`python -m sslvision.pretrain`, a group of processes."""

    def __init__(self, *words, cwd, **environment):
        self.log, self.folder = Path(cwd) / "log", Path(cwd) / "outputs" / "run"
        with self.log.open("w") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "sslvision.pretrain", *words],
                cwd=cwd,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline", **environment},
                preexec_fn=lambda: signal.signal(
                    signal.SIGINT, signal.default_int_handler
                ),  # ignored in the background
            )
        self.pid = self.popen.pid

    def wait_for(self, what):
        deadline = time.monotonic() + HANGS
        while not what():
            assert self.popen.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait_until_saved(self):
        self.wait_for((self.folder / "checkpoints" / "last.ckpt").exists)

    def children(self):
        found = subprocess.run(["pgrep", "-P", str(self.pid)], capture_output=True, text=True).stdout
        return [int(pid) for pid in found.split()]

    def end(self):
        """Return the exit code and what was said; nothing of the run may be left."""
        code = self.popen.wait(timeout=HANGS)
        deadline = time.monotonic() + HANGS
        while subprocess.run(["pgrep", "-g", str(self.pid)], capture_output=True).stdout:
            assert time.monotonic() < deadline, "a process of the run is left"
            time.sleep(0.1)
        return code, self.log.read_text()


@pytest.fixture
def start(tiny_settings, tmp_path):
    """Start a long tiny run, and clean up what is left of it: start("key=value", ...) -> Process."""
    started = []

    def begin(*words, **environment):
        defaults = [*tiny_settings("mae"), "batch_size=500", "epochs=1000", "name=run", "checkpoint_every_steps=3"]
        chosen = {word.split("=")[0]: word for word in [*defaults, *words]}  # the last one counts
        started.append(Process("recipe=mae", *chosen.values(), cwd=tmp_path, **environment))
        return started[-1]

    yield begin
    for process in started:
        for pid in [process.pid, *process.children()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.popen.wait()


@pytest.fixture
def photos(tmp_path):
    """Words for a run that reads 64 small images from files, in two processes."""
    rng = np.random.default_rng(0)
    for number in range(64):
        file = tmp_path / "photos" / str(number % 2) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8)).save(file)
    return [
        *("data=folder", f"data.root={tmp_path / 'photos'}", "data.workers=2", "data.channels=1", "knn_every_epochs=0"),
        *("backbone.image_size=32", "batch_size=16", "epochs=100000"),
    ]


@pytest.mark.e2e
def test_a_sigterm_to_all_processes_of_a_run_leaves_the_loader_working_until_it_is_saved(start, photos):
    """Row 2, as schedulers and service managers send it."""
    run = start(*photos)
    run.wait_until_saved()
    os.killpg(run.pid, signal.SIGTERM)
    code, said = run.end()
    assert code == 143, said
    assert "Traceback" not in said
    told = re.search(
        r"SIGTERM: saved at step ([\d,]+) in (\S+last.ckpt); resume with: python -m sslvision.pretrain resume=auto name=run",
        said,
    )
    assert saved(run.folder)["global_step"] == int(told[1].replace(",", ""))
    assert str(run.folder / "checkpoints" / "last.ckpt") == told[2]


@pytest.mark.e2e
def test_a_loader_process_that_is_killed_ends_the_run_in_words(start, photos):
    """Row 30."""
    run = start(*photos)
    run.wait_until_saved()
    os.kill(run.children()[-1], signal.SIGKILL)
    code, said = run.end()
    assert code == 1
    assert "Traceback" not in said, said
    assert re.search(r"error: A worker process of the data loader has ended.*memory.*data.workers=", said)
    assert saved(run.folder)["global_step"] > 0


def test_before_training_a_signal_ends_the_run_in_a_line(start, tmp_path):
    """Rows 2 and 4: the exit codes, where nothing is there to save."""
    for signum, exit_code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        run = start(f"name=before{exit_code}")
        listens = re.compile(r"^SigCgt:\s*(\w+)", re.MULTILINE)
        status = Path(f"/proc/{run.pid}/status")
        if not status.exists():
            pytest.skip("needs /proc, to know when the program has begun")
        # SIGINT is handled from the start, by Python itself; SIGTERM by us alone.
        run.wait_for(lambda: int(listens.search(status.read_text())[1], 16) >> (signal.SIGTERM - 1) & 1)  # noqa: B023
        os.kill(run.pid, signum)
        code, said = run.end()
        assert code == exit_code, said
        assert said.splitlines()[-1].startswith(f"stopped: {signal.Signals(signum).name} outside of training."), said
        assert "Traceback" not in said


@pytest.mark.e2e
def test_a_signal_ends_a_whole_sweep(start):
    run = start("seed=0,1", "-m")
    first, second = (run.folder.with_name(f"run-{number}") for number in (0, 1))
    run.wait_for((first / "checkpoints" / "last.ckpt").exists)
    os.kill(run.pid, signal.SIGTERM)
    code, said = run.end()
    assert code == 143, said
    assert "Traceback" not in said
    assert saved(first)["global_step"] > 0
    assert not second.exists()


TWO = ["trainer.devices=2", "trainer.strategy=ddp"]


@pytest.mark.parametrize(
    ("to", "signum", "exit_code"),
    [
        pytest.param("first", signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param("second", signal.SIGTERM, 143, marks=pytest.mark.e2e),
        pytest.param("all", signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_two_processes_stop_together_whichever_of_them_is_told(start, to, signum, exit_code):
    """Row 2. Lightning kills the first process when it sees the second one end with an error."""
    run = start(*TWO)
    run.wait_until_saved()
    if to == "all":
        os.killpg(run.pid, signum)
    else:
        os.kill(run.pid if to == "first" else run.children()[0], signum)
    code, said = run.end()
    assert code == exit_code, said
    assert said.count(": saved at step") == 1
    assert "Traceback" not in said
    assert f"saved at step {saved(run.folder)['global_step']:,} " in said


@pytest.mark.parametrize(
    "lost", [pytest.param("first", marks=pytest.mark.slow), pytest.param("second", marks=pytest.mark.e2e)]
)
def test_when_one_of_two_processes_dies_the_other_ends_too(start, lost):
    """Row 31: without this it would wait for ever."""
    run = start(*TWO)
    run.wait_until_saved()
    os.kill(run.pid if lost == "first" else run.children()[0], signal.SIGKILL)
    code, said = run.end()
    # Either the collective fails, and this is said; or Lightning's watch over its children comes first, and kills.
    assert code == -9 or (lost == "second" and code == 1)
    if code == 1:
        assert "error: Another process of this run has ended" in said
        assert "Traceback" not in said
    assert saved(run.folder)["global_step"] > 0


def test_a_disk_without_room_for_the_first_file_is_named(train_tiny, tmp_path):
    """Row 5, for other files than checkpoints: none may have more than 500 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            train_tiny(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = explained(caught.value, str(tmp_path / "run"))
    assert told.exit_code == 5
    assert re.search(rf"{tmp_path}/run\S* cannot be written: File too large.*[\d,]+ bytes free", str(told))


@pytest.mark.e2e
def test_a_disk_without_room_is_named_and_the_exit_code_is_5(tiny_settings, tmp_path):
    """The same as a shell sees it."""
    ended = subprocess.run(
        [sys.executable, "-m", "sslvision.pretrain", "recipe=mae", *tiny_settings("mae"), "name=run"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500)),
    )
    assert ended.returncode == 5, ended.stderr
    assert "Traceback" not in ended.stderr
    told = ended.stderr.splitlines()[-1]
    assert re.search(rf"error: {tmp_path}/outputs/run\S* cannot be written: File too large.*[\d,]+ bytes free", told)
