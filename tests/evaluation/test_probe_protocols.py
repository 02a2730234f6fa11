import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslvision.augment.randomness import permutation
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.linear_probe import linear_probe
from sslvision.evaluation.probe_protocols import (
    DINO,
    FAST,
    MAE,
    PROTOCOLS,
    Protocol,
    build_head,
    learning_rate,
    run_protocol,
    train_head,
)

CPU = torch.device("cpu")
Split = tuple[Tensor, Tensor, Tensor, Tensor]


def blobs(spread: float = 0.3, *, train: int = 400, test: int = 200, width: int = 96, classes: int = 4) -> Split:
    """Gaussian classes around random centers."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(classes, width, generator=generator)
    labels = torch.arange(train + test) % classes
    features = centers[labels] + spread * torch.randn(train + test, width, generator=generator)
    return features[:train], labels[:train], features[train:], labels[train:]


def run(name: str, split: Split, *, seed: int = 0) -> tuple[Tensor, dict[str, Any]]:
    features, labels, test_features, _ = split
    return run_protocol(PROTOCOLS[name], features, labels, test_features, num_classes=4, seed=seed)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_separable_features_are_classified(name: str) -> None:
    split = blobs()
    ranking, info = run(name, split)
    assert (ranking[:, 0] == split[3]).float().mean() > 0.95
    assert ranking.shape == (200, 4)
    assert (info["protocol"], info["views"], info["seen"]) == (name, 1, "whole images")


def test_fast_is_the_linear_probe() -> None:
    split = blobs(3.0)
    ranking, info = run("fast", split, seed=3)
    probe = linear_probe(*split, seed=3)
    assert torch.equal(ranking, probe.ranking)
    assert (info["l2"], info["holdout_top1"]) == (probe.l2, probe.holdout_top1)
    features, labels, test_features, test_labels = split
    validation = features[300:], labels[300:]
    ranking, info = run_protocol(
        FAST, features[:300], labels[:300], test_features, num_classes=4, seed=0, validation=validation
    )
    probe = linear_probe(features[:300], labels[:300], test_features, test_labels, validation=validation)
    assert torch.equal(ranking, probe.ranking)
    assert info["l2"] == probe.l2


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_ranking_is_a_function_of_the_seed_alone(name: str) -> None:
    split = blobs(3.0)
    torch.manual_seed(0)
    first = run(name, split)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = run(name, split)
    assert torch.equal(first[0], second[0])
    assert first[1] == second[1]
    assert torch.equal(torch.get_rng_state(), state)
    if name != "fast":
        assert run(name, split, seed=1)[1]["final_loss"] != first[1]["final_loss"]


def test_the_published_settings_give_the_published_rates() -> None:
    assert MAE.base_lr * MAE.batch_size / 256 == pytest.approx(6.4)
    assert DINO.base_lr * DINO.batch_size / 256 == pytest.approx(0.004)
    # MAE: ten epochs up, then half a cosine, step by step. DINO: half a cosine, epoch by epoch.
    rates = [learning_rate(MAE, epoch, part, peak=6.4) for epoch, part in ((0, 0.0), (5, 0.5), (10, 0.0))]
    assert rates == pytest.approx([0, 3.52, 6.4])
    assert learning_rate(MAE, 50, 0.0, peak=6.4) == pytest.approx(3.2)
    assert learning_rate(MAE, 89, 0.99, peak=6.4) == pytest.approx(6.4 * (1 + math.cos(math.pi * 79.99 / 80)) / 2)
    assert learning_rate(DINO, 0, 0.9, peak=0.004) == 0.004
    assert learning_rate(DINO, 50, 0.9, peak=0.004) == learning_rate(DINO, 50, 0.0, peak=0.004) == pytest.approx(0.002)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=0.004), 100)
    for epoch in range(3):
        assert learning_rate(DINO, epoch, 0.5, peak=0.004) == pytest.approx(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()


def test_a_lars_step_is_the_one_by_hand() -> None:
    head, optimizer = build_head(MAE, 3, 2, seed=0, device=CPU)
    weight, bias = head[1].weight, head[1].bias  # type: ignore[index]
    before = weight.detach().clone()
    velocity, bias_velocity = torch.zeros(2, 3), torch.zeros(2)
    expected, expected_bias = before.clone(), torch.zeros(2)
    for gradient in (torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]), torch.ones(2, 3)):
        weight.grad, bias.grad = gradient.clone(), torch.tensor([1.0, -2.0])
        for group in optimizer.param_groups:
            group["lr"] = 2.0
        optimizer.step()
        velocity = 0.9 * velocity + 0.001 * expected.norm() / gradient.norm() * gradient
        bias_velocity = 0.9 * bias_velocity + torch.tensor([1.0, -2.0])  # vectors take the plain step
        expected, expected_bias = expected - 2 * velocity, expected_bias - 2 * bias_velocity
        torch.testing.assert_close(weight.detach(), expected)
        torch.testing.assert_close(bias.detach(), expected_bias)
    assert not torch.equal(weight.detach(), before)


def test_dinos_training_is_plain_sgd_with_momentum_in_the_order_of_the_seed() -> None:
    features, labels, *_ = blobs(3.0, train=50)
    short = replace(DINO, epochs=3, batch_size=16)
    head, info = train_head(short, [features], labels, num_classes=4, seed=5)
    weight = torch.empty(4, 96).normal_(std=0.01, generator=torch.Generator().manual_seed(5)).requires_grad_()
    bias = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
    losses = []
    for epoch in range(3):
        losses.clear()
        optimizer.param_groups[0]["lr"] = 0.001 * 16 / 256 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for indices in permutation(50, seed=5, epoch=epoch).split(16):  # the last batch of two as well
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(features[indices], weight, bias), labels[indices])
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(indices))
    torch.testing.assert_close(head[1].weight, weight)  # type: ignore[index]
    torch.testing.assert_close(head[1].bias, bias)  # type: ignore[index]
    assert info["final_loss"] == pytest.approx(sum(losses) / 50)
    assert (info["steps"], info["lr"], info["batch_size"]) == (12, 0.001 * 16 / 256, 16)


def test_mae_drops_the_last_batch_and_starts_from_a_rate_of_zero() -> None:
    features, labels, *_ = blobs(train=50)
    short = replace(MAE, epochs=3, batch_size=16)
    assert train_head(short, [features], labels, num_classes=4, seed=0)[1]["steps"] == 9
    head, _ = train_head(replace(MAE, epochs=1, batch_size=50), [features], labels, num_classes=4, seed=0)
    torch.testing.assert_close(
        head[1].weight,  # type: ignore[index]
        build_head(MAE, 96, 4, seed=0, device=CPU)[0][1].weight,  # type: ignore[index]
    )


def test_maes_batch_norm_uses_running_statistics_in_the_test_and_learns_nothing() -> None:
    features, labels, test_features, _ = blobs(3.0)
    features, test_features = 5 * features + 7, 5 * test_features + 7
    head, _ = train_head(MAE, [features], labels, num_classes=4, seed=0)
    norm, linear = head  # type: ignore[misc]
    assert not list(norm.parameters())
    assert norm.eps == 1e-6
    # 90 times the same batch: what is left of the start (0 and 1) is 0.9 ** 90.
    torch.testing.assert_close(norm.running_mean, features.mean(0), atol=2e-3, rtol=0)
    torch.testing.assert_close(norm.running_var, features.var(0), rtol=1e-3, atol=0)
    x = (test_features - norm.running_mean) / (norm.running_var + 1e-6).sqrt()
    expected = F.linear(x, linear.weight, linear.bias).sort(descending=True, stable=True).indices
    ranking, _ = run_protocol(MAE, features, labels, test_features, num_classes=4, seed=0)
    assert torch.equal(ranking, expected)
    # One at a time, where a batch's own statistics would have been all zeros:
    assert torch.equal(torch.cat([head(image[None]).argmax(1) for image in test_features]), expected[:, 0])


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_the_scale_of_features_matters_to_dino_but_not_to_mae(name: str) -> None:
    features, labels, test_features, test_labels = blobs(3.0)
    scaled = run(name, (100 * features, labels, 100 * test_features, test_labels))
    assert (scaled[1]["final_loss"] == pytest.approx(run(name, blobs(3.0))[1]["final_loss"], rel=1e-3)) == (
        name == "mae"
    )


@pytest.mark.parametrize("views", [1, 2, 3, 5, 7])
def test_epoch_e_takes_view_e_modulo_k(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every feature of view k is k, so the head's input says which view it is of.
    given = torch.arange(views).float()[:, None, None].expand(views, 10, 3)
    seen: list[float] = []
    linear = F.linear

    def watched(x: Tensor, *others: Tensor) -> Tensor:
        assert (x == x[0, 0]).all()
        seen.append(float(x[0, 0]))
        return linear(x, *others)

    monkeypatch.setattr(F, "linear", watched)
    train_head(replace(DINO, epochs=7, batch_size=5), list(given), torch.arange(10) % 2, num_classes=2, seed=0)
    assert seen == [float(epoch % views) for epoch in range(7) for _ in range(2)]


def test_views_may_be_one_tensor_or_many_and_the_same_view_often_is_one() -> None:
    features, labels, test_features, _ = blobs(3.0)

    def loss(train: Tensor | list[Tensor]) -> float:
        return run_protocol(MAE, train, labels, test_features, num_classes=4, seed=0)[1]["final_loss"]

    assert loss(torch.stack([features, features])) == loss(features)
    assert loss(torch.stack([features, features + 1])) == loss([features, features + 1])
    assert loss([features, features.flip(1)]) != loss(features)


def test_the_result_says_how_it_differs_from_the_paper() -> None:
    features, labels, test_features, _ = blobs(train=60)

    def said(protocol: Protocol, train: Tensor | list[Tensor]) -> str:
        _, info = run_protocol(protocol, train, labels, test_features, num_classes=4, seed=0)
        return f"{info['views']} {info['seen']}: {'; '.join(info['deviations'])}"

    short = replace(DINO, epochs=3, batch_size=20)
    assert said(short, features) == (
        "1 whole images: features of the whole image once; the paper draws a new random crop every epoch"
    )
    assert said(short, [features] * 2) == (
        "2 random crops: 2 random crops of each image, in turn; the paper draws a new one every epoch"
    )
    assert said(short, [features] * 3) == "3 random crops: "
    assert "all 60 images are one batch instead of 16384" in said(MAE, features)


def test_features_in_files_and_in_half_precision_serve(tmp_path: Path) -> None:
    features, labels, test_features, _ = blobs(3.0)
    np.save(tmp_path / "f.npy", features.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "f.npy", mmap_mode="c"))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ranking, info = run_protocol(DINO, mapped, labels, test_features, num_classes=4, seed=0)
    expected, plain = run_protocol(DINO, features, labels, test_features, num_classes=4, seed=0)
    assert torch.equal(ranking, expected)
    assert info == plain
    _, half = run_protocol(DINO, features.half(), labels, test_features.half(), num_classes=4, seed=0)
    assert half["final_loss"] == pytest.approx(plain["final_loss"], rel=1e-2)


def test_what_cannot_be_is_refused() -> None:
    features, labels, test_features, _ = blobs()
    for protocol, train in ((FAST, features[None]), (DINO, []), (MAE, [features, features[:-1]])):
        with pytest.raises(UsageError, match="It was given"):
            run_protocol(protocol, train, labels, test_features, num_classes=4, seed=0)
    for protocol in PROTOCOLS.values():
        with pytest.raises(DataError, match=r"Labels must lie in 0..2"):
            run_protocol(protocol, features, labels, test_features, num_classes=3, seed=0)
        with pytest.raises(DataError, match="test features contain NaN"):
            run_protocol(protocol, features, labels, test_features * math.nan, num_classes=4, seed=0)
    with pytest.raises(DataError, match="not finite in epoch 1: the features of view 1"):
        run_protocol(DINO, [features, features * math.nan], labels, test_features, num_classes=4, seed=0)
    with pytest.raises(DataError, match="standardizes features by their batch, and there is one image"):
        run_protocol(MAE, features[:1], labels[:1], test_features, num_classes=4, seed=0)
