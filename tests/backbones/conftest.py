"""Weights that others publish, as the tests of loading have them."""

import pytest
import timm
import torch
from exports import GOLDEN
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def released():
    tensors = load_file(GOLDEN / "mae_vit.safetensors")
    return {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}


@pytest.fixture
def published(monkeypatch):
    """Let timm "download" weights of this test's making; returns those of a name."""
    made = {}

    def make(name):
        torch.manual_seed(5)
        made[name] = timm.create_model(name, num_classes=1000).state_dict()
        return made[name]

    def download(hub_id, **_):
        return dict(made[hub_id.removeprefix("timm/").partition(".")[0]])

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", download)
    return make
