"""Values on the command line: taken literally where the setting is a string, read by Hydra's grammar elsewhere."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import yaml

from sslvision.cli import main as program
from sslvision.cli.compose import compose_runs, compose_settings, compose_values
from sslvision.cli.recipes import PRETRAIN, PROBE
from sslvision.cli.values import literal, split_at_commas, value_of
from sslvision.cli.words import split_words
from sslvision.errors import UsageError

HOME = os.path.expanduser("~")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("été", "été"), ("photos (1)", "photos (1)"), ("'photos (1)'", "photos (1)"), ('"a b"', "a b")),
        *(("2024_01", "2024_01"), ("1e3", "1e3"), ("007", "007"), ("true", "true"), ("a=b", "a=b"), ("a,b", "a,b")),
        *(("[x]", "[x]"), ("{a:1}", "{a:1}"), ("it's", "it's"), ("C:\\photos", "C:\\photos"), ("'null'", "null")),
        *(("~/x", f"{HOME}/x"), ("~", HOME), ("a~/x", "a~/x"), ("'~/x'", "~/x"), ("range(3)", "range(3)")),
        *(("null", None), ("'a','b'", "'a','b'"), (r"'it\'s'", "it's"), (" a ", " a "), ("写真 📷", "写真 📷")),
    ],
)
def test_a_string_setting_is_taken_literally(text, value):
    assert literal(text) == value
    root = compose_settings(["recipe=mae", "data=folder", f"data.root={text}"]).data["root"] if value else None
    assert root == value


@pytest.mark.parametrize("key", ["name", "output_dir", "resume", "init_from"])
def test_the_plain_settings_that_are_strings_are_too(key):
    settings = compose_settings(["recipe=mae", f"{key}=2024_01"])
    assert getattr(settings, key) == "2024_01"


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (list[str], "[2024_01,b]", ["2024_01", "b"]),
        (tuple[str, ...], "['a,b', c d]", ["a,b", "c d"]),
        (list[str], "[]", []),
        (str | None, "10", "10"),
        (str | os.PathLike[str], "10", "10"),
        (Path, "~/1_0", f"{HOME}/1_0"),
        (int, "10", 10),
        (float, "1e-3", 1e-3),
        (bool, "false", False),
        (tuple[float, float], "[0.2,1]", [0.2, 1]),
        (str | int, "2", 2),
        (str | int, "photos (1)", "photos (1)"),
        (dict, "{momentum: 0.9}", {"momentum": 0.9}),
        ("SomeType", "été", "été"),
    ],
)
def test_the_declared_type_decides_how_a_value_is_read(kind, text, value):
    assert value_of("key", text, kind) == value


def test_a_setting_without_a_declared_type_is_read_if_it_can_be_and_taken_literally_if_not():
    words = ["recipe=mae", "backbone.qk_norm=true", "backbone.scale=1e-2", "backbone.note=photos (1) été"]
    backbone = compose_settings(words).backbone
    assert (backbone["qk_norm"], backbone["scale"], backbone["note"]) == (True, 0.01, "photos (1) été")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("epochs=2,3", r"epochs=2,3 gives several values\. For a sweep, .* add -m; a list is written epochs=\[2,3\]"),
        ("recipe=mae,dino", "recipe=mae,dino gives several values"),
        ("seed=range(3)", r"seed=range\(3\) gives several values"),
        ("hydra.run.dir=x", "no settings of Hydra"),
        ("hydra/launcher=slurm", "no settings of Hydra"),
        ("--resolve", r"no option --resolve\. Options are --help, -m .* and --cfg job"),
        ("--cfg=hydra", "no option --cfg=hydra"),
        ("epochs=(", r"Cannot read the command line: epochs=\("),
        ("~nothing", r"~nothing: the recipe has no such setting"),
        ("method.mask_ratio=1 mask_ratio=1", "method.mask_ratio is given twice"),
        ("data.root=${oc.nothing:x}", "oc.nothing"),
    ],
)
def test_what_cannot_be_read_is_refused_in_words(word, message):
    words = word.split() if word.startswith("method") else [word]
    with pytest.raises(UsageError, match=message):
        compose_settings([*([] if word.startswith("recipe") else ["recipe=mae"]), *words])


def test_a_key_can_be_removed_and_one_setting_can_refer_to_another(monkeypatch):
    monkeypatch.setenv("PHOTOS", "/photos")
    words = [
        "recipe=mae",
        "~warmup_epochs",
        "data=folder",
        "data.root=${oc.env:PHOTOS}/a",
        "seed=${epochs}",
        "epochs=7",
    ]
    settings = compose_settings(words)
    assert "warmup_epochs" not in settings.method
    assert (settings.data["root"], settings.seed) == ("/photos/a", 7)


def sweep(*words):
    return compose_runs(split_words(["-m", "recipe=mae", *words]), PRETRAIN)


def test_a_sweep_has_a_run_for_each_combination_of_values():
    runs = sweep("mask_ratio=0.5,0.75", "name=2024_01,été", "seed=range(2)", "crop_scale=[0.5,1]")
    assert len(runs) == 8
    assert [run.suffix for run in runs] == [f"-{number}" for number in range(8)]
    assert [run.settings.name for run in runs[:4]] == ["2024_01", "2024_01", "été", "été"]
    assert [run.settings.seed for run in runs[:4]] == [0, 1, 0, 1]
    assert runs[7].words == ["recipe=mae", "mask_ratio=0.75", "name=été", "seed=1", "crop_scale=[0.5,1]"]
    for run in runs:  # as a process that Lightning starts composes it
        assert compose_settings(run.words) == run.settings


def test_a_sweep_goes_over_recipes_and_choices_and_leaves_quoted_commas():
    runs = compose_runs(split_words(["-m", "recipe=mae,dino", "epochs=choice(2,3)", "about='a, b'"]), PRETRAIN)
    methods = [run.settings.method["_target_"].rpartition(".")[2] for run in runs]
    assert methods == ["MAE", "MAE", "DINO", "DINO"]
    assert [run.recipe for run in runs] == ["mae", "mae", "dino", "dino"]
    assert {run.settings.about for run in runs} == {"a, b"}


def test_the_backbone_of_each_point_of_a_sweep_is_made_as_its_own():
    own, other = sweep("backbone.name=vit_tiny_patch16_224,vit_small_patch16_224")
    assert own.settings.backbone["embed_dim"] == 128
    assert set(other.settings.backbone) == {"name", "image_size", "pool"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [("a,b", ["a", "b"]), ("'a,b',c", ["'a,b'", "c"]), ("[a,b],(c,d)", ["[a,b]", "(c,d)"]), ("it's,b", ["it's", "b"])],
)
def test_a_text_is_split_at_its_outer_commas(text, parts):
    assert split_at_commas(text) == parts


def test_cfg_job_prints_the_settings_as_a_recipe_of_ones_own(capsys, tmp_path):
    words = ["recipe=mae", "epochs=3", "data=folder", "data.root=2024_01"]
    assert program._run_all(PRETRAIN, [*words, "--cfg", "job"]) == 0
    printed = capsys.readouterr().out
    settings = compose_settings(words)
    assert yaml.safe_load(printed)["data"]["root"] == "2024_01"
    (tmp_path / "own.yaml").write_text(printed)
    again = compose_settings([f"recipe={tmp_path}/own.yaml"])
    assert dataclasses.asdict(again) == dataclasses.asdict(settings)
    assert program._run_all(PRETRAIN, ["-m", "recipe=mae", "epochs=2,3", "-c", "job"]) == 0
    assert [one["epochs"] for one in yaml.safe_load_all(capsys.readouterr().out)] == [2, 3]


def test_the_runs_of_a_sweep_find_their_own_words_and_the_largest_exit_code_counts(monkeypatch, capsys):
    from sslvision.errors import DataError, Diverged

    seen = []

    def fake(run, words):
        def call():
            seen.append((sys.argv[:], run.suffix, "LOCAL_RANK" in os.environ))
            os.environ["LOCAL_RANK"] = "0"  # as Lightning does
            if run.settings.seed < 2:
                raise {0: Diverged, 1: DataError}[run.settings.seed]("no good")

        return call

    words = ["-m", "recipe=mae", "seed=0,1,2"]
    argv = ["sslvision", "pretrain", *words]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(program, "work", fake)
    assert program._run_all(PRETRAIN, words) == 4
    assert seen == [(["sslvision", "pretrain", "recipe=mae", f"seed={n}"], f"-{n}", False) for n in range(3)]
    assert sys.argv is argv
    assert argv[2:] == words
    assert capsys.readouterr().err.count("no good") == 2


def test_the_data_of_a_run_are_given_types_too(tiny_run, settings_of, tmp_path):
    folder = yaml.safe_load((tiny_run / "config.yaml").read_text())
    folder["data"] = {"_target_": "sslvision.data.sources.folder.open_folder", "root": "photos"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(folder))
    settings = settings_of("probe", f"run={tmp_path}", "data.root=2024_01", "data.holdout=0.3")
    assert settings.data["root"] == "2024_01"
    assert settings.data["holdout"] == 0.3
    folder["data"]["root"] = "${oc.env:HOME}"  # of a file that may come from anybody
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(folder))
    assert compose_values({"run": tmp_path}, PROBE).settings.data["root"] == "${oc.env:HOME}"


@pytest.mark.e2e
def test_each_run_of_a_sweep_starts_processes_of_its_own(command, tiny_settings, tmp_path):
    words = ["-m", "recipe=mae", *tiny_settings("mae"), "seed=0,1", "name=photos (1) été", "dry_run=true"]
    words += ["trainer.devices=2", "trainer.strategy=ddp"]
    ended = command(*words, cwd=tmp_path, timeout=550)
    assert ended.returncode == 0, ended.stderr
    for number in range(2):
        told = yaml.safe_load((tmp_path / "outputs" / f"photos (1) été-dry-run-{number}" / "config.yaml").read_text())
        assert (told["seed"], told["trainer"]["devices"]) == (number, 2)
