"""What a run exports loads as the backbone it was."""

import pytest
import timm
import torch
from exports import KINDS, equal, exported, images_for
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

from sslvision.backbones.load import load_backbone
from sslvision.runs.weights import export_backbone


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_and_its_export_and_the_file_in_it_load_as_the_backbone_that_was_exported(kind, tmp_path):
    backbone = exported(tmp_path / "run" / "export", kind)
    export = tmp_path / "run" / "export"
    for where in (tmp_path / "run", export, str(export / "model.safetensors")):
        loaded = load_backbone(where)
        assert equal(loaded.backbone, backbone)
        assert type(loaded.backbone) is type(backbone)
        assert (loaded.mean, loaded.std, loaded.classes) == ([0.25], [0.3], None)
        assert loaded.weights.startswith("export of ")
        assert loaded.backbone.image_size == backbone.image_size


@pytest.mark.parametrize("classes", [None, ["cat", "dog", "hen"]])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_loaded_exports_to_the_same_files(kind, classes, tmp_path):
    exported(tmp_path / "a", kind, classes=classes)
    loaded = load_backbone(tmp_path / "a")
    export_backbone(loaded.backbone, tmp_path / "b", mean=loaded.mean, std=loaded.std, classes=loaded.classes)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_classifier_loads_with_its_head_and_classes_or_without_them(kind, tmp_path):
    classes = ["cat", "dog", "hen"]
    backbone = exported(tmp_path, kind, classes=classes)
    loaded, bare = load_backbone(tmp_path), load_backbone(tmp_path, head=False)
    assert loaded.classes == ("cat", "dog", "hen")
    features = loaded.backbone(images_for(backbone))
    assert torch.equal(loaded.backbone.model.get_classifier()(features), backbone.model.get_classifier()(features))
    assert bare.classes is None
    assert bare.backbone.model.num_classes == 0
    assert equal(bare.backbone, backbone)
    assert not [name for name in bare.backbone.state_dict() if "head" in name and "norm" not in name]


def test_a_folder_that_timm_saved_loads_with_its_thousand_classes(tmp_path):
    model = timm.create_model("test_vit", num_classes=7, global_pool="avg").eval()
    save_for_hf(
        model, tmp_path, model_config={"label_names": {"0": "a", "1": "b"}}
    )  # pytorch_model.bin, a norm after pooling
    loaded = load_backbone(tmp_path)
    images = images_for(loaded.backbone)
    logits = loaded.backbone.eval().model.get_classifier()(loaded.backbone(images))
    assert torch.allclose(logits, model(images), atol=1e-6)
    assert loaded.classes == ("a", "b", "2", "3", "4", "5", "6")
    assert loaded.mean == list(model.pretrained_cfg["mean"])


def test_a_vit_at_another_size_has_its_positions_resampled_as_timm_does(tmp_path):
    backbone = exported(tmp_path)
    larger = load_backbone(tmp_path, image_size=48).backbone
    position = resample_abs_pos_embed(backbone.model.pos_embed.detach(), [6, 6], [4, 4], num_prefix_tokens=1)
    assert torch.equal(larger.model.pos_embed, position)
    assert equal(larger, backbone, images_for(backbone, 48))  # which resamples as it goes
    assert larger.grid == (6, 6)
    export_backbone(larger, tmp_path / "larger", mean=[0.5], std=[0.5])
    assert equal(load_backbone(tmp_path / "larger").backbone, larger)


def test_a_swin_at_another_size_is_what_timm_makes_of_its_export(tmp_path):
    exported(tmp_path, "Swin")
    larger = load_backbone(tmp_path, image_size=64).backbone
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, img_size=64).eval()
    images = images_for(larger)
    assert larger.image_size == (64, 64)
    assert torch.allclose(larger.eval()(images), stock(images), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*(searchsorted|non-tuple)")  # of how timm's interpolation is written
def test_swin_tables_of_a_window_that_shrank_are_resampled(tmp_path):
    backbone = exported(tmp_path, "Swin")
    smaller = load_backbone(tmp_path, image_size=8).backbone  # maps of 4 and 2: the last window is 2
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0, img_size=8)
    tables = {name: table for name, table in stock.state_dict().items() if "bias_table" in name}
    assert all(torch.equal(smaller.model.state_dict()[name], table) for name, table in tables.items())
    before, after = (one.model.layers[1].blocks[0].attn.relative_position_bias_table for one in (backbone, smaller))
    assert (len(before), len(after)) == (7 * 7, 3 * 3)
    assert torch.allclose(after[4], before[24], atol=1e-6)  # a token and itself
    assert smaller(images_for(smaller)).isfinite().all()


def test_a_classifier_at_another_size_keeps_its_head(tmp_path):
    backbone = exported(tmp_path, classes=["cat", "dog"])
    larger = load_backbone(tmp_path, image_size=48)
    assert larger.classes == ("cat", "dog")
    assert torch.equal(larger.backbone.model.head.weight, backbone.model.head.weight)


def test_options_replace_those_of_the_export_and_the_export_of_the_result_has_them(tmp_path):
    exported(tmp_path, drop_path_rate=0.0)
    loaded = load_backbone(tmp_path, drop_path_rate=0.3, drop_rate=0.1).backbone
    assert loaded.model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert loaded.arguments["drop_path_rate"] == 0.3


def test_a_vit_pools_as_told_after_its_norm(tmp_path):
    backbone = exported(tmp_path)
    mean = load_backbone(tmp_path, pool="avg").backbone.eval()
    images = images_for(mean)
    assert torch.allclose(mean(images), backbone.encode(images)[:, 1:].mean(dim=1), atol=1e-6)
    export_backbone(mean, tmp_path / "mean", mean=[0.5], std=[0.5])
    assert equal(load_backbone(tmp_path / "mean").backbone, mean)


def test_from_scratch_is_the_same_network_with_random_weights_of_a_seed(tmp_path):
    backbone = exported(tmp_path)
    loaded, again = (load_backbone(tmp_path, pretrained=False, seed=3) for _ in range(2))
    other = load_backbone(tmp_path, pretrained=False, seed=4)
    states = [backbone.model.state_dict(), *(one.backbone.model.state_dict() for one in (loaded, again, other))]
    assert {name: value.shape for name, value in states[0].items()} == {
        name: value.shape for name, value in states[1].items()
    }
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(states[1][name], states[2][name])
    assert not torch.equal(states[1][name], states[3][name])
    assert not torch.equal(states[1][name], states[0][name])
    assert loaded.weights == "random"


@pytest.mark.parametrize("options", [{}, {"image_size": 48}, {"pretrained": False}])
def test_loading_leaves_the_global_random_numbers_alone(options, tmp_path):
    exported(tmp_path)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_backbone(tmp_path, **options)
    assert torch.equal(torch.rand(3), expected)
