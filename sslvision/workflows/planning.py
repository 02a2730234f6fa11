"""A plan on paper: what a device holds and sends in an update of a pretraining run, and the largest batch that fits it.

Nothing is trained, no image is read, and neither the devices nor memory for the network are needed: the method is built on
torch's meta device, and its steps run on fake tensors (inspection/fake_update.py).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console

from sslvision.backbones.dense import Dense
from sslvision.errors import UsageError
from sslvision.inspection.device_memory import DeviceMemory, Strategy, memory_of
from sslvision.inspection.fake_update import (
    OptimizerBytes,
    StepBytes,
    fused_attention,
    inputs_of,
    measure_optimizer,
    measure_step,
)
from sslvision.methods.base import Method
from sslvision.nn.cpu import use_cpu_kernels
from sslvision.settings import Pretrain
from sslvision.training.processes import SHARDED
from sslvision.training.trainer import default_precision
from sslvision.workflows.method import method_from_settings
from sslvision.workflows.planning_tables import print_plan
from sslvision.workflows.pretraining import continued

PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {  # dtype of the weights and of autocast
    "32-true": (torch.float32, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "16-mixed": (torch.float32, torch.float16),
    "bf16-true": (torch.bfloat16, None),
    "16-true": (torch.float16, None),
    "64-true": (torch.float64, None),
}
NOT_COUNTED = (
    "the context of CUDA, buffers of NCCL or gloo, workspaces of kernels, what the allocator rounds up and leaves between "
    "tensors (leave some percent for these), evaluation on the way, images in main memory; of traffic, small reductions "
    "(norms, DINO's center, the log)"
)


@dataclasses.dataclass(frozen=True)
class World:
    """What a run is planned for.

    Attributes:
        device: "cuda" or "cpu".
        devices: Devices of all nodes.
        nodes: Nodes.
        strategy: How the run distributes the method.
        precision: `trainer.precision`.
        accumulate: Batches per update.
        images: Images of a batch on one device.
    """

    device: str
    devices: int
    nodes: int
    strategy: Strategy
    precision: str
    accumulate: int
    images: int


def plan(settings: Pretrain) -> dict[str, Any]:
    """Print what each device of a run holds and sends, and the largest batches that fit.

    Args:
        settings: All settings.

    Returns:
        All figures in bytes: the world, for each strategy and with and without recomputed activations the parts and the largest
        batch, and what to choose.

    Raises:
        UsageError: The settings cannot be planned for.
    """
    settings = continued(settings, None)
    world = world_of(settings)
    memory = 1e9 * settings.plan_gb
    plans: dict[str, dict[str, Any]] = {}
    optimizer: OptimizerBytes | None = None
    for recomputed in dict.fromkeys((settings.activation_checkpointing, True)):
        for strategies in strategies_of(world, settings):
            try:
                method = prepare(settings, world, sharded="fsdp2" in strategies, recomputed=recomputed)
            except UsageError:
                if settings.activation_checkpointing or not recomputed:
                    raise
                continue  # timm cannot recompute the activations of this network
            optimizer = optimizer or measure_optimizer(method, device=world.device)
            steps = measure(method, world)
            for strategy in strategies:
                of = memory_of(
                    method,
                    strategy,
                    world.devices,
                    accumulate=world.accumulate,
                    steps=steps,
                    optimizer=optimizer,
                    low=world.precision == "bf16-mixed",
                )
                plans[f"{strategy}, recomputed" if recomputed else strategy] = figures(of, world, memory)
    assert optimizer is not None
    results = {"world": dataclasses.asdict(world), "memory": memory, "plans": plans, "not_counted": NOT_COUNTED}
    results |= {"optimizer_unknown": optimizer.unknown, "choice": choice(plans, world)}
    print_plan(Console(soft_wrap=True, highlight=False), results, about=about(settings, method, world))
    return results


def world_of(settings: Pretrain) -> World:
    """Return what the settings ask for; the devices need not be there.

    Raises:
        UsageError: It cannot be planned for, or the batch cannot be shared by so many devices.
    """
    options = settings.trainer
    accelerator = options.get("accelerator", "auto")
    if accelerator not in ("auto", "gpu", "cuda", "cpu"):
        raise UsageError(f"dry_run=plan is for GPUs and CPUs, not for trainer.accelerator={accelerator}.")
    device = "cpu" if accelerator == "cpu" else "cuda"
    nodes, accumulate = int(options.get("num_nodes", 1)), int(options.get("accumulate_grad_batches", 1))
    devices = nodes * _devices_of(options.get("devices", "auto"), device)
    precision = str(options.get("precision") or ("bf16-mixed" if device == "cuda" else default_precision("cpu")))
    precision = {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}.get(precision, precision)
    if precision not in PRECISIONS:
        raise UsageError(f"dry_run=plan does not know trainer.precision={precision}: {', '.join(PRECISIONS)}.")
    asked = str(options.get("strategy", "auto"))
    if asked != "auto" and asked != SHARDED and not asked.startswith("ddp"):
        raise UsageError(f"dry_run=plan knows trainer.strategy=ddp and {SHARDED}, not {asked}.")
    strategy: Strategy = "fsdp2" if asked == SHARDED else "ddp" if devices > 1 or asked != "auto" else "one process"
    images, rest = divmod(settings.batch_size, devices * accumulate)
    if rest or not images:
        raise UsageError(
            f"batch_size={settings.batch_size} counts the images of one optimizer update over all devices; it cannot be shared "
            f"evenly by {devices} device(s) x {accumulate} accumulated batches: make it a multiple of {devices * accumulate}."
        )
    return World(device, devices, nodes, strategy, precision, accumulate, images)


def _devices_of(setting: Any, device: str) -> int:
    """Return how many devices `trainer.devices` means on each node; auto is those of this machine, at least one."""
    if isinstance(setting, list | tuple):
        return len(setting)
    if str(setting) in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if device == "cuda" else 1
    text = str(setting)
    number = int(text) if text.isdigit() else len(text.split(",")) if text.replace(",", "").isdigit() else 0
    if number < 1:
        raise UsageError(f"trainer.devices={setting} is no number of devices: say trainer.devices=8.")
    return number


def strategies_of(world: World, settings: Pretrain) -> list[list[Strategy]]:
    """Return the strategies to compare; those together whose steps run the same layers."""
    if world.devices == 1 and world.strategy == "one process":
        return [["one process"]]
    if settings.method.get("optimizer") == "muon" or world.precision == "16-mixed":  # refused with fsdp2
        return [["ddp"]]
    return [["ddp", "fsdp2"]] if world.device == "cuda" else [["ddp"], ["fsdp2"]]


def prepare(settings: Pretrain, world: World, *, sharded: bool, recomputed: bool) -> Method:
    """Return the method on the meta device as it trains."""
    on_cpu = world.device == "cpu"
    with torch.device("meta"), fused_attention(not on_cpu):
        method = method_from_settings(dataclasses.replace(settings, activation_checkpointing=recomputed))
    dtype, _ = PRECISIONS[world.precision]
    method.to(dtype).train()
    if on_cpu and not sharded and not settings.compile:
        use_cpu_kernels(method)
    return method


def measure(method: Method, world: World) -> tuple[StepBytes, StepBytes]:
    """Run a step with the batch of the settings, and one with twice as many images."""
    inputs, (_, autocast) = inputs_of(method), PRECISIONS[world.precision]
    one, two = (
        measure_step(method, inputs, images, device=world.device, autocast=autocast)
        for images in (world.images, 2 * world.images)
    )
    return one, two


def figures(of: DeviceMemory, world: World, memory: float) -> dict[str, Any]:
    """Return the figures of one way to train."""
    return {
        "held": of.rows(world.images),
        "peak": of.peak(world.images),
        "sent": dict(of.sent),
        "largest_batch": of.largest_batch(memory),
    }


def choice(plans: Mapping[str, Mapping[str, Any]], world: World) -> str:
    """Return what to choose, in a sentence: the first that fits of DDP, FSDP2, and both with recomputed activations."""
    order = ("one process", "ddp", "fsdp2", "one process, recomputed", "ddp, recomputed", "fsdp2, recomputed")
    known = [name for name in order if name in plans]
    fitting = [name for name in known if plans[name]["largest_batch"] >= world.images]
    if fitting:
        return f"{_settings_of(fitting[0])}, batches of {world.images} per device."
    roomiest = max(known, key=lambda name: plans[name]["largest_batch"])
    largest = plans[roomiest]["largest_batch"]
    if not largest:
        more = "more devices, trainer.strategy=fsdp2" if world.devices == 1 or "fsdp2" in plans else "larger devices"
        return f"nothing fits, not even one image: take {more}, or a smaller network."
    total = world.images * world.accumulate
    accumulate = next(of for of in range(world.accumulate, total + 1) if total % of == 0 and total // of <= largest)
    named = f"{_settings_of(roomiest)} and trainer.accumulate_grad_batches={accumulate}"
    return f"{named}, batches of {total // accumulate} per device."


def _settings_of(name: str) -> str:
    strategy, _, recomputed = name.partition(", ")
    first = "one process" if strategy == "one process" else f"trainer.strategy={strategy}"
    return first + (" with activation_checkpointing=true" if recomputed else "")


def about(settings: Pretrain, method: Method, world: World) -> str:
    """Return in a line what is planned."""
    many = f"{world.devices} {'GPU' if world.device == 'cuda' else 'CPU process'}"
    many += ("" if world.devices == 1 else "s" if world.device == "cuda" else "es") + (
        f" on {world.nodes} nodes" if world.nodes > 1 else ""
    )
    trained = sum(one.numel() for one in method.parameters() if one.requires_grad)
    precision = world.precision
    if world.device == "cpu" and precision == "bf16-mixed" and isinstance(method.pretrained(), Dense):
        precision += " (32-true in the backbone)"
    shared = f"{settings.batch_size} images = {world.images} x {world.devices} x {world.accumulate} accumulated"
    what = f"{type(method).__name__} on {settings.backbone['name']}, {trained / 1e6:,.0f} M parameters trained"
    return f"{what}; {many}, {precision}; {shared}"
