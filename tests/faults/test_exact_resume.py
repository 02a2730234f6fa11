"""Row 1: a run that broke anywhere and was resumed is the run that never broke, bit for bit, and so is its metrics file."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.callbacks import Callback

from sslvision.augment.randomness import derive_seed
from sslvision.workflows import pretraining

pytestmark = pytest.mark.faults

# Ten updates: two epochs of five. Three updates to a line of the log, which breaks cut in two. The last block is dropped
# at times.
DIGITS = [
    "data=digits",
    "batch_size=200",
    "checkpoint_every_steps=1",
    "trainer.log_every_n_steps=3",
    "knn_every_epochs=0",
]
SWIN = ["backbone.embed_dim=16", "backbone.depths=[1,1]", "backbone.num_heads=[1,1]", "backbone.patch_size=4"]
KINDS = {
    "mae": ["backbone.drop_path_rate=0.3", "backbone.depth=2"],
    "dino": ["backbone.drop_path_rate=0.3", "backbone.depth=2"],
    "mae_swin": [*SWIN, "backbone.patch_size=2", "backbone.drop_path_rate=0.3"],
    "dino_swin": [*SWIN, "backbone.drop_path_rate=0.3"],
}
NOT_SWIN = ("backbone.depth=", "backbone.patch_size=", "backbone.embed_dim=", "backbone.num_heads=")


class Power(Exception):
    """It went out."""


class Cut(Callback):
    """Breaks a run in the update after so many, or, at "the end" of an epoch, once so many are made."""

    def __init__(self, after, where, how):
        self.after, self.where, self.how = after, where, how

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if self.where == "an update" and trainer.global_step == self.after:
            self.how()

    def on_train_epoch_end(self, trainer, pl_module):
        if self.where == "the end" and trainer.global_step == self.after:
            self.how()


def raise_power():
    raise Power


@pytest.fixture
def run(monkeypatch, tiny_settings):
    """Make a tiny run, broken after some updates if so asked: run(folder, words, recipe=, cut=3)."""
    build = pretraining.pretraining_callbacks
    monkeypatch.setattr(pretraining, "export_and_evaluate", lambda *_: {})  # takes longer than the training

    def run(folder, *words, recipe="mae", cut=None, where="an update", how=raise_power):
        more = [] if cut is None else [Cut(cut, where, how)]
        monkeypatch.setattr(pretraining, "pretraining_callbacks", lambda *given: [*build(*given), *more])
        settings = pretraining_settings(tiny_settings, recipe, words)
        try:
            pretraining.pretrain(settings, Path(folder))
        except Power:
            assert cut is not None
        else:
            assert cut is None

    return run


def pretraining_settings(tiny_settings, recipe, words):
    from sslvision.cli.compose import compose_settings

    tiny = tiny_settings(recipe.removesuffix("_swin"))
    tiny = [word for word in tiny if not (recipe.endswith("_swin") and word.startswith(NOT_SWIN))]
    given = {word.split("=")[0]: word for word in (*DIGITS, *KINDS[recipe], *words)}  # the last one counts
    return compose_settings([f"recipe={recipe}", *(w for w in tiny if w.split("=")[0] not in given), *given.values()])


def end_of(folder):
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    (optimizer,) = checkpoint["optimizer_states"]
    state = {f"{name} {key}": value for name, states in optimizer["state"].items() for key, value in states.items()}
    return checkpoint["state_dict"] | state | {"step": torch.tensor(checkpoint["global_step"])}


def assert_same_end(folder, other):
    one, two = end_of(folder), end_of(other)
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert (folder / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


@pytest.mark.parametrize(
    "recipe", [pytest.param(kind, marks=pytest.mark.e2e) if "swin" in kind else kind for kind in KINDS]
)
def test_a_run_that_broke_in_mid_epoch_and_at_its_end_goes_on_as_if_it_had_not(recipe, run, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, recipe=recipe)
    run(broken, "resume=auto", recipe=recipe, cut=2)
    run(broken, "resume=auto", recipe=recipe, cut=5, where="the end")  # the last update is saved, the end not reached
    run(broken, "resume=auto", recipe=recipe, cut=5)
    run(broken, "resume=auto", recipe=recipe, cut=6)
    run(broken, "resume=auto", recipe=recipe)
    assert_same_end(whole, broken)


@pytest.mark.thorough
@pytest.mark.parametrize("recipe", ["mae", "dino"])
def test_a_run_on_rectangles_goes_on_as_if_it_had_not_broken(recipe, run, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    words = ["backbone.image_size=[16,32]", *(["local_size=[8,16]"] if recipe == "dino" else [])]
    run(whole, *words, recipe=recipe)
    run(broken, *words, recipe=recipe, cut=3)
    run(broken, "resume=auto", *words, recipe=recipe)
    assert_same_end(whole, broken)


@pytest.mark.e2e
def test_accumulated_batches_of_an_update_that_broke_count_once(run, tmp_path):
    whole, broken, words = tmp_path / "whole", tmp_path / "broken", ["trainer.accumulate_grad_batches=2"]
    run(whole, *words)
    for cut in (1, 4, 5, 9):
        run(broken, "resume=auto", *words, cut=cut)
    run(broken, "resume=auto", *words)
    assert_same_end(whole, broken)


def test_a_run_that_saves_seldom_makes_the_lost_updates_again(run, tmp_path):
    whole, broken, words = tmp_path / "whole", tmp_path / "broken", ["checkpoint_every_steps=4"]
    run(whole, *words)
    run(broken, *words, cut=7)
    assert end_of(broken)["step"] == 5  # of the epoch's end
    run(broken, "resume=auto", *words)
    assert_same_end(whole, broken)


@pytest.fixture
def images(tmp_path):
    """A folder of 61 noise images."""
    pixels = np.random.default_rng(0).integers(0, 256, (61, 40, 48, 3), dtype=np.uint8)
    folder = tmp_path / "images"
    folder.mkdir()
    for number_, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number_}.png")
    return folder


def test_loader_processes_may_change_in_number_on_the_way(images, run, tmp_path):
    words = ["data=folder", f"data.root={images}", "data.workers=0", "batch_size=12", "backbone.image_size=32"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, *words, "data.workers=0")
    run(broken, "resume=auto", *words, "data.workers=2", cut=3)
    run(broken, "resume=auto", *words, "data.workers=0", cut=7)
    run(broken, "resume=auto", *words, "data.workers=2")
    assert_same_end(whole, broken)


def test_the_seed_of_an_update_is_a_number_of_its_own_for_each_process_and_accumulated_batch():
    seeds = {
        derive_seed(seed, step, rank, micro)
        for seed in (0, 1)
        for step in range(50)
        for rank in range(4)
        for micro in range(3)
    }
    assert len(seeds) == 2 * 50 * 4 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)


VANISHING = """
import os, sys
from sslvision.cli.main import main
from sslvision.workflows import pretraining
sys.path.insert(0, os.environ["HERE"])
from test_exact_resume import Cut

build, cut = pretraining.pretraining_callbacks, int(os.environ["CUT"])
pretraining.pretraining_callbacks = lambda *given: [*build(*given), Cut(cut, "an update", lambda: os._exit(9))]
main("pretrain")
"""


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.e2e)])
def test_processes_that_vanished_go_on_as_if_they_had_not(devices, tiny_settings, tmp_path):
    """os._exit: no handler, no flush, no goodbye."""
    (tmp_path / "run.py").write_text(VANISHING)
    tiny = [word for word in tiny_settings("dino") if word.split("=")[0] not in {w.split("=")[0] for w in DIGITS}]
    words = ["recipe=dino", *tiny, *DIGITS, f"trainer.devices={devices}", "resume=auto"]
    words += ["trainer.strategy=ddp"] if devices > 1 else []
    for name, cuts in {"whole": [99], "broken": [7, 99]}.items():
        for cut in cuts:
            done = subprocess.run(
                [sys.executable, "run.py", *words, f"name={name}"],
                cwd=tmp_path,
                env=os.environ | {"CUT": str(cut), "HERE": str(Path(__file__).parent)},
                capture_output=True,
                timeout=300,
                text=True,
            )
            assert (done.returncode == 0) is (cut == 99), done.stderr
    assert_same_end(tmp_path / "outputs" / "whole", tmp_path / "outputs" / "broken")
