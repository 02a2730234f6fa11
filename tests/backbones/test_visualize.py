"""Pictures of features."""

import torch

from sslvision.backbones.build import build_backbone
from sslvision.backbones.visualize import visualize_features

VIT = {"name": "vit_tiny_patch16_224", "image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}


def test_patch_features_show_content_however_much_of_them_is_position():
    torch.manual_seed(0)
    backbone, images = build_backbone(**VIT).eval(), torch.randn(4, 3, 32, 32)

    def colors():
        return visualize_features(backbone, images, images)["patch_features"][1][1]

    plain = colors()
    encode, position = backbone.encode, 100 * torch.randn(1, 17, 32)
    backbone.encode = lambda images: encode(images) + position
    assert torch.allclose(colors(), plain, atol=1e-2)


def test_the_only_image_keeps_its_own_features():
    backbone, images = build_backbone(**VIT).eval(), torch.randn(1, 3, 32, 32)
    assert visualize_features(backbone, images, images)["patch_features"][1][1].std() > 0.1


def test_the_attention_of_each_head_is_drawn_from_black_to_white_even_where_it_is_nearly_even():
    torch.manual_seed(0)
    backbone, images = build_backbone(**VIT, pool="token").eval(), torch.randn(3, 3, 32, 32)
    heads = visualize_features(backbone, images, images)["attention"][1:]
    assert [name for name, _ in heads] == ["head 1", "head 2"]
    for _, picture in heads:
        assert picture.amin(dim=(1, 2, 3)).tolist() == [0] * 3
        assert picture.amin(dim=1).amax(dim=(1, 2)).tolist() == [1] * 3  # white: red, green and blue
