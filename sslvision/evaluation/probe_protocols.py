"""Linear-probe protocols by name, with the settings of the published numbers.

A linear classifier is trained on frozen features in one of three ways.

- fast: logistic regression on standardized features, solved to its optimum (linear_probe.py). Seconds, nothing to tune.
- mae: He et al. 2022 (arXiv:2111.06377), appendix A.1, table 10, after MoCo v3: batch norm without affine, LARS.
- dino: Caron et al. 2021 (arXiv:2104.14294), appendix F, and the authors' evaluation: SGD on raw features.

The last two draw a new random crop of every image in every epoch. Here the features of crops are precomputed: K views of
each image, of which epoch e uses view e % K. K = epochs is the paper's protocol; K = 1, the whole image, is the cheap
one; the result records which. Both need hundreds of thousands of images: their length is in epochs, and on a few
thousand images they end before convergence (see `final_loss`).

Other deviations: crops are resampled by Pillow's bicubic filter (dino's authors: bilinear), and boxes that do not fit
into the image are drawn again (mae's authors clip them). Training is in fp32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from sslvision.augment.randomness import permutation
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.confidence import ranking_of
from sslvision.evaluation.knn import check_features
from sslvision.evaluation.linear_probe import bytes_of_fit, fit_probe, probe_logits
from sslvision.evaluation.placement import free_bytes, place_for
from sslvision.nn.exact_products import exact_products
from sslvision.optim.schedules import warmup_cosine

TRUST = 0.001  # LARS's coefficient (You et al. 2017, arXiv:1708.03888)
TEST_AT_ONCE = 8192  # test images per batch of logits


@dataclass(frozen=True)
class Protocol:
    """How a linear classifier is trained.

    Attributes:
        name: Name on the command line and in result files.
        source: Paper and section.
        optimizer: lbfgs is the fast probe, which uses none of the fields below.
        epochs: Passes over the training images.
        batch_size: Images per step; all training images if there are fewer.
        base_lr: Learning rate per 256 images of a batch.
        momentum, weight_decay: Settings of the optimizer.
        warmup_epochs: Epochs of linear warm-up from 0, followed by half a cosine to 0.
        lr_changes_every: Whether the learning rate changes every step or every epoch.
        drop_last: Drop the last batch of an epoch if it is incomplete.
        batch_norm: Standardize features by their batch, and in testing by running statistics; it has no parameters.
        crop_scale: Share of an image's area in a random crop; flips are on.
    """

    name: str
    source: str
    optimizer: Literal["lbfgs", "lars", "sgd"]
    epochs: int = 0
    batch_size: int = 0
    base_lr: float = 0.0  # per 256 images
    momentum: float = 0.9
    weight_decay: float = 0.0
    warmup_epochs: int = 0
    lr_changes_every: Literal["step", "epoch"] = "step"
    drop_last: bool = False
    batch_norm: bool = False
    crop_scale: tuple[float, float] = (0.08, 1.0)


FAST = Protocol("fast", "L-BFGS on standardized features; Radford et al. 2021, appendix A.3", "lbfgs")
MAE = Protocol(
    "mae",
    "He et al. 2022, appendix A.1, table 10",
    "lars",
    epochs=90,
    batch_size=16384,
    base_lr=0.1,
    warmup_epochs=10,
    drop_last=True,
    batch_norm=True,
)
DINO = Protocol(
    "dino",
    "Caron et al. 2021, appendix F, and the authors' evaluation",
    "sgd",
    epochs=100,
    batch_size=1024,
    base_lr=0.001,
    lr_changes_every="epoch",
)
PROTOCOLS = {protocol.name: protocol for protocol in (FAST, MAE, DINO)}


def run_protocol(
    protocol: Protocol,
    train_features: Tensor | Sequence[Tensor],
    train_labels: Tensor,
    test_features: Tensor,
    *,
    num_classes: int,
    seed: int,
    validation: tuple[Tensor, Tensor] | None = None,
    device: torch.device | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Train on features of the training images and rank the classes of the test images.

    Args:
        protocol: One of PROTOCOLS.
        train_features: (N, F) of whole images, or of K random crops: (K, N, F), or K tensors (N, F) that may be mapped from
            files.
        train_labels: (N,) int64.
        test_features: (M, F), of whole images.
        num_classes: C, which may exceed the number of classes among the training images.
        seed: Seed for the initial weights and for the order of images in each epoch.
        validation: Features and labels by which `fast` chooses its L2 strength; the others have nothing to choose.
        device: The device to train on; None: the device of the features.

    Returns:
        (M, min(5, C)) int64, the best classes of each test image, best first; and facts for a result file: protocol, views,
        settings and final loss.

    Raises:
        UsageError: `fast` got random crops, or views have different shapes.
        DataError: Features are not finite, labels do not match, or training diverges.
    """
    whole = isinstance(train_features, Tensor) and train_features.ndim == 2
    views: list[Tensor] = [cast(Tensor, train_features)] if whole else list(train_features)
    if (
        not views
        or any(view.shape != views[0].shape for view in views)
        or (protocol.optimizer == "lbfgs" and not whole)
    ):
        raise UsageError(
            f"Protocol {protocol.name} takes features (N, F) of whole images"
            + (", once." if protocol.optimizer == "lbfgs" else " or any number of views of random crops, all (N, F).")
            + f" It was given {len(views)} of shapes {sorted({tuple(view.shape) for view in views})}."
        )
    device = device or views[0].device
    seen = "whole images" if whole else "random crops"
    info: dict[str, Any] = {"protocol": protocol.name, "source": protocol.source, "views": len(views), "seen": seen}
    check_features(views[0], train_labels, test_features, num_classes=num_classes)
    if protocol.optimizer == "lbfgs":
        where = device if device.type != "cuda" else place_for(device, bytes_of_fit(views[0], num_classes))
        fitted = fit_probe(views[0].to(where), train_labels, num_classes=num_classes, validation=validation, seed=seed)
        ranking = torch.cat([ranking_of(probe_logits(fitted, part)) for part in test_features.split(TEST_AT_ONCE)])
        return ranking, {**info, "l2": fitted.l2, "holdout_top1": fitted.holdout_top1}
    head, trained = train_head(protocol, views, train_labels.to(device), num_classes=num_classes, seed=seed)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), exact_products(device):
        ranking = torch.cat([ranking_of(head(part.to(device).float())) for part in test_features.split(TEST_AT_ONCE)])
    return ranking, {**info, **trained, "deviations": deviations(protocol, len(views), len(train_labels), whole=whole)}


@torch.inference_mode(False)
def train_head(
    protocol: Protocol, views: Sequence[Tensor], labels: Tensor, *, num_classes: int, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Train on views (N, F) on the device of the labels (N,); return the head, in eval mode, and how it was trained."""
    N, device, labels = len(labels), labels.device, labels.clone()
    if protocol.batch_norm and N < 2:
        raise DataError(
            f"Protocol {protocol.name} standardizes features by their batch, and there is one image: add images."
        )
    batch = min(protocol.batch_size, N)
    steps = N // batch if protocol.drop_last else math.ceil(N / batch)  # of an epoch
    peak = protocol.base_lr * batch / 256
    head, optimizer = build_head(protocol, views[0].shape[1], num_classes, seed=seed, device=device)
    shown, loss = -1, torch.zeros((), device=device)
    with torch.enable_grad(), torch.autocast(device.type, enabled=False), exact_products(device):
        for epoch in range(protocol.epochs):
            if shown != epoch % len(views):
                shown = epoch % len(views)
                features = to_device_if_it_fits(views[shown], device)  # (N, F)
            order = permutation(N, seed=seed, epoch=epoch)  # (N,)
            loss.zero_()  # accumulates the sum over this epoch's images
            for step in range(steps):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(protocol, epoch, step / steps, peak=peak)
                indices = order[step * batch : (step + 1) * batch]
                x = features[indices.to(features.device)].to(device).float()  # (B, F)
                error = F.cross_entropy(head(x), labels[indices.to(device)])
                optimizer.zero_grad()
                error.backward()
                optimizer.step()
                loss += error.detach() * len(indices)
            if not loss.isfinite():
                raise DataError(
                    f"The loss of protocol {protocol.name} is not finite in epoch {epoch}: the features of view {shown} "
                    "contain NaN or infinity, or are too large for its learning rate."
                )
    count = min(N, steps * batch)
    return head.eval(), {
        "epochs": protocol.epochs,
        "steps": protocol.epochs * steps,
        "batch_size": batch,
        "lr": peak,
        "final_loss": loss.item() / count,  # the last epoch's mean
    }


def build_head(
    protocol: Protocol, width: int, num_classes: int, *, seed: int, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the untrained classifier (weights normal with standard deviation 0.01, biases 0) and its optimizer."""
    linear = nn.utils.skip_init(nn.Linear, width, num_classes)  # not initialized by the global generator
    with torch.no_grad():
        linear.weight.normal_(std=0.01, generator=torch.Generator().manual_seed(seed))
        linear.bias.zero_()
    norm = nn.BatchNorm1d(width, affine=False, eps=1e-6) if protocol.batch_norm else nn.Identity()
    head = nn.Sequential(norm, linear).to(device)
    momentum, decay = protocol.momentum, protocol.weight_decay
    if protocol.optimizer == "sgd":
        return head, torch.optim.SGD(head.parameters(), lr=0.0, momentum=momentum, weight_decay=decay)
    # As in MoCo v3 and MAE, biases have neither a trust ratio nor decay. (always_adapt: timm ties the ratio to decay.)
    groups = [
        {"params": [linear.weight], "always_adapt": True},
        {"params": [linear.bias], "always_adapt": False, "weight_decay": 0.0},
    ]
    return head, Lars(groups, lr=0.0, momentum=momentum, weight_decay=decay, trust_coeff=TRUST, eps=0.0)


def learning_rate(protocol: Protocol, epoch: int, part: float, *, peak: float) -> float:
    """Return the learning rate after `part` of an epoch."""
    now = epoch + part if protocol.lr_changes_every == "step" else epoch
    return warmup_cosine(now, peak=peak, epochs=protocol.epochs, warmup_epochs=protocol.warmup_epochs)


def to_device_if_it_fits(features: Tensor, device: torch.device) -> Tensor:
    """Return features on the device if they take less than half of its free memory, else where they are."""
    if device.type != "cuda" or 2 * features.nbytes > free_bytes(device):
        return features
    return features.to(device)


def deviations(protocol: Protocol, views: int, images: int, *, whole: bool) -> list[str]:
    """Return how a run differs from the paper, for the user."""
    found = []
    if whole:
        found.append("features of the whole image once; the paper draws a new random crop every epoch")
    elif views < protocol.epochs:
        found.append(f"{views} random crops of each image, in turn; the paper draws a new one every epoch")
    if images < protocol.batch_size:
        found.append(
            f"all {images} images are one batch instead of {protocol.batch_size}, with a proportionally lower learning rate: "
            "the head may be far from convergence"
        )
    return found
