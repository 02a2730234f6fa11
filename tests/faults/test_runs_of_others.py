"""A run's folder or an export that somebody sent: nothing that its files name is run (row 10)."""

import json
import shutil

import pytest
import torch
import yaml

from sslvision.backbones.load import load_backbone
from sslvision.errors import UsageError
from sslvision.workflows.finetuning import finetune
from sslvision.workflows.labeled_data import pretraining_base_lr, untrained_backbone

pytestmark = pytest.mark.faults

TRAPS = (
    "os.system",
    "subprocess.check_output",
    "sslvision.data.sources.folder.os.system",  # by way of a module of ours
    "sslvision.data.sources.folder:os.system",  # as pkgutil also reads it
    "sslvision.runs.run_files.claim",  # ours, but no source: with overwrite it empties a folder
    "booby.trap",
)


@pytest.fixture
def sent(tiny_run, tmp_path, monkeypatch):
    """Tamper with the config.yaml of a run: sent(section={...}) -> its folder. What runs leaves `sprung`."""
    (tmp_path / "booby.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\ndef trap(*a, **k): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "sent"

    def tamper(**sections):
        shutil.copytree(tiny_run, folder, dirs_exist_ok=True)
        told = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump({**told, **sections}))
        return folder

    yield tamper
    assert not (tmp_path / "sprung").exists()


def trap(tmp_path, target):
    return {"_target_": target, "command": f"touch {tmp_path}/sprung", "args": f"touch {tmp_path}/sprung"}


@pytest.mark.parametrize("target", TRAPS)
@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_the_images_that_a_run_names_are_opened_by_sslvision_alone(sent, tmp_path, settings_of, command, target):
    folder = sent(data=trap(tmp_path, target))
    for run in (folder, folder / "export"):
        with pytest.raises(UsageError, match=r"config.yaml names data._target_.* name it yourself: data._target_="):
            settings_of(command, f"run={run}")


def test_naming_the_images_oneself_is_the_way_round(sent, tmp_path, settings_of):
    folder = sent(data=trap(tmp_path, "booby.trap"))
    assert settings_of("probe", f"run={folder}", "data=digits").data["_target_"].endswith("open_digits")
    (tmp_path / "mine.py").write_text("def my_images(*, size: int = 1): ...\n")
    typed = settings_of("probe", f"run={folder}", "data._target_=mine.my_images", "data.size=3").data
    assert typed == {"_target_": "mine.my_images", "size": 3}


@pytest.mark.parametrize("target", TRAPS)
def test_a_method_that_a_run_names_is_not_built_and_timms_random_weights_stand_in(sent, tmp_path, target):
    folder = sent(method=trap(tmp_path, target), data=trap(tmp_path, target))
    assert untrained_backbone(str(folder), seed=0) is None


@pytest.mark.thorough
def test_a_run_of_a_foreign_method_is_fine_tuned_without_building_it(sent, tmp_path, settings_of):
    folder = sent(method=trap(tmp_path, "booby.trap"))
    small = (
        "data=digits",
        "epochs=0",
        "min_updates=1",
        "evaluations=1",
        "labels_per_class=5",
        "trainer.accelerator=cpu",
    )
    settings = settings_of("finetune", f"run={folder}", *small, "dry_run=true", "trainer.enable_progress_bar=false")
    assert finetune(settings, tmp_path / "tuned")["from_scratch"]


def test_images_that_a_run_names_do_not_matter_to_its_untrained_backbone(sent, tmp_path):
    images = trap(tmp_path, "booby.trap") | {"channels": 1}
    assert untrained_backbone(str(sent(data=images)), seed=0).channels == 1


def test_resuming_in_a_folder_does_not_read_what_its_config_names(sent, tmp_path, train_tiny):
    folder = sent(data=trap(tmp_path, "booby.trap"), method=trap(tmp_path, "booby.trap"))
    assert train_tiny(folder, "resume=auto")["findings"] == []


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch {0}/sprung']",
        "data: !!python/object/apply:os.system ['touch {0}/sprung']",
        "data: !!python/name:os.system",
        "data: [1, 2]",
        "- a list",
        "data: {{_target_: [os.system]}}",
        "data: {{unclosed",
        "\x00",
    ],
)
def test_a_config_that_is_no_config_is_refused_in_words(tmp_path, settings_of, text):
    (tmp_path / "config.yaml").write_text(text.format(tmp_path))
    with pytest.raises(UsageError, match=r"config\.yaml"):
        settings_of("probe", f"run={tmp_path}")
    with pytest.raises(UsageError, match=r"config\.yaml"):
        pretraining_base_lr(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("value", ["a", [1], {"a": 1}])
def test_a_config_with_a_nonsensical_rate_is_refused_in_words(sent, value):
    with pytest.raises(UsageError, match=r"config.yaml was not written by sslvision, or was edited"):
        pretraining_base_lr(str(sent(base_lr=value)))


@pytest.mark.parametrize(
    "key", ["checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"]
)
def test_an_export_cannot_have_timm_load_further_files(sent, key):
    folder = sent()
    config = json.loads((folder / "export" / "config.json").read_text())
    config["model_args"][key] = "https://example.org/evil.bin"
    (folder / "export" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=f"load other files .{key}."):
        load_backbone(folder)
    told = yaml.safe_load((folder / "config.yaml").read_text())
    with pytest.raises(UsageError, match=f"load other files .{key}."):
        untrained_backbone(str(sent(backbone=told["backbone"] | {key: "https://example.org/evil.bin"})), seed=0)


@pytest.mark.parametrize("name", ["hf-hub:someone/evil", "local-dir:/tmp", "os.system", "../../x", 3, None, ["a"]])
def test_an_export_is_of_a_model_that_timm_knows_by_name(sent, name):
    folder = sent()
    config = json.loads((folder / "export" / "config.json").read_text())
    (folder / "export" / "config.json").write_text(json.dumps(config | {"architecture": name}))
    with pytest.raises(UsageError):
        load_backbone(folder)


class Trap:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["export/pytorch_model.bin", "weights.pth"])
def test_weights_that_hold_code_are_refused_unrun(sent, tmp_path, name):
    folder = sent()
    (folder / "export" / "model.safetensors").unlink()
    torch.save({"model": Trap(f"touch {tmp_path}/sprung")}, folder / name)
    with pytest.raises(UsageError, match=r"is refused: it asks to run (posix|nt)\.system"):
        load_backbone(folder if "export" in name else folder / name)
