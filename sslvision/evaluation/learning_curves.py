"""Learning curves, read: what the metrics of a run show, in words, and the settings to type next.

Every rule is a function of the metrics (see `runs.metrics.read_metrics`), and of the settings in whose terms it advises. A rule
speaks only where the curves leave little doubt: nothing is said of a healthy run. The thresholds stand in the rules, and were
chosen on the curves in tests/golden/curves.
"""

from collections.abc import Callable, Mapping
from typing import Any

from sslvision.evaluation import held_out_rules, loss_rules
from sslvision.evaluation.curve_run import FEW, Metrics, Reading, Run

__all__ = ["Metrics", "Reading", "read_curves"]

Rule = Callable[[Run], Reading | None]

# After one of these, there is nothing else to say of a run. Unusual settings are named as the cause first.
FATAL: tuple[Rule, ...] = (held_out_rules.overregularized, loss_rules.diverging, loss_rules.flat)
# Of each group, the first that applies is told.
GROUPS: tuple[tuple[Rule, ...], ...] = (
    (loss_rules.decayed_early, loss_rules.slow_start),
    (
        held_out_rules.validation_at_chance,
        held_out_rules.overfitting,
        held_out_rules.underfitting,
    ),
    (held_out_rules.degrading, held_out_rules.still_rising, loss_rules.unfinished),
    (loss_rules.noisy,),
)


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
        metrics: What `read_metrics` returns. Used are `step`, `epoch`, `loss`, `lr`, `weight_decay`, `train_top1`, `val_top1`,
            `val_loss`, `knn_top1` and `untrained_knn_top1`, as far as they were logged.
        kind: The method: "mae", "dino", "supervised" (fine-tuning), or the name of another one whose loss falls.
        settings: The settings of the run, as `dataclasses.asdict` of Pretrain or Finetune, which advice is given in the terms
            of. None: in terms of the metrics.
        chance_loss: Loss of a network that knows nothing about an image: ln K of a classifier of K classes and of DINO with
            K prototypes, about 1 of MAE. None: the rules that need it are left out.
        validation_images: Number of images behind `val_top1` and `knn_top1`, for their random errors. None: a thousand.
    """
    run = Run(metrics, kind=kind, settings=settings, chance_loss=chance_loss, validation_images=validation_images)
    if len(run.loss) < FEW and not run.nonfinite:
        return []
    for rule in FATAL:
        if (found := rule(run)) is not None:
            return [found]
    readings = (next((found for rule in group if (found := rule(run)) is not None), None) for group in GROUPS)
    return [found for found in readings if found is not None]
