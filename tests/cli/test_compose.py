"""The command line: what it means, and what it refuses in words before any work."""

import dataclasses
import io
import shlex

import pytest
from rich.console import Console

from sslvision.cli.compose import compose_runs, compose_settings
from sslvision.cli.help import EXAMPLES, print_help
from sslvision.cli.recipes import COMMANDS, PRETRAIN, RECIPES
from sslvision.cli.words import as_settings, split_words
from sslvision.errors import UsageError


def composed(*words):
    return compose_settings(["recipe=mae", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=mea"], r"recipe=mea is unknown.*Did you mean recipe=mae\?"),
        ([], r"No recipe: say recipe=NAME, one of .*mae_vitb16_in1k"),
        (["recipe=nowhere/own.yaml"], r"nowhere/own.yaml: there is no such file"),
        (["recipe=mae", "lr=abc"], r"lr=abc is not a number"),
        (["recipe=mae", "epochs=2.5"], r"epochs=2.5 is not a whole number"),
        (["recipe=mae", "epochs=0"], r"epochs=0 is too small"),
        (["recipe=mae", "lr=-1"], r"lr=-1.0 must be a number above 0"),
        (["recipe=mae", "epohcs=3"], r"no setting epohcs\. Did you mean epochs"),
        (["recipe=mae", "mask_ration=0.5"], r"no setting mask_ration\. Did you mean method\.mask_ratio"),
        (["recipe=mae", "+dead=1"], r"no setting dead"),
        (["recipe=mae", "max_epochs=3"], r"no setting max_epochs; use epochs"),
        (["recipe=mae", "trainer.max_epochs=3"], r"trainer.max_epochs; use epochs|trainer.max_epochs is set"),
        (["recipe=mae", "trainer.devicess=2"], r"Did you mean trainer\.devices\?"),
        (["recipe=mae", "data.rot=x", "data=folder"], r"Did you mean data\.root\?"),
        (["recipe=mae", "data=foldr"], r"Did you mean data=folder\?"),
        (["recipe=mae", "epochs=3", "epochs=4"], r"epochs is given twice"),
        (["recipe=mae", "crop_scale=[0.1]"], r"crop_scale=\[0\.1\] has 1 values; 2 are needed"),
        (["recipe=mae", "crop_scale=0.1"], r"not a list"),
        (["recipe=mae", "norm_pix=maybe"], r"norm_pix=maybe is not true or false"),
        (["recipe=mae", "logger=wandbb"], r"logger=wandbb is unknown.*Did you mean wandb\?"),
        (["recipe=mae_vitb16_in1k"], r"data\.root is not given"),
        (["recipe=mae", "epochs=null"], r"epochs is not given"),
        (["recipe=mae", "name=../../x"], r"not a plain folder name"),
        (["recipe=mae", "method._target_=sslvision.methods.nope.Nope"], r"cannot be imported"),
        (["recipe=mae", "epochs"], r"key=value"),
        (["-m", "recipe=mae", "epochs=3,0"], r"epochs=0 is too small"),
        (["-m", "recipe=mae,mea"], r"recipe=mea is unknown"),
    ],
)
def test_a_command_line_that_cannot_be_meant_is_refused_with_what_may_be(words, message):
    with pytest.raises(UsageError, match=message):
        compose_runs(split_words(words), PRETRAIN)


def test_a_methods_settings_may_be_written_short():
    assert composed("mask_ratio=0.6").method["mask_ratio"] == 0.6
    assert composed("method.mask_ratio=0.6").method["mask_ratio"] == 0.6


def test_settings_the_recipe_does_not_mention_can_be_given():
    run = composed(
        "trainer.devices=2", "trainer.strategy=ddp", "min_lr=1e-6", "backbone.reg_tokens=4", "data.workers=0"
    )
    assert run.trainer["devices"] == 2
    assert run.trainer["strategy"] == "ddp"
    assert run.method["min_lr"] == 1e-6
    assert run.backbone["reg_tokens"] == 4
    assert run.data["workers"] == 0


def test_the_learning_rate_is_the_base_rate_times_the_batch_over_256_unless_it_is_given():
    assert composed("base_lr=1e-3", "batch_size=64").peak_lr == pytest.approx(2.5e-4)
    assert composed("base_lr=1e-3", "batch_size=64", "lr=0.1").peak_lr == 0.1


def test_another_data_source_replaces_the_recipes_own():
    run = composed("data=folder", "data.root=photos")
    assert run.data["_target_"] == "sslvision.data.sources.folder.open_folder"
    assert run.data["root"] == "photos"
    assert run.data["channels"] == 3


def test_a_recipe_of_ones_own_is_given_by_its_path(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text((RECIPES / "pretrain" / "mae.yaml").read_text().replace("mask_ratio: 0.75", "mask_ratio: 0.8"))
    run = compose_settings([f"recipe={own}", "epochs=7"])
    assert run.method["mask_ratio"] == 0.8
    assert run.epochs == 7


def test_a_recipe_without_a_data_source_takes_the_one_on_the_command_line(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("method:\n  _target_: sslvision.methods.mae.MAE\nbackbone:\n  name: test_vit\n  image_size: 32\n")
    assert compose_settings([f"recipe={own}", "data=digits"]).data["_target_"].endswith("open_digits")
    with pytest.raises(UsageError, match="The recipe names no data"):
        compose_settings([f"recipe={own}"])


def test_an_unknown_key_in_a_recipe_of_ones_own_is_refused(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text((RECIPES / "pretrain" / "mae.yaml").read_text() + "batch_sise: 3\n")
    with pytest.raises(UsageError, match="Did you mean batch_size"):
        compose_settings([f"recipe={own}"])


@pytest.mark.parametrize("name", PRETRAIN.recipes)
def test_every_recipe_says_what_it_is(name):
    on_a_folder = name.endswith(("in1k", "imagenette", "photos", "continue"))
    given = ["data.root=x"] if on_a_folder else []
    given += ["init_from=resnet18"] if name.endswith("continue") else []
    run = compose_settings([f"recipe={name}", *given])
    assert run.about
    assert run.data["_target_"].endswith("open_folder") == on_a_folder
    if name.endswith(("in1k", "imagenette")):
        assert "not yet measured here" in run.reference


def test_the_imagenet_recipes_hold_the_papers_values():
    for name in ("mae_vitb16_in1k", "mae_vitl16_in1k", "mae_vith14_in1k"):
        run = compose_settings([f"recipe={name}", "data.root=x"])
        assert (run.epochs, run.batch_size, run.base_lr, run.peak_lr) == (800, 4096, 1.5e-4, 2.4e-3)
        method = run.method
        assert (method["mask_ratio"], method["norm_pix"], method["warmup_epochs"]) == (0.75, True, 40)
        assert (method["decoder_embed_dim"], method["decoder_depth"], method["decoder_num_heads"]) == (512, 8, 16)
        assert (method["weight_decay"], method["betas"], method["crop_scale"]) == (0.05, (0.9, 0.95), (0.2, 1.0))


def test_dinos_imagenet_recipes_hold_the_published_values():
    published = {  # epochs, batch, base rate, end, teacher temperature, its warm-up, unit prototypes, clip, freeze, local crops
        "dino_vits16_in1k": (100, 512, 5e-4, 1e-6, 0.04, 0, True, 3.0, 1, 8),
        "dino_vits16_300ep_in1k": (300, 1024, 5e-4, 1e-6, 0.07, 30, False, 3.0, 1, 8),
        "dino_vitb16_in1k": (400, 1024, 7.5e-4, 2e-6, 0.07, 50, True, 0.3, 3, 10),
        "dino_swint_in1k": (300, 512, 5e-4, 1e-6, 0.07, 30, True, 3.0, 1, 8),
    }
    keys = ["min_lr", "teacher_temp", "warmup_teacher_temp_epochs", "norm_last_layer", "clip_gradient"]
    for name, values in published.items():
        run = compose_settings([f"recipe={name}", "data.root=x"])
        method = run.method
        found = [method[key] for key in [*keys, "freeze_prototypes_epochs", "local_crops"]]
        assert (run.epochs, run.batch_size, run.base_lr, *found) == values
        common = ["prototypes", "student_temp", "center_momentum", "momentum", "warmup_epochs", "local_size"]
        assert [method[key] for key in common] == [65_536, 0.1, 0.9, 0.996, 10, 96]
        assert (method["weight_decay"], method["weight_decay_end"]) == (0.04, 0.4)
        assert run.backbone["drop_path_rate"] == 0.1


@pytest.mark.parametrize(
    ("words", "backbone"),
    [
        (["backbone.name=resnet18"], {"name": "resnet18", "image_size": 32, "pool": "token"}),
        (
            ["backbone.name=vit_small_patch16_224", "backbone.patch_size=4", "backbone.image_size=64"],
            {"name": "vit_small_patch16_224", "image_size": 64, "pool": "token", "patch_size": 4},
        ),
    ],
)
def test_another_backbone_by_name_is_itself_and_not_made_as_the_recipes(words, backbone):
    assert compose_settings(["recipe=dino", *words]).backbone == backbone


def test_the_recipes_own_backbone_keeps_its_make():
    run = compose_settings(["recipe=dino", "backbone.name=vit_tiny_patch16_224", "backbone.depth=2"])
    assert (run.backbone["patch_size"], run.backbone["embed_dim"], run.backbone["depth"]) == (8, 128, 2)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS.keys())
def test_help_names_every_setting_and_recipe_and_its_examples_are_right(command, tmp_path, tiny_run, monkeypatch):
    out = io.StringIO()
    print_help(Console(file=out, width=200), command)
    for name in (*(f.name for f in dataclasses.fields(command.kind)), *command.recipes):
        assert f" {name} " in out.getvalue(), name
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "a").symlink_to(tiny_run)
    (tmp_path / "my").mkdir()
    (tmp_path / "photos").mkdir()
    recipe = (
        "defaults:\n  - /data: embedded\nmethod:\n  _target_: sslvision.methods.mae.MAE\nbackbone:\n  name: test_vit\n"
    )
    (tmp_path / "my" / "own.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    for words, _ in EXAMPLES[command.name]:
        compose_runs(split_words(as_settings(shlex.split(words), command.words)), command)


def test_a_run_lends_its_data_to_those_who_name_no_others(tiny_run, settings_of):
    assert settings_of("probe", f"run={tiny_run}").data["_target_"].endswith("open_digits")
    assert settings_of("probe", f"run={tiny_run}/export").data["_target_"].endswith("open_digits")
    assert settings_of("finetune", f"run={tiny_run}", "data=embedded").data["_target_"].endswith("open_embedded")
    assert settings_of("probe", f"run={tiny_run}", "data.workers=3").data["workers"] == 3


def test_recipes_of_two_commands_may_share_a_name(settings_of, tiny_run):
    pretrained = compose_settings(["recipe=mae_vitb16_in1k", "data.root=photos"])
    tuned = settings_of("finetune", "recipe=mae_vitb16_in1k", f"run={tiny_run}")
    assert (pretrained.epochs, tuned.epochs) == (800, 100)
