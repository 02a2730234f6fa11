"""What the training loss shows: divergence, a flat start, a rate that decayed too early, an unfinished run, noise.

The loss of DINO is that of a moving target: it rises and falls in healthy runs, so that these rules leave it alone, unless it
is not finite. Collapse is named by `methods/dino_collapse.py`.
"""

from sslvision.evaluation.curve_run import END, FEW, Reading, Run
from sslvision.evaluation.curve_run import significant as says
from sslvision.evaluation.curve_statistics import noise


def diverging(run: Run) -> Reading | None:
    """The loss is not finite, leaps at first, or ends far above where it has been: the rate is too high."""
    cure = "The learning rate is too high, or the warm-up too short."
    words = run.given.rate(0.1)
    if run.nonfinite > 0.02:
        share = f"{100 * run.nonfinite:.0f} % of the logged losses are not finite."
        return Reading("diverging", share, cure, words)
    if run.kind == "dino":
        return None
    smooth, scatter = run.loss.smooth(), noise(run.loss.values)
    highest = float(smooth[: len(smooth) // 2].max())
    worst = max(1.5 * run.begins, run.chance_loss or 0.0) + 6 * scatter
    if run.kind == "supervised" and run.chance_loss:  # whatever the head, no classifier should do worse than guess
        worst = min(worst, 1.5 * run.chance_loss + 2 * scatter)
    if highest > worst:
        told = f"The loss rose to {says(highest)} at first, and ended at {says(run.ends)}."
        return Reading("diverging", told, cure, words)
    at = int(smooth.argmin())
    lowest, error = float(smooth[at]), run.loss.error(*END)
    gained = max(run.begins - lowest, 0.0)
    if run.ends - lowest > max(6 * error, 0.3 * gained, 0.1 * abs(lowest)) and run.ends - lowest > 3 * scatter:
        told = f"The loss rose again, from {says(lowest)} at update {run.loss.steps[at]:,.0f} to {says(run.ends)}."
        return Reading("diverging", told, cure, words)
    return None


def flat(run: Run) -> Reading | None:
    """The loss never falls: the rate is too low, the warm-up never ends, or the initialization is dead."""
    if run.kind == "dino":
        return None
    if run.kind == "supervised" and run.chance_loss and run.begins < 0.7 * run.chance_loss:
        return None  # a fitted head has little left to learn
    rise, error = run.loss.moved((0.0, 0.05), END)
    if -rise > 0.03 * abs(run.begins) or 2 * error - rise > 0.08 * abs(run.begins):
        return None
    told = f"The loss is flat: {says(run.begins)} at the start, {says(run.ends)} at the end."
    if run.warmed_up() > 0.9 and run.given.get("warmup_epochs", 0) > 0:
        advice = "The warm-up lasts as long as the run, so that the peak of the rate is never reached."
        return Reading("flat", told, advice, run.given.warmup(0.1 * run.epochs))
    if unusual := run.given.unusual():
        advice = f"Regularization is unusually strong: {' '.join(unusual)}."
        return Reading("overregularized", told, advice, run.given.usual())
    advice = "The learning rate is too low, or the initialization is dead (activations or gradients of 0)."
    return Reading("flat", told, advice, run.given.rate(10))


def slow_start(run: Run) -> Reading | None:
    """The loss is flat at first and falls later: the warm-up is too long, or the initialization or the rate is off."""
    if run.kind == "dino" or len(run.loss) < 3 * FEW:
        return None
    smooth, fall = run.loss.smooth(), run.begins - run.ends
    if fall < max(8 * run.loss.error(*END), 0.1 * abs(run.begins)):
        return None
    fell = smooth < run.begins - 0.1 * fall
    waited = float(run.loss.steps[int(fell.argmax())] / run.loss.end)
    if waited < 0.15 or abs(run.loss.level(0.0, waited / 2) - run.loss.level(waited / 2, 0.9 * waited)) > 0.1 * fall:
        return None
    told = (
        f"The loss is flat for the first {100 * waited:.0f} % of the run, near {says(run.begins)}, and falls only then."
    )
    warmed, epochs = run.warmed_up(), run.given.get("warmup_epochs", 0)
    if epochs and warmed > 0.5 * waited:
        return Reading("slow_start", told, "The warm-up is too long.", run.given.warmup(0.25 * epochs))
    advice = "The rate is too low at first, or the initialization makes the gradients small."
    return Reading("slow_start", told, advice, run.given.rate(3))


def decayed_early(run: Run) -> Reading | None:
    """The loss was falling fast when the rate dropped, and nearly stopped falling with it.

    Only a drop tells: where the rate falls slowly, such as half a cosine, the loss slows down by itself as well.
    """
    if run.kind == "dino" or len(run.loss) < 3 * FEW or not len(run.lr):
        return None
    began, lowered = run.decay_began(), run.lowered()
    if lowered is None or lowered - began > 0.15 or lowered > 0.8:
        return None
    # Stretches so short, relative to the time so far, that a loss like a power of time slows down by half at most.
    width = min(0.15, 0.4 * began, began - run.warmed_up(), 0.8 * (1.0 - lowered))
    if width < 0.03:
        return None
    fast, error = _pace(run, began - width, began)
    start = lowered + 0.2 * width
    slow, other = _pace(run, start, start + width)
    if fast < 4 * error or fast * width < 0.03 * abs(run.ends) or slow + 2 * other > 0.3 * fast:
        return None
    told = (
        f"The loss was still falling, by {says(fast * 0.1)} in a tenth of the run, when the learning rate dropped after "
        f"{100 * began:.0f} % of the updates; then by {says(max(slow, 0.0) * 0.1)}."
    )
    advice = "The rate decayed too early: let it decay when the loss no longer falls, here at least twice as late."
    return Reading("decayed_early", told, advice, run.given.longer(2))


def _pace(run: Run, start: float, stop: float) -> tuple[float, float]:
    """Return by how much the loss falls per run in a stretch, and the standard error of that."""
    middle = (start + stop) / 2
    rise, error = run.loss.moved((start, middle), (middle, stop))
    return -rise / (middle - start), error / (middle - start)


def unfinished(run: Run) -> Reading | None:
    """The loss falls in the last third nearly as it did before."""
    if run.kind == "dino":
        return None
    fall = run.begins - run.ends
    rise, error = run.loss.moved((0.6, 0.75), END)
    if fall < 0.03 * abs(run.begins) or -rise < max(4 * error, 0.15 * fall):
        return None
    told = (
        f"The loss is still falling: from {says(run.loss.level(0.6, 0.75))} to {says(run.ends)} in the last third of the run, "
        f"{-100 * rise / fall:.0f} % of the whole fall."
    )
    return Reading("unfinished", told, "Train longer.", run.given.longer(2))


def noisy(run: Run) -> Reading | None:
    """The loss scatters so much that its fall hardly shows."""
    if run.kind == "dino" or len(run.loss) < 3 * FEW:
        return None
    scatter, fall = noise(run.loss.stretch(0.5, 1.0)), run.begins - run.ends
    if scatter < max(0.3 * abs(fall), 0.1 * abs(run.ends)):
        return None
    told = f"The loss is noisy: it scatters by {says(scatter)} about its trend, and fell by {says(fall)} in all."
    return Reading("noisy", told, "Take larger batches, or a lower rate.", run.given.batch(4))
