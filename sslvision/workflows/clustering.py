"""Clustering: groups of images that are alike, by k-means on their embeddings."""

from collections import Counter
from pathlib import Path

from sslvision.embeddings.k_means import Clusters, k_means
from sslvision.errors import UsageError
from sslvision.figures.contact_sheet import COLUMNS
from sslvision.workflows.embedding_results import SHOWN, Opened, caption, in_words
from sslvision.workflows.embedding_settings import Cluster


def cluster(settings: Cluster) -> Path:
    """Group the images, and return the path of the CSV file.

    Raises:
        UsageError: There are no such embeddings, or fewer images than clusters.
    """
    opened = Opened(settings, f"cluster-{settings.k}", "clusters.csv")
    if settings.k > len(opened.rows):
        raise UsageError(f"k={settings.k} clusters are more than the {len(opened.rows):,} images.")
    with opened.progress("clustering") as progress:
        found = k_means(
            *(opened.vectors, settings.k),
            seed=settings.seed,
            device=opened.device,
            restarts=settings.restarts,
            progress=progress,
        )
    lines = (
        [number, f"{similarity:.6f}", *opened.about(row)]
        for row, (number, similarity) in enumerate(
            zip((found.assigned + 1).tolist(), found.similarities.tolist(), strict=True)
        )
    )
    opened.write(["cluster", "similarity", *opened.headings], lines)
    drawn = []
    for number in range(min(settings.k, SHOWN)):
        rows = nearest_to_center(found, number)
        captions = [caption(opened, row, float(found.similarities[row])) for row in rows]
        drawn.append(opened.sheet_row(heading(opened, found, number), rows, captions))
    more = f", the {SHOWN} largest" if settings.k > SHOWN else ""
    sheet = opened.draw(drawn, title=f"{settings.k} clusters{more}: the images nearest to each center")
    sizes = found.assigned.bincount(minlength=settings.k)
    words = f"{settings.k} clusters of {int(sizes.min()):,} to {int(sizes.max()):,} images"
    return opened.end(f"{words}{agreement(opened, found)}.", sheet)


def nearest_to_center(found: Clusters, number: int) -> list[int]:
    """Return the rows of the images nearest to a cluster's center, as many as fit in a line of the contact sheet."""
    members = (found.assigned == number).nonzero()[:, 0]
    order = found.similarities[members].argsort(descending=True, stable=True)[:COLUMNS]
    return [int(row) for row in members[order]]


def heading(opened: Opened, found: Clusters, number: int) -> str:
    """Return the size of a cluster in words, and its most frequent label."""
    members = (found.assigned == number).nonzero()[:, 0].tolist()
    text = f"Cluster {number + 1}: {in_words(len(members), 'image', 'images')}"
    known = [label for row in members if (label := opened.rows.labels[row])] if opened.rows.labels is not None else []
    if not known:
        return text
    label, count = Counter(known).most_common(1)[0]
    return f"{text}, {count / len(known):.0%} of the labeled ones {label}"


def agreement(opened: Opened, found: Clusters) -> str:
    """Return in words how many labeled images have the most frequent label of their cluster; nothing without labels."""
    if opened.rows.labels is None:
        return ""
    counts: dict[int, Counter[str]] = {}
    for number, label in zip(found.assigned.tolist(), opened.rows.labels, strict=True):
        if label:
            counts.setdefault(number, Counter())[label] += 1
    total = sum(sum(one.values()) for one in counts.values())
    if not total:
        return ""
    most = sum(one.most_common(1)[0][1] for one in counts.values())
    return f"; {most / total:.1%} of the labeled images have the most frequent label of their cluster"
