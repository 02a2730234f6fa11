"""What is read from learning curves: each rule on curves made for it, and silence where a run is healthy."""

import math

import numpy as np
import pytest

from sslvision.evaluation.learning_curves import read_curves

ROWS = 120
AT = np.arange(1, ROWS + 1) / ROWS  # share of the run
COSINE = 0.5 * (1 + np.cos(np.pi * AT))
LN_10 = math.log(10)


def noisy(values, share=0.01, seed=0):
    values = np.asarray(values, float)
    return values * (1 + share * np.random.default_rng(seed).standard_normal(len(values)))


def pretraining(loss, lr=COSINE, **more):
    """Metrics of 1,200 updates, with what `read_metrics` returns."""
    columns = {
        "step": 1200 * AT,
        "epoch": 20 * AT,
        "loss": loss,
        "lr": 1e-3 * lr,
        "weight_decay": 0.05 + 0 * AT,
        **more,
    }
    return {name: [float(value) for value in column] for name, column in columns.items()}


def finetuning(train, validation, validation_loss, loss=None):
    """Metrics of fine-tuning, with validations in rows of their own."""
    loss = noisy(2.3 * np.exp(-6 * AT) + 0.05) if loss is None else loss
    metrics = pretraining(loss, train_top1=np.clip(train, 0, 100))
    rows = range(5, ROWS, 6)
    for name, values in (("val_top1", validation), ("val_loss", validation_loss)):
        metrics[name] = [float(values[row]) if row in rows else None for row in range(ROWS)]
    return metrics


def rules(metrics, kind="mae", chance_loss=1.0, **options):
    return [one.rule for one in read_curves(metrics, kind=kind, chance_loss=chance_loss, **options)]


def rules_of_classifier(metrics, **options):
    return rules(metrics, "supervised", LN_10, **options)


POWER = 0.3 + 0.9 * (1 + 40 * AT) ** -0.8  # a healthy loss: fast at first, slow at last


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_said_of_a_healthy_loss(seed):
    assert rules(pretraining(noisy(POWER, 0.02, seed))) == []


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_said_of_a_healthy_classifier(seed):
    train = noisy(96 - 60 * np.exp(-8 * AT), 0.02, seed)
    validation = noisy(91 - 40 * np.exp(-10 * AT), 0.01, seed + 100)
    metrics = finetuning(train, validation, noisy(0.3 + np.exp(-10 * AT), 0.05, seed))
    assert rules_of_classifier(metrics, validation_images=1000) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_rises_again_or_leaps_at_first_is_diverging(seed):
    again = np.where(AT < 0.4, POWER, POWER + 3 * (AT - 0.4))
    leaps = POWER + 8 * np.exp(-(((AT - 0.15) / 0.05) ** 2))
    for loss in (again, leaps):
        assert rules(pretraining(noisy(loss, 0.02, seed))) == ["diverging"]


def test_a_loss_that_is_often_not_finite_is_diverging_for_dino_too():
    loss = np.where(AT > 0.9, np.nan, 5.0)
    for kind in ("mae", "dino"):
        assert rules(pretraining(loss), kind) == ["diverging"]


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_hardly_moves_is_flat_and_ten_times_the_rate_is_advised(seed):
    metrics = pretraining(noisy(1.2 - 0.01 * AT, 0.01, seed))
    (reading,) = read_curves(metrics, kind="mae", settings={"base_lr": 1.6e-5, "lr": None})
    assert (reading.rule, reading.words) == ("flat", ("base_lr=0.00016",))


def test_a_warm_up_as_long_as_the_run_is_named_as_the_cause_of_a_flat_loss():
    settings = {"base_lr": 1e-3, "epochs": 20, "method": {"warmup_epochs": 40}}
    (reading,) = read_curves(pretraining(noisy(1.2 + 0 * AT), lr=AT), kind="mae", settings=settings)
    assert (reading.rule, reading.words) == ("flat", ("warmup_epochs=2",))


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_falls_late_has_a_slow_start_for_which_a_long_warm_up_is_blamed_if_there_is_one(seed):
    late = np.where(AT < 0.4, 1.2, 0.3 + 0.9 * np.exp(-8 * (AT - 0.4)))
    (reading,) = read_curves(pretraining(noisy(late, 0.01, seed)), kind="mae", settings={"base_lr": 1e-3})
    assert (reading.rule, reading.words) == ("slow_start", ("base_lr=0.003",))
    warming = np.where(AT < 0.4, AT / 0.4, 0.5 * (1 + np.cos(np.pi * (AT - 0.4) / 0.6)))
    settings = {"base_lr": 1e-3, "epochs": 20, "method": {"warmup_epochs": 8}}
    (reading,) = read_curves(pretraining(noisy(late, 0.01, seed), lr=warming), kind="mae", settings=settings)
    assert (reading.rule, reading.words) == ("slow_start", ("warmup_epochs=2",))


@pytest.mark.parametrize("seed", range(3))
def test_a_drop_of_the_rate_while_the_loss_still_falls_is_told_and_one_on_a_plateau_is_not(seed):
    step = np.where(AT < 0.2, 1.0, 0.02)
    early = np.where(AT < 0.2, 1.2 - 2.5 * AT, 0.7 - 0.05 * (AT - 0.2))
    (reading,) = read_curves(pretraining(noisy(early, 0.01, seed), lr=step), kind="mae", settings={"epochs": 23})
    assert (reading.rule, reading.words) == ("decayed_early", ("epochs=46",))
    assert "after 19 % of the updates" in reading.sentence
    plateau = 0.6 + 0.6 * np.exp(-12 * AT) - 0.1 * (AT > 0.6)
    assert rules(pretraining(noisy(plateau, 0.01, seed), lr=np.where(AT < 0.6, 1.0, 0.1))) == []
    assert rules(pretraining(noisy(POWER, 0.01, seed), lr=step)) == []  # slows by itself


@pytest.mark.parametrize("seed", range(3))
def test_training_learned_and_validation_at_chance_points_to_the_labels(seed):
    train = noisy(100 * AT**0.5, 0.02, seed)
    metrics = finetuning(train, noisy(10 + 0 * AT, 0.1, seed), noisy(2.3 + 3 * AT, 0.02, seed))
    (reading,) = read_curves(metrics, kind="supervised", chance_loss=LN_10, validation_images=300)
    assert (reading.rule, reading.words) == ("validation_at_chance", ())


@pytest.mark.parametrize("seed", range(3))
def test_train_and_validation_apart_is_overfitting_and_unused_regularizers_are_advised(seed):
    train, validation = noisy(100 - 40 * np.exp(-20 * AT), 0.005, seed), noisy(60 - 5 * np.exp(-9 * AT), 0.02, seed)
    metrics = finetuning(train, validation, noisy(1.2 + AT, 0.03, seed))
    settings = {"labels_per_class": 2, "method": {"mixup": 0.0, "label_smoothing": 0.1}, "backbone": {}, "patience": 0}
    readings = read_curves(metrics, kind="supervised", settings=settings, chance_loss=LN_10, validation_images=200)
    assert [one.rule for one in readings] == ["overfitting"]
    assert "mixup=0.8" in readings[0].words
    assert "label_smoothing=0.1" not in readings[0].words  # it is on
    assert "labels_per_class=4" in readings[0].advice
    assert "patience=5" in readings[0].advice


def test_a_gap_that_few_validation_images_explain_is_no_overfitting():
    train, validation = 100 - 40 * np.exp(-20 * AT), 85 - 5 * np.exp(-9 * AT)
    metrics = finetuning(train, validation, 0.5 + 0 * AT)
    assert rules_of_classifier(metrics, validation_images=12) == []
    assert rules_of_classifier(metrics, validation_images=1200) == ["overfitting"]


def test_low_training_accuracy_under_mixup_is_nothing_to_tell():
    metrics = finetuning(noisy(45 - 20 * np.exp(-8 * AT)), noisy(83 - 30 * np.exp(-10 * AT)), 0.7 + np.exp(-10 * AT))
    assert rules_of_classifier(metrics, settings={"method": {"mixup": 0.8, "cutmix": 1.0}}) == []


@pytest.mark.parametrize("seed", range(3))
def test_train_and_validation_together_and_poor_is_underfitting(seed):
    train, validation = noisy(55 - 30 * np.exp(-8 * AT), 0.03, seed), noisy(54 - 30 * np.exp(-9 * AT), 0.02, seed)
    metrics = finetuning(train, validation, 1.3 + np.exp(-9 * AT), loss=noisy(1.3 + np.exp(-9 * AT), 0.02, seed))
    settings = {"epochs": 20, "min_updates": 300, "lr_ratio": 0.1}
    (reading,) = read_curves(metrics, kind="supervised", settings=settings, chance_loss=LN_10, validation_images=1000)
    assert (reading.rule, reading.words) == ("underfitting", ("epochs=40", "lr_ratio=0.3"))


def test_underfitting_at_chance_says_that_labels_may_be_the_cause():
    guessed = finetuning(noisy(12 + 0 * AT, 0.1), noisy(10 + 0 * AT, 0.1), 2.3 + 0 * AT, loss=noisy(2.4 - 0.3 * AT))
    (reading, *_) = read_curves(guessed, kind="supervised", chance_loss=LN_10, validation_images=300)
    assert reading.rule == "underfitting"
    assert "labels do not fit" in reading.advice


@pytest.mark.parametrize("seed", range(3))
def test_strong_dropout_is_named_where_training_images_do_worse_than_validation_images(seed):
    train, validation = noisy(40 - 20 * np.exp(-8 * AT), 0.05, seed), noisy(80 - 30 * np.exp(-9 * AT), 0.01, seed)
    metrics = finetuning(train, validation, 0.8 + np.exp(-9 * AT))
    settings = {"backbone": {"drop_rate": 0.9}}
    (reading,) = read_curves(metrics, kind="supervised", settings=settings, chance_loss=LN_10, validation_images=300)
    assert (reading.rule, reading.words) == ("overregularized", ("backbone.drop_rate=0",))


def test_features_that_are_no_better_than_untrained_ones_are_told_for_every_method():
    metrics = pretraining(noisy(POWER)) | {"knn_top1": [None] * (ROWS - 1) + [62.0]}
    metrics |= {"untrained_knn_top1": [None] * (ROWS - 1) + [61.5]}
    for kind in ("mae", "dino", "SimSiam"):
        assert rules(metrics, kind, validation_images=2000) == ["underfitting"]
    metrics["knn_top1"][-1] = 70.0
    assert rules(metrics, validation_images=2000) == []


def knn_curve(*values):
    at = np.linspace(ROWS / len(values), ROWS, len(values)).round().astype(int) - 1
    column = [None] * ROWS
    for row, value in zip(at, values, strict=True):
        column[row] = value
    return pretraining(noisy(POWER)) | {"knn_top1": column}


def test_k_nn_accuracy_that_falls_or_rises_at_the_end_is_told_beyond_its_random_error():
    assert rules(knn_curve(60, 75, 74, 66), validation_images=2000) == ["degrading"]
    assert rules(knn_curve(60, 66, 72, 78), validation_images=2000) == ["unfinished"]
    assert rules(knn_curve(60, 66, 72, 78), validation_images=50) == []
    assert rules(knn_curve(60, 75, 80, 81), validation_images=2000) == []


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_falls_steadily_to_the_end_is_unfinished_and_the_setting_of_its_length_is_doubled(seed):
    metrics = pretraining(noisy(1.2 - 0.8 * AT, 0.01, seed), lr=np.ones(ROWS))
    for settings, words in (
        ({"epochs": 23, "budget": None}, ("epochs=46",)),
        ({"epochs": 100, "budget": "20m"}, ("budget=40m",)),
        ({"epochs": 2, "min_updates": 300}, ("min_updates=600",)),
        (None, ("epochs=40",)),
    ):
        (reading,) = read_curves(metrics, kind="mae", settings=settings)
        assert (reading.rule, reading.words) == ("unfinished", words)


@pytest.mark.parametrize("seed", range(3))
def test_scatter_that_hides_the_fall_is_noise_and_larger_batches_at_the_same_rate_are_advised(seed):
    loss = 1.2 - 0.3 * (1 - np.exp(-6 * AT)) + 0.25 * np.random.default_rng(seed).standard_normal(ROWS)
    (reading,) = read_curves(pretraining(loss), kind="mae", settings={"batch_size": 16, "base_lr": 0.016})
    assert (reading.rule, reading.words) == ("noisy", ("batch_size=64", "base_lr=0.004"))


def test_a_run_of_a_few_logged_values_is_not_judged():
    metrics = {name: column[:8] for name, column in pretraining(noisy(1.2 + 0 * AT)).items()}
    metrics |= {"knn_top1": [None] * 7 + [60.0], "untrained_knn_top1": [None] * 7 + [60.0]}
    assert rules(metrics) == []
    assert rules({}) == []
