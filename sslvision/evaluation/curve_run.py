"""What the rules of learning curves have in common: the curves of a run, and what a rule returns."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sslvision.evaluation.curve_advice import Given
from sslvision.evaluation.curve_statistics import Curve, curve

FEW = 12  # logged values below which a curve has no shape
Metrics = Mapping[str, Sequence[float | None]]

START, END = (0.0, 0.02), (0.9, 1.0)  # stretches of a run: where it begins, and where it ends


@dataclass(frozen=True)
class Reading:
    """What one rule sees.

    Attributes:
        rule: Its name: "diverging", "flat", "slow_start", "decayed_early", "validation_at_chance", "overfitting",
            "overregularized", "underfitting", "degrading", "unfinished" or "noisy".
        sentence: What the curves show, with the numbers.
        advice: What to do about it, in a sentence.
        words: The settings to type next, as on the command line: ("epochs=46",). Empty if no setting helps.
    """

    rule: str
    sentence: str
    advice: str
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return sentence, advice and words, as they are printed."""
        return f"{self.sentence} {self.advice}" + (f" Try: {' '.join(self.words)}" if self.words else "")


class Run:
    """The curves of a run, and its settings.

    Attributes:
        kind: "mae", "dino", "supervised", or another method's name.
        loss, lr, train, validation, validation_loss, knn: Curves, empty where not logged.
        begins: Loss at the start.
        ends: Loss in the last tenth.
        chance_loss: Loss of a network that knows nothing about an image, or None.
        chance: Accuracy of such a classifier, in percent.
        untrained: k-NN accuracy of the untrained network, or None.
        nonfinite: Share of the logged losses that are not finite.
        given: The settings.
        images: Number of images behind accuracies, or None.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        kind: str,
        settings: Mapping[str, Any] | None,
        chance_loss: float | None,
        validation_images: int | None,
    ):
        self.kind, self.chance_loss, self.images = kind, chance_loss, validation_images
        self.loss, self.lr = curve(metrics, "loss"), curve(metrics, "lr")
        self.train, self.validation = curve(metrics, "train_top1"), curve(metrics, "val_top1")
        self.validation_loss, self.knn = curve(metrics, "val_loss"), curve(metrics, "knn_top1")
        untrained = curve(metrics, "untrained_knn_top1").values
        self.untrained = float(untrained[-1]) if len(untrained) else None
        logged = [value for value in metrics.get("loss", []) if value is not None]
        self.nonfinite = sum(not math.isfinite(value) for value in logged) / max(1, len(logged))
        self.begins = self.loss.level(*START) if len(self.loss) else math.nan
        self.ends = self.loss.level(*END) if len(self.loss) else math.nan
        self.chance = 100 * math.exp(-chance_loss) if chance_loss else 0.0
        epochs = [epoch for epoch in metrics.get("epoch", []) if epoch is not None]
        self.epochs = max(epochs, default=0.0)
        self.given = Given(settings, peak_lr=self.peak, epochs=self.epochs)
        self.decay = decay_of_weights(self.lr, curve(metrics, "weight_decay"))

    @property
    def peak(self) -> float | None:
        """Return the highest learning rate."""
        return float(self.lr.values.max()) if len(self.lr) else None

    def warmed_up(self) -> float:
        """Return the share of the run after which the learning rate was first near its peak."""
        return 0.0 if not len(self.lr) else self.first(self.lr.values >= 0.95 * self.lr.values.max())

    def decay_began(self) -> float:
        """Return the share of the run after which the learning rate was no longer near its peak."""
        return 1.0 if not len(self.lr) else self.last(self.lr.values >= 0.9 * self.lr.values.max())

    def lowered(self) -> float | None:
        """Return the share of the run after which the learning rate had decayed to 0.3 of its peak, if it did."""
        low = (self.lr.values <= 0.3 * self.lr.values.max()) & (self.lr.steps > self.decay_began() * self.lr.end)
        return self.first(low) if low.any() else None

    def first(self, true: np.ndarray) -> float:
        """Return the share of the run at which something is first true of the learning rate."""
        return float(self.lr.steps[np.flatnonzero(true)[0]] / self.lr.end)

    def last(self, true: np.ndarray) -> float:
        """Return the share of the run at which something is last true of the learning rate."""
        return float(self.lr.steps[np.flatnonzero(true)[-1]] / self.lr.end)

    def accuracy_error(self, accuracy: float) -> float:
        """Return the standard error of an accuracy in percent: of its images, or of a thousand if their number is unknown."""
        share = min(0.99, max(0.01, accuracy / 100))
        return 100 * math.sqrt(share * (1 - share) / (self.images or 1000))


def decay_of_weights(lr: Curve, weight_decay: Curve) -> float:
    """Return the sum of learning rate times weight decay: weights that get no gradient shrink by exp of it in the run."""
    if len(lr) != len(weight_decay) or not len(lr):
        return 0.0
    updates = np.diff(np.concatenate([[0.0], lr.steps]))
    return float((updates * lr.values * weight_decay.values).sum())


def significant(value: float) -> str:
    """Return a measured value with three significant digits."""
    return f"{value:.3g}"
