"""Impossible settings and data are refused before any work, with the exit code of their kind (rows 21 and 22)."""

import numpy as np
import pytest
from PIL import Image

from sslvision.cli.compose import compose_runs
from sslvision.cli.recipes import PRETRAIN
from sslvision.cli.words import split_words
from sslvision.errors import DataError, UsageError

pytestmark = pytest.mark.faults

MISTAKES = {
    "epochs=0": r"epochs=0 is too small: it must be 1 or more",
    "trainer.max_epochs=0": r"trainer.max_epochs is set by sslvision; use epochs",
    "max_epochs=0": r"use epochs",
    "mask_ratio=1.5": r"mask_ratio=1.5",
    "mask_ratio=-0.1": r"mask_ratio=-0.1",
    "lr=abc": r"lr=abc is not a number",
    "lr=-1": r"lr=-1.0 must be a number above 0",
    "lr=.nan": r"lr=(nan|.nan)",
    "base_lr=inf": r"base_lr=inf must be a number above 0",
    "batch_size=1.5": r"batch_size=1.5 is not a whole number",
    "batch_size=0": r"batch_size=0 is too small",
    "seed=-1": r"seed=-1 is too small",
    "seed=true": r"seed=True is not a whole number",
    "mask_ration=0.5": r"There is no setting mask_ration. Did you mean method.mask_ratio",
    "btach_size=8": r"There is no setting btach_size. Did you mean batch_size",
    "data.rooot=photos": r"There is no setting data.rooot",
    "trainer.devises=2": r"There is no setting trainer.devises. Did you mean trainer.devices",
    "trainer.gpus=1": r"There is no setting trainer.gpus. Did you mean trainer.devices",
    "learning_rate=0.1": r"There is no setting learning_rate. Did you mean lr",
    "+mask_ration=0.5": r"There is no setting mask_ration",
    "backbone.name=vit_tinny": r"backbone.name=vit_tinny is not a timm model. Near it: ",
    "data=foldr": r"data=foldr is unknown.*Did you mean data=folder",
    "logger=wandbb": r"logger=wandbb is unknown: it is csv, wandb, tensorboard. Did you mean wandb",
    "data.max_unreadable=much": r"data.max_unreadable=much is not a number",
    "lr=[": r"Cannot read the command line",
    "data._target_=os.nothing": r"data._target_=os.nothing cannot be imported",
    "method._target_=nowhere.Method": r"method._target_=nowhere.Method cannot be imported",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_a_usage_error_that_says_what_was_meant_before_anything_is_written(run_tiny, tmp_path, mistake):
    with pytest.raises(UsageError, match=MISTAKES[mistake]) as caught:
        run_tiny(tmp_path / "run", mistake)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "run").exists()


def test_a_key_given_twice_is_refused(settings_of):
    with pytest.raises(UsageError, match="lr is given twice"):
        settings_of("pretrain", "recipe=mae", "lr=1", "lr=2")


def test_a_mistake_in_one_point_of_a_sweep_stops_all_of_it():
    with pytest.raises(UsageError, match=r"lr=x is not a number"):
        compose_runs(split_words(["-m", "recipe=mae", "lr=1,2,x"]), PRETRAIN)


@pytest.mark.parametrize(
    "what", ["epochs=two", "labels_per_class=0", "freeze=x", "holdout=2", "lr_ratio=0", "resume=x.ckpt"]
)
def test_fine_tuning_refuses_its_own_mistakes(settings_of, what):
    with pytest.raises(UsageError, match=what.split("=")[0]):
        settings_of("finetune", "run=resnet18", "data=digits", what)


def test_the_command_line_exits_with_2_and_one_line(warm_command, tmp_path):
    ended = warm_command("recipe=mae", "mask_ration=0.5", "name=x", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: There is no setting mask_ration. Did you mean method.mask_ratio")
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_fewer_images_than_a_batch_are_a_data_error_with_both_numbers(run_tiny, tmp_path):
    for place in range(5):
        pixels = np.random.default_rng(place).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{place}.png")
    words = ("data=folder", f"data.root={tmp_path / 'photos'}", "data.channels=3", "data.holdout=0", "batch_size=8")
    with pytest.raises(DataError, match=r"There are 5 images to train on, fewer than one batch of 8") as caught:
        run_tiny(tmp_path / "run", *words)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run").exists()
