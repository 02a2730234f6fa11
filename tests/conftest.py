"""What several tests share: a tiny run, and the command line as a person calls it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is loaded: see sslvision.cli.main

from sslvision.cli.compose import compose_settings
from sslvision.cli.recipes import COMMANDS

# A ViT of one block on the embedded images, four updates to an epoch.
TINY = [
    "backbone.embed_dim=32",
    "backbone.depth=1",
    "backbone.num_heads=2",
    "backbone.patch_size=8",
    "batch_size=2500",
    "epochs=2",
    "warmup_epochs=1",
    "evaluate_images=500",
    "knn_every_epochs=1",
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

    def run(folder, *words, recipe="mae"):
        from sslvision.workflows.pretraining import pretrain

        given = {word.split("=")[0] for word in words}
        kept = [word for word in (*TINY, *SMALL[recipe]) if word.split("=")[0] not in given]
        settings = compose_settings([f"recipe={recipe}", *kept, *words])
        return pretrain(settings, Path(folder), words)

    return run


@pytest.fixture(scope="session")
def tiny_run(run_tiny, tmp_path_factory):
    """The folder of a finished tiny run of MAE, to probe and to fine-tune; leave it as it is."""
    folder = tmp_path_factory.mktemp("pretrained") / "tiny"
    run_tiny(folder)
    return folder


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
            env={**os.environ, "COLUMNS": "200", "WANDB_MODE": "offline", **environment},
        )

    return call
