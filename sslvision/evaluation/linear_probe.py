"""The fast linear probe: how linearly separable frozen features are, in seconds.

Multinomial logistic regression on standardized features, solved to its optimum by L-BFGS instead of trained by SGD, so
that there is no learning rate and no schedule to argue about; the protocol of CLIP (Radford et al. 2021,
arXiv:2103.00020, appendix A.3) with features standardized as MAE's probe does with its BatchNorm:

    minimize over W (C, D), b (C,):   mean cross-entropy(x W^T + b, y)  +  l2 / 2 * |W|^2

The L2 strength is chosen by the cross-entropy of a held-out, class-stratified tenth of the training set, after which
everything is fitted again, or by that of other images, if there are some. Cross-entropy rather than accuracy, because it
has one valley and little noise: on a thousand images accuracy changes its mind with the seed. With one image per class
and no other there is nothing to choose by, and the middle of the grid is taken.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvision.data.subsets import stratified_holdout
from sslvision.errors import UsageError
from sslvision.evaluation.knn import check_features
from sslvision.evaluation.scores import ranking_of
from sslvision.nn.exact_products import exact_products

L2_GRID = (1.0, 0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


class Solution(NamedTuple):
    """W (C, D) and b (C,) of a logistic regression."""

    weight: Tensor
    bias: Tensor


class LinearProbe(NamedTuple):
    """What a probe found, accuracies in percent.

    Attributes:
        top1: of the test images.
        l2: the strength chosen.
        holdout_top1: of the images it was chosen by; NaN where there were none.
        ranking: (M, min(5, C)) int64, the best classes of each test image, best first.
        weight, bias: (C, D) and (C,), for features as they are, not standardized: the head that fine-tuning starts from.
    """

    top1: float
    l2: float
    holdout_top1: float
    ranking: Tensor
    weight: Tensor
    bias: Tensor


class Standard(NamedTuple):
    """How features are standardized: (x - mean - residual) * scale, each (D,)."""

    mean: Tensor
    residual: Tensor  # what rounding left of the mean
    scale: Tensor


class Fitted(NamedTuple):
    """A regression on standardized features; the other fields are those of LinearProbe."""

    solution: Solution
    standard: Standard
    l2: float
    holdout_top1: float


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    num_classes: int | None = None,
    l2_grid: Sequence[float] = L2_GRID,
    holdout: float = 0.1,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> LinearProbe:
    """Fit on (N, D) training features and (N,) int64 labels, and measure on the (M, D) test features.

    The other arguments and errors are those of `fit_probe`. `num_classes` None means those that have a label.
    """
    C = check_features(train_features, train_labels, test_features, test_labels, num_classes=num_classes)
    if num_classes is None and validation is not None and len(validation[1]):
        C = max(C, int(validation[1].max()) + 1)
    fitted = fit_probe(
        train_features,
        train_labels,
        num_classes=C,
        l2_grid=l2_grid,
        holdout=holdout,
        validation=validation,
        seed=seed,
    )
    ranking = ranking_of(standard_logits(fitted, test_features))  # (M, min(5, C))
    top1 = 100 * int((ranking[:, 0] == test_labels.to(ranking.device)).sum()) / len(test_labels)
    return LinearProbe(top1, fitted.l2, fitted.holdout_top1, ranking, *folded(fitted.solution, fitted.standard))


@torch.inference_mode(False)  # so that it can be called from a validation hook, and still differentiate
def fit_probe(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    l2_grid: Sequence[float] = L2_GRID,
    holdout: float = 0.1,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> Fitted:
    """Fit features (N, D) and int64 labels (N,) on their device.

    The grid is walked from the strongest L2 to the weakest, each fit starting from the last, until the cross-entropy of
    the images to choose by rises. Those are a part of the training images, or `validation`, features and labels of
    others; all training images are then fitted throughout. `seed` decides which training images are held out.

    Raises UsageError for an empty grid, an L2 that is not positive or a `holdout` outside (0, 1), DataError for features
    that are not finite or labels that do not fit.
    """
    if not l2_grid or min(l2_grid) <= 0 or not 0 < holdout < 1:
        raise UsageError(f"The linear probe needs L2 strengths above 0 and 0 < holdout < 1: {l2_grid=}, {holdout=}.")
    check_features(features, labels, *(validation or (features[:1], labels[:1])), num_classes=num_classes)
    labels = labels.to(features.device, copy=True)
    standard = standard_of(features)
    x = standardized(features, standard)  # (N, D)
    zeros = Solution(x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes))
    with torch.autocast(x.device.type, enabled=False), exact_products(x.device):
        if validation is None and int(labels.bincount().max()) < 2:
            l2 = sorted(l2_grid)[len(l2_grid) // 2]
            return Fitted(fit(x, labels, l2=l2, start=zeros), standard, l2, math.nan)
        if validation is None:
            held = stratified_holdout(labels, fraction=holdout, seed=seed)  # (N,) bool
            x_fit, y_fit, x_held, y_held = x[~held], labels[~held], x[held], labels[held]
        else:
            held_features, held_labels = (part.to(x.device, copy=True) for part in validation)
            x_fit, y_fit, x_held, y_held = x, labels, standardized(held_features, standard), held_labels
        solution = best = zeros
        best_l2, best_loss = max(l2_grid), math.inf
        for l2 in sorted(l2_grid, reverse=True):
            solution = fit(x_fit, y_fit, l2=l2, start=solution, tolerance=1e-4, max_iterations=100)  # enough to rank
            loss = F.cross_entropy(F.linear(x_held, *solution), y_held).item()
            if loss > best_loss:
                break
            best, best_l2, best_loss = solution, l2, loss
        final = fit(x, labels, l2=best_l2, start=best)
        return Fitted(final, standard, best_l2, accuracy(best, x_held, y_held))


def standard_logits(fitted: Fitted, features: Tensor) -> Tensor:
    """Return the logits (M, C) of features (M, D) as they are, on the device of the fit."""
    x = standardized(features.to(fitted.standard.mean.device), fitted.standard)
    with torch.autocast(x.device.type, enabled=False), exact_products(x.device):
        return F.linear(x, *fitted.solution)


def folded(solution: Solution, standard: Standard) -> Solution:
    """Return the regression for features as they are: F.linear(x, *folded) are the logits of standardized x."""
    mean, residual, scale = (part.double() for part in standard)  # far from zero means and biases nearly cancel
    weight = solution.weight.double() * scale  # (C, D)
    bias = solution.bias.double() - weight @ (mean + residual)  # (C,)
    return Solution(weight.to(solution.weight.dtype), bias.to(solution.bias.dtype))


def bytes_of_fit(features: Tensor, classes: int) -> int:
    """Return about how much memory `fit_probe` takes: five copies of features (N, D), six of logits (N, C), 64 of weights."""
    N, D = features.shape
    return 4 * (5 * N * D + 6 * N * classes + 64 * D * classes)


def fit(
    x: Tensor, y: Tensor, *, l2: float, start: Solution, tolerance: float = 1e-5, max_iterations: int = 500
) -> Solution:
    """Return the minimum of mean cross-entropy + l2 / 2 * |W|^2, searched from `start`; the bias is not penalized.

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


def standardize(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Bring every feature to mean 0 and variance 1 with the training set's statistics; constant ones become 0."""
    standard = standard_of(train)
    return standardized(train, standard), standardized(test, standard)


def standard_of(features: Tensor) -> Standard:
    """Return the statistics of features (N, D); the scale of constant ones is 0."""
    features = features.detach().float()
    mean = features.mean(0)
    centerd = features - mean
    residual = centerd.mean(0)  # all there is of a constant feature
    deviation = centerd.sub_(residual).std(0, correction=0)
    constant = deviation <= 1e-6 * mean.abs()  # below what fp32 tells apart
    return Standard(mean, residual, torch.where(constant, 0.0, 1 / deviation))


def standardized(features: Tensor, standard: Standard) -> Tensor:
    """Return features (N, D) in fp32 and standardized."""
    return (features.detach().float() - standard.mean).sub_(standard.residual).mul_(standard.scale)
