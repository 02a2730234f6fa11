"""How much a setting explains: of planted effects most, of noise nothing."""

import numpy as np
import pytest

from sslvision.evaluation.importance import importance, ranks


def test_an_optimum_inside_the_range_is_seen_and_noise_explains_nothing_on_average():
    rates = np.geomspace(1e-4, 1e-1, 12)
    scores = -((np.log(rates) - np.log(3e-3)) ** 2)
    assert importance(rates.tolist(), scores.tolist(), log=True) > 0.8
    random = np.random.default_rng(0)
    noise = [importance(random.random(12).tolist(), random.random(12).tolist()) for _ in range(200)]
    assert np.mean(noise) < 0.1


def test_listed_values_count_by_their_means():
    words = ["adamw", "muon", "sgd"] * 4
    assert importance(words, [{"adamw": 80.0, "muon": 82.0, "sgd": 40.0}[word] for word in words]) == pytest.approx(1)
    assert importance(["a", "b"] * 4, [1.0, 1, 2, 2, 3, 3, 4, 4]) == 0


def test_what_cannot_be_told_is_none_and_one_diverged_trial_does_not_hide_the_rest():
    assert importance([1.0, 2, 3, 4], [1.0, 2, 3, 4]) is None
    assert importance([], []) is None
    assert importance([1.0] * 6, [1.0, 2, 3, 4, 5, 6]) is None
    assert importance([1.0, 2, 3, 4, 5, 6], [5.0] * 6) is None
    other = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.5]
    scores = [80 + 5 * value for value in other[:-1]] + [0.0]
    assert importance(other[:-1], scores[:-1]) > 0.95
    assert importance(other, scores) > 0.3
    assert ranks([3.0, 1.0, 3.0]).tolist() == [2.5, 1, 2.5]
