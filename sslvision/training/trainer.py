"""The Lightning trainer: everything of it can be set; what is not set follows the machine."""

import os
import warnings
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as L
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from timm.layers import set_fused_attn

from sslvision.backbones.backbone import Backbone
from sslvision.errors import UsageError
from sslvision.methods.base import Method
from sslvision.nn.compilation import wanted
from sslvision.nn.cpu import suit_cpu
from sslvision.nn.packed_attention import suit_cuda
from sslvision.runs.checkpoint import AtomicCheckpoints
from sslvision.system.allocator import keep_freed_memory


def build_trainer(
    *,
    folder: Path,
    epochs: int,
    steps: int,
    dry_run: bool,
    loggers: list[Logger],
    callbacks: list[Callback],
    options: dict[str, Any],
    max_steps: int = -1,
    checkpoints: AtomicCheckpoints | None = None,
) -> L.Trainer:
    """Assemble the trainer.

    Args:
        folder: the run's folder.
        epochs: passes over the data; -1: until `max_steps`.
        steps: optimizer updates of the whole run.
        dry_run: stop after two updates.
        loggers, callbacks: handed on.
        options: the person's `trainer.*` settings; they win over the defaults below.
        max_steps: stop after so many updates, be it in the middle of an epoch; -1: after the last epoch.
        checkpoints: how they are written; precision and accumulated batches in effect are added to their record.

    Raises:
        UsageError: Lightning refuses an option.
    """
    defaults: dict[str, Any] = {
        "precision": _precision(options.get("accelerator", "auto")),
        "log_every_n_steps": max(1, min(50, steps // 100)),  # a short run has a learning curve too
        "enable_model_summary": False,  # the effective configuration says it better
        "num_sanity_val_steps": 0,
        "enable_checkpointing": True,
    }
    checkpoints = checkpoints or AtomicCheckpoints()
    try:
        with warnings.catch_warnings():
            # "GPU available but not used" and the like: the person asked for it.
            warnings.simplefilter("ignore")
            trainer = L.Trainer(
                max_epochs=epochs,
                max_steps=2 if dry_run else max_steps,
                default_root_dir=folder,
                logger=loggers,
                callbacks=callbacks,
                plugins=[checkpoints, *(options.get("plugins") or [])],
                use_distributed_sampler=False,
                **{**defaults, **{key: value for key, value in options.items() if key != "plugins"}},
            )
    except (
        TypeError,
        ValueError,
        RuntimeError,
        ImportError,
        L.utilities.exceptions.MisconfigurationException,
    ) as error:
        shown = ", ".join(f"trainer.{key}={value}" for key, value in options.items())
        raise UsageError(f"Lightning refuses {shown or 'the trainer'}: {error}") from error
    checkpoints.record |= {"precision": str(trainer.precision), "accumulate": trainer.accumulate_grad_batches}
    return trainer


def _precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """bf16 where the hardware has units for it; on a CPU without them it is a hundred times slower."""
    if trains_on_cpu(accelerator):
        return "bf16-mixed" if _cpu_has_bf16() else "32-true"
    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


def _cpu_has_bf16() -> bool:
    features = torch.cpu.get_capabilities()
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


def choose_kernels(accelerator: str) -> None:
    """Choose the faster of equivalent kernels, for the whole process."""
    on_cpu = trains_on_cpu(accelerator)
    # On a CPU two batched products beat the fused kernel, which is made for long sequences (in bf16 tenfold).
    set_fused_attn(not on_cpu)
    # "high" is TF32 on a GPU. On a CPU "medium" has oneDNN multiply in place of MKL, which is slow on other makers' chips;
    # fp32 stays fp32 but for matrix units (AMX), which it would have multiply in bf16.
    exact = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    torch.set_float32_matmul_precision("high" if not on_cpu else "highest" if exact else "medium")
    if on_cpu:
        keep_freed_memory()
        if not torch.cuda.is_available():
            # Optimizers ask in every step whether there is a GPU. Lightning has torch look for its driver then, which takes
            # as long as ten small operations; the usual way to ask is quick where there is none.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def choose_layers(
    method: Method,
    device: torch.device,
    *,
    compiled: bool | None = None,
    captured: bool | None = None,
    processes: int = 1,
    accumulated: int = 1,
) -> None:
    """Choose how a method's steps are computed. Where it is not set, what pays on the device.

    Args:
        method: before DDP wraps it.
        device: on which it trains.
        compiled: have its blocks and losses compiled; by default on CUDA. If not, a CPU computes them its own way.
        captured: have each step be two CUDA graphs, see nn/cuda_graphs.py; by default with a ViT or Swin on one CUDA device,
            unless activations are computed again in the backward pass, whose random numbers a graph cannot wind back.
        processes: how many train together. Graphs leave gradients where DDP does not see them.
        accumulated: batches of an update. Graphs of more than one are taken only if asked for: no GPU has proved them yet.

    Raises:
        UsageError: `captured` where that cannot be.
    """
    if device.type == "cuda":
        suit_cuda(method)
    if wanted(compiled, device):
        method.compile_blocks()
    elif device.type == "cpu":
        suit_cpu(method)
    reason = why_not_captured(method, device, processes)
    if captured and reason:
        raise UsageError(f"cuda_graphs=true cannot be: {reason}. Leave it out.")
    backbones = [module for module in method.modules() if isinstance(module, Backbone)]
    # ViT and Swin, which encode visible patches alone, are known to ask the device nothing; of others only a person can say.
    usual = accumulated == 1 and all(backbone.supports_masking for backbone in backbones)
    if captured or (captured is None and not reason and usual):
        method.capture_steps()


def choose_layers_for(trainer: L.Trainer, method: Method, *, compiled: bool | None, captured: bool | None) -> None:
    """Choose how a method's steps are computed under a trainer; see `choose_layers`."""
    choose_layers(
        method,
        trainer.strategy.root_device,
        compiled=compiled,
        captured=captured,
        processes=trainer.world_size,
        accumulated=trainer.accumulate_grad_batches,
    )


def why_not_captured(method: Method, device: torch.device, processes: int) -> str:
    """Return why a method's steps cannot be CUDA graphs; nothing if they can."""
    if device.type != "cuda":
        return f"there are none on {device.type}"
    if processes > 1:
        return f"{processes} processes exchange gradients during the backward pass"
    if not vars(type(method)).get("capturable"):  # a subclass may do in Python what a graph would do but once
        return f"{type(method).__name__} is not made for them"
    checkpointed = any(isinstance(one, Backbone) and one.activation_checkpointing for one in method.modules())
    return "activation_checkpointing=true computes activations a second time" if checkpointed else ""


def compute_dtype(trainer: L.Trainer) -> torch.dtype:
    """Return the type in which the trainer's precision has matrix products computed."""
    return torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32


def trains_on_cpu(accelerator: str) -> bool:
    """Return whether `trainer.accelerator` means the CPU on this machine."""
    return accelerator == "cpu" or (
        accelerator == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )


def device_of(setting: str) -> torch.device:
    """Return the device that auto, cpu, cuda or mps means here.

    Raises:
        UsageError: there is no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if setting != "auto" and not there[setting]:
        raise UsageError(f"device={setting}: there is none here; say device=auto.")
    return torch.device(next(kind for kind in there if there[kind]) if setting == "auto" else setting)
