import torch

from sslvision.nn.maps import enlarged, heat, principal_components


def test_the_first_component_is_the_direction_of_most_variance():
    torch.manual_seed(0)
    amounts = torch.randn(500, 3) * torch.tensor([10.0, 3.0, 1.0])
    axes, _ = torch.linalg.qr(torch.randn(8, 8))
    found = principal_components(amounts @ axes[:3] + 5, 3)
    assert found.shape == (500, 3)
    for component in range(3):
        pair = torch.stack([found[:, component], amounts[:, component]])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.97  # not 1: the outermost percents are clipped


def test_components_fill_the_range_of_colours():
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


def test_a_map_is_enlarged_in_blocks():
    found = enlarged(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.zeros(1, 3, 4, 4))
    assert found[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


def test_heat_goes_from_black_over_red_and_yellow_to_white():
    found = heat(torch.tensor([[[0.0, 1 / 3, 2 / 3, 1.0]]]))[0, :, 0].T
    assert torch.allclose(found, torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]), atol=1e-6)
