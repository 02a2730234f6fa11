"""The Lightning trainer and the kernels it trains with. Every option can be set; what is not set follows the machine."""

import difflib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as L
import torch
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins import DoublePrecision
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from pytorch_lightning.trainer.connectors.accelerator_connector import _AcceleratorConnector
from timm.layers import set_fused_attn

from sslvision.backbones.backbone import Backbone
from sslvision.backbones.dense import Dense
from sslvision.errors import UsageError
from sslvision.methods.base import Method
from sslvision.nn.compilation import should_compile
from sslvision.nn.cpu import use_cpu_kernels
from sslvision.nn.packed_attention import use_packed_attention
from sslvision.runs.checkpoint import AtomicCheckpoints
from sslvision.system.allocator import keep_freed_memory
from sslvision.training.processes import (
    REFUSED,
    SHARDED,
    check_processes,
    join_restarted,
    refuse_wrong,
    set_timeout,
    strategy_for,
    tell_of_lost_processes,
)
from sslvision.training.sharding import FSDP2

ENDING = ("ddp_spawn", "ddp_fork", "ddp_notebook")  # strategies whose processes are gone after training


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
    timeout: int = 1800,
    checkpoints: AtomicCheckpoints | None = None,
) -> L.Trainer:
    """Build the Lightning trainer.

    Args:
        folder: The run folder.
        epochs: Passes over the data; -1 for no limit but `max_steps`.
        steps: Optimizer updates of the whole run.
        dry_run: Stop after two updates.
        loggers, callbacks: Passed on to Lightning.
        options: The user's `trainer.*` settings; they override the defaults below.
        max_steps: Stop after this many updates, even in mid-epoch; -1 for no limit but `epochs`.
        timeout: Seconds that a process waits for the others.
        checkpoints: How checkpoints are written. The precision and the number of accumulated batches in effect are added
            to its record.

    Raises:
        UsageError: Lightning rejects an option.
    """
    defaults: dict[str, Any] = {
        "precision": default_precision(options.get("accelerator", "auto")),
        "log_every_n_steps": max(1, min(50, steps // 100)),  # a short run has a learning curve too
        "enable_model_summary": False,  # the printed configuration contains it
        "num_sanity_val_steps": 0,
        "enable_checkpointing": True,
    }
    checkpoints = checkpoints or AtomicCheckpoints()
    given = {**defaults, **{key: value for key, value in options.items() if key != "plugins"}}
    plugins = [checkpoints, *(options.get("plugins") or [])]
    if (
        given.get("strategy") == SHARDED and given["precision"] == "64-true"
    ):  # Lightning refuses the name, not the thing
        plugins.append(DoublePrecision())
        given["precision"] = None
    given["strategy"] = strategy_for(given, timeout)
    with _rejections(options):
        trainer = L.Trainer(
            max_epochs=epochs,
            max_steps=2 if dry_run else max_steps,
            default_root_dir=folder,
            logger=loggers,
            callbacks=callbacks,
            plugins=plugins,
            use_distributed_sampler=False,
            **given,
        )
        set_timeout(trainer.strategy, timeout)
    check_processes(trainer.num_devices, trainer.num_nodes)
    if (
        isinstance(trainer.strategy, DDPStrategy) and trainer.strategy._start_method != "popen"
    ):  # Lightning's in a notebook
        _refuse_ending(f"ddp_{trainer.strategy._start_method}")
    checkpoints.record |= {"precision": str(trainer.precision), "accumulate": trainer.accumulate_grad_batches}
    return trainer


def check_options(options: Mapping[str, Any], *, pretrains: bool = True) -> None:
    """Check the names of strategy and accelerator, before anything is loaded.

    Raises:
        UsageError: Lightning knows no such strategy or accelerator, or the strategy starts processes that end with training,
            while export and evaluation come after it.
    """
    groups = {
        "strategy": {"auto", SHARDED, *StrategyRegistry.available_strategies()},
        "accelerator": {"auto", "gpu", *AcceleratorRegistry.available_accelerators()},
    }
    refuse_wrong(str(options.get("strategy", "auto")), pretrains=pretrains)
    for key, names in groups.items():
        name = options.get(key, "auto")
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            known = ", ".join(sorted(one for one in names if not one.startswith((*ENDING, *REFUSED)) or one == SHARDED))
            told = f" Did you mean trainer.{key}={near[0]}?" if near and not near[0].startswith(ENDING) else ""
            raise UsageError(f"trainer.{key}={name} is unknown to Lightning: it is one of {known}.{told}")
    _refuse_ending(str(options.get("strategy", "auto")))


def _refuse_ending(strategy: str) -> None:
    if strategy.startswith(ENDING):
        ddp = next(strategy.replace(one, "ddp") for one in ENDING if strategy.startswith(one))
        raise UsageError(
            f"trainer.strategy={strategy} starts processes that end with training, so that nothing would be exported and "
            f"evaluated: use trainer.strategy={ddp}, from the command line; in a notebook, one device, trainer.devices=1."
        )


@dataclass(frozen=True)
class Machine:
    """What Lightning makes of `trainer.accelerator`, `devices`, `strategy` and `precision` on this machine.

    Attributes:
        device: The device of this process.
        world_size: Number of training processes.
        precision: dtype of matrix products.
    """

    device: torch.device
    world_size: int
    precision: torch.dtype


def resolve_machine(options: dict[str, Any]) -> Machine:
    """Return what a trainer with these options will train on.

    Raises:
        UsageError: Lightning rejects an option.
    """
    names = ("accelerator", "devices", "num_nodes", "strategy", "precision", "plugins")
    given = {"precision": default_precision(options.get("accelerator", "auto")), **options}
    given["strategy"] = strategy_for(given, 1800)
    with _rejections(options):  # Lightning resolves them in this class only, a private one; Trainer calls it first
        connector = _AcceleratorConnector(**{name: given[name] for name in names if name in given})
    strategy = connector.strategy
    precision = _dtype_of(strategy.precision_plugin.precision)
    return Machine(strategy.root_device, getattr(strategy, "world_size", 1), precision)


@contextmanager
def _rejections(options: dict[str, Any]) -> Iterator[None]:
    """Turn Lightning's errors about an option into a UsageError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "GPU available but not used" and the like: the user asked for it
            yield
    except (
        TypeError,
        ValueError,
        RuntimeError,
        ImportError,
        L.utilities.exceptions.MisconfigurationException,
    ) as error:
        shown = ", ".join(f"trainer.{key}={value}" for key, value in options.items())
        took = ["accelerator", "devices"] + ["strategy"] * isinstance(options.get("strategy"), str)
        hint = "".join(f" trainer.{key}=auto takes what this machine has." for key in took if key in options)
        raise UsageError(f"Lightning rejects {shown or 'the trainer'}: {error}{hint}") from error


def fit(trainer: L.Trainer, method: Method, data: L.LightningDataModule, *, checkpoint: Path | None) -> None:
    """Train, starting from a checkpoint if one is given."""
    # Lightning would load the checkpoint into a single-precision method, and convert that to double afterwards.
    trainer.precision_plugin.convert_module(method)
    tell_of_lost_processes(trainer)
    join_restarted(trainer.strategy)
    trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)


def compute_dtype(trainer: L.Trainer) -> torch.dtype:
    """Return the dtype of matrix products under the trainer's precision."""
    return _dtype_of(trainer.precision)


def precision_in_effect(trainer: L.Trainer, backbone: Backbone) -> str:
    """Return the precision that a backbone and the rest are trained in, in words."""
    if trainer.strategy.root_device.type == "cpu" and isinstance(backbone, Dense) and trainer.precision == "bf16-mixed":
        return "32-true in the backbone (on a CPU all but ViT and Swin run so), bf16-mixed in the rest"
    return str(trainer.precision)


def _dtype_of(precision: Any) -> torch.dtype:
    return torch.bfloat16 if str(precision).startswith("bf16") else torch.float32


def default_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """Return bf16 where the hardware has units for it; a CPU without them is a hundred times slower in bf16."""
    if trains_on_cpu(accelerator):
        features = torch.cpu.get_capabilities()
        return "bf16-mixed" if features.get("avx512_bf16") or features.get("amx_bf16") else "32-true"
    return "bf16-mixed" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "32-true"


def trains_on_cpu(accelerator: str) -> bool:
    """Return whether `trainer.accelerator` means the CPU on this machine."""
    return accelerator == "cpu" or (
        accelerator == "auto" and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )


def select_device(setting: str) -> torch.device:
    """Return the device that auto, cpu, cuda or mps means on this machine.

    Raises:
        UsageError: There is no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if setting != "auto" and not available[setting]:
        raise UsageError(f"device={setting}: this machine has none; use device=auto.")
    return torch.device(next(kind for kind in available if available[kind]) if setting == "auto" else setting)


def configure_torch(accelerator: str) -> None:
    """Select the faster of equivalent kernels and the allocator's behavior, for the whole process.

    Args:
        accelerator: `trainer.accelerator`, or the type of the device.
    """
    on_cpu = trains_on_cpu(accelerator)
    # On a CPU two batched products beat the fused kernel, which is made for long sequences (tenfold in bf16).
    set_fused_attn(not on_cpu)
    # "high" is TF32 on a GPU. On a CPU "medium" makes oneDNN multiply instead of MKL, which is slow on other vendors' chips;
    # fp32 stays fp32, except with matrix units (AMX), where oneDNN would multiply in bf16.
    has_amx = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    torch.set_float32_matmul_precision("high" if not on_cpu else "highest" if has_amx else "medium")
    if on_cpu:
        keep_freed_memory()
        if not torch.cuda.is_available():
            # Optimizers check for a GPU in every step. Lightning makes torch query the driver for it, which takes as long as
            # ten small operations; the usual check is quick where there is no driver.
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"


def configure_method(
    method: Method,
    device: torch.device,
    *,
    compile: bool | None = None,
    cuda_graphs: bool | None = None,
    world_size: int = 1,
    accumulate: int = 1,
    sharded: bool = False,
) -> None:
    """Compile a method's blocks, capture its steps in CUDA graphs, or replace its layers by faster equivalents.

    Args:
        method: The method, before DDP wraps it.
        device: The device it trains on.
        compile: Compile its blocks and losses; None: on CUDA only. Without it, a CPU gets layers of its own.
        cuda_graphs: Run each step as two CUDA graphs, see nn/cuda_graphs.py. None: for a ViT or Swin on one CUDA device,
            without activation checkpointing (a graph cannot rewind its random numbers).
        world_size: Number of training processes. Graphs leave gradients where DDP does not see them.
        accumulate: Batches per update. With more than one, graphs are used only on request: no GPU has proved them yet.
        sharded: Its weights will be in shards, which layers of our own do not know.

    Raises:
        UsageError: `cuda_graphs` is true where graphs are not possible.
    """
    if device.type == "cuda" and not sharded:
        use_packed_attention(method)
    if should_compile(compile, device):
        method.compile_blocks()
    elif device.type == "cpu" and not sharded:
        use_cpu_kernels(method)
    obstacle = cuda_graph_obstacle(method, device, world_size) or "weights are in shards" * sharded
    if cuda_graphs and obstacle:
        raise UsageError(f"cuda_graphs=true is not possible: {obstacle}. Remove it.")
    backbones = [module for module in method.modules() if isinstance(module, Backbone)]
    # ViT and Swin, which encode visible patches only, are known not to synchronize with the device; others are not.
    proven = accumulate == 1 and all(backbone.supports_masking for backbone in backbones)
    if cuda_graphs or (cuda_graphs is None and not obstacle and proven):
        method.capture_steps()


def configure_for(trainer: L.Trainer, method: Method, *, compile: bool | None, cuda_graphs: bool | None) -> None:
    """Configure a method for a trainer's device, processes and accumulated batches, see `configure_method`."""
    sharded = isinstance(trainer.strategy, FSDP2)
    if sharded and method.optimizer_name == "muon":
        raise UsageError(
            "trainer.strategy=fsdp2 and optimizer=muon do not go together: it needs whole matrices, and these are shards. Set "
            "optimizer=adamw, or trainer.strategy=ddp."
        )
    configure_method(
        method,
        trainer.strategy.root_device,
        compile=compile,
        cuda_graphs=cuda_graphs,
        world_size=trainer.world_size,
        accumulate=trainer.accumulate_grad_batches,
        sharded=sharded,
    )


def cuda_graph_obstacle(method: Method, device: torch.device, world_size: int) -> str:
    """Return why a method's steps cannot be CUDA graphs; an empty string if they can."""
    if device.type != "cuda":
        return f"{device.type} has none"
    if world_size > 1:
        return f"{world_size} processes exchange gradients during the backward pass"
    if not vars(type(method)).get(
        "capturable"
    ):  # not inherited: a subclass may run Python code that a graph runs only once
        return f"{type(method).__name__} does not support them"
    checkpointed = any(isinstance(one, Backbone) and one.activation_checkpointing for one in method.modules())
    return "activation_checkpointing=true recomputes activations" if checkpointed else ""


def silence_lightning() -> None:
    """Silence Lightning's messages that the user can do nothing about, or that our printed configuration contains."""
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for message in (
        ".*returned a view tensor.*",  # timm's Swin blocks do, and nothing changes these in place
        ".*LeafSpec.*",  # a call in Lightning 2.6 that torch 2.15 deprecates
        ".*Checkpoint directory .* exists and is not empty.*",  # it does when a run is resumed
        ".*The dirpath has changed.*",  # a run folder may be moved; we do not use what the callback forgets
        ".*module\\(s\\) in eval mode at the start of training.*",  # a teacher is
        ".*dataloader is not resumable.*",  # its sampler starts at the trainer's position
        ".*does not have many workers.*",  # images in memory need none
        ".*smaller than the logging interval.*",  # the last update is always logged
        ".*no `val_dataloader`.*",  # a data set may be too small for validation
        ".*`srun` command is available.*",  # as on a login node; a wrong number of processes is an error: check_processes
    ):
        warnings.filterwarnings("ignore", message=message)
