"""How far an export is from the network it was made of: outputs for the same pixels, and pixels for the same images."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sslvision.augment.crops import CROP_PCT, center_crop
from sslvision.backbones.backbone import Backbone
from sslvision.errors import SSLVisionError

HOW = "largest absolute difference, divided by the root mean square of the output"
# Height and width of images for preprocessing, in image sizes.
SIZES = ((1.0, 1.0), (1.9, 1.4), (1.1, 2.3), (0.6, 0.8), (4.1, 3.0), (1.37, 1.0), (1.0, 1.61), (2.2, 1.7), (1.3, 1.9))
LONG = (7.0, 1.2)  # an image that we do not resize as a whole


@dataclass(frozen=True)
class Deviation:
    """The largest deviations over all batches.

    Attributes:
        relative: By output: largest absolute difference, divided by the root mean square of the output.
        absolute: By output: largest absolute difference.
        batch_sizes: Sizes of the batches.
    """

    relative: dict[str, float]
    absolute: dict[str, float]
    batch_sizes: tuple[int, ...]

    @property
    def largest(self) -> float:
        """Return the largest relative deviation of any output."""
        return max(self.relative.values())

    def record(self) -> dict[str, object]:
        """Return it for a JSON file."""
        return {
            "how": HOW,
            "relative": self.relative,
            "absolute": self.absolute,
            "batch_sizes": [*self.batch_sizes],
        }

    def words(self) -> str:
        """Return it in words."""
        each = ", ".join(f"{name} {value:.1e}" for name, value in self.relative.items())
        return f"{each} ({HOW}; batches of {', '.join(map(str, self.batch_sizes))})"


@torch.no_grad()
def deviation(
    ours: Callable[[Tensor], Mapping[str, Tensor]],
    theirs: Callable[[Tensor], Mapping[str, Tensor]],
    backbone: Backbone,
    batch_sizes: Sequence[int],
) -> Deviation:
    """Return how far two functions of uint8 images (B, C, H, W) differ, in the outputs that the second one has."""
    differing, squares, count = dict[str, float](), dict[str, float](), dict[str, int]()
    for number, size in enumerate(batch_sizes):
        images = pictures(size, backbone, seed=number)
        expected = ours(images)
        for name, found in theirs(images).items():
            wanted = expected[name].double()
            if found.shape != wanted.shape:
                raise SSLVisionError(
                    f"The export returns {name} of shape {tuple(found.shape)} for {size} images instead of "
                    f"{tuple(wanted.shape)}, so nothing was written."
                )
            difference = (found.double() - wanted).abs().max().item()
            differing[name] = max(differing.get(name, 0.0), difference if difference == difference else float("inf"))
            squares[name] = squares.get(name, 0.0) + wanted.square().sum().item()
            count[name] = count.get(name, 0) + wanted.numel()
    scales = {name: max((squares[name] / count[name]) ** 0.5, 1e-12) for name in squares}
    relative = {name: differing[name] / scales[name] for name in differing}
    return Deviation(relative, differing, tuple(batch_sizes))


def require_close(found: Deviation, tolerance: float, advice: str = "") -> None:
    """Raise SSLVisionError if an export deviates by more than the tolerance."""
    if not found.largest <= tolerance:
        raise SSLVisionError(
            f"The export deviates from the network by more than tolerance={tolerance:g}, so nothing was written: "
            f"{found.words()}. {advice}If that is near enough, say tolerance={2 * found.largest:.1g}."
        )


def pictures(count: int, backbone: Backbone, *, seed: int) -> Tensor:
    """Return random uint8 images (B, C, H, W): the first, third, ... of noise, the others as smooth as photographs."""
    rng = torch.Generator().manual_seed(seed)
    shape = (backbone.channels, *backbone.image_size)
    noise = torch.rand(count, *shape, generator=rng)
    coarse = torch.rand(count, backbone.channels, 5, 5, generator=rng)
    smooth = F.interpolate(coarse, size=backbone.image_size, mode="bicubic", align_corners=False)
    noise[1::2] = smooth[1::2]
    return noise.mul_(256).floor_().clamp_(0, 255).to(torch.uint8)


def preprocessing_deviation(prepare: Callable[[Image.Image], Tensor], backbone: Backbone) -> dict[str, float]:
    """Return by how many of 255 gray levels another library's preprocessing differs from ours, at most.

    Args:
        prepare: Its preprocessing, of an image to gray levels (C, H, W).
        backbone: Whose image size and crop are evaluated.

    Returns:
        "pixels", over images of several sizes; "long", over a very long one, of which we resize the center alone; "shifted",
        over those whose crop begins at half a pixel, which libraries round in two ways. A key without an image is left out:
        all of them for images that are neither gray nor RGB, which other libraries do not read.
    """
    if backbone.channels not in (1, 3):
        return {}
    size = backbone.image_size
    found = dict[str, float]()
    for number, (rows, columns) in enumerate((*SIZES, LONG)):
        picture = _photograph(round(rows * size[0]), round(columns * size[1]), backbone.channels, seed=number)
        ours = center_crop(picture, size, backbone.crop_pct).float()
        theirs = prepare(Image.fromarray(picture.permute(1, 2, 0).squeeze(2).contiguous().numpy()))
        shifted = begins_at_half_a_pixel((picture.shape[1], picture.shape[2]), backbone)
        key = "long" if (rows, columns) == LONG else "shifted" if shifted else "pixels"
        found[key] = max(found.get(key, 0.0), (theirs - ours).abs().max().item())
    return found


def begins_at_half_a_pixel(image: tuple[int, int], backbone: Backbone) -> bool:
    """Return whether rounding up or down decides where the crop of an image of this height and width begins.

    We round to the even neighbor, as timm and torchvision do: where 4n + 3 pixels are cut off, that is up.
    """
    size, crop_pct = backbone.image_size, backbone.crop_pct or CROP_PCT
    covered = math.floor(size[0] / crop_pct)
    if size[0] != size[1]:
        return False
    return any((int(covered * side / min(image)) - size[0]) % 4 == 3 for side in image)


def _photograph(height: int, width: int, channels: int, *, seed: int) -> Tensor:
    """Return an image (C, H, W) uint8 of coarse and fine structure."""
    rng = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.rand(1, channels, 6, 6, generator=rng), size=(height, width), mode="bicubic")[0]
    fine = torch.rand(channels, height, width, generator=rng)
    return (coarse * 200 + fine * 55).clamp(0, 255).to(torch.uint8)
