import json
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

from sslvision.backbones.build import build_backbone
from sslvision.backbones.load import load_backbone
from sslvision.errors import UsageError
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.nn.normalize import IMAGENET_MEAN
from sslvision.training.weights import export_backbone

GOLDEN = Path(__file__).parents[1] / "golden"
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"patch_size": 2, "window_size": 4, "embed_dim": 12, "depths": [2, 2], "num_heads": [1, 2]}
KINDS = {
    "ViT": ("vit_tiny_patch16_224", 32, VIT),
    "ViT, mean pooled": ("vit_tiny_patch16_224", 32, {**VIT, "pool": "avg"}),
    "Swin": ("swin_tiny_patch4_window7_224", 32, SWIN),
    "ResNet": ("test_resnet", 32, {}),
    "ConvNeXt": ("test_convnext", 64, {}),
}


def build(kind="ViT", *, channels=1, **options):
    torch.manual_seed(0)
    name, size, own = KINDS[kind]
    backbone = build_backbone(name, image_size=size, channels=channels, **own, **options).eval()
    for parameter in backbone.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)  # norms and biases of their own, too
    return backbone


def exported(folder, kind="ViT", *, channels=1, classes=None, **options):
    backbone = build(kind, channels=channels, **options)
    if classes:
        backbone.model.reset_classifier(len(classes))
    mean, std = [0.25] * channels, [0.3] * channels
    export_backbone(backbone, folder, mean=mean, std=std, classes=classes)
    return backbone


def images_for(backbone, size=None):
    return torch.rand(3, backbone.channels, *([size] * 2 if size else backbone.image_size))


def equal(one, other, images=None):
    images = images_for(one) if images is None else images
    with torch.no_grad():
        return torch.equal(one.eval()(images), other.eval()(images))


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


# Checkpoints as the authors of MAE and DINO released them.


@pytest.fixture(scope="module")
def released():
    tensors = load_file(GOLDEN / "mae_vit.safetensors")
    return {name.removeprefix("param."): value for name, value in tensors.items() if name.startswith("param.")}


@pytest.mark.parametrize("with_decoder", [True, False])
def test_a_released_mae_loads_as_its_encoder(released, with_decoder, tmp_path):
    state = released if with_decoder else {name: v for name, v in released.items() if not name.startswith("decoder")}
    torch.save({"model": state, "args": Namespace(lr=1.5e-4)}, tmp_path / "mae.pth")
    loaded = load_backbone(tmp_path / "mae.pth", num_heads=3)
    assert equal(loaded.backbone, MAE.from_official(released, heads=3, decoder_heads=4).backbone)
    assert loaded.mean == list(IMAGENET_MEAN)
    assert loaded.weights == f"released checkpoint {tmp_path / 'mae.pth'}"
    export_backbone(loaded.backbone, tmp_path / "export", mean=loaded.mean, std=loaded.std)
    assert equal(load_backbone(tmp_path / "export").backbone, loaded.backbone)


def test_a_released_mae_is_read_from_safetensors_and_at_another_size(released, tmp_path):
    save_file(released, tmp_path / "mae.safetensors")
    here = load_backbone(tmp_path / "mae.safetensors", num_heads=3).backbone
    size = 2 * here.image_size[0]
    there = load_backbone(tmp_path / "mae.safetensors", num_heads=3, image_size=size).backbone
    assert equal(there, here, images_for(here, size))


def test_a_fine_tuned_mae_loads_without_its_head_and_with_its_norm_after_pooling(released, tmp_path):
    names = {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias"}
    state = {names.get(name, name): v for name, v in released.items() if not name.startswith(("decoder", "mask"))}
    width = state["cls_token"].shape[-1]
    torch.save(
        {"model": {**state, "head.weight": torch.rand(5, width), "head.bias": torch.rand(5)}}, tmp_path / "ft.pth"
    )
    tuned = load_backbone(tmp_path / "ft.pth", num_heads=3).backbone.eval()
    images = images_for(tuned)
    model, tokens = tuned.model, tuned._embed(images)
    for block in model.blocks:
        tokens = block(tokens)
    expected = torch.nn.functional.layer_norm(
        tokens[:, 1:].mean(dim=1), (width,), released["norm.weight"], released["norm.bias"], eps=1e-6
    )
    assert torch.allclose(tuned(images), expected, atol=1e-5)


def test_the_teacher_of_a_released_dino_and_its_plain_backbone_load_the_same(tmp_path):
    torch.manual_seed(0)
    vit = build("ViT", channels=3)
    method = DINO(vit, prototypes=16, hidden=8, bottleneck=4, local_crops=1, local_size=16)
    for parameter in method.teacher.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    theirs = {
        whose: {f"module.{name.replace('backbone.model.', 'backbone.')}": v for name, v in network.state_dict().items()}
        for whose, network in (("student", method.student), ("teacher", method.teacher))
    }
    torch.save({**theirs, "dino_loss": {"center": torch.zeros(1, 16)}}, tmp_path / "full.pth")
    torch.save(method.teacher["backbone"].model.state_dict(), tmp_path / "plain.pth")
    full, plain = (load_backbone(tmp_path / f"{name}.pth", num_heads=2).backbone for name in ("full", "plain"))
    assert equal(full, method.teacher["backbone"])
    assert equal(plain, full)


# timm's own.


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


def test_a_timm_name_loads_timms_pretrained_weights_without_their_head(published):
    published("test_resnet")
    loaded = load_backbone("test_resnet.r160_in1k")
    stock = timm.create_model("test_resnet", pretrained=True, num_classes=0).eval()
    images = images_for(loaded.backbone)
    assert loaded.backbone.image_size == (160, 160)
    assert torch.equal(loaded.backbone.eval()(images), stock(images))
    assert loaded.mean == list(stock.pretrained_cfg["mean"])
    assert loaded.weights == "timm's pretrained test_resnet.r160_in1k"
    assert load_backbone("test_resnet").weights == loaded.weights


def test_a_timm_name_at_another_size_and_with_other_channels_is_adapted_as_timm_does(published, tmp_path):
    published("test_vit")
    loaded = load_backbone("test_vit", image_size=96, channels=1)
    stock = timm.create_model("test_vit", pretrained=True, num_classes=0, img_size=96, in_chans=1).eval()
    images = images_for(loaded.backbone)
    assert images.shape[1:] == (1, 96, 96)
    assert torch.allclose(loaded.backbone.eval()(images), stock(images), atol=1e-6)
    assert loaded.mean is None  # timm's is of three channels
    export_backbone(loaded.backbone, tmp_path, mean=[0.5], std=[0.5])
    assert equal(load_backbone(tmp_path).backbone, loaded.backbone)


def test_a_timm_name_with_another_architecture_than_its_weights_is_refused(published):
    published("test_vit")
    with pytest.raises(UsageError, match=r"blocks\.6.* is missing.*more"):
        load_backbone("test_vit", depth=7)


def test_a_timm_name_has_random_weights_if_asked():
    one, other = (load_backbone("vit_tiny_patch16_224", pretrained=False, image_size=32, **VIT) for _ in range(2))
    assert equal(one.backbone, other.backbone)
    assert (one.mean, one.weights) == (None, "random")


def test_weights_that_cannot_be_downloaded_are_reported_in_words(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand a lot more")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(
        UsageError, match=r"cannot be downloaded \(OSError: We couldn't connect .*pretrained=false"
    ) as info:
        load_backbone("test_vit")
    assert "a lot more" not in str(info.value)


# What is refused.


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("resnet19", "no run folder .* Near it in timm: .*resnet18"),
        ("outputs/mea", "no export folder"),
        ("vit_small_patch8_224.nonsense", r"no weights of this tag, but vit_small_patch8_224\.dino"),
        ("vit_base_patch16_18x2_224", "publishes no weights"),
    ],
)
def test_names_that_mean_nothing_are_refused_with_what_is_possible(where, words):
    with pytest.raises(UsageError, match=words):
        load_backbone(where)


def test_a_run_that_has_not_ended_is_told_from_nothing(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(UsageError, match="has no export/: it has not ended"):
        load_backbone(tmp_path)


def test_images_of_other_channels_than_the_exports_are_refused_with_the_setting(tmp_path):
    exported(tmp_path)
    with pytest.raises(UsageError, match=r"read 1 channel\(s\), and the images have 3: set data.channels=1"):
        load_backbone(tmp_path, channels=3)


def test_weights_of_other_names_and_shapes_are_refused_with_some_of_them(tmp_path):
    exported(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["stray"] = state.pop("blocks.1.attn.qkv.bias")
    state["norm.weight"] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError) as info:
        load_backbone(tmp_path)
    for words in ("qkv.bias is missing", "stray is not in this model", r"norm.weight is (3,) there and (24,) here"):
        assert words in str(info.value)
    with pytest.raises(UsageError, match=r"qkv\.bias is missing"):
        load_backbone(tmp_path, image_size=48)


def spoil(file, how):
    match how:
        case "no json":
            (file / "config.json").write_text("{")
        case "no architecture":
            (file / "config.json").write_text('{"pretrained_cfg": {}}')
        case "unknown architecture":
            config = json.loads((file / "config.json").read_text()) | {"architecture": "resnet19"}
            (file / "config.json").write_text(json.dumps(config))
        case "no weights":
            (file / "model.safetensors").unlink()
        case "half the weights":
            content = (file / "model.safetensors").read_bytes()
            (file / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("no json", "not as timm writes it"),
        ("no architecture", "not as timm writes it .*architecture"),
        ("unknown architecture", "resnet19, which this version of timm"),
        ("no weights", "model.safetensors is missing"),
        ("half the weights", "cannot be read as weights"),
    ],
)
def test_a_damaged_export_is_refused_in_words(how, words, tmp_path):
    exported(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(UsageError, match=words):
        load_backbone(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not weights at all", "cannot be read as weights"),
        ({"model": {"conv1.weight": torch.rand(2, 2)}}, "no checkpoint of a ViT .* cls_token"),
        ({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "checkpoint of a run: give the run's folder"),
        (torch.rand(3), "cannot be read as weights"),
        ({"teacher": 3}, "no checkpoint of a ViT"),
    ],
)
def test_files_that_are_no_released_checkpoint_are_refused_in_words(content, words, tmp_path):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UsageError, match=words):
        load_backbone(file)


def test_the_number_of_heads_is_asked_for_where_weights_leave_it_open(released, tmp_path):
    torch.save({"model": released}, tmp_path / "mae.pth")
    with pytest.raises(UsageError, match="number of its attention heads: say it"):
        load_backbone(tmp_path / "mae.pth")


@pytest.mark.parametrize(
    ("classes", "options", "words"),
    [
        (None, {"pool": "max"}, "pool=max is unknown"),
        (["cat", "dog"], {"pool": "avg"}, "trained on token"),
        (None, {"nonsense": 1}, "timm cannot build .*nonsense"),
        (None, {"image_size": 33}, "33x33"),
        (None, {"patch_size": 4}, r"patch_embed\.proj\.weight is"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_words(classes, options, words, tmp_path):
    exported(tmp_path, classes=classes)
    with pytest.raises(UsageError, match=words):
        load_backbone(tmp_path, **options)


def test_a_size_that_timm_cannot_resample_weights_to_is_refused_in_words(tmp_path):
    torch.manual_seed(0)
    export_backbone(build_backbone("levit_128s", image_size=64), tmp_path, mean=[0.5] * 3, std=[0.5] * 3)
    with pytest.raises(UsageError, match="timm cannot fit the weights to what is asked for"):
        load_backbone(tmp_path, image_size=96)
