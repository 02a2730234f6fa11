"""What is read off a training step: time by rounds and by phases, memory, waits for the device, and the chip's own speed."""

import contextlib
import ctypes
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from peers import Contestant

# Dense, without sparsity, of NVIDIA's datasheets; fp32 is computed as TF32.
DATASHEET = {"H100 80GB HBM3": {"bf16": 989e12, "fp32": 495e12}, "H200": {"bf16": 989e12, "fp32": 495e12}}


def autocast(device, precision):
    """Return a function that enters the precision of a step, as torch has it or (`cache_casts=False`) as Lightning does."""

    def enter(cache_casts=True):
        if precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=cache_casts)

    return enter


def wait(device_type):
    if device_type == "cuda":
        torch.cuda.synchronize()


def one_step(contestant: Contestant, precision, lap=lambda phase: None):
    views = contestant.prepare()
    lap("views")
    with precision(contestant.cache_casts):
        loss = contestant.loss(views)
    lap("forward")
    loss.backward()
    lap("backward")
    contestant.update()
    lap("optimizer")
    contestant.update_ema()
    lap("teacher")


def timed(contestant, precision, steps):
    """Milliseconds of a step."""
    kind = contestant.views[0].device.type
    wait(kind)
    start = time.perf_counter()
    for _ in range(steps):
        one_step(contestant, precision)
    wait(kind)
    return 1e3 * (time.perf_counter() - start) / steps


def quickest(candidates, precision):
    """Return the one whose settings are the fastest here, warmed up."""
    if len(candidates) == 1:
        return candidates[0]
    for candidate in candidates:
        timed(candidate, precision, 2)
    return min(candidates, key=lambda candidate: min(timed(candidate, precision, 2) for _ in range(2)))


def race(contestants, precision, *, rounds, steps, before=None):
    """Return ms per step of every round; each round has another order.

    With `before`, it is called with each contestant before its turn, and a step that is not timed follows.
    """
    times = {contestant.name: [] for contestant in contestants}
    for contestant in contestants:
        timed(contestant, precision, 2)
    for number in range(rounds):
        first = number % len(contestants)
        order = contestants[first:] + contestants[:first]
        for contestant in order if number % 2 else order[::-1]:
            if before is not None:
                before(contestant)
                timed(contestant, precision, 1)
            times[contestant.name].append(timed(contestant, precision, steps))
    return times


def phases(contestants, precision, *, rounds=5):
    """Return each contestant's median ms of each phase, in turns as above.

    The device is waited for after each phase, so they add up to a little more than a step.
    """
    taken = {contestant.name: {} for contestant in contestants}
    for contestant in contestants * rounds:
        kind = contestant.views[0].device.type
        wait(kind)
        last = time.perf_counter()

        def lap(phase, kind=kind, name=contestant.name):
            nonlocal last
            wait(kind)
            now = time.perf_counter()
            taken[name].setdefault(phase, []).append(1e3 * (now - last))
            last = now

        one_step(contestant, precision, lap)
    return {name: {phase: statistics.median(ms) for phase, ms in found.items()} for name, found in taken.items()}


def peak_memory(contestant, precision):
    """Return MB of a step's peak above what lay there before it: gradients and what is kept for the backward pass.

    On a CPU from the process's resident set, which is rough: freed memory is not always given back.
    """
    if contestant.views[0].device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        timed(contestant, precision, 1)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc gives back what is free, so that the step has to ask for it again
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest resident set is counted anew
        before = resident_set("VmRSS")
        timed(contestant, precision, 1)
        return (resident_set("VmHWM") - before) / 1e3
    except (OSError, AttributeError):
        return None


def resident_set(which):
    """Return kB of VmRSS (now) or VmHWM (highest)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))


def host_syncs(contestant, precision):
    """Return how often a step makes the host wait for the GPU; None on a CPU."""
    if contestant.views[0].device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        one_step(contestant, precision)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def matrix_product(device, precision):
    """Return the FLOP/s of the best of some large matrix products, which no step exceeds."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device).unbind()
    best = float("inf")
    with precision(), torch.no_grad():
        if torch.is_autocast_enabled(device.type):
            a, b = a.bfloat16(), b.bfloat16()
        for _ in range(8):
            wait(device.type)
            start = time.perf_counter()
            a @ b
            wait(device.type)
            best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def datasheet(device, precision):
    """Return the FLOP/s that the maker states, or None."""
    return stated(torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor(), precision)


def stated(name, precision):
    """Return the FLOP/s that the maker of a chip states, or None."""
    return next((peaks[precision] for part, peaks in DATASHEET.items() if part in name), None)
