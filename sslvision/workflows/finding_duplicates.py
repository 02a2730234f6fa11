"""Duplicates: groups of images whose embeddings and pixels are nearly the same, and those that lie in more than one split.

Embeddings of a network that has not been trained for long are similar for images that have little in common, and those of a
mirrored copy may differ. So the threshold on embeddings only proposes pairs, of which the pixels decide: small gray versions
of both images have to correlate, one of them perhaps mirrored.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sslvision.data.sources.list_images import share
from sslvision.embeddings.near_duplicates import groups_of, highest_similarities, pixel_correlations, similar_pairs
from sslvision.workflows.console import print_findings
from sslvision.workflows.embedding_results import SHOWN, Opened, caption, in_words
from sslvision.workflows.embedding_settings import Duplicates

DRAWN = 10  # images of a group
SIDE = 32  # pixels of the images that are compared


def find_duplicates(settings: Duplicates) -> Path:
    """Find groups of near-duplicates, and return the path of the CSV file.

    Raises:
        UsageError: There are no such embeddings.
    """
    opened = Opened(settings, "duplicates", "duplicates.csv")
    with opened.progress("comparing") as progress:
        pairs, similarities, threshold = similar_pairs(
            opened.vectors, settings.threshold, device=opened.device, progress=progress
        )
    if threshold > settings.threshold:
        told = f"threshold={settings.threshold:g} makes too many pairs: those from {threshold:.4f} on are used."
        print_findings(opened.console, [told])
    if settings.pixels > -1:
        pairs, similarities = confirmed(opened, pairs, similarities, settings.pixels)
    groups = groups_of(pairs)
    highest = highest_similarities(pairs, similarities)
    lines = (
        [number, f"{highest[row]:.6f}", *opened.about(row)] for number, group in enumerate(groups, 1) for row in group
    )
    images = opened.write(["group", "similarity", *opened.headings], lines)
    leaks = [group for group in groups if len({opened.rows.splits[row] for row in group}) > 1]
    sheet = None
    if groups:
        drawn = [
            opened.sheet_row(
                _heading(opened, number, group),
                group[:DRAWN],
                [caption(opened, row, highest[row]) for row in group[:DRAWN]],
            )
            for number, group in enumerate(groups[:SHOWN], 1)
        ]
        more = f", the {SHOWN} largest" if len(groups) > SHOWN else ""
        title = f"{in_words(len(groups), 'group', 'groups')} of near-duplicates{more}, similarity from {settings.threshold:g}"
        sheet = opened.draw(drawn, title=title)
    if leaks:
        told = in_words(len(leaks), "group has images", "groups have images")
        print_findings(
            opened.console,
            [f"{told} in more than one split: scores on such held-out images are too good. See the column `split`."],
        )
    spare = images - len(groups)
    return opened.end(
        f"{in_words(len(groups), 'group', 'groups')} of near-duplicates (similarity from {settings.threshold:g}) with "
        f"{share(images, len(opened.rows), 'images')}; {spare:,} could be left out.",
        sheet,
    )


def confirmed(
    opened: Opened, pairs: np.ndarray, similarities: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs (P, 2) whose pixels correlate, and their similarities. An image that cannot be read passes."""
    members, places = np.unique(pairs, return_inverse=True)
    places = places.reshape(-1, 2)
    small = torch.zeros(len(members), SIDE, SIDE, dtype=torch.uint8)
    known = np.ones(len(members), dtype=bool)
    with opened.progress("reading the images of similar pairs") as progress:
        for number, row in enumerate(members.tolist()):
            image = opened.pictures.read(row)
            if image is None:
                known[number] = False
            else:
                small[number] = shrunk(image)
            progress(number + 1, len(members))
    kept = (pixel_correlations(small, places) >= least) | ~known[places].all(axis=1)
    if lost := int((~known).sum()):
        told = in_words(lost, "image cannot be read any more, and is", "images cannot be read any more, and are")
        print_findings(opened.console, [f"{told} judged by the embedding alone: {opened.pictures.problem}"])
    return pairs[kept], similarities[kept]


def shrunk(image: Tensor) -> Tensor:
    """Return an image (C, H, W) uint8 in gray as a square of 32 pixels, whatever its shape."""
    gray = image.float().mean(dim=0)[None, None]
    small = F.interpolate(gray, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    return small[0, 0].round().clamp(0, 255).to(torch.uint8)


def _heading(opened: Opened, number: int, group: list[int]) -> str:
    splits = sorted({opened.rows.splits[row] for row in group})
    labels = sorted({opened.rows.labels[row] for row in group}) if opened.rows.labels is not None else []
    return (
        f"Group {number}: {in_words(len(group), 'image', 'images')}"
        + (f", {DRAWN} of them shown" if len(group) > DRAWN else "")
        + (f", in {' and '.join(splits)}" if len(splits) > 1 else "")
        + (f", labels {', '.join(labels[:4])}" if len(labels) > 1 else "")
    )
