"""The map of features: t-SNE keeps groups together, is a function of the features alone, and is judged by its neighbors."""

import pytest
import torch

from sslvision.evaluation.embedding_map import principal_plane, shared_neighbors, tsne


@pytest.fixture(scope="module")
def groups():
    """Three groups of 30 directions in 16 dimensions, and their labels."""
    generator = torch.Generator().manual_seed(0)
    centers = 3 * torch.eye(16)[:3]
    labels = torch.arange(3).repeat_interleave(30)
    return centers[labels] + 0.5 * torch.randn(90, 16, generator=generator), labels


def test_groups_of_features_are_groups_on_the_map(groups):
    features, labels = groups
    points = tsne(features)
    near = torch.cdist(points, points).fill_diagonal_(torch.inf).topk(5, largest=False).indices
    assert (labels[near] == labels[:, None]).float().mean() > 0.99
    centers = torch.stack([points[labels == label].mean(dim=0) for label in range(3)])
    spread = max((points[labels == label] - centers[label]).norm(dim=1).mean() for label in range(3))
    assert torch.pdist(centers).min() > 2 * spread


def test_the_map_is_the_same_each_time_and_no_random_number_is_drawn(groups):
    state = torch.get_rng_state()
    assert torch.equal(tsne(groups[0]), tsne(groups[0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_image_has_as_many_neighbors_as_the_perplexity_says(groups):
    from sslvision.evaluation.embedding_map import _joint_probabilities

    joint = _joint_probabilities(torch.nn.functional.normalize(groups[0], dim=1), 10)
    assert joint.sum() == pytest.approx(1, abs=1e-5)
    assert torch.equal(joint, joint.T)
    assert (joint.diagonal() == 0).all()


def test_images_that_are_the_same_and_features_that_are_constant_give_finite_points():
    assert tsne(torch.ones(20, 4)).isfinite().all()
    assert tsne(torch.eye(4).repeat(10, 1)).isfinite().all()
    assert principal_plane(torch.ones(20, 4)).isfinite().all()
    assert principal_plane(torch.randn(12, 1)).shape == (12, 2)


def test_a_map_that_is_the_features_keeps_all_neighbors_and_a_shuffled_one_few():
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(200, generator=generator) * 3
    circle = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert shared_neighbors(circle, circle) == pytest.approx(1, abs=0.02)
    assert shared_neighbors(circle, circle[torch.randperm(200, generator=generator)]) < 0.15
