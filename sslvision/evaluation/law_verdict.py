"""Whether a power law is to be believed: checks that can fail, each with its verdict in words and the numbers behind it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sslvision.evaluation.power_law import (
    PARAMETERS,
    SAMPLES,
    Bootstrap,
    Fit,
    Interval,
    bootstrap,
    draw_scatter,
    fit,
    fits,
)

ENOUGH = 5  # sizes: two thirds of them determine a law, and the others test it
SIGNIFICANT = 0.05
NEGLIGIBLE = 0.02  # an irreducible term that may be so small a share of the best score is not told from none
BENDS = 0.01  # probability of the scatter about the law below which the scores follow another curve


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it was passed, and the verdict in words."""

    name: str
    passed: bool
    words: str


@dataclass(frozen=True)
class Examined:
    """A law with its intervals and what speaks for and against it.

    Attributes:
        believed: Whether all checks that count were passed.
        checks: The checks.
        falls: Whether the fall is told from noise; without one there is nothing to extrapolate.
        irreducible: E.
        determined: Whether E is told from none; otherwise only its upper end is known.
        exponent: alpha.
        held_out: What the smaller two thirds of the sizes predict for the largest; None if they are too few.
        observed: Mean of the scores at the largest size.
        samples: The bootstrap, for further predictions.
    """

    believed: bool
    checks: tuple[Check, ...]
    falls: bool
    irreducible: Interval
    determined: bool
    exponent: Interval
    held_out: Interval | None
    observed: float
    samples: Bootstrap


def examine(x: Sequence[float], y: Sequence[float], sigma: Sequence[float], *, seed: int) -> Examined:
    """Fit a law and test it.

    Args:
        x, y, sigma: See `power_law.fit`.
        seed: Seed of all draws; the result is a function of the arguments.

    Raises:
        DataError: No law can be fitted.
    """
    fitted = fit(x, y, sigma)
    samples = bootstrap(fitted, seed=seed)
    held_out, observed = predict_largest(fitted, seed=seed)
    irreducible, best = samples.irreducible, float(fitted.y.min())
    falls = _falls(fitted, seed=seed)
    checks = (_enough(fitted), falls, _fits(fitted, seed=seed), *_predicts(fitted, held_out, observed))
    return Examined(
        believed=all(check.passed for check in checks),
        checks=checks,
        falls=falls.passed,
        irreducible=irreducible,
        determined=falls.passed and irreducible.low > NEGLIGIBLE * best,
        exponent=samples.exponent,
        held_out=held_out,
        observed=observed,
        samples=samples,
    )


def predict_largest(fitted: Fit, *, seed: int) -> tuple[Interval | None, float]:
    """Return what the smaller two thirds of the sizes predict for the scores at the largest, and the mean of these."""
    sizes = np.unique(fitted.x)
    largest = fitted.x == sizes[-1]
    observed, kept = float(fitted.y[largest].mean()), fitted.x <= sizes[smaller(len(sizes)) - 1]
    if smaller(len(sizes)) < PARAMETERS:
        return None, observed
    part = bootstrap(fit(fitted.x[kept], fitted.y[kept], fitted.sigma[kept]), seed=seed)
    of_mean = float(np.sqrt((fitted.sigma[largest] ** 2).sum())) / int(largest.sum())
    return part.score(float(sizes[-1]), of_mean), observed


def smaller(sizes: int) -> int:
    """Return the number of sizes in the smaller two thirds, rounded up, but never all."""
    return min(sizes - 1, -(-2 * sizes // 3))


def _enough(fitted: Fit) -> Check:
    sizes = len(np.unique(fitted.x))
    words = f"{sizes} sizes" if sizes >= ENOUGH else f"{sizes} sizes are too few to test a law: {ENOUGH} or more do"
    return Check("enough sizes", sizes >= ENOUGH, words)


def _falls(fitted: Fit, *, seed: int) -> Check:
    """Compare the fall with what noise alone would look like: the bootstrap of a constant, with the scatter about the law."""
    if fitted.law.reducible <= 0:
        return Check("falls", False, "the scores do not fall with size: there is no law to extrapolate")
    level = np.average(fitted.y, weights=fitted.sigma**-2.0)
    constant = float((((fitted.y - level) / fitted.sigma) ** 2).sum())
    rng = np.random.default_rng(seed)
    scatter = draw_scatter(fitted, rng, SAMPLES)[:, None]  # (B, 1)
    noise = level + rng.standard_normal((SAMPLES, len(fitted.x))) * scatter * fitted.sigma  # (B, n)
    levels = np.average(noise, axis=1, weights=fitted.sigma**-2.0)[:, None]  # (B, 1)
    of_constants = (((noise - levels) / fitted.sigma) ** 2).sum(axis=1)  # (B,)
    of_laws = fits(fitted.x, noise, fitted.sigma)[1]
    dof = max(1, fitted.dof)
    falls = (of_constants - of_laws) / np.maximum(1.0, of_laws / dof)
    probability = float((falls >= (constant - fitted.chi2) / max(1.0, fitted.chi2 / dof)).mean())
    passed = probability < SIGNIFICANT
    shown = "less than 0.001" if probability < 0.001 else f"{probability:.2g}"
    told = "" if passed else ": the exponent is not told from 0"
    return Check("falls", passed, f"noise alone would fall so far with probability {shown}{told}")


def _fits(fitted: Fit, *, seed: int) -> Check:
    """Compare the distance of the sizes from the law with the noise.

    With one score at each size, the noise is their standard errors. With several, it is also how far these scores differ from
    each other: the F test for lack of fit, in which trainings that differ more than test sets are no fault of the law.
    """
    sizes, number = np.unique(fitted.x, return_inverse=True)
    unknown = len(sizes) - PARAMETERS
    if not unknown:
        return Check(
            "fits", False, "there are no more sizes than unknowns, and a law goes through them whatever they are"
        )
    rng, repeats = np.random.default_rng(seed), len(fitted.x) - len(sizes)
    weights = fitted.sigma**-2.0
    means = np.bincount(number, weights * fitted.y) / np.bincount(number, weights)  # of each size
    within = float((weights * (fitted.y - means[number]) ** 2).sum())
    noise = max(1.0, within / repeats) if repeats else 1.0
    distance = max(0.0, fitted.chi2 - within) / unknown / noise
    expected = rng.chisquare(unknown, 10_000) / unknown
    if repeats:
        expected /= rng.chisquare(repeats, 10_000) / repeats
    probability = float((expected >= distance).mean())
    words = f"the sizes lie {np.sqrt(distance):.1f} times as far from the law as their noise tells"
    if probability >= BENDS:
        return Check("fits", True, words)
    either = "" if repeats else ", or trainings differ more than test sets (seeds=3 tells)"
    return Check("fits", False, f"{words}: the curve bends otherwise{either}")


def _predicts(fitted: Fit, held_out: Interval | None, observed: float) -> tuple[Check, ...]:
    """Check that the smaller two thirds predict the largest size, and closely enough for it to mean something."""
    if held_out is None:
        return (Check("predicts", False, "the smaller two thirds are too few to predict the largest"),)
    low, high = max(0.0, held_out.low), held_out.high  # an error is not negative, although noise about a law may be
    words = f"the smaller two thirds predict {low:.4g} to {high:.4g} for the largest, which has {observed:.4g}"
    inside = observed in held_out
    fall, width = float(np.ptp(fitted.y)), high - low
    wide = width > fall
    return (
        Check("predicts", inside, words if inside else f"{words}: outside"),
        Check(
            "precise",
            not wide,
            f"that interval is {width:.3g} wide; all sizes together span {fall:.3g}"
            + (": it excludes too little to be a test" if wide else ""),
        ),
    )


def as_json(examined: Examined) -> dict[str, object]:
    """Return what JSON can hold."""
    law = examined.samples.fit.law
    return {
        "believed": examined.believed,
        "irreducible": dataclasses.asdict(examined.irreducible),
        "irreducible_determined": examined.determined,
        "reducible_at_largest": float(law.reducible),
        "largest": law.x0,
        "exponent": dataclasses.asdict(examined.exponent),
        "held_out": None if examined.held_out is None else dataclasses.asdict(examined.held_out),
        "observed": examined.observed,
        "checks": [dataclasses.asdict(check) for check in examined.checks],
    }
