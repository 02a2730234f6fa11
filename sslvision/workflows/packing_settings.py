"""The settings of `pack`."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sslvision.errors import UsageError
from sslvision.settings import Sections, at_least, option

UNITS = {"MB": 10**6, "GB": 10**9}


@dataclass
class Pack:
    """All settings of writing images as shards."""

    sections: ClassVar[Sections] = {"data": None}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    data: dict[str, Any] = option(
        {}, "embedded | digits | folder | list | hf | webdataset | torchvision; data.root, ...; data=photos is a folder"
    )
    output_dir: str | None = option(None, "folder of the shards; the same command goes on where it was interrupted")
    split: Literal["all", "train", "validation", "test"] = option("all", "which images of the data to write")
    shards: Literal["tar", "parquet"] = option(
        "tar", "files to write: tar for data=webdataset, parquet for data=hf and whatever else reads tables"
    )
    image_size: int | None = option(
        None,
        "images with a longer short side, in pixels, are shrunk to it; others keep their bytes (default: all keep them)",
    )
    format: Literal["jpeg", "png"] = option("jpeg", "files of images that are shrunk; png is without loss")
    quality: int = option(95, "quality of JPEGs that are shrunk, 1 to 100")
    shard_size: str = option("256MB", "size of a shard: about so many MB or GB, or a number of images")
    workers: int | None = option(None, "processes that write shards (default: the cores that are available)")
    max_unreadable: float = option(
        0.1, "largest fraction of images that cannot be read and are left out, before it stops"
    )
    overwrite: bool = option(False, "delete the shards of other images or settings in the folder first")

    def __post_init__(self) -> None:
        if "_target_" not in self.data:
            raise UsageError(
                "No images: say data=photos, the path of a folder, a list or a .zip file, or another source: data=embedded, "
                "data=hf data.path=..., data=torchvision data.name=... data.root=..."
            )
        if self.output_dir is None:
            raise UsageError("output_dir is not given: say output_dir=shards, the folder to write them to.")
        for key in ("cache", "cache_size", "cache_dir"):
            if key in self.data:
                raise UsageError(f"data.{key} is not for packing, which reads every image once: leave it out.")
        for key in ("workers", "max_unreadable"):
            if key in self.data:
                raise UsageError(f"data.{key} is the setting {key} here: say {key}={self.data[key]}.")
        if self.image_size is not None:
            at_least(self, image_size=1)
        if self.workers is not None:
            at_least(self, workers=0)
        if not 1 <= self.quality <= 100:
            raise UsageError(f"quality={self.quality} must be a quality of JPEGs, from 1 to 100.")
        if not 0 <= self.max_unreadable <= 1:
            raise UsageError(f"max_unreadable={self.max_unreadable} must be a fraction from 0 to 1.")
        size_of(self.shard_size)


def size_of(shard_size: str) -> tuple[int, str]:
    """Return the size of a shard and its unit: (1000, "images") or (256000000, "bytes").

    Raises:
        UsageError: It is neither.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|GB|)", shard_size.strip(), re.IGNORECASE)
    unit = UNITS.get(found[2].upper()) if found else None
    size = 0 if found is None or (unit is None and "." in found[1]) else round(float(found[1]) * (unit or 1))
    if size < 1:
        raise UsageError(
            f"shard_size={shard_size} must be a number of images, such as 1000, or a size in MB or GB, such as 256MB."
        )
    return size, "bytes" if unit else "images"
