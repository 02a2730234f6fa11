"""Rows 24 and 25: a run goes on under its own settings, on any machine, and in its own folder."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sslvision.errors import UsageError
from sslvision.methods.mae import MAE
from sslvision.runs.resume import MAY_DIFFER
from sslvision.settings import Finetune, Pretrain
from sslvision.system.torch_files import load_verified
from sslvision.workflows import finetuning

pytestmark = pytest.mark.faults

EVERY = "checkpoint_every_steps=3"
QUICK = [EVERY, "evaluate_images=300", "knn_every_epochs=0"]


@pytest.fixture(scope="module")
def finished(run_tiny, tmp_path_factory):
    """A finished run of eight updates in two epochs, with checkpoints from 8, 6 and 4."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run_tiny(folder, EVERY)
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def weights(folder, name="last.ckpt"):
    return load_verified(folder / "checkpoints" / name)["state_dict"]


def rows(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def same(one, other, tolerance=0.0):
    return all(((value - other[name]).abs() <= tolerance).all() for name, value in one.items())


# Row 24.


@pytest.mark.parametrize(
    ("words", "differing"),
    [
        (["batch_size=148"], "batch_size: 296 then, 148 now"),
        (["mask_ratio=0.5"], "method.mask_ratio: 0.75 then, 0.5 now"),
        (["epochs=3", "seed=1"], r"epochs: 2 then, 3 now; seed: 0 then, 1 now"),
        (["backbone.embed_dim=64"], "backbone.embed_dim: 32 then, 64 now"),
        (["trainer.precision=64-true"], r"trainer.precision in effect: (bf16-mixed|32-true) then, 64-true now"),
        (["trainer.gradient_clip_val=1"], "trainer.gradient_clip_val: not set then, 1 now"),
        (["data.normalize=imagenet"], "data.normalize: computed then, imagenet now"),
    ],
)
def test_other_settings_are_refused_key_by_key_before_anything_is_done(words, differing, run, run_tiny):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    in_effect = load_verified(run / "checkpoints" / "last.ckpt")["sslvision"]["precision"]
    precision = [] if "trainer.precision=64-true" in words else [f"trainer.precision={in_effect}"]
    with pytest.raises(UsageError, match=f"last.ckpt was made under other settings.*{differing}.*init_from="):
        run_tiny(run, "resume=auto", *precision, *words)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_another_recipe_is_refused(run, train_tiny):
    with pytest.raises(
        UsageError, match=r"method._target_: sslvision.methods.mae.MAE then, sslvision.methods.dino.DINO now"
    ):
        train_tiny(run, "resume=auto", recipe="dino")


def test_more_or_fewer_images_are_refused(run, run_tiny, tmp_path):
    file = run / "checkpoints" / "last.ckpt"
    assert load_verified(file)["sslvision"]["images"] == 1198
    with pytest.raises(UsageError, match="training images: 1198 then, 10000 now"):
        run_tiny(run, "resume=auto", "data=embedded")


def test_what_changes_no_weight_may_differ(finished, run, train_tiny, tmp_path):
    words = ["health=stop", "knn_every_epochs=1", "evaluate_images=300", "keep_checkpoints=5", "about=moved"]
    words += ["checkpoint_every_epochs=2", "trainer.log_every_n_steps=2", "logger=csv", "data.workers=1"]
    file = run / "checkpoints" / "last-2.ckpt"
    train_tiny(tmp_path / "elsewhere", f"resume={file}", *words)
    assert same(weights(finished), weights(tmp_path / "elsewhere"))


def test_weights_to_start_from_are_not_read_again(finished, train_tiny, tmp_path):
    start = Path(shutil.copytree(finished / "export", tmp_path / "export"))
    train_tiny(tmp_path / "whole", f"init_from={start}", EVERY)
    shutil.rmtree(start)
    file = tmp_path / "whole" / "checkpoints" / "last-1.ckpt"
    train_tiny(tmp_path / "other", f"init_from={start}", f"resume={file}")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "other"))


def test_every_setting_that_may_differ_is_one():
    keys = {key for group in MAY_DIFFER.values() for key in group}
    assert len(keys) == sum(map(len, MAY_DIFFER.values())), "none is listed twice"
    known = {*Pretrain.__dataclass_fields__, *Finetune.__dataclass_fields__}
    assert {key.split(".")[0] for key in keys} <= known


DOUBLE = "trainer.precision=64-true"  # so that another order of summation shows in the last digits only


@pytest.fixture(scope="module")
def of_two_processes(command, tiny_settings, tmp_path_factory):
    """A finished run of two processes."""
    folder = tmp_path_factory.mktemp("two")
    settings = [word for word in tiny_settings("mae") if not word.startswith(("evaluate", "knn"))]
    words = ["recipe=mae", "output_dir=two", "trainer.devices=2", "trainer.strategy=ddp", DOUBLE, *QUICK, *settings]
    done = command(*words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "two"


@pytest.mark.e2e
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_of_two_processes_goes_on_in_one_with_the_same_images(accumulate, of_two_processes, train_tiny, tmp_path):
    file = of_two_processes / "checkpoints" / "last-1.ckpt"
    assert load_verified(file)["global_step"] == 6  # in the middle of the second epoch
    train_tiny(tmp_path / "one", DOUBLE, *QUICK, f"trainer.accumulate_grad_batches={accumulate}", f"resume={file}")
    assert load_verified(tmp_path / "one" / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert same(weights(of_two_processes), weights(tmp_path / "one"), tolerance=1e-9)
    assert not same(weights(of_two_processes, "last-1.ckpt"), weights(tmp_path / "one"), tolerance=1e-9)


@pytest.mark.parametrize(
    ("then", "now", "name"),
    [
        (1, 2, "last-1.ckpt"),  # in mid-epoch
        pytest.param(4, 2, "last-1.ckpt", marks=pytest.mark.e2e),
        pytest.param(2, 1, "last-2.ckpt", marks=pytest.mark.e2e),  # at an epoch's end
    ],
)
def test_accumulated_batches_may_change_in_number_on_the_way(then, now, name, train_tiny, tmp_path):
    train_tiny(tmp_path / "then", DOUBLE, *QUICK, f"trainer.accumulate_grad_batches={then}")
    file = tmp_path / "then" / "checkpoints" / name
    train_tiny(tmp_path / "now", DOUBLE, *QUICK, f"trainer.accumulate_grad_batches={now}", f"resume={file}")
    assert load_verified(tmp_path / "now" / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert same(weights(tmp_path / "then"), weights(tmp_path / "now"), tolerance=1e-9)


@pytest.mark.e2e
def test_double_precision_is_resumed_to_the_last_bit(train_tiny, tmp_path):
    train_tiny(tmp_path / "whole", DOUBLE, *QUICK)
    train_tiny(tmp_path / "broken", DOUBLE, *QUICK, f"resume={tmp_path / 'whole' / 'checkpoints' / 'last-1.ckpt'}")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))


# Fine-tuning.


@pytest.fixture(scope="module")
def finetune(settings_of, tiny_run):
    """Fine-tune the tiny run for eight updates: finetune(folder, "key=value", ...) -> results."""
    short = [
        "data=digits",
        "epochs=0",
        "min_updates=8",
        "evaluations=4",
        "head_first=false",
        "lr=0.01",
        "scratch=false",
    ]
    short += ["trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.enable_progress_bar=false"]

    def run(folder, *words):
        given = {word.split("=")[0] for word in words}
        kept = [word for word in (f"run={tiny_run}", *short) if word.split("=")[0] not in given]
        return finetuning.finetune(settings_of("finetune", *kept, *words), folder, words)

    return run


def outcome(results):
    return {name: value for name, value in results.items() if name not in ("seconds", "findings")}


@pytest.mark.parametrize("holdout", [0.1, pytest.param(0.0, marks=pytest.mark.e2e)])
def test_fine_tuning_falls_back_to_the_checkpoint_before_and_says_so(holdout, finetune, tmp_path, capsys):
    whole = finetune(tmp_path / "run", f"holdout={holdout}")
    saved = tmp_path / "run" / "checkpoints"
    assert sorted(file.name for file in saved.iterdir()) == ["last-1.ckpt", "last.ckpt"]
    os.truncate(saved / "last.ckpt", 1000)
    again = finetune(tmp_path / "run", "resume=auto", f"holdout={holdout}")
    assert "Resumed from last-1.ckpt (update 6)" in capsys.readouterr().out
    assert "last.ckpt has no valid archive index" in again["findings"][0]
    assert outcome(again) == outcome(whole)
    assert sorted(file.name for file in saved.iterdir()) == ["last-1.ckpt", "last.ckpt", "last.ckpt.damaged"]


def test_fine_tuning_goes_on_under_its_own_settings_only(finetune, tmp_path):
    finetune(tmp_path / "run")
    with pytest.raises(UsageError, match=r"method.freeze: 0.0 then, 0.5 now.*lr: 0.01 then, 0.1 now"):
        finetune(tmp_path / "run", "resume=auto", "lr=0.1", "freeze=0.5")
    with pytest.raises(UsageError, match=r"images per update: 64 then, 32 now"):
        finetune(tmp_path / "run", "resume=auto", "batch_size=32")


# Row 25.


def test_the_same_folder_twice_is_refused_and_nothing_in_it_is_touched(run, run_tiny):
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(UsageError, match=r"is in use.*resume=auto.*overwrite=true"):
        run_tiny(run)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_emptied_or_gone_on_with_a_folder_has_no_checkpoints_but_its_own(run, finished, train_tiny):
    assert same(weights(finished), weights(run))
    train_tiny(run, "resume=auto", EVERY)
    assert sorted(file.name for file in (run / "checkpoints").iterdir()) == ["last-1.ckpt", "last-2.ckpt", "last.ckpt"]
    train_tiny(run, "overwrite=true", "epochs=1", "seed=1")
    assert [file.name for file in (run / "checkpoints").iterdir()] == ["last.ckpt"]
    assert not same(weights(finished), weights(run))


def test_a_finished_run_stays_as_it_is_when_resumed(run, finished, run_tiny):
    results = run_tiny(run, "resume=auto", EVERY)
    before = json.loads((finished / "results.json").read_text())
    assert {name: value for name, value in results.items() if "seconds" not in name} == {
        name: value for name, value in before.items() if "seconds" not in name
    }
    assert same(weights(finished), weights(run))
    steps = {file.name: load_verified(file)["global_step"] for file in (run / "checkpoints").iterdir()}
    assert steps == {"last.ckpt": 8, "last-1.ckpt": 6, "last-2.ckpt": 4}  # the last state is there once


def test_a_run_that_broke_before_its_first_checkpoint_begins_again_when_resumed(
    finished, train_tiny, tmp_path, monkeypatch
):
    def power_cut(self, clock):
        if clock.step == 2:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patched:
        patched.setattr(MAE, "after_update", power_cut)
        with pytest.raises(RuntimeError, match="power cut"):
            train_tiny(tmp_path / "run", EVERY)
    assert not (tmp_path / "run" / "checkpoints").exists()
    train_tiny(tmp_path / "run", "resume=auto", EVERY)
    assert same(weights(finished), weights(tmp_path / "run"))
    found, expected = (rows(folder / "metrics.csv") for folder in (tmp_path / "run", finished))
    logged = found[0].keys() - {"knn_top1", "rankme"}  # the finished run has final ones, too
    assert [{key: row[key] for key in logged} for row in found] == [
        {key: row[key] for key in logged} for row in expected
    ]


@pytest.mark.parametrize("content", ["thesis.txt", "figures/chart.png"])
def test_resuming_touches_no_folder_that_is_not_a_runs(content, run_tiny, tmp_path):
    file = tmp_path / "private" / content
    file.parent.mkdir(parents=True)
    file.write_text("dear")
    (tmp_path / "private" / "README.md").write_text("mine")
    with pytest.raises(UsageError, match="is in use"):
        run_tiny(tmp_path / "private", "resume=auto")
    assert file.read_text() == "dear"
    assert (tmp_path / "private" / "README.md").read_text() == "mine"


def test_there_is_nothing_to_resume_where_nothing_is(run_tiny, tmp_path):
    for given in (tmp_path, tmp_path / "nowhere.ckpt"):
        with pytest.raises(UsageError, match=r"there is no checkpoint. Give a .ckpt file, a run folder, or auto"):
            run_tiny(tmp_path / "run", f"resume={given}")


def test_two_processes_do_not_go_on_with_one_run_at_once(finished, train_tiny, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    code = "import pathlib, sys; from sslvision.runs.run_files import claim\n"
    code += (
        "claim(pathlib.Path(sys.argv[1]), overwrite=False, resume=True); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        for word in ("resume=auto", "overwrite=true"):
            with pytest.raises(UsageError, match="Another process is running in"):
                train_tiny(tmp_path / "run", word, EVERY)
        other.kill()
    train_tiny(tmp_path / "run", "resume=auto", EVERY)
