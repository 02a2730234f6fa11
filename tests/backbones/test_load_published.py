"""Weights that others publish load: the authors' checkpoints and those behind timm's names."""

from argparse import Namespace

import pytest
import timm
import torch
from exports import VIT, build, equal, images_for
from safetensors.torch import save_file

from sslvision.backbones.load import load_backbone
from sslvision.errors import UsageError
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.nn.normalize import IMAGENET_MEAN
from sslvision.runs.weights import export_backbone


@pytest.mark.parametrize("with_decoder", [True, False])
def test_a_released_mae_loads_as_its_encoder(released, with_decoder, tmp_path):
    state = released if with_decoder else {name: v for name, v in released.items() if not name.startswith("decoder")}
    torch.save({"model": state, "args": Namespace(lr=1.5e-4)}, tmp_path / "mae.pth")
    loaded = load_backbone(tmp_path / "mae.pth", num_heads=3)
    assert equal(loaded.backbone, MAE.from_official(released, heads=3, decoder_num_heads=4).backbone)
    assert loaded.mean == list(IMAGENET_MEAN)
    left = len(released) - len(loaded.backbone.model.state_dict()) if with_decoder else 1
    assert loaded.weights == f"released checkpoint {tmp_path / 'mae.pth'} (under model, {left} other tensors left out)"
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
    # Frozen weights are multiplied by another kernel (at::linear asks requires_grad), whose sums round otherwise.
    assert equal(full, method.teacher["backbone"].requires_grad_())
    assert equal(plain, full)


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
