"""Part `checks`: does CUDA compute what a CPU computes, and does a step do what it should there? The cheap ones come first."""

import traceback
import warnings
from functools import partial
from pathlib import Path

import torch

from benchmarks.on_gpu import agreement, attention_checks, tf32
from benchmarks.on_gpu.findings import DRY, attempt, device, set_up
from benchmarks.on_gpu.small import CLOCK, PAIRS, random_batch, small_method, views_of


def checks(only=""):
    """Run the checks, or those whose names (the words before the first space) are given, comma by comma."""
    set_up()
    wanted = [name for name in only.split(",") if name]
    if unknown := set(wanted) - {name.split()[0] for name in CHECKS}:
        raise SystemExit(f"only={only}: no such check as {', '.join(sorted(unknown))}")
    for name, check in CHECKS.items():
        if not wanted or name.split()[0] in wanted:
            attempt(name, check)


def waits(kind, backbone):
    """Return how often a step from bytes makes the host wait for the device, each with the lines that did."""
    place = device()
    method = small_method(kind, backbone, drop_path=0.1).to(place)
    optimizer, batch = method.configure_optimizers(), random_batch(method, place)

    def step():
        if not DRY:
            torch.cuda.manual_seed(3)
        views = views_of(method, batch)
        with torch.autocast(place.type, torch.bfloat16, cache_enabled=False):
            loss = method.losses(views, CLOCK)["loss"]
        (loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)).backward()
        method.prepare_update(optimizer, CLOCK)
        optimizer.step()
        optimizer.zero_grad()
        method.after_update(CLOCK)

    for _ in range(3):
        step()
    if DRY:
        return {"waits": "a CPU has none"}
    lines = []

    def told(message, *_):
        if "synchroniz" in str(message):
            frames = [f for f in traceback.extract_stack() if "sslvision" in f.filename or "torch/optim" in f.filename]
            lines.append(" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[::-1][:3]))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = told
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"waits": len(lines), "where": sorted(set(lines))[:10]}


def skipped_update():
    """Return whether one infinite gradient leaves weights, moments and step count as they were, and the next update is made."""
    method = small_method("mae", "vit").to(device())
    optimizer = method.configure_optimizers()
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    views = views_of(method, random_batch(method, device()))

    def step(spoil):
        method.losses(views, CLOCK)["loss"].backward()
        if spoil:
            next(iter(method.decoder_blocks.parameters())).grad[0] = torch.inf
        method.prepare_update(optimizer, CLOCK)
        optimizer.step()
        optimizer.zero_grad()

    def state():
        moments = [value for of_parameter in optimizer.state.values() for value in of_parameter.values()]
        return [tensor.detach().clone() for tensor in [*method.parameters(), *moments]]

    def unchanged(before):
        return all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))

    step(spoil=False)
    before = state()
    step(spoil=True)
    left = unchanged(before)
    step(spoil=False)
    return {"left as it was": left, "goes on": not unchanged(before)}


CHECKS = {  # name, of which the first word is what `only` says: check
    **{f"waits {kind} {backbone}": partial(waits, kind, backbone) for kind, backbone in PAIRS},
    "skip an update that is not finite": skipped_update,
    "tf32 crops, photometry and blur": tf32.views,
    "tf32 k-NN and linear probe": tf32.evaluation,
    "masked attention": attention_checks.masked,
    "frozen bias of attention": attention_checks.frozen_bias,
    "rows of attention": attention_checks.many_rows,
    "seed gives the same step twice": agreement.same_seed,
    **{f"eager {kind} {backbone}": partial(agreement.eager, kind, backbone) for kind, backbone in PAIRS},
    "captured steps": agreement.captured,
    **{  # a dry run compiles one of them: tests/nn/test_execution.py compiles all
        f"compiled {kind} {backbone}": partial(agreement.compiled, kind, backbone)
        for kind, backbone in (PAIRS[:1] if DRY else PAIRS)
    },
    "memory low computes the same with drop-path": agreement.low_memory,
}
