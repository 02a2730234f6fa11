"""RankMe: the effective rank of features."""

import torch
from torch import Tensor


def rankme(features: Tensor) -> float:
    """Return the effective rank of features (n, D): from 1, if they lie on a line, to D, if they use all dimensions equally.

    The exponential of the entropy of the normalized singular values, without centering (Garrido et al. 2023, Eq. 1-2).
    It never exceeds n, so take several times D images. NaN if a feature is not finite.
    """
    features = features.double()
    if not features.isfinite().all():
        return float("nan")
    products = features.T @ features if len(features) >= features.shape[1] else features @ features.T
    squares = torch.linalg.eigvalsh(products).clamp(min=0)  # of the min(n, D) singular values
    singular = squares.sqrt()
    share = singular / singular.sum().clamp(min=1e-30) + 1e-7
    return float(torch.special.entr(share).sum().exp())
