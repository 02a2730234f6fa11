"""Old names of settings: they work on the command line, in recipes and in run folders, and a line tells the new ones."""

import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from sslvision.backbones.load import load_backbone
from sslvision.cli.compose import compose_settings, compose_values
from sslvision.cli.recipes import PRETRAIN, RECIPES
from sslvision.errors import UsageError
from sslvision.runs.config import read_settings
from sslvision.runs.renamed_settings import MOVED, renamed, warn
from sslvision.settings import locate
from sslvision.workflows import pretraining

OLD_RUNS = Path(__file__).parents[1] / "golden" / "old_runs"
# The settings of the two runs, in old names.
TINY = ["backbone.embed_dim=32", "backbone.depth=1", "backbone.num_heads=2", "backbone.patch_size=8", "warmup_epochs=1"]
TINY += ["batch_size=2500", "epochs=2", "evaluate_images=500", "knn_every_epochs=1", "checkpoint_every_epochs=1"]
TINY += ["trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu", "memory=low"]
OLD = {
    "mae": ["decoder_width=32", "decoder_heads=2"],
    "dino": [
        *("prototypes=64", "hidden=32", "bottleneck=16", "local_crops=2", "local_size=16"),
        *("centre_momentum=0.8", "grey=0.5", "unit_prototypes=false"),
    ],
}


# What the recipes had when the old runs were made.
THEN = {"mae": ["optimizer=adamw", "base_lr=8e-3"], "dino": ["optimizer=adamw"]}


@pytest.fixture(autouse=True)
def _warnings_are_new():
    warn.cache_clear()


@pytest.fixture
def old_run(tmp_path):
    """Return a copy of an old run's folder: old_run("mae")."""

    def copy(method):
        return Path(shutil.copytree(OLD_RUNS / method, tmp_path / method))

    return copy


@pytest.mark.thorough
@pytest.mark.parametrize("method", OLD)
def test_an_old_run_resumes_and_ends_with_the_weights_it_ended_with_then(method, old_run, capsys):
    folder = old_run(method)
    settings = compose_settings([f"recipe={method}", *THEN[method], *TINY, *OLD[method], "resume=auto"])
    with mock.patch.object(pretraining, "export_and_evaluate", return_value={}):
        pretraining.pretrain(settings, folder)
    told = capsys.readouterr().err
    assert "memory is now activation_checkpointing. The old name still works" in told
    assert re.search(r"last.ckpt uses old names of settings, which still work: memory is now activation_check", told)
    ended = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    expected = load_file(folder / "end.safetensors")
    assert ended["global_step"] == 8
    assert ended["state_dict"].keys() == expected.keys()
    for name, weights in expected.items():
        found = ended["state_dict"][name]
        if name.endswith("qkv.bias"):  # a bias of keys changes nothing: its gradient is rounding, which Adam enlarges
            found, weights = (torch.cat([bias.chunk(3)[0], bias.chunk(3)[2]]) for bias in (found, weights))
        torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.thorough
@pytest.mark.parametrize("method", OLD)
def test_the_weights_and_settings_of_an_old_run_are_read(method, old_run, capsys):
    folder = old_run(method)
    told = read_settings(folder / "config.yaml", ("method", "data"))
    assert told["activation_checkpointing"] is True
    assert told["data"]["_target_"] == "sslvision.data.sources.embedded.open_embedded"
    assert f"{folder / 'config.yaml'} uses old names" in capsys.readouterr().err
    assert load_backbone(str(folder)).backbone.embed_dim == 32
    tiny = [word for word in TINY if not word.startswith(("batch_size=", "knn_every_epochs=", "evaluate_images="))]
    words = [f"recipe={method}", *tiny, *OLD[method], "data=digits", "batch_size=50", "knn_every_epochs=0"]
    words += ["evaluate_images=50"]
    settings = compose_settings([*words, f"init_from={folder}", "dry_run=true"])
    assert pretraining.pretrain(settings, folder.with_name("next"))["loss"] > 0


def test_an_old_run_lends_its_data_and_is_probed(old_run, settings_of, tmp_path):
    from sslvision.workflows.probing import probe

    settings = settings_of("probe", f"run={old_run('mae')}", "train_images=100", "pixels=false", "device=cpu")
    assert settings.data["_target_"] == "sslvision.data.sources.embedded.open_embedded"
    settings.features_dir = str(tmp_path / "features")
    assert probe(settings, tmp_path / "probe")


def test_old_names_on_the_command_line_are_the_new_settings(capsys):
    for words in (["grey=0.5", "unit_prototypes=false"], ["method.grey=0.5", "method.unit_prototypes=false"]):
        settings = compose_settings(["recipe=dino", "memory=low", "centre_momentum=0.8", *words])
        assert settings.activation_checkpointing is True
        method = settings.method
        assert (method["center_momentum"], method["gray"], method["norm_last_layer"]) == (0.8, 0.5, False)
    told = capsys.readouterr().err
    assert "method.grey is now method.gray. The old name still works; the new form is gray=0.5." in told
    assert told.count("activation_checkpointing=true") == 1
    assert compose_settings(["recipe=mae", "memory=normal"]).activation_checkpointing is False
    run = compose_values({"recipe": "mae", "memory": "low", "method": {"decoder_width": 32}}, PRETRAIN)
    assert run.settings.activation_checkpointing is True
    assert run.settings.method["decoder_embed_dim"] == 32


def test_a_setting_by_its_old_and_its_new_name_is_given_twice():
    with pytest.raises(UsageError, match=r"method\.gray is given twice, by its old name and by its current one"):
        compose_settings(["recipe=dino", "gray=0.1", "grey=0.2"])
    with pytest.raises(UsageError, match=r"memory=high is unknown: memory=low is now activation_checkpointing=true"):
        compose_settings(["recipe=dino", "memory=high"])


def test_a_recipe_with_old_names_is_read(tmp_path, capsys):
    text = (RECIPES / "pretrain" / "dino.yaml").read_text()
    text = text.replace("  prototypes: 1024", "  prototypes: 1024\n  centre_momentum: 0.7\n  unit_prototypes: false")
    (tmp_path / "own.yaml").write_text(text + "memory: low\n")
    settings = compose_settings([f"recipe={tmp_path}/own.yaml", "unit_prototypes=true"])
    assert (settings.method["center_momentum"], settings.method["norm_last_layer"]) == (0.7, True)
    assert settings.activation_checkpointing
    assert f"recipe={tmp_path}/own.yaml uses old names of settings" in capsys.readouterr().err


@pytest.mark.parametrize("module", MOVED)
def test_the_old_place_of_a_data_source_is_its_current_one(module):
    name = "open_" + module.rpartition(".")[2].removesuffix("_sets")
    found = renamed({"data": {"_target_": f"{module}.{name}"}}, "a test")["data"]["_target_"]
    assert callable(locate("data", found))


def test_a_method_of_ones_own_keeps_a_setting_with_a_name_that_is_old_here(tmp_path, monkeypatch):
    (tmp_path / "gray_method.py").write_text(
        "from sslvision.methods.mae import MAE\n\n\nclass Own(MAE):\n    def __init__(self, backbone, *, grey: float = 0.1,"
        " **settings):\n        super().__init__(backbone, **settings)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["recipe=mae", "method._target_=gray_method.Own", "grey=0.3", "decoder_width=32"]
    method = compose_settings(words).method
    assert method["grey"] == 0.3
    assert method["decoder_embed_dim"] == 32
    foreign = {"method": {"_target_": "nowhere.Own", "grey": 0.3}}
    assert renamed(foreign, "a file of anybody's")["method"] == foreign["method"]  # and nothing was imported
