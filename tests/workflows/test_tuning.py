"""Searches through the workflow: what is trained, written, resumed, refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

pytest.importorskip("optuna")

from sslvision.cli.compose import compose_settings
from sslvision.errors import UsageError
from sslvision.training.callbacks.stop_at import StopAt
from sslvision.workflows import trial_training

SHORT = (
    "recipe=mae",
    "data=digits",
    "backbone.embed_dim=32",
    "backbone.depth=1",
    "backbone.num_heads=2",
    "backbone.patch_size=8",
    "decoder_embed_dim=16",
    "decoder_num_heads=2",
    "batch_size=296",
    "epochs=1",
    "evaluate_images=100",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
)


@pytest.fixture(scope="session")
def tune(settings_of):
    """Search on digits: tune(folder, "key=value", ...) -> results."""

    def run(folder, *words):
        from sslvision.workflows.tuning import tune as search

        given = {word.split("=")[0] for word in words}
        kept = [word for word in SHORT if word.split("=")[0] not in given]
        return search(settings_of("tune", *kept, *words), folder, words)

    return run


def rows_of(folder):
    with open(folder / "trials.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["search=random"], "There is nothing to search: give ranges"),
        (["ranges.lr=log(1,2)"], "ranges are given, and no search"),
        (["search=random", "ranges.base_lrr=log(1,2)"], r"ranges\.method\.base_lrr: a search|base_lrr"),
        (["search=random", "ranges.mask_ration=uniform(0.1,0.2)"], r"There is no setting mask_ration.*mask_ratio"),
        (["search=random", "ranges.batch_size=int(-4,8)"], r"ranges\.batch_size, at -4: batch_size=-4 is too small"),
        (["search=random", "ranges.mask_ratio=choice(a,b)"], r"ranges\.method\.mask_ratio, at a"),
        (["search=bayes", "ranges.lr=log(1,2)"], "search=bayes is unknown: it is random, grid, tpe"),
        (["steps=[9]"], r"steps=\[9\] must be all, or numbers from 1 to 7"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_begins(settings_of, words, message):
    with pytest.raises(UsageError, match=message):
        settings_of("tune", "recipe=mae", *words)


def test_ranges_of_a_command_line_keep_their_keys_and_may_have_both_a_length_and_a_budget(settings_of):
    settings = settings_of(
        "tune",
        "recipe=mae",
        "search=grid",
        "ranges.mask_ratio=choice(0.5,0.6)",
        "ranges.lr=log(1e-3,1e-2)",
        "epochs=3",
        "budget=1m",
    )
    assert settings.ranges == {"method.mask_ratio": "choice(0.5,0.6)", "lr": "log(1e-3,1e-2)"}
    assert (settings.epochs, settings.budget_seconds) == (3, 60)


@pytest.mark.thorough
def test_a_grid_is_trained_once_and_leaves_a_recipe_that_composes(tune, tmp_path):
    folder = tmp_path / "grid"
    words = ("search=grid", "ranges.base_lr=log(1e-3,1e-1)", "ranges.mask_ratio=choice(0.5,0.75)", "points=2")
    results = tune(folder, *words)
    rows = rows_of(folder)
    assert len(rows) == results["trials"]["trained"] == 4
    assert len({(row["base_lr"], row["method.mask_ratio"]) for row in rows}) == 4
    best = max(rows, key=lambda row: float(row["score"]))
    settings = compose_settings([f"recipe={folder / 'best.yaml'}"])
    assert settings.base_lr == float(best["base_lr"])
    assert settings.method["mask_ratio"] == float(best["method.mask_ratio"])
    assert (settings.epochs, settings.budget) == (1, None)
    assert (folder / "best.yaml").read_text().startswith("# python -m sslvision.pretrain recipe=")
    assert (folder / "figures" / "search.png").stat().st_size > 10_000
    again = tune(folder, *words)
    assert rows_of(folder) == rows
    assert again["best"] == results["best"]
    with pytest.raises(UsageError, match=r"search with other settings: points=3 \(it was 2\)"):
        tune(folder, *words[:-1], "points=3")


@pytest.mark.thorough
def test_a_rate_that_diverges_counts_as_nothing_and_is_told(tune, tmp_path):
    results = tune(
        tmp_path / "diverged",
        "search=grid",
        "ranges.lr=choice(1e-3,1e30)",
        "epochs=4",
        "optimizer=sgd",
        "warmup_epochs=0",
    )
    assert results["trials"]["diverged"] == 1
    assert results["best"]["lr"] == "1e-3"
    assert any("diverged" in finding for finding in results["findings"])


@pytest.mark.thorough
def test_a_budget_ends_a_trial_that_is_queued_for_a_later_call(tune, tmp_path):
    words = ("search=random", "ranges.lr=log(1e-3,1e-2)", "trials=1", "trial_epochs=1000", "epochs=1000")
    with mock.patch.object(trial_training, "StopAt", return_value=StopAt(0.0)):  # the time is over at once
        results = tune(tmp_path / "cut", *words, "budget=1h")
    assert results["trials"] == {"trained": 0, "diverged": 0, "pruned": 0, "impossible": 0, "cut": 1}
    (row,) = rows_of(tmp_path / "cut")
    assert (row["stopped_at"], row["updates"]) == ("1", "4000")
    assert "no trial was completed" in (tmp_path / "cut" / "best.yaml").read_text()
    assert any("was stopped at update 1" in finding for finding in results["findings"])


@pytest.mark.thorough
def test_fine_tuning_is_searched_by_its_validation_accuracy(settings_of, tiny_run, tmp_path):
    from sslvision.workflows.tuning import tune as search

    words = (
        f"run={tiny_run}", "data=digits", "search=random", "trials=2", "ranges.lr_ratio=log(0.1,10)", "epochs=0",
        "min_updates=4", "evaluations=2", "trainer.accelerator=cpu",
    )  # fmt: skip
    results = search(settings_of("tune", *words), tmp_path / "tuned", words)
    assert results["objective"] == "validation top-1"
    assert results["trials"]["trained"] == 2
    from sslvision.cli.recipes import FINETUNE

    settings = compose_settings([f"recipe={tmp_path / 'tuned' / 'best.yaml'}"], FINETUNE)
    assert settings.lr_ratio == results["best"]["lr_ratio"]
    assert settings.run == str(tiny_run)


@pytest.mark.e2e
def test_two_processes_share_a_study_and_when_one_is_killed_nothing_is_lost_or_trained_twice(tmp_path):
    words = [
        *SHORT, "name=shared", "search=grid", "ranges.base_lr=log(1e-3,1e-1)", "points=6",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "sslvision.tune", *words]
    both = [
        subprocess.Popen(
            start, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    folder = tmp_path / "outputs" / "shared"
    trials = folder / "trials"
    deadline = time.time() + 240
    while time.time() < deadline and not (trials.is_dir() and len(list(trials.iterdir())) >= 3):
        time.sleep(0.05)
    both[0].send_signal(signal.SIGKILL)
    out, _ = both[1].communicate(timeout=300)
    both[0].communicate()
    assert both[1].returncode == 0, out
    rates = [row["base_lr"] for row in rows_of(folder) if row["outcome"] == "trained"]
    assert len(rates) == len(set(rates)) == 6
    assert json.loads((folder / "results.json").read_text())["trials"]["trained"] == 6
