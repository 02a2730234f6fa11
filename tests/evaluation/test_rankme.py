import pytest
import torch

from sslvision.evaluation.rankme import rankme


@pytest.mark.parametrize("dimensions", [1, 3, 16])
def test_features_that_fill_some_dimensions_evenly_have_that_rank(dimensions):
    axes, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    features = torch.eye(dimensions).repeat(50, 1) @ axes[:dimensions]
    assert rankme(features) == pytest.approx(dimensions, rel=1e-3)


def test_it_is_the_exponential_of_the_entropy_of_the_singular_values():
    torch.manual_seed(0)
    features = torch.randn(200, 12) * torch.logspace(0, -3, 12)
    share = torch.linalg.svdvals(features.double())
    share = share / share.sum()
    assert rankme(features) == pytest.approx(float((-share * share.log()).sum().exp()), rel=1e-4)


def test_scale_and_rotation_of_the_features_change_nothing():
    torch.manual_seed(0)
    features = torch.randn(100, 8) * torch.linspace(1, 0.1, 8)
    axes, _ = torch.linalg.qr(torch.randn(8, 8))
    assert rankme(300 * features @ axes) == pytest.approx(rankme(features), rel=1e-4)
