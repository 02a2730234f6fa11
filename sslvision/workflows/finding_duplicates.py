"""Duplicates: groups of images whose embeddings are nearly the same, and those that lie in more than one split."""

from pathlib import Path

from sslvision.data.sources.list_images import share
from sslvision.embeddings.near_duplicates import groups_of, highest_similarities, similar_pairs
from sslvision.workflows.console import print_findings
from sslvision.workflows.embedding_results import SHOWN, Opened, caption, in_words
from sslvision.workflows.embedding_settings import Duplicates

DRAWN = 10  # images of a group


def find_duplicates(settings: Duplicates) -> Path:
    """Find groups of near-duplicates, and return the path of the CSV file.

    Raises:
        UsageError: There are no such embeddings, or the threshold makes duplicates of too many images.
    """
    opened = Opened(settings, "duplicates", "duplicates.csv")
    with opened.progress("comparing") as progress:
        pairs, similarities = similar_pairs(opened.vectors, settings.threshold, device=opened.device, progress=progress)
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


def _heading(opened: Opened, number: int, group: list[int]) -> str:
    splits = sorted({opened.rows.splits[row] for row in group})
    labels = sorted({opened.rows.labels[row] for row in group}) if opened.rows.labels is not None else []
    return (
        f"Group {number}: {in_words(len(group), 'image', 'images')}"
        + (f", {DRAWN} of them shown" if len(group) > DRAWN else "")
        + (f", in {' and '.join(splits)}" if len(splits) > 1 else "")
        + (f", labels {', '.join(labels[:4])}" if len(labels) > 1 else "")
    )
