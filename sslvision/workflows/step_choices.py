"""What the seven steps try next: rates, weight decays, and the cells of grids."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sslvision.settings import Finetune
from sslvision.workflows.ladder import Times
from sslvision.workflows.tuning_settings import Tune, TuneFinetune

EXPONENTS = [place / 2 for place in range(-5, 6)]  # of ten: factors on the recipe's rate
DECAYS = (0.0, 1e-5, 1e-4)
OF_TRANSFORMERS = 0.05
SHORTEST, FEWEST_CELLS = 20, 3  # updates of a cell; cells of a grid
SCORING, FEWEST_IMAGES = 1 / 3, 2_000  # share of a cell's time for its score, but at least so many images of each kind


def next_exponent(tried: Mapping[float, float]) -> float:
    """Return the exponent of ten to try next: whole decades from the middle outwards, then what is near the best so far.

    Args:
        tried: The gain of each exponent that was tried; not finite where training diverged.
    """
    known = [round(2 * one) / 2 for one in tried]
    whole = [one for one in (0.0, -1.0, 1.0, -2.0, 2.0) if one not in known]
    if whole:
        return whole[0]
    finite = {one: gain for one, gain in tried.items() if math.isfinite(gain)}
    best = max(finite, key=lambda one: finite[one], default=0.0)
    return min((one for one in EXPONENTS if one not in known), key=lambda one: (abs(one - best), one))


def asked(steps: Any) -> list[int]:
    """Return the numbers of the steps that were asked for."""
    return [*range(1, 8)] if steps == "all" else [int(one) for one in (steps if isinstance(steps, list) else [steps])]


def rate_name(settings: Tune | TuneFinetune) -> str:
    """Return the setting that gives the rate."""
    if settings.lr is not None:
        return "lr"
    return "base_lr" if not isinstance(settings, Finetune) or settings.base_lr is not None else "lr_ratio"


def with_decay(settings: Any, decay: float, kind: str) -> Any:
    """Return settings with another weight decay; that at the end keeps its ratio to it."""
    method = dict(settings.method)
    before = float(method.get("weight_decay", 0.04))
    if kind == "dino":
        method["weight_decay_end"] = decay * (float(method.get("weight_decay_end", 0.4)) / before if before else 10.0)
    return dataclasses.replace(settings, method={**method, "weight_decay": decay})


def coarse(settings: Tune | TuneFinetune, rate: float) -> list[tuple[float, float]]:
    """Return the cells of step 4, rate and weight decay: the rates with the recipe's decay first, then the best with others."""
    name = str(settings.backbone.get("name", "vit"))
    transformer = name.startswith(("vit", "swin", "deit", "beit", "eva"))
    own = float(settings.method.get("weight_decay", 0.05))
    decays = dict.fromkeys([own, *DECAYS, *([OF_TRANSFORMERS] if transformer else [])])
    rates = [float(f"{factor * rate:.3g}") for factor in (1.0, 1 / 3, 3.0)]
    first = [*((one, own) for one in rates), *((rates[0], decay) for decay in decays)]
    return [*dict.fromkeys([*first, *((one, decay) for one in rates for decay in decays)])]


def grid_length(
    cells: int, seconds: Sequence[float], times: Times, *, least: float, most: float, full: int, scored: int | None
) -> dict[str, Any]:
    """Return how many "cells" of a grid are trained, and the length of each as `cell_length` returns it.

    Where the time does not suffice for all at the least length, there are fewer, but FEWEST_CELLS at least.

    Args:
        cells: Number of cells.
        seconds: Time of the grid: the first of these that suffices for all cells, or the last.
        times, full, most, scored: See cell_length.
        least: The least length, as a share of the recipe's.
    """
    rest = times.rest if scored is None else times.rest * min(1.0, FEWEST_IMAGES / scored)
    shortest = rest + max(least * full, SHORTEST) * times.update
    time = next((one for one in seconds if one >= cells * shortest), seconds[-1])
    number = min(cells, max(FEWEST_CELLS, int(time / shortest)))
    return {"cells": number, **cell_length(time / number, times, full=full, most=most, scored=scored)}


def cell_length(seconds: float, times: Times, *, full: int, most: float, scored: int | None) -> dict[str, Any]:
    """Return the length of a cell that takes some seconds: its "share" of the recipe's, and "images" to score it on.

    Args:
        seconds: Time of the cell.
        times: Seconds of an update, and of the rest.
        full: Updates of the recipe.
        most: The largest share.
        scored: Images of each kind for a score; fewer are taken where scoring took more than SCORING of the time. None if that
            cannot be changed: then "images" is None.
    """
    rest, images = times.rest, None
    if scored is not None and rest > SCORING * seconds:
        images = min(scored, max(FEWEST_IMAGES, round(scored * SCORING * seconds / rest)))
        rest *= images / scored
    return {"share": min(most, max((seconds - rest) / times.update, SHORTEST) / full), "images": images}


def finer(best: Mapping[str, Any], factor: float) -> list[tuple[float, float]]:
    """Return the cells of step 5, rate and weight decay, about the best one."""
    rate, decay = best["rate"], best["weight_decay"]
    cells = [(rate, decay), (rate / factor, decay), (rate * factor, decay)]  # if time is short, these
    if decay:
        cells += [(rate, decay / 3), (rate, decay * 3)]
    return [(float(f"{one:.3g}"), float(f"{other:.3g}")) for one, other in cells]
