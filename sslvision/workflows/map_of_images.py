"""The map of a run's held-out images: their features in two dimensions, with a sheet of thumbnails, for the report."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslvision.backbones.backbone import Backbone
from sslvision.data.loader import evaluation_loader
from sslvision.data.source import Source
from sslvision.evaluation.embedding_map import FEWEST, principal_plane, shared_neighbors, tsne
from sslvision.evaluation.features import Extraction, extract_features, sample_indices
from sslvision.evaluation.placement import place_for
from sslvision.nn.normalize import Normalize
from sslvision.system.files import written_whole

MOST = 2_000  # images
SIDES = ((400, 64), (1_000, 48), (MOST, 32))  # up to so many images have thumbnails of so many pixels
MAP, SHEET = "map.npz", "map.jpg"


def write_map(
    backbone: Backbone, normalize: Normalize, source: Source, folder: Path, *, at_most: int, how: Extraction
) -> bool:
    """Write map.npz and map.jpg; return whether there were enough images.

    Args:
        backbone: The backbone; its own pooling gives the features.
        normalize: Normalization of pretraining.
        source: The images.
        folder: figures/ of the run folder.
        at_most: Maximal number of images, a random sample if there are more; never more than MOST.
        how: How features are computed.
    """
    indices = sample_indices(source, min(at_most, MOST), seed=0)
    read, features = extract_features(backbone, normalize, source, indices, how=how)  # (N,), (N, D)
    if len(read) < FEWEST or not features.isfinite().all():
        return False
    device = next(backbone.parameters()).device
    features = features.to(place_for(device, 40 * len(read) ** 2))  # a few matrices (N, N)
    side = next(side for most, side in SIDES if len(read) <= most)
    columns = int(np.ceil(np.sqrt(len(read))))
    layouts = {"t-SNE": tsne(features), "PCA": principal_plane(features)}
    content = {
        "features": features.half().cpu().numpy(),
        "names": np.array([short_name(source.describe(index)) for index in read.tolist()]),
        "columns": np.array(columns),
        "layouts": np.array(list(layouts)),
        "points": np.stack([points.cpu().numpy() for points in layouts.values()]),  # (layouts, N, 2)
        "kept": np.array([shared_neighbors(features, points) for points in layouts.values()]),
    }
    if source.labels is not None:
        classes = source.classes or tuple(map(str, range(int(source.labels.max()) + 1)))
        content |= {"labels": source.labels[read].numpy(), "classes": np.array(classes)}
    sheet = contact_sheet(source, read, side=side, columns=columns, workers=how.workers)
    with written_whole(folder / SHEET) as file:
        sheet.save(file, "JPEG", quality=80, subsampling=0)  # no bleeding from one thumbnail into the next
    with written_whole(folder / MAP) as file:
        np.savez(file, **content)  # type: ignore[arg-type]
    return True


def contact_sheet(source: Source, indices: Tensor, *, side: int, columns: int, workers: int = 0) -> Image.Image:
    """Return center crops of images as squares of `side` pixels, row by row."""
    rows = -(-len(indices) // columns)
    sheet = torch.full((rows * side, columns * side, 3), 255, dtype=torch.uint8)
    place = {index: number for number, index in enumerate(indices.tolist())}
    for where, images in evaluation_loader(source, (side, side), indices.tolist(), workers=workers, crop_pct=1.0):
        colored = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
        for index, image in zip(where.tolist(), colored.permute(0, 2, 3, 1), strict=True):
            row, column = divmod(place[index], columns)
            sheet[row * side : (row + 1) * side, column * side : (column + 1) * side] = image
    return Image.fromarray(sheet.numpy())


def short_name(description: str) -> str:
    """Return the folder and the name of a file, without the folders above: a report may be given to others."""
    return "/".join(Path(description).parts[-2:])
