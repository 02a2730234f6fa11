"""Comparisons of embeddings: exact neighbors, groups of copies, subsets that cover, clusters that were planted."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sslvision.embeddings import nearest as nearest_module
from sslvision.embeddings.k_center import k_center
from sslvision.embeddings.k_means import k_means
from sslvision.embeddings.near_duplicates import groups_of, highest_similarities, similar_pairs
from sslvision.embeddings.nearest import nearest, neighbor_distances

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let blocks have few rows, so that their borders are met."""
    for name in ("ROWS", "COLUMNS"):
        monkeypatch.setattr(nearest_module, name, 7)


@pytest.fixture
def vectors():
    return F.normalize(torch.randn(50, 16, generator=torch.Generator().manual_seed(0)), dim=1)


def planted(centers=5, each=12, spread=0.05):
    """Return unit vectors about orthogonal centers, and the number of the center of each."""
    generator = torch.Generator().manual_seed(1)
    numbers = torch.arange(centers).repeat_interleave(each)
    found = F.one_hot(numbers, 16) + spread * torch.randn(len(numbers), 16, generator=generator)
    return F.normalize(found, dim=1), numbers


def test_the_nearest_vectors_are_those_of_all_products(vectors):
    similarities, indices = nearest(vectors[:9], vectors, 4, device=CPU)
    best = (vectors[:9] @ vectors.T).topk(4, dim=1)
    assert torch.equal(indices, best.indices)
    torch.testing.assert_close(similarities, best.values)


def test_a_vector_is_not_its_own_neighbor(vectors):
    distances, first = neighbor_distances(vectors, 3, device=CPU)
    products = vectors @ vectors.T - 9 * torch.eye(50)
    assert torch.equal(first, products.argmax(dim=1))
    torch.testing.assert_close(distances, 1 - products.topk(3, dim=1).values.mean(dim=1))


def test_pairs_above_a_similarity_are_found_once_and_connected_to_groups(vectors):
    copies = F.normalize(
        vectors[[3, 3, 20]] + 0.01 * torch.randn(3, 16, generator=torch.Generator().manual_seed(2)), dim=1
    )
    pairs, similarities = similar_pairs(torch.cat([vectors, copies]), 0.97, device=CPU)
    assert {tuple(pair) for pair in pairs.tolist()} == {(3, 50), (3, 51), (50, 51), (20, 52)}
    assert len(pairs) == 4
    assert groups_of(pairs) == [[3, 50, 51], [20, 52]]
    assert highest_similarities(pairs, similarities)[20] == pytest.approx(float(vectors[20] @ copies[2]), abs=1e-6)


def test_pairs_that_are_connected_by_others_are_one_group():
    chain = np.array([[0, 9], [5, 9], [5, 7], [1, 2]])
    assert groups_of(chain) == [[0, 5, 7, 9], [1, 2]]
    assert groups_of(np.empty((0, 2), dtype=np.int64)) == []


def test_a_subset_of_the_most_distant_vectors_has_one_of_every_cluster():
    found, numbers = planted()
    chosen, distances = k_center(found, 5, device=CPU)
    assert sorted(numbers[chosen].tolist()) == [0, 1, 2, 3, 4]
    assert min(distances[1:]) > 0.8
    labeled = [0, 12]  # of the first two clusters
    others, _ = k_center(found, 3, device=CPU, labeled=labeled)
    assert sorted(numbers[others].tolist()) == [2, 3, 4]


def test_no_image_is_farther_than_the_last_distance_from_the_subset(vectors):
    chosen, distances = k_center(vectors, 20, device=CPU)
    assert len(set(chosen)) == 20
    left = 1 - (vectors @ vectors[chosen].T).max(dim=1).values
    assert float(left.max()) <= distances[-1] + 1e-6
    assert distances[1:] == sorted(distances[1:], reverse=True)


def test_only_images_that_may_be_are_chosen(vectors):
    among = torch.arange(50) % 2 == 0
    chosen, _ = k_center(vectors, 25, device=CPU, among=among)
    assert sorted(chosen) == list(range(0, 50, 2))


def test_clusters_are_those_that_were_planted():
    found, numbers = planted()
    clusters = k_means(found, 5, seed=0, device=CPU, restarts=3)
    for number in range(5):
        assert len(set(clusters.assigned[numbers == number].tolist())) == 1
    assert len(set(clusters.assigned.tolist())) == 5
