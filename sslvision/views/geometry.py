"""Random resized crops, one image at a time in a loader's worker or a whole batch at once on the training device.

Both ways draw the same box for the same image, epoch and seed, and resample with the antialiased bicubic filter of
Pillow (Keys, a = -0.5), which the authors of MAE and DINO used.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sslvision.errors import UsageError
from sslvision.nn.randomness import ImageRandom

ATTEMPTS = 10  # boxes tried before the central one is taken, as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Crop:
    """One random resized crop of an image.

    Attributes:
        size: side of the result in pixels.
        scale: smallest and largest share of the image's area.
        ratio: smallest and largest width / height.
        flip: mirror half of the crops.

    Raises:
        UsageError: the scale is out of range.
    """

    size: int
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(
                f"A crop scale of {list(self.scale)} cannot be: it is two shares of the image's area, "
                "0 < smallest <= largest <= 1."
            )


def crop_boxes(noise: Tensor, height: int, width: int, crop: Crop) -> Tensor:
    """Turn uniform numbers into boxes, with the distribution of torchvision's RandomResizedCrop.

    Args:
        noise: (B, 2 * ATTEMPTS + 2) in [0, 1).
        height, width: of the images, in pixels.
        crop: the ranges to draw from.

    Returns:
        (B, 4) int64: top, left, height, width.
    """
    area_noise, ratio_noise = noise[:, :ATTEMPTS], noise[:, ATTEMPTS : 2 * ATTEMPTS]
    area = (crop.scale[0] + area_noise * (crop.scale[1] - crop.scale[0])) * height * width  # (B, ATTEMPTS)
    low, high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    ratio = torch.exp(low + ratio_noise * (high - low))
    box_width, box_height = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (box_width > 0) & (box_width <= width) & (box_height > 0) & (box_height <= height)
    chosen = fits.int().argmax(dim=1, keepdim=True)  # the first attempt that fits
    none_fits = ~fits.any(dim=1)
    # The fallback is the largest central box of an allowed ratio.
    central_width = min(width, max(1, round(height * crop.ratio[1])))
    central_height = min(height, max(1, round(width / crop.ratio[0])))
    box_width = box_width.gather(1, chosen)[:, 0].masked_fill(none_fits, central_width)  # (B,)
    box_height = box_height.gather(1, chosen)[:, 0].masked_fill(none_fits, central_height)
    top = (noise[:, -2] * (height - box_height + 1)).long()
    left = (noise[:, -1] * (width - box_width + 1)).long()
    top = torch.where(none_fits, (height - box_height) // 2, top)
    left = torch.where(none_fits, (width - box_width) // 2, left)
    return torch.stack([top, left, box_height, box_width], dim=1)


def draw(rng: ImageRandom, view: int, height: int, width: int, crop: Crop) -> tuple[Tensor, Tensor]:
    """Return the boxes (B, 4) of a batch for its `view`-th crop, and which of them are mirrored (B,)."""
    noise = rng.uniform(f"crop {view}", 2 * ATTEMPTS + 3)
    flipped = (noise[:, -1] < 0.5) if crop.flip else torch.zeros_like(noise[:, -1], dtype=torch.bool)
    return crop_boxes(noise[:, :-1], height, width, crop), flipped


def crop_one(image: Tensor, rng: ImageRandom, view: int, crop: Crop) -> Tensor:
    """Cut one image (C, H, W) uint8 of any size -> (C, size, size) uint8."""
    boxes, flipped = draw(rng, view, image.shape[1], image.shape[2], crop)
    top, left, height, width = boxes[0].tolist()
    cut = resize(image[:, top : top + height, left : left + width], (crop.size, crop.size))
    return cut.flip(2) if flipped.item() else cut


def crop_batch(images: Tensor, rng: ImageRandom, view: int, crop: Crop) -> Tensor:
    """Cut every image of a batch (B, C, H, W) uint8 by its own box, in two matrix products -> (B, C, size, size) uint8."""
    height, width = images.shape[2:]
    if crop.scale[0] == 1 and height == width == crop.size and not crop.flip:
        return images  # every box is the whole image, and resampling the identity
    boxes, flipped = draw(rng, view, height, width, crop)
    rows = resampling_matrix(boxes[:, 0], boxes[:, 2], height, crop.size)  # (B, size, H)
    columns = resampling_matrix(boxes[:, 1], boxes[:, 3], width, crop.size)  # (B, size, W)
    columns = torch.where(flipped[:, None, None], columns.flip(1), columns)
    with torch.autocast(images.device.type, enabled=False):
        # Pillow's order: columns first, and bytes in between.
        cut = (images.float() @ columns[:, None].transpose(2, 3)).round_().clamp_(0, 255)  # (B, C, H, size)
        cut = (rows[:, None] @ cut).round_().clamp_(0, 255)  # (B, C, size, size)
    return cut.byte()


def resampling_matrix(start: Tensor, extent: Tensor, length: int, size: int) -> Tensor:
    """Antialiased bicubic weights of a 1-D crop and resize.

    Args:
        start, extent: (B,) the interval of each image, in pixels; pixels outside have no weight.
        length: of the axis in pixels.
        size: of the result in pixels.

    Returns:
        (B, size, length); rows sum to 1.
    """
    start, extent = start[:, None, None].float(), extent[:, None, None].float()
    scale = extent / size  # source pixels per result pixel
    result = torch.arange(size, device=start.device)[:, None] + 0.5  # (size, 1)
    source = torch.arange(length, device=start.device)[None] + 0.5  # (1, length)
    distance = (source - start - result * scale).abs() / scale.clamp(min=1)  # (B, size, length)
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weight = weight * ((source > start) & (source < start + extent))
    return weight / weight.sum(dim=2, keepdim=True)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize one image (C, H, W) uint8 by antialiased bicubic interpolation, with Pillow's rounding."""
    if tuple(image.shape[1:]) == size:
        return image
    return F.interpolate(image[None], size=size, mode="bicubic", antialias=True)[0]


def center_crop(image: Tensor, size: int) -> Tensor:
    """Resize the short side to 8/7 of `size` and cut the centre, as ImageNet models are evaluated.

    Images of exactly size x size stay as they are.
    """
    height, width = image.shape[1:]
    if (height, width) == (size, size):
        return image
    short = max(size, round(size * 8 / 7))
    factor = short / min(height, width)
    image = resize(image, (max(short, round(height * factor)), max(short, round(width * factor))))
    top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
    return image[:, top : top + size, left : left + size]
