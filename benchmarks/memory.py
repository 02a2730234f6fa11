"""What activation_checkpointing=true saves and costs: activations kept, peak memory and time of a training step.

python benchmarks/memory.py [--model vit_small_patch16_224] [--batch 4] [--rounds 7] [--device cpu|cuda] [--json FILE]

MAE at 224 and DINO with 2 crops of 224 and 8 of 96 (4,096 prototypes on a CPU, where 65,536 would be most of the step), in
turns in one process. Kept are the distinct storages that autograd saves, parameters left out. Peak memory is of a GPU only.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from sslvision.backbones.build import build_backbone
from sslvision.methods.base import Clock
from sslvision.methods.dino import DINO
from sslvision.methods.mae import MAE
from sslvision.training.trainer import configure_method, configure_torch


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224", help="any timm ViT or Swin")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be 2 or more: one round has no quartiles")
    configure_torch(arguments.device)
    figures = {name: compare(method, arguments) for name, method in methods(arguments)}
    report(figures, arguments)
    if arguments.json:
        setting = {**vars(arguments), "json": None, "threads": torch.get_num_threads(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps({"setting": setting, "figures": figures}, indent=2) + "\n")


def methods(arguments):
    torch.manual_seed(0)

    def backbone():
        return build_backbone(arguments.model, image_size=arguments.size, drop_path_rate=0.1)

    yield "MAE", MAE(backbone())
    yield "DINO", DINO(backbone(), prototypes=4096 if arguments.device == "cpu" else 65_536)


def compare(method, arguments):
    """Return kept MB, peak MB and ms of a step, usual and with activation_checkpointing=true."""
    device = torch.device(arguments.device)
    usual, low = method.to(device).train(), copy.deepcopy(method).to(device).train()
    low.enable_activation_checkpointing()
    for one in (usual, low):
        configure_method(one, device, cuda_graphs=False)  # activations are counted, which a graph keeps to itself
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(arguments.batch, 3, c.size, c.size, generator=generator).to(device) for c in method.crops]
    if isinstance(method, MAE):
        views.append(torch.rand(arguments.batch, method.backbone.grid[0] * method.backbone.grid[1]).to(device))
    runs = {"normal": usual, "low": low}
    times, peaks = {name: [] for name in runs}, {}
    for number in range(arguments.rounds + 1):
        for name in runs if number % 2 else [*runs][::-1]:
            milliseconds, peaks[name] = timed(runs[name], views, device)
            times[name].append(milliseconds)
    ratios = [low / usual for low, usual in zip(times["low"][1:], times["normal"][1:], strict=True)]
    return {
        "kept_mb": {name: kept(run, views, device) / 1e6 for name, run in runs.items()},
        "peak_mb": peaks if device.type == "cuda" else None,
        "ms_min": {name: min(of) for name, of in times.items()},
        "time_ratio": {"median": statistics.median(ratios), "quartiles": statistics.quantiles(ratios, n=4)[::2]},
    }


def loss_of(method, views, device):
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        return method.losses(views, Clock(0, 100, 10))["loss"]


def kept(method, views, device):
    """Bytes kept for the backward pass, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in method.parameters()}
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or another would get its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(method, views, device)
    del loss
    return sum(nbytes for nbytes, _ in storages.values())


def timed(method, views, device):
    """Milliseconds of a forward and a backward pass, and the peak of a GPU's memory above what lay there before, in MB."""
    before = 0
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    loss_of(method, views, device).backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    method.zero_grad(set_to_none=True)
    return 1e3 * seconds, (torch.cuda.max_memory_allocated() - before) / 1e6 if device.type == "cuda" else None


def report(figures, arguments):
    table = Table(title=f"{arguments.model} at {arguments.size}, {arguments.batch} images, {arguments.device}")
    columns = (
        "",
        "kept MB",
        "checkpointed",
        "of it %",
        "ms (min)",
        "activation_checkpointing=true",
        "times as long [quartiles]",
        "peak MB",
    )
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, row in figures.items():
        usual, low = row["kept_mb"].values()
        low_q, high_q = row["time_ratio"]["quartiles"]
        table.add_row(
            name,
            f"{usual:.0f}",
            f"{low:.0f}",
            f"{100 * low / usual:.0f}",
            *(f"{row['ms_min'][which]:.0f}" for which in ("normal", "low")),
            f"{row['time_ratio']['median']:.2f} [{low_q:.2f}, {high_q:.2f}]",
            "n/a" if row["peak_mb"] is None else " to ".join(f"{mb:.0f}" for mb in row["peak_mb"].values()),
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
