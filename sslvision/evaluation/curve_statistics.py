"""One curve of a run, measured robustly: medians of stretches, the noise about the trend, and what a change is worth.

Single values of a learning curve mean little: a batch is easy, a validation set is small. Everything here is a median, and the
noise is that of second differences, which no trend and no single spike changes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

GAUSSIAN = 1.4826  # standard deviation of a normal distribution by its median absolute deviation
OF_A_MEDIAN = 1.2533  # standard error of a median by that of a mean


@dataclass(frozen=True)
class Curve:
    """A metric against optimizer updates: finite values only.

    Attributes:
        steps: (N,) updates done, ascending.
        values: (N,)
        end: Updates of the whole run, so that a share of it is the same stretch for all its metrics.
    """

    steps: np.ndarray
    values: np.ndarray
    end: float

    def __len__(self) -> int:
        return len(self.values)

    def stretch(self, start: float, stop: float) -> np.ndarray:
        """Return the values from one share of the run to another, or else the value nearest to its middle."""
        at = self.steps / self.end
        inside = (at > start) & (at <= stop)
        if not inside.any():
            inside[np.abs(at - (start + stop) / 2).argmin()] = True
        return self.values[inside]

    def level(self, start: float, stop: float) -> float:
        """Return the median of a stretch."""
        return float(np.median(self.stretch(start, stop)))

    def error(self, start: float, stop: float) -> float:
        """Return the standard error of the median of a stretch."""
        values = self.stretch(start, stop)
        return OF_A_MEDIAN * noise(values if len(values) > 8 else self.values) / math.sqrt(len(values))

    def moved(self, before: tuple[float, float], after: tuple[float, float]) -> tuple[float, float]:
        """Return by how much the level rose from one stretch to another, and the standard error of that."""
        rise = self.level(*after) - self.level(*before)
        return rise, math.hypot(self.error(*before), self.error(*after))

    def smooth(self) -> np.ndarray:
        """Return the running median of about a fiftieth of the curve, at least of three values; its ends are values."""
        reach = max(1, len(self) // 100)
        padded = np.concatenate([self.values[:1].repeat(reach), self.values, self.values[-1:].repeat(reach)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
        return np.median(windows, axis=1)


def curve(metrics: Mapping[str, Sequence[float | None]], name: str) -> Curve:
    """Return a column of `read_metrics` as a curve; empty if it was never logged, or never finite."""
    steps = metrics.get("step", [])
    end = max((step for step in steps if step is not None), default=1.0)
    pairs = [
        (step, value)
        for step, value in zip(steps, metrics.get(name, []), strict=False)
        if step is not None and value is not None and math.isfinite(value)
    ]
    return Curve(np.array([step for step, _ in pairs]), np.array([value for _, value in pairs]), max(end, 1.0))


def noise(values: np.ndarray) -> float:
    """Return the standard deviation of single values about their trend, from their second differences."""
    if len(values) < 5:
        return 0.0
    bends = values[:-2] - 2 * values[1:-1] + values[2:]
    return GAUSSIAN * float(np.median(np.abs(bends - np.median(bends)))) / math.sqrt(6)
