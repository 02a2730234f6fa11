"""Part `env`: what the machine is, whether everything a run needs is there, and its two ceilings."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sysconfig
from pathlib import Path

from benchmarks.on_gpu.findings import DRY, attempt, milliseconds, note

LIBRARIES = (
    *("torch", "torchvision", "triton", "timm", "pytorch-lightning", "transformers", "lightly"),
    *("hydra-core", "omegaconf", "antlr4-python3-runtime", "wandb", "rich", "safetensors", "matplotlib", "tensorboard"),
    *("numpy", "pytest", "pytest-xdist", "pillow"),
)
MODULES = (  # what the other parts import, ours first
    *(
        "sslvision.workflows.pretraining",
        "sslvision.workflows.probing",
        "sslvision.workflows.finetuning",
        "sslvision.cli.main",
    ),
    *("peers", "resident", "reference", "whole_run"),
    *("lightly.models.modules", "lightly.loss", "transformers.models.vit_mae"),
)
CARD = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit"


def environment():
    note("versions", {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()})
    attempt("imports", lambda: {name: importable(name) for name in MODULES})
    about = {
        "cores": len(os.sched_getaffinity(0)),
        "memory": output("free", "-g"),
        "disks": output("df", "-h", "/dev/shm", "/tmp"),
        "gcc": output("gcc", "--version")[:60],  # Triton compiles its launchers with it
        "Python.h": (Path(sysconfig.get_paths()["include"]) / "Python.h").exists(),
        "cpu": output("sh", "-c", "grep -m1 'model name' /proc/cpuinfo"),
    }
    note("machine", about)
    if not DRY:
        note("card", output("nvidia-smi", f"--query-gpu={CARD}", "--format=csv"))
    attempt("ceilings", ceilings)


def version(library):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(library)


def importable(module):
    """Return "ok", or why a module cannot be imported: a missing package is known in the first seconds."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return "ok"


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()[:1500]
    except OSError as error:
        return str(error)


def ceilings():
    """Return the bandwidth of a copy and the speed of a large matrix product: no step exceeds either."""
    import torch
    from measure import autocast, matrix_product

    from benchmarks.on_gpu.findings import device

    source = torch.empty(1 << (20 if DRY else 30), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copied = 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) / 1e3)
    product = matrix_product(device(), autocast(device(), "fp32" if DRY else "bf16"))
    return {
        "copy_TB_s": round(copied / 1e12, 2),
        "bf16_TFLOP_s": round(product / 1e12, 1),
        "cudnn": torch.backends.cudnn.version(),
    }
