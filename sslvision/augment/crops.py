"""Random resized crops, of one image at a time in a loader process or of a whole batch on the training device.

Both ways draw the same box for the same image, epoch and seed, and resample with Pillow's antialiased bicubic filter
(Keys, a = -0.5), which the authors of MAE and DINO used.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sslvision.augment.randomness import ImageRandom
from sslvision.errors import UsageError
from sslvision.nn.exact_products import exact_products
from sslvision.nn.image_size import height_and_width

MAX_CACHED = 8 << 20  # weights, 32 MB; 32 x 32 crops of 32 x 32 pixels have 2.2 million
CROP_PCT = 0.875  # of the short side, in the usual evaluation of ImageNet models
LONGEST = 4  # length over width of what is resized, for squares, above which only the part that is evaluated is resized
ATTEMPTS = 10  # boxes drawn before falling back to a central one, as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class Crop:
    """One random resized crop of an image.

    Attributes:
        size: Side of the result in pixels, or its (height, width).
        scale: Smallest and largest share of the image's area.
        ratio: Smallest and largest width / height of the box that is cut, relative to that of the result: what is seen is
            stretched by no more than this, whatever its shape. A result of h x w pixels is torchvision's
            RandomResizedCrop((h, w), scale, (ratio[0] * w / h, ratio[1] * w / h)). Without the factor, as for squares, hardly
            a box of the usual shares would fit into a wide image, and a wide result would show square boxes stretched.
        flip: Mirror half of the crops.

    Raises:
        UsageError: The size or the scale is out of range.
    """

    size: int | tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True

    def __post_init__(self) -> None:
        height, width = self.shape
        object.__setattr__(self, "size", height if height == width else (height, width))  # equal crops are cut together
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise UsageError(
                f"A crop scale of {list(self.scale)} is out of range: give two shares of the image's area, "
                "0 < smallest <= largest <= 1."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Return height and width of the result."""
        return height_and_width(self.size, "a crop's size")


def crop_noise(rng: ImageRandom, views: Sequence[int]) -> Tensor:
    """Return the uniform random numbers (V, B, 2 * ATTEMPTS + 3) of V crops of a batch."""
    return rng.uniforms([f"crop {view}" for view in views], 2 * ATTEMPTS + 3)


def draw(noise: Tensor, height: Tensor, width: Tensor, crops: Sequence[Crop]) -> tuple[Tensor, Tensor]:
    """Return boxes (V, B, 4) and mirroring (V, B) for `crop_noise` and images with sizes (B,)."""
    boxes = crop_boxes(noise[..., :-1], height, width, crops)
    return boxes, noise[..., -1] < _ranges(tuple(crops), noise.device)[-1]


def crop_boxes(noise: Tensor, height: Tensor, width: Tensor, crops: Sequence[Crop]) -> Tensor:
    """Turn uniform random numbers into boxes, with the distribution of torchvision's RandomResizedCrop.

    These are many small operations, which take as long for one crop as for a hundred.

    Args:
        noise: (V, B, 2 * ATTEMPTS + 2) in [0, 1).
        height, width: (B,) int64 sizes of the images in pixels.
        crops: V descriptions of crops.

    Returns:
        (V, B, 4) int64: top, left, height, width.
    """
    low_share, share_span, low_log, log_span, low_ratio, high_ratio, _ = _ranges(tuple(crops), noise.device)
    share = low_share[..., None] + noise[..., :ATTEMPTS] * share_span[..., None]  # (V, B, ATTEMPTS)
    area = share * height[:, None] * width[:, None]
    ratio = torch.exp(low_log[..., None] + noise[..., ATTEMPTS : 2 * ATTEMPTS] * log_span[..., None])
    image = torch.stack([height, width])[:, None]  # (2, 1, B): heights, then widths, as below
    tried = torch.stack([area / ratio, area * ratio]).sqrt_().round_().long()  # (2, V, B, ATTEMPTS)
    fits = ((tried > 0) & (tried <= image[..., None])).all(dim=0)  # (V, B, ATTEMPTS)
    first = fits.int().argmax(dim=2, keepdim=True)
    none_fits = ~fits.any(dim=2)  # (V, B)
    # The fallback is the largest central box of an allowed ratio.
    central = torch.minimum(image, torch.stack([width / low_ratio, height * high_ratio]).round_().long().clamp_(min=1))
    sides = torch.where(none_fits, central, tried.gather(3, first.expand(2, -1, -1, -1))[..., 0])  # (2, V, B)
    free = image - sides
    corner = torch.where(none_fits, free // 2, (noise[..., -2:].permute(2, 0, 1) * (free + 1)).long())
    return torch.cat([corner, sides]).permute(1, 2, 0)


@functools.cache  # copied to the device once: a copy synchronizes
def _ranges(crops: tuple[Crop, ...], device: torch.device) -> Tensor:
    """Return (7, V, 1): smallest area share and span, the same for the log ratio, both ratios, and probability of flips."""
    ranges = [
        (share, most - share, math.log(low), math.log(high) - math.log(low), low, high, 0.5 * crop.flip)
        for crop in crops
        for (share, most), wide in [(crop.scale, crop.shape[1] / crop.shape[0])]
        for low, high in [(crop.ratio[0] * wide, crop.ratio[1] * wide)]
    ]
    return torch.tensor(ranges, dtype=torch.float32, device=device).T[..., None]


def crop_each(images: list[Tensor], noise: Tensor, crops: Sequence[Crop]) -> Iterator[Tensor]:
    """Crop B images of any sizes, V times each.

    Args:
        images: B images (C, H, W) uint8.
        noise: (V, B, 2 * ATTEMPTS + 3) from `crop_noise`.
        crops: V descriptions of crops.

    Yields:
        V * B crops (C, *crop.shape) uint8, all images of the first crop first.
    """
    height, width = torch.tensor([image.shape[1:] for image in images]).unbind(1)  # (B,) each
    boxes, flipped = draw(noise, height, width, crops)
    for crop, boxes_here, flipped_here in zip(crops, boxes.tolist(), flipped.tolist(), strict=True):
        for image, (top, left, rows, columns), mirror in zip(images, boxes_here, flipped_here, strict=True):
            cut = resize(image[:, top : top + rows, left : left + columns], crop.shape)
            yield cut.flip(2) if mirror else cut


def crop_one(image: Tensor, rng: ImageRandom, view: int, crop: Crop) -> Tensor:
    """Return a crop (C, *crop.shape) uint8 of one image (C, H, W) uint8."""
    return next(crop_each([image], crop_noise(rng, [view]), [crop]))


def crop_batch(images: Tensor, noise: Tensor, crops: Sequence[Crop]) -> list[Tensor]:
    """Crop every image of a batch V times; consecutive crops of the same description are computed together.

    Args:
        images: (B, C, H, W) uint8.
        noise: (V, B, 2 * ATTEMPTS + 3) from `crop_noise`.
        crops: V descriptions of crops.

    Returns:
        V tensors (B, C, *crop.shape) uint8.
    """
    height, width = images.shape[2:]
    if all(crop.scale[0] == 1 and (height, width) == crop.shape and not crop.flip for crop in crops):
        return [images] * len(crops)  # the crop is the image itself
    heights, widths = (torch.full((len(images),), side, device=images.device) for side in (height, width))
    boxes, flipped = draw(noise, heights, widths, crops)
    cut, first = list[Tensor](), 0
    for crop, alike in itertools.groupby(crops):
        here = slice(first, first := first + len(list(alike)))
        cut += cut_boxes(images, boxes[here], flipped[here], crop.shape)
    return cut


def cut_boxes(images: Tensor, boxes: Tensor, flipped: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample V boxes of every image of a batch in two matrix products.

    Args:
        images: (B, C, H, W) uint8.
        boxes: (V, B, 4) int64: top, left, height and width in pixels.
        flipped: (V, B) bool, True where the crop is mirrored.
        size: h and w, height and width of the result in pixels.

    Returns:
        (V, B, C, h, w) uint8.
    """
    height, width = images.shape[2:]
    top, left, box_height, box_width = boxes.unbind(2)
    rows = matrices(top, box_height, height, size[0])  # (V, B, h, H)
    columns = matrices(left, box_width, width, size[1], flipped).transpose(2, 3)  # (V, B, W, w)
    with torch.autocast(images.device.type, enabled=False), exact_products(images.device):
        # As in Pillow, the horizontal pass comes first and is rounded to bytes.
        cut = (images.float().flatten(1, 2) @ columns).round_().clamp_(0, 255)  # (V, B, C * H, w)
        cut = rows[:, :, None] @ cut.unflatten(2, (-1, height))  # (V, B, C, h, w)
        return cut.round_().clamp_(0, 255).byte()


def matrices(start: Tensor, extent: Tensor, length: int, size: int, mirrored: Tensor | None = None) -> Tensor:
    """Return the result of `resampling_matrix`, with the rows of `mirrored` (...,) ones reversed.

    It comes from a cache of all intervals if images are small enough for one.
    """
    if 2 * (length + 1) ** 2 * length * size <= MAX_CACHED:
        interval = start * (length + 1) + extent
        interval = interval if mirrored is None else interval + mirrored * (length + 1) ** 2
        return F.embedding(interval, _every_matrix(length, size, start.device)).unflatten(-1, (size, length))
    computed = resampling_matrix(start, extent, length, size)
    return computed if mirrored is None else torch.where(mirrored[..., None, None], computed.flip(-2), computed)


@functools.cache
def _every_matrix(length: int, size: int, device: torch.device) -> Tensor:
    """Return the matrices (size * length) of all (length + 1) ** 2 starts and extents, followed by the mirrored ones.

    Matrices of extent 0 are NaN.
    """
    indices = torch.arange(length + 1, device=device)
    computed = resampling_matrix(indices.repeat_interleave(length + 1), indices.repeat(length + 1), length, size)
    return torch.cat([computed, computed.flip(1)]).flatten(1)


def resampling_matrix(start: Tensor, extent: Tensor, length: int, size: int) -> Tensor:
    """Return the antialiased bicubic weights of a 1-D crop and resize.

    Args:
        start, extent: (...,) interval of each image in pixels; pixels outside have no weight.
        length: Length of the axis in pixels.
        size: Length of the result in pixels.

    Returns:
        (..., size, length); rows sum to 1.
    """
    start, extent = start[..., None, None].float(), extent[..., None, None].float()
    scale = extent / size  # source pixels per result pixel
    # fp32 even if torch's default differs, because matrices are cached.
    result = torch.arange(size, dtype=torch.float32, device=start.device)[:, None] + 0.5  # (size, 1)
    source = torch.arange(length, dtype=torch.float32, device=start.device)[None] + 0.5  # (1, length)
    inside = ((source > start) & (source < start + extent)).float()  # (..., 1, length)
    # In place where possible: this is most of the work.
    distance = ((source - start) - result * scale).abs_().div_(scale.clamp(min=1)).clamp_(max=2)  # (..., size, length)
    near = (1.5 * distance).sub_(2.5).mul_(distance * distance).add_(1)
    far = (-0.5 * distance).add_(2.5).mul_(distance).sub_(4).mul_(distance).add_(2)  # 0 at a distance of 2
    weight = torch.where(distance < 1, near, far).mul_(inside)
    return weight.div_(weight.sum(dim=-1, keepdim=True))


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize one image (C, H, W) uint8 by antialiased bicubic interpolation, with Pillow's rounding."""
    if tuple(image.shape[1:]) == size:
        return image
    batch = image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)  # unlike image[None] this shows torch the (H, W, C) layout
    return F.interpolate(batch, size=size, mode="bicubic", antialias=True)[0]


def center_crop(image: Tensor, size: tuple[int, int], crop_pct: float | None = None) -> Tensor:
    """Resize an image until it just covers `size` / `crop_pct`, and crop the center; the image is never stretched.

    Sizes and offsets are those of timm's evaluation, in which a rectangle is rounded, and a square rounded down.

    Args:
        image: (C, H, W) uint8.
        size: Height and width of the result in pixels.
        crop_pct: Share of each side that is kept where the image has the shape of the result, 0..1. None: 0.875, except that
            images of exactly this size are returned unchanged.
    """
    height, width = image.shape[1:]
    if crop_pct is None and (height, width) == size:
        return image
    covered = [math.floor(side / (crop_pct or CROP_PCT)) for side in size]
    factors = height / covered[0], width / covered[1]  # the smaller one is applied
    if covered[0] == covered[1]:
        rows, columns = (int(covered[0] * side / min(height, width)) for side in (height, width))
    else:
        rows, columns = (round(side / min(factors)) for side in (height, width))
    top, left = round((rows - size[0]) / 2), round((columns - size[1]) / 2)
    if max(factors) > LONGEST * min(factors):  # resized as a whole, 30,000 x 1 pixels would need gigabytes
        y, x = height / rows, width / columns  # pixels of the image per pixel of the result
        box = (left * x, top * y, (left + size[1]) * x, (top + size[0]) * y)
        return torch.stack([_resize_box(channel, size, box) for channel in image])
    return resize(image, (rows, columns))[:, top : top + size[0], left : left + size[1]]


def _resize_box(channel: Tensor, size: tuple[int, int], box: tuple[float, float, float, float]) -> Tensor:
    """Resize a part (left, top, right, bottom) of a channel (H, W) uint8, as if it had been cut from the resized whole."""
    array, (height, width) = np.ascontiguousarray(channel.numpy()), size
    return torch.from_numpy(np.array(Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC, box=box)))
