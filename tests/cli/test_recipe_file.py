"""Recipes of one's own, and the config.yaml of a run: as a recipe, and to resume that run."""

import dataclasses
import shlex
import signal

import pytest
import yaml

from sslvision.cli.compose import compose_settings, compose_values
from sslvision.cli.main import _interrupted
from sslvision.cli.recipes import COMMANDS, FINETUNE, PRETRAIN
from sslvision.errors import UsageError
from sslvision.runs.redaction import redact
from sslvision.runs.renamed_settings import warn
from sslvision.runs.run_files import describe
from sslvision.system.resuming import command_to_resume

OWN = """
method: {{_target_: sslvision.methods.mae.MAE}}
backbone: {{name: test_vit, image_size: 32}}
{}
"""


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    warn.cache_clear()


def recorded(folder, *words, of="pretrain"):
    """Write the config.yaml and environment.json of a run, and return its settings."""
    settings = compose_settings(words, COMMANDS[of])
    folder.mkdir(parents=True)
    describe(folder, dataclasses.asdict(settings), words, command=of)
    return settings


def own(text):
    with open("own.yaml", "w", encoding="utf-8") as file:
        file.write(OWN.format(text))
    return compose_settings(["recipe=own.yaml"])


@pytest.mark.parametrize(
    ("written", "root"),
    [
        *(("2024_01", "2024_01"), ("1e3", "1e3"), ("007", "007"), ("on", "on"), ("1.0", "1.0"), ("été", "été")),
        *(("photos (1)", "photos (1)"), ("a,b", "a,b"), ("'2024_01'", "2024_01"), ("'null'", "null"), ("0x10", "0x10")),
        *(("2024-01-02", "2024-01-02"), ("12:30", "12:30"), ("'~/x'", "~/x"), ('"\\\\${x}"', "${x}")),
    ],
)
def test_a_string_in_a_recipe_is_what_is_written_there(written, root):
    settings = own(f"data:\n  _target_: sslvision.data.sources.folder.open_folder\n  root: {written}\nabout: 1_0")
    assert (settings.data["root"], settings.about) == (root, "1_0")


def test_the_home_directory_and_null_have_their_meaning_in_a_recipe(tmp_path):
    text = "data:\n  _target_: sslvision.data.sources.folder.open_folder\n  root: {}\nname: null\ninit_from: ~/a.pth"
    settings = own(text.format("~/x"))
    assert settings.data["root"] == f"{tmp_path}/x"
    assert (settings.name, settings.init_from) == (None, f"{tmp_path}/a.pth")
    with pytest.raises(UsageError, match=r"data.root is not given"):
        own(text.format("null"))


def test_names_in_a_list_are_what_is_written_there(monkeypatch):
    from sslvision.data.sources import folder

    def open_listed(root: str, *, names: list[str], sizes: list[int]):
        """A source with a list of names."""

    monkeypatch.setattr(folder, "open_listed", open_listed, raising=False)
    names = ["2024_01", "1e3", "true", "été", "a b", "x,y"]
    text = "data: {_target_: sslvision.data.sources.folder.open_listed, root: 1_0, sizes: [1_0], names: [%s]}"
    data = own(text % "2024_01, 1e3, true, été, a b, 'x,y'").data
    assert (data["names"], data["sizes"], data["root"]) == (names, [10], "1_0")
    given = compose_settings(["recipe=own.yaml", "data.names=[2024_01,1e3,true,été,a b,'x,y']"]).data["names"]
    assert given == names


def test_what_is_given_comes_before_what_a_recipe_holds():
    own("data: {_target_: sslvision.data.sources.folder.open_folder, root: 2024_01}")
    assert compose_settings(["recipe=own.yaml", "data.root=1e3"]).data["root"] == "1e3"
    assert compose_values({"recipe": "own.yaml", "data.root": "x"}, PRETRAIN).settings.data["root"] == "x"


def test_the_config_of_a_run_is_a_recipe_for_another_run(tmp_path, capsys):
    words = ["recipe=mae", "mask_ratio=0.6", "name=1e3", "overwrite=true", "about=a \\${b}"]
    before = recorded(tmp_path / "x", *words)
    for recipe in ("x/config.yaml", str(tmp_path / "x" / "config.yaml")):
        again = compose_settings([f"recipe={recipe}"])
        assert again == dataclasses.replace(before, name=None, overwrite=False)
    told = "recipe=x/config.yaml: not taken over from that run, which has its own folder: name=1e3, overwrite=true."
    assert told in capsys.readouterr().err
    assert compose_settings(["recipe=x/config.yaml", "name=y"]).name == "y"


@pytest.mark.parametrize("root", ["été", "photos (1)", "2024_01", "1e3", "null", "a,b", "~/x", "true", "a: b"])
def test_a_path_comes_back_from_the_config_of_a_run_as_it_was_given(root, tmp_path):
    quoted = f"'{root}'" if root in ("null", "~/x") else root
    before = recorded(tmp_path / "outputs" / "2024_02", "recipe=mae", "data=folder", f"data.root={quoted}")
    assert before.data["root"] == root
    for words in (["recipe=outputs/2024_02/config.yaml"], ["resume=auto", "name=2024_02"]):
        assert compose_settings(words).data == before.data


@pytest.mark.thorough
def test_the_data_of_a_recipe_can_be_replaced_and_what_any_source_takes_stays(tmp_path):
    given = ["data.root=a", "data.holdout=0.3", "data.workers=2", "data.cache=disk"]
    recorded(tmp_path / "x", "recipe=mae", "data=folder", *given)
    plain = compose_settings(["recipe=mae", "data=digits", "data.workers=2", "data.cache=disk"]).data
    assert compose_settings(["recipe=x/config.yaml", "data=digits"]).data == plain
    data = compose_settings(["recipe=x/config.yaml", "data=folder", "data.root=b"]).data  # the same source
    assert (data["root"], data["holdout"], data["workers"]) == ("b", 0.3, 2)
    recorded(tmp_path / "y", "recipe=mae")
    for words in (["data=folder", "data.root=b"], ["data.root=b"]):
        data = compose_settings(["recipe=y/config.yaml", *words]).data
        assert data == compose_settings(["recipe=mae", "data=folder", "data.root=b"]).data
    recorded(tmp_path / "z", "run=test_vit", "data=digits", "freeze=0.5", of="finetune")
    tuned = compose_settings(["recipe=z/config.yaml", "data=folder", "data.root=b"], FINETUNE)
    assert (tuned.run, tuned.method["freeze"], tuned.data["root"]) == ("test_vit", 0.5, "b")


def test_a_recipe_that_is_for_another_command_or_a_folder_is_answered(tmp_path):
    recorded(tmp_path / "x", "recipe=mae")
    recorded(tmp_path / "z", "run=test_vit", "data=digits", of="finetune")
    with pytest.raises(UsageError, match=r"holds the settings of finetune, not of pretrain.*sslvision.finetune"):
        compose_settings(["recipe=z/config.yaml"])
    with pytest.raises(UsageError, match="holds the settings of pretrain, not of finetune"):
        compose_settings(["recipe=x/config.yaml", "run=test_vit"], FINETUNE)
    with pytest.raises(UsageError, match=r"recipe=\./x/ is a folder: .* recipe=\./x/config.yaml"):
        compose_settings(["recipe=./x/"])


def test_a_secret_that_is_not_in_the_config_is_asked_for(tmp_path, monkeypatch):
    own("data: {_target_: sslvision.data.sources.folder.open_folder, root: 'https://me:hunter22@host/x'}")
    recorded(tmp_path / "outputs" / "x", "recipe=own.yaml")
    for words in (["recipe=outputs/x/config.yaml"], ["resume=auto", "name=x"]):
        with pytest.raises(UsageError, match=r"data.root is not kept in the files of a run.*give it again, data.root="):
            compose_settings(words)
        assert compose_settings([*words, "data.root=y"]).data["root"] == "y"


def test_a_run_is_resumed_without_its_recipe(tmp_path, capsys):
    before = recorded(tmp_path / "outputs" / "first", "recipe=mae", "mask_ratio=0.6", "name=first", "dry_run=false")
    for words in (["name=first"], ["output_dir=outputs/first"], [f"output_dir={tmp_path}/outputs/first"]):
        again = compose_settings(["resume=auto", *words])
        assert dataclasses.replace(again, name="first", output_dir=None, resume=None) == before
    assert "no recipe is named, so the settings are those of outputs/first/config.yaml" in capsys.readouterr().err
    assert compose_settings(["resume=outputs/first", "name=second"]).method["mask_ratio"] == 0.6
    assert compose_settings(["resume=auto", "name=first", "mask_ratio=0.7"]).method["mask_ratio"] == 0.7
    assert compose_settings(["resume=auto", "name=first", "recipe=mae"]).method["mask_ratio"] == 0.75
    values = compose_values({"resume": "auto", "name": "first"}, PRETRAIN).settings
    assert values.method["mask_ratio"] == 0.6
    recorded(tmp_path / "outputs" / "t", "run=test_vit", "data=digits", "freeze=0.5", "name=t", of="finetune")
    tuned = compose_settings(["resume=auto", "name=t"], FINETUNE)
    assert (tuned.run, tuned.method["freeze"], tuned.name) == ("test_vit", 0.5, "t")


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("pretrain", "resume=auto", "resume=auto needs to know which run folder: give name="),
        (
            "pretrain",
            "resume=auto name=frist",
            r"no run in outputs/frist .*Did you mean name=first\? .*add recipe=NAME",
        ),
        ("pretrain", "resume=nowhere/last.ckpt", r"there is no such checkpoint.*add recipe=NAME"),
        ("finetune", "resume=auto name=nothing", r"no run in outputs/nothing .*add run="),
        ("pretrain", "resume=auto name=foreign", r"method._target_=os.system.*name it yourself"),
    ],
)
def test_what_cannot_be_resumed_is_answered(command, words, message, tmp_path):
    recorded(tmp_path / "outputs" / "first", "recipe=mae")
    recorded(tmp_path / "outputs" / "foreign", "recipe=mae")
    file = tmp_path / "outputs" / "foreign" / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"method": {"_target_": "os.system"}}))
    with pytest.raises(UsageError, match=message):
        compose_settings(words.split(), COMMANDS[command])


def test_a_job_that_may_start_or_resume_starts_where_there_is_no_run_yet():
    assert compose_settings(["run=test_vit", "data=digits", "resume=auto", "name=t"], FINETUNE).epochs == 20
    assert compose_settings(["recipe=mae", "resume=auto", "name=a"]).resume == "auto"


def test_the_command_that_resumes_works_when_typed(tmp_path):
    pretrain = "python -m sslvision.pretrain resume=auto"
    assert command_to_resume(tmp_path / "outputs" / "first") == f"{pretrain} name=first"
    assert shlex.split(command_to_resume("/a/photos (1)")) == [*pretrain.split(), "output_dir=/a/photos (1)"]
    assert command_to_resume(None) == "the same command with resume=auto"
    (tmp_path / "config.yaml").write_text("name: t\nrun: outputs/first\n")
    assert command_to_resume(tmp_path) == f"python -m sslvision.finetune resume=auto output_dir={tmp_path}"


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        (
            "finetune",
            "run=test_vit data=digits compare=true",
            r"SIGINT\. 0 trainings have ended and are .*goes on: python -m sslvision\.finetune run=.* compare=true$",
        ),
        (
            "finetune",
            "run=test_vit data=digits compare=true overwrite=true",
            r"goes on \(without overwrite=true, which would delete them\): .* data=digits compare=true$",
        ),
        (
            "finetune",
            "run=test_vit data=digits compare=true dry_run=true",
            "dry run, which is not resumed: start it again",
        ),
        ("finetune", "run=test_vit data=digits name=a", "start it again, with overwrite=true, as its folder is in use"),
        (
            "finetune",
            "run=test_vit data=digits name=b",
            r"resume with: python -m sslvision\.finetune resume=auto name=b",
        ),
        ("pretrain", "recipe=mae name=b", r"resume with: python -m sslvision\.pretrain resume=auto name=b"),
        ("pretrain", "recipe=mae name=c", r"No checkpoint was saved before: start it again\.$"),
        ("probe", "run=test_vit data=digits", r"outside of training\.$"),
    ],
)
def test_ctrl_c_outside_of_training_is_told_with_what_goes_on(name, words, told, tmp_path, monkeypatch):
    settings = compose_settings(words.split(), COMMANDS[name])
    for folder in ("a", "b"):
        (tmp_path / "outputs" / folder / "checkpoints").mkdir(parents=True)
        (tmp_path / "outputs" / folder / "config.yaml").write_text("run: test_vit\n" if name == "finetune" else "")
    (tmp_path / "outputs" / "b" / "checkpoints" / "last.ckpt").touch()
    monkeypatch.setenv("SSLVISION_RUN_FOLDER", str(tmp_path / "outputs" / (settings.name or "z")))
    stopped = _interrupted(signal.SIGINT, COMMANDS[name], words.split(), settings)
    assert stopped.exit_code == 130
    with pytest.raises(type(stopped), match=told):
        raise stopped


def test_a_resumed_run_keeps_the_command_that_made_it(tmp_path):
    recorded(tmp_path / "a", "recipe=mae", "epochs=3")
    describe(tmp_path / "a", redact({}), ["resume=auto", "name=a"])
    assert "python -m sslvision.pretrain recipe=mae epochs=3" in (tmp_path / "a" / "README.md").read_text()
    describe(tmp_path / "a", redact({}), ["recipe=mae", "resume=auto", "name=a"])
    assert "recipe=mae resume=auto name=a" in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.thorough
def test_the_advice_of_an_interrupted_run_works_when_typed(warm_command, tiny_settings, tmp_path):
    """Also of a dry run, whose folder has another name than was given."""
    done = warm_command("recipe=mae", *tiny_settings("mae"), "dry_run=true", "name=first", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "first-dry-run" / "checkpoints" / "last.ckpt").is_file()
    done = warm_command("resume=auto", "name=first-dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [folder.name for folder in (tmp_path / "outputs").iterdir()] == ["first-dry-run"]
    done = warm_command("resume=auto", "name=first-dry-run", "mask_ratio=0.5", cwd=tmp_path)
    assert done.returncode == 2
    assert "method.mask_ratio: 0.75 then, 0.5 now" in done.stderr
