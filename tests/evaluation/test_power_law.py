"""Power laws: known ones are found, intervals cover, and what is no law is not believed."""

import numpy as np
import pytest

from sslvision.errors import DataError
from sslvision.evaluation.law_verdict import examine
from sslvision.evaluation.power_law import bootstrap, fit

SIZES = 1000 * 2.0 ** np.arange(6)


def law(irreducible, reducible, exponent, x=SIZES):
    return irreducible + reducible * (x / SIZES[-1]) ** -exponent


@pytest.mark.parametrize("unit", [1e-9, 1.0, 1e12])
@pytest.mark.parametrize(
    ("irreducible", "reducible", "exponent"), [(10, 10, 0.5), (0, 3, 0.1), (0.2, 0.01, 1.5), (40, 2, 3)]
)
def test_exact_scores_give_back_their_law_whatever_the_unit_of_x(irreducible, reducible, exponent, unit):
    y = law(irreducible, reducible, exponent)
    fitted = fit(unit * SIZES, y, np.full(6, 0.1))
    assert fitted.law(unit * SIZES) == pytest.approx(y, rel=1e-3)
    assert fitted.law.exponent == pytest.approx(exponent, rel=0.03)
    assert fitted.law.irreducible == pytest.approx(irreducible, abs=0.01 * y[0])


def test_no_other_law_on_a_grid_is_closer_and_neither_term_is_negative():
    rng = np.random.default_rng(0)
    for _ in range(20):
        y = np.abs(law(rng.uniform(0, 2), rng.uniform(0, 3), rng.uniform(0.1, 2)) + rng.normal(size=6))
        sigma = rng.uniform(0.1, 1, size=6)
        fitted = fit(SIZES, y, sigma)
        assert fitted.law.irreducible >= 0
        assert fitted.law.reducible >= 0
        e, a, alpha, x = np.ix_(
            np.linspace(0, y.max(), 30), np.linspace(0, y.max(), 30), np.geomspace(0.01, 4, 30), SIZES
        )
        tried = (((y - law(e, a, alpha, x)) / sigma) ** 2).sum(-1)
        assert fitted.chi2 <= tried.min() * (1 + 1e-6)


@pytest.mark.parametrize("scatter", [1.0, 2.0])
def test_intervals_cover_the_truth_about_as_often_as_they_say(scatter):
    rng = np.random.default_rng(1)
    truth, covered = float(law(10, 10, 0.5, 10 * SIZES[-1])), []
    for trial in range(200):
        sigma = np.full(6, 0.3)
        fitted = fit(SIZES, law(10, 10, 0.5) + scatter * sigma * rng.normal(size=6), sigma)
        found = bootstrap(fitted, seed=trial, samples=300)
        covered.append((truth in found.law(10 * SIZES[-1]), 0.5 in found.exponent, 10 in found.irreducible))
    assert np.mean(covered, axis=0) == pytest.approx(0.95, abs=0.05 if scatter == 1 else 0.08)


def test_the_bootstrap_is_a_function_of_its_seed():
    fitted = fit(SIZES, law(10, 10, 0.5) + np.array([0.3, -0.2, 0.1, 0, 0.2, -0.3]), np.full(6, 0.3))
    one, same, other = (bootstrap(fitted, seed=seed).law(1e6) for seed in (0, 0, 1))
    assert one == same != other


def test_laws_are_believed_and_predict_the_largest_from_the_smaller_two_thirds():
    x, believed, predicted = np.repeat(SIZES, 2), [], []
    for trial in range(20):
        y = law(15, 10, 0.5, x) + 0.3 * np.random.default_rng(trial).normal(size=12)
        examined = examine(x, y, np.full(12, 0.3), seed=0)
        assert examined.determined
        believed.append(examined.believed)
        predicted.append(examined.observed in examined.held_out)
    assert sum(believed) >= 17
    assert sum(predicted) >= 18


def test_a_law_without_an_irreducible_term_bounds_it_only():
    examined = examine(SIZES, law(0, 10, 0.5), np.full(6, 0.3), seed=0)
    assert not examined.determined
    assert 0 < examined.irreducible.high < 10


FAILURES = {
    "rises": (law(5, 10, -0.5), "falls"),
    "is constant": (np.full(6, 20.0), "falls"),
    "is noise": (20 + 0.3 * np.array([0.5, -1, 0.8, -0.4, 1, -0.7]), "falls"),
    "drops late": (np.array([40, 40, 39.5, 39, 30, 20.0]), "predicts"),
    "turns upward": (np.array([40, 33, 28, 25, 24, 27.0]), "predicts"),
    "zigzags": (law(10, 10, 0.5) + np.array([3, -3, 3, -3, 3, -3]), "fits"),
}


@pytest.mark.parametrize("curve", FAILURES)
def test_what_is_no_power_law_is_not_believed_and_the_reason_is_named(curve):
    y, reason = FAILURES[curve]
    examined = examine(SIZES, y, np.full(6, 0.3), seed=0)
    assert not examined.believed
    assert reason in [check.name for check in examined.checks if not check.passed]


def test_few_sizes_are_too_few_to_believe_and_fewer_are_refused():
    examined = examine(SIZES[:4], law(10, 10, 0.5)[:4], np.full(4, 0.1), seed=0)
    assert "enough sizes" in [check.name for check in examined.checks if not check.passed]
    with pytest.raises(DataError, match=r"three unknowns, and 2 sizes cannot"):
        examine([1, 1, 2, 2], [3, 3.1, 2, 2.1], [0.1] * 4, seed=0)


@pytest.mark.e2e
def test_trainings_that_differ_more_than_test_sets_are_no_fault_of_a_law_if_seeds_show_it_but_a_bend_is():
    x, seeds, passed = np.repeat(SIZES, 3), np.random.default_rng(2), {"law": 0, "bend": 0, "one seed": 0}
    bend = 10 * np.log2(x / SIZES[0]) * (5 - np.log2(x / SIZES[0])) / 6.25  # 0 at both ends, 10 between
    for _ in range(30):
        noise = 1.2 * seeds.normal(size=18)  # four times the standard error
        cases = {
            "law": (x, law(15, 10, 0.5, x) + noise),
            "bend": (x, law(15, 10, 0.5, x) + bend + noise),
            "one seed": (SIZES, law(15, 10, 0.5) + noise[::3]),
        }
        for name, (sizes, y) in cases.items():
            checks = examine(sizes, y, np.full(len(y), 0.3), seed=0).checks
            passed[name] += next(check.passed for check in checks if check.name == "fits")
    assert passed["law"] >= 27
    assert passed["bend"] <= 3
    assert passed["one seed"] <= 8


@pytest.mark.e2e
@pytest.mark.parametrize("scatter", [1.0, 3.0])
def test_noise_without_a_law_is_rarely_told_to_fall_however_large_it_is(scatter):
    rng, told = np.random.default_rng(3), 0
    for trial in range(100):
        y = 20 + 0.3 * scatter * rng.normal(size=6)
        checks = examine(SIZES, y, np.full(6, 0.3), seed=trial).checks
        told += next(check.passed for check in checks if check.name == "falls")
    assert told <= 10  # 5 are expected


@pytest.mark.parametrize(
    ("x", "y", "sigma"),
    [
        ([1, 2, 4], [3, float("nan"), 1], [1, 1, 1]),
        ([0, 2, 4], [3, 2, 1], [1, 1, 1]),
        ([1, 2, 4], [3, 2, -1], [1, 1, 1]),
        ([1, 2, 4], [3, 2, 1], [1, 0, 1]),
    ],
)
def test_scores_that_cannot_be_are_refused(x, y, sigma):
    with pytest.raises(DataError, match="finite scores"):
        fit(x, y, sigma)


def test_a_prediction_too_wide_to_fail_is_no_test():
    examined = examine(SIZES, law(10, 10, 0.5), np.full(6, 15.0), seed=0)
    assert examined.observed in examined.held_out
    assert "precise" in [check.name for check in examined.checks if not check.passed]
