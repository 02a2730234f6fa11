"""The fast linear probe: the linear separability of frozen features, in seconds.

Multinomial logistic regression on standardized features, solved to its optimum by L-BFGS instead of trained by SGD, so
that there is no learning rate and no schedule to choose; the protocol of CLIP (Radford et al. 2021,
arXiv:2103.00020, appendix A.3) with features standardized as MAE's probe does with its BatchNorm:

    minimize over W (C, D), b (C,):   mean cross-entropy(x W^T + b, y)  +  l2 / 2 * |W|^2

The L2 strength is chosen by the cross-entropy of a held-out, class-stratified tenth of the training set, after which
everything is fitted again, or by the cross-entropy of validation images, if given. Cross-entropy instead of accuracy,
because it has one minimum and little noise: on a thousand images the best accuracy changes with the seed. With one image
per class and no validation images the middle of the grid is used.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sslvision.data.subsets import stratified_holdout
from sslvision.errors import UsageError
from sslvision.evaluation.confidence import ranking_of
from sslvision.evaluation.knn import check_features
from sslvision.nn.exact_products import exact_products

L2_GRID = (1.0, 0.3, 0.1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)


class Solution(NamedTuple):
    """W (C, D) and b (C,) of a logistic regression."""

    weight: Tensor
    bias: Tensor


class LinearProbe(NamedTuple):
    """The result of a probe, accuracies in percent.

    Attributes:
        top1: Accuracy on the test images.
        l2: The chosen L2 strength.
        holdout_top1: Accuracy on the images it was chosen by; NaN without such images.
        ranking: (M, min(5, C)) int64, the best classes of each test image, best first.
        weight, bias: (C, D) and (C,), for features that are not standardized: the head that fine-tuning starts from.
    """

    top1: float
    l2: float
    holdout_top1: float
    ranking: Tensor
    weight: Tensor
    bias: Tensor


class Standardization(NamedTuple):
    """Standardization of features, (x - mean - residual) * scale, each (D,)."""

    mean: Tensor
    residual: Tensor  # rounding error of the mean
    scale: Tensor


class FittedProbe(NamedTuple):
    """A regression on standardized features; the other fields are as in LinearProbe."""

    solution: Solution
    standardization: Standardization
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
    """Fit on (N, D) training features and (N,) int64 labels, and evaluate on (M, D) test features.

    The other arguments and errors are those of `fit_probe`. With `num_classes` None the largest label counts.
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
    ranking = ranking_of(probe_logits(fitted, test_features))  # (M, min(5, C))
    top1 = 100 * int((ranking[:, 0] == test_labels.to(ranking.device)).sum()) / len(test_labels)
    return LinearProbe(
        top1, fitted.l2, fitted.holdout_top1, ranking, *fold_standardization(fitted.solution, fitted.standardization)
    )


@torch.inference_mode(False)  # so that it can differentiate when called from a validation hook
def fit_probe(
    features: Tensor,
    labels: Tensor,
    *,
    num_classes: int,
    l2_grid: Sequence[float] = L2_GRID,
    holdout: float = 0.1,
    validation: tuple[Tensor, Tensor] | None = None,
    seed: int = 0,
) -> FittedProbe:
    """Fit features (N, D) and int64 labels (N,) on their device.

    The grid is searched from the strongest L2 to the weakest, each fit starting from the last, until the cross-entropy of
    the held-out images rises. Those are a part of the training images, or `validation`, features and labels of others.
    All training images are then fitted with the best L2. `seed` determines which training images are held out.

    Raises UsageError for an empty grid, an L2 that is not positive or a `holdout` outside (0, 1), DataError for features
    that are not finite or labels that do not match.
    """
    if not l2_grid or min(l2_grid) <= 0 or not 0 < holdout < 1:
        raise UsageError(f"The linear probe needs L2 strengths above 0 and 0 < holdout < 1: {l2_grid=}, {holdout=}.")
    check_features(features, labels, *(validation or (features[:1], labels[:1])), num_classes=num_classes)
    labels = labels.to(features.device, copy=True)
    standardization = fit_standardization(features)
    x = apply_standardization(features, standardization)  # (N, D)
    zeros = Solution(x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes))
    with torch.autocast(x.device.type, enabled=False), exact_products(x.device):
        if validation is None and int(labels.bincount().max()) < 2:
            l2 = sorted(l2_grid)[len(l2_grid) // 2]
            return FittedProbe(minimize_cross_entropy(x, labels, l2=l2, start=zeros), standardization, l2, math.nan)
        if validation is None:
            held = stratified_holdout(labels, fraction=holdout, seed=seed)  # (N,) bool
            x_fit, y_fit, x_held, y_held = x[~held], labels[~held], x[held], labels[held]
        else:
            held_features, held_labels = (part.to(x.device, copy=True) for part in validation)
            x_fit, y_fit, x_held, y_held = x, labels, apply_standardization(held_features, standardization), held_labels
        solution = best = zeros
        best_l2, best_loss = max(l2_grid), math.inf
        for l2 in sorted(l2_grid, reverse=True):
            # A tolerance of 1e-4 suffices to compare strengths.
            solution = minimize_cross_entropy(x_fit, y_fit, l2=l2, start=solution, tolerance=1e-4, max_iterations=100)
            loss = F.cross_entropy(F.linear(x_held, *solution), y_held).item()
            if loss > best_loss:
                break
            best, best_l2, best_loss = solution, l2, loss
        final = minimize_cross_entropy(x, labels, l2=best_l2, start=best)
        return FittedProbe(final, standardization, best_l2, accuracy(best, x_held, y_held))


def probe_logits(fitted: FittedProbe, features: Tensor) -> Tensor:
    """Return the logits (M, C) of features (M, D) that are not standardized, on the device of the fit."""
    x = apply_standardization(features.to(fitted.standardization.mean.device), fitted.standardization)
    with torch.autocast(x.device.type, enabled=False), exact_products(x.device):
        return F.linear(x, *fitted.solution)


def fold_standardization(solution: Solution, standardization: Standardization) -> Solution:
    """Return the regression for features x that are not standardized: F.linear(x, *result) are the logits of standardized x."""
    mean, residual, scale = (part.double() for part in standardization)  # large means and biases nearly cancel
    weight = solution.weight.double() * scale  # (C, D)
    bias = solution.bias.double() - weight @ (mean + residual)  # (C,)
    return Solution(weight.to(solution.weight.dtype), bias.to(solution.bias.dtype))


def bytes_of_fit(features: Tensor, classes: int) -> int:
    """Return the approximate memory of `fit_probe`: five copies of features (N, D), six of logits (N, C), 64 of weights."""
    N, D = features.shape
    return 4 * (5 * N * D + 6 * N * classes + 64 * D * classes)


def minimize_cross_entropy(
    x: Tensor, y: Tensor, *, l2: float, start: Solution, tolerance: float = 1e-5, max_iterations: int = 500
) -> Solution:
    """Return the minimum of mean cross-entropy + l2 / 2 * |W|^2, searched from `start`; the bias is not penalized.

    The search ends when no entry of the gradient exceeds `tolerance`, or when losses no longer differ in the precision of
    `x`: in fp32 within about 1e-7 of the minimum.
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
    """Give every feature mean 0 and variance 1 in the training set; constant features become 0."""
    standardization = fit_standardization(train)
    return apply_standardization(train, standardization), apply_standardization(test, standardization)


def fit_standardization(features: Tensor) -> Standardization:
    """Return the statistics of features (N, D); the scale of constant features is 0."""
    features = features.detach().float()
    mean = features.mean(0)
    centered = features - mean
    residual = centered.mean(0)  # all that is left of a constant feature
    deviation = centered.sub_(residual).std(0, correction=0)
    constant = deviation <= 1e-6 * mean.abs()  # below the precision of fp32
    return Standardization(mean, residual, torch.where(constant, 0.0, 1 / deviation))


def apply_standardization(features: Tensor, standardization: Standardization) -> Tensor:
    """Return standardized features (N, D) in fp32."""
    mean, residual, scale = standardization
    return (features.detach().float() - mean).sub_(residual).mul_(scale)
