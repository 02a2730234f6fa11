"""The settings of `scale`: those of pretraining, and of the ladder."""

from dataclasses import dataclass
from typing import Literal

from sslvision.errors import UsageError
from sslvision.settings import Pretrain, option

AXES = ("parameters", "images", "updates")


_AT_THE_END = "without effect: each training is scored once, at its end"
_UNSAVED = "without effect: no checkpoints are saved; a training that was interrupted begins anew"


@dataclass
class Scale(Pretrain):
    """All settings of a ladder of pretrainings: those of the largest one, and of the ladder."""

    epochs: int = option(100, "passes of the largest training over the images, if there is no budget")
    budget: str | None = option(
        None, "time for everything, such as 30m or 2h: the lengths that fill it are measured first"
    )
    max_steps: int | None = option(None, "refused: budget or epochs is the length of a ladder")
    name: str | None = option(None, "name of the folder in outputs/ (default: recipe and data)")
    resume: str | None = option(None, "auto, or nothing: trainings that are done are kept in any case")
    init_from: str | None = option(None, "refused: weights have one size, and a ladder has several")
    knn_every_epochs: int = option(10, _AT_THE_END)
    knn_every_steps: int | None = option(None, _AT_THE_END)
    checkpoint_every_epochs: int = option(10, _UNSAVED)
    checkpoint_every_steps: int | None = option(2000, _UNSAVED)
    keep_checkpoints: int = option(3, _UNSAVED)
    evaluate_images: int = option(
        50_000, "maximum number of training images that are neighbors in k-NN, and of held-out images that are scored"
    )
    dry_run: bool = option(False, "measure, print the plan, and stop")
    plan_gb: float = option(80.0, "without effect: for dry_run=plan of pretrain")
    axes: list[str] = option([*AXES], "what is scaled: parameters, images, updates")
    rungs: int = option(6, "number of sizes on each axis, the largest included, which all axes share")
    factor: float = option(2.0, "ratio of a size to the next smaller one")
    seeds: int = option(1, "trainings at each size, with other weights, images and order")
    score: Literal["auto", "knn", "loss"] = option(
        "auto",
        "what is scored: knn, the k-NN error on held-out images; loss, MAE's on held-out images with fixed masks; auto: knn "
        "with labels, else loss",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.axes or len({*self.axes}) < len(self.axes) or {*self.axes} - {*AXES}:
            raise UsageError(
                f"axes={self.axes} must be one or more of {', '.join(AXES)}, each once: axes=[images,updates]."
            )
        if self.rungs < 4:
            raise UsageError(
                f"rungs={self.rungs} is too small: a law has three unknowns, so that 4 sizes are needed, and 5 to test it."
            )
        if not 1.2 <= self.factor <= 10:
            raise UsageError(f"factor={self.factor} must be a number from 1.2 to 10.")
        if self.seeds < 1:
            raise UsageError(f"seeds={self.seeds} must be 1 or more.")
        if self.resume not in (None, "auto"):
            raise UsageError(
                f"resume={self.resume}: a ladder goes on in its own folder, by itself or with resume=auto."
            )
        if self.max_steps is not None:
            raise UsageError(
                f"max_steps={self.max_steps}: a ladder has trainings of several lengths. Give budget, or epochs, the length of "
                "the largest (~max_steps removes that of a recipe)."
            )
        if self.init_from is not None:
            raise UsageError(
                "init_from has weights of one size, and a ladder has several: it starts from random weights."
            )
