"""What the parts share: where findings go, whether this is a dry run, how a call is timed. Imports without torch."""

import contextlib
import json
import os
import statistics
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRY = bool(os.environ.get("ON_GPU_DRY"))  # tiny sizes on a CPU, to test the program
SCRATCH = Path(os.environ.get("SCRATCH", "/tmp/on_gpu"))  # compiled kernels stay here for the next call
FOUND, FILES = SCRATCH / "found", SCRATCH / "files"

USUAL = {"method": "mae", "arch": "vit_base_patch16_224", "batch": "256"}  # of a step that is timed

found: dict = {}
current = {"file": FOUND / "part.json"}


def note(name, value):
    """Keep a finding: it is on the disk before anything else is tried."""
    found[name] = value
    unfinished = current["file"].with_suffix(".unfinished")
    unfinished.write_text(json.dumps(found, indent=1, default=str))
    os.replace(unfinished, current["file"])
    print(f"{time.strftime('%H:%M:%S')} {name}: {json.dumps(value, default=str)[:400]}", flush=True)


def attempt(name, function, *arguments, **keywords):
    """Note what a function returns, or the error it raises: that is a finding too, and the part goes on."""
    began = time.perf_counter()
    try:
        value = function(*arguments, **keywords)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        value = {"error": f"{type(error).__name__}: {error}"[:700], "at": where}
        traceback.print_exc()
    if isinstance(value, dict):
        value.setdefault("seconds", round(time.perf_counter() - began, 1))
    note(name, value)
    return value


def stem(part, words):
    """Return the name, without suffix, of the file of findings of a part with these words (recipe: its first word)."""
    if part == "recipe":
        return f"recipe_{words[0].replace('=', '_')}" if words else part
    given = dict(word.split("=", 1) for word in words if "=" in word)
    return "_".join([part, *(given[key] for key in ("method", "arch", "batch", "tag") if key in given)])


def split_part(text):
    """Return (name, seconds or None, words) of PART[:seconds][:word...]."""
    name, *words = text.split(":")
    limit = float(words.pop(0)) if words and words[0].replace(".", "", 1).isdigit() else None
    return name, limit, words


def device():
    """Return where the parts compute: CUDA, or in a dry run the CPU."""
    import torch

    return torch.device("cpu" if DRY else "cuda")


def wait():
    """Wait for the device to finish what has been queued."""
    import torch

    if not DRY:
        torch.cuda.synchronize()


def set_up():
    """Choose kernels as training on this machine does. A dry run uses a GPU's choice of attention, and a quick compiler."""
    from timm.layers import set_fused_attn

    from sslvision.nn import compilation
    from sslvision.training.trainer import configure_torch

    configure_torch("cpu" if DRY else "gpu")
    if DRY:
        set_fused_attn(True)
        compilation.BACKEND = "aot_eager"


@contextlib.contextmanager
def matmul_precision(name):
    """Have fp32 products computed with TF32 ("high") or without ("highest") for as long as the context lasts."""
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def milliseconds(function, repeat=20, warm_up=3):
    """Return the median time of a call on the device, by events in its queue."""
    import torch

    if DRY:
        function()
        began = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - began)
    for _ in range(warm_up):
        function()
    marks = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        marks.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in marks)
