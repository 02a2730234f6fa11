"""Checks that a step computes the same on a CPU, on CUDA, compiled, as CUDA graphs, twice, and checkpointed."""

import copy
import time

import torch

from benchmarks.on_gpu.findings import DRY, device, matmul_precision
from benchmarks.on_gpu.small import CLOCK, PAIRS, distance, gradients, random_batch, small_method, views_of
from sslvision.nn.cuda_graphs import CapturedStep

# Largest relative difference of all gradients that is no fault: fp32 differs by the order of sums, TF32 and bf16 by rounding.
LIMITS = {"fp32": 1e-4, "TF32": 2e-2, "bf16": 0.1}


def reference(kind, backbone):
    """Return a method on the CPU, views, and its loss and gradients in fp32."""
    method = small_method(kind, backbone)
    views = [view.clone() for view in views_of(method, random_batch(method))]
    return method, views, gradients(method, views)


def judged(rows):
    """Return rows of `distance` with a short line that names those beyond their limit."""
    bad = [name for name, row in rows.items() if not row["gradients"] < LIMITS[name.split()[-1]]]
    return {"short": {name: f"{row['gradients']:.1e}" for name, row in rows.items()} | {"bad": bad}, **rows}


def eager(kind, backbone):
    """Return how far CUDA is from the CPU's fp32, in fp32, with TF32 and in bf16."""
    method, views, right = reference(kind, backbone)
    method, views, rows = method.to(device()), [view.to(device()) for view in views], {}
    for name, products, bf16 in (("fp32", "highest", False), ("TF32", "high", False), ("bf16", "high", True)):
        with matmul_precision(products):
            rows[name] = distance(right, gradients(method, views, bf16=bf16))
    return judged(rows)


def compiled(kind, backbone):
    """Return how far the compiled method is from the CPU's fp32 in bf16; of one method in fp32, too: it takes long."""
    method, views, right = reference(kind, backbone)
    method, views, rows = method.to(device()), [view.to(device()) for view in views], {}
    method.compile_blocks()
    names = ["bf16", "fp32"] if (kind, backbone) == ("dino", "vit") and not DRY else ["bf16"]
    for name in names:
        with matmul_precision("highest" if name == "fp32" else "high"):
            began = time.perf_counter()
            rows[name] = distance(right, gradients(method, views, bf16=name == "bf16"))
            rows[name]["compiled_s"] = round(time.perf_counter() - began, 1)
    return judged(rows)


def captured():
    """Return how far CUDA graphs of a step are from the same step without, in bf16 with drop-path, and on other images."""
    if DRY:
        return {"captured": "a CPU has no graphs"}
    rows = {}
    for kind, backbone in PAIRS:
        method = small_method(kind, backbone, drop_path=0.3).to(device())
        first = [view.clone() for view in views_of(method, random_batch(method, device()))]
        graphs = in_bf16(CapturedStep, lambda *views, method=method: method.losses([*views], None), method, first)
        for name, views in (("captured", first), ("other", [view.flip(0) for view in first])):
            right = one_step(method, lambda *views, method=method: method.losses([*views], CLOCK), views)
            rows[f"{kind} {backbone}, {name} images, bf16"] = distance(right, one_step(method, graphs, views))
    return judged(rows)


def one_step(method, losses, views):
    """Return the loss and the gradients of a function that may be a captured one."""
    torch.cuda.manual_seed(5)
    method.set_clock(CLOCK)
    loss = in_bf16(losses, *views)["loss"]
    loss.backward()
    found = {name: p.grad.double().cpu() for name, p in method.named_parameters() if p.grad is not None}
    method.zero_grad(set_to_none=True)
    return loss.item(), found


def in_bf16(function, *inputs):
    with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
        return function(*inputs)


def same_seed():
    """Return by how much two steps of the same seed differ: nothing, where no kernel adds in whatever order."""
    rows = {}
    for kind, backbone in PAIRS:
        method = small_method(kind, backbone, drop_path=0.3).to(device())
        views = [view.clone() for view in views_of(method, random_batch(method, device()))]
        results = []
        for _ in range(2):
            torch.manual_seed(5)
            results.append(gradients(method, views, bf16=True))
        rows[f"{kind} {backbone}"] = distance(*results)
    return {"short": {name: row["gradients"] for name, row in rows.items()}, **rows}


def low_memory():
    """Return how far activation_checkpointing=true is from the usual step, eager and compiled."""
    usual = small_method("dino", "vit", drop_path=0.3).to(device())
    low = copy.deepcopy(usual)
    low.enable_activation_checkpointing()
    views = [view.clone() for view in views_of(usual, random_batch(usual, device()))]
    rows = {}
    for name in ("eager bf16", "compiled bf16"):
        results = []
        for method in (copy.deepcopy(usual), copy.deepcopy(low)):
            if name.startswith("compiled"):
                method.compile_blocks()
            torch.manual_seed(1)
            results.append(gradients(method, views, bf16=True))
        rows[name] = distance(*results)
    return judged(rows)
