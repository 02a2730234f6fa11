"""What hiding three quarters of a Swin's units saves: FLOPs, saved activations and time, against the dense model.

python benchmarks/swin_cost.py [model] [image size] [window] [batch]

The dense model is stock timm. All three take turns in one process, forward and backward, on the CPU in fp32.
"""

import statistics
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from sslvision.backbones.build import build_backbone
from sslvision.training.trainer import configure_torch

ROUNDS = 7


def main(name="swin_tiny_patch4_window7_224", size=256, window=8, batch=8):
    torch.manual_seed(0)
    configure_torch("cpu")
    swin = build_backbone(name, image_size=int(size), window_size=int(window), drop_path_rate=0.0).train()
    images = torch.randn(int(batch), 3, int(size), int(size))
    units = swin.grid[0] * swin.grid[1]
    keep = torch.rand(len(images), units).argsort(dim=1)[:, : units // 4]
    runs = {
        "dense (stock timm)": lambda: swin.model.forward_features(images),
        "visible only, a mask for each image": lambda: swin.encode(images, keep),
        "visible only, one mask for all": lambda: swin.encode(images, keep[:1].expand(len(images), -1)),
    }
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name_of, run in runs.items():
            seconds[name_of].append(timed(run, swin))
    figures = {of: (flops(run), saved(run, swin), statistics.median(seconds[of])) for of, run in runs.items()}
    table = Table(
        title=f"{name} at {size}, windows of {window}, {keep.shape[1]} of {units} units visible, an image of {batch}",
        title_justify="left",
    )
    for column in ("", "GFLOP forward", "saved MB", "forward + backward ms", "of dense", "", "times faster"):
        table.add_column(column, justify="left" if not column else "right")
    dense = next(iter(figures.values()))
    for of, (work, memory, time_taken) in figures.items():
        table.add_row(
            of,
            f"{work / len(images) / 1e9:.2f}",
            f"{memory / len(images) / 1e6:.0f}",
            f"{1e3 * time_taken / len(images):.1f}",
            f"{100 * work / dense[0]:.1f} % of FLOPs",
            f"{100 * memory / dense[1]:.1f} % of memory",
            f"{dense[2] / time_taken:.2f}",
        )
    Console(width=170).print(table)


def flops(run):
    """FLOPs of a forward pass."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def saved(run, swin):
    """Bytes kept for the backward pass, each storage once, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in swin.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(kept.values())


def timed(run, swin):
    """Seconds of a forward and a backward pass."""
    start = time.perf_counter()
    run().square().mean().backward()
    for parameter in swin.parameters():
        parameter.grad = None
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
