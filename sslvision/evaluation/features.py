"""Frozen features of images: the backbone in eval mode, each image once, on as many processes as there are.

What stands for an image is the backbone's own pooled feature, or, as DINO's linear probe has it, the class tokens of the
last blocks. What is seen of it is the whole image, as in evaluation, or one random crop of it, as in training.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from sslvision.augment.crops import Crop, crop_one
from sslvision.augment.randomness import ImageRandom, permutation
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.vit import ViT
from sslvision.data.loader import evaluation_loader
from sslvision.data.source import Source
from sslvision.errors import UsageError
from sslvision.nn.compilation import eagerly
from sslvision.nn.normalize import Normalize

Progress = Callable[[int, int], None]  # images done, images in all, over all processes


@dataclass(eq=False)
class RandomCrops:
    """A source whose images are random crops of another's: those that training cuts in `epoch` with `seed`.

    Each crop is a function of (seed, epoch, place) alone. Training cuts those of a source in memory a batch at a time on
    its device: the same boxes, and bytes that differ by roundings.
    """

    source: Source
    crop: Crop
    seed: int
    epoch: int
    images: Tensor | None = None
    name: str = field(init=False)
    channels: int = field(init=False)
    classes: tuple[str, ...] | None = field(init=False)
    labels: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.channels = self.source.name, self.source.channels
        self.classes, self.labels = self.source.classes, self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Tensor:
        rng = ImageRandom(self.seed, torch.tensor([self.epoch]), torch.tensor([index]))
        return crop_one(self.source.read(index), rng, 0, self.crop)  # (C, size, size)

    def describe(self, index: int) -> str:
        return self.source.describe(index)


def extract_features(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    indices: Sequence[int],
    *,
    last_blocks: int = 0,
    patch_mean: bool = False,
    crop: Crop | None = None,
    seed: int = 0,
    epoch: int = 0,
    batch_size: int = 500,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    rank: int = 0,
    world: int = 1,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode some images of a source.

    Args:
        backbone: is put into eval mode for the time; its training mode comes back afterwards.
        normalize: as in pretraining.
        source: where the images are.
        indices: which of them.
        last_blocks: 0 takes the backbone's pooled feature. n takes the class tokens of a ViT's last n blocks, each after
            the final norm, side by side (DINO, appendix F). A backbone without a class token gives its pooled feature.
        patch_mean: with `last_blocks`, append the mean of the last block's patch tokens.
        crop: None sees the whole image, resized and cut centrally; otherwise a random crop of it is seen.
        seed, epoch: of the random crops, which are those of training (see RandomCrops).
        batch_size: images per forward pass.
        workers: loader processes.
        precision: of the matrix products; bfloat16 where training has it too.
        rank, world: with several processes each encodes its share, and all get everything.
        progress: is told after every batch how many images are done, and of how many.

    Returns:
        indices (N,) of the readable ones, ascending, and their features (N, F), float32, in main memory.

    Raises:
        UsageError: the ViT has fewer blocks, or the crop is not of the backbone's image size.
    """
    found = torch.empty(len(indices), dtype=torch.int64)
    features = torch.empty(len(indices), feature_dim(backbone, last_blocks, patch_mean))
    done = 0
    for where, rows in feature_batches(
        backbone,
        normalize,
        source if crop is None else RandomCrops(source, crop, seed, epoch),
        indices,
        last_blocks=last_blocks,
        patch_mean=patch_mean,
        batch_size=batch_size,
        workers=workers,
        precision=precision,
        rank=rank,
        world=world,
        progress=progress,
    ):
        found[done : done + len(where)], features[done : done + len(where)] = where, rows
        done += len(where)
    return found[:done], features[:done]


@torch.no_grad()
def feature_batches(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    indices: Sequence[int],
    *,
    last_blocks: int,
    patch_mean: bool,
    batch_size: int,
    workers: int,
    precision: torch.dtype,
    rank: int,
    world: int,
    progress: Progress | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what `extract_features` returns in parts, in the same order, on every process the same."""
    size, device = backbone.image_size[0], next(backbone.parameters()).device
    if isinstance(source, RandomCrops) and source.crop.size != size:
        raise UsageError(
            f"Features are taken of images of {size} pixels, the backbone's, but the random crops have "
            f"{source.crop.size}: give crops of {size}, or load the backbone for images of {source.crop.size}."
        )
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, feature_dim(backbone, last_blocks, patch_mean))
    indices = sorted(indices)
    # Process r takes every world-th image, so that the shares of one round lie together: ascending indices, in parts.
    loader = iter(evaluation_loader(source, size, indices[rank::world], batch_size=batch_size, workers=workers))
    was_training = backbone.training
    backbone.eval()
    try:
        for number in range(math.ceil(math.ceil(len(indices) / world) / batch_size)):
            where, images = next(loader, nothing)
            share = nothing
            if len(where):
                with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                    pixels = normalize(images.to(device, non_blocking=True))
                    encoded = features_of(backbone, pixels, last_blocks, patch_mean)  # (B, F)
                share = where, encoded.float().cpu()
            shares = [share] * world
            if world > 1:
                dist.all_gather_object(shares, share)
            where, rows = (torch.cat(column) for column in zip(*shares, strict=True))
            order = where.argsort()
            yield where[order], rows[order]
            if progress is not None:
                progress(min((number + 1) * batch_size * world, len(indices)), len(indices))
    finally:
        backbone.train(was_training)


@eagerly()
def features_of(backbone: Backbone, images: Tensor, last_blocks: int = 0, patch_mean: bool = False) -> Tensor:
    """Return one feature per normalized image (B, C, H, W) of the backbone's image size: (B, F)."""
    if not last_blocks or not has_class_token(backbone):
        return backbone(images)
    blocks = backbone.model.forward_intermediates(
        images,
        indices=last_blocks,
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )  # of each block its patch tokens (B, L, D) and its class and register tokens (B, P, D)
    parts = [prefix[:, 0] for _, prefix in blocks]
    if patch_mean:
        parts.append(blocks[-1][0].mean(dim=1))
    return torch.cat(parts, dim=1)


def feature_dim(backbone: Backbone, last_blocks: int = 0, patch_mean: bool = False) -> int:
    """Return F, the channels of a feature. Raises UsageError for more blocks than there are."""
    if not last_blocks or not has_class_token(backbone):
        return backbone.embed_dim
    if not 0 < last_blocks <= len(backbone.model.blocks):
        raise UsageError(
            f"Features of the last {last_blocks} blocks cannot be: this ViT has {len(backbone.model.blocks)} blocks."
        )
    return (last_blocks + patch_mean) * backbone.embed_dim


def has_class_token(backbone: Backbone) -> bool:
    """Return whether the backbone is a ViT with a class token."""
    return isinstance(backbone, ViT) and backbone.model.cls_token is not None


def dino_features(backbone: Backbone) -> tuple[int, bool]:
    """Return `last_blocks` and `patch_mean` of DINO's linear probe (Caron et al. 2021, appendix F).

    ViT-S and narrower: the class tokens of the last 4 blocks, or of all if there are fewer. Wider ones: the last class
    token and the mean of the patch tokens. Without a class token: the pooled feature.
    """
    if not has_class_token(backbone):
        return 0, False
    return (min(4, len(backbone.model.blocks)), False) if backbone.embed_dim <= 384 else (1, True)


def chosen_indices(source: Source, at_most: int, *, seed: int) -> list[int]:
    """Return all indices of a source, or `at_most` drawn ones, ascending."""
    return sorted(permutation(len(source), seed=seed, epoch=0)[:at_most].tolist())
