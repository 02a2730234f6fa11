"""Frozen features of images: the backbone in eval mode, each image once, on as many processes as there are."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sslvision.backbones.base import Backbone
from sslvision.data.base import Source
from sslvision.data.loading import evaluation_loader
from sslvision.nn.normalize import Normalize
from sslvision.nn.randomness import permutation


@torch.no_grad()
def extract_features(
    backbone: Backbone,
    normalize: Normalize,
    source: Source,
    places: Sequence[int],
    *,
    batch_size: int = 500,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    rank: int = 0,
    world: int = 1,
) -> tuple[Tensor, Tensor]:
    """Encode and pool some images of a source.

    Args:
        backbone: is put into eval mode for the time; its training mode comes back afterwards.
        normalize: as in pretraining.
        source: where the images are.
        places: which of them.
        batch_size: images per forward pass.
        workers: loader processes.
        precision: of the matrix products; bfloat16 where training has it too.
        rank, world: with several processes each encodes its share, and all get everything.

    Returns:
        places (N,) of the readable ones, ascending, and their features (N, D), float32, in main memory.
    """
    size, device = backbone.image_size[0], next(backbone.parameters()).device
    loader = evaluation_loader(source, size, list(places[rank::world]), batch_size=batch_size, workers=workers)
    was_training = backbone.training
    backbone.eval()
    found, features = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, backbone.width)]
    try:
        for where, images in loader:
            if len(where):
                with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
                    encoded = backbone(normalize(images.to(device, non_blocking=True)))  # (B, D)
                found.append(where)
                features.append(encoded.float().cpu())
    finally:
        backbone.train(was_training)
    where, encoded = torch.cat(found), torch.cat(features)
    if world > 1:
        shares: list[tuple[Tensor, Tensor]] = [(where, encoded)] * world
        dist.all_gather_object(shares, (where, encoded))
        where, encoded = (torch.cat(column) for column in zip(*shares, strict=True))
    order = where.argsort()
    return where[order], encoded[order]


def chosen_places(source: Source, at_most: int, *, seed: int) -> list[int]:
    """Return all places of a source, or `at_most` drawn ones, ascending."""
    return sorted(permutation(len(source), seed=seed, epoch=0)[:at_most].tolist())
