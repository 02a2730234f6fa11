"""Learning rate, weight decay and momentum as pure functions of time."""

import math


def warmup_cosine(epoch: float, *, peak: float, epochs: float, warmup_epochs: float, end: float = 0.0) -> float:
    """Return the learning rate of MAE at a fractional epoch: linear from 0 to `peak`, then half a cosine to `end`.

    Source: MAE, appendix A.1 (table 8), as in the authors' implementation: time is counted in fractions of an epoch.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = min(1.0, (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12))
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_by_step(
    step: int, *, start: float, end: float, steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Return a schedule of DINO at an optimizer step: linear over `warmup_steps` values, then half a cosine to `end`.

    Source: DINO, section 3.2 "Implementation details", as in the authors' implementation: the last warm-up value is
    `start`, and the cosine starts with it again at step `warmup_steps`.
    """
    if step < warmup_steps:
        return warmup_start + (start - warmup_start) * step / max(warmup_steps - 1, 1)
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
