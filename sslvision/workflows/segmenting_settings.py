"""The settings of `segment`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sslvision.errors import UsageError
from sslvision.settings import RUN, Sections, at_least, check_folder_name, option


@dataclass
class Segment:
    """All settings of a probe of the features of patches."""

    sections: ClassVar[Sections] = {"backbone": "sslvision.backbones.build.build_backbone"}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    run: str | None = option(None, f"the backbone to measure: {RUN}")
    masks: str | None = option(
        None,
        "folder of images and masks of the same names: images/train/a.jpg and masks/train/a.png, or train/images/a.jpg ...; "
        "a mask has the number of a class for each pixel (PNG, gray or palette); classes.txt may name them, one a line",
    )
    backbone: dict[str, Any] = option(
        {}, "image_size, to which images are resized as a whole, and any timm option that shall differ from the run's"
    )
    pretrained: bool = option(True, "false: the same network with random weights")
    untrained: bool = option(True, "also measure the same network before pretraining, and the colors of patches")
    ignore: list[int] = option([255], "values in masks that are no class, such as borders; [] for none")
    k: int = option(20, "number of neighbors for k-NN")
    train_images: int = option(0, "maximum number of training images, drawn at random (0: all)")
    train_patches: int = option(30_000, "maximum number of training patches, drawn at random, from each image as many")
    holdout: float = option(0.2, "share of the images to test on, if they are not split into train/ and val/")
    seed: int = option(0, "random seed for drawing images and patches")
    batch_size: int = option(16, "images per forward pass; does not change the scores")
    workers: int | None = option(None, "processes that read images (default: one for each core, 8 at most)")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "device that computes the features")
    name: str | None = option(None, "name of the results folder in outputs/ (default: run and masks)")
    output_dir: str | None = option(None, "path of the results folder, instead of outputs/<name>")

    def __post_init__(self) -> None:
        at_least(self, k=1, train_images=0, train_patches=1, seed=0, batch_size=1)
        check_folder_name(self.name)
        if self.workers is not None:
            at_least(self, workers=0)
        if not 0 < self.holdout < 1:
            raise UsageError(f"holdout={self.holdout} must lie between 0 and 1.")
        if self.run is None:
            raise UsageError(f"run is not given: say run=..., {RUN}.")
        if self.masks is None:
            raise UsageError("masks is not given: say masks=FOLDER, a folder of images/ and masks/.")
