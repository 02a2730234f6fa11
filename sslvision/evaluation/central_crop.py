"""Which central share of the images is evaluated: one rule for a whole data set, which its export records."""

import math
from collections.abc import Sequence
from statistics import median

from sslvision.augment.crops import CROP_PCT
from sslvision.data.source import Source, UnreadableImage

LOOKED_AT = 64  # images of a source whose sizes are compared, spread over it
SAMPLED = 9  # images whose median size is taken


def choose_crop_pct(sources: Sequence[Source | None], size: tuple[int, int]) -> float:
    """Return 1.0 if all images that are looked at have exactly this height and width, so that no border is lost; else 0.875.

    The choice is made from a sample, and then holds for every image, so that timm's single `crop_pct` repeats it.
    """
    looked_at = 0
    for source in sources:
        if source is None or not len(source):
            continue
        for index in _spread(len(source)) if source.images is None else [0]:
            try:
                height, width = source.read(index).shape[1:]
            except UnreadableImage:
                continue
            if (height, width) != size:
                return CROP_PCT
            looked_at += 1
    return 1.0 if looked_at else CROP_PCT


def typical_size(source: Source) -> tuple[int, int]:
    """Return the median height and width of a sample of images in pixels; (0, 0) if none can be read."""
    found = []
    for index in _spread(len(source), SAMPLED) if source.images is None else [0]:
        try:
            found.append(tuple(source.read(index).shape[1:]))
        except UnreadableImage:
            continue
    return (int(median(size[0] for size in found)), int(median(size[1] for size in found))) if found else (0, 0)


def _spread(images: int, most: int = LOOKED_AT) -> list[int]:
    """Return up to so many indices, from the first image to the last."""
    return sorted({number * (images - 1) // (most - 1) for number in range(most)})


def describe_crop(crop_pct: float | None, size: tuple[int, int]) -> str:
    """Return in words what is evaluated of an image for a backbone that reads images of this height and width."""
    share, (height, width) = crop_pct or CROP_PCT, (side // math.gcd(*size) for side in size)
    part = "square" if height == width else f"rectangle of shape {height}:{width} (height:width)"
    return f"the central {'' if share == 1 else f'{100 * share:g} % '}{part} of every image (crop_pct {share:g})"
