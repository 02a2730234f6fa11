"""Backbones of rectangular images: timm's numbers, positions and tables of another shape, and what is refused."""

import json

import pytest
import timm
import torch
from backbones.exports import SWIN, VIT, equal, images_for
from timm.layers import resample_abs_pos_embed

from sslvision.backbones.build import build_backbone
from sslvision.backbones.load import load_backbone
from sslvision.errors import UsageError
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.nn.position import sincos_position
from sslvision.runs.weights import export_backbone, load_weights

KINDS = {
    "ViT": ("vit_tiny_patch16_224", VIT),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN),
    "ResNet": ("test_resnet", {}),
    "DeiT with two class tokens": ("deit_tiny_distilled_patch16_224", VIT),
}
SMALL_HEAD = {"prototypes": 16, "hidden": 8, "bottleneck": 4, "local_crops": 1}


def build(kind, size, **more):
    torch.manual_seed(0)
    name, options = KINDS[kind]
    backbone = build_backbone(name, image_size=size, channels=1, **{**options, **more}).eval()
    for parameter in backbone.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return backbone


def exported(folder, kind, size, **more):
    backbone = build(kind, size, **more)
    export_backbone(backbone, folder, mean=[0.25], std=[0.3])
    return backbone


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [[32, 64], [64, 16]])
def test_an_export_is_the_same_network_in_timm_and_here(kind, size, tmp_path):
    backbone = exported(tmp_path, kind, size)
    assert backbone.image_size == tuple(size)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]["input_size"] == [1, *size]
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    images = images_for(backbone)
    with torch.no_grad():
        assert torch.allclose(backbone(images), stock(images), atol=1e-5)
        assert torch.allclose(backbone.pool(backbone.encode(images)), stock(images), atol=1e-5)
    loaded = load_backbone(tmp_path)
    assert loaded.backbone.image_size == tuple(size)
    assert equal(loaded.backbone, backbone)


@pytest.mark.parametrize("kind", KINDS)
def test_a_square_as_two_numbers_is_exported_to_the_same_bytes(kind, tmp_path):
    exported(tmp_path / "one", kind, 32)
    exported(tmp_path / "two", kind, [32, 32])
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize("kind", ["ViT", "Swin"])
def test_hidden_patches_of_a_rectangle_are_never_seen_and_visible_ones_keep_their_places(kind):
    backbone = build(kind, [32, 64])
    images, (rows, columns) = images_for(backbone), backbone.grid
    everything = torch.arange(rows * columns).expand(3, -1)
    keep = torch.stack([torch.randperm(rows * columns)[: rows * columns // 4] for _ in range(3)])
    p = backbone.stride
    hidden = torch.ones(3, rows * columns).scatter_(1, keep, 0).view(3, 1, rows, columns)
    changed = images + 5 * hidden.repeat_interleave(p, 2).repeat_interleave(p, 3)
    with torch.no_grad():
        assert torch.allclose(backbone.encode(images, everything), backbone.encode(images), atol=1e-5)
        assert torch.equal(backbone.encode(changed, keep), backbone.encode(images, keep))
        assert not torch.allclose(backbone.encode(changed), backbone.encode(images), atol=1e-3)


@pytest.mark.parametrize("kind", ["ViT", "Swin"])
def test_mae_hides_its_share_of_a_rectangle_and_draws_it_in_its_shape(kind):
    method = MAE(
        build(kind, [32, 64]), decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, mean=[0.5], std=[0.5]
    )
    rows, columns = method.backbone.grid
    assert columns == 2 * rows
    assert torch.equal(
        method.decoder_pos_embed, sincos_position(16, (rows, columns), num_prefix=method.backbone.num_prefix)
    )
    assert method.describe()["visible patches"].startswith(f"{rows * columns // 4} of {rows * columns}, ")
    pictures = method.pictures(torch.randint(256, (2, 1, 32, 64), dtype=torch.uint8))
    for columns_of in pictures.values():
        assert {images.shape[2:] for _, images in columns_of} == {(32, 64)}
    (_, original), (_, masked), _ = pictures["reconstructions"]
    assert ((masked == 0.5) & (original != 0.5)).float().mean() == pytest.approx(0.75, abs=0.02)


# Weights made for another shape.


@pytest.mark.parametrize(
    ("there", "here"), [([32, 64], [64, 32]), ([32, 64], 32), (32, [16, 64]), ([16, 64], [32, 64])]
)
def test_positions_are_resampled_from_the_grid_that_they_were_made_for(there, here, tmp_path):
    backbone = exported(tmp_path, "ViT", there)
    own = build("ViT", here)
    wanted = resample_abs_pos_embed(backbone.model.pos_embed.detach(), [*own.grid], [*backbone.grid])
    loaded = load_backbone(tmp_path, image_size=here)
    assert torch.equal(loaded.backbone.model.pos_embed, wanted)
    assert loaded.backbone.image_size == own.image_size
    method = DINO(own, local_size=16, mean=[0.5], std=[0.5], **SMALL_HEAD)
    words, _ = load_weights(method, tmp_path)
    assert torch.equal(method.student["backbone"].model.pos_embed, wanted)
    rows, columns = backbone.grid
    assert f"interpolated from {rows}x{columns} to {own.grid[0]}x{own.grid[1]} patches" in words


def test_a_decoder_of_as_many_patches_in_other_rows_keeps_its_own_positions(tmp_path):
    small = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "mean": [0.5], "std": [0.5]}
    there, here = (MAE(build("Swin", size), **small) for size in ([32, 64], [64, 32]))
    file = tmp_path / "last.ckpt"
    torch.save({"state_dict": there.state_dict()}, file)
    own = here.decoder_pos_embed.clone()
    load_weights(here, file)
    assert torch.equal(here.decoder_pos_embed, own)
    assert torch.equal(here.decoder_pred.weight, there.decoder_pred.weight)
    assert not torch.equal(own, there.decoder_pos_embed)


@pytest.mark.filterwarnings("ignore:.*(searchsorted|non-tuple)")  # of how timm's interpolation is written
def test_swin_tables_of_windows_that_are_no_squares_are_resampled(tmp_path):
    backbone = exported(tmp_path, "Swin", [8, 32])  # maps of 4x16 and 2x8: the last window is 2x4
    larger = load_backbone(tmp_path, image_size=[16, 32]).backbone
    before, after = (one.model.layers[1].blocks[0].attn for one in (backbone, larger))
    assert (before.window_size, after.window_size) == ((2, 4), (4, 4))
    tables = [
        one.relative_position_bias_table.unflatten(0, [2 * side - 1 for side in one.window_size])
        for one in (before, after)
    ]
    assert torch.allclose(tables[1][3, 3], tables[0][1, 3], atol=1e-6)  # a token and itself
    assert torch.allclose(
        tables[1][3], tables[0][1], atol=5e-3
    )  # timm's interpolation moves the outer columns a little
    method = DINO(build("Swin", [16, 32]), local_size=8, mean=[0.5], std=[0.5], **SMALL_HEAD)
    load_weights(method, tmp_path)
    assert torch.equal(
        method.student["backbone"].model.state_dict()["layers.1.blocks.0.attn.relative_position_bias_table"],
        after.relative_position_bias_table,
    )


def test_published_weights_of_a_rectangle_need_its_size(tmp_path):
    backbone, file = build("ViT", [32, 48], embed_dim=64, num_heads=1, patch_size=8), tmp_path / "vit.pth"
    torch.save(backbone.model.state_dict(), file)
    with pytest.raises(
        UsageError, match=r"24 positions of this ViT are not those of a square.*image_size=\[height,width\]"
    ):
        load_backbone(file)
    assert equal(load_backbone(file, image_size=[32, 48]).backbone, backbone)


# Refusals.


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ([30, 64], r"patches of 8x8: .*, unlike the height 30 \(nearest: 24 or 32\)\."),
        ([32, 4], r"unlike the width 4 \(nearest: 8\)"),
        ([-32, 64], r"image_size=\[-32, 64\] must be a whole number .*\[height,width\]; its height is -32"),
        ([32, 64, 3], r"image_size=\[32, 64, 3\] must be .* or two of them, \[height,width\]\."),
        ([32], "two of them"),
        ("32x64", "two of them"),
    ],
)
def test_a_side_that_is_impossible_is_named(size, message):
    with pytest.raises(UsageError, match=message):
        build("ViT", size)


def test_sides_that_a_swin_cannot_have_are_named():
    with pytest.raises(UsageError, match=r"units of 4x4.*unlike the height 30 \(nearest: 28 or 32\) and the width 6"):
        build("Swin", [30, 6])
    with pytest.raises(UsageError, match=r"windows of 1x5 tokens.*smaller backbone\.window_size"):
        build("Swin", [4, 20], window_size=7)


def test_local_crops_have_a_shape_of_their_own_and_one_number_is_a_square():
    backbone = build("ViT", [32, 64])
    for local, shape in ((16, (16, 16)), ([16, 32], (16, 32))):
        method = DINO(backbone, local_size=local, mean=[0.5], std=[0.5], **SMALL_HEAD)
        assert [crop.shape for crop in method.crops] == [(32, 64), (32, 64), shape]
    with pytest.raises(
        UsageError, match=r"local_size=\[16, 20\] .* give local_size=\[32,64\].*the width 20 \(nearest: 16 or 24"
    ):
        DINO(backbone, local_size=[16, 20], mean=[0.5], std=[0.5], **SMALL_HEAD)
    with pytest.raises(UsageError, match=r"local_size=\[16, -8\] must be"):
        DINO(backbone, local_size=[16, -8], mean=[0.5], std=[0.5], **SMALL_HEAD)
