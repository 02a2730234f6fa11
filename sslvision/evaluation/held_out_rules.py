"""What accuracy on held-out images shows beside the training loss: overfitting, underfitting, wrong labels, worse features.

Training accuracy is that of augmented images. Where Mixup and the like alter them, it is no measure, and only the curves of
validation are read.
"""

import math

from sslvision.evaluation.curve_run import END, Reading, Run
from sslvision.evaluation.curve_run import significant as says
from sslvision.evaluation.curve_statistics import Curve

LATE = (0.8, 1.0)


def validation_at_chance(run: Run) -> Reading | None:
    """Training images are learned and validation images are guessed: the labels do not fit the images."""
    if not _both(run) or not run.chance:
        return None
    train, validation = run.train.level(*LATE), run.validation.level(*LATE)
    if train < run.chance + 30 or validation > _guessing(run):
        return None
    told = (
        f"Training images are learned ({train:.0f} %), validation images only guessed ({validation:.0f} %, chance is "
        f"{run.chance:.0f} %)."
    )
    advice = (
        "The labels do not fit the images: look at a few images with their labels, and at where the classes come from (names "
        "of folders, order of a list)."
    )
    return Reading("validation_at_chance", told, advice)


def overfitting(run: Run) -> Reading | None:
    """Train and validation part: the loss on validation images rises while training images are known by heart."""
    if not _both(run):
        return None
    train, validation = run.train.level(*LATE), run.validation.level(*LATE)
    gap, error = train - validation, run.accuracy_error(validation)
    parted = train >= 95 and gap > max(12.0, 2.5 * error)
    if not (parted or (gap > 5 and _rises(run.validation_loss))):
        return None
    told = f"Training and validation are apart: {train:.0f} % and {validation:.0f} %"
    if _rises(run.validation_loss):
        at = int(run.validation_loss.values.argmin())
        told += (
            f"; the validation loss rises since update {run.validation_loss.steps[at]:,.0f}, from "
            f"{says(float(run.validation_loss.values[at]))} to {says(run.validation_loss.level(*END))}"
        )
    labels, words = run.given.get("labels_per_class"), run.given.regularizers()
    more = f"more labeled images (labels_per_class={2 * labels})" if isinstance(labels, int) else "more labeled images"
    advice = f"The network overfits: more regularization, or {more}, which help most."
    if not run.given.get("patience") and words:
        advice += " patience=5 saves the time after the best validation; the weights are kept in any case."
    return Reading("overfitting", told + ".", advice, words)


def overregularized(run: Run) -> Reading | None:
    """Training images are not learned, or weights decay to nothing, under unusually strong regularization."""
    unusual = run.given.unusual()
    if run.kind == "dino" or not unusual:
        return None
    if run.kind != "supervised":
        if run.chance_loss is None or run.ends < 0.8 * run.chance_loss or run.decay < 3:
            return None
        told = (
            f"The loss stays near that of a network that knows nothing ({says(run.ends)} of {says(run.chance_loss)})."
        )
    else:
        if not _both(run):
            return None
        train, validation = run.train.level(*LATE), run.validation.level(*LATE)
        if train > 95 or train - validation > max(5.0, 2 * run.accuracy_error(validation)):
            return None
        told = f"Training images are not learned: {train:.0f} % (validation images {validation:.0f} %)."
    advice = f"Regularization is unusually strong: {' '.join(unusual)}."
    return Reading("overregularized", told, advice, run.given.usual())


def underfitting(run: Run) -> Reading | None:
    """Training and validation images do alike, and badly; or features are no better than those of the untrained network."""
    longer = run.given.longer(2)
    if run.kind != "supervised":
        if run.untrained is None or not len(run.knn):
            return None
        now = float(run.knn.values[-1])
        if now - run.untrained > 2 * math.sqrt(2) * run.accuracy_error(now):
            return None
        told = f"The features are hardly better than those of the untrained network: k-NN {now:.1f} and {run.untrained:.1f} %."
        return Reading("underfitting", told, "Train longer, or at a higher rate.", longer + run.given.rate(3))
    if not _both(run) or run.given.mixes or degrading(run) is not None:
        return None
    train, validation = run.train.level(*LATE), run.validation.level(*LATE)
    if train > 75 or train - validation > max(5.0, 2 * run.accuracy_error(validation)):
        return None
    told = f"Training and validation are together, and poor: {train:.0f} % and {validation:.0f} %."
    advice = "The network underfits: train longer, at a higher rate, with fewer frozen layers, or a larger backbone."
    if run.chance and validation < _guessing(run):
        advice += " If training accuracy then rises alone, the labels do not fit the images."
    return Reading("underfitting", told, advice, longer + run.given.rate(3))


def degrading(run: Run) -> Reading | None:
    """Accuracy on held-out images was better on the way than at the end."""
    known = run.validation if run.kind == "supervised" else run.knn
    if len(known) < 3:
        return None
    smooth = known.smooth() if len(known) > 8 else known.values
    best, now = int(smooth.argmax()), float(smooth[-1])
    lost = float(smooth[best]) - now
    if lost < max(3.0, 3 * math.sqrt(2) * run.accuracy_error(now)):
        return None
    name = "Validation accuracy" if run.kind == "supervised" else "k-NN accuracy"
    told = f"{name} fell from {smooth[best]:.1f} % at update {known.steps[best]:,.0f} to {now:.1f} % at the end."
    if run.kind == "supervised":
        advice = (
            "A lower learning rate changes less of what the backbone knew; weights as good as the best ones are kept."
        )
    else:
        advice = "The features degrade: a lower learning rate, or a shorter run."
    return Reading("degrading", told, advice, run.given.rate(0.3))


def still_rising(run: Run) -> Reading | None:
    """Accuracy on held-out images rises until the end."""
    known = run.validation if run.kind == "supervised" else run.knn
    if len(known) < 3:
        return None
    before = (0.55, 0.75) if len(known) > 8 else (known.steps[-2] / known.end - 0.01, known.steps[-2] / known.end)
    after = (0.9, 1.0)
    rise, error = known.moved(before, after)
    error = max(error, math.sqrt(2) * run.accuracy_error(known.level(*after)) if run.kind != "supervised" else 0.0)
    if rise < max(2.0, 3 * error):
        return None
    name = "Validation accuracy" if run.kind == "supervised" else "k-NN accuracy"
    told = f"{name} is still rising: from {known.level(*before):.1f} to {known.level(*after):.1f} % at the end."
    return Reading("unfinished", told, "Train longer.", run.given.longer(2))


def _guessing(run: Run) -> float:
    """Return the accuracy below which a classifier is not told from one that guesses."""
    return run.chance + max(5.0, 3 * run.accuracy_error(run.chance))


def _both(run: Run) -> bool:
    return run.kind == "supervised" and len(run.train) > 3 and len(run.validation) > 1


def _rises(loss: Curve) -> bool:
    """Return whether a validation loss rises clearly, after its minimum, up to the end."""
    if len(loss) < 5:
        return False
    lowest = float(loss.smooth().min())
    return loss.level(*END) > 1.2 * lowest + 4 * loss.error(*END)
