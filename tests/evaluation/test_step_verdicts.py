"""The verdicts of the steps on planted faults: each is named, with its numbers, and what is sound passes."""

import dataclasses
import math
import re

import pytest

from sslvision.evaluation.step_verdicts import (
    Start,
    Tried,
    initial_loss,
    judge_grid,
    judge_rates,
    overfit,
    regularized,
    regularizers_of,
)

SOUND = Start("supervised", 2.31, 10, 0.0, gradient=1.0, pixel_mean=0.02, pixel_std=0.98, spread=0.3)


def test_a_sound_start_agrees_with_theory_for_each_method():
    for start, theory in (
        (SOUND, r"ln 10 = 2\.3"),
        (dataclasses.replace(SOUND, kind="dino", loss=6.95, outputs=1024), r"ln 1,024 = 6\.93"),
        (
            dataclasses.replace(SOUND, kind="mae", loss=1.42, targets=0.97, predictions=0.4, norm_pix=True),
            r"1\.37: the mean square of the pixels normalized by patch .*, 0\.97, and 0\.4 of the first",
        ),
    ):
        verdict = initial_loss(start)
        assert verdict.passed
        assert verdict.words.endswith("They agree.")
        assert re.search(theory, verdict.words)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (
            {"loss": 900.0, "pixel_mean": -70.0, "pixel_std": 255.0},
            "normalization: pixels have mean -70 and deviation 255",
        ),
        ({"loss": 2.3026, "spread": 0.0, "gradient": 0.0}, "initialization: the network is dead"),
        ({"loss": 9.0}, "initialization: the loss is 3.9 times"),
        ({"loss": 0.4}, "labels: the loss is 0.17 of"),
        ({"loss": math.nan}, "it is not finite"),
    ],
)
def test_a_fault_of_the_start_is_named(fault, named):
    verdict = initial_loss(dataclasses.replace(SOUND, **fault))
    assert not verdict.passed
    assert named in verdict.words
    assert verdict.advice
    if "pixel_std" in fault:
        assert "values 0..255" in verdict.words


def test_a_handful_is_learned_or_it_is_said_why_not():
    falling = [2.3 * 0.98**step for step in range(200)]
    assert overfit("supervised", falling, accuracy=100, images=20).passed
    assert overfit("mae", falling, accuracy=None, images=16).passed
    assert overfit("dino", [5.0, 4.0, 3.9] * 10, accuracy=None, images=16).passed
    for losses, advice in (
        ([2.3, 2.4, 3.0, 4.0] * 10, "rate is too high"),
        ([2.3, math.nan], "rate is too high"),
        ([2.3] * 100, "rate is too low, or the initialization"),
        ([2.3 - 0.006 * step for step in range(100)], "falls slowly"),
    ):
        verdict = overfit("supervised", losses, accuracy=30, images=20)
        assert not verdict.passed
        assert advice in verdict.advice


def test_dropout_and_weight_decay_that_keep_a_handful_from_being_learned_are_named():
    for strong in ({"drop_rate": 0.9}, {"weight_decay": 10.0}):
        verdict = regularized("supervised", 1.0, 0.4, {**strong, "label_smoothing": 0.1})
        assert not verdict.passed
        assert next(iter(strong)) in verdict.words
        assert "label_smoothing" not in verdict.words
    assert regularized("supervised", 1.0, 1.0, {"weight_decay": 0.05}).passed
    assert regularizers_of({"weight_decay": 0.05, "mixup": 0.0, "optimizer": "muon"}, {"drop_rate": 0.9}) == {
        "weight_decay": 0.05,
        "drop_rate": 0.9,
    }


@pytest.mark.parametrize(
    ("factor", "told"), [(30, "too high, 30 times"), (1 / 30, "too low, 1/30"), (2, "among them or near")]
)
def test_a_rate_that_is_thirty_times_off_is_named_on_both_sides(factor, told):
    tried = [
        Tried(1e-3 * 10 ** (place / 2), gain)
        for place, gain in enumerate([0.05, 0.2, 0.5, 0.3, math.nan, math.nan], -2)
    ]
    verdict, best = judge_rates(tried, own=1e-3 * factor, name="base_lr")
    assert best == pytest.approx(1e-3)
    assert told in verdict.words
    assert "0.01" in verdict.words  # from where on it diverges
    assert (verdict.advice == "Take base_lr=0.001.") == (factor != 2)


def test_a_rate_that_trains_but_learns_clearly_less_than_a_tenth_of_it_is_too_high():
    """Muon does not diverge at 30 times the best rate: the losses of recipe=mae base_lr=0.48, 100 updates each."""
    gains = {0.0048: 0.795, 0.0152: 0.835, 0.048: 0.846, 0.152: 0.798, 0.48: 0.692, 4.8: -21.5}
    tried = [Tried(rate, gain) for rate, gain in gains.items()]
    assert "The recipe's 0.48 is too high, 10 times" in judge_rates(tried, own=0.48, name="base_lr")[0].words
    assert "among them or near" in judge_rates(tried, own=0.152, name="base_lr")[0].words


def test_where_nothing_learns_the_rate_step_stops():
    verdict, best = judge_rates([Tried(1e-3, -0.1), Tried(1e-2, math.nan)], own=1e-3, name="lr")
    assert not verdict.passed
    assert best is None


def test_a_weight_decay_that_is_off_is_named_by_the_grid_and_shuffled_labels_by_chance():
    cells = [
        {"rate": 1e-3, "weight_decay": decay, "score": score}
        for decay, score in ((0.0, 80.0), (1e-4, 81.0), (10.0, 30.0))
    ]
    verdict = judge_grid(cells, own_decay=10.0, objective="k-NN", chance=10.0, sigma=1.0)
    assert verdict.passed
    assert "The recipe's weight decay of 10 is too strong or too weak: 30" in verdict.words
    assert judge_grid(cells, own_decay=1e-4, objective="k-NN", chance=10.0, sigma=1.0).advice == ""
    shuffled = [{**cell, "score": 11.0} for cell in cells]
    verdict = judge_grid(shuffled, own_decay=0.0, objective="k-NN", chance=10.0, sigma=1.0)
    assert not verdict.passed
    assert "Shuffled labels" in verdict.advice
