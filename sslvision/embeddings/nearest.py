"""Nearest neighbors of unit vectors, exact: products of blocks, of which only the best are kept.

Shapes: N vectors, D dimensions, Q queries.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 2048  # of one side of a block of products
COLUMNS = 16_384  # of the other
Progress = Callable[[int, int], None]  # rows done and all rows


def blocks(vectors: Tensor, device: torch.device, *, rows: int = COLUMNS) -> Iterator[tuple[int, Tensor]]:
    """Yield the index of the first row and unit vectors (n, D) in float32 on a device, for up to `rows` rows at a time."""
    for start in range(0, len(vectors), rows):
        part = vectors[start : start + rows].to(device).float()
        yield start, F.normalize(part, dim=1)  # again: float16 has rounded them


def nearest(
    queries: Tensor, vectors: Tensor, k: int, *, device: torch.device, leave_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cosine similarities (Q, k) of the k nearest vectors, and their indices (Q, k), nearest first.

    Args:
        queries: (Q, D) unit vectors.
        vectors: (N, D) unit vectors, in main memory or on the device.
        k: Number of neighbors; fewer if there are not as many.
        device: Where products are computed.
        leave_out: (Q,) index of a vector that is not a neighbor of this query, such as itself; -1 for none.
    """
    queries = queries.to(device).float()
    best = torch.empty(len(queries), 0, device=device)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    left_out = None if leave_out is None else leave_out.to(device)
    for start, part in blocks(vectors, device):
        products = queries @ part.T  # (Q, n)
        if left_out is not None:
            rows = ((left_out >= start) & (left_out < start + len(part))).nonzero()[:, 0]
            products[rows, left_out[rows] - start] = -torch.inf
        own, places = products.topk(min(k, len(part)), dim=1)
        best, order = torch.cat([best, own], dim=1).topk(min(k, best.shape[1] + own.shape[1]), dim=1)
        indices = torch.cat([indices, places + start], dim=1).gather(1, order)
    if left_out is not None and best.shape[1] >= len(vectors):
        best, indices = best[:, :-1], indices[:, :-1]  # the last one is the query itself
    return best.cpu(), indices.cpu()


def neighbor_distances(
    vectors: Tensor, k: int, *, device: torch.device, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean cosine distance (N,) of every vector to its k nearest others, and the nearest one's index (N,)."""
    distances = torch.empty(len(vectors))
    first = torch.empty(len(vectors), dtype=torch.int64)
    for start, part in blocks(vectors, device, rows=ROWS):
        rows = torch.arange(start, start + len(part))
        similarities, indices = nearest(part, vectors, k, device=device, leave_out=rows)
        distances[rows], first[rows] = 1 - similarities.mean(dim=1), indices[:, 0]
        if progress is not None:
            progress(start + len(part), len(vectors))
    return distances, first
