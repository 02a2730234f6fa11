"""A run that was stopped for good: its last whole checkpoint is probed, fine-tuned and exported, and that is said."""

import shutil

import pytest
import torch

from sslvision.backbones.load import load_backbone
from sslvision.errors import UsageError
from sslvision.methods.mae import MAE
from sslvision.runs.weights import export_backbone
from sslvision.workflows.finetuning import finetune
from sslvision.workflows.probing import probe


@pytest.fixture
def stopped(tiny_run, tmp_path):
    """The tiny run as it was before it exported."""
    folder = shutil.copytree(tiny_run, tmp_path / "stopped")
    shutil.rmtree(folder / "export")
    return folder


def same(one, other):
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_the_last_checkpoint_gives_what_the_export_would_have_and_says_so(stopped, tiny_run):
    loaded, whole = load_backbone(stopped), load_backbone(tiny_run)
    assert same(loaded.backbone, whole.backbone)
    assert (loaded.mean, loaded.std) == (pytest.approx(whole.mean), pytest.approx(whole.std))
    assert loaded.backbone.crop_pct == whole.backbone.crop_pct
    assert loaded.weights.startswith(f"update 8 in {stopped / 'checkpoints' / 'last.ckpt'} (the run has not ended")


def test_a_stopped_run_is_probed_and_the_result_names_the_checkpoint(stopped, settings_of, tmp_path, capsys):
    words = (f"run={stopped}", "data=digits", "train_images=200", "k=[20]", "pixels=false", "device=cpu")
    found = probe(settings_of("probe", *words, f"features_dir={tmp_path / 'features'}"), tmp_path / "probe")
    assert "update 8 in" in found["weights"]
    assert "update 8 in" in capsys.readouterr().out


def test_it_exports_to_the_same_weights(stopped, tiny_run, tmp_path):
    loaded = load_backbone(stopped)
    export_backbone(loaded.backbone, tmp_path / "export", mean=loaded.mean, std=loaded.std)
    assert same(load_backbone(tmp_path / "export").backbone, load_backbone(tiny_run).backbone)


def test_a_damaged_last_checkpoint_is_passed_over_for_an_earlier_one(stopped):
    last = stopped / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    assert "update 4 in" in load_backbone(stopped).weights
    for file in last.parent.glob("*.ckpt"):
        file.write_bytes(b"nothing")
    with pytest.raises(UsageError, match=r"has no export/: it has not ended.*no whole checkpoint.*resume=auto") as told:
        load_backbone(stopped)
    assert str(told.value).endswith(
        f"Let it finish first: python -m sslvision.pretrain resume=auto output_dir={stopped}."
    )
    config = stopped / "config.yaml"
    config.write_text(f"run: outputs/a\n{config.read_text()}")
    with pytest.raises(UsageError, match=r"python -m sslvision.finetune resume=auto"):
        load_backbone(stopped)


def test_a_checkpoint_of_an_earlier_version_is_read_by_the_settings_of_its_run(stopped, tiny_run):
    last = stopped / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    torch.save({key: value for key, value in content.items() if key not in ("method", "hyper_parameters")}, last)
    assert same(load_backbone(stopped).backbone, load_backbone(tiny_run).backbone)


@pytest.mark.thorough
def test_a_stopped_fine_tuning_predicts_by_the_weights_that_validated_best(stopped, settings_of, tmp_path):
    run = tmp_path / "tuned"
    words = [f"run={stopped}", "data=digits", "epochs=0", "min_updates=4", "evaluations=4", "scratch=false", "lr=0.01"]
    finetune(settings_of("finetune", *words, "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"), run)
    whole = load_backbone(run)
    shutil.rmtree(run / "export")
    loaded = load_backbone(run)
    assert same(loaded.backbone, whole.backbone)
    assert loaded.classes == whole.classes == tuple("0123456789")


def test_a_checkpoint_that_would_load_other_files_is_not_used(stopped):
    last = stopped / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    content["method"]["backbone"]["arguments"]["checkpoint_path"] = "/etc/passwd"
    torch.save(content, last)
    assert "update 4 in" in load_backbone(stopped).weights
    with pytest.raises(UsageError, match="would make timm load other files"):
        MAE.load_from_checkpoint(last)
