import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sslvision.backbones.swin import Swin, partition_of
from sslvision.errors import UsageError
from sslvision.nn import windows

TINY, SMALL = "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224"
# Image size, window. At 224, windows of 7 tokens and units of 8 are misaligned.
GEOMETRIES = [(192, 6), (224, 7), (256, 8)]


def build(name=TINY, image_size=128, window_size=4, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"embed_dim": 24, "drop_path_rate": 0.0, **options}
    model = timm.create_model(name, num_classes=0, img_size=image_size, window_size=window_size, **options)
    # Nothing may be 0 or 1 by initialization, and attention is to be sharp.
    for name, parameter in model.named_parameters():
        scale = 2 * parameter[0].numel() ** -0.5 if "qkv.w" in name or "embed.proj.w" in name else 0.3
        torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=scale)
    return Swin(model).to(dtype).eval()


def some_units(backbone, kept=0.25, images=2):
    units = backbone.grid[0] * backbone.grid[1]
    return torch.rand(images, units).argsort(dim=1)[:, : int(units * kept)]


def cut_map(x, window):  # (B, H, W, C) -> (B * windows, tokens of a window, C)
    return x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0])).transpose(2, 3).flatten(0, 2).flatten(1, 2)


def attention_without(block, x, hidden):
    """The dense block's attention on a map (B, H, W, C), rolled and masked as timm does it, without hidden (B, H, W) keys."""
    attention, shift = block.attn, block.shift_size
    back = (-shift[0], -shift[1])
    tokens = cut_map(torch.roll(x, back, (1, 2)), block.window_size)
    gone = cut_map(torch.roll(hidden[..., None], back, (1, 2)), block.window_size)[:, None, None, :, 0]
    query, key, value = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = attention.scale * query @ key.transpose(2, 3) + attention._get_rel_pos_bias()
    if block.attn_mask is not None:
        logits = logits + block.attn_mask.repeat(len(x), 1, 1)[:, None]
    logits = logits.masked_fill(gone & ~gone.all(dim=3, keepdim=True), -torch.inf)  # what sees nothing is not looked at
    z = attention.proj((logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))
    rows, columns = x.shape[1] // block.window_size[0], x.shape[2] // block.window_size[1]
    z = z.unflatten(1, block.window_size).unflatten(0, (len(x), rows, columns)).transpose(2, 3)
    return torch.roll(z.flatten(3, 4).flatten(1, 2), shift, (1, 2))


def dense_without_hidden(model, images, keep):
    """Swin on all tokens, hidden ones too, whom no visible token attends to: the definition of right."""
    x = model.patch_embed(images)
    side = 2 ** (len(model.layers) - 1)
    grid = (x.shape[1] // side, x.shape[2] // side)
    hidden = torch.ones(len(images), grid[0] * grid[1], dtype=torch.bool).scatter_(1, keep, False).view(-1, *grid)
    for stage in model.layers:
        x = stage.downsample(x)
        side = x.shape[1] // grid[0]
        hidden_here = hidden.repeat_interleave(side, 1).repeat_interleave(side, 2)
        for block in stage.blocks:
            x = x + attention_without(block, block.norm1(x), hidden_here)
            x = x + block.mlp(block.norm2(x))
    return model.norm(x).flatten(1, 2).gather(1, keep[..., None].expand(-1, -1, x.shape[3]))


def on_whole_maps(model, images):
    """Swin by its definition on a map of any size: every token attends to those of its window, of which none is a pad."""
    x = model.patch_embed.norm(model.patch_embed.proj(images).permute(0, 2, 3, 1))  # (B, H, W, C)
    for stage in model.layers:
        x = stage.downsample(x)
        H, W = x.shape[1:3]
        for number, block in enumerate(stage.blocks):
            place, parts = [], []  # of each token, along both axes
            for side, window in zip((H, W), block.attn.window_size, strict=True):
                first = window // 2 if number % 2 and side > window else window
                cuts = torch.arange(min(first, side), side, window)
                place.append(torch.arange(side))
                parts.append(torch.bucketize(torch.arange(side), cuts, right=True))
            y, x_ = (axis.flatten() for axis in torch.meshgrid(*place, indexing="ij"))
            part_y, part_x = (axis.flatten() for axis in torch.meshgrid(*parts, indexing="ij"))
            together = (part_y[:, None] == part_y) & (part_x[:, None] == part_x)
            h, w = block.attn.window_size
            index = (y[:, None] - y + h - 1) * (2 * w - 1) + x_[:, None] - x_ + w - 1
            bias = block.attn.relative_position_bias_table[index * together].permute(2, 0, 1)
            tokens = block.norm1(x).flatten(1, 2)
            query, key, value = (
                block.attn.qkv(tokens).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            )
            logits = block.attn.scale * query @ key.transpose(2, 3) + bias
            weights = logits.masked_fill(~together, -torch.inf).softmax(dim=-1)
            x = x + block.attn.proj((weights @ value).transpose(1, 2).flatten(2)).unflatten(1, (H, W))
            x = x + block.mlp(block.norm2(x))
    return model.norm(x).flatten(1, 2)


def gradients_of(backbone, loss):
    parameters = dict(backbone.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize("name", [TINY, SMALL])
@pytest.mark.parametrize(("image_size", "window_size"), GEOMETRIES)
def test_visible_units_are_encoded_as_by_the_dense_model_without_hidden_keys(name, image_size, window_size):
    backbone = build(name, image_size, window_size)
    images, keep = torch.randn(2, 3, image_size, image_size, dtype=torch.float64), some_units(backbone)
    with torch.no_grad():
        right = dense_without_hidden(backbone.model, images, keep)
        assert torch.allclose(backbone.encode(images, keep), right, rtol=0, atol=1e-11)
        everything = backbone.encode(images).gather(1, keep[..., None].expand_as(right))
        assert (everything - right).abs().mean() > 0.01  # hidden tokens would have mattered
        single = backbone.float().encode(images.float(), keep)
    assert torch.allclose(single.double(), right, rtol=0, atol=1e-5)


def test_a_full_sized_swin_is_encoded_as_well():
    backbone = build(TINY, 224, 7, dtype=torch.float32, embed_dim=96)
    images, keep = torch.randn(1, 3, 224, 224), some_units(backbone, images=1)
    with torch.no_grad():
        right = dense_without_hidden(backbone.model, images, keep)
        assert torch.allclose(backbone.encode(images, keep), right, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 32, "window_size": 4, "patch_size": 2, "depths": (2, 2, 2), "num_heads": (2, 4, 8)},
        {"image_size": (128, 192), "window_size": (4, 6)},
        {"always_partition": True},
        {"window_size": (2, 4, 4, 2)},
        {"qkv_bias": False, "head_dim": 4, "in_chans": 1},
    ],
    ids=lambda options: ", ".join(options),
)
@pytest.mark.parametrize("kept", [0.1, 0.6])
def test_other_swins_are_encoded_as_well(options, kept):
    backbone = build(**options)
    images = torch.randn(2, backbone.channels, *backbone.image_size, dtype=torch.float64)
    keep = some_units(backbone, kept)
    right = dense_without_hidden(backbone.model, images, keep)
    assert torch.allclose(backbone.encode(images, keep), right, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("image_size", "window_size"), GEOMETRIES)
def test_gradients_are_the_dense_models_without_hidden_keys(image_size, window_size):
    backbone = build(TINY, image_size, window_size, embed_dim=12, num_heads=(1, 2, 4, 8))
    images, keep = torch.randn(2, 3, image_size, image_size, dtype=torch.float64), some_units(backbone)
    shape = (*keep.shape, backbone.embed_dim)
    weight = torch.randn(shape, dtype=torch.float64)
    right = gradients_of(backbone, (weight * dense_without_hidden(backbone.model, images, keep)).sum())
    for name, gradient in gradients_of(backbone, (weight * backbone.encode(images, keep)).sum()).items():
        assert torch.allclose(gradient, right[name], rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize(("image_size", "window_size"), [*GEOMETRIES, (128, 4)])
def test_with_all_units_kept_the_visible_only_path_equals_timm_in_any_order(image_size, window_size):
    backbone = build(TINY, image_size, window_size)
    images, order = torch.randn(2, 3, image_size, image_size, dtype=torch.float64), some_units(backbone, 1.0)
    with torch.no_grad():
        dense = backbone.model.forward_features(images).flatten(1, 2)
        dense = dense.gather(1, order[..., None].expand_as(dense))
        assert torch.allclose(backbone.encode(images, order), dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("image_size", "window_size"), GEOMETRIES)
def test_changing_hidden_pixels_leaves_the_encoding_unchanged(image_size, window_size):
    backbone = build(TINY, image_size, window_size)
    images, keep = torch.randn(2, 3, image_size, image_size, dtype=torch.float64), some_units(backbone)
    visible = torch.zeros(2, backbone.grid[0] * backbone.grid[1], dtype=torch.bool).scatter_(1, keep, True)
    visible = visible.view(2, 1, *backbone.grid).repeat_interleave(32, 2).repeat_interleave(32, 3)
    with torch.no_grad():
        encoding = backbone.encode(images, keep)
        assert torch.equal(backbone.encode(torch.where(visible, images, torch.nan), keep), encoding)
        assert not torch.allclose(backbone.encode(images + visible, keep), encoding)


@pytest.mark.parametrize(("image_size", "window_size"), GEOMETRIES)
def test_a_mask_shared_by_the_images_gives_what_each_image_with_its_own_gets(image_size, window_size):
    backbone = build(TINY, image_size, window_size)
    images = torch.randn(3, 3, image_size, image_size, dtype=torch.float64)
    keep = some_units(backbone, images=1).expand(3, -1)
    with torch.no_grad():
        assert torch.allclose(backbone.encode(images, keep), backbone.encode(images, keep.clone()), rtol=0, atol=1e-11)


@pytest.mark.parametrize(("image_size", "window_size"), [(64, 2), (128, 4), (128, 7)])
def test_images_of_the_models_own_size_are_encoded_by_timm_where_it_needs_no_padding(image_size, window_size):
    backbone = build(image_size=image_size, window_size=window_size)
    images = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    timms = backbone.model.forward_features(images).flatten(1, 2)
    assert backbone.windows_divide is (window_size != 7)
    assert torch.equal(backbone.encode(images), timms) is (window_size != 7)
    if backbone.windows_divide:
        assert torch.allclose(backbone(images), backbone.model(images), atol=1e-12)


@pytest.mark.parametrize("size", [(96, 96), (64, 160), (32, 32), (128, 160)])
@pytest.mark.parametrize(("image_size", "window_size"), [(224, 7), (192, 6), (64, 8)])
def test_images_of_any_size_are_encoded_without_padding(image_size, window_size, size):
    backbone = build(TINY, image_size, window_size, embed_dim=12, num_heads=(1, 2, 4, 8))
    before = [id(parameter) for parameter in backbone.parameters()]
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    tokens = backbone.encode(images)
    with torch.no_grad():
        assert torch.allclose(tokens, on_whole_maps(backbone.model, images), rtol=0, atol=1e-11)
    assert [id(parameter) for parameter in backbone.parameters()] == before


def test_an_own_size_that_windows_do_not_divide_is_encoded_without_padding():
    backbone = build(image_size=96, window_size=7)
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    assert torch.allclose(backbone.encode(images), on_whole_maps(backbone.model, images), rtol=0, atol=1e-11)
    assert not torch.allclose(backbone.encode(images), backbone.model.forward_features(images).flatten(1, 2), atol=1e-3)


def test_at_another_size_gradients_are_right_and_reach_every_parameter():
    backbone = build(TINY, 224, 7, embed_dim=12, num_heads=(1, 2, 4, 8))
    images = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    weight = torch.randn(2, 9, backbone.embed_dim, dtype=torch.float64)
    right = gradients_of(backbone, (weight * on_whole_maps(backbone.model, images)).sum())
    for name, gradient in gradients_of(backbone, (weight * backbone.encode(images)).sum()).items():
        assert torch.allclose(gradient, right[name], rtol=1e-9, atol=1e-9), name
        assert gradient.abs().max() > 1e-9, name


def test_dropped_paths_are_timms():
    backbone = build(drop_path_rate=0.5).train()
    images = torch.randn(8, 3, 128, 128, dtype=torch.float64)
    everything = torch.arange(16).expand(8, -1)
    torch.manual_seed(1)
    dense = backbone.model.forward_features(images).flatten(1, 2)
    torch.manual_seed(1)
    assert torch.allclose(backbone.encode(images, everything), dense, rtol=0, atol=1e-11)


def test_fused_attention_gives_the_same():
    images, plain = torch.randn(2, 3, 128, 128, dtype=torch.float64), build()
    set_fused_attn(True, experimental=True)
    try:
        fused = build()
    finally:
        set_fused_attn(True)
    assert fused.model.layers[0].blocks[0].attn.fused_attn
    assert not plain.model.layers[0].blocks[0].attn.fused_attn
    for keep in (some_units(plain), some_units(plain, 1.0)[:1].expand(2, -1)):
        right = gradients_of(plain, plain.encode(images, keep).square().sum())
        for name, gradient in gradients_of(fused, fused.encode(images, keep).square().sum()).items():
            assert torch.allclose(gradient, right[name], rtol=1e-9, atol=1e-9), name


def saved_bytes(backbone, encode):
    """What is kept for the backward pass besides parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in backbone.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = encode()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.thorough
def test_hiding_three_quarters_saves_three_quarters_of_the_work_and_two_thirds_of_the_memory():
    backbone = build(TINY, 256, 8, dtype=torch.float32, embed_dim=96)
    images, keep = torch.randn(2, 3, 256, 256), some_units(backbone)
    flops = []
    for visible in (None, keep):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone.encode(images, visible)
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.27 * flops[0]
    assert saved_bytes(backbone, lambda: backbone.encode(images, keep)) < 0.37 * saved_bytes(
        backbone, lambda: backbone.encode(images)
    )


def test_checkpointing_saves_memory_and_changes_no_gradient():
    backbone = build(drop_path_rate=0.3).train()
    images, keep = torch.randn(2, 3, 128, 128, dtype=torch.float64), some_units(backbone)

    def loss():
        torch.manual_seed(0)
        return backbone.encode(images, keep).square().sum()

    right, much = gradients_of(backbone, loss()), saved_bytes(backbone, loss)
    backbone.model.set_grad_checkpointing()
    for name, gradient in gradients_of(backbone, loss()).items():
        assert torch.allclose(gradient, right[name], rtol=1e-10, atol=1e-12), name
    assert saved_bytes(backbone, loss) < 0.5 * much


def test_initial_weights_are_xavier_uniform():
    backbone = build()
    backbone.init_weights()
    linear = backbone.model.layers[1].blocks[0].mlp.fc1
    bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
    assert 0.95 * bound < linear.weight.abs().max() <= bound
    assert not linear.bias.any()
    patches = backbone.model.patch_embed.proj.weight
    bound = (6 / (patches[0].numel() + len(patches))) ** 0.5
    assert 0.95 * bound < patches.abs().max() <= bound
    assert 0.01 < backbone.model.layers[2].blocks[0].attn.relative_position_bias_table.std() < 0.03
    assert (backbone.model.norm.weight == 1).all()


@pytest.mark.filterwarnings("ignore:.*(non-contiguous|non-tuple)")  # timm, resizing tables
def test_exported_weights_load_in_stock_timm_at_another_size_and_window(tmp_path):
    backbone = build(image_size=128, window_size=4, dtype=torch.float32)
    torch.save(backbone.model.state_dict(), tmp_path / "swin.pth")
    overlay = {"file": str(tmp_path / "swin.pth"), "num_classes": 0}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": 0, "embed_dim": 24}
    same = timm.create_model(TINY, **options, img_size=128, window_size=4).eval()
    images = torch.randn(2, 3, 128, 128)
    assert torch.allclose(same(images), backbone(images), atol=1e-5)
    larger = timm.create_model(TINY, **options, img_size=224, window_size=7).eval()
    for name, value in backbone.model.state_dict().items():
        if "bias_table" in name:
            table = larger.state_dict()[name]
            middle, size = value[len(value) // 2], 2 * larger.get_submodule(name.rsplit(".", 1)[0]).window_size[0] - 1
            assert len(table) == size**2
            assert torch.allclose(table[len(table) // 2], middle, atol=1e-4)  # a token to itself, resampled
        else:
            assert torch.equal(larger.state_dict()[name], value), name


def test_the_wrapper_knows_its_grid():
    backbone = build(image_size=(128, 192))
    assert (backbone.stride, backbone.grid, backbone.num_prefix, backbone.channels) == (32, (4, 6), 0, 3)
    assert backbone.embed_dim == 24 * 8
    small = build(image_size=32, patch_size=2, depths=(2, 2, 2), num_heads=(2, 4, 8))
    assert (small.stride, small.grid, small.embed_dim) == (8, (4, 4), 24 * 4)


def test_windows_are_not_larger_than_the_map_and_only_smaller_ones_are_shifted():
    shifted = build(TINY, 224, 7).model.layers[2].blocks[1]
    assert (partition_of(shifted, (14, 14)).window, partition_of(shifted, (14, 14)).shift) == ((7, 7), (3, 3))
    assert (partition_of(shifted, (6, 8)).window, partition_of(shifted, (6, 8)).shift) == ((6, 7), (0, 3))


@pytest.mark.parametrize("name", ["swinv2_tiny_window8_256", "resnet18"])
def test_what_is_no_swin_of_the_first_version_is_refused(name):
    with pytest.raises(UsageError, match="first version"):
        Swin(timm.create_model(name, num_classes=0))


def test_sizes_that_units_do_not_divide_are_refused_with_those_that_would_do():
    with pytest.raises(UsageError, match="multiples of 32"):
        build(image_size=120)
    with pytest.raises(UsageError, match="multiples of 32"):
        build().encode(torch.zeros(1, 3, 112, 128))


def test_half_precision_loses_no_more_than_timm_loses():
    backbone = build(dtype=torch.float32)
    images, everything = torch.randn(2, 3, 128, 128), torch.arange(16).expand(2, -1)
    with torch.no_grad():
        exact = backbone.encode(images)
        with torch.autocast("cpu", torch.bfloat16):
            timms, ours = backbone.encode(images), backbone.encode(images, everything)
    assert 0 < (ours - exact).square().mean() < 1.2 * (timms - exact).square().mean()


class Indexing(TorchDispatchMode):
    """Count what is computed of indices and masks."""

    def __init__(self):
        super().__init__()
        self.computed = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        indexes = isinstance(result, torch.Tensor) and not result.is_floating_point() and not func.is_view
        self.computed += indexes
        return result


def test_what_depends_on_no_mask_is_computed_once():
    backbone, images = build(TINY, 224, 7), torch.randn(2, 3, 96, 96, dtype=torch.float64)
    backbone.encode(images)
    with Indexing() as indexing:
        backbone.encode(images)
    assert not indexing.computed
    keep = some_units(backbone)
    backbone.encode(torch.randn(2, 3, 224, 224, dtype=torch.float64), keep)
    with Indexing() as indexing:
        backbone.encode(torch.randn(2, 3, 224, 224, dtype=torch.float64), keep)
    assert indexing.computed < 12 * 7  # of 12 blocks, whose indices once took 24 operations each


def test_what_validation_has_computed_serves_training():
    backbone, images = build(TINY, 224, 7), torch.randn(2, 3, 128, 160, dtype=torch.float64)
    windows.all_windows.cache_clear()
    windows.window_geometry.cache_clear()
    with torch.inference_mode():
        right = backbone.encode(images)
    encoded = backbone.encode(images)
    encoded.sum().backward()
    assert torch.equal(encoded, right)
