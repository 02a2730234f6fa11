"""NaN and infinity in weights that are loaded: refused, with the tensors named (row 29)."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sslvision.backbones.fitting import load_fitting
from sslvision.backbones.load import load_backbone
from sslvision.errors import UsageError
from sslvision.workflows.finetuning import finetune
from sslvision.workflows.probing import probe

pytestmark = pytest.mark.faults

TENSOR = "blocks.0.mlp.fc1.weight"


@pytest.fixture(params=["nan", "inf", "-inf"])
def poisoned(tiny_run, tmp_path, request):
    """The folder of a run one number of whose export is none."""
    folder = shutil.copytree(tiny_run, tmp_path / "poisoned")
    file = folder / "export" / "model.safetensors"
    state = load_file(file)
    state[TENSOR][3, 2] = float(request.param)
    save_file(state, file)
    return folder


def refused():
    return pytest.raises(UsageError, match=rf"not all numbers \(NaN or infinity\): 1 of [\d,]+ in .*{TENSOR}")


def test_probe_refuses_them(poisoned, settings_of, tmp_path):
    with refused():
        probe(settings_of("probe", f"run={poisoned}", "data=digits", "device=cpu"), tmp_path / "probed")
    assert not (tmp_path / "probed").exists(), "before any work"


def test_fine_tuning_refuses_them(poisoned, settings_of, tmp_path):
    with refused():
        finetune(
            settings_of("finetune", f"run={poisoned}", "data=digits", "trainer.accelerator=cpu"), tmp_path / "tuned"
        )
    assert not (tmp_path / "tuned").exists()


def test_predicting_refuses_them_as_it_loads_the_same_way(poisoned):
    with refused():
        load_backbone(poisoned)


def test_they_are_found_at_another_image_size_too(poisoned):
    with refused():
        load_backbone(poisoned, image_size=64)


def test_init_from_refuses_an_export_with_them(poisoned, run_tiny, tmp_path):
    with refused():
        run_tiny(tmp_path / "run", f"init_from={poisoned / 'export' / 'model.safetensors'}")
    assert not (tmp_path / "run").exists()


def test_init_from_refuses_a_checkpoint_with_them(tiny_run, run_tiny, tmp_path):
    state = load_file(tiny_run / "export" / "model.safetensors")
    state[TENSOR][0] = float("nan")
    torch.save(state, tmp_path / "weights.pth")
    count = state[TENSOR][0].numel()
    with pytest.raises(UsageError, match=rf"weights.pth are not all numbers .*: {count} of [\d,]+ in {TENSOR}"):
        run_tiny(tmp_path / "run", f"init_from={tmp_path / 'weights.pth'}")


def test_a_released_checkpoint_with_them_is_refused(tmp_path):
    backbone = load_backbone("vit_tiny_patch16_224", image_size=32, pretrained=False, depth=1).backbone
    state = backbone.model.state_dict()
    state["norm.bias"][0] = float("inf")
    torch.save({"model": state}, tmp_path / "released.pth")
    with pytest.raises(UsageError, match=r"released.pth are not all numbers .* in norm.bias"):
        load_backbone(tmp_path / "released.pth", num_heads=3)


def test_many_of_them_are_told_in_part_and_counted():
    module = torch.nn.ModuleDict({f"layer{n}": torch.nn.Linear(2, 2, bias=False) for n in range(8)})
    state = {name: torch.full_like(value, torch.nan) for name, value in module.state_dict().items()}
    with pytest.raises(UsageError, match=r"4 of 4 in layer0.weight, .* in layer4.weight, and in 3 more tensors"):
        load_fitting(module, state, "w.pth")


def test_whole_numbers_and_half_precision_are_looked_at_as_they_are():
    module = torch.nn.BatchNorm1d(2).bfloat16()  # counts its batches in int64
    state = {name: value.clone() for name, value in module.state_dict().items()}
    load_fitting(module, state, "w.pth")
    state["running_var"][1] = torch.inf
    with pytest.raises(UsageError, match="1 of 2 in running_var"):
        load_fitting(module, state, "w.pth")


def test_a_sound_export_is_loaded_as_ever(tiny_run):
    config = json.loads((tiny_run / "export" / "config.json").read_text())
    assert load_backbone(tiny_run).backbone.embed_dim == config["model_args"]["embed_dim"]
