"""Part `bench`: images per second, MFU and memory of training steps, one contestant after the other."""

import gc
import os
import statistics
import tempfile
import time
from types import SimpleNamespace

import torch
from measure import datasheet
from reference import reference_flops
from resident import resident, settings_of

from benchmarks.on_gpu.contestants import available, build_step
from benchmarks.on_gpu.findings import DRY, USUAL, attempt, device, note, set_up, wait

ROUNDS = 1 if DRY else 5
BACKBONES = {  # of a dry run
    "vit": ["backbone.depth=1", "backbone.embed_dim=48", "backbone.num_heads=3"],
    "swin": ["backbone.depths=[1,1,1,1]", "backbone.embed_dim=24"],
}
METHODS = {
    "mae": ["decoder_depth=2", "decoder_embed_dim=48", "decoder_num_heads=3"],
    "dino": ["prototypes=64", "hidden=32", "local_crops=2"],
}


def bench(who="run,eager", steps="20", budget="400", **settings):
    """Time contestants. If the first of several is eager it is timed again at the end, to tell how steady the card was.

    Args:
        who: names of contestants.py, comma by comma; peers that are not installed are left out.
        steps: that are timed, in five rounds.
        budget: seconds after which no further contestant is begun.
        settings: method (mae or dino), arch (a ViT or Swin of timm), batch (images of a step), and keys of the recipe.
    """
    set_up()
    began = time.perf_counter()
    names = available(who.split(","))
    again = [names[0]] if len(names) > 1 and names[0].startswith("eager") else []
    base, bytes_, views = prepare(settings)
    flops = attempt("flops", lambda: {"gflop_per_image": reference_flops(base, views) / 1e9})
    base.to("cpu")  # every contestant has a copy of its own
    for number, name in enumerate(names + again):
        label = name if number < len(names) else f"{name} again"
        if time.perf_counter() - began > float(budget):
            note(label, {"short": "not begun: no time left"})
            continue
        row = attempt(label, measure, name, base, bytes_, views, settings.get("arch", USUAL["arch"]), int(steps))
        if "ms" in row and (peak := datasheet(device(), "bf16")):
            row["mfu"] = round(row["img/s"] * flops["gflop_per_image"] * 1e9 / peak, 4)
            note(label, row)
        gc.collect()
        if not DRY:
            torch.cuda.empty_cache()


def prepare(settings):
    """Return a recipe's method, bytes as the loader would send them, and views of them, on the device; tiny in a dry run."""
    method, arch, batch = ({**USUAL, **settings}[key] for key in USUAL)
    words = [f"{key}={value}" for key, value in settings.items() if key not in USUAL]
    if DRY:
        batch, words = "2", [*words, *BACKBONES[arch[: arch.index("_")]], *METHODS[method]]
    about = SimpleNamespace(method=method, arch=arch, batch=int(batch))
    return resident(settings_of(about, tempfile.gettempdir() if DRY else os.devnull, words), device())


def measure(name, base, bytes_, views, arch, steps):
    """Return milliseconds of a step, of the host until all of it is queued, and memory."""
    if not DRY:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    began = time.perf_counter()
    step = build_step(name, base, bytes_, views, arch)
    step()
    step()
    wait()
    ready = time.perf_counter() - began
    for _ in range(1 if DRY else 3):
        step()
    wait()
    count, whole, queued = max(1, (1 if DRY else steps) // ROUNDS), [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            step()
        queued.append(1e3 * (time.perf_counter() - start) / count)
        wait()
        whole.append(1e3 * (time.perf_counter() - start) / count)
    took = statistics.median(whole)
    row = {
        "ms": round(took, 3),
        "host_ms": round(statistics.median(queued), 3),
        "img/s": round(1e3 * len(views[0]) / took, 1),
        "spread": round(max(whole) / min(whole) - 1, 3),
        "first_s": round(ready, 1),
    }
    if not DRY:
        peak = torch.cuda.max_memory_allocated()
        row |= {"peak_GB": round(peak / 1e9, 2), "own_GB": round((peak - before) / 1e9, 2)}
    return row
