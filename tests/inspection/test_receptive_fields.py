"""Theoretical receptive fields, compared with arithmetic by hand, and effective ones.

Published numbers are those of Araujo, Norris and Sim 2019 (doi:10.23915/distill.00021). Each is derived here, too.
"""

import pytest
import timm
import torch
import torchvision
from torch import nn

from sslvision.backbones.build import build_backbone
from sslvision.inspection.effective_field import effective_field, measured, open_branches
from sslvision.inspection.receptive_field import receptive_field

IMAGE = (3, 224, 224)


def network(name, **options):
    """Return a timm model without weights, which is all that arithmetic needs."""
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **options)


def backwards(layers):
    """W1 = (W2 - 1) S + F, from one position of the output back to the image."""
    window = 1
    for kernel, stride in reversed(layers):
        window = (window - 1) * stride + kernel
    return window


def vgg(*convolutions):
    return [layer for count in convolutions for layer in [(3, 1)] * count + [(2, 2)]]


def test_alexnet_sees_195_pixels():
    layers = [(11, 4), (3, 2), (5, 1), (3, 2), (3, 1), (3, 1), (3, 1), (3, 2)]
    with torch.device("meta"):
        found = receptive_field(torchvision.models.alexnet().features, IMAGE)
    assert found.size == (195, 195) == (backwards(layers),) * 2  # published
    assert [(window.kernel[0], window.stride[0]) for window in found.windows] == layers


def test_vgg16_sees_196_pixels_before_its_last_pooling_and_212_after_it():
    found = receptive_field(network("vgg16"), IMAGE)
    assert backwards(vgg(2, 2, 3, 3, 3)[:-1]) == 196
    assert backwards(vgg(2, 2, 3, 3, 3)) == 212  # published
    assert found.size == (212, 212)
    assert [window.field for window in found.windows][-2:] == [(196, 196), (212, 212)]


def test_maps_have_the_size_of_the_formula_forwards():
    found = receptive_field(network("vgg11"), (3, 100, 60))
    height, width = 100, 60
    for window in found.windows:
        height, width = (
            (side - window.kernel[axis] + 2 * window.padding[axis]) // window.stride[axis] + 1
            for axis, side in enumerate((height, width))
        )
        assert window.map_size == (height, width)


def test_of_branches_the_widest_counts():
    # ResNet-18 has 3x3 convolutions only, besides the stem; ResNet-50's stride is in the 3x3 convolutions.
    stem = [(7, 2), (3, 2)]
    of18 = [(3, stride) for stage in range(4) for stride in (1 if stage == 0 else 2, 1, 1, 1)]
    of50 = [
        (3, 2 if stage and not block else 1) for stage, blocks in enumerate((3, 4, 6, 3)) for block in range(blocks)
    ]
    for name, layers in (("resnet18", of18), ("resnet50", of50)):
        expected = backwards([*stem, *layers])
        assert expected == {"resnet18": 435, "resnet50": 427}[name]
        assert receptive_field(network(name), IMAGE).size == (expected, expected)


def test_with_the_strides_in_the_1x1_convolutions_of_its_first_version_resnet50_sees_483_pixels():
    model = network("resnet50")
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    blocks = [
        [(1, 2 if stage and not block else 1), (3, 1)]
        for stage, count in enumerate((3, 4, 6, 3))
        for block in range(count)
    ]
    expected = backwards([(7, 2), (3, 2), *(layer for block in blocks for layer in block)])
    assert receptive_field(model, IMAGE).size == (expected, expected) == (483, 483)  # published


def test_kernels_that_are_not_square_and_joined_branches_are_those_of_inception():
    stem = [(3, 2), (3, 1), (3, 1), (3, 2), (1, 1), (3, 1), (3, 2)]
    # The widest branch of each block. A 1x7 and a 7x1 convolution are one of 7 along each axis.
    blocks = [(3, 1), (3, 1)] * 3 + [(3, 1), (3, 2)] + [(7, 1), (7, 1)] * 4 + [(7, 1), (3, 2)] + [(3, 1), (3, 1)] * 2
    expected = backwards(stem + blocks)
    assert (
        receptive_field(network("inception_v3"), (3, 299, 299)).size == (expected, expected) == (1311, 1311)
    )  # published


def test_dilation_and_asymmetric_padding_move_and_widen_the_window():
    model = nn.Sequential(nn.ZeroPad2d((2, 0, 0, 0)), nn.Conv2d(3, 4, 3, dilation=2), nn.Conv2d(4, 4, (1, 5)))
    found = receptive_field(model, (3, 32, 32))
    assert found.size == (5, 9)
    assert found.center((0, 0), (28, 26)) == (2.0, 2.0)  # columns -2 to 6 of the image, as 2 were added on the left


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vit_tiny_patch16_224", "attention over the whole map"),
        ("swin_tiny_patch4_window7_224", "attention over the whole map"),  # of the last stage: a window is the map
        ("regnety_002", "pooling of the whole map"),
        ("mixer_s32_224", "a linear layer over all positions"),
    ],
)
def test_what_reads_all_positions_reads_the_whole_image(name, reason):
    found = receptive_field(network(name), IMAGE)
    assert (found.size, found.whole, found.why) == (None, True, reason)


class Gated(nn.Module):
    """A 3x3 convolution, multiplied by a gate of each channel, as squeeze-and-excitation."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.gate = nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, images):
        x = self.conv(images)
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


@pytest.mark.parametrize("channels", [48, 64, 128])  # of a map of 64 positions
def test_pooling_of_all_positions_is_told_from_a_mean_of_channels_whatever_their_number(channels):
    found = receptive_field(Gated(channels), (3, 8, 8))
    assert (found.size, found.whole, found.why) == (None, True, "pooling of the whole map")
    assert found.center((4, 4), (8, 8)) == (4.0, 4.0)


class Chosen(nn.Module):
    """A function between two 3x3 convolutions."""

    def __init__(self, between, channels):
        super().__init__()
        self.first, self.second, self.between = nn.Conv2d(3, 16, 3), nn.Conv2d(channels, 8, 3), between

    def forward(self, images):
        return self.second(self.between(self.first(images)))


@pytest.mark.parametrize(
    ("between", "channels", "size"),
    [
        (lambda x: x - x.mean(1, keepdim=True), 16, (5, 5)),  # of the channels: nothing moves between positions
        (lambda x: x.permute(0, 2, 3, 1).amax(-1, keepdim=True).permute(0, 3, 1, 2), 1, (5, 5)),
        (lambda x: x - x.mean(3, keepdim=True), 16, None),  # of a row
        (lambda x: x[..., ::2, ::2], 16, None),  # every other position: as many numbers as of 4 channels
        (lambda x: x.reshape(1, 16, 7, 2, 7, 2).permute(0, 1, 3, 5, 2, 4).reshape(1, 64, 7, 7), 64, None),
    ],
)
def test_operations_that_move_pixels_between_positions_have_no_formula(between, channels, size):
    found = receptive_field(Chosen(between, channels), (3, 16, 16))
    assert (found.size, found.whole, bool(found.why)) == (size, False, size is None)


@pytest.mark.parametrize("name", ["pvt_v2_b0", "mvitv2_tiny"])
def test_behind_attention_the_center_is_that_of_the_convolutions(name):
    found = receptive_field(network(name), IMAGE)
    # Each has 4 stages with a total stride of 32, and all of its convolutions with an odd kernel are padded by half of it.
    assert found.whole
    assert found.center((3, 3), (7, 7)) == (96.0, 96.0)
    assert found.center((3, 3), (14, 14)) is None  # another map


def test_attention_in_windows_alone_has_no_formula():
    found = receptive_field(network("swin_tiny_patch4_window7_224", depths=(2,), num_heads=(3,)), IMAGE)
    assert (found.size, found.whole, found.why) == (None, False, "attention within parts of the map")


def test_the_gradient_of_a_3x3_convolution_reaches_exactly_3x3_pixels():
    convolution = nn.Conv2d(3, 8, 3, padding=1)
    found = effective_field(lambda images: convolution(images).flatten(2).transpose(1, 2), (3, 15, 21), (15, 21))
    rows, columns = found.map.nonzero(as_tuple=True)
    assert (found.reach, found.most) == ((3, 3), 3)
    assert sorted(set(rows.tolist())) == [6, 7, 8]
    assert sorted(set(columns.tolist())) == [9, 10, 11]
    assert len(rows) == 9
    assert found.map.sum().item() == pytest.approx(1)


@pytest.mark.thorough
def test_the_gradient_of_a_convolutional_network_fills_its_theoretical_field_and_no_more():
    model = timm.create_model("vgg11", num_classes=0).eval()
    theory = receptive_field(model, (3, 256, 256))

    def encode(images):
        return model.forward_features(images).flatten(2).transpose(1, 2)

    found = effective_field(encode, (3, 256, 256), (8, 8), center=theory.center((4, 4), (8, 8)), images=2)
    assert theory.size == (150, 150)
    assert found.reach[0] <= 150
    assert found.reach[0] >= 140  # max pooling drops pixels at the rim
    assert found.half < found.most < 150


def test_the_gradient_of_a_transformer_is_global():
    backbone = build_backbone("vit_tiny_patch16_224", image_size=64, depth=2).eval()
    found = effective_field(backbone.encode, (3, 64, 64), backbone.grid, prefix=backbone.num_prefix, images=2)
    assert found.reach == (64, 64)
    assert (found.map > 0).all()
    own = found.map[32:48, 32:48].sum()  # row 2, column 2 of 4x4 patches
    assert own > found.map[:16, :16].sum()


def test_the_same_seed_gives_the_same_field_and_another_one_another():
    convolution = nn.Conv2d(1, 4, 3, padding=1)

    def field(seed):
        return effective_field(lambda x: convolution(x).flatten(2).transpose(1, 2), (1, 9, 9), (9, 9), seed=seed).map

    assert torch.equal(field(0), field(0))
    assert not torch.equal(field(0), field(1))


def test_a_network_without_a_gradient_is_named():
    with pytest.raises(ValueError, match="the gradient is zero at every pixel"):
        effective_field(lambda images: (images * 0).flatten(2).transpose(1, 2), (3, 8, 8), (8, 8))


def test_squares_hold_their_share_of_the_gradient():
    shares = torch.zeros(11, 11)
    shares[5, 5], shares[5, 7], shares[0, 0] = 0.6, 0.36, 0.04
    found = measured(shares, (5.0, 5.0))
    assert (found.half, found.most, found.reach) == (1, 5, (6, 8))


def test_closed_branches_are_opened_and_others_are_left_alone():
    model = timm.create_model("resnet18", num_classes=0)
    before = model.conv1.weight.clone()
    opened = open_branches(model)
    assert len(opened) == 8
    assert (model.layer1[0].bn2.weight == 1).all()
    assert torch.equal(model.conv1.weight, before)
    assert not open_branches(model)
