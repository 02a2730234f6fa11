import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sslvision.data.subsets import stratified_holdout
from sslvision.errors import DataError, UsageError
from sslvision.evaluation import linear_probe as probe_module
from sslvision.evaluation.linear_probe import (
    L2_GRID,
    LinearProbe,
    Solution,
    fit_probe,
    fold_standardization,
    linear_probe,
    minimize_cross_entropy,
    probe_logits,
    standardize,
)
from sslvision.nn.exact_products import exact_products

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def blobs(spread: float, *, train: int = 400, test: int = 200, width: int = 12) -> Split:
    """Four Gaussian classes around random centers; the larger the spread, the more they overlap."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, width, generator=generator)
    labels = torch.arange(train + test) % 4
    features = centers[labels] + spread * torch.randn(train + test, width, generator=generator)
    return features[:train], labels[:train], features[train:], labels[train:]


def zeros(classes: int, width: int, dtype: torch.dtype = torch.float32) -> Solution:
    return Solution(torch.zeros(classes, width, dtype=dtype), torch.zeros(classes, dtype=dtype))


def same(first: LinearProbe, second: LinearProbe) -> bool:
    return first[:3] == second[:3] and torch.equal(first.ranking, second.ranking)


def gradient(solution: Solution, x: Tensor, y: Tensor, l2: float) -> Tensor:
    """Of the objective, in closed form: (softmax - one-hot)^T x / N + l2 W, and without the penalty for the bias."""
    error = F.linear(x, *solution).softmax(1) - F.one_hot(y, len(solution.bias))
    return torch.cat([error.T @ x / len(x) + l2 * solution.weight, error.mean(0)[:, None]], dim=1)


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_the_gradient_vanishes_at_the_solution_and_the_bias_is_not_penalized(l2: float) -> None:
    x, y, *_ = blobs(1.0)
    y = torch.where(torch.arange(len(y)) % 3 == 0, 0, y)  # unbalanced, so that the bias matters
    x = standardize(x, x)[0].double()  # fp32 ends where it can no longer tell two losses apart
    solution = minimize_cross_entropy(x, y, l2=l2, start=zeros(4, 12, torch.float64))
    assert gradient(solution, x, y, l2).abs().max() <= 1e-5
    assert solution.bias.abs().max() > 0.1


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
def test_single_precision_reaches_the_same_loss(l2: float) -> None:
    x, y, *_ = blobs(1.0)
    single = minimize_cross_entropy(x, y, l2=l2, start=zeros(4, 12))
    double = minimize_cross_entropy(x.double(), y, l2=l2, start=zeros(4, 12, torch.float64))
    losses = [
        float(F.cross_entropy(F.linear(x.double(), weight.double(), bias.double()), y) + l2 / 2 * weight.square().sum())
        for weight, bias in (single, double)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_the_optimum_does_not_depend_on_the_start() -> None:
    x, y, *_ = blobs(1.0)
    generator = torch.Generator().manual_seed(1)
    far = Solution(torch.randn(4, 12, generator=generator), torch.randn(4, generator=generator))
    cold, warm = (
        minimize_cross_entropy(x, y, l2=1e-2, start=zeros(4, 12)),
        minimize_cross_entropy(x, y, l2=1e-2, start=far),
    )
    torch.testing.assert_close(warm.weight, cold.weight, atol=1e-3, rtol=0)
    assert not far.weight.requires_grad  # and the start is left as it was


def test_the_penalty_is_the_one_of_the_textbook() -> None:
    # Two points at -1 and +1, one class each: the margin m = w_1 - w_0 solves sigmoid(-m) = l2 m / 2.
    solution = minimize_cross_entropy(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), l2=0.1, start=zeros(2, 1))
    margin = float(solution.weight[1] - solution.weight[0])
    assert 1 / (1 + math.exp(margin)) == pytest.approx(0.1 * margin / 2, abs=1e-4)


def test_separable_data_are_classified_perfectly() -> None:
    probe = linear_probe(*blobs(0.1))
    assert probe.top1 == 100
    assert probe.holdout_top1 == 100


def test_shuffled_labels_are_guessed_at_chance() -> None:
    features, labels, test_features, test_labels = blobs(0.1, train=1000, test=1000)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert 17 < linear_probe(features, shuffled, test_features, test_labels).top1 < 33  # of four classes


def test_noise_wants_more_regularization_than_signal() -> None:
    few = linear_probe(*blobs(3.0, train=80, width=40)).l2
    many = linear_probe(*blobs(0.5, train=2000, width=40)).l2
    assert few > many


def test_the_scale_and_offset_of_features_do_not_matter() -> None:
    features, labels, test_features, test_labels = blobs(1.0)
    generator = torch.Generator().manual_seed(2)
    scale, shift = 10 ** torch.empty(12).uniform_(-3, 3, generator=generator), torch.randn(12, generator=generator)
    moved = linear_probe(features * scale + shift * scale, labels, test_features * scale + shift * scale, test_labels)
    plain = linear_probe(features, labels, test_features, test_labels)
    assert moved.l2 == plain.l2
    assert moved.top1 == pytest.approx(plain.top1, abs=0.5)  # one image of 200


def test_a_constant_feature_becomes_zero_and_changes_nothing() -> None:
    features, labels, test_features, test_labels = blobs(1.0)
    constant = 0.1  # has no exact binary value, so that its mean is off by a rounding
    wide = torch.cat([features, torch.full((400, 1), constant)], dim=1)
    wide_test = torch.cat([test_features, torch.full((200, 1), constant + 5)], dim=1)  # not constant in the test set
    x, x_test = standardize(wide, wide_test)
    assert (x[:, -1] == 0).all()
    assert (x_test[:, -1] == 0).all()
    plain = linear_probe(features, labels, test_features, test_labels)
    assert same(linear_probe(wide, labels, wide_test, test_labels), plain)


def test_standardized_features_have_mean_0_and_variance_1_even_far_from_zero() -> None:
    x, _ = standardize(1000 + blobs(1.0)[0], torch.zeros(1, 12))
    assert x.mean(0).abs().max() < 1e-6
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(12))


def test_the_test_set_is_standardized_with_the_training_statistics() -> None:
    _, test = standardize(torch.tensor([[0.0], [4.0]]), torch.tensor([[6.0], [2.0]]))
    assert test.tolist() == [[2.0], [0.0]]


def test_the_holdout_takes_a_tenth_of_every_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 50 + [2] * 3 + [3])[torch.randperm(154)]
    held = stratified_holdout(labels, fraction=0.1, seed=0)
    assert labels[held].bincount(minlength=4).tolist() == [10, 5, 1, 0]  # at least one, never the only one


def test_the_holdout_is_a_function_of_the_seed() -> None:
    labels = torch.arange(500) % 5
    first = stratified_holdout(labels, fraction=0.1, seed=1)
    assert torch.equal(first, stratified_holdout(labels, fraction=0.1, seed=1))
    assert not torch.equal(first, stratified_holdout(labels, fraction=0.1, seed=2))


def test_the_order_of_the_grid_does_not_matter() -> None:
    assert same(linear_probe(*blobs(1.0), l2_grid=L2_GRID[::-1]), linear_probe(*blobs(1.0)))


def test_the_final_fit_uses_the_held_out_images_too() -> None:
    # One of the two images of class 1 is always held out; the test set holds copies of both.
    features = torch.tensor([[0.0, 0.0]] * 20 + [[5.0, 0.0], [0.0, 5.0]])
    labels = torch.tensor([0] * 20 + [1, 1])
    assert linear_probe(features, labels, features[-2:], labels[-2:], l2_grid=(1e-4,)).top1 == 100


def test_it_works_inside_inference_mode_and_autocast() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = linear_probe(*blobs(1.0))
    assert same(inside, linear_probe(*blobs(1.0)))


@pytest.mark.parametrize("setting", [{"l2_grid": ()}, {"l2_grid": (0.0, 1.0)}, {"holdout": 0.0}, {"holdout": 1.0}])
def test_a_setting_that_cannot_be_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="holdout"):
        linear_probe(*blobs(1.0), **setting)  # type: ignore[arg-type]


def test_data_that_cannot_be_probed_are_refused() -> None:
    features, labels, *test = blobs(1.0)
    with pytest.raises(DataError, match="infinity"):
        linear_probe(features * math.inf, labels, *test)
    with pytest.raises(DataError, match="two images"):
        stratified_holdout(labels[:4], fraction=0.1, seed=0)
    with pytest.raises(DataError, match=r"Labels must lie in 0..2"):
        linear_probe(features, labels, *test, num_classes=3)
    with pytest.raises(DataError, match=r"\(200, 12\) and \(199,\)"):
        linear_probe(features, labels, *test, validation=(test[0], test[1][:-1]))


def test_one_image_per_class_takes_the_middle_of_the_grid() -> None:
    features, labels, *test = blobs(0.1)
    probe = linear_probe(features[:4], labels[:4], *test)
    assert probe.top1 == 100
    assert probe.l2 == 3e-3  # of 1, 0.3, ... 1e-5
    assert math.isnan(probe.holdout_top1)
    assert linear_probe(features[:4], labels[:4], *test, l2_grid=(1e-2, 1.0, 1e-1)).l2 == 1e-1


def test_validation_images_choose_the_strength_and_all_training_images_are_fitted() -> None:
    features, labels, test_features, test_labels = blobs(2.0, train=800, width=40)
    few, right, wrong = (
        (features[:80], labels[:80]),
        (features[80:], labels[80:]),
        (features[80:], (labels[80:] + 1) % 4),
    )
    chosen = linear_probe(*few, test_features, test_labels, validation=right)
    misled = linear_probe(*few, test_features, test_labels, validation=wrong)
    assert chosen.l2 < misled.l2 == 1.0  # where all is wrong, the least said is best
    x, x_right = standardize(few[0], right[0])
    losses = {
        l2: float(
            F.cross_entropy(F.linear(x_right, *minimize_cross_entropy(x, few[1], l2=l2, start=zeros(4, 40))), right[1])
        )
        for l2 in L2_GRID
    }
    assert chosen.l2 == min(losses, key=lambda l2: losses[l2])
    expected = minimize_cross_entropy(x, few[1], l2=chosen.l2, start=zeros(4, 40))
    logits = F.linear(few[0], chosen.weight, chosen.bias)
    torch.testing.assert_close(logits, F.linear(x, *expected), atol=1e-2, rtol=0)


def test_one_image_per_class_works_with_validation() -> None:
    features, labels, *test = blobs(0.5)
    probe = linear_probe(features[:4], labels[:4], *test, validation=(features[4:44], labels[4:44]))
    assert probe.l2 in L2_GRID
    assert probe.holdout_top1 > 90


def test_the_seed_has_no_say_where_validation_images_choose() -> None:
    features, labels, *test = blobs(2.0)
    first, second = (
        linear_probe(features[:200], labels[:200], *test, validation=(features[200:], labels[200:]), seed=seed)
        for seed in (0, 1)
    )
    assert same(first, second)


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_the_head_gives_the_probes_logits_on_features_as_they_are(shift: float) -> None:
    features, labels, test_features, test_labels = blobs(1.0)
    scale = 10 ** torch.linspace(-2, 2, 12)
    features, test_features = (features + shift) * scale, (test_features + shift) * scale
    fitted = fit_probe(features, labels, num_classes=4)
    head = fold_standardization(fitted.solution, fitted.standardization)
    raw = F.linear(test_features.double(), head.weight.double(), head.bias.double())
    torch.testing.assert_close(raw.float(), probe_logits(fitted, test_features), atol=1e-4 * (1 + shift), rtol=0)
    probe = linear_probe(features, labels, test_features, test_labels)
    assert torch.equal(probe.weight, head.weight)
    assert (F.linear(test_features, probe.weight, probe.bias).argmax(1) == probe.ranking[:, 0]).float().mean() > 0.99


def test_the_head_is_blind_to_a_constant_feature() -> None:
    features, labels, test_features, test_labels = blobs(1.0)
    wide, wide_test = (F.pad(part, (0, 1), value=0.1) for part in (features, test_features))
    probe = linear_probe(wide, labels, wide_test, test_labels)
    assert (probe.weight[:, -1] == 0).all()
    wide_test[:, -1] = 1e6
    assert (F.linear(wide_test, probe.weight, probe.bias).argmax(1) == probe.ranking[:, 0]).all()


def test_the_ranking_holds_the_best_five_classes_and_top_1_is_of_its_first() -> None:
    features, labels, test_features, test_labels = blobs(2.0)
    probe = linear_probe(features, labels, test_features, test_labels)
    assert probe.ranking.shape == (200, 4)
    assert (probe.ranking.sort(1).values == torch.arange(4)).all()
    assert probe.top1 == pytest.approx(100 * float((probe.ranking[:, 0] == test_labels).float().mean()))
    six = linear_probe(features, labels, test_features, test_labels, num_classes=6)
    assert six.ranking.shape == (200, 5)
    assert six.weight.shape == (6, 12)  # the last two have no training image
    assert (six.ranking[:, 0] < 4).all()
    assert six.top1 == pytest.approx(probe.top1, abs=1)


def test_classes_that_only_the_test_or_validation_images_have_count() -> None:
    features, labels, test_features, test_labels = blobs(0.1)
    probe = linear_probe(features[labels < 3], labels[labels < 3], test_features, test_labels)
    assert probe.top1 == 75
    assert len(probe.bias) == 4
    seen = test_labels < 3
    rare = linear_probe(features[labels < 3], labels[labels < 3], test_features[seen], test_labels[seen])
    assert len(rare.bias) == 3
    chosen = linear_probe(
        features[labels < 3],
        labels[labels < 3],
        test_features[seen],
        test_labels[seen],
        validation=(features, labels),
    )
    assert len(chosen.bias) == 4


def test_all_products_are_in_full_precision(monkeypatch):
    """TF32 would end the search early. Its flag is the host's, so what a GPU would be told is seen without one."""

    precisions = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "addmm"):
                precisions.add(torch.get_float32_matmul_precision())
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(probe_module, "exact_products", lambda _: exact_products(torch.device("cuda")))
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with Seen():
            linear_probe(torch.randn(40, 3), torch.arange(40) % 2, torch.randn(6, 3), torch.arange(6) % 2)
    finally:
        torch.set_float32_matmul_precision(chosen)
    assert precisions == {"highest"}
