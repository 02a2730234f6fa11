"""Estimates of the time left, on trainings whose cost is known."""

import pytest

from sslvision.workflows.time_left import Training, estimate, in_words


def cost(arm: str, updates: int, batch_size: int, *, fixed: float = 2.0, each: float = 0.01) -> Training:
    """A training that has ended: a fixed time, and a time for each image of an update."""
    return Training(arm, updates, batch_size, fixed + each * updates * batch_size)


def test_two_sizes_of_a_batch_tell_what_a_larger_one_takes() -> None:
    ended = [cost("full", 20, 3), cost("full", 20, 15)]
    left = [Training("full", 20, 64), Training("full", 100, 64)]
    expected = sum(cost("full", one.updates, 64).seconds for one in left)
    assert estimate(left, ended) == pytest.approx((expected, expected))


def test_each_arm_is_estimated_by_its_own_trainings() -> None:
    ended = [cost(arm, 20, size, each=each) for arm, each in (("partial", 0.01), ("full", 0.1)) for size in (3, 30)]
    assert estimate([Training("full", 20, 64)], ended) == pytest.approx((2 + 128, 2 + 128))
    assert estimate([Training("partial", 20, 64)], ended) == pytest.approx((2 + 12.8, 2 + 12.8))


@pytest.mark.parametrize(("fixed", "each"), [(4.0, 0.0), (0.0, 0.05), (1.0, 0.01)])
def test_of_one_size_only_there_are_two_bounds_that_contain_the_truth(fixed: float, each: float) -> None:
    left, ended = [Training("full", 20, 64)] * 3, [cost("full", 20, 3, fixed=fixed, each=each)] * 2
    least, most = estimate(left, ended)
    truth = 3 * cost("full", 20, 64, fixed=fixed, each=each).seconds
    assert least <= truth + 1e-9
    assert truth - 1e-9 <= most
    assert most > 10 * least


def test_trainings_of_the_size_that_has_ended_need_no_bounds() -> None:
    least, most = estimate([Training("full", 20, 3)] * 2, [cost("full", 20, 3)])
    assert least == most == pytest.approx(2 * 2.6)


def test_noise_makes_no_time_negative() -> None:
    faster_when_larger = [Training("full", 20, 3, 5.0), Training("full", 20, 15, 1.0)]
    steep = [Training("full", 20, 3, 0.1), Training("full", 20, 15, 9.0)]
    for ended in (faster_when_larger, steep):
        least, most = estimate([Training("full", 20, 1), Training("full", 20, 64)], ended)
        assert 0 < least <= most


def test_words_have_one_time_or_two() -> None:
    assert in_words((300.2, 300.2)) == "about 0:05:00 left"
    assert in_words((60, 600)) == "about 0:01:00 to 0:10:00 left"
    assert in_words((0.1, 0.9)) == "about 0:00:01 left"
