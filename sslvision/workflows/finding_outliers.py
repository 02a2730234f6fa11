"""Outliers: the images that are farthest from their nearest neighbors."""

from pathlib import Path

from sslvision.embeddings.nearest import neighbor_distances
from sslvision.errors import UsageError
from sslvision.workflows.embedding_results import SHOWN, Opened, caption, in_words
from sslvision.workflows.embedding_settings import Outliers


def find_outliers(settings: Outliers) -> Path:
    """Find the images with the largest mean distance to their nearest neighbors; return the path of the CSV file.

    Raises:
        UsageError: There are no such embeddings, or fewer than k others.
    """
    opened = Opened(settings, "outliers", "outliers.csv")
    if settings.k >= len(opened.rows):
        raise UsageError(
            f"k={settings.k} neighbors are more than the {len(opened.rows) - 1:,} other images: give fewer."
        )
    with opened.progress("comparing") as progress:
        distances, first = neighbor_distances(opened.vectors, settings.k, device=opened.device, progress=progress)
    order = distances.argsort(descending=True, stable=True)[: settings.n].tolist()
    lines = (
        [rank, f"{float(distances[row]):.6f}", *opened.about(row), opened.rows.paths[int(first[row])]]
        for rank, row in enumerate(order, 1)
    )
    opened.write(["rank", "distance", *opened.headings, "nearest"], lines)
    shown = order[: 3 * SHOWN]
    typical = float(distances.median())
    title = f"The {in_words(len(shown), 'image', 'images')} farthest from their {settings.k} nearest neighbors"
    sheet = opened.draw(
        [
            opened.sheet_row(
                f"Mean cosine distance (of the median image {typical:.3f})",
                shown,
                [caption(opened, row, float(distances[row])) for row in shown],
            )
        ],
        title=title,
    )
    low, high = float(distances[order[-1]]), float(distances[order[0]])
    return opened.end(
        f"{in_words(len(order), 'image', 'images')} of {len(opened.rows):,}, with mean cosine distances from {low:.3f} to "
        f"{high:.3f} to their {settings.k} nearest neighbors; that of the median image is {typical:.3f}.",
        sheet,
    )
