"""What several tests share: a tiny run, the command line as a user calls it, and in how many processes tests run."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded: see sslvision.cli.main

from sslvision.cli.compose import compose_settings
from sslvision.cli.recipes import COMMANDS

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A ViT of one block on the digits, four updates to an epoch.
TINY = [
    "data=digits",
    "backbone.embed_dim=32",
    "backbone.depth=1",
    "backbone.num_heads=2",
    "backbone.patch_size=8",
    "batch_size=296",
    "epochs=2",
    "warmup_epochs=1",
    "evaluate_images=50",
    "knn_every_epochs=2",
    "checkpoint_every_epochs=1",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
]
# What makes each method as small.
SMALL = {
    "mae": ["decoder_embed_dim=16", "decoder_num_heads=2"],
    "dino": ["prototypes=64", "hidden=32", "bottleneck=16", "local_crops=2", "local_size=16"],
}

OF_COMMANDS = {"COLUMNS": "200", "WANDB_MODE": "offline"}


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run all tests, or all of a mark, in up to four processes; files given by name, and what needs a GPU, in one.

    `-n` chooses otherwise. Without pytest-xdist, everything runs in one process.
    """
    option = config.option
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of the processes
        return
    if getattr(option, "numprocesses", 0) is None and not option.usepdb and not option.collectonly:
        everything = config.args_source is not config.ArgsSource.ARGS and option.markexpr != "gpu"
        option.numprocesses = min(4, len(os.sched_getaffinity(0))) if everything else 0
        if everything and option.dist == "no":
            option.dist = (
                "worksteal"  # begins with a contiguous share for each: what the tests of a file share is made once
            )


def pytest_configure(config):
    """Hide GPUs from tests and their subprocesses, unless those that need one are asked for.

    What follows the machine (trainer.accelerator=auto, device=auto) would compile for minutes on a GPU, and compare its numbers
    with a CPU's.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def tiny_settings():
    """Return the overrides that make a recipe of a method tiny: tiny_settings("mae")."""
    return lambda method: [*TINY, *SMALL[method]]


@pytest.fixture(scope="session")
def run_tiny():
    """Run a tiny recipe in this process: run_tiny(folder, "key=value", ...) -> results."""

    def run(folder, *words, recipe="mae", evaluate=True):
        from sslvision.workflows import pretraining

        given = {word.split("=")[0] for word in words}
        kept = [word for word in (*TINY, *SMALL[recipe]) if word.split("=")[0] not in given]
        settings = compose_settings([f"recipe={recipe}", *kept, *words])
        if evaluate:
            return pretraining.pretrain(settings, Path(folder), words)
        with mock.patch.object(pretraining, "export_and_evaluate", return_value={}):
            return pretraining.pretrain(settings, Path(folder), words)

    return run


@pytest.fixture(scope="session")
def train_tiny(run_tiny):
    """The same without the export and the evaluation after training, which take most of a tiny run's time."""
    return functools.partial(run_tiny, evaluate=False)


@pytest.fixture(scope="session")
def tiny_pretraining(run_tiny, tmp_path_factory):
    """A finished tiny run of MAE: its folder, to be left as it is, and what it returned."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    return folder, run_tiny(folder)


@pytest.fixture(scope="session")
def tiny_run(tiny_pretraining):
    """Its folder, to probe and to fine-tune; leave it as it is."""
    return tiny_pretraining[0]


@pytest.fixture(scope="session")
def settings_of():
    """Return the checked settings of a command line: settings_of("probe", "run=...", ...)."""

    def settings(name, *words):
        return compose_settings(words, COMMANDS[name])

    return settings


@pytest.fixture(scope="session")
def command():
    """Call a command line in a process of its own: command("recipe=mae", ..., cwd=...) -> CompletedProcess."""

    def call(*words, cwd, of="pretrain", timeout=300, **environment):
        return subprocess.run(
            [sys.executable, "-m", f"sslvision.{of}", *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, **OF_COMMANDS, **environment},
        )

    return call


@pytest.fixture(scope="session")
def warm_command(tmp_path_factory):
    """The same, much sooner: the process is forked from one that has imported everything. For one process on a CPU."""
    from warm_process import call_warm

    def call(*words, cwd, of="pretrain", timeout=300, **environment):
        environment = {**os.environ, **OF_COMMANDS, **environment}
        log = tmp_path_factory.mktemp("log")
        return call_warm(of, words, cwd=cwd, log=log, timeout=timeout, environment=environment)

    return call


@pytest.fixture
def warm_python(tmp_path_factory):
    """Run Python code in such a process, where nothing has been computed yet: warm_python(code) -> what it prints."""
    from warm_process import run_warm

    return lambda code: run_warm(code, log=tmp_path_factory.mktemp("log"), environment={**os.environ, **OF_COMMANDS})
