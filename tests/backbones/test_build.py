import pytest
import timm
import torch

from sslvision.backbones.build import build_backbone
from sslvision.backbones.dense import Dense
from sslvision.backbones.swin import Swin
from sslvision.backbones.vit import ViT
from sslvision.errors import UsageError
from sslvision.methods.mae import MAE

SMALL = {
    "vit_tiny_patch16_224": (ViT, {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    "deit_tiny_patch16_224": (ViT, {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}),
    "swin_tiny_patch4_window7_224": (Swin, {"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}),
    "resnet10t": (Dense, {}),
    "deit_tiny_distilled_patch16_224": (Dense, {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_name_becomes_the_backbone_that_knows_it_best(name):
    kind, options = SMALL[name]
    backbone = build_backbone(name, image_size=32, **options).eval()
    assert type(backbone) is kind
    assert backbone(torch.rand(2, 3, 32, 32)).shape == (2, backbone.embed_dim)
    assert backbone.supports_masking == (kind is not Dense)


@pytest.mark.parametrize("name", SMALL)
def test_its_arguments_build_the_same_model_in_plain_timm(name):
    backbone = build_backbone(name, image_size=32, channels=1, **SMALL[name][1]).eval()
    plain = timm.create_model(name, num_classes=0, **backbone.arguments).eval()
    plain.load_state_dict(backbone.model.state_dict())
    images = torch.rand(2, 1, 32, 32)
    assert torch.allclose(plain(images), backbone(images), atol=1e-5)


def test_mae_on_a_backbone_that_cannot_skip_is_refused_with_those_that_can():
    with pytest.raises(UsageError, match=r"ResNet cannot: choose a plain ViT.*or a Swin.*recipe=dino"):
        MAE(build_backbone("resnet10t", image_size=32), decoder_embed_dim=16, decoder_num_heads=2)
