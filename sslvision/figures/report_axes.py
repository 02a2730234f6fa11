"""Axes of the charts of a report: their ranges, and round numbers on them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

MANTISSAS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,))
NARROW = 1.5  # ratio of the ends of a logarithmic axis below which even steps make better ticks


class Axis(NamedTuple):
    """The range of an axis, its ticks with their texts, and whether it is logarithmic."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def at(self, value: float) -> float:
        """Return where a value is, from 0 to 1."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def axis_around(values: Sequence[float]) -> Axis:
    """Return an axis around values, with about five ticks at round numbers."""
    low, high = min(values), max(values)
    flat = high - low < 1e-9 * max(abs(low), abs(high), 1e-300)
    margin = (abs(high) / 10 or 1.0) if flat else 0.06 * (high - low)
    zero_is_end = low >= 0 > low - margin
    low, high = (0.0 if zero_is_end else low - margin), high + margin
    return Axis(low, high, _even_ticks(low, high))


def axis_of_x(
    values: Sequence[float], ticks: Sequence[tuple[float, str]] = (), *, log: bool = False, from_zero: bool = True
) -> Axis:
    """Return a horizontal axis around values with these ticks or round ones; `from_zero` if it is not logarithmic."""
    if log or not from_zero:
        found = log_axis(values, ticks=6) if log else axis_around(values)
        return found._replace(ticks=ticks) if ticks else found
    low, high = min(*values, 0.0), max(values)
    high = high if high > low else low + 1
    return Axis(low, high, ticks or _even_ticks(low, high))


def log_axis(values: Sequence[float], *, ticks: int) -> Axis:
    """Return a logarithmic axis around values above 0, with as many round ticks as fit, at most this number."""
    low, high = min(values), max(values)
    stretch = max(high / low, 1.05) ** 0.04
    low, high = low / stretch, high * stretch
    if high / low < NARROW:
        return Axis(low, high, _even_ticks(low, high), log=True)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in MANTISSAS:
        placed = [one * 10.0**power for power in powers for one in mantissas if low <= one * 10.0**power <= high]
        if len(placed) <= ticks:
            break
    placed = placed[:: math.ceil(len(placed) / ticks)] if placed else [math.sqrt(low * high)]
    return Axis(low, high, [(tick, _counted(tick, placed[-1])) for tick in placed], log=True)


def _counted(number: float, largest: float) -> str:
    """Return a number as people write it on axes, beside others up to the largest: 10 k, 3 M."""
    for unit, word in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit and largest >= 1e4:
            return f"{number / unit:.3g}\u00a0{word}"
    return f"{number:,.0f}" if number >= 1e3 else f"{number:.3g}"


def _even_ticks(low: float, high: float) -> list[tuple[float, str]]:
    step = _round_step((high - low) / 5)
    numbers = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    return [(step * number, _tick(step * number, step)) for number in numbers]


def _round_step(step: float) -> float:
    """Return the next greater step of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _tick(value: float, step: float) -> str:
    if step < 1e-3 or step >= 1e5:
        return f"{value:.3g}"
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}"
