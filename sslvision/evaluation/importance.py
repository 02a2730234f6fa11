"""How much of the differences between trials a setting explains, by itself.

The measure is the adjusted share of the variance of the scores: of a number, that of a parabola in it (in its logarithm, if
the range is logarithmic), and of listed values, that of their means. Adjusted means that noise alone explains 0 on average
(Ezekiel 1930). Diverged trials would dwarf all other differences, so scores count by their ranks.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FEWEST = 5  # trials


def ranks(scores: Sequence[float]) -> NDArray[np.float64]:
    """Return the ranks of scores, equal ones with their mean rank."""
    values = np.asarray(scores, dtype=float)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def importance(values: Sequence[float] | Sequence[str], scores: Sequence[float], *, log: bool = False) -> float | None:
    """Return the share, from 0 to 1, of the variance of the scores' ranks that a setting explains.

    Args:
        values: Values of the setting; words for one that has no order.
        scores: The scores.
        log: Whether the logarithm of the value counts.

    Returns:
        None where there are too few trials to tell.
    """
    if len(scores) < FEWEST or len(set(values)) < 2:
        return None
    y = ranks(scores)
    total = float(((y - y.mean()) ** 2).sum())
    if total == 0:
        return None
    if any(isinstance(value, str) for value in values):
        names = np.asarray([str(value) for value in values])
        design = (names[:, None] == np.unique(names)[None, 1:]).astype(float)
    else:
        x = np.asarray(values, dtype=float)
        x = np.log(x) if log else x
        x = (x - x.mean()) / x.std()
        design = np.stack([x, x**2], axis=1)[:, : len(set(values)) - 1]
    design = np.concatenate([np.ones((len(y), 1)), design], axis=1)
    freedom = len(y) - np.linalg.matrix_rank(design)
    if freedom < 1:
        return None
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    unexplained = float(((y - fitted) ** 2).sum()) / freedom
    return float(np.clip(1 - unexplained / (total / (len(y) - 1)), 0.0, 1.0))
