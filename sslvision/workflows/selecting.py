"""Selecting: a subset of the images that stands for all of them, to label first."""

import csv
from pathlib import Path

import torch
from torch import Tensor

from sslvision.embeddings.k_center import k_center
from sslvision.embeddings.k_means import k_means, most_typical
from sslvision.errors import UsageError
from sslvision.workflows.console import print_findings
from sslvision.workflows.embedding_results import SHOWN, Opened, caption, in_words, rows_of_paths
from sslvision.workflows.embedding_settings import Select


def select(settings: Select) -> Path:
    """Choose images to label, and return the path of the CSV file.

    Raises:
        UsageError: There are no such embeddings, fewer images than asked for, or none of the labeled images among them.
    """
    name = "" if settings.by == "clusters" else f"-{settings.by}"
    opened = Opened(settings, f"select-{settings.n}{name}", "selected.csv")
    labeled = labeled_rows(opened, settings.labeled)
    among = torch.tensor([settings.split in ("all", split) for split in opened.rows.splits])
    among[labeled] = False
    if settings.n > int(among.sum()):
        raise UsageError(f"n={settings.n} are more than the {int(among.sum()):,} images to choose from.")
    with opened.progress("choosing") as progress:
        if settings.by == "cover":
            chosen, distances = k_center(
                opened.vectors, settings.n, device=opened.device, among=among, labeled=labeled, progress=progress
            )
        else:
            chosen, distances = typical(opened, settings, among, labeled), []
    shown = [f"{distance:.6f}" for distance in distances] or [""] * len(chosen)
    lines = ([rank, *opened.about(row), shown[rank - 1]] for rank, row in enumerate(chosen, 1))
    opened.write(
        ["rank", *opened.headings, *(["distance"] if distances else [])],
        (line if distances else line[:-1] for line in lines),
    )
    drawn = chosen[: 4 * SHOWN]
    how = "Each the farthest from those before it" if distances else "Each the most typical of its cluster"
    heading = f"{how}{f'; the first {len(drawn)}' if len(drawn) < len(chosen) else ''}"
    title = f"{in_words(len(chosen), 'image', 'images')} to label first, of {int(among.sum()):,}"
    sheet = opened.draw([opened.sheet_row(heading, drawn, [caption(opened, row) for row in drawn])], title=title)
    return opened.end(f"{title}{told_of(opened, chosen, distances)}", sheet)


def typical(opened: Opened, settings: Select, among: Tensor, labeled: list[int]) -> list[int]:
    """Return the most typical image of each of the n largest clusters without a labeled image.

    There are as many clusters as images with labels, then and before (Hacohen et al. 2022, arXiv:2202.02794). Where copies make
    clusters empty, the images farthest from those chosen follow.
    """
    rows = torch.cat([among.nonzero()[:, 0], torch.tensor(labeled, dtype=torch.int64)])
    vectors = opened.vectors if len(rows) == len(opened.rows) else opened.vectors[rows.to(opened.vectors.device)]
    if vectors is opened.vectors:
        rows = torch.arange(len(rows))
    clusters = k_means(vectors, settings.n + len(labeled), seed=settings.seed, device=opened.device)
    covered = {int(number) for number in clusters.assigned[torch.isin(rows, torch.tensor(labeled, dtype=torch.int64))]}
    typical_rows = rows[torch.tensor(most_typical(clusters, without=covered), dtype=torch.int64)]
    chosen: list[int] = typical_rows[: settings.n].tolist()
    if len(chosen) < settings.n:
        left = among.clone()
        left[chosen] = False
        missing = settings.n - len(chosen)
        chosen += k_center(opened.vectors, missing, device=opened.device, among=left, labeled=[*labeled, *chosen])[0]
    return chosen


def told_of(opened: Opened, chosen: list[int], distances: list[float]) -> str:
    """Return in words how well the chosen images stand for the others: the last distance, and classes, where they are known."""
    words = (
        f": all others to choose from are within a cosine distance of {distances[-1]:.3f} of one of them"
        if distances
        else ""
    )
    labels = opened.rows.labels
    if labels is None:
        return f"{words}."
    found, known = {labels[row] for row in chosen} - {""}, {*labels} - {""}
    return f"{words}. They have {len(found):,} of {in_words(len(known), 'class', 'classes')}."


def labeled_rows(opened: Opened, file: str | None) -> list[int]:
    """Return the rows of the images in a CSV file with a column `path`.

    Raises:
        UsageError: There is no such file or column, or no image of it has an embedding.
    """
    if file is None:
        return []
    try:
        with open(Path(file).expanduser(), newline="", encoding="utf-8-sig") as opened_file:
            reader = csv.DictReader(opened_file)
            if "path" not in (reader.fieldnames or ()):
                raise UsageError(
                    f"labeled={file} has no column `path`; its columns are {', '.join(reader.fieldnames or ())}."
                )
            paths = list(dict.fromkeys(row["path"] for row in reader if row["path"]))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"labeled={file} cannot be read: {error}.") from error
    rows, missing = rows_of_paths(opened, paths)
    if paths and not rows:
        raise UsageError(
            f"labeled={file}: none of its {len(paths):,} paths has an embedding; the first is {paths[0]}, and the first with "
            f"an embedding {opened.rows.paths[0]}."
        )
    if missing:
        told = in_words(len(missing), "path has", "paths have")
        print_findings(opened.console, [f"{told} no embedding, and count for nothing: {missing[0]}, ..."])
    return rows
