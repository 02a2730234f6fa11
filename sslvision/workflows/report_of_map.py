"""The section of a report that shows the map of a run's held-out images."""

import base64
import zipfile
from typing import Any, Literal

import numpy as np

from sslvision.errors import UsageError
from sslvision.figures.report_map import map_figure
from sslvision.figures.report_page import paragraph
from sslvision.runs.run_record import RunRecord

HOW = {
    "t-SNE": "t-SNE puts images near one another whose features are alike; distances between groups, and the sizes of groups, "
    "say nothing.",
    "UMAP": "UMAP puts images near one another whose features are alike; distances between groups say little.",
    "PCA": "PCA is a straight look at the features from the side on which they are widest.",
}
NEIGHBORS = 10  # by which a map is judged


def map_section(run: RunRecord, layout: Literal["tsne", "umap"] = "tsne") -> str:
    """Return the map as HTML; nothing if the run has none.

    Raises:
        UsageError: UMAP is wanted, and umap-learn is not installed or the run has no map.
    """
    files = [run.folder / "figures" / name for name in ("map.npz", "map.jpg")]
    if not all(file.is_file() for file in files):
        if layout == "umap":
            raise UsageError(
                f"map=umap: {run.folder} has no map of images (figures/map.npz): a pretraining run that ended has."
            )
        return ""
    try:
        with np.load(files[0], allow_pickle=False) as opened:
            content: dict[str, Any] = {name: opened[name] for name in opened.files}
        sheet = f"data:image/jpeg;base64,{base64.b64encode(files[1].read_bytes()).decode()}"
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        return paragraph(f"The map of images cannot be read: {error}")
    layouts = dict(zip(content["layouts"].tolist(), content["points"].tolist(), strict=True))
    kept = dict(zip(layouts, content["kept"].tolist(), strict=True))
    if layout == "umap":
        points = umap(content["features"].astype(np.float32))
        layouts = {"UMAP": points.tolist(), **layouts}
    names = content["names"].tolist()
    labels = content["labels"].tolist() if "labels" in content else []
    classes = content["classes"].tolist() if "classes" in content else []
    told = [f"{len(names):,} held-out images by the features of the backbone; point at a dot to see its image."]
    told += [HOW[name] for name in layouts if name in HOW]
    shares = " and ".join(f"{100 * share:.0f} % ({name})" for name, share in kept.items())
    told.append(
        f"Of the {NEIGHBORS} nearest neighbors by features, {shares} are among the {NEIGHBORS} nearest on the map: the rest is "
        "lost in two dimensions."
    )
    told += ["Colors are classes, which pretraining never saw: press a name to see one alone."] * bool(labels)
    return map_figure(
        layouts,
        names=names,
        labels=labels,
        classes=classes,
        sheet=sheet,
        columns=int(content["columns"]),
        caption=" ".join(told),
    )


def umap(features: np.ndarray) -> np.ndarray:
    """Return UMAP's two dimensions (N, 2) of features (N, D).

    Raises:
        UsageError: umap-learn is not installed.
    """
    try:
        from umap import UMAP
    except ImportError as error:
        raise UsageError(
            'map=umap needs umap-learn: pip install "sslvision[report]". map=tsne needs nothing.'
        ) from error
    neighbors = min(15, len(features) - 1)
    return np.asarray(UMAP(n_neighbors=neighbors, metric="cosine", random_state=0, n_jobs=1).fit_transform(features))
