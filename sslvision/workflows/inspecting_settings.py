"""The settings of `inspect`."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sslvision.errors import UsageError
from sslvision.settings import RUN, Sections, at_least, check_folder_name, option

MEASURES = ("cost", "memory", "field", "speed", "filters")


@dataclass
class Inspect:
    """All settings of a look into networks: what they cost, and what they see."""

    sections: ClassVar[Sections] = {"backbone": "sslvision.inspection.networks.named_networks"}
    elsewhere: ClassVar[tuple[str, ...]] = ()

    backbone: dict[str, Any] = option(
        {},
        "name (timm models with random weights, as backbone.name=resnet50,vgg16), image_size (default: that of each model), "
        "channels, pool, and any timm option",
    )
    run: list[str] = option(
        [], f"backbones with their weights, such as run=outputs/a or run=outputs/a,outputs/b: {RUN}"
    )
    measure: list[str] = option([*MEASURES], "what to measure, such as measure=cost,speed")
    batch_size: int = option(8, "images at a time, for saved activations, peak memory and images per second")
    repeats: int = option(5, "timed repetitions, whose median is told, after one that is not timed")
    field_images: int = option(8, "random images that the effective receptive field is averaged over")
    seed: int = option(0, "random seed for the weights of networks without any, and for images")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "device to measure on")
    name: str | None = option(None, "name of the results folder in outputs/ (default: inspect and the networks' names)")
    output_dir: str | None = option(None, "path of the results folder, instead of outputs/<name>")

    def __post_init__(self) -> None:
        at_least(self, batch_size=1, repeats=1, field_images=1, seed=0)
        check_folder_name(self.name)
        if not self.run and not self.backbone.get("name"):
            raise UsageError("Nothing to inspect: say backbone.name=resnet50 (any timm models), or run=outputs/<name>.")
        if not self.measure or (wrong := [one for one in self.measure if one not in MEASURES]):
            shown = wrong[0] if self.measure else self.measure
            raise UsageError(f"measure={shown} is unknown: it is one or more of {', '.join(MEASURES)}.")
