"""Weighted k-nearest-neighbour classification: how good features are, with nothing trained.

The vote of Wu et al. 2018 (arXiv:1805.01978, section 3.4), as DINO evaluates (Caron et al. 2021, arXiv:2104.14294,
appendix F): each test image takes its k most similar training images, by cosine, and neighbour i votes for its own
class with weight exp(similarity_i / temperature). Temperature 0.07 and k = 20 are the field's; 10 is DINO's other k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvision.errors import DataError, UsageError

SIMILARITIES_AT_ONCE = 1 << 26  # 256 MiB of fp32: what bounds the memory


@torch.no_grad()
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
    """Return top-1 and top-5 accuracy in percent.

    Features are (N, D) and (M, D), of any scale, labels (N,) and (M,) int64. Runs on the device of `train_features`,
    `chunk` test images at a time (None: as many as keep the similarities within 256 MiB), whatever their number.
    With fewer than `k` training images all of them vote; with fewer than five classes top-5 is top of them all.
    Classes without a vote rank last, by index, as in DINO's evaluation. Raises UsageError for a `k`, `temperature` or
    `chunk` that is not positive, DataError for features that are not finite or labels that do not fit.
    """
    if k < 1 or temperature <= 0 or (chunk is not None and chunk < 1):
        raise UsageError(f"k-NN needs k, temperature and chunk above 0, but got {k=}, {temperature=}, {chunk=}.")
    C = check_features(train_features, train_labels, test_features, test_labels, num_classes=num_classes)
    device, N = train_features.device, len(train_features)
    chunk = chunk or max(1, SIMILARITIES_AT_ONCE // max(N, C))
    keys = F.normalize(train_features.float(), dim=1)  # (N, D)
    labels = train_labels.to(device)
    top1 = top5 = 0
    for features, targets in zip(test_features.split(chunk), test_labels.split(chunk), strict=True):
        queries = F.normalize(features.to(device).float(), dim=1)  # (B, D)
        with torch.autocast(device.type, enabled=False):  # bf16 similarities would tie by the dozen
            similarity, neighbours = (queries @ keys.T).topk(min(k, N), dim=1)  # (B, k)
        # Relative to the nearest, which leaves the ranking alone and keeps a small temperature from overflowing.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(queries), C).scatter_add_(1, labels[neighbours], weights)  # (B, C)
        ranking = votes.sort(dim=1, descending=True, stable=True).indices[:, :5]
        correct = ranking == targets.to(device)[:, None]
        top1 += int(correct[:, 0].sum())
        top5 += int(correct.sum())
    return 100 * top1 / len(test_labels), 100 * top5 / len(test_labels)


def check_features(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int | None = None,
) -> int:
    """Return the number of classes (one more than the largest label unless given); raise DataError for a misfit."""
    for split, features, labels in (("training", train_features, train_labels), ("test", test_features, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise DataError(
                f"The {split} features and labels must be (N, D) and (N,) with N above 0, "
                f"but are {tuple(features.shape)} and {tuple(labels.shape)}."
            )
        if not features.isfinite().all():
            raise DataError(f"The {split} features contain NaN or infinity: the backbone that made them has diverged.")
    highest = int(max(train_labels.max(), test_labels.max()))
    C = highest + 1 if num_classes is None else num_classes
    if min(train_labels.min(), test_labels.min()) < 0 or highest >= C:
        raise DataError(f"Labels must lie in 0..{C - 1}; these reach {highest}, or are negative (an unlabelled image).")
    if train_features.shape[1] != test_features.shape[1]:
        raise DataError(
            f"Training features have {train_features.shape[1]} channels and test features {test_features.shape[1]}: "
            "they must come from the same backbone."
        )
    return C
