"""Searching: the images whose embeddings are nearest to that of an image, which need not be one of them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslvision.augment.crops import center_crop
from sslvision.backbones.load import Loaded, load_backbone
from sslvision.data.decode import MAX_PIXELS, read_image
from sslvision.data.source import UnreadableImage
from sslvision.embeddings.nearest import nearest
from sslvision.errors import DataError, UsageError
from sslvision.evaluation.feature_cache import weights_digest
from sslvision.evaluation.features import compute_features
from sslvision.figures.contact_sheet import COLUMNS, SheetRow
from sslvision.nn.normalize import Normalize
from sslvision.workflows.embedding_results import SHOWN, Opened, caption, in_spreadsheets, in_words, rows_of_paths
from sslvision.workflows.embedding_settings import Embed, Search
from sslvision.workflows.probing import open_backbone


def search(settings: Search) -> Path:
    """Find the images that are nearest to those that the settings name, and return the path of the CSV file.

    Raises:
        UsageError: There are no such embeddings, or the weights that made them have changed or are gone.
        DataError: An image does not exist, or cannot be read.
    """
    names = "-".join(Path(one).stem for one in settings.image[:3])
    opened = Opened(settings, f"search-{names}"[:100], "nearest.csv")
    settings.image = with_commas(opened, settings.image)
    known, unknown = split_queries(opened, settings.image)
    pictures = {name: read_query(opened, name) for name in unknown}
    vectors = {name: opened.rows.vectors[row].float() for name, row in known.items()}
    if pictures:
        encoded = encode(opened, list(pictures.values()))
        vectors |= dict(zip(pictures, encoded, strict=True))
    own = torch.tensor([known.get(name, -1) for name in settings.image])
    queries = torch.stack([vectors[name] for name in settings.image])
    similarities, indices = nearest(queries, opened.vectors, settings.k, device=opened.device, leave_out=own)

    lines = (
        [in_spreadsheets(name), rank, f"{similarity:.6f}", *opened.about(row)]
        for name, values, rows in zip(settings.image, similarities.tolist(), indices.tolist(), strict=True)
        for rank, (similarity, row) in enumerate(zip(values, rows, strict=True), start=1)
    )
    opened.write(["query", "rank", "similarity", *opened.headings], lines)
    drawn = []
    for number, name in enumerate(settings.image[:SHOWN]):
        first = opened.pictures.read(known[name]) if name in known else pictures[name]
        rows = indices[number].tolist()
        images = [first, *map(opened.pictures.read, rows)]
        captions = [
            "query",
            *(caption(opened, row, one) for row, one in zip(rows, similarities[number].tolist(), strict=True)),
        ]
        drawn.append(SheetRow(name, images, captions))
    more = "" if len(settings.image) <= SHOWN else f" ({SHOWN} of {len(settings.image):,} searches)"
    count = indices.shape[1]
    title = f"The {in_words(count, 'nearest image', 'nearest images')} and the similarity{more}"
    sheet = opened.draw(drawn, title=title, columns=COLUMNS + 1)
    return opened.end(
        f"{in_words(count, 'nearest image', 'nearest images')} of {in_words(len(settings.image), 'image', 'images')} among "
        f"{len(opened.rows):,}.",
        sheet,
    )


def with_commas(opened: Opened, names: Sequence[str]) -> list[str]:
    """Return the names of images; a name with commas, which looks like several on the command line, as the one that it is."""
    for whole in (",".join(names), ", ".join(names)):
        if os.path.isfile(os.path.expanduser(whole)) or rows_of_paths(opened, [whole])[0]:
            return [whole]
    return [*names]


def split_queries(opened: Opened, names: Sequence[str]) -> tuple[dict[str, int], list[str]]:
    """Return the images that have embeddings, with their rows, and those that have to be encoded.

    A file counts as one that has an embedding if it lies where the embedded one does; a name that is no file, by the column
    `path`.

    Raises:
        UsageError: An image is named twice.
        DataError: There is no such image.
    """
    known: dict[str, int] = {}
    unknown: list[str] = []
    for name in names:
        if name in known or name in unknown:
            raise UsageError(f"image={name} is given twice.")
        file = os.path.expanduser(name)
        is_file = os.path.isfile(file)
        rows, _ = rows_of_paths(opened, [os.path.abspath(file) if is_file else name])
        if rows:
            known[name] = rows[0]
        elif is_file:
            unknown.append(name)
        else:
            raise DataError(
                f"image={name}: there is no such file, and no image of that name among the {len(opened.rows):,} with "
                f"embeddings (the first is {opened.rows.paths[0]})."
            )
    return known, unknown


def read_query(opened: Opened, name: str) -> Tensor:
    """Return an image (C, H, W) as the embedded ones were read. Raises DataError if it cannot be read."""
    about = opened.rows.about
    try:
        return read_image(
            os.path.expanduser(name),
            about["channels"],
            max_pixels=about["data"].get("max_pixels", MAX_PIXELS),
            value_range=opened.pictures.value_range,
        )
    except UnreadableImage as error:
        raise DataError(f"image={name} cannot be read: {error}.") from error


@torch.no_grad()
def encode(opened: Opened, images: Sequence[Tensor]) -> Tensor:
    """Return the unit vectors (n, D) of images, by the network that made the embeddings."""
    about = opened.rows.about
    loaded = backbone_of(about)
    backbone = loaded.backbone.to(opened.device).eval()
    normalize = Normalize(about["mean"], about["std"]).to(opened.device)
    features = []
    for image in images:
        pixels = center_crop(image, backbone.image_size, about["crop_pct"])[None].to(opened.device)
        features.append(compute_features(backbone, normalize(pixels)).float().cpu())
    return opened.rows.unit(torch.cat(features))


def backbone_of(about: dict[str, Any]) -> Loaded:
    """Load the backbone that made embeddings, given their description.

    Raises:
        UsageError: The weights are gone, or others are there now.
    """
    settings = Embed(
        run=about["run"],
        data=dict(about["data"]),
        backbone=dict(about["backbone"]),
        pretrained=about["pretrained"],
        seed=about["seed"],
    )
    loaded = load_backbone(about["run"], **settings.backbone) if settings.pretrained else open_backbone(settings)
    loaded.backbone.crop_pct = about["crop_pct"]
    if weights_digest(loaded.backbone) != about["weights"]:
        raise UsageError(
            f"The weights of {about['run']} are not those that made these embeddings: an image encoded by them cannot be "
            "compared. Make the embeddings again (sslvision embed), or search by an image that has an embedding."
        )
    return loaded
