"""`init_from=` and `run=` read what others publish: their layouts, with random weights."""

from argparse import Namespace

import pytest
import timm
import torch
from backbones.exports import SWIN, VIT, equal, exported
from safetensors.torch import save_file

from sslvision.backbones.build import build_backbone
from sslvision.backbones.load import load_backbone
from sslvision.errors import UsageError
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.runs.weights import load_weights

SMALL_HEAD = {"prototypes": 16, "hidden": 8, "bottleneck": 4, "local_crops": 1, "local_size": 16}


def vit(size=32, **options):
    return build_backbone("vit_tiny_patch16_224", image_size=size, **VIT, **options)


def mae(size=32, **options):
    return MAE(vit(size), **{"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, **options})


def dino(backbone=None, **options):
    return DINO(backbone or vit(), **{**SMALL_HEAD, **options})


def randomized(module, seed=7):
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
        tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module


def released_mae(method):
    state = {name.removeprefix("backbone.model."): v for name, v in method.state_dict().items()}
    return {name: v for name, v in state.items() if not name.startswith("normalize.")}


def released_dino(method, *, weight_norm=("weight_g", "weight_v")):
    def network(whose):
        state = getattr(method, whose).state_dict()
        renamed = {name.replace("backbone.model.", "backbone."): v for name, v in state.items()}
        for ours, theirs in zip(("weight_g", "weight_v"), weight_norm, strict=True):
            renamed[f"head.last_layer.{theirs}"] = renamed.pop(f"head.last_layer.{ours}")
        return renamed

    student = {f"module.{name}": v for name, v in network("student").items()}
    return {
        "student": student,
        "teacher": network("teacher"),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1.0}]},
        "epoch": 100,
        "args": Namespace(arch="vit_small", lr=0.1),
        "dino_loss": {"center": method.center},
    }


def same(module, other):
    mine, theirs = module.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("beside", [{}, {"optimizer": {"state": {}}, "args": Namespace(lr=1e-3), "epoch": 3}])
def test_a_full_checkpoint_of_mae_gives_its_encoder_and_its_decoder(beside, tmp_path):
    theirs, ours, file = randomized(mae()), mae(), tmp_path / "mae.pth"
    torch.save({"model": released_mae(theirs), **beside}, file)
    words, findings = load_weights(ours, file)
    assert (words, findings) == (f"all weights of {file}", [])
    assert same(ours.backbone, theirs.backbone)
    assert same(ours.decoder_blocks, theirs.decoder_blocks)
    assert equal(load_backbone(file, num_heads=2).backbone, theirs.backbone)


def test_a_decoder_of_another_size_is_left_out_and_told(tmp_path):
    theirs, ours, file = randomized(mae()), mae(decoder_embed_dim=32), tmp_path / "mae.pth"
    torch.save({"model": released_mae(theirs)}, file)
    words, (finding,) = load_weights(ours, file)
    assert words.startswith(f"the backbone's weights of {file} (the 19 tensors of its head or decoder do not fit")
    assert "is (1, 1, 32) here and (1, 1, 16) there" in finding
    assert "20 other tensors ignored" in finding
    assert same(ours.backbone, theirs.backbone)


@pytest.mark.parametrize(
    "weight_norm",
    [("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1")],
)
def test_a_full_checkpoint_of_dino_gives_student_teacher_heads_and_center(weight_norm, tmp_path):
    theirs, ours, file = randomized(dino()), dino(), tmp_path / "dino.pth"
    torch.save(released_dino(theirs, weight_norm=weight_norm), file)
    words, _ = load_weights(ours, file)
    assert words == f"all weights of {file}"
    assert same(ours.student, theirs.student)
    assert same(ours.teacher, theirs.teacher)
    assert torch.equal(ours.center, theirs.center)
    assert not torch.equal(theirs.teacher["backbone"].model.cls_token, theirs.student["backbone"].model.cls_token)
    assert equal(load_backbone(file, num_heads=2).backbone, theirs.teacher["backbone"].requires_grad_())


def test_a_dino_checkpoint_starts_an_mae_from_its_teacher_and_the_rest_is_counted(tmp_path):
    theirs, ours, file = randomized(dino()), mae(), tmp_path / "dino.pth"
    torch.save(released_dino(theirs), file)
    words, findings = load_weights(ours, file)
    assert same(ours.backbone, theirs.teacher["backbone"])
    rest = 2 * len(theirs.teacher.state_dict()) + 1 - len(ours.backbone.state_dict())
    assert f"{rest} other tensors ignored" in words
    assert f"{rest} other tensors ignored" in findings[0]


@pytest.mark.parametrize("registers", [0, 4])
def test_a_dinov2_with_or_without_registers_loads_through_both_doors(registers, tmp_path):
    options = {"init_values": 1e-5, **({"reg_tokens": registers, "no_embed_class": True} if registers else {})}
    theirs, file = randomized(vit(**options)), tmp_path / "dinov2.pth"
    state = {**theirs.model.state_dict(), "mask_token": torch.zeros(1, 24)}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.full((1, 1, 24), 0.5), state["pos_embed"]], dim=1)
        state["cls_token"] = state["cls_token"] - 0.5
    torch.save(state, file)
    ours = dino(vit(**options))
    load_weights(ours, file)
    images = torch.rand(2, 3, 32, 32)
    expected = theirs.eval()(images)
    for network in (ours.student["backbone"], load_backbone(file, num_heads=2).backbone):
        assert torch.allclose(network.eval()(images), expected, atol=1e-4)
    with pytest.raises(UsageError, match=r"set these") as info:
        load_weights(dino(), file)
    assert ("backbone.reg_tokens=4" in str(info.value)) == bool(registers)
    assert "backbone.init_values=1e-05" in str(info.value)


PUBLISHED_RESNETS = {
    "DINO": lambda state: {"student": {f"module.backbone.{n}": -v for n, v in state.items()},
                           "teacher": {f"module.backbone.{n}": v for n, v in state.items()}},
    "SwAV": lambda state: {f"module.{n}": v for n, v in state.items()}
    | {"module.projection_head.0.weight": torch.rand(3, 3), "module.prototypes.weight": torch.rand(3, 3)},
    "MoCo": lambda state: {"state_dict": {f"module.encoder_k.{n}": -v for n, v in state.items()}
                           | {f"module.encoder_q.{n}": v for n, v in state.items()}
                           | {"module.queue": torch.rand(3, 3), "module.encoder_q.fc.weight": torch.rand(3, 3)}},
    "plain": lambda state: {**state, "fc.weight": torch.rand(10, 512), "fc.bias": torch.rand(10)},
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("layout", PUBLISHED_RESNETS)
def test_resnets_of_dino_swav_and_moco_load_through_both_doors(layout, tmp_path):
    theirs = randomized(build_backbone("resnet18", image_size=64))
    content, file = PUBLISHED_RESNETS[layout](theirs.model.state_dict()), tmp_path / "weights.pth.tar"
    torch.save(content, file)
    ours = dino(build_backbone("resnet18", image_size=64))
    words, findings = load_weights(ours, file)
    assert same(ours.student["backbone"], theirs) != (layout == "DINO")  # which has a student of its own
    assert same(ours.teacher["backbone"], theirs)
    assert words.startswith("the backbone's weights")
    assert bool(findings) == (layout != "DINO")
    loaded = load_backbone(file)
    assert same(loaded.backbone, theirs)
    assert loaded.backbone.image_size == (224, 224)


def test_a_network_that_is_neither_vit_nor_resnet_loads_into_a_method_and_elsewhere_says_what_to_do(tmp_path):
    theirs = randomized(build_backbone("test_convnext", image_size=64))
    save_file(theirs.model.state_dict(), tmp_path / "convnext.safetensors")
    ours = dino(build_backbone("test_convnext", image_size=64), local_size=32)
    load_weights(ours, tmp_path / "convnext.safetensors")
    assert same(ours.teacher["backbone"], theirs)
    with pytest.raises(UsageError, match=r"neither patch_embed.* nor layer1.*save_for_hf.*init_from="):
        load_backbone(tmp_path / "convnext.safetensors")


def test_position_embeddings_of_another_size_are_interpolated_as_timm_does_and_told(tmp_path):
    theirs, ours, file = randomized(mae(64)), mae(32), tmp_path / "mae.pth"
    torch.save({"model": released_mae(theirs)}, file)
    words, _ = load_weights(ours, file)
    assert words.startswith("all weights of ")
    assert "position embeddings interpolated from 8x8 to 4x4 patches" in words
    expected = load_backbone(file, num_heads=2, image_size=32)
    assert same(ours.backbone, expected.backbone)
    assert expected.weights.endswith("made for 64x64 pixels")


def test_tables_of_relative_positions_of_another_window_are_interpolated_and_told(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    theirs = randomized(build_backbone(name, image_size=64, **SWIN | {"window_size": 8}))
    ours, file = dino(build_backbone(name, image_size=32, **SWIN), local_crops=0), tmp_path / "swin.pth"
    torch.save({"model": theirs.model.state_dict()}, file)
    words, findings = load_weights(ours, file)
    assert "4 tables of relative positions interpolated" in words
    assert "4 tables of relative positions interpolated" in findings[0]
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    assert ours.student["backbone"].model.state_dict()[table].shape == (49, 1)


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"depth": 3}, "blocks.2.* is not in this model.*backbone.depth=3"),
        ({"patch_size": 4}, "backbone.patch_size=4"),
        ({"channels": 1}, "data.channels=1: set these"),
        ({"embed_dim": 48}, "backbone.embed_dim=48"),
    ],
)
def test_another_vit_is_refused_with_the_settings_of_the_one_in_the_file(there, words, tmp_path):
    channels = {"channels": there.pop("channels")} if "channels" in there else {}
    theirs = build_backbone("vit_tiny_patch16_224", image_size=32, **channels, **{**VIT, **there})
    torch.save(theirs.model.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UsageError, match=f"do not fit this model.*{words}"):
        load_weights(mae(), tmp_path / "vit.pth")


def test_a_timm_name_gives_its_published_weights_at_the_size_of_the_run(monkeypatch):
    torch.manual_seed(3)
    stock = timm.create_model("test_vit", num_classes=1000).state_dict()
    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", lambda *_, **__: dict(stock))
    ours = dino(build_backbone("test_vit", image_size=96), local_size=32)
    words, _ = load_weights(ours, "test_vit")
    assert words == "the backbone's weights of timm's pretrained test_vit.r160_in1k, made for 160x160 pixels"
    assert torch.equal(ours.teacher["backbone"].model.cls_token, stock["cls_token"])


def test_a_timm_name_without_a_network_gives_one_message(monkeypatch):
    def offline(*_, **__):
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(UsageError, match=r"^init_from=test_vit: timm's .* cannot be downloaded .*or no init_from"):
        load_weights(dino(build_backbone("test_vit", image_size=96), local_size=32), "test_vit")


def test_what_is_neither_a_file_nor_a_name_is_refused_with_names_near_it():
    with pytest.raises(UsageError, match=r"^There is no file or folder resnet19.*Near it in timm: .*resnet18"):
        load_weights(mae(), "resnet19")


def test_what_is_elsewhere_is_told_by_both_doors(tmp_path):
    save_file({"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(3)}, tmp_path / "theirs.safetensors")
    for where, words in (
        (
            "https://example.org/mae/base.pth",
            r"=https?:/.* is a URL: download the file, and give its path, (\w+)=base.pth",
        ),
        ("timm/vit_tiny_patch16_224", "timm's name of them is (init_from|run)=vit_tiny_patch16_224"),
        (str(tmp_path / "missing.pth"), "there is no such file in"),
        (str(tmp_path / "theirs.safetensors"), "Give the timm model with the same weights"),
    ):
        with pytest.raises(UsageError, match=words):
            load_weights(mae(), where)
        with pytest.raises(UsageError, match=words):
            load_backbone(where)


def test_an_export_folder_and_weights_under_any_prefix_load(tmp_path):
    theirs = exported(tmp_path / "export", channels=3)
    torch.save({"net": {f"encoder.{name}": v for name, v in theirs.model.state_dict().items()}}, tmp_path / "w.pth")
    for path in (tmp_path / "export", tmp_path / "w.pth"):
        ours = mae()
        load_weights(ours, path)
        assert same(ours.backbone, theirs)


def test_a_file_that_asks_to_run_something_is_refused_by_both_doors_and_told_what_to_do(tmp_path):
    class Harm:
        def __reduce__(self):
            return print, ("harm",)

    torch.save({"model": vit().model.state_dict(), "args": Harm()}, tmp_path / "w.pth")
    for read in (load_backbone, lambda file: load_weights(mae(), file)):
        with pytest.raises(UsageError, match=r"refused: it asks to run print.*weights alone"):
            read(tmp_path / "w.pth")
