"""Power laws with an irreducible term, y = E + A x^-alpha: fitted to scores, and extrapolated with intervals.

Kaplan et al. 2020 (arXiv:2001.08361) fit one law to each of parameters, images and compute, without E; Hestness et al. 2017
(arXiv:1712.00409) and Hoffmann et al. 2022 (arXiv:2203.15556) have E. Here each law has one x, with all else held fixed: E
contains what all else costs.

For a fixed exponent, E and A are a linear least-squares problem with the bounds E >= 0 and A >= 0, solved in closed form. The
exponent is scanned: no starting values can mislead it. Deviation: scores are weighted by their standard errors; Hoffmann et al.
minimize a Huber loss of logarithms. A law goes through three scores, whose intervals then rest on the standard errors alone.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sslvision.errors import DataError

Array = NDArray[np.float64]

EXPONENTS = (0.01, 4.0)  # that are tried: a law with less is a constant, one with more a cliff
GRID, ZOOMS, ZOOMED = 60, 8, 7  # exponents tried at first, refinements, and exponents in each
PARAMETERS = 3
SAMPLES = 1000
LEVEL = 0.95
SURPRISE = 0.3  # probability of so much scatter, below which standard errors are not believed to be all of the noise

# n scores, B bootstrap samples, K exponents


@dataclass(frozen=True, eq=False)
class Laws:
    """One law or B of them, as arrays of the same shape.

    Attributes:
        irreducible: E, what no x can remove, in the unit of the scores.
        reducible: A x0^-alpha, the rest at x0.
        exponent: alpha.
        x0: The x at which `reducible` is given: the largest one of the fit.
    """

    irreducible: Array
    reducible: Array
    exponent: Array
    x0: float

    def __call__(self, x: ArrayLike) -> Array:
        """Return y at each x, of shape laws + x."""
        ratio = np.asarray(x, dtype=float) / self.x0
        expand = (..., *(np.newaxis,) * ratio.ndim)
        return self.irreducible[expand] + self.reducible[expand] * ratio ** -self.exponent[expand]


@dataclass(frozen=True, eq=False)
class Fit:
    """A law fitted to scores.

    Attributes:
        x, y: (n,) scores and where they were measured.
        sigma: (n,) standard errors of the scores, as far as they are known.
        law: The law with the least squared distance, in units of `sigma`.
        chi2: That distance.
    """

    x: Array
    y: Array
    sigma: Array
    law: Laws
    chi2: float

    @property
    def dof(self) -> int:
        """Return the number of scores beyond those that any law would fit."""
        return max(0, len(self.x) - PARAMETERS)


@dataclass(frozen=True)
class Interval:
    """An estimate and the interval that holds the true value with a probability of 95 %."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """Return whether a value lies in the interval."""
        return self.low <= value <= self.high


def fit(x: ArrayLike, y: ArrayLike, sigma: ArrayLike) -> Fit:
    """Fit a power law with an irreducible term.

    Args:
        x: (n,) parameters, images or updates, above 0; several scores may have the same x.
        y: (n,) errors or losses, which fall with x, 0 or more.
        sigma: (n,) standard errors of `y`, above 0. They weight the scores, and are the least scatter that is assumed.

    Raises:
        DataError: There are fewer than three different x, or a number is out of range or not finite.
    """
    x, y, sigma = (np.asarray(values, dtype=float) for values in (x, y, sigma))
    if not (x.ndim == 1 and x.shape == y.shape == sigma.shape):
        raise DataError(f"A power law needs x, y and sigma of one length, but got {x.shape}, {y.shape}, {sigma.shape}.")
    if not (np.isfinite([x, y, sigma]).all() and (x > 0).all() and (sigma > 0).all() and (y >= 0).all()):
        raise DataError("A power law needs finite scores, 0 or more, with x and standard errors above 0.")
    if len(np.unique(x)) < PARAMETERS:
        raise DataError(
            f"A power law has three unknowns, and {len(np.unique(x))} sizes cannot determine them: measure three at least, "
            "and five or more to test it."
        )
    law, chi2 = fits(x, y[None], sigma)
    return Fit(x, y, sigma, Laws(law.irreducible[0], law.reducible[0], law.exponent[0], law.x0), float(chi2[0]))


def fits(x: Array, y: Array, sigma: Array) -> tuple[Laws, Array]:
    """Fit a law to each of B sets of scores (B, n); return the laws (B,) and their squared distances (B,)."""
    low, high = np.log(EXPONENTS)
    exponents = np.exp(np.linspace(low, high, GRID))[None]  # (1, K)
    step = (high - low) / (GRID - 1)
    for zoom in range(ZOOMS + 1):
        irreducible, reducible, chi2 = _solve(x, y, sigma, exponents)  # (B, K)
        best = chi2.argmin(axis=1)[:, None]  # (B, 1)
        exponent = np.take_along_axis(np.broadcast_to(exponents, chi2.shape), best, axis=1)  # (B, 1)
        if zoom < ZOOMS:
            around = np.log(exponent) + step * np.linspace(-1, 1, ZOOMED)
            exponents, step = np.exp(around.clip(low, high)), 2 * step / (ZOOMED - 1)
    chosen = [np.take_along_axis(values, best, axis=1)[:, 0] for values in (irreducible, reducible, chi2)]
    return Laws(chosen[0], chosen[1], exponent[:, 0], float(x.max())), chosen[2]


def _solve(x: Array, y: Array, sigma: Array, exponents: Array) -> tuple[Array, Array, Array]:
    """Return E, A x0^-alpha and squared distance, each (B, K), of the best laws with given exponents (1 or B, K).

    Where the least squares are at a negative value, the best admissible one is 0: with two unknowns, that is exact.
    """
    weights = sigma**-2.0  # (n,)
    basis = (x / x.max()) ** -exponents[..., None]  # (1 or B, K, n)
    w, wt, wtt = weights.sum(), basis @ weights, basis**2 @ weights  # (1 or B, K)
    wy, wty = (y @ weights)[:, None], ((y * weights)[:, None] * basis).sum(-1)  # (B, 1), (B, K)
    slope = (w * wty - wt * wy) / np.maximum(w * wtt - wt**2, 1e-12 * w * wtt)
    level = (wy - slope * wt) / w
    flat, free = slope < 0, level >= 0
    slope = np.where(flat, 0.0, np.where(free, slope, wty / wtt))
    level = np.where(flat, wy / w, np.where(free, level, 0.0))
    residuals = (y[:, None] - level[..., None] - slope[..., None] * basis) / sigma  # (B, K, n)
    return level, slope, (residuals**2).sum(-1)


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """What the fit could have been had the noise been another: B laws, and how far scores scatter about each.

    Attributes:
        fit: The fit.
        laws: (B,) laws.
        scatter: (B,) multiples of the standard errors.
        rng: Random numbers for the noise of further scores.
    """

    fit: Fit
    laws: Laws
    scatter: Array
    rng: np.random.Generator

    def law(self, x: float) -> Interval:
        """Return the law at x."""
        return _interval(float(self.fit.law(x)), self.laws(x))

    def score(self, x: float, sigma: float) -> Interval:
        """Return what a further score at x with a standard error would be: the law, and its own noise."""
        noise = self.rng.standard_normal(len(self.scatter)) * self.scatter * sigma
        return _interval(float(self.fit.law(x)), self.laws(x) + noise)

    @property
    def exponent(self) -> Interval:
        """Return the exponent; of samples without a fall, which have none, it is 0."""
        falls = self.laws.reducible > 0
        value = float(self.fit.law.exponent) if self.fit.law.reducible > 0 else 0.0
        return _interval(value, np.where(falls, self.laws.exponent, 0.0))

    @property
    def irreducible(self) -> Interval:
        """Return the irreducible term."""
        return _interval(float(self.fit.law.irreducible), self.laws.irreducible)


def bootstrap(fitted: Fit, *, seed: int, samples: int = SAMPLES) -> Bootstrap:
    """Return the parametric bootstrap of a fit: laws fitted to scores that are drawn about the law.

    Noise has the standard errors of the scores. Where the scores scatter more than these make likely, it has their scatter,
    which is itself known only as well as its degrees of freedom allow: it is drawn from what they leave possible.

    Args:
        fitted: The fit.
        seed: Seed of the draws; the result is a function of the arguments.
        samples: B.
    """
    rng = np.random.default_rng(seed)
    scatter = draw_scatter(fitted, rng, samples)
    noise = rng.standard_normal((samples, len(fitted.x))) * scatter[:, None] * fitted.sigma
    laws, _ = fits(fitted.x, np.maximum(fitted.law(fitted.x) + noise, 0.0), fitted.sigma)
    return Bootstrap(fitted, laws, scatter, rng)


def draw_scatter(fitted: Fit, rng: np.random.Generator, samples: int) -> Array:
    """Draw by how much more than their standard errors scores may scatter: (B,) multiples, 1 or more."""
    if not fitted.dof:
        return np.ones(samples)
    expected = rng.chisquare(fitted.dof, samples)  # squared distances, were the standard errors all of the noise
    if (expected >= fitted.chi2).mean() >= SURPRISE:
        return np.ones(samples)
    return np.maximum(1.0, np.sqrt(fitted.chi2 / expected))


def _interval(value: float, samples: Array) -> Interval:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
