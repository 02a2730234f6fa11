"""Features in two dimensions, to look at: principal components, and t-SNE (van der Maaten & Hinton 2008, JMLR 9: 2579-2605).

Both are functions of the features alone: t-SNE starts from the principal components and draws no random numbers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

PERPLEXITY = 30
EXAGGERATED, ITERATIONS = 100, 400  # the first of them with attraction 12 times as strong
BISECTIONS = 40
FEWEST = 10  # images, below which neighborhoods mean nothing


def principal_plane(features: Tensor) -> Tensor:
    """Return the first two principal components (N, 2) of normalized features (N, D)."""
    centered = F.normalize(features.double(), dim=1)
    centered = centered - centered.mean(dim=0)
    _, _, axes = torch.linalg.svd(centered, full_matrices=False)
    points = centered @ axes[:2].T
    points = points * torch.where(points.pow(3).sum(dim=0) < 0, -1.0, 1.0)  # the sign is arbitrary
    return F.pad(points, (0, 2 - points.shape[1])).float()  # one column, if there is one feature or one image


def tsne(features: Tensor, *, perplexity: float = PERPLEXITY, iterations: int = ITERATIONS) -> Tensor:
    """Return an exact t-SNE (N, 2) of normalized features (N, D), for a few thousand images: memory and time grow by N^2.

    Args:
        features: Features; cosine similarity decides who is near, as in k-NN.
        perplexity: Number of neighbors that count, about; at most a third of the images.
        iterations: Steps of gradient descent.
    """
    N = len(features)
    attraction = _joint_probabilities(F.normalize(features.float(), dim=1), min(perplexity, (N - 1) / 3))  # (N, N)
    points = principal_plane(features).to(features.device)
    points = 1e-4 * points / points[:, 0].std().clamp(min=1e-12)
    velocity, gains = torch.zeros_like(points), torch.ones_like(points)
    rate = max(N / 12 / 4, 50.0)  # Belkina et al. 2019
    for iteration in range(iterations):
        early = iteration < EXAGGERATED
        weights = 1 / (1 + torch.cdist(points, points).square())  # (N, N), Student's t
        weights.fill_diagonal_(0)
        forces = (12 if early else 1) * attraction - weights / weights.sum()
        forces = forces * weights
        gradient = 4 * (forces.sum(dim=1, keepdim=True) * points - forces @ points)  # (N, 2)
        against = gradient.sign() != velocity.sign()
        gains = torch.where(against, gains + 0.2, gains * 0.8).clamp(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        points = points + velocity
        points = points - points.mean(dim=0)
    return points


def shared_neighbors(features: Tensor, points: Tensor, *, count: int = 10) -> float:
    """Return the share of the nearest neighbors by features that are among as many nearest ones on a map: what it keeps.

    Args:
        features: (N, D), compared by cosine.
        points: (N, 2).
        count: Number of neighbors, at most N - 1.
    """
    count = min(count, len(features) - 1)
    normalized = F.normalize(features.float(), dim=1)
    near = (normalized @ normalized.T).fill_diagonal_(-torch.inf).topk(count, dim=1).indices  # (N, count)
    drawn = (
        torch.cdist(points.float(), points.float()).fill_diagonal_(torch.inf).topk(count, dim=1, largest=False).indices
    )
    among = torch.zeros(len(features), len(features), dtype=torch.bool, device=features.device)
    among.scatter_(1, drawn.to(among.device), value=True)
    return float(among.gather(1, near).float().mean())


def _joint_probabilities(normalized: Tensor, perplexity: float) -> Tensor:
    """Return the symmetric probabilities (N, N) of neighbors, each image's with the same perplexity, found by bisection."""
    distances = (2 - 2 * normalized @ normalized.T).clamp(min=0).fill_diagonal_(torch.inf)  # (N, N), squared
    low = torch.zeros(len(normalized), 1, device=normalized.device)
    high = torch.full_like(low, torch.inf)
    precision = 1 / distances.topk(max(1, round(perplexity)), largest=False).values[:, -1:].clamp(min=1e-6)
    wanted = torch.tensor(perplexity).log().to(normalized.device)
    for _ in range(BISECTIONS):
        logits = -distances * precision
        probabilities = logits.softmax(dim=1)
        entropy = -(probabilities * probabilities.clamp(min=1e-30).log()).sum(dim=1, keepdim=True)
        wide = entropy > wanted
        low, high = torch.where(wide, precision, low), torch.where(wide, high, precision)
        precision = torch.where(high.isinf(), 2 * precision, (low + high) / 2)
    return (probabilities + probabilities.T) / (2 * len(normalized))
