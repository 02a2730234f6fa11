"""The settings of `embed`, and of the commands that work with what it writes: search, duplicates, outliers, select, cluster."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sslvision.errors import UsageError
from sslvision.settings import RUN, Sections, at_least, option

_EMBEDDINGS = "a folder written by `sslvision embed`"
_CENTER = (
    "subtract the mean of all embeddings before they are compared, so that similarities spread from -1 to 1 "
    "(default: from 100 images on)"
)
_OVERWRITE = "replace the results of an earlier call (default: they are kept, and the new ones get a number)"
_DEVICE = "device that compares embeddings"


def _needs_embeddings(settings: Any) -> None:
    if not settings.embeddings:
        raise UsageError(
            "embeddings is not given: say embeddings=outputs/<name>, a folder that sslvision embed run=... data=... wrote."
        )


@dataclass
class Embed:
    """All settings of writing the embeddings of images to files."""

    sections: ClassVar[Sections] = {"backbone": "sslvision.backbones.build.build_backbone", "data": None}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    run: str | None = option(None, f"the backbone: {RUN}")
    data: dict[str, Any] = option(
        {},
        "embedded | digits | folder | torchvision; data.root, ... (default: those of the run); data=photos is a folder",
    )
    backbone: dict[str, Any] = option(
        {},
        "image_size, pool (token | avg), and any timm option that shall differ from the run's; without run, backbone=NAME is "
        "a timm model",
    )
    pretrained: bool = option(True, "false: the same network with random weights")
    split: Literal["all", "train", "validation", "test"] = option(
        "all", "which images of the data: all of them, or one split; the column `split` tells them apart"
    )
    format: Literal["parquet", "npz"] | None = option(
        None, "files: parquet (needs pyarrow) or npz (of numpy) (default: parquet if pyarrow is installed, else npz)"
    )
    dtype: Literal["float32", "float16"] = option("float32", "numbers in the files")
    precision: Literal["float32", "bfloat16"] = option(
        "float32", "matrix products of the backbone; bfloat16 is faster on a GPU, and differs in the third digit"
    )
    batch_size: int = option(256, "images per forward pass")
    images_per_part: int = option(
        5000, "images in a file, at most; one that is interrupted is computed again, those before it are kept"
    )
    seed: int = option(0, "random seed of random weights")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "device that computes the embeddings")
    name: str | None = option(None, "name of the folder in outputs/ (default: embed, run and data)")
    output_dir: str | None = option(None, "path of the folder, instead of outputs/<name>")
    overwrite: bool = option(False, "delete what is in the folder first")
    resume: str | None = option(None, "auto, or nothing: files that are written are kept in any case")

    def __post_init__(self) -> None:
        at_least(self, batch_size=1, images_per_part=1, seed=0)
        if self.name is not None and (self.name in ("", ".", "..") or set(self.name) & set('/\\:*?"<>|\0')):
            raise UsageError(f"name={self.name} is not a plain folder name; output_dir=... sets a whole path.")
        model = self.backbone.get("name")
        if model is not None and self.run not in (None, model):
            raise UsageError(
                f"run={self.run} and backbone.name={model} are two backbones: give one of them. A run determines its own."
            )
        if model is not None:
            self.run, self.backbone = model, {key: one for key, one in self.backbone.items() if key != "name"}
        if self.run is None:
            raise UsageError(f"run is not given: say run=..., {RUN}; or backbone=NAME, a timm model.")
        if "_target_" not in self.data:
            raise UsageError(
                f"No images: {self.run} has no data of its own. Give data=photos, the path of a folder, or another source: "
                "data=digits, data=torchvision data.name=... data.root=..."
            )
        if self.resume not in (None, "auto"):
            raise UsageError(
                f"resume={self.resume}: embeddings are resumed in their own folder, by itself or with resume=auto."
            )


@dataclass
class Search:
    """All settings of finding the images that are nearest to an image."""

    sections: ClassVar[Sections] = {}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    embeddings: str | None = option(None, _EMBEDDINGS)
    image: list[str] = option(
        [], "the image, or several, image=a.jpg,b.jpg: files, or names in the column `path` of the embeddings"
    )
    k: int = option(10, "number of nearest images")
    center: bool | None = option(None, _CENTER)
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", _DEVICE)
    output_dir: str | None = option(None, "folder of the results (default: search-<image> in that of the embeddings)")
    overwrite: bool = option(False, _OVERWRITE)

    def __post_init__(self) -> None:
        _needs_embeddings(self)
        at_least(self, k=1)
        if not self.image:
            raise UsageError("image is not given: say image=photo.jpg.")


@dataclass
class Duplicates:
    """All settings of finding images that are copies of one another: resized, recompressed, or changed a little."""

    sections: ClassVar[Sections] = {}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    embeddings: str | None = option(None, _EMBEDDINGS)
    threshold: float = option(
        0.8,
        "cosine similarity of two embeddings from which the pixels are compared; lower finds more, and takes longer",
    )
    pixels: float = option(
        0.95,
        "correlation of the pixels from which two images are duplicates, both at 32x32 in gray and one perhaps mirrored (-1: "
        "only the threshold counts; 0.99 suits it)",
    )
    center: bool | None = option(None, _CENTER)
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", _DEVICE)
    output_dir: str | None = option(None, "folder of the results (default: duplicates in that of the embeddings)")
    overwrite: bool = option(False, _OVERWRITE)

    def __post_init__(self) -> None:
        _needs_embeddings(self)
        if not -1 < self.threshold <= 1:
            raise UsageError(f"threshold={self.threshold} must be a cosine similarity: at most 1, such as 0.8.")
        if not -1 <= self.pixels <= 1:
            raise UsageError(
                f"pixels={self.pixels} must be a correlation: at most 1 and near it, such as 0.95; or -1 for none."
            )


@dataclass
class Outliers:
    """All settings of finding the images that are least like any others."""

    sections: ClassVar[Sections] = {}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    embeddings: str | None = option(None, _EMBEDDINGS)
    n: int = option(100, "number of images to list")
    k: int = option(10, "an image's score is its mean cosine distance to its k nearest others")
    center: bool | None = option(None, _CENTER)
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", _DEVICE)
    output_dir: str | None = option(None, "folder of the results (default: outliers in that of the embeddings)")
    overwrite: bool = option(False, _OVERWRITE)

    def __post_init__(self) -> None:
        _needs_embeddings(self)
        at_least(self, n=1, k=1)


@dataclass
class Select:
    """All settings of choosing a diverse subset of the images, to label first."""

    sections: ClassVar[Sections] = {}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    embeddings: str | None = option(None, _EMBEDDINGS)
    n: int = option(100, "number of images to choose")
    by: Literal["cover", "clusters"] = option(
        "clusters",
        "clusters: the most typical image of each of n clusters, which is better than random labels; cover: each next image is "
        "the one farthest from those chosen (k-center greedy), which takes in rare images",
    )
    labeled: str | None = option(
        None,
        "a CSV file with a column `path` of images that have labels: others are chosen, from other clusters or far from these",
    )
    split: Literal["all", "train", "validation", "test"] = option("all", "which images to choose from")
    seed: int = option(0, "clusters: random seed of the first centers")
    center: bool | None = option(None, _CENTER)
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", _DEVICE)
    output_dir: str | None = option(None, "folder of the results (default: select-<n> in that of the embeddings)")
    overwrite: bool = option(False, _OVERWRITE)

    def __post_init__(self) -> None:
        _needs_embeddings(self)
        at_least(self, n=1, seed=0)


@dataclass
class Cluster:
    """All settings of grouping images that are alike, by k-means."""

    sections: ClassVar[Sections] = {}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    embeddings: str | None = option(None, _EMBEDDINGS)
    k: int = option(10, "number of clusters")
    seed: int = option(0, "random seed of the first centers")
    restarts: int = option(3, "number of times to begin anew, of which the best is kept")
    center: bool | None = option(None, _CENTER)
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", _DEVICE)
    output_dir: str | None = option(None, "folder of the results (default: cluster-<k> in that of the embeddings)")
    overwrite: bool = option(False, _OVERWRITE)

    def __post_init__(self) -> None:
        _needs_embeddings(self)
        at_least(self, k=2, seed=0, restarts=1)
