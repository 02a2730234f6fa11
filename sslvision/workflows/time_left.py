"""The time that is left of many trainings of different sizes, from those that have ended.

A training takes a fixed time (building, validations, the test images), and a time for each image of an update. Trainings of
two sizes tell the two apart. Until there are, a larger one lies between two estimates: each update takes as long as
before, as if overhead were all, and each image takes as long as before, as if there were none.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

import numpy as np

SAME_SIZE = 1.5  # batches whose sizes differ by less do not tell overhead and images apart


class Training(NamedTuple):
    """The size of a training; its seconds are 0 if it has not ended."""

    arm: str
    updates: int
    batch_size: int
    seconds: float = 0.0

    @property
    def images(self) -> int:
        """Return the images of all updates."""
        return self.updates * self.batch_size


def estimate(left: Sequence[Training], ended: Sequence[Training]) -> tuple[float, float]:
    """Return the least and the most seconds that the trainings in `left` are expected to take.

    They are equal where the trainings that have ended, of the same arm if there are any, tell it.
    """
    bounds = [(0.0, 0.0)]
    for one in left:
        own = [other for other in ended if other.arm == one.arm] or [*ended]
        bounds.append(_bounds(one, own) if own else (0.0, 0.0))
    least, most = (sum(side) for side in zip(*bounds, strict=True))
    return least, most


def _bounds(one: Training, ended: Sequence[Training]) -> tuple[float, float]:
    images = np.array([other.images for other in ended], dtype=float)
    seconds = np.array([other.seconds for other in ended])
    batches = [other.batch_size for other in ended]
    if max(batches) >= SAME_SIZE * min(batches) and images.max() >= SAME_SIZE * images.min():
        each, fixed = np.polyfit(images, seconds, 1)
        if fixed < 0:  # noise: no training takes less than its images
            each, fixed = (images * seconds).sum() / (images**2).sum(), 0.0
        if each > 0:
            return (found := float(fixed + each * one.images)), found
    by_update = one.updates * seconds.sum() / sum(other.updates for other in ended)
    by_image = one.images * seconds.sum() / images.sum()
    return min(by_update, by_image), max(by_update, by_image)


def in_words(seconds: tuple[float, float]) -> str:
    """Return an estimate: "about 0:05:00 left", or "about 0:05:00 to 0:20:00 left" where the bounds are far apart."""
    least, most = (timedelta(seconds=round(side)) for side in seconds)
    return f"about {most} left" if seconds[1] < 1.2 * seconds[0] + 1 else f"about {least} to {most} left"
