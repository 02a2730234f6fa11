"""The verdicts of the steps by which a recipe is tuned: each a function of numbers, in words that hold these numbers.

The steps are those of the course notes of CS231n (Stanford): the loss before training, overfitting a handful, the rate, a
coarse grid, a finer one, the learning curves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

LOSS_OFF = 0.15  # share by which the first loss may differ from what theory says
DEAD = 1e-4  # spread of features over images, as a share of their size
SPREAD = (0.2, 5.0)  # standard deviation of normalized pixels
MAE_SHARE, MAE_SLOW = 0.5, 0.9  # of the first loss, after overfitting a handful
RATE_OFF = 4.0  # times the rates of the sweep that learn most, from which a recipe's rate is named
STRONG = {  # regularizers, and from where on they are named when a handful cannot be learned with them
    "weight_decay": 0.5,
    "weight_decay_end": 1.0,
    "drop_rate": 0.5,
    "proj_drop_rate": 0.5,
    "attn_drop_rate": 0.5,
    "drop_path_rate": 0.5,
    "label_smoothing": 0.4,
    "mixup": 0.8,
    "cutmix": 0.8,
    "erase": 0.5,
    "cutout": 0.5,
    "weight_noise": 0.2,
}


@dataclass(frozen=True)
class Verdict:
    """What a step found.

    Attributes:
        step: Name of the step.
        passed: Whether it makes sense to go on.
        words: What was found, with the numbers.
        advice: What to do; empty if there is nothing to do.
        numbers: The numbers behind it.
    """

    step: str
    passed: bool
    words: str
    advice: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def record(self) -> dict[str, Any]:
        """Return it as plain containers."""
        return asdict(self)


@dataclass(frozen=True)
class Start:
    """A network before its first update, without regularization.

    Attributes:
        kind: mae, dino or supervised.
        loss: Its loss on a batch.
        outputs: Classes, or prototypes; 0 for MAE.
        targets: Mean square of MAE's targets, what predicting 0 would cost; 0 for others.
        gradient: Norm of the first gradient.
        pixel_mean, pixel_std: Of the normalized pixels of the batch.
        spread: Standard deviation of the features over images, as a share of their root mean square.
        norm_pix: Whether MAE's targets are normalized by patch.
        predictions: Mean square of MAE's predictions by its initialization: Xavier's after a layer norm, 2E / (E + P) for E
            channels and P pixels of a patch, which adds to the loss of predicting 0.
    """

    kind: str
    loss: float
    outputs: int
    targets: float
    gradient: float
    pixel_mean: float
    pixel_std: float
    spread: float
    norm_pix: bool = False
    predictions: float = 0.0

    @property
    def expected(self) -> float:
        """Return what theory says: that of a network that knows nothing."""
        return self.targets + self.predictions if self.kind == "mae" else math.log(self.outputs)

    @property
    def theory(self) -> str:
        """Return it in words."""
        if self.kind == "supervised":
            return f"ln {self.outputs} = {self.expected:.3g}"
        if self.kind == "dino":
            return f"ln {self.outputs:,} = {self.expected:.3g}"
        what = (
            "of the pixels normalized by patch (1, but for flat patches)"
            if self.norm_pix
            else "of the normalized pixels"
        )
        own = f", and {self.predictions:.3g} of the first predictions" if self.predictions else ""
        return f"{self.expected:.3g}: the mean square {what}, {self.targets:.3g}{own}"


def initial_loss(start: Start) -> Verdict:
    """Compare the loss before the first update with theory, and name what is wrong with it."""
    said = f"The loss before the first update is {start.loss:.4g}; theory says {start.theory}."
    numbers = {**asdict(start), "expected": start.expected}
    causes: list[tuple[str, str]] = []
    if not math.isfinite(start.loss):
        causes.append(("it is not finite", "Look for pixels or weights that are not."))
    size = math.hypot(start.pixel_mean, start.pixel_std)
    if not SPREAD[0] <= start.pixel_std <= SPREAD[1] or abs(start.pixel_mean) > SPREAD[1]:
        factor = f", about {size:.0f} times too large" if size > SPREAD[1] else ""
        near = " (values 0..255 with statistics on the scale 0..1)" if 60 < size < 1200 else ""
        causes.append(
            (
                f"normalization: pixels have mean {start.pixel_mean:.3g} and deviation {start.pixel_std:.3g} after it, where 0 "
                f"and 1 are meant{factor}{near}",
                "Set data.normalize=computed, or give mean and deviation on the scale 0..1.",
            )
        )
    if start.spread < DEAD or start.gradient == 0:
        causes.append(
            (
                f"initialization: the network is dead, its features differ by {start.spread:.2g} of their size between images, "
                f"and the gradient has norm {start.gradient:.2g}",
                "Check that weights are random and not constant, and that activations are not all cut off.",
            )
        )
    ratio = start.loss / start.expected if start.expected else math.inf
    if not causes and ratio > 1 + LOSS_OFF:
        causes.append(
            (
                f"initialization: the loss is {ratio:.2g} times what knowing nothing gives: the outputs are too large",
                "Make the last layer smaller at the start (timm: a standard deviation of 0.02), or normalize before it.",
            )
        )
    if not causes and ratio < 1 - LOSS_OFF:
        told = "labels" if start.kind == "supervised" else "targets"
        causes.append(
            (
                f"{told}: the loss is {ratio:.2g} of what knowing nothing gives: the network knows the {told} already",
                "Is its head trained, or does an image contain its label?"
                if start.kind == "supervised"
                else "Do weights come from init_from?",
            )
        )
    if not causes:
        return Verdict("initial loss", True, f"{said} They agree.", numbers=numbers)
    words = "; ".join(cause for cause, _ in causes)
    return Verdict(
        "initial loss", False, f"{said} What is off: {words}.", " ".join(advice for _, advice in causes), numbers
    )


def last_loss(losses: Sequence[float]) -> float:
    """Return the loss at the end: the mean of the last tenth of the updates."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def overfit(kind: str, losses: Sequence[float], *, accuracy: float | None, images: int) -> Verdict:
    """Judge whether a handful of images was learned by heart, without regularization.

    Args:
        kind: mae, dino or supervised.
        losses: The loss of each update; of DINO, the loss without the teacher's entropy (kl).
        accuracy: Of a classifier, on those images in percent.
        images: Number of images.
    """
    step = "overfit a handful"
    numbers: dict[str, Any] = {"images": images, "updates": len(losses), "accuracy": accuracy}
    if not losses or not all(math.isfinite(loss) for loss in losses):
        return Verdict(step, False, f"On {images} images, the loss is not finite.", _RATE_TOO_HIGH, numbers)
    first, last = losses[0], last_loss(losses)
    numbers |= {"first": first, "last": last}
    fell = f"On {images} images, {len(losses)} updates bring the loss from {first:.4g} to {last:.4g}"
    if kind == "supervised" and accuracy is not None:
        if accuracy >= 100:
            return Verdict(step, True, f"{fell}, and the accuracy to 100 %: the network can learn.", numbers=numbers)
        told = f"{fell}, and the accuracy to {accuracy:.0f} %, where 100 % is expected."
        return Verdict(step, False, told, _why_not_learned(first, last), numbers)
    if kind == "dino":  # its target is a teacher that follows: there is no loss to bring to 0
        if last < first:
            told = f"{fell} (beyond the teacher's entropy). More cannot be expected of DINO: its targets move with the student."
            return Verdict(step, True, told, numbers=numbers)
        told = f"{fell} (beyond the teacher's entropy): the student does not come nearer to its teacher."
        return Verdict(step, False, told, _why_not_learned(first, last), numbers)
    share = last / first
    if share <= MAE_SHARE:
        return Verdict(step, True, f"{fell}, {100 * share:.0f} % of its start: the network can learn.", numbers=numbers)
    told = f"{fell}, only to {100 * share:.0f} % of its start, where {100 * MAE_SHARE:.0f} % or less is expected."
    return Verdict(step, False, told, _why_not_learned(first, last), numbers)


_RATE_TOO_HIGH = "The rate is too high: take a tenth of it."


def _why_not_learned(first: float, last: float) -> str:
    if last > 1.05 * first:
        return f"The loss rises. {_RATE_TOO_HIGH}"
    if last > MAE_SLOW * first:
        return "The loss does not fall: the rate is too low, or the initialization is bad. Take ten times the rate."
    larger = "a larger network (backbone.depth, backbone.embed_dim)"
    return f"The loss falls slowly: take three times the rate, {larger}, or look at the data."


def regularized(kind: str, plain: float, own: float, regularizers: Mapping[str, float]) -> Verdict:
    """Judge whether a handful can still be learned with the recipe's own regularization.

    Args:
        kind: mae, dino or supervised.
        plain: Share that was learned without any: the accuracy over 100, or the share by which the loss fell.
        own: The same with it.
        regularizers: The recipe's values, by name.
    """
    step, numbers = "overfit, regularized", {"plain": plain, "own": own, "regularizers": dict(regularizers)}
    strong = {name: value for name, value in regularizers.items() if value >= STRONG.get(name, math.inf)}
    words = f"With the recipe's regularization, {100 * own:.0f} % is learned, and {100 * plain:.0f} % without."
    if own >= 0.6 * plain and not (strong and own < 0.9 * plain):
        return Verdict(step, True, words, numbers=numbers)
    if not strong:
        return Verdict(
            step,
            True,
            f"{words} No regularizer is unusually strong; a handful is hard to learn with them.",
            numbers=numbers,
        )
    named = ", ".join(f"{name}={value:g}" for name, value in strong.items())
    return Verdict(step, False, f"{words} Too strong: {named}.", f"Lower {', '.join(strong)}.", numbers)


@dataclass(frozen=True)
class Tried:
    """A short run at one rate.

    Attributes:
        rate: The rate.
        gain: What it learned, higher is better: the share by which the loss fell, or of DINO the rise of the objective; not
            finite if it diverged.
    """

    rate: float
    gain: float


def judge_rates(tried: Sequence[Tried], *, own: float, name: str) -> tuple[Verdict, float | None]:
    """Judge a recipe's rate by a sweep of short runs; return also the best rate.

    Short runs favor high rates. So a rate is too high where it learns clearly less than the best and is RATE_OFF times the
    best, but too low only where it is so far below all that learn nearly as much.

    Args:
        tried: The runs.
        own: The recipe's rate.
        name: Name of the setting.
    """
    numbers = {"own": own, "tried": [[one.rate, one.gain] for one in tried]}
    finite = [one for one in tried if math.isfinite(one.gain)]
    best = max(finite, key=lambda one: one.gain, default=None)
    if best is None or best.gain <= 0:
        rates = [one.rate for one in tried]
        words = f"At no rate from {min(rates):.2g} to {max(rates):.2g} is anything learned."
        return Verdict("rate", False, words, "Look at the data, the labels and the initialization.", numbers), None
    good = [one.rate for one in finite if one.gain >= 0.9 * best.gain]
    numbers |= {"best": best.rate, "good": [min(good), max(good)]}
    lost = [one.rate for one in tried if not math.isfinite(one.gain) or one.gain < 0]
    words = f"{name}={best.rate:.2g} learns most in so few updates"
    words += f"; {min(good):.2g} to {max(good):.2g} nearly as much" if len(good) > 1 else ""
    words += (
        f"; from {min(lost):.2g} on, training diverges or is worse than nothing."
        if lost and min(lost) > best.rate
        else "."
    )
    if own > max(good) and own > RATE_OFF * best.rate:
        fault = f" The recipe's {own:.2g} is too high, {own / best.rate:.0f} times the best."
        return Verdict("rate", True, words + fault, f"Take {name}={best.rate:.2g}.", numbers), best.rate
    if own < min(good) / RATE_OFF:
        fault = f" The recipe's {own:.2g} is too low, 1/{best.rate / own:.0f} of the best."
        return Verdict("rate", True, words + fault, f"Take {name}={best.rate:.2g}.", numbers), best.rate
    return Verdict("rate", True, f"{words} The recipe's {own:.2g} is among them or near.", numbers=numbers), best.rate


def judge_grid(
    cells: Sequence[Mapping[str, Any]],
    *,
    own_decay: float,
    objective: str,
    unit: str = "",
    chance: float | None,
    sigma: float | None,
) -> Verdict:
    """Judge a grid of rates and weight decays, whose cells have `rate`, `weight_decay` and `score`.

    Args:
        cells: The cells that were trained.
        own_decay: The recipe's weight decay.
        objective: Name of the score.
        unit: Its unit, after a space.
        chance: Score of knowing nothing; None if unknown.
        sigma: Standard error of a score; None if unknown.
    """
    step = "coarse grid"
    scored = [cell for cell in cells if cell["score"] is not None]
    if not scored:
        return Verdict(step, False, "No cell of the grid was trained.", "Give a longer budget=.")
    best, margin = max(scored, key=lambda cell: cell["score"]), 2 * math.sqrt(2) * (sigma or 0.0)
    numbers = {"cells": [dict(cell) for cell in scored], "best": dict(best)}
    where = f"rate {best['rate']:.2g}, weight decay {best['weight_decay']:g}"
    words = f"The best of {len(scored)} cells is {where}: {objective} {best['score']:.4g}{unit}."
    if chance is not None and best["score"] < chance + 3 * (sigma or 1.0):
        advice = "Do labels belong to their images? Shuffled labels can be learned by heart, and tell nothing of other images."
        return Verdict(step, False, f"{words} That is chance ({chance:.3g}).", advice, numbers)
    own = [cell["score"] for cell in scored if cell["weight_decay"] == own_decay]
    if own and best["weight_decay"] != own_decay and best["score"] - max(own) > max(margin, 0.1 * best["score"]):
        words += f" The recipe's weight decay of {own_decay:g} is too strong or too weak: {max(own):.4g} at most."
        return Verdict(step, True, words, f"Take weight_decay={best['weight_decay']:g}.", numbers)
    return Verdict(step, True, words, numbers=numbers)


def regularizers_of(method: Mapping[str, Any], backbone: Mapping[str, Any]) -> dict[str, float]:
    """Return the regularizers of a recipe that are in effect."""
    found = {**method, **backbone}
    return {name: float(found[name]) for name in STRONG if isinstance(found.get(name), int | float) and found[name]}
