"""k-center greedy: a subset of vectors that leaves none far from it (Gonzalez 1985; for labeling, Sener and Savarese 2018).

    start with the vectors that have labels; without any, with the one that is most similar to all
    repeat: add the vector that is farthest from all chosen ones

The farthest vector is at most twice as far as with the best subset of that size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sslvision.embeddings.nearest import Progress, blocks


def k_center(
    vectors: Tensor,
    n: int,
    *,
    device: torch.device,
    among: Tensor | None = None,
    labeled: Sequence[int] = (),
    progress: Progress | None = None,
) -> tuple[list[int], list[float]]:
    """Choose n vectors.

    Args:
        vectors: (N, D) unit vectors.
        n: How many are chosen; there must be as many to choose from.
        device: Where products are computed.
        among: (N,) bool, True for those that may be chosen; None for all.
        labeled: Indices of vectors that count as chosen before.
        progress: Called with the number of chosen ones and n.

    Returns:
        Their indices, in the order in which they were chosen, and the cosine distance of each to the nearest one chosen before
        it (2, the largest possible, for the first without labels).
    """
    closest = torch.full((len(vectors),), -1.0, device=device)  # similarity to the nearest chosen vector
    taken = torch.zeros(len(vectors), dtype=torch.bool) if among is None else ~among.cpu()
    taken[list(labeled)] = True
    taken = taken.to(device)
    for index in labeled:
        _cover(closest, vectors, index, device)
    chosen: list[int] = []
    distances: list[float] = []
    while len(chosen) < n:
        if chosen or len(labeled):
            index = int(torch.where(taken, torch.inf, closest).argmin())
        else:
            index = _most_typical(vectors, taken, device)
        chosen.append(index)
        distances.append(1 - float(closest[index]))
        taken[index] = True
        _cover(closest, vectors, index, device)
        if progress is not None:
            progress(len(chosen), n)
    return chosen, distances


def _cover(closest: Tensor, vectors: Tensor, index: int, device: torch.device) -> None:
    """Update the similarities to the nearest chosen vector when one more is chosen."""
    center = vectors[index].to(device).float()
    center = center / center.norm().clamp(min=1e-30)
    for start, part in blocks(vectors, device):
        of_part = closest[start : start + len(part)]
        torch.maximum(of_part, part @ center, out=of_part)


def _most_typical(vectors: Tensor, taken: Tensor, device: torch.device) -> int:
    """Return the index of the vector with the highest mean similarity to all, among those that may be chosen."""
    total = sum(part.sum(dim=0, dtype=torch.float64) for _, part in blocks(vectors, device))
    mean = torch.as_tensor(total).float()
    similarities = torch.cat([part @ mean for _, part in blocks(vectors, device)])
    return int(torch.where(taken, -torch.inf, similarities).argmax())
