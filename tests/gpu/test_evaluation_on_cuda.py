"""k-NN and the linear probe find on CUDA what they find on a CPU, in the precision in which a run on CUDA computes."""

import pytest
import torch

from sslvision.evaluation.knn import knn_rankings
from sslvision.evaluation.linear_probe import linear_probe

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def features():
    """Return features and labels for training and for testing: twenty clouds that overlap."""
    generator = torch.Generator().manual_seed(0)
    centers, labels = torch.randn(20, 192, generator=generator), torch.arange(6000) % 20
    features = centers[labels] + 3 * torch.randn(6000, 192, generator=generator)
    return features[:3000], labels[:3000], features[3000:], labels[3000:]


def test_neighbors_vote_alike(cuda, features):
    train, labels, test, _ = features
    right, found = (
        knn_rankings(train.to(device), labels, test, ks=[20], num_classes=20)[20][:, 0].cpu()
        for device in ("cpu", cuda)
    )
    assert (right != found).float().mean() < 2e-3  # neighbors as good as equally near


def test_a_probe_of_one_strength_has_the_same_optimum(cuda, features):
    train, labels, *test = features
    right, found = (linear_probe(train.to(device), labels, *test, l2_grid=[1e-2]) for device in ("cpu", cuda))
    assert (right.weight - found.weight.cpu()).norm() < 1e-2 * right.weight.norm()
    assert found.top1 == pytest.approx(right.top1, abs=0.1)


def test_a_probe_chooses_the_same_strength(cuda, features):
    train, labels, *test = features
    right, found = (linear_probe(train.to(device), labels, *test) for device in ("cpu", cuda))
    assert found.l2 == right.l2
    assert found.top1 == pytest.approx(right.top1, abs=0.4)  # the weakest penalty, whose valley is flat
