import pytest
import torch
from torch.nn import functional as F

from sslvision.figures.maps import at_offsets, enlarged, heat, principal_components


def test_the_first_component_is_the_direction_of_most_variance():
    torch.manual_seed(0)
    amounts = torch.randn(500, 3) * torch.tensor([10.0, 3.0, 1.0])
    axes, _ = torch.linalg.qr(torch.randn(8, 8))
    found = principal_components(amounts @ axes[:3] + 5, 3)
    assert found.shape == (500, 3)
    for component in range(3):
        pair = torch.stack([found[:, component], amounts[:, component]])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.97  # not 1: the outermost percents are clipped


def test_components_fill_the_range_of_colors():
    torch.manual_seed(0)
    found = principal_components(torch.randn(1000, 6), 3)
    assert found.min() == 0
    assert found.max() == 1
    assert 0.01 <= (found == 0).float().mean() <= 0.03


def test_components_do_not_depend_on_the_arbitrary_sign_of_the_axes():
    torch.manual_seed(0)
    features = torch.randn(300, 5).exp()  # skewed, as features are
    turned = features @ torch.diag(torch.tensor([-1.0, 1, -1, 1, 1]))
    assert torch.allclose(principal_components(features, 3), principal_components(turned, 3), atol=1e-4)


def brightness(stride):
    return lambda images: F.avg_pool2d(images, stride)


def test_a_map_at_offsets_is_that_of_overlapping_patches():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16)
    found = at_offsets(brightness(4), images, 4, offsets=2)
    overlapping = F.avg_pool2d(F.pad(images, [1, 1, 1, 1], mode="replicate"), 4, stride=2)
    assert torch.allclose(found, overlapping, atol=1e-6)


def test_a_bright_spot_stays_where_it_is():
    images = torch.zeros(1, 1, 32, 32)
    images[0, 0, 18:22, 6:10] = 1
    found = enlarged(at_offsets(brightness(8), images, 8), images)[0, 0]
    assert divmod(int(found.argmax()), 32) == (18, 6)


@pytest.mark.parametrize(("stride", "offsets"), [(2, 2), (14, 2), (1, 1), (16, 4), (6, 3)])
def test_offsets_divide_the_patch(stride, offsets):
    images = torch.rand(1, 1, 4 * stride, 4 * stride)
    assert at_offsets(brightness(stride), images, stride).shape == (1, 1, 4 * offsets, 4 * offsets)


def test_heat_goes_from_black_over_red_and_yellow_to_white():
    found = heat(torch.tensor([[[0.0, 1 / 3, 2 / 3, 1.0]]]))[0, :, 0].T
    assert torch.allclose(found, torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]), atol=1e-6)
