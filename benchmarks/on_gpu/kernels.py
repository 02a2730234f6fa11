"""Part `profile`: the kernels of a step by time, what kind they are, and a trace to look at."""

import time
from functools import partial

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.on_gpu.bench import prepare
from benchmarks.on_gpu.contestants import available, build_step
from benchmarks.on_gpu.findings import DRY, FILES, USUAL, attempt, set_up, wait

STEPS = 2
KINDS = {  # what a kernel's name tells of it, the first that fits
    "attention": ("fmha", "flash", "sdpa", "attention", "cudnn_generated", "mha", "attn"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "sm90", "cublas", "splitk"),
    "optimizer": ("adam", "multi_tensor", "lerp"),
    "triton": ("triton",),
    "copies": ("memcpy", "memset", "copy", "cat"),
}


def kernels(who="run", top="22", **settings):
    """Profile contestants; the first `top` kernels are kept. Settings are those of `bench`."""
    set_up()
    base, bytes_, views = prepare(settings)
    method, arch, _ = ({**USUAL, **settings}[key] for key in USUAL)
    for name in available(who.split(",")):
        file = FILES / f"trace_{method}_{arch}_{name}.json.gz"
        build = partial(build_step, name, base, bytes_, views, arch)
        attempt(f"{method} {arch} {name}", profiled, build, file, int(top))


def profiled(build, file, top):
    """Return milliseconds of a step by the clock, on the device, and by kernel."""
    step = build()
    for _ in range(2 if DRY else 4):
        step()
    wait()
    with profile(activities=[ProfilerActivity.CPU, *([] if DRY else [ProfilerActivity.CUDA])]) as trace:
        began = time.perf_counter()
        for _ in range(STEPS):
            step()
        wait()
        clock = 1e3 * (time.perf_counter() - began) / STEPS
    rows = []
    for event in trace.key_averages():
        microseconds = event.self_cpu_time_total if DRY else event.self_device_time_total
        annotation = event.key.startswith("Optimizer.")  # a name for the time of several kernels
        if microseconds and not annotation and (DRY or event.device_type != DeviceType.CPU):
            rows.append((round(microseconds / 1e3 / STEPS, 3), event.count // STEPS, event.key[:110]))
    rows.sort(reverse=True)
    trace.export_chrome_trace(str(file))
    sums = dict.fromkeys([*KINDS, "other"], 0.0)
    for milliseconds, _, key in rows:
        sums[kind_of(key)] += milliseconds
    short = {
        "wall_ms": round(clock, 2),
        "busy_ms": round(sum(sums.values()), 2),
        "kernels": sum(count for _, count, _ in rows),
        **{kind: round(ms, 2) for kind, ms in sorted(sums.items(), key=lambda item: -item[1]) if ms},
    }
    return {"short": short, "top": rows[:top]}


def kind_of(key):
    return next((kind for kind, names in KINDS.items() if any(name in key.lower() for name in names)), "other")
