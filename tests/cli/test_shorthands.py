"""Short forms, each refused in words where it cannot be meant, and told where something follows from it."""

import pytest

from sslvision.cli.compose import compose_runs, compose_settings, compose_values
from sslvision.cli.recipes import COMMANDS, FINETUNE, PRETRAIN, PROBE
from sslvision.cli.words import split_words
from sslvision.errors import UsageError
from sslvision.runs.renamed_settings import warn


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("photos", "digits", "2024_01", "photos (1)", "a,b", "été", "null", "x${y}"):
        (tmp_path / name).mkdir()
    (tmp_path / "photos.rar").touch()
    warn.cache_clear()


def data_of(*words):
    return compose_settings(["recipe=mae", *words]).data


@pytest.mark.parametrize(
    ("text", "root"),
    [
        *(("photos", "photos"), ("./digits", "./digits"), ("2024_01", "2024_01"), ("photos (1)", "photos (1)")),
        *(("a,b", "a,b"), ("été", "été"), ("'null'", "null"), ("photos/", "photos/"), ("x${y}", "x${y}")),
    ],
)
def test_data_may_be_the_folder_of_the_images(text, root):
    data = data_of(f"data={text}")
    assert data["_target_"] == "sslvision.data.sources.folder.open_folder"
    assert data["root"] == root
    assert data | {"root": "x"} == data_of("data=folder", "data.root=x")


def test_it_may_be_the_home_directory_or_an_absolute_path(tmp_path):
    assert data_of("data=~/photos")["root"] == f"{tmp_path}/photos"
    assert data_of(f"data={tmp_path}/photos", "data.workers=3")["workers"] == 3


def test_a_folder_is_data_for_every_command_and_for_the_functions(tmp_path, capsys):
    for name in ("probe", "finetune"):
        settings = compose_settings(["run=test_vit", "data=2024_01"], COMMANDS[name])
        assert settings.data["root"] == "2024_01"
    for data in (tmp_path / "photos", "photos"):
        assert compose_values({"recipe": "mae", "data": data}, PRETRAIN).settings.data["root"] == str(data)
        assert compose_values({"run": "test_vit", "data": data}, PROBE).settings.data["root"] == str(data)
    assert capsys.readouterr().err == ""
    runs = compose_runs(split_words(["-m", "recipe=mae", "data=photos,2024_01,digits"]), PRETRAIN)
    assert [run.settings.data.get("root") for run in runs] == ["photos", "2024_01", None]
    assert (
        "data=digits is the source of that name; the folder of that name is data=./digits." in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "data=./nowhere",
            r"data=./nowhere: there is no such folder\. It is one of digits, .* or the path of a folder",
        ),
        ("data=/no/where", "there is no such folder"),
        ("data=photos.rar", "data=photos.rar is a file"),
        ("data=nowhere", "data=nowhere is unknown, and there is no folder of that name"),
        ("data=foldr", r"Did you mean data=folder\?"),
        ("data=cifar-10", r"Did you mean data=torchvision data.name=CIFAR10 data.root=\.\.\.\?"),
        ("data=photos data.root=x", "data.root is given twice, as data=photos"),
        ("backbone=test_vit backbone.name=resnet18", "backbone.name is given twice, as backbone=test_vit"),
        ("method=dino", "method=dino is not a setting: a method is chosen by its recipe: recipe=mae"),
        ("trainer=gpu", "trainer=gpu is not a setting: .*trainer.accelerator="),
        ("data.name=CIFAR10", "data=embedded, the source of this run, has no setting data.name: give data=torchvision"),
        ("data.name=CIFAR10 data.root=x", "no setting data.name and data.root: give data=torchvision"),
        ("data.size=16", "no setting data.size: give data=digits"),
        (
            "data=digits data.root=x",
            "data=digits, .* has no setting data.root: give data=folder or data=list or data=torchvision instead",
        ),
        ("data.rot=x", "There is no setting data.rot"),
        ("data=folder data.root=${x}", r"data.root: .*'x' not found.*to mean the characters, write \\\$\{"),
    ],
)
def test_what_cannot_be_meant_is_answered(words, message):
    with pytest.raises(UsageError, match=message):
        data_of(*words.split())


def test_the_root_of_a_folder_is_enough_where_the_recipes_data_have_none_and_that_is_told(capsys, tmp_path):
    assert data_of("data.root=2024_01", "data.holdout=0.2") == data_of(
        "data=folder", "data.root=2024_01", "data.holdout=0.2"
    )
    told = "data.root=2024_01: data=folder is used, and not data=embedded, which has no data.root.\n"
    assert capsys.readouterr().err == told
    settings = compose_settings(["run=test_vit", "data.root=photos"], FINETUNE)
    assert settings.data["_target_"].endswith("open_folder")
    assert capsys.readouterr().err == "data.root=photos: data=folder is used.\n"
    assert compose_values({"recipe": "mae", "data.root": tmp_path}, PRETRAIN).settings.data["root"] == str(tmp_path)


def test_the_root_of_a_source_that_has_one_is_its_own(capsys):
    settings = compose_settings(["recipe=mae_vitb16_in1k", "data.root=photos"])
    assert settings.data["root"] == "photos"
    settings = compose_settings(["recipe=mae", "data=torchvision", "data.name=CIFAR10", "data.root=photos"])
    assert settings.data["_target_"].endswith("open_torchvision")
    assert capsys.readouterr().err == ""


def test_the_backbone_may_be_given_by_name(settings_of):
    short = compose_settings(["recipe=dino", "backbone=vit_small_patch16_224", "backbone.image_size=64"])
    assert short == compose_settings(["recipe=dino", "backbone.name=vit_small_patch16_224", "backbone.image_size=64"])
    values = compose_values({"recipe": "dino", "backbone": "resnet18"}, PRETRAIN).settings
    assert values.backbone["name"] == "resnet18"
    assert compose_settings(["recipe=mae", "backbone={depth: 2}"]).backbone["depth"] == 2
    runs = compose_runs(split_words(["-m", "recipe=dino", "backbone=resnet18,test_vit"]), PRETRAIN)
    assert [run.settings.backbone["name"] for run in runs] == ["resnet18", "test_vit"]
    for name in ("probe", "finetune"):
        with pytest.raises(UsageError, match=r"backbone.name cannot be given: run=test_vit determines the backbone"):
            settings_of(name, "run=test_vit", "data=digits", "backbone=resnet18")


def test_they_work_when_typed(warm_command, tmp_path):
    done = warm_command("recipe=mae", "data=photos (1)", "backbone=test_vit", "--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "root: photos (1)" in done.stdout
    assert "name: test_vit" in done.stdout
    done = warm_command("recipe=mae", "data.root=photos", "batch_size=4", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 3  # there are no images in it
    assert done.stderr.startswith("data.root=photos: data=folder is used, and not data=embedded")
    assert "photos" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "backbone.pretrained=true",
            r"Instead of backbone.pretrained use init_from=PATH .* \(probe, finetune: run=",
        ),
        ("backbone.checkpoint_path=x.pth", "backbone.checkpoint_path use init_from="),
        ("backbone.cache_dir=x", "backbone.cache_dir use init_from="),
        ("backbone.image_size=0", "backbone.image_size=0 must be a whole number of pixels from 1 to 16,384"),
        ("backbone.image_size=-1", "backbone.image_size=-1 must be"),
        ("backbone.image_size=1000000000", "backbone.image_size=1000000000 must be"),
        ("backbone.image_size=31.5", r"backbone.image_size=31.5 must be a whole number"),
    ],
)
def test_every_command_refuses_what_is_no_option_of_a_model_before_it_loads_one(word, message, settings_of):
    with pytest.raises(UsageError, match=message):
        data_of(word)
    for name in ("probe",) if "pretrained" in word else ("probe", "finetune"):
        with pytest.raises(UsageError, match=message):
            settings_of(name, "run=test_vit", "data=digits", word)


def test_fine_tuning_takes_the_network_of_a_run_with_random_weights(settings_of):
    settings = settings_of("finetune", "run=test_vit", "data=digits", "backbone.pretrained=false")
    assert settings.backbone["pretrained"] is False


@pytest.mark.thorough
def test_a_size_that_patches_do_not_divide_and_a_strategy_that_ends_are_one_line_when_typed(warm_command, tmp_path):
    words = ("recipe=dino", "backbone=vit_small_patch16_224", "dry_run=true")
    for word, message in (
        ("backbone.image_size=31", "Images of 31x31 pixels cannot be divided into patches of 16x16"),
        ("backbone.image_size=0", "backbone.image_size=0 must be a whole number"),
        ("backbone.pretrained=true", "Instead of backbone.pretrained use init_from="),
        ("trainer.strategy=ddp_fork", "use trainer.strategy=ddp, from the command line"),
        ("trainer.strategy=dpp", "Did you mean trainer.strategy=ddp?"),
        ("trainer.accelerator=abacus", "trainer.accelerator=abacus is unknown to Lightning"),
    ):
        done = warm_command(*words, word, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "outputs").exists()
