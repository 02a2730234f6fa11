"""Neighbors, near-duplicates, k-center and k-means against what brute force and planted structure say."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from sslvision.embeddings import near_duplicates, nearest
from sslvision.embeddings.k_center import k_center
from sslvision.embeddings.k_means import k_means, most_typical
from sslvision.embeddings.near_duplicates import groups_of, highest_similarities, pixel_correlations, similar_pairs

CPU = torch.device("cpu")


@pytest.fixture
def vectors():
    """300 unit vectors (N, D)."""
    return F.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Products in blocks that do not divide the number of vectors."""
    for module in (nearest, near_duplicates):
        monkeypatch.setattr(module, "ROWS", 64)
        monkeypatch.setattr(module, "COLUMNS", 70)
    monkeypatch.setattr(nearest.blocks, "__kwdefaults__", {"rows": 70})


def planted(centers, each, spread, seed=1):
    """Return unit vectors around random centers, `each` of each, and the centers' numbers."""
    rng = torch.Generator().manual_seed(seed)
    means = F.normalize(torch.randn(centers, 16, generator=rng), dim=1).repeat_interleave(each, dim=0)
    noise = spread * torch.randn(means.shape, generator=rng)
    return F.normalize(means + noise, dim=1), torch.arange(centers).repeat_interleave(each)


def test_neighbors_are_those_of_brute_force(vectors, small_blocks):
    queries = vectors[:5] + 0.1
    similarities, indices = nearest.nearest(queries, vectors, 7, device=CPU)
    best = (queries @ vectors.T).topk(7)
    assert torch.equal(indices, best.indices)
    assert torch.allclose(similarities, best.values)


def test_a_vector_is_not_its_own_neighbor(vectors, small_blocks):
    distances, first = nearest.neighbor_distances(vectors, 3, device=CPU)
    products = vectors @ vectors.T
    products.fill_diagonal_(-2)
    assert torch.equal(first, products.argmax(dim=1))
    assert torch.allclose(distances, 1 - products.topk(3).values.mean(dim=1), atol=1e-6)


def test_there_are_at_most_as_many_neighbors_as_other_vectors(vectors):
    similarities, indices = nearest.nearest(vectors[:2], vectors[:4], 10, device=CPU, leave_out=torch.tensor([0, 1]))
    assert indices.sort(dim=1).values.tolist() == [[1, 2, 3], [0, 2, 3]]
    assert similarities.isfinite().all()


def test_pairs_are_those_of_brute_force(vectors, small_blocks):
    pairs, similarities, threshold = similar_pairs(vectors, 0.8, device=CPU)
    assert threshold == 0.8
    products = (vectors @ vectors.T).triu(diagonal=1)
    assert {(int(i), int(j)) for i, j in pairs} == {(int(i), int(j)) for i, j in (products >= 0.8).nonzero()}
    assert len(pairs) > 10
    np.testing.assert_allclose(similarities, products[pairs[:, 0], pairs[:, 1]].numpy(), atol=1e-6)


def test_equal_vectors_are_duplicates_at_threshold_1_in_float16_too(vectors):
    copies = torch.cat([vectors, vectors[7:9]])
    for one in (copies, copies.half()):
        assert similar_pairs(one, 1.0, device=CPU)[0].tolist() == [[7, 300], [8, 301]]


def test_groups_are_what_pairs_connect():
    pairs = np.array([[9, 12], [1, 5], [5, 7], [3, 7], [20, 21], [21, 22], [22, 23], [23, 30], [12, 9]])
    assert groups_of(pairs) == [[20, 21, 22, 23, 30], [1, 3, 5, 7], [9, 12]]
    chain = np.array([[number, number + 1] for number in range(5000)])
    assert groups_of(chain[np.random.default_rng(0).permutation(5000)]) == [[*range(5001)]]
    assert groups_of(np.empty((0, 2), dtype=np.int64)) == []


def test_the_similarity_of_a_duplicate_is_that_to_its_nearest():
    pairs = np.array([[0, 1], [1, 2], [0, 2]])
    assert highest_similarities(pairs, np.array([0.9, 0.8, 0.95])) == {0: 0.95, 1: 0.9, 2: 0.95}


def test_of_too_many_pairs_the_most_similar_ones_are_kept_and_the_threshold_is_told(vectors, small_blocks, monkeypatch):
    monkeypatch.setattr(near_duplicates, "MOST_PAIRS", 1000)
    pairs, similarities, threshold = similar_pairs(vectors, -0.9, device=CPU)
    products = (vectors @ vectors.T).triu(diagonal=1).flatten()
    assert 0 < threshold == pytest.approx(float(products.topk(len(pairs)).values[-1]), abs=0.01)
    assert 100 < len(pairs) <= 1000
    assert len(pairs) == pytest.approx(int((products >= threshold).sum()), abs=2)  # one lies on the threshold
    assert similarities.min() >= threshold - 1e-5


def test_pixels_of_a_mirrored_and_brighter_copy_correlate_and_those_of_another_image_do_not():
    images = torch.randint(0, 200, (3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    images = torch.cat([images, images[:1].flip(-1) + 20, torch.full((2, 32, 32), 7, dtype=torch.uint8)])
    found = pixel_correlations(images, np.array([[0, 1], [0, 3], [3, 0], [1, 1], [4, 5], [0, 4]]))
    np.testing.assert_allclose(found, [0, 1, 1, 1, 1, 0], atol=0.1)
    assert pixel_correlations(images, np.empty((0, 2), dtype=np.int64)).shape == (0,)


def test_k_center_takes_one_of_every_planted_cluster_before_a_second_of_any():
    vectors, of = planted(9, 20, 0.05)
    chosen, distances = k_center(vectors, 12, device=CPU)
    assert sorted(of[chosen[:9]].tolist()) == [*range(9)]
    assert len({*chosen}) == 12
    assert min(distances[1:9]) > 3 * max(distances[9:])


def test_k_center_is_at_most_twice_as_far_as_the_best_subset(vectors):
    few = vectors[:14]
    chosen, _ = k_center(few, 3, device=CPU)
    away = torch.cdist(few, few)
    radius = {subset: float(away[:, subset].amin(dim=1).max()) for subset in itertools.combinations(range(14), 3)}
    assert radius[tuple(sorted(chosen))] <= 2 * min(radius.values()) + 1e-6


def test_no_vector_is_farther_from_those_chosen_than_the_last_distance(vectors):
    chosen, distances = k_center(vectors, 20, device=CPU)
    left = 1 - (vectors @ vectors[chosen].T).amax(dim=1)
    assert float(left.max()) <= distances[-1] + 1e-6
    assert distances[1:] == sorted(distances[1:], reverse=True)


def test_k_center_goes_on_from_labeled_vectors_and_takes_only_those_allowed():
    vectors, of = planted(6, 10, 0.05)
    among = torch.arange(60) % 2 == 0
    chosen, distances = k_center(vectors, 3, device=CPU, among=among, labeled=[1, 11, 21])
    assert sorted(of[chosen].tolist()) == [3, 4, 5]
    assert all(among[chosen])
    assert max(distances) < 2
    everything, _ = k_center(vectors, 27, device=CPU, among=among, labeled=[0, 2, 4])
    assert sorted([*everything, 0, 2, 4]) == [*range(0, 60, 2)]


def test_equal_vectors_are_chosen_once_each():
    chosen, _ = k_center(torch.ones(5, 4) / 2, 5, device=CPU)
    assert sorted(chosen) == [*range(5)]


def test_k_means_finds_planted_clusters_largest_first():
    vectors, of = planted(5, 30, 0.1)
    kept = torch.cat([torch.arange(start * 30, start * 30 + 30 - 4 * start) for start in range(5)])
    found = k_means(vectors[kept], 5, seed=0, device=CPU, restarts=3)
    assert torch.equal(found.assigned, of[kept])
    typical = most_typical(found)
    assert of[kept][typical].tolist() == [*range(5)]
    for number, row in enumerate(typical):
        members = (found.assigned == number).nonzero()[:, 0]
        mean = F.normalize(vectors[kept][members].sum(dim=0), dim=0)
        assert torch.allclose(found.centers[number], mean, atol=1e-5)
        assert row == members[(vectors[kept][members] @ mean).argmax()]


def test_k_means_repeats_itself_and_fills_every_cluster(vectors):
    one, two = (k_means(vectors, 40, seed=3, device=CPU) for _ in range(2))
    assert torch.equal(one.assigned, two.assigned)
    assert not torch.equal(one.assigned, k_means(vectors, 40, seed=4, device=CPU).assigned)
    assert one.assigned.bincount(minlength=40).min() > 0


def test_k_means_of_fewer_different_vectors_than_clusters_leaves_clusters_empty():
    found = k_means(torch.eye(4).repeat(5, 1), 6, seed=0, device=CPU)
    assert len({*found.assigned.tolist()}) >= 4
    assert torch.allclose(found.similarities, torch.ones(20))
