"""Learning curves, read: what the metrics of a run show, in words, and the settings to type next.

Every rule is a function of the metrics alone (see `runs.metrics.read_metrics`) and of the settings that its advice names. A
rule speaks only where the curves leave little doubt, so that a healthy run is not talked about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Metrics = Mapping[str, Sequence[float | None]]


@dataclass(frozen=True)
class Reading:
    """What one rule sees.

    Attributes:
        rule: Its name: "diverging", "flat", "slow_start", "decayed_early", "validation_at_chance", "overfitting",
            "overregularized", "underfitting", "degrading", "unfinished" or "noisy".
        sentence: What the curves show, with the numbers.
        advice: What to do, in a sentence.
        words: The settings to type next, as on the command line: ("epochs=46",). Empty if no setting helps.
    """

    rule: str
    sentence: str
    advice: str
    words: tuple[str, ...] = ()


def read_curves(
    metrics: Metrics,
    *,
    kind: str,
    settings: Mapping[str, Any] | None = None,
    chance_loss: float | None = None,
    validation_images: int | None = None,
) -> list[Reading]:
    """Return what the learning curves of a run show, the most important first; nothing of a healthy run.

    Args:
        metrics: What `read_metrics` returns. Used are `step`, `loss`, `lr`, `weight_decay`, `train_top1`, `val_top1`,
            `val_loss`, `knn_top1`, `untrained_knn_top1`, as far as they were logged.
        kind: The method: "mae", "dino", "supervised" (fine-tuning), or the name of another one whose loss falls.
        settings: The settings of the run, as `dataclasses.asdict` of Pretrain or Finetune: advice is given in their terms. None: in
            terms of the metrics.
        chance_loss: Loss of a network that knows nothing about an image: ln K of a classifier of K classes and of DINO with
            K prototypes, about 1 of MAE. None: the rules that need it are left out.
        validation_images: Number of images behind `val_top1` and `knn_top1`, for their random errors. None: estimated from the curve.
    """
    return []
