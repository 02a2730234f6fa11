"""Near-duplicates: pairs of unit vectors above a similarity, how alike their pixels are, and the groups that they form."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslvision.embeddings.nearest import COLUMNS, ROWS, Progress, blocks

MOST_PAIRS = 20_000_000  # 400 MB
PAIRS = 4096  # compared at a time
ROUNDING = 1e-6  # by which the similarity of equal vectors differs from 1


def similar_pairs(
    vectors: Tensor, threshold: float, *, device: torch.device, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return all pairs of vectors (N, D) whose cosine similarity is at least `threshold`; of too many the most similar ones.

    Returns:
        The pairs (P, 2), i < j, their similarities (P,), and the threshold; a higher one, if there are more than 20 million
        pairs, so that those above it fit into memory.
    """
    pairs, similarities = np.empty((0, 2), dtype=np.int64), np.empty(0, dtype=np.float32)
    waiting = [(pairs, similarities)]
    for start, rows in blocks(vectors, device, rows=ROWS):
        for offset, columns in blocks(vectors[start:], device, rows=COLUMNS):
            products = rows @ columns.T  # (n, m), of the rows from `start` and from `start + offset` on
            where = (products >= threshold - ROUNDING).nonzero()  # (p, 2)
            where = where[where[:, 0] < where[:, 1] + offset]
            found = products[where[:, 0], where[:, 1]].cpu().numpy()
            waiting.append(((where + torch.tensor([start, start + offset], device=where.device)).cpu().numpy(), found))
            if sum(len(one) for _, one in waiting) > MOST_PAIRS:
                pairs, similarities = (np.concatenate(column) for column in zip(*waiting, strict=True))
                threshold = float(np.partition(similarities, -MOST_PAIRS // 2)[-MOST_PAIRS // 2])
                waiting = [(pairs[similarities >= threshold], similarities[similarities >= threshold])]
        if progress is not None:
            progress(start + len(rows), len(vectors))
    pairs, similarities = (np.concatenate(column) for column in zip(*waiting, strict=True))
    return pairs, similarities, threshold


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


def pixel_correlations(thumbnails: Tensor, pairs: np.ndarray) -> np.ndarray:
    """Return how alike the pixels of pairs of images are, as they are or with one mirrored: the larger correlation (P,).

    Args:
        thumbnails: (M, S, S) uint8, the images in gray at one small size, whatever their shapes.
        pairs: (P, 2), of indices of thumbnails.
    """
    found = [np.empty(0, dtype=np.float32)]
    for start in range(0, len(pairs), PAIRS):
        of = torch.from_numpy(pairs[start : start + PAIRS])
        first, second = (_centered(thumbnails[side]) for side in of.T)  # (p, S * S)
        mirrored = _centered(thumbnails[of[:, 1]].flip(-1))
        found.append(torch.maximum((first * second).sum(dim=1), (first * mirrored).sum(dim=1)).numpy())
    return np.concatenate(found)


def _centered(images: Tensor) -> Tensor:
    """Return images (p, S, S) less their mean, as unit vectors (p, S * S). Images of a single gray are all alike."""
    values = images.flatten(1).float()
    rest = values - values.mean(dim=1, keepdim=True)
    return F.normalize(torch.where(rest.abs().amax(dim=1, keepdim=True) < 1, torch.ones(()), rest), dim=1)
