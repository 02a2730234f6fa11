import math
from functools import cache

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sslvision.backbones.dense import Dense, options_for
from sslvision.errors import UsageError
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO

SIZE = 64
HALF = True  # reads images of half the side, too
# What it is: its name in timm, options that make it small, whether it reads images of another size.
FAMILIES = {
    "ResNet": ("test_resnet", {}, HALF),
    "ConvNeXt": ("test_convnext", {}, HALF),
    "EfficientNet": ("test_efficientnet", {}, HALF),
    "MobileNetV3, a convolution in its head": ("mobilenetv3_small_050", {}, HALF),
    "VGG, hidden layers in its head": ("vgg11", {"mlp_ratio": 0.004}, HALF),
    "RegNet": ("regnetx_002", {}, HALF),
    "DenseNet": ("densenet121", {"block_config": (1, 1, 1, 1), "growth_rate": 8}, HALF),
    "NFNet": ("test_nfnet", {}, HALF),
    "PVT v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 40, 64)}, HALF),
    "Swin v2, channels last": ("swinv2_tiny_window8_256", {"embed_dim": 12, "depths": (1, 1, 1, 1)}, HALF),
    "ViT with rotary positions and registers": ("vit_tiny_patch16_dinov3_qkvb", {"embed_dim": 48, "depth": 2}, HALF),
    "DeiT with two class tokens": ("deit_tiny_distilled_patch16_224", {"embed_dim": 48, "depth": 2}, HALF),
    "XCiT": ("xcit_nano_12_p16_224", {"depth": 2, "embed_dim": 32}, HALF),
    "EfficientViM, several maps": ("efficientvim_m1", {"embed_dim": (16, 32, 32), "depths": (1, 1, 1)}, HALF),
    "BEiT": ("beit_base_patch16_224", {"embed_dim": 48, "depth": 2, "num_heads": 3}, not HALF),
    "ViT with relative positions": ("test_vit_relpos", {}, not HALF),
    "CoAtNet": ("test_coatnet", {}, not HALF),
    "MaxViT": ("test_maxvit", {}, not HALF),
    "EfficientFormer": ("efficientformerv2_s0", {}, not HALF),
    "LeViT": ("levit_128s", {"embed_dim": (32, 48, 64), "depth": (1, 1, 1), "key_dim": 8, "num_heads": 2}, not HALF),
    "PiT, only class tokens": ("pit_ti_224", {"base_dims": (16, 16, 16), "depth": (1, 1, 1)}, not HALF),
}
APART = {"EfficientViM, several maps", "PiT, only class tokens"}  # their heads do not read the last map
each_family = pytest.mark.parametrize("kind", FAMILIES)
# Those that differ in more than their blocks: in norms, heads, tokens, sizes and layouts.
DIFFERENT = {
    "ResNet",
    "ConvNeXt",
    "VGG, hidden layers in its head",
    "Swin v2, channels last",
    "DeiT with two class tokens",
}
DIFFERENT |= {"BEiT", "LeViT", "MaxViT", "EfficientViM, several maps", "PiT, only class tokens"}
different_families_first = pytest.mark.parametrize(
    "kind", [kind if kind in DIFFERENT else pytest.param(kind, marks=pytest.mark.e2e) for kind in FAMILIES]
)


asked = cache(options_for)


def timm_model(kind, size=SIZE, **more):
    name, options, _ = FAMILIES[kind]
    return timm.create_model(name, num_classes=0, **asked(name, (size, size)), **options, **more)


def build(kind, size=SIZE, **more):
    torch.manual_seed(0)
    backbone = Dense(timm_model(kind, size, **more), image_size=(size, size))
    for parameter in backbone.parameters():  # nothing may be without effect by initialization
        if parameter.abs().max() < 1e-3:
            nn.init.normal_(parameter, std=0.3)
    return backbone.eval()


@each_family
@torch.no_grad()
def test_features_are_those_of_stock_timm_with_the_same_weights(kind):
    backbone, images = build(kind).double(), torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    stock = timm_model(kind).double().eval()
    stock.load_state_dict(backbone.model.state_dict())
    features = backbone(images)
    assert features.shape == (2, backbone.embed_dim)
    assert torch.allclose(features, stock(images), atol=1e-12)
    if kind not in APART:
        assert torch.allclose(backbone.pool(backbone.encode(images)), features, atol=1e-12)


@each_family
@torch.no_grad()
def test_tokens_are_a_map_row_by_row_whose_quarters_change_with_those_of_the_images(kind):
    side = 256 if kind.startswith(("LeViT", "EfficientViM", "MobileNetV3")) else 128
    half, images = side // 2, torch.rand(4, 3, side, side)
    backbone = build(kind, side)
    for name, parameter in backbone.named_parameters():
        if name.endswith("attention_biases"):  # at first these networks look everywhere alike
            parameter[:, 0] = 10
    backbone.train()(images)  # real running statistics
    tokens = backbone.eval().encode(images)
    rows, columns = backbone.grid
    assert tokens.shape[:2] == (4, backbone.num_prefix + rows * columns)
    assert rows * backbone.stride == columns * backbone.stride == side
    for quarter, where in ((1, (..., slice(half), slice(half, side))), (2, (..., slice(half, side), slice(half)))):
        other = images.clone()
        other[where] = torch.rand(4, 3, half, half)
        change = (backbone.encode(other) - tokens)[:, backbone.num_prefix :].norm(dim=2).mean(0).view(rows, columns)
        quarters = nn.functional.adaptive_avg_pool2d(change[None], 2).flatten()
        assert quarters.argmax() == quarter  # top right; bottom left


def dino(backbone, **settings):
    small = {"prototypes": 32, "hidden": 16, "bottleneck": 8, "local_crops": 0, "freeze_prototypes_epochs": 0}
    return DINO(backbone, **small, momentum=0.5, **settings)


@pytest.mark.thorough
@different_families_first
def test_dino_trains_it_with_local_crops_and_its_teacher_follows(kind):
    half = FAMILIES[kind][2]
    local = SIZE // 2 if half else SIZE
    backbone = build(kind)
    assert backbone.supports_image_size((local, local))
    assert backbone.supports_image_size((SIZE // 2, SIZE // 2)) == half
    method = dino(backbone).train()
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.1)
    images = torch.rand(2, 3, SIZE, SIZE)
    start = method.pretrained()(images)
    for step in range(2):
        clock = Clock(step, 10, 5)
        views = [torch.rand(3, 3, side, side) for side in (SIZE, SIZE, local, local)]
        loss = method.losses(views, clock)["loss"]
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        trained = {name: p.grad for name, p in method.student["backbone"].named_parameters() if p.requires_grad}
        assert not [name for name, gradient in trained.items() if gradient is None]
        method.prepare_update(optimizer, clock)
        optimizer.step()
        method.after_update(clock)
    teacher, stock = method.pretrained(), timm_model(kind).eval()
    assert stock.state_dict().keys() == teacher.model.state_dict().keys()
    stock.load_state_dict(teacher.model.state_dict())
    moved = teacher(images)
    assert not torch.allclose(moved, start, rtol=1e-4)
    assert torch.allclose(moved, stock(images), atol=1e-4, rtol=1e-4)  # and nothing old is left in it


@pytest.mark.parametrize("kind", ["ResNet", "BEiT", "PiT, only class tokens"])
def test_hiding_patches_is_refused_in_words(kind):
    with pytest.raises(UsageError, match=f"{FAMILIES[kind][0]} cannot skip hidden patches.*vit_base_patch16_224.*Swin"):
        build(kind).encode(torch.rand(1, 3, SIZE, SIZE), torch.tensor([[0]]))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind", ["MaxViT", "Swin v2, channels last", "DeiT with two class tokens", "DenseNet", "EfficientFormer"]
)
@torch.no_grad()
def test_it_takes_the_sizes_that_the_network_really_reads(kind):
    backbone = build(kind)
    for size in (16, 24, 32, 48, 80):
        try:
            backbone(torch.rand(2, 3, size, size))
            reads = True
        except (AssertionError, RuntimeError):
            reads = False
        assert backbone.supports_image_size((size, size)) == reads, size


def test_asking_leaves_weights_statistics_modes_and_random_numbers_alone():
    model = timm_model("ResNet").train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    options_for("test_resnet", (SIZE, SIZE))
    Dense(model, image_size=(SIZE, SIZE)).supports_image_size((32, 32))
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_only_options_that_the_model_knows_are_given():
    assert options_for("resnet18", (96, 96)) == {}
    assert options_for("beit_base_patch16_224", (96, 96)) == {"img_size": 96}
    assert options_for("deit_tiny_distilled_patch16_224", (96, 96)) == {"img_size": 96, "dynamic_img_size": True}
    assert options_for("swinv2_tiny_window8_256", (96, 96))["strict_img_size"] is False


def test_in_eval_mode_too_features_follow_the_weights():
    backbone, images = build("LeViT", 128), torch.rand(2, 3, 128, 128)
    before = backbone(images)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if name.endswith("attention_biases"):
                parameter.normal_(std=3.0)
    assert not torch.allclose(backbone(images), before, rtol=1e-3)


def test_a_model_of_one_channel_says_so():
    backbone = build("ResNet", in_chans=1)
    assert backbone.channels == 1
    assert backbone(torch.rand(2, 1, SIZE, SIZE)).shape == (2, backbone.embed_dim)


def test_a_map_that_does_not_divide_the_image_has_the_nearest_stride():
    backbone = Dense(timm.create_model("test_resnet", num_classes=0), image_size=(100, 100))
    assert backbone.grid == (4, 4)
    assert backbone.stride == 25
    tokens = backbone.encode(torch.rand(2, 3, 100, 100))
    assert math.isqrt(tokens.shape[1]) == 4


def test_an_image_size_that_the_model_cannot_read_is_refused_with_its_own():
    with torch.device("meta"):
        model = timm.create_model("efficientformer_l1", num_classes=0)
    with pytest.raises(UsageError, match=r"efficientformer_l1 cannot read images of 64x64 .*image_size=224"):
        Dense(model, image_size=(64, 64))


def test_an_encoder_without_a_head_is_refused():
    with torch.device("meta"):
        model = timm.create_model("qwen3_vit_88m_enc", num_classes=0)
    with pytest.raises(UsageError, match="qwen3_vit_88m_enc has no head that makes features"):
        Dense(model, image_size=(64, 64))


def test_a_model_that_does_not_pool_is_refused():
    with pytest.raises(UsageError, match=r"test_resnet makes features of shape.*global_pool"):
        Dense(timm.create_model("test_resnet", num_classes=0, global_pool=""), image_size=(SIZE, SIZE))


@pytest.mark.parametrize("kind", sorted(APART))
def test_features_of_tokens_are_refused_where_the_head_reads_more(kind):
    backbone = build(kind)
    with pytest.raises(UsageError, match="take features from images"):
        backbone.pool(backbone.encode(torch.rand(1, 3, SIZE, SIZE)))


def test_the_teachers_batch_norms_keep_statistics_of_its_own_activations_and_the_students_stay_out():
    torch.manual_seed(0)
    backbone = Dense(timm.create_model("test_resnet", num_classes=0), image_size=(32, 32))
    method = DINO(backbone, prototypes=32, hidden=16, bottleneck=8, local_crops=0, momentum=0.9).train()
    views, clock = [torch.rand(8, 3, 32, 32) + crop for crop in range(3)], Clock(0, 10, 5)
    model = method.pretrained().model
    first = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    before, inputs = first.running_mean.clone(), []
    first.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    method.losses(views, clock)["loss"].backward()
    for name, buffer in method.student.named_buffers():
        if "running" in name:
            buffer.fill_(7.0)
    method.after_update(clock)
    (seen,) = inputs  # of both global crops, and of no local ones
    assert torch.allclose(first.running_mean, 0.9 * before + 0.1 * seen.mean(dim=(0, 2, 3)), atol=1e-6)
    assert not any(module.training for module in method.teacher.modules())


def test_gradients_on_a_cpu_are_in_full_precision_under_autocast():
    torch.manual_seed(0)
    backbone = Dense(timm.create_model("test_resnet", num_classes=0), image_size=(32, 32))
    images, gradients = torch.rand(8, 3, 16, 16), []  # maps of 1 x 1 under kernels of 3 x 3 at the end
    for enabled in (False, True):
        backbone.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            backbone(images).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in backbone.parameters()])
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in zip(*gradients, strict=True))


@different_families_first
def test_images_may_lie_with_channels_last(kind):
    backbone, images = build(kind).double(), torch.rand(2, 3, SIZE, SIZE, dtype=torch.float64)
    parameters = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    (right, expected), (found, gradients) = (
        (features := backbone(laid), torch.autograd.grad(features.square().sum(), parameters, allow_unused=True))
        for laid in (images, images.contiguous(memory_format=torch.channels_last))
    )
    assert torch.allclose(found, right, atol=1e-12)
    for one, other in zip(gradients, expected, strict=True):
        assert (one is None and other is None) or torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "turned"), [("ResNet", True), ("ConvNeXt", True), ("BEiT", False), ("Swin v2, channels last", False)]
)
def test_only_what_a_gpu_convolves_has_channels_last(kind, turned):
    backbone, images = build(kind), torch.rand(2, 3, SIZE, SIZE)
    assert backbone._channels_last(images) is images
    with FakeTensorMode():
        laid = backbone._channels_last(torch.empty(2, 3, SIZE, SIZE, device="cuda"))
    assert laid.is_contiguous(memory_format=torch.channels_last) is turned
