"""The trainings of a scaling ladder: sizes, shares of the images, and lengths, and how long they take.

One dial sizes the model: its number of parameters. The depth follows as its cube root, since width is proportional to depth and
a block has width^2 parameters; the width makes up for the rounding of the depth, so that sizes are geometric although depths
are few; and heads keep about their channels. The largest model is the recipe's own.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.build import build_backbone
from sslvision.backbones.vit import ViT
from sslvision.errors import UsageError

SHORTEST = 20  # updates of the shortest training


@dataclass(frozen=True)
class Size:
    """A model: the options of its backbone that differ from the recipe's, and its parameters in the backbone."""

    parameters: int
    options: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Rung:
    """A training of the ladder."""

    size: Size
    images: int
    updates: int
    seed: int

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Return what tells it from the others."""
        return self.size.parameters, self.images, self.updates, self.seed

    @property
    def folder(self) -> str:
        """Return the name of its folder."""
        return f"{self.size.parameters}-parameters_{self.images}-images_{self.updates}-updates_seed-{self.seed}"


@dataclass(frozen=True)
class Times:
    """Seconds that a size takes: for an update, and for everything else of a training and its evaluation."""

    update: float
    rest: float


def sizes_of(backbone: Mapping[str, Any], built: Backbone, *, channels: int, rungs: int, factor: float) -> list[Size]:
    """Return the sizes of the parameters axis, the smallest first.

    Args:
        backbone: Options of the recipe's backbone.
        built: That backbone, the largest.
        channels: Channels of an image.
        rungs: Number of sizes.
        factor: Ratio of parameters from one size to the next.

    Raises:
        UsageError: The backbone is not a ViT, or too small for so many sizes.
    """
    if not isinstance(built, ViT):
        raise UsageError(
            f"The parameters axis sizes plain ViTs by depth, width and heads; {backbone['name']} is none: choose one, such as "
            "backbone.name=vit_small_patch16_224, or leave this axis out with axes=[images,updates]."
        )
    depth, width = len(built.model.blocks), built.embed_dim
    channels_of_head = width / built.model.blocks[0].attn.num_heads
    sizes = [Size(count_parameters(built))]
    for rung in range(1, rungs):
        options = smaller_vit(depth, width, channels_of_head, factor**rung)
        sizes.insert(
            0, Size(count_parameters(build_backbone(**{**backbone, **options}, channels=channels)), (*options.items(),))
        )
    ratios = [larger.parameters / smaller.parameters for smaller, larger in itertools.pairwise(sizes)]
    if min(ratios) < 1 + 0.5 * (factor - 1):
        counts = ", ".join(f"{size.parameters:,}" for size in sizes)
        raise UsageError(
            f"The backbone is too small for rungs={rungs} with factor={factor:g}: the sizes would have {counts} parameters. "
            "Take fewer rungs, a smaller factor, or a larger backbone (backbone.depth, backbone.embed_dim)."
        )
    return sizes


def smaller_vit(depth: int, width: int, channels_of_head: float, ratio: float) -> dict[str, int]:
    """Return depth, embed_dim and num_heads of a ViT whose blocks have a fraction 1 / ratio of the parameters."""
    blocks = max(1, round(depth * ratio ** (-1 / 3)))
    wanted = width * math.sqrt(depth / blocks / ratio)
    heads = max(1, round(wanted / channels_of_head))
    unit = math.lcm(4, 2 * heads)  # positions have four parts, and heads an even number of channels
    return {"depth": blocks, "embed_dim": unit * max(1, round(wanted / unit)), "num_heads": heads}


def count_parameters(backbone: Backbone) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in backbone.parameters())


def shares_of(images: int, *, batch_size: int, rungs: int, factor: float) -> list[int]:
    """Return the numbers of training images of the images axis, the smallest first.

    Raises:
        UsageError: The smallest share has fewer images than a batch.
    """
    shares = [round(images / factor**rung) for rung in reversed(range(rungs))]
    if shares[0] < batch_size:
        most = 1 + int(math.log(images / batch_size) / math.log(factor)) if images >= batch_size else 0
        advice = f"rungs={most}, " if most >= 4 else ""
        raise UsageError(
            f"The smallest share would have {shares[0]:,} of {images:,} images, fewer than batch_size={batch_size}: take "
            f"{advice}a smaller batch_size or factor, or leave this axis out (axes=[parameters,updates])."
        )
    return shares


def rungs_of(
    axes: Sequence[str],
    sizes: Sequence[Size],
    shares: Sequence[int],
    updates: int,
    *,
    rungs: int,
    factor: float,
    seed: int,
) -> dict[str, list[Rung]]:
    """Return the trainings of each axis, the smallest first; the last is the same on all axes.

    Args:
        axes: Names of the axes.
        sizes: Sizes of the model; the last is the largest.
        shares: Numbers of images; the last is all.
        updates: Length of the largest training.
        rungs: Number of sizes on an axis.
        factor: Ratio of the lengths.
        seed: Seed of all of them.
    """
    largest, images = sizes[-1], shares[-1]
    lengths = [max(1, round(updates / factor**rung)) for rung in reversed(range(rungs))]
    of_axis = {
        "parameters": [Rung(size, images, updates, seed) for size in sizes],
        "images": [Rung(largest, share, updates, seed) for share in shares],
        "updates": [Rung(largest, images, length, seed) for length in lengths],
    }
    return {axis: of_axis[axis] for axis in axes}


def trainings_of(ladders: Sequence[Mapping[str, Sequence[Rung]]]) -> list[Rung]:
    """Return the different trainings of ladders, one for each seed: those that take the fewest updates and parameters first."""
    every = {rung.key: rung for ladder in ladders for axis in ladder.values() for rung in axis}
    return sorted(every.values(), key=lambda rung: (rung.seed, rung.updates * rung.size.parameters, rung.images))


def seconds_of(rungs: Sequence[Rung], times: Mapping[int, Times]) -> float:
    """Return the seconds that trainings take, given the times of each number of parameters."""
    return sum(rung.updates * times[rung.size.parameters].update + times[rung.size.parameters].rest for rung in rungs)


def value_of(rung: Rung, axis: str) -> int:
    """Return the size of a training on an axis."""
    return {"parameters": rung.size.parameters, "images": rung.images, "updates": rung.updates}[axis]
