"""Weighted k-nearest-neighbor classification: an evaluation of features without training.

The vote of Wu et al. 2018 (arXiv:1805.01978, section 3.4), as DINO evaluates (Caron et al. 2021, arXiv:2104.14294,
appendix F): each test image takes its k most similar training images, by cosine, and neighbor i votes for its own
class with weight exp(similarity_i / temperature). Temperature 0.07 and k = 20 are the field's; 10 is DINO's other k.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvision.errors import DataError, UsageError
from sslvision.nn.exact_products import exact_products

SIMILARITIES_AT_ONCE = 1 << 26  # limits memory to 256 MiB of fp32


def knn_top(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    num_classes: int | None = None,
    chunk: int | None = None,
) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent of `knn_rankings` with one `k`.

    Features are (N, D) and (M, D), labels (N,) and (M,) int64. With fewer than five classes top-5 is top of them all.
    Raises UsageError and DataError as `knn_rankings` does, and DataError for test labels that do not fit.
    """
    C = check_features(train_features, train_labels, test_features, test_labels, num_classes=num_classes)
    (ranking,) = knn_rankings(
        train_features, train_labels, test_features, ks=[k], temperature=temperature, num_classes=C, chunk=chunk
    ).values()
    correct = ranking == test_labels.to(ranking.device)[:, None]  # (M, min(5, C))
    return 100 * int(correct[:, 0].sum()) / len(test_labels), 100 * int(correct.sum()) / len(test_labels)


@torch.no_grad()
def knn_rankings(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
    num_classes: int,
    chunk: int | None = None,
) -> dict[int, Tensor]:
    """Return for every k of `ks` the best classes of each test image, (M, min(5, C)) int64, best first.

    Features are (N, D) and (M, D), of any scale, labels (N,) int64. Neighbors are searched once, for the largest k, on
    the device of `train_features`, `chunk` test images at a time (None: as many as keep the similarities within
    256 MiB), whatever their number. With fewer than k training images all of them vote. Classes without a vote rank
    last, by index, as in DINO's evaluation. Raises UsageError for a k, `temperature` or `chunk` that is not positive,
    DataError for features that are not finite or labels that do not fit.
    """
    rankings: dict[int, list[Tensor]] = {k: [] for k in ks}
    for votes in knn_votes(
        train_features,
        train_labels,
        test_features,
        ks=ks,
        temperature=temperature,
        num_classes=num_classes,
        chunk=chunk,
    ):
        for k, parts in rankings.items():
            ranking = votes[k].sort(dim=1, descending=True, stable=True).indices[:, :5]
            parts.append(ranking.clone())  # a slice would keep all C of them
    return {k: torch.cat(parts) for k, parts in rankings.items()}


@torch.no_grad()
def knn_votes(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    *,
    ks: Sequence[int],
    temperature: float = 0.07,
    num_classes: int,
    chunk: int | None = None,
) -> Iterator[dict[int, Tensor]]:
    """Yield for `chunk` test images at a time the votes of each k of `ks` for each class, (B, C).

    Arguments and errors are those of `knn_rankings`.
    """
    if not ks or min(ks) < 1 or temperature <= 0 or (chunk is not None and chunk < 1):
        raise UsageError(f"k-NN needs k, temperature and chunk above 0, but got k={ks}, {temperature=}, {chunk=}.")
    C = check_features(train_features, train_labels, test_features, num_classes=num_classes)
    device, N = train_features.device, len(train_features)
    chunk = chunk or max(1, SIMILARITIES_AT_ONCE // max(N, C))
    keys = F.normalize(train_features.float(), dim=1)  # (N, D)
    labels = train_labels.to(device)
    for features in test_features.split(chunk):
        queries = F.normalize(features.to(device).float(), dim=1)  # (B, D)
        # Similarities in bf16 would tie by the dozen.
        with torch.autocast(device.type, enabled=False), exact_products(device):
            similarity, neighbors = (queries @ keys.T).topk(min(max(ks), N), dim=1)  # (B, k), nearest first
        # Relative to the nearest, which leaves the ranking alone and keeps a small temperature from overflowing.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        voted = labels[neighbors]  # (B, k)
        yield {k: weights.new_zeros(len(queries), C).scatter_add_(1, voted[:, :k], weights[:, :k]) for k in ks}


def check_features(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor | None = None,
    *,
    num_classes: int | None = None,
) -> int:
    """Return the number of classes (one more than the largest label unless given); raise DataError for a misfit."""
    for split, features, labels in (("training", train_features, train_labels), ("test", test_features, test_labels)):
        count = features.shape[:1] if labels is None else labels.shape
        if features.ndim != 2 or count != features.shape[:1] or not len(features):
            raise DataError(
                f"The {split} features and labels must be (N, D) and (N,) with N above 0, "
                f"but are {tuple(features.shape)} and {tuple(count)}."
            )
        if not features.isfinite().all():
            raise DataError(f"The {split} features contain NaN or infinity: the backbone that made them has diverged.")
    known = [labels for labels in (train_labels, test_labels) if labels is not None]
    highest = max(int(labels.max()) for labels in known)
    C = highest + 1 if num_classes is None else num_classes
    if min(int(labels.min()) for labels in known) < 0 or highest >= C:
        raise DataError(f"Labels must lie in 0..{C - 1}; these reach {highest}, or are negative (an unlabeled image).")
    if train_features.shape[1] != test_features.shape[1]:
        raise DataError(
            f"Training features have {train_features.shape[1]} channels and test features {test_features.shape[1]}: "
            "they must come from the same backbone."
        )
    return C
