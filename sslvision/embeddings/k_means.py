"""Spherical k-means (Dhillon and Modha 2001): clusters of unit vectors by cosine similarity, begun by k-means++.

Shapes: N vectors, D dimensions, K clusters.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sslvision.embeddings.nearest import Progress, blocks

ITERATIONS = 100  # at most


class Clusters(NamedTuple):
    """Clusters: of every vector its number (N,) and its similarity to the center (N,); centers (K, D) of length 1."""

    assigned: Tensor
    similarities: Tensor
    centers: Tensor


def k_means(
    vectors: Tensor,
    k: int,
    *,
    seed: int,
    device: torch.device,
    restarts: int = 1,
    progress: Progress | None = None,
) -> Clusters:
    """Group unit vectors (N, D) into k clusters, numbered from the largest to the smallest.

    Args:
        vectors: The vectors, in main memory or on the device.
        k: Number of clusters, at most N.
        seed: Seed of the first centers.
        device: Where products are computed.
        restarts: Number of times to begin anew; the clusters with the highest mean similarity are returned.
        progress: Called after each start with the number of starts done and of all.
    """
    best: Clusters | None = None
    for start in range(restarts):
        found = _once(vectors, k, torch.Generator().manual_seed(seed * 1009 + start), device)
        if best is None or found.similarities.mean() > best.similarities.mean():
            best = found
        if progress is not None:
            progress(start + 1, restarts)
    assert best is not None
    order = best.assigned.bincount(minlength=k).argsort(descending=True, stable=True)
    return Clusters(order.argsort()[best.assigned], best.similarities, best.centers[order])


def _once(vectors: Tensor, k: int, rng: torch.Generator, device: torch.device) -> Clusters:
    centers = _first_centers(vectors, k, rng, device)
    assigned = torch.full((len(vectors),), -1)
    for _ in range(ITERATIONS):
        before = assigned
        assigned, similarities, sums = _assign(vectors, centers, device)
        if torch.equal(before, assigned):
            break
        empty = (assigned.bincount(minlength=k) == 0).nonzero()[:, 0]
        centers = F.normalize(sums, dim=1)
        if len(empty):  # they begin anew at the vectors that fit worst
            centers[empty] = _rows(vectors, similarities.argsort()[: len(empty)], device)
    return Clusters(assigned, similarities, centers.cpu())


def _assign(vectors: Tensor, centers: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the nearest center (N,) of each vector, the similarity to it (N,), and the sum (K, D) of each center's vectors."""
    sums, found = torch.zeros_like(centers), []
    for _, part in blocks(vectors, device):
        best = (part @ centers.T).max(dim=1)
        sums.index_add_(0, best.indices, part)
        found.append((best.indices.cpu(), best.values.cpu()))
    assigned, similarities = (torch.cat(column) for column in zip(*found, strict=True))
    return assigned, similarities, sums


def _first_centers(vectors: Tensor, k: int, rng: torch.Generator, device: torch.device) -> Tensor:
    """Return k vectors (K, D), each drawn with a probability that grows with its squared distance to those before it."""
    first = int(torch.randint(len(vectors), (1,), generator=rng))
    chosen, closest = [first], torch.full((len(vectors),), -1.0)
    while True:
        center = _rows(vectors, torch.tensor(chosen[-1:]), device)[0]
        similarities = torch.cat([(part @ center).cpu() for _, part in blocks(vectors, device)])
        closest = torch.maximum(closest, similarities)
        if len(chosen) == k:
            return _rows(vectors, torch.tensor(chosen), device)
        squared = (1 - closest).clamp(min=0).double()  # half of |a - b|^2
        squared[chosen] = 0
        total = squared.cumsum(dim=0)
        drawn = torch.rand((), generator=rng, dtype=torch.float64) * total[-1]
        index = int(torch.searchsorted(total, drawn, right=True))
        if index >= len(vectors):  # all vectors are equal to a chosen one
            index = int(torch.randint(len(vectors), (1,), generator=rng))
        chosen.append(index)


def _rows(vectors: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    return F.normalize(vectors[indices.to(vectors.device)].to(device).float(), dim=1)


def most_typical(clusters: Clusters, without: Collection[int] = ()) -> list[int]:
    """Return the index of the vector nearest to the center of each cluster, largest cluster first; empty ones have none.

    Args:
        clusters: The clusters.
        without: Numbers of clusters that are left out.
    """
    found = []
    for number in range(len(clusters.centers)):
        if number in without:
            continue
        members = (clusters.assigned == number).nonzero()[:, 0]
        if len(members):
            found.append(int(members[clusters.similarities[members].argmax()]))
    return found
