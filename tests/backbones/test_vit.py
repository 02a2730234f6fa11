import pytest
import torch

from sslvision.backbones.build import build_backbone
from sslvision.errors import UsageError

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
KINDS = {
    "plain": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "registers without positions": ("vit_small_patch14_reg4_dinov2", {"patch_size": 8}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False, "pool": "avg"}),
    "layer scale and pre-norm": ("vit_tiny_patch16_224", {"init_values": 0.5, "pre_norm": True}),
    "qk norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
}


def build(kind, image_size=32, patch_size=8, **more):
    torch.manual_seed(0)
    name, options = KINDS[kind]
    backbone = build_backbone(name, image_size=image_size, **{**TINY, "patch_size": patch_size, **options, **more})
    for parameter in backbone.parameters():  # nothing may be zero by initialization
        torch.nn.init.normal_(parameter, std=0.2)
    return backbone.eval().double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("image_size", [32, 48])
def test_the_wrapper_gives_what_timm_gives(kind, image_size):
    backbone = build(kind, image_size)
    images = torch.rand(2, 3, image_size, image_size, dtype=torch.float64)
    assert torch.allclose(backbone(images), backbone.model(images), atol=1e-12)
    assert torch.allclose(backbone.encode(images), backbone.model.forward_features(images), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(16, 16), (48, 32)])
def test_images_of_another_size_are_encoded_as_timm_does_with_resampled_positions(kind, size):
    backbone = build(kind)
    dynamic = build(kind, dynamic_img_size=True).model
    dynamic.load_state_dict(backbone.model.state_dict())
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    assert torch.allclose(backbone.encode(images), dynamic.forward_features(images), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_patches_kept_the_visible_only_path_equals_timm_in_any_order(kind):
    backbone = build(kind)
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    dense, sparse = backbone.encode(images), backbone.encode(images, order)
    prefix = backbone.num_prefix
    assert torch.allclose(sparse[:, :prefix], dense[:, :prefix], atol=1e-10)
    for one in range(2):
        assert torch.allclose(sparse[one, prefix:], dense[one, prefix:][order[one]], atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_changing_hidden_pixels_leaves_the_encoding_unchanged(kind):
    backbone = build(kind)
    images = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    keep = torch.tensor([[1, 6, 11, 12]])
    visible = torch.zeros(4, 4, dtype=torch.bool).flatten()
    visible[keep[0]] = True
    mask = visible.view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    changed = torch.where(mask, images, torch.full_like(images, float("nan")))
    assert torch.equal(backbone.encode(changed, keep), backbone.encode(images, keep))
    moved = images + mask  # and visible ones do matter
    assert not torch.allclose(backbone.encode(moved, keep), backbone.encode(images, keep))


def test_an_image_size_that_patches_do_not_divide_is_refused():
    with pytest.raises(UsageError, match="multiple of"):
        build("plain", image_size=30)


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="vit_small_patch16_224"):
        build_backbone("vit_smal_patch16_224", image_size=32)


def test_an_unknown_timm_option_is_refused():
    with pytest.raises(UsageError, match="embed_dims"):
        build_backbone("vit_tiny_patch16_224", image_size=32, embed_dims=3)


def test_attention_maps_show_where_the_class_token_looks():
    backbone = build("registers")
    maps = backbone.attention_maps(torch.rand(2, 3, 32, 32, dtype=torch.float64))
    assert maps.shape == (2, 2, 4, 4)  # images, heads, rows, columns
    assert (maps >= 0).all()
    assert (maps.sum(dim=(2, 3)) < 1).all()  # the rest goes to the class token and the registers


def test_a_patch_that_stands_out_is_where_the_class_token_looks():
    backbone = build("plain", num_heads=1)
    last = backbone.model.blocks[-1]
    images = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    images[:, :, 8:16, 24:32] = 1.0  # row 1, column 3
    tokens = backbone._attend(backbone.model.blocks[:-1], backbone._embed(images))
    normed = last.norm1(tokens)[0]
    with torch.no_grad():  # queries that ask for this patch's key
        last.attn.qkv.bias[:32] = (
            20
            * torch.linalg.pinv((normed @ last.attn.qkv.weight[32:64].T).double())
            @ torch.nn.functional.one_hot(torch.tensor(1 + 1 * 4 + 3), 17).double()
        )
        last.attn.qkv.weight[:32] = 0
    assert backbone.attention_maps(images)[0, 0].argmax() == 1 * 4 + 3


def test_without_a_class_token_there_are_no_attention_maps():
    assert build("plain").has_attention_maps
    assert not build("no class token").has_attention_maps
