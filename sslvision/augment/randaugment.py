"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719) of one crop at a time, in a loader process.

A few of 14 operations, drawn with replacement and all of the same magnitude. Operations and magnitudes are those of
torchvision's v2.RandAugment with 31 bins, and its kernels are used. Random numbers are a function of the image instead of
torch's generator, and pixels from outside the image are mid-gray instead of black, as in timm.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torchvision.transforms.v2 import functional as F

from sslvision.augment.randomness import ImageRandom
from sslvision.errors import UsageError

STRONGEST = 30
OUTSIDE = 128  # gray level of pixels outside the image


@dataclass(frozen=True)
class RandAugment:
    """Augments a uint8 crop (C, H, W) of one or three channels with the random numbers of its image.

    Attributes:
        operations: Number of successive operations.
        magnitude: Their magnitude, from 0 to 30; some operations have none.

    Raises:
        UsageError: A value is out of range, or, when called, the crop does not have one or three channels.
    """

    operations: int = 2
    magnitude: float = 9

    def __post_init__(self) -> None:
        if self.operations < 0 or not 0 <= self.magnitude <= STRONGEST:
            raise UsageError(
                f"RandAugment with {self.operations} operations of magnitude {self.magnitude} is invalid: it takes 0 or more "
                f"operations, and a magnitude from 0 to {STRONGEST}."
            )

    def __call__(self, crop: Tensor, rng: ImageRandom) -> Tensor:
        if len(crop) not in (1, 3):
            raise UsageError(
                f"RandAugment supports images of 1 or 3 channels; these have {len(crop)}: set randaugment=0."
            )
        which, signs = rng.uniform("randaugment", 2 * self.operations).view(2, -1).tolist()
        for operation, sign in zip(which, signs, strict=True):
            strength = self.magnitude / STRONGEST  # 0..1
            crop = OPERATIONS[int(operation * len(OPERATIONS))](crop, strength, -1 if sign < 0.5 else 1)
        return crop


def _shear(crop: Tensor, x: float = 0.0, y: float = 0.0) -> Tensor:
    """Shear about the upper left corner, by the tangents of two angles."""
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return F.affine(crop, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0.0, 0.0], fill=OUTSIDE)


def _move(crop: Tensor, x: float = 0.0, y: float = 0.0) -> Tensor:
    """Translate by shares of width and height, in whole pixels."""
    pixels = [int(x * crop.shape[2]), int(y * crop.shape[1])]
    return F.affine(crop, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0], fill=OUTSIDE)


# Each maps (crop, strength in 0..1, sign) to the augmented crop.
OPERATIONS: tuple[Callable[[Tensor, float, int], Tensor], ...] = (
    lambda crop, strength, sign: crop,
    lambda crop, strength, sign: _shear(crop, x=sign * 0.3 * strength),
    lambda crop, strength, sign: _shear(crop, y=sign * 0.3 * strength),
    lambda crop, strength, sign: _move(crop, x=sign * 150 / 331 * strength),
    lambda crop, strength, sign: _move(crop, y=sign * 150 / 331 * strength),
    lambda crop, strength, sign: F.rotate(crop, sign * 30 * strength, fill=OUTSIDE),
    lambda crop, strength, sign: F.adjust_brightness(crop, 1 + sign * 0.9 * strength),
    lambda crop, strength, sign: F.adjust_saturation(crop, 1 + sign * 0.9 * strength),
    lambda crop, strength, sign: F.adjust_contrast(crop, 1 + sign * 0.9 * strength),
    lambda crop, strength, sign: F.adjust_sharpness(crop, 1 + sign * 0.9 * strength),
    lambda crop, strength, sign: F.posterize(crop, 8 - round(4 * strength)),
    lambda crop, strength, sign: F.solarize(crop, 255 * (1 - strength)),
    lambda crop, strength, sign: F.autocontrast(crop),
    lambda crop, strength, sign: F.equalize(crop),
)
