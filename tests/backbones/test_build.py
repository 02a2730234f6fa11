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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": True}, r"Instead of backbone.pretrained use init_from=PATH"),
        ({"pretrained": False}, r"backbone.pretrained"),
        (
            {"checkpoint_path": "x.pth", "cache_dir": "y"},
            r"backbone.checkpoint_path and backbone.cache_dir use init_from=",
        ),
        ({"pretrained_cfg": {"a": 1}}, r"backbone.pretrained_cfg use init_from="),
        ({"pretrained_cfg_overlay": {"file": "x"}}, r"backbone.pretrained_cfg_overlay use init_from="),
        ({"pretrained_strict": False}, r"backbone.pretrained_strict use init_from="),
        ({"scriptable": True}, r"backbone.scriptable use nothing: it is an option for deployment"),
        ({"exportable": True, "no_jit": True}, r"backbone.exportable and backbone.no_jit use nothing"),
        ({"features_only": True}, r"backbone.features_only use nothing: a backbone returns its last features"),
        ({"num_classes": 10}, r"backbone.num_classes use nothing: methods have heads of their own"),
        ({"in_chans": 1}, r"backbone.in_chans use data.channels"),
        ({"img_size": 64}, r"backbone.img_size use backbone.image_size"),
        (
            {"img_size": 64, "pretrained": True},
            r"img_size use backbone.image_size\. Instead of backbone.pretrained use init",
        ),
    ],
)
def test_arguments_of_timms_factory_are_refused_with_what_to_use(options, message):
    with pytest.raises(UsageError, match=message):
        build_backbone("test_vit", image_size=32, **options)


@pytest.mark.parametrize("image_size", [0, -1, -224, 10**9, 16_385, 32.0, True])
def test_an_image_size_that_no_image_has_is_refused(image_size):
    with pytest.raises(UsageError, match=rf"backbone.image_size={image_size} must be .* pixels from 1 to 16,384"):
        build_backbone("test_vit", image_size=image_size)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {"image_size": 31}, "31x31 pixels cannot be divided into patches of 16x16"),
        ("vit_tiny_patch16_224", {"image_size": 8}, "multiple of backbone.patch_size"),
        ("swin_tiny_patch4_window7_224", {"image_size": 31}, "multiples of 32"),
        ("convnext_atto", {"image_size": 8}, "cannot read images of 8x8 pixels"),
        (
            "test_vit",
            {"image_size": 32, "num_heads": 5},
            "divisible by num_heads .backbone.embed_dim must be a multiple",
        ),
        (
            "test_vit",
            {"image_size": 32, "embed_dim": 100, "num_heads": 3},
            "among backbone.num_heads=3: 99 and 102 can",
        ),
        ("test_vit", {"image_size": 32, "channels": 0}, "data.channels=0 must be"),
        (
            "swin_tiny_patch4_window7_224",
            {"image_size": 64, "num_heads": [3, 0, 6, 6]},
            "backbone.num_heads=.*, or a list",
        ),
    ],
)
def test_a_size_or_an_option_that_a_model_cannot_have_is_answered_in_words(name, options, message):
    with pytest.raises(UsageError, match=message):
        build_backbone(name, **options)


@pytest.mark.parametrize("key", ["depth", "num_heads", "embed_dim", "patch_size"])
@pytest.mark.parametrize("number", [0, -3, 1.5, "two", True])
def test_a_count_that_cannot_be_is_refused_before_timm_builds_anything(key, number):
    with pytest.raises(UsageError, match=rf"backbone.{key}={number} must be a whole number from 1"):
        build_backbone("test_vit", image_size=32, **{key: number})


@pytest.mark.parametrize("key", ["drop_rate", "drop_path_rate", "attn_drop_rate"])
@pytest.mark.parametrize("rate", [-0.5, 1, 2, "half", True])
def test_a_rate_that_cannot_be_is_refused_before_timm_builds_anything(key, rate):
    with pytest.raises(UsageError, match=rf"backbone.{key}={rate} must be a number from 0 to below 1"):
        build_backbone("test_vit", image_size=32, **{key: rate})
