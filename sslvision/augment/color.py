"""DINO's photometric augmentation of a whole batch at once, on the training device.

Color jitter, grayscale, blur and solarization as in BYOL (Grill et al. 2020, appendix B), in this order and with the
settings of DINO (Caron et al. 2021). Each image has its own parameters. Every operation runs on the whole batch, with neutral
parameters for the images it does not apply to, so the host never waits for a GPU. Selections are products with 0 and 1, which
are faster than torch.where on a CPU.

Deviation: the authors' code rounds to bytes after every operation, mostly downwards. Nothing is rounded here, which makes a
jittered image 1.0 to 1.3 gray levels brighter on average.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sslvision.augment.blur import SIGMAS, gaussian_blur
from sslvision.augment.randomness import ImageRandom
from sslvision.errors import UsageError

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
LUMA = (0.2989, 0.587, 0.114)  # weights of red, green and blue, as in torchvision
CHUNK = 1 << 20  # numbers, 4 MB, that a CPU augments at a time, so that they stay in its caches between operations


@dataclass(frozen=True)
class Photometry:
    """Probabilities and ranges of one view's augmentation.

    The defaults are DINO's first global view. Its second has `blur_probability=0.1, solarize_probability=0.2`, its local
    views have `blur_probability=0.5`.

    Attributes:
        jitter_probability: Probability of color jitter, that is of the next four changes together.
        brightness, contrast, saturation: Factors are drawn from 1 - value to 1 + value, and never below 0.
        hue: Shifts are drawn from -value to value, in turns; at most 0.5.
        jitter_strength: Multiplies the four values.
        gray_probability: Probability of conversion to grayscale.
        blur_probability: Probability of a Gaussian blur.
        blur_sigma: Smallest and largest standard deviation of the blur, in pixels.
        solarize_probability: Probability of inverting bright pixels.
        solarize_threshold: Level from which pixels are bright; the default is Pillow's.

    Raises:
        UsageError: A value is out of its range.
    """

    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_strength: float = 1.0
    gray_probability: float = 0.2
    blur_probability: float = 1.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_probability: float = 0.0
    solarize_threshold: float = 128

    def __post_init__(self) -> None:
        for name in ("jitter", "gray", "blur", "solarize"):
            if not 0 <= (probability := getattr(self, f"{name}_probability")) <= 1:
                raise UsageError(f"The probability of {name} is {probability}; it must be from 0 to 1.")
        if not 0 <= self.blur_sigma[0] <= self.blur_sigma[1]:
            raise UsageError(
                f"blur_sigma={list(self.blur_sigma)} must be two numbers of pixels, 0 <= weakest <= strongest."
            )


class Drawn(NamedTuple):
    """Parameters of the augmentation of each image of a batch; tensors (B,) except for `order` and `strongest`."""

    jittered: Tensor  # bool
    brightness: Tensor  # factor, like the next two
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # shift in turns
    order: Tensor  # (B, 4) int64: BRIGHTNESS, CONTRAST, SATURATION and HUE in the order of application
    gray: Tensor  # bool
    blurred: Tensor  # bool
    sigma: Tensor  # pixels, a multiple of 1 / SIGMAS
    threshold: Tensor  # gray level from which pixels are inverted; infinite for no solarization
    strongest: float  # largest blur that can be drawn, in pixels

    @property
    def solarized(self) -> Tensor:
        """Return which images are solarized, bool."""
        return self.threshold.isfinite()

    def part(self, first: int, end: int) -> "Drawn":
        """Return the parameters of the images from `first` up to `end`, exclusive."""
        return Drawn._make(drawn[first:end] if isinstance(drawn, Tensor) else drawn for drawn in self)


def draw_photometry(rng: ImageRandom, views: Sequence[int], photometry: Sequence[Photometry]) -> Drawn:
    """Draw the parameters of V views of B images, each view with its own ranges: V * B, those of the first view first."""
    noise = rng.uniforms([f"photometry {view}" for view in views], 13).permute(2, 0, 1)  # (13, V, B)
    probability, low, span = _ranges(tuple(photometry), noise.device)  # each (13, V, 1)
    happens = (noise < probability).flatten(1)  # (13, V * B)
    amount = (low + noise * span).flatten(1)
    return Drawn(
        jittered=happens[0],
        brightness=amount[1],
        contrast=amount[2],
        saturation=amount[3],
        hue=amount[4],
        order=amount[5:9].T.argsort(dim=1, stable=True),
        gray=happens[9],
        blurred=happens[10],
        sigma=(amount[11] * SIGMAS).round_() / SIGMAS,
        threshold=amount[12].masked_fill(~happens[12], torch.inf),
        strongest=max(one.blur_sigma[1] for one in photometry),
    )


@functools.cache  # copied to the device once: a copy synchronizes
def _ranges(photometry: tuple[Photometry, ...], device: torch.device) -> Tensor:
    """Return (3, 13, V, 1): probability, smallest amount and span of each number that `draw_photometry` draws."""
    ranges = torch.tensor([_ranges_of(one) for one in photometry], dtype=torch.float32, device=device)  # (V, 13, 3)
    return ranges.permute(2, 1, 0)[..., None]


def _ranges_of(one: Photometry) -> list[tuple[float, float, float]]:
    """Return (probability, smallest amount, span) of each number that is drawn for a view."""
    strengths = [one.jitter_strength * most for most in (one.brightness, one.contrast, one.saturation)]
    hue = min(0.5, one.jitter_strength * one.hue)
    return [
        (one.jitter_probability, 0, 0),
        *((0, low, 1 + most - low) for most in strengths for low in (max(0.0, 1 - most),)),
        (0, -hue, 2 * hue),
        *[(0, 0, 1)] * 4,  # the four changes are ordered by these numbers
        (one.gray_probability, 0, 0),
        (one.blur_probability, 0, 0),
        (0, one.blur_sigma[0], one.blur_sigma[1] - one.blur_sigma[0]),
        (one.solarize_probability, one.solarize_threshold, 0),
    ]


def apply_photometry(
    images: Tensor,
    drawn: Drawn,
    *,
    recolor_fn: Callable[[Tensor, Drawn], Tensor] | None = None,
    finish_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Augment images (B, C, H, W) uint8 -> (B, C, H, W) float32 from 0 to 255, not rounded.

    Saturation, hue and grayscale apply to images of three channels only. `recolor_fn` is `recolor` or its compiled form;
    `finish_fn` replaces `solarize`.
    """
    recolor_fn, finish_fn = recolor_fn or recolor, finish_fn or solarize
    at_a_time = max(1, CHUNK // images[0].numel()) if images.device.type == "cpu" else len(images)
    pieces = []
    for at in range(0, len(images), at_a_time):
        part = drawn.part(at, at + at_a_time)
        result = recolor_fn(images[at : at + at_a_time], part)
        result = gaussian_blur(result, part.sigma.masked_fill(~part.blurred, 0), part.strongest)
        pieces.append(finish_fn(result, part.threshold))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def recolor(images: Tensor, drawn: Drawn) -> Tensor:
    """Apply jitter and grayscale to images (B, C, H, W) uint8: (B, C, H, W) float32 from 0 to 255."""
    result = jitter(images.float(), drawn)
    return blend(result, luma(result), ~drawn.gray) if images.shape[1] == 3 else result


def jitter(images: Tensor, drawn: Drawn) -> Tensor:
    """Change brightness, contrast, saturation and hue of the jittered images, in each image's own order.

    Hue is by far the most expensive. It is computed once, between the changes before it and those after it in an image's order.
    """
    color = images.shape[1] == 3
    changes = 3 if color else 2  # besides hue; saturation needs color
    last = (drawn.order >= changes).int().argsort(dim=1, stable=True)
    order = drawn.order.gather(1, last)[:, :changes]  # (B, changes)
    factors = torch.stack([drawn.brightness, drawn.contrast, drawn.saturation], dim=1).gather(1, order)
    factors = torch.where(drawn.jittered[:, None], factors, 1.0)  # a factor of 1 changes nothing
    if not color:
        return enhance_in_turn(images, order, factors)
    rank = drawn.order.argsort(dim=1)  # (B, 4) position of each change in the order
    before = rank.gather(1, order) < rank[:, HUE:]
    images = enhance_in_turn(images, order, torch.where(before, factors, 1.0))
    images = blend(images, shift_hue(images, drawn.hue), ~drawn.jittered)
    return enhance_in_turn(images, order, torch.where(before, 1.0, factors))


def enhance_in_turn(images: Tensor, operations: Tensor, factors: Tensor) -> Tensor:
    """Apply `operations` (B, n) with `factors` (B, n) to images (B, C, H, W), one after the other."""
    for operation, factor in zip(operations.T, factors.T, strict=True):
        images = enhance(images, operation, factor)
    return images


def enhance(images: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Change the brightness, contrast or saturation of each image.

    All three blend with an image without brightness, contrast or saturation: black, the image's mean gray, or each pixel's
    gray. Factors below 1 move towards it, factors above 1 away from it, and a factor of 1 returns the image exactly.

    Args:
        images: (B, C, H, W) from 0 to 255.
        operation: (B,) BRIGHTNESS, CONTRAST or SATURATION.
        factor: (B,).
    """
    gray = luma(images)  # (B, 1, H, W)
    without = gray.mean(dim=(1, 2, 3), keepdim=True) * _per_image(operation == CONTRAST)  # (B, 1, 1, 1)
    if images.shape[1] == 3:
        without = without + gray * _per_image(operation == SATURATION)
    else:
        factor = factor.masked_fill(operation == SATURATION, 1)
    return blend(images, without, factor).clamp_(0, 255)


def blend(images: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """Return images * share + others * (1 - share), with share (B,); exact for shares of 0 and 1.

    `others` may have a single channel or a single pixel.
    """
    share = _per_image(share).float()
    return (images * share).add_(others * (1 - share))


def luma(images: Tensor) -> Tensor:
    """Return grayscale images (B, 1, H, W) of (B, C, H, W): the mean over channels unless there are three."""
    if images.shape[1] != 3:
        return images if images.shape[1] == 1 else images.mean(dim=1, keepdim=True)
    red, green, blue = images.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def shift_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Shift the hue of images (B, 3, H, W) by `shift` (B,) turns, at constant HSV saturation and value."""
    red, green, blue = images.split(1, dim=1)  # (B, 1, H, W)
    value = images.amax(dim=1, keepdim=True)
    chroma = value - images.amin(dim=1, keepdim=True)
    # The hue in sixths of a turn, relative to the strongest primary color.
    from_red, from_green, from_blue = (green - blue), (blue - red) + 2 * chroma, (red - green) + 4 * chroma
    not_red, not_green = value.clone().gt_(red), value.clone().gt_(green)  # 0 and 1
    hue = from_red.lerp_(from_green.lerp_(from_blue, not_green), not_red)
    hue = hue.div_(chroma.clamp(min=1e-6)).add_(6 * _per_image(shift))  # gray pixels have no hue, so any value will do
    # The distance of a channel below the value, in units of chroma, is a trapezoid in hue: 0 around the channel's color.
    channel = (5 - 2 * torch.arange(3, device=images.device))[:, None, None]  # (3, 1, 1): 5, 3, 1
    turned = hue + channel  # (B, 3, H, W)
    turned.sub_((turned / 6).floor_(), alpha=6)  # from 0 to 6
    below = turned.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return value - below.mul_(chroma)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the pixels of images (B, C, H, W) from 0 to 255 that are at or above `threshold` (B,)."""
    bright = images.clone().ge_(_per_image(threshold))  # 0 and 1
    return (255 - 2 * images).mul_(bright).add_(images)


def solarize_and_normalize(images: Tensor, threshold: Tensor, *, normalize: Callable[[Tensor], Tensor]) -> Tensor:
    """Solarize and normalize: one function, so that torch.compile fuses the two into one kernel."""
    return normalize(solarize(images, threshold))


def _per_image(parameter: Tensor) -> Tensor:
    return parameter[:, None, None, None]  # (B, 1, 1, 1)
