"""The fast linear probe: how linearly separable frozen features are, in seconds.

Multinomial logistic regression on standardised features, solved to its optimum by L-BFGS instead of trained by SGD, so
that there is no learning rate and no schedule to argue about; the protocol of CLIP (Radford et al. 2021,
arXiv:2103.00020, appendix A.3) with features standardised as MAE's probe does with its BatchNorm:

    minimise over W (C, D), b (C,):   mean cross-entropy(x W^T + b, y)  +  l2 / 2 * |W|^2

The L2 strength is chosen by the cross-entropy of a held-out, class-stratified tenth of the training set; then
everything is fitted again. Cross-entropy rather than accuracy, because it has one valley and little noise: on a
thousand images accuracy changes its mind with the seed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvision.downstream.knn import check_features
from sslvision.errors import DataError, UsageError

L2_GRID = (1.0, 0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


class LinearProbe(NamedTuple):
    """Test accuracy in percent, the L2 strength chosen, and the accuracy on the held-out images, in percent."""

    top1: float
    l2: float
    holdout_top1: float


class Solution(NamedTuple):
    """W (C, D) and b (C,) of a logistic regression."""

    weight: Tensor
    bias: Tensor


@torch.inference_mode(False)  # so that it can be called from a validation hook, and still differentiate
def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    l2_grid: Sequence[float] = L2_GRID,
    holdout: float = 0.1,
    seed: int = 0,
) -> LinearProbe:
    """Fit on (N, D) training features and (N,) int64 labels, and measure on the (M, D) test features.

    Runs on the device of `train_features`. The grid is walked from the strongest L2 to the weakest, each fit starting
    from the last, until the held-out cross-entropy rises. `seed` decides which images are held out. Raises UsageError
    for an empty grid, an L2 that is not positive or a `holdout` outside (0, 1), DataError for features that are not
    finite, labels that do not fit, or no class with two training images.
    """
    if not l2_grid or min(l2_grid) <= 0 or not 0 < holdout < 1:
        raise UsageError(f"The linear probe needs L2 strengths above 0 and 0 < holdout < 1: {l2_grid=}, {holdout=}.")
    C = check_features(train_features, train_labels, test_features, test_labels)
    device = train_features.device
    train_labels, test_labels = train_labels.to(device, copy=True), test_labels.to(device)
    x, x_test = standardise(train_features, test_features.to(device))
    held = stratified_holdout(train_labels, fraction=holdout, seed=seed)  # (N,) bool
    with torch.autocast(device.type, enabled=False):
        x_fit, y_fit, x_held, y_held = x[~held], train_labels[~held], x[held], train_labels[held]
        solution = best = Solution(x.new_zeros(C, x.shape[1]), x.new_zeros(C))
        best_l2, best_loss = max(l2_grid), math.inf
        for l2 in sorted(l2_grid, reverse=True):
            solution = fit(x_fit, y_fit, l2=l2, start=solution, tolerance=1e-4, max_iterations=100)  # enough to rank
            loss = F.cross_entropy(F.linear(x_held, *solution), y_held).item()
            if loss > best_loss:
                break
            best, best_l2, best_loss = solution, l2, loss
        final = fit(x, train_labels, l2=best_l2, start=best)
    return LinearProbe(accuracy(final, x_test, test_labels), best_l2, accuracy(best, x_held, y_held))


def fit(
    x: Tensor, y: Tensor, *, l2: float, start: Solution, tolerance: float = 1e-5, max_iterations: int = 500
) -> Solution:
    """Return the minimum of mean cross-entropy + l2 / 2 * |W|^2, searched from `start`; the bias is not penalised.

    The search ends when no entry of the gradient is above `tolerance`, or when the precision of `x` no longer tells two
    losses apart: in fp32 within about 1e-7 of the minimum.
    """
    weight, bias = start.weight.clone().requires_grad_(), start.bias.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=1e-12,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(objective)
    return Solution(weight.detach(), bias.detach())


def accuracy(solution: Solution, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent."""
    return 100 * int((F.linear(x, *solution).argmax(1) == y).sum()) / len(y)


def standardise(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Bring every feature to mean 0 and variance 1 with the training set's statistics; constant ones become 0."""
    train, test = train.detach().float(), test.detach().float()
    mean = train.mean(0)
    centred = train - mean
    residual = centred.mean(0)  # what rounding left of the mean: all there is of a constant feature
    centred -= residual
    deviation = centred.std(0, correction=0)
    constant = deviation <= 1e-6 * mean.abs()  # below what fp32 tells apart
    scale = torch.where(constant, 0.0, 1 / deviation)
    return centred * scale, (test - mean - residual) * scale


def stratified_holdout(labels: Tensor, *, fraction: float, seed: int) -> Tensor:
    """Return (N,) bool, True for the held out: `fraction` of every class, at least one image, never its only one."""
    N = len(labels)
    shuffled = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    order = shuffled[labels[shuffled].argsort(stable=True)]  # by class, shuffled inside
    sizes = labels.bincount()
    place = torch.arange(N, device=labels.device) - (sizes.cumsum(0) - sizes)[labels[order]]  # 0.. inside the class
    quota = torch.minimum((sizes * fraction).round().clamp(min=1), sizes - 1)
    held = torch.zeros(N, dtype=torch.bool, device=labels.device)
    held[order] = place < quota[labels[order]]
    if not held.any():
        raise DataError("The linear probe holds images out to choose its L2 strength: some class needs two images.")
    return held
