"""Near-duplicates: pairs of unit vectors above a similarity, and the groups that they form."""

import numpy as np
import torch
from torch import Tensor

from sslvision.embeddings.nearest import COLUMNS, ROWS, Progress, blocks
from sslvision.errors import UsageError

MOST_PAIRS = 20_000_000  # 320 MB
ROUNDING = 1e-6  # by which the similarity of equal vectors differs from 1


def similar_pairs(
    vectors: Tensor, threshold: float, *, device: torch.device, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of vectors (N, D) whose cosine similarity is at least `threshold`: (P, 2), i < j, and similarities (P,).

    Raises:
        UsageError: There are more than 20 million: the threshold is too low.
    """
    pairs, similarities, count = [], [], 0
    for start, rows in blocks(vectors, device, rows=ROWS):
        for offset, columns in blocks(vectors[start:], device, rows=COLUMNS):
            products = rows @ columns.T  # (n, m), of the rows from `start` and from `start + offset` on
            where = (products >= threshold - ROUNDING).nonzero()  # (p, 2)
            where = where[where[:, 0] < where[:, 1] + offset]
            if not len(where):
                continue
            similarities.append(products[where[:, 0], where[:, 1]].cpu().numpy())
            pairs.append((where + torch.tensor([start, start + offset], device=where.device)).cpu().numpy())
            if (count := count + len(where)) > MOST_PAIRS:
                raise UsageError(
                    f"threshold={threshold} makes duplicates of more than {MOST_PAIRS:,} pairs of images: give a higher one."
                )
        if progress is not None:
            progress(start + len(rows), len(vectors))
    if not pairs:
        return np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.float32)
    return np.concatenate(pairs), np.concatenate(similarities)


def groups_of(pairs: np.ndarray) -> list[list[int]]:
    """Return the groups of indices that pairs (P, 2) connect, directly or through others; each ascending, largest first."""
    if not len(pairs):
        return []
    members, ends = np.unique(pairs, return_inverse=True)  # ends: the pairs in 0..len(members)-1
    ends = ends.reshape(-1, 2)
    lowest = np.arange(len(members))
    while True:  # every member takes the lowest index that it is connected with; chains are halved each time
        before = lowest.copy()
        smaller = lowest[ends].min(axis=1)
        np.minimum.at(lowest, ends[:, 0], smaller)
        np.minimum.at(lowest, ends[:, 1], smaller)
        lowest = lowest[lowest]
        if np.array_equal(before, lowest):
            break
    order = np.argsort(lowest, kind="stable")
    bounds = np.flatnonzero(np.diff(lowest[order])) + 1
    return sorted((members[group].tolist() for group in np.split(order, bounds)), key=lambda one: (-len(one), one[0]))


def highest_similarities(pairs: np.ndarray, similarities: np.ndarray) -> dict[int, float]:
    """Return for every index in the pairs its similarity to the most similar other one."""
    found: dict[int, float] = {}
    for side in (0, 1):
        order = np.argsort(similarities, kind="stable")
        found |= {
            int(index): max(float(one), found.get(int(index), -1.0))
            for index, one in zip(pairs[order, side], similarities[order], strict=True)
        }
    return found
