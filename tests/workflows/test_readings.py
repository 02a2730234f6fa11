"""What a run's closing lines say of its learning curves, and the command that they end with."""

import json
import math
from pathlib import Path

import pytest

from sslvision.evaluation.learning_curves import Reading
from sslvision.methods.dino import DINO
from sslvision.runs.run_record import RunRecord
from sslvision.workflows.readings import chance_loss, command_with, kind_of, next_command
from sslvision.workflows.report_words import next_lines

FOLDER = Path("outputs/first")


def test_the_next_command_has_the_words_of_the_run_but_for_those_that_change_and_for_its_folder():
    words = ["recipe=mae", "method.mask_ratio=0.6", "base_lr=1", "epochs=5", "name=first", "overwrite=true"]
    line = command_with(words, ("epochs=10", "mask_ratio=0.75"), command="pretrain", folder=FOLDER)
    assert line == "python -m sslvision.pretrain recipe=mae base_lr=1 epochs=10 mask_ratio=0.75"


def test_a_new_learning_rate_replaces_the_old_one_by_whichever_name():
    line = command_with(["run=outputs/a", "lr=1"], ("lr_ratio=0.03",), command="finetune", folder=FOLDER)
    assert line == "python -m sslvision.finetune run=outputs/a lr_ratio=0.03"


def test_a_run_that_was_resumed_by_its_name_goes_on_from_its_own_settings():
    line = command_with(["resume=auto", "name=first"], ("epochs=2",), command="pretrain", folder=FOLDER)
    assert line == "python -m sslvision.pretrain recipe=outputs/first/config.yaml epochs=2"


def test_secrets_are_not_repeated():
    line = command_with(
        ["recipe=mae", "trainer.api_key=abcdefghijkl"], ("epochs=2",), command="pretrain", folder=FOLDER
    )
    assert "abcdefgh" not in line


def test_the_first_reading_that_changes_a_setting_gives_the_command():
    told, changing = Reading("validation_at_chance", "a", "b"), Reading("unfinished", "a", "b", ("epochs=2",))
    assert next_command([told, changing], ["recipe=mae"], command="pretrain", folder=FOLDER) == {
        "next": "python -m sslvision.pretrain recipe=mae epochs=2"
    }
    assert next_command([told], ["recipe=mae"], command="pretrain", folder=FOLDER) == {}


def test_a_method_derived_from_dino_is_read_as_dino(settings_of):
    from sslvision.workflows.method import method_from_settings

    method = method_from_settings(settings_of("pretrain", "recipe=dino", "prototypes=64", "backbone.depth=1"))
    method.__class__ = type("Own", (DINO,), {})
    assert (kind_of(method), chance_loss(method)) == ("dino", math.log(64))


def test_a_report_shows_the_next_command_first():
    run = RunRecord(FOLDER, "pretrain", "finished", settings={}, results={"next": "python -m sslvision.pretrain lr=1"})
    assert next_lines(run)[0][0] == "python -m sslvision.pretrain lr=1"


@pytest.mark.thorough
def test_a_pretraining_run_at_a_tiny_rate_says_so_and_prints_the_command_with_ten_times_the_rate(
    run_tiny, tmp_path, capsys
):
    """The warm-up, of half the run, is not blamed: it ends."""
    run_tiny(tmp_path / "run", "epochs=4", "base_lr=1e-6")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [one for one in results["findings"] if one.startswith("The loss is flat")]
    assert results["next"].endswith("base_lr=1e-05")
    printed = " ".join(capsys.readouterr().out.split())
    assert "The loss is flat" in printed
    assert results["next"] in printed
