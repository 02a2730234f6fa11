"""A training that patience stopped stays stopped, and all that follows a cut is as if there had been none."""

import pytest
import torch
from pytorch_lightning.callbacks import Callback, EarlyStopping
from safetensors.torch import load_file

from sslvision.training.callbacks.stop_early import StopEarly
from sslvision.workflows import finetuning

SHORT = (
    "data=digits",
    "epochs=0",
    "min_updates=16",
    "evaluations=16",
    "patience=2",
    "scratch_longer=1",
    "head_first=false",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
)
STOPS = "lr=0.3"  # no update helps


@pytest.fixture
def finetune(settings_of, tiny_run):
    def run(folder, *words):
        given = {word.split("=")[0] for word in words}
        kept = [word for word in SHORT if word.split("=")[0] not in given]
        return finetuning.finetune(settings_of("finetune", f"run={tiny_run}", *kept, *words), folder, words)

    return run


class PullsThePlug(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def cut_at(monkeypatch, arm, step):
    """Cut a training of an arm, the folder's name for fine-tuning and "scratch" for the other, at an update."""
    callbacks = finetuning.finetuning_callbacks

    def with_cut(plan, labeled):
        return [*callbacks(plan, labeled), *([PullsThePlug(step)] if plan.folder.name == arm else [])]

    monkeypatch.setattr(finetuning, "finetuning_callbacks", with_cut)


def steps(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def same_bits(one, other):
    first, second = (load_file(folder / "export" / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def apart_from_time(results):
    return {**results, "seconds": 0}


@pytest.mark.thorough
@pytest.mark.parametrize("times", [1, 2])
def test_a_run_that_patience_stopped_is_the_same_when_resumed(times, finetune, tmp_path):
    words = (STOPS, "scratch=false", "ema=0.5")
    whole = finetune(tmp_path / "whole", *words)
    assert steps(tmp_path / "whole") < 16
    run = finetune(tmp_path / "run", *words)
    for _ in range(times):
        stopped = steps(tmp_path / "run")
        run = finetune(tmp_path / "run", *words, "resume=auto")
        assert steps(tmp_path / "run") == stopped
    assert apart_from_time(run) == apart_from_time(whole)
    assert same_bits(tmp_path / "run", tmp_path / "whole")


@pytest.mark.e2e
@pytest.mark.parametrize("cut", [1, 3])
def test_a_cut_in_the_arm_from_scratch_changes_neither_arm(cut, finetune, tmp_path, monkeypatch):
    words = (STOPS, "patience=4")
    whole = finetune(tmp_path / "whole", *words)
    cut_at(monkeypatch, "scratch", cut)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        finetune(tmp_path / "run", *words)
    monkeypatch.undo()
    run = finetune(tmp_path / "run", *words, "resume=auto")
    assert apart_from_time(run) == apart_from_time(whole)
    assert same_bits(tmp_path / "run", tmp_path / "whole")


@pytest.mark.thorough
def test_a_cut_before_patience_ends_leaves_its_count_as_it_was(finetune, tmp_path, monkeypatch):
    words = (STOPS, "scratch=false", "patience=3")
    whole = finetune(tmp_path / "whole", *words)
    cut_at(monkeypatch, "run", 2)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        finetune(tmp_path / "run", *words)
    monkeypatch.undo()
    assert steps(tmp_path / "run") == 2
    run = finetune(tmp_path / "run", *words, "resume=auto")
    assert apart_from_time(run) == apart_from_time(whole)
    assert same_bits(tmp_path / "run", tmp_path / "whole")


@pytest.mark.thorough
def test_a_run_with_patience_left_trains_to_its_end_when_resumed(finetune, tmp_path, monkeypatch):
    words = ("lr=0.01", "scratch=false", "patience=16")
    cut_at(monkeypatch, "run", 5)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        finetune(tmp_path / "run", *words)
    monkeypatch.undo()
    finetune(tmp_path / "run", *words, "resume=auto")
    assert steps(tmp_path / "run") == 16


def test_checkpoints_of_earlier_versions_hold_the_count_under_the_same_key():
    assert StopEarly("val_top1", mode="max").state_key == EarlyStopping("val_top1", mode="max").state_key
