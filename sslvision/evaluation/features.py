"""Frozen features of images: the backbone in eval mode, each image once, on all processes together.

A feature is the backbone's own pooled feature, or, as in DINO's linear probe, the class tokens of the last blocks. It is
computed from the whole image, as in evaluation, or from a random crop of it, as in training.
"""

import math
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from sslvision.augment.crops import Crop, crop_one
from sslvision.augment.randomness import ImageRandom
from sslvision.backbones.backbone import Backbone
from sslvision.backbones.vit import ViT
from sslvision.data.loader import evaluation_loader
from sslvision.data.order import Order
from sslvision.data.source import Source
from sslvision.errors import UsageError
from sslvision.nn.compilation import force_eager
from sslvision.nn.image_size import shortest
from sslvision.nn.normalize import Normalize

Progress = Callable[[int, int], None]  # images done and all images, over all processes


@dataclass(eq=False)
class RandomCrops:
    """A source of random crops of another source's images: the crops of training in `epoch` with `seed`.

    Each crop is a function of (seed, epoch, index) alone. Training crops images in memory a batch at a time on its device:
    the same boxes, and pixels that differ by rounding.
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
        return crop_one(self.source.read(index), rng, 0, self.crop)  # (C, *crop.shape)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    @property
    def version(self) -> str:
        """Return what changes when the images do; see EncodedSource."""
        return getattr(self.source, "version", "")


@dataclass(frozen=True)
class FeatureKind:
    """Which feature of a backbone represents an image.

    Attributes:
        last_blocks: 0 for the backbone's pooled feature. n for the class tokens of a ViT's last n blocks, each after the
            final norm, concatenated (DINO, appendix F). A backbone without a class token gives its pooled feature.
        patch_mean: With `last_blocks`, append the mean of the last block's patch tokens.
    """

    last_blocks: int = 0
    patch_mean: bool = False


@dataclass(frozen=True)
class Extraction:
    """How features are computed. Only `precision` changes them by more than rounding.

    Attributes:
        batch_size: Images per forward pass.
        workers: Number of loader processes.
        precision: dtype of matrix products; bfloat16 where training uses it too.
        rank, world_size: With several processes, each encodes its share, and all get everything.
        progress: Called after every batch with the number of images done and of all images.
    """

    batch_size: int = 500
    workers: int = 0
    precision: torch.dtype = torch.float32
    rank: int = 0
    world_size: int = 1
    progress: Progress | None = None


POOLED, DEFAULT = FeatureKind(), Extraction()


def extract_features(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    indices: Sequence[int],
    kind: FeatureKind = POOLED,
    how: Extraction = DEFAULT,
) -> tuple[Tensor, Tensor]:
    """Encode some images of a source.

    Args:
        backbone: The backbone; it runs in eval mode, and gets its training mode back afterwards.
        normalize: Normalization of pretraining.
        source: The images, or random crops of them (RandomCrops).
        indices: Indices of the images to encode.
        kind: Which feature represents an image.
        how: How features are computed.

    Returns:
        Indices (N,) of the readable images, ascending, and their features (N, F), float32, in main memory.

    Raises:
        UsageError: The ViT has fewer blocks, or the crops do not have the backbone's image size.
    """
    read = torch.empty(len(indices), dtype=torch.int64)
    features = torch.empty(len(indices), feature_dim(backbone, kind))
    done = 0
    for where, rows in feature_batches(backbone, normalize, source, indices, kind, how):
        read[done : done + len(where)], features[done : done + len(where)] = where, rows
        done += len(where)
    return read[:done], features[:done]


@torch.no_grad()
def feature_batches(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    indices: Sequence[int],
    kind: FeatureKind = POOLED,
    how: Extraction = DEFAULT,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the result of `extract_features` in parts, in the same order, the same on every process."""
    size, device = backbone.image_size, next(backbone.parameters()).device
    if isinstance(source, RandomCrops) and source.crop.shape != size:
        raise UsageError(
            f"Features are computed from images of {shortest(size)} pixels, the backbone's size, but the random crops have "
            f"{source.crop.size}: use crops of {shortest(size)}, or load the backbone for images of {source.crop.size}."
        )
    nothing = torch.empty(0, dtype=torch.int64), torch.empty(0, feature_dim(backbone, kind))
    indices, batch_size, world_size = sorted(indices), how.batch_size, how.world_size
    # Process r takes every world_size-th image, so that the shares of one round are ascending indices together.
    share = indices[how.rank :: world_size]
    # Random crops have the backbone's size already.
    crop_pct = None if isinstance(source, RandomCrops) else backbone.crop_pct
    loader = iter(evaluation_loader(source, size, share, batch_size=batch_size, workers=how.workers, crop_pct=crop_pct))
    was_training = backbone.training
    backbone.eval()
    try:
        for number in range(math.ceil(math.ceil(len(indices) / world_size) / batch_size)):
            where, images = next(loader, nothing)
            own = nothing
            if len(where):
                with torch.autocast(device.type, dtype=how.precision, enabled=how.precision != torch.float32):
                    pixels = normalize(images.to(device, non_blocking=True))
                    features = compute_features(backbone, pixels, kind)  # (B, F)
                own = where, features.float().cpu()
            shares = [own] * world_size
            if world_size > 1:
                dist.all_gather_object(shares, own)
            where, rows = (torch.cat(column) for column in zip(*shares, strict=True))
            order = where.argsort()
            yield where[order], rows[order]
            if how.progress is not None:
                how.progress(min((number + 1) * batch_size * world_size, len(indices)), len(indices))
    finally:
        backbone.train(was_training)


@force_eager()
def compute_features(backbone: Backbone, images: Tensor, kind: FeatureKind = POOLED) -> Tensor:
    """Return the features (B, F) of normalized images (B, C, H, W) of the backbone's image size."""
    if not kind.last_blocks or not has_class_token(backbone):
        return backbone(images)
    blocks = backbone.model.forward_intermediates(
        images,
        indices=kind.last_blocks,
        return_prefix_tokens=True,
        norm=True,
        output_fmt="NLC",
        intermediates_only=True,
    )  # per block: patch tokens (B, L, D), class and register tokens (B, P, D)
    parts = [prefix[:, 0] for _, prefix in blocks]
    if kind.patch_mean:
        parts.append(blocks[-1][0].mean(dim=1))
    return torch.cat(parts, dim=1)


def feature_dim(backbone: Backbone, kind: FeatureKind = POOLED) -> int:
    """Return F, the channels of a feature. Raises UsageError for more blocks than the ViT has."""
    if not kind.last_blocks or not has_class_token(backbone):
        return backbone.embed_dim
    if not 0 < kind.last_blocks <= len(backbone.model.blocks):
        raise UsageError(
            f"There are no features of the last {kind.last_blocks} blocks: this ViT has {len(backbone.model.blocks)} blocks."
        )
    return (kind.last_blocks + kind.patch_mean) * backbone.embed_dim


def has_class_token(backbone: Backbone) -> bool:
    """Return whether the backbone is a ViT with a class token."""
    return isinstance(backbone, ViT) and backbone.model.cls_token is not None


def dino_features(backbone: Backbone) -> FeatureKind:
    """Return the feature of DINO's linear probe (Caron et al. 2021, appendix F).

    ViT-S and narrower: the class tokens of the last 4 blocks, or of all blocks if there are fewer. Wider ViTs: the last
    class token and the mean of the patch tokens. Without a class token: the pooled feature.
    """
    if not has_class_token(backbone):
        return POOLED
    if backbone.embed_dim <= 384:
        return FeatureKind(last_blocks=min(4, len(backbone.model.blocks)))
    return FeatureKind(last_blocks=1, patch_mean=True)


def sample_indices(source: Sized, at_most: int, *, seed: int) -> list[int]:
    """Return all indices of a source or of features, or a random sample of `at_most`, ascending."""
    return sorted(Order(len(source), seed=seed, epoch=0)[:at_most].tolist())
